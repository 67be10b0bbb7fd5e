"""The jitted functions of one arm's training.

Owns the state, and how a batch becomes the next one: loss and gradients, in parts where asked for, the update, and what is left
out where a number is not finite. Must not know the order of batches, files, or when anything is saved.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from natfp_jax import mesh, optim, params
from natfp_jax.checkpoint import with_shardings
from natfp_jax.config import Experiment, Model, Optimiser, Run
from natfp_jax.corpus import Store
from natfp_jax.loss import blocked_cross_entropy
from natfp_jax.model import head, hidden
from natfp_jax.params import Params

__all__ = ["Program", "State", "one_each", "program_of"]


class State(NamedTuple):
    """All that training carries from step to step."""

    params: Params
    optimiser: optax.OptState


class Program(NamedTuple):
    """The jitted functions of one arm's training."""

    init: Callable[..., State]  # seed, perturbation → state at step 0
    step: Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[Params, jax.Array], jax.Array]  # mean loss of one batch
    state: State  # shapes, dtypes and shardings


@lru_cache(maxsize=8)
def _program(
    model: Model,
    optimiser: Optimiser,
    steps: int,
    vocabulary: int,
    padded: int,
    devices: jax.sharding.Mesh,
    microbatches: int,
    remat: Any,
) -> Program:
    """The jitted functions; arms that differ only in seeds share them, and so compile once."""
    specs = params.table(model, padded)
    tx = optim.optimiser(optimiser, steps, specs)

    def loss(tree: Params, windows_BT: jax.Array) -> jax.Array:
        x_BTD = hidden(model, tree, windows_BT[:, :-1], devices, remat)
        return blocked_cross_entropy(x_BTD, head(tree), windows_BT[:, 1:], vocabulary)

    def gradients(tree: Params, windows_BT: jax.Array) -> tuple[jax.Array, Params]:
        if microbatches == 1:
            return jax.value_and_grad(loss)(tree, windows_BT)
        # Part i has the rows i, i + parts, ...: each device keeps its rows.
        parts = jnp.moveaxis(windows_BT.reshape(-1, microbatches, windows_BT.shape[1]), 1, 0)
        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, tree))

        def add(total: tuple[jax.Array, Params], part: jax.Array) -> tuple[tuple[jax.Array, Params], None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(tree, part)), None

        total, _ = jax.lax.scan(add, start, parts)
        summed: tuple[jax.Array, Params] = jax.tree.map(lambda leaf: leaf / microbatches, total)
        return summed

    def step(state: State, windows_BT: jax.Array, asked_N: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        value, gradient = gradients(state.params, windows_BT)
        updates, opt_state = tx.update(gradient, state.optimiser, state.params)
        new = State(optax.apply_updates(state.params, updates), opt_state)
        norm = optax.global_norm(gradient)
        if optimiser.nonfinite == "skip":
            good = jnp.isfinite(value) & jnp.isfinite(norm)
            new = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return new, {"loss": value, "gradient_norm": norm, "asked": asked_N.max()}

    by_table, one, rows = mesh.param_shardings(devices, specs), mesh.replicated(devices), mesh.batch_sharding(devices)
    shapes = State(params.abstract(specs), jax.eval_shape(tx.init, params.abstract(specs)))
    opt_shardings = optax.tree_map_params(
        tx, lambda _, sharding: sharding, shapes.optimiser, by_table, transform_non_params=lambda _: one
    )
    shardings = State(by_table, opt_shardings)
    start = jax.jit(tx.init, out_shardings=opt_shardings)

    def init(seed: int, perturb: Any) -> State:
        tree = params.init(specs, seed, by_table, perturb)
        return State(tree, start(tree))

    return Program(
        init=init,
        step=jax.jit(step, in_shardings=(shardings, rows, one_each(devices)), out_shardings=(shardings, one), donate_argnums=0),
        evaluate=jax.jit(loss, in_shardings=(by_table, rows), out_shardings=one),
        state=with_shardings(shapes, shardings),
    )


def one_each(devices: jax.sharding.Mesh) -> NamedSharding:
    """One value a device: every process has its own say."""
    return NamedSharding(devices, PartitionSpec(mesh.AXES))


def program_of(experiment: Experiment, store: Store, devices: jax.sharding.Mesh, settings: Run) -> Program:
    """The program of an experiment on a mesh; arms that differ only in seeds share one."""
    vocabulary, padded = store.tokenizer.size, store.tokenizer.padded_size
    shapes = vocabulary, padded, devices, settings.microbatches, settings.remat
    return _program(experiment.model, experiment.optimiser, experiment.steps, *shapes)
