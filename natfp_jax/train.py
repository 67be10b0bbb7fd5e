"""Training one arm.

Owns the state, the jitted step, the loop, and what is recorded at each kept checkpoint. Everything but the state is a function
of the step, so a restart from any checkpoint gives the bits of an untouched run. Must not know studies, sampling or reports.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from natfp_jax import mesh, optim, params
from natfp_jax.checkpoint import with_shardings
from natfp_jax.config import Experiment, Model, Optimiser, Run
from natfp_jax.corpus import Store
from natfp_jax.errors import UserError
from natfp_jax.lineage import Identity, numerics, weight_hash
from natfp_jax.loss import block_length, blocked_cross_entropy
from natfp_jax.model import head, hidden
from natfp_jax.order import Order, order_hash
from natfp_jax.params import Params
from natfp_jax.runs import MetricsLog, RunFolder

__all__ = ["State", "check", "load_params", "train"]


class State(NamedTuple):
    """All that training carries from step to step."""

    params: Params
    optimiser: optax.OptState


class _Program(NamedTuple):
    init: Callable[[int], State]  # seed → state at step 0
    step: Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[Params, jax.Array], jax.Array]  # mean loss of one batch
    state: State  # shapes, dtypes and shardings


@lru_cache(maxsize=8)
def _program(
    model: Model, optimiser: Optimiser, steps: int, vocabulary: int, padded: int, devices: jax.sharding.Mesh
) -> _Program:
    """The jitted functions; arms that differ only in seeds share them, and so compile once."""
    specs = params.table(model, padded)
    tx = optim.optimiser(optimiser, steps, specs)

    def loss(tree: Params, windows_BT: jax.Array) -> jax.Array:
        x_BTD = hidden(model, tree, windows_BT[:, :-1])
        return blocked_cross_entropy(x_BTD, head(tree), windows_BT[:, 1:], vocabulary)

    def step(state: State, windows_BT: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        value, gradient = jax.value_and_grad(loss)(state.params, windows_BT)
        updates, opt_state = tx.update(gradient, state.optimiser, state.params)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(gradient)}
        return State(optax.apply_updates(state.params, updates), opt_state), metrics

    by_table, one, rows = mesh.param_shardings(devices, specs), mesh.replicated(devices), mesh.batch_sharding(devices)
    shapes = State(params.abstract(specs), jax.eval_shape(tx.init, params.abstract(specs)))
    opt_shardings = optax.tree_map_params(
        tx, lambda _, sharding: sharding, shapes.optimiser, by_table, transform_non_params=lambda _: one
    )
    shardings = State(by_table, opt_shardings)
    start = jax.jit(tx.init, out_shardings=opt_shardings)

    def init(seed: int) -> State:
        tree = params.init(specs, seed, by_table)
        return State(tree, start(tree))

    return _Program(
        init=init,
        step=jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, one), donate_argnums=0),
        evaluate=jax.jit(loss, in_shardings=(by_table, rows), out_shardings=one),
        state=with_shardings(shapes, shardings),
    )


def _program_of(experiment: Experiment, store: Store, devices: jax.sharding.Mesh) -> _Program:
    tokenizer = store.tokenizer
    return _program(experiment.model, experiment.optimiser, experiment.steps, tokenizer.size, tokenizer.padded_size, devices)


def load_params(run: RunFolder, step: int, experiment: Experiment, store: Store, devices: jax.sharding.Mesh) -> Params:
    """The parameters of `run` at `step`, laid over the mesh."""
    with run.checkpoints() as checkpoints:
        tree, _ = checkpoints.restore(step, _program_of(experiment, store, devices).state.params)
        _check_weights(tree, checkpoints.record(step), run)
    return tree


def _check_weights(tree: Params, record: dict[str, Any], run: RunFolder) -> None:
    """Orbax restores damaged arrays without a word; what was recorded when they were saved tells."""
    if (got := weight_hash(tree)) != record["weights"]:
        raise UserError(
            f"{run.folder} step {record['step']}: the weights have sha256 {got}, expected {record['weights']}: "
            "the checkpoint is damaged, remove that folder and run the same command again"
        )


def train(
    experiment: Experiment,
    identity: Identity,
    store: Store,
    run: RunFolder,
    settings: Run,
    devices: jax.sharding.Mesh,
    name: str,
    advance: Callable[[int], None],
) -> int:
    """Trains until every kept checkpoint exists, from the last whole one before the first that is missing.

    Args:
      name: how messages call the arm.
      advance: called with the number of steps done, now or earlier: all of the experiment's in the end.

    Returns:
      How many steps were done now.

    Raises:
      UserError: the folder belongs to another experiment, the batch does not divide over the mesh, the validation part has no
        whole batch, or the loss is not finite.
    """
    data, kept = experiment.data, experiment.kept_steps(settings.checkpoints)
    check(experiment, store, settings, devices)
    run.claim(experiment, identity)
    missing = run.missing(kept)
    if not missing:
        run.write_lineage(identity)  # a process killed after its last checkpoint has not
        advance(experiment.steps)
        return 0
    program = _program_of(experiment, store, devices)
    lay = partial(jax.device_put, device=mesh.batch_sharding(devices))
    pool = store.windows(data.seq_len, data.windows)
    validation = _validation(store, experiment, settings)
    order = Order(data.windows, data.batch, experiment.seeds.order)
    rate = optim.schedule(experiment.optimiser, experiment.steps)
    common = {
        "fingerprint": identity.fingerprint,
        "numerics": numerics(devices, batch=data.batch, loss_block=block_length(data.batch, data.seq_len)),
    }

    with run.checkpoints() as checkpoints:
        start = max((step for step in checkpoints.steps() if step < missing[0]), default=None)
        if start is None:
            state, last, fed = program.init(experiment.seeds.init), None, identity.inputs["pool"]
            if experiment.perturb is not None:
                state = State(params.perturbed(state.params, experiment.perturb), state.optimiser)
        else:
            last = checkpoints.record(start)
            state = State(*checkpoints.restore(start, program.state.params, program.state.optimiser))
            _check_weights(state.params, last, run)
            fed = last["order_hash"]
        log = MetricsLog(run.folder, -1 if start is None else start, missing[-1], settings.tensorboard)

        def stop_unless_finite(step: int, what: str, value: float) -> None:
            if not math.isfinite(value):
                good = "none" if last is None else last["step"]
                raise UserError(
                    f"arm {name}: {what} {value} at step {step}, last good checkpoint {good} in {run.folder}: "
                    "lower experiment.optimiser.learning_rate"
                )

        def keep(step: int) -> dict[str, Any]:
            weights = weight_hash(state.params)
            losses = [float(program.evaluate(state.params, lay(batch))) for batch in validation]
            val_loss = math.fsum(losses) / len(losses)
            stop_unless_finite(step, "validation loss", val_loss)  # the last update may have spoiled the weights
            record = {
                **common,
                "step": step,
                "tokens": step * data.batch * data.seq_len,
                "weights": weights,
                "init_hash": weights if last is None else last["init_hash"],
                "order_hash": fed,
                "parent": None if last is None else {"step": last["step"], "weights": last["weights"]},
                "val_loss": val_loss,
            }
            log.write(step, val_loss=val_loss)  # first: a process killed between the two drops this line and writes it again
            checkpoints.save(step, state.params, state.optimiser, record)
            return record

        def look(step: int, metrics: dict[str, jax.Array]) -> None:
            values = {key: float(value) for key, value in metrics.items()}
            stop_unless_finite(step, "loss", values["loss"])
            if step % settings.log_every == 0:
                log.write(step, **values, learning_rate=float(rate(step - 1)))

        if last is None:
            last = keep(0)
        first = last["step"]
        advance(first)
        late = None  # a step's metrics are read once the next step is under way, so that the device never waits
        for step in range(first, missing[-1]):
            rows_B = order.rows(step)
            fed = order_hash(fed, rows_B)
            state, metrics = program.step(state, lay(pool.rows(rows_B)))
            if late is not None:
                look(*late)
            late = step + 1, metrics
            advance(1)
            if step + 1 in missing:
                look(*late)
                late, last = None, keep(step + 1)
    run.write_lineage(identity)
    advance(experiment.steps - missing[-1])
    return missing[-1] - first


def check(experiment: Experiment, store: Store, settings: Run, devices: jax.sharding.Mesh) -> None:
    """Raises a UserError if the experiment cannot run on this mesh, or has no whole batch to be validated on."""
    mesh.check_batch("experiment.data.batch", experiment.data.batch, devices)
    specs = params.table(experiment.model, store.tokenizer.padded_size)
    mesh.check_params(specs, devices)
    if experiment.perturb is not None:
        params.check_perturb({path: spec.shape for path, spec in specs.items()}, experiment.perturb)
    _validation(store, experiment, settings)


def _validation(store: Store, experiment: Experiment, settings: Run) -> list[np.ndarray]:
    """Whole batches of validation windows."""
    batch, seq_len = experiment.data.batch, experiment.data.seq_len
    windows = store.validation_windows(seq_len, max(settings.validation_windows, batch))
    if len(windows) < batch:
        raise UserError(
            f"the validation documents hold {len(windows)} windows of {seq_len + 1} tokens, expected a batch of {batch}: "
            "raise experiment.corpus.validation_fraction or lower experiment.data.batch"
        )
    return np.split(windows[: len(windows) // batch * batch], len(windows) // batch)
