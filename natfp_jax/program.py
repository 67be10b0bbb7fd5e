"""The jitted functions that train a cohort: arms of one shape, as one program.

Owns the state, whose leading axis is the replicas', and how a batch of each becomes the next state: loss and gradients, in
parts where asked for, the update, and what is left out where a number is not finite. Must not know the order of batches, files,
or when anything is saved.

Execution `strict`: a device takes its replicas one after another through one loop, whose length is no part of the program; so a
replica's bits do not depend on its companions. `fast`: all of them at once, as batched operations.

Letters: K replicas, B rows, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from natfp_jax import descent, lora, mesh, optim, packing, params, platforms, rng
from natfp_jax.checkpoint import with_shardings
from natfp_jax.config import Experiment, Optimiser, Run, shape
from natfp_jax.corpus import Store
from natfp_jax.loss import blocked_cross_entropy
from natfp_jax.model import Learning, Remat, head, hidden
from natfp_jax.optim import Hyperparameters
from natfp_jax.params import Params

__all__ = ["Program", "State", "begins", "device_bytes", "execution_of", "learnt", "one_each", "program_for", "program_of"]

Execution = Literal["strict", "fast"]


class State(NamedTuple):
    """All that training carries from step to step; of one arm, or with the axis K in front of every leaf."""

    params: Params
    optimiser: optax.OptState


def execution_of(settings: Run, devices: jax.sharding.Mesh) -> Execution:
    """What `settings` asks for; else what is faster: batched products suit accelerators, not a CPU's caches."""
    return settings.execution or ("strict" if platforms.target(devices) == "cpu" else "fast")


class Program:
    """The functions of one shape on one mesh, for so many replicas."""

    def __init__(
        self,
        shape: Experiment,
        vocabulary: int,
        padded: int,
        replicas: int,
        devices: jax.sharding.Mesh,
        microbatches: int,
        remat: Remat,
        execution: Execution,
    ) -> None:
        self.replicas, self.shape, self.devices, self.execution = replicas, shape, devices, execution
        self._vocabulary, self._microbatches, self._remat = vocabulary, microbatches, remat
        self._specs = lora.table(shape.model, padded, shape.lora)
        self._trained = lora.adapters(shape.model, padded, shape.lora) if shape.lora else self._specs
        by_table, one = mesh.param_shardings(devices, self._specs), mesh.replicated(devices)
        alone = params.abstract(self._specs)
        # Which numbers an optimiser has does not change what it keeps.
        tx = self._optimiser(optim.hyperparameters(Optimiser(), 1))
        self._start = tx.init
        trained, _ = lora.split(alone, shape.lora)
        shapes = State(alone, jax.eval_shape(tx.init, trained))
        optimiser = optax.tree_map_params(
            tx,
            # Where each of several transformations has some of the parameters, the others are nodes without a leaf.
            lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
            shapes.optimiser,
            lora.split(by_table, shape.lora)[0],
            transform_non_params=lambda _: one,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        shardings = State(by_table, optimiser)
        self.one: State = with_shardings(shapes, shardings)  # of one arm: shapes, dtypes and shardings
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((replicas, *leaf.shape), leaf.dtype), shapes)
        self.state: State = with_shardings(stacked, jax.tree.map(mesh.stacked, shardings))  # of the cohort

    # --- one arm in and out of the cohort ---

    def filled(self, arms: Sequence[Any]) -> list[Any]:
        """One of every arm, and the last once more for each place that is left: the axis `replica` has no rest."""
        return [*arms, *[arms[-1]] * (self.replicas - len(arms))]

    def saved(self, replicas: int) -> State:
        """The state of a cohort with so many places: shapes, dtypes, and shardings to restore it with."""
        if replicas == self.replicas:
            return self.state

        # Where they do not divide, every device has all: it is that or another file format.
        axis = None if replicas % self.devices.shape["replica"] else "replica"

        def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(self.devices, PartitionSpec(axis, *leaf.sharding.spec))
            return jax.ShapeDtypeStruct((replicas, *leaf.shape), leaf.dtype, sharding=sharding)

        found: State = jax.tree.map(stacked, self.one)
        return found

    def fitted(self, saved: State, places: Sequence[int]) -> State:
        """The state of this cohort from a saved one, in which its arms had these places."""
        if jax.tree.leaves(saved)[0].shape[0] == self.replicas and list(places) == list(range(len(places))):
            return saved
        return self.stack([partial(self.take, saved, place) for place in places])

    def init(self, seed: int, perturb: Any = None, parent: Callable[[], Params] | None = None) -> State:
        """One arm at step 0: all from the init seed, or a parent's weights, and from the seed what adapts them."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.one)
        tree = descent.begun(self._specs, seed, shardings.params, perturb, None if parent is None else parent())
        trained, _ = lora.split(tree, self.shape.lora)
        return State(tree, jax.jit(self._start, out_shardings=shardings.optimiser)(trained))

    def stack(self, arms: Sequence[Callable[[], State]]) -> State:
        """The state of a cohort of these arms, made one after another; the last one fills the places that are left."""
        state = self._empty()
        for place, arm in enumerate(arms):
            one = arm()
            for where in (place,) if place < len(arms) - 1 else range(place, self.replicas):
                state = self._put(state, one, np.int32(where))
        return state

    @cached_property
    def _empty(self) -> Callable[[], State]:
        def empty() -> State:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.state)

        return jax.jit(empty, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state))

    @cached_property
    def _put(self) -> Callable[[State, State, np.int32], State]:
        def put(state: State, one: State, place: jax.Array) -> State:
            return jax.tree.map(lambda all_K, leaf: all_K.at[place].set(leaf), state, one)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(put, out_shardings=shardings, donate_argnums=0)

    @cached_property
    def take(self) -> Callable[[Any, int], Any]:
        """The leaves of one arm, from those of the cohort: of a whole state, or of its parameters."""

        def take(tree: Any, place: jax.Array) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), tree)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.one)
        of_params, of_state = (jax.jit(take, out_shardings=wanted) for wanted in (shardings.params, shardings))

        def taken(tree: Any, place: int) -> Any:
            return (of_state if isinstance(tree, State) else of_params)(tree, np.int32(place))

        return taken

    # --- what is computed ---

    def _optimiser(self, numbers: Hyperparameters) -> optax.GradientTransformation:
        settings = self.shape.optimiser
        rate = optim.schedule(numbers, settings.schedule, self.shape.steps)
        return optim.optimiser(numbers, settings.kind, rate, self._trained)

    def _loss(self, tree: Params, windows_BT: jax.Array, noise_B2: jax.Array | None = None) -> jax.Array:
        """The mean over what is learnt: all tokens of text, the answers of conversations."""
        # Inside of `shard_map` the mesh is that of the axes which are left to the compiler.
        devices = jax.sharding.get_abstract_mesh() if self.devices.shape["replica"] > 1 else self.devices
        begin_BT = learnt_BT = None
        if self.shape.corpus.conversations:
            begin_BT, learnt_BT = begins(windows_BT[:, :-1]), learnt(windows_BT)
            windows_BT = windows_BT & packing.IDS
        learning = Learning(self.shape.lora, self.shape.dropout)
        x_BTD = hidden(
            self.shape.model, tree, windows_BT[:, :-1], devices, self._remat, learning, begin_BT=begin_BT, noise_B2=noise_B2
        )
        return blocked_cross_entropy(x_BTD, head(tree), windows_BT[:, 1:], self._vocabulary, learnt_BT, devices)

    def _gradients(self, tree: Params, windows_BT: jax.Array, noise_B2: jax.Array | None) -> tuple[jax.Array, Params]:
        """The loss, and its gradient by what is trained."""
        trained, still = lora.split(tree, self.shape.lora)

        def loss(trained: Params, windows_BT: jax.Array, noise_B2: jax.Array | None) -> jax.Array:
            return self._loss(lora.joined(trained, still), windows_BT, noise_B2)

        if self._microbatches == 1:
            return jax.value_and_grad(loss)(trained, windows_BT, noise_B2)

        # Part i has the rows i, i + parts, ...: each device keeps its rows.
        def cut(rows: jax.Array) -> jax.Array:
            return jnp.moveaxis(rows.reshape(-1, self._microbatches, rows.shape[1]), 1, 0)

        parts = cut(windows_BT), None if noise_B2 is None else cut(noise_B2)
        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        everything = learnt(windows_BT).sum() if self.shape.corpus.conversations else None

        def add(
            total: tuple[jax.Array, Params], part: tuple[jax.Array, jax.Array | None]
        ) -> tuple[tuple[jax.Array, Params], None]:
            found = jax.value_and_grad(loss)(trained, *part)
            if everything is not None:  # parts have more and less to learn
                share = self._microbatches * learnt(part[0]).sum() / everything
                found = jax.tree.map(lambda leaf: leaf * share, found)
            return jax.tree.map(jnp.add, total, found), None

        total, _ = jax.lax.scan(add, start, parts)
        summed: tuple[jax.Array, Params] = jax.tree.map(lambda leaf: leaf / self._microbatches, total)
        return summed

    def _next(
        self, state: State, numbers: Hyperparameters, windows_BT: jax.Array, noise_2: jax.Array | None
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of one replica."""
        tx = self._optimiser(numbers)
        noise_B2 = None
        if noise_2 is not None:
            key = rng.below(rng.stream(noise_2[0], "dropout"), noise_2[1])
            noise_B2 = rng.packed(jax.vmap(lambda row: rng.below(key, row))(jnp.arange(len(windows_BT))))
        value, gradient = self._gradients(state.params, windows_BT, noise_B2)
        trained, still = lora.split(state.params, self.shape.lora)
        updates, opt_state = tx.update(gradient, state.optimiser, trained)
        new = State(lora.joined(optax.apply_updates(trained, updates), still), opt_state)
        norm = optax.global_norm(gradient)
        if self.shape.optimiser.nonfinite == "skip":
            good = jnp.isfinite(value) & jnp.isfinite(norm)
            new = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return new, {"loss": value, "gradient_norm": norm}

    def _each(self, function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        """`function`, which maps what is carried and inputs of one replica, for all: (count, carried, *inputs)."""

        def loop(count: jax.Array, carried: Any, *inputs: Any) -> tuple[Any, Any]:
            def at(tree: Any, place: jax.Array) -> Any:
                return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place, keepdims=False), tree)

            def put(tree: Any, one: Any, place: jax.Array) -> Any:
                return jax.tree.map(lambda leaf, v: jax.lax.dynamic_update_index_in_dim(leaf, v, place, 0), tree, one)

            def body(place: jax.Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
                return put(both, function(at(both[0], place), *at(inputs, place)), place)

            length = jax.tree.leaves(inputs)[0].shape[0]
            _, like = jax.eval_shape(function, at(carried, jnp.int32(0)), *at(inputs, jnp.int32(0)))
            empty = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), like)
            # In place, and by a count that the compiler does not know: a loop of one would be another program.
            found: tuple[Any, Any] = jax.lax.fori_loop(0, count, body, (carried, empty))
            return found

        def batched(count: jax.Array, carried: Any, *inputs: Any) -> tuple[Any, Any]:
            del count
            found: tuple[Any, Any] = jax.vmap(function)(carried, *inputs)
            return found

        local = loop if self.execution == "strict" else batched
        if self.devices.shape["replica"] == 1:
            return local
        spread = PartitionSpec("replica")

        def mapped(count: jax.Array, carried: Any, *inputs: Any) -> tuple[Any, Any]:
            specs = (PartitionSpec(), spread, *(spread for _ in inputs))
            found: tuple[Any, Any] = jax.shard_map(
                local, mesh=self.devices, in_specs=specs, out_specs=spread, axis_names={"replica"}, check_vma=False
            )(count, carried, *inputs)
            return found

        return mapped

    @cached_property
    def _count(self) -> jax.Array:
        """How many replicas a device has."""
        return mesh.lay(np.int32(self.replicas // self.devices.shape["replica"]), mesh.replicated(self.devices))

    @cached_property
    def traced(self) -> jax.stages.Traced:
        """One step of the cohort, from shapes alone: the devices may be of a slice that is not at hand."""
        each, leading = self._each(self._next), NamedSharding(self.devices, PartitionSpec("replica"))

        def step(
            count: jax.Array,
            state: State,
            numbers: Hyperparameters,
            windows_KBT: jax.Array,
            noise_K2: jax.Array | None,
            asked_N: jax.Array,
        ) -> tuple[State, dict[str, jax.Array]]:
            new, metrics = each(count, state, numbers, windows_KBT, noise_K2)
            return new, {**metrics, "asked": asked_N.max()}

        K, data, one = self.replicas, self.shape.data, mesh.replicated(self.devices)
        row_K = jax.ShapeDtypeStruct((K,), np.float32, sharding=leading)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(step, out_shardings=(shardings, one), donate_argnums=1).trace(
            jax.ShapeDtypeStruct((), np.int32, sharding=one),
            self.state,
            Hyperparameters(*[row_K] * len(Hyperparameters._fields)),
            jax.ShapeDtypeStruct((K, data.batch, data.seq_len + 1), np.int32, sharding=mesh.batch_sharding(self.devices)),
            jax.ShapeDtypeStruct((K, 2), np.uint32, sharding=leading) if self.shape.dropout else None,
            jax.ShapeDtypeStruct((self.devices.size,), np.int32, sharding=one_each(self.devices)),
        )

    @cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The same for these devices."""
        return self.traced.lower().compile()

    def noise(self, seeds: Sequence[int], step: int) -> jax.Array | None:
        """What the dropout of the step after `step` is drawn from: dropout seed and step, uint32 [K, 2]; None: nothing is."""
        if not self.shape.dropout:
            return None
        noise_K2 = np.array([(seed, step) for seed in self.filled(seeds)], np.uint32)
        return mesh.lay(noise_K2, NamedSharding(self.devices, PartitionSpec("replica")))

    def step(
        self,
        state: State,
        numbers: Hyperparameters,
        windows_KBT: jax.Array,
        asked_N: jax.Array,
        noise_K2: jax.Array | None = None,
    ) -> tuple[State, dict[str, jax.Array]]:
        """The next state; `loss` and `gradient_norm` of every replica before the update; the most that was `asked`.

        The state that it is given is given up.
        """
        return self.compiled(self._count, state, numbers, windows_KBT, noise_K2, asked_N)

    @cached_property
    def _evaluated(self) -> Callable[..., jax.Array]:
        def function(carried: None, tree: Params, windows_BT: jax.Array) -> tuple[None, jax.Array]:
            return carried, self._loss(tree, windows_BT)

        each = self._each(function)
        return jax.jit(
            lambda count, tree, windows_KBT: each(count, None, tree, windows_KBT)[1],
            out_shardings=mesh.replicated(self.devices),
        )

    def evaluate(self, tree: Params, windows_KBT: jax.Array) -> jax.Array:
        """The mean loss of every replica on a batch of its own."""
        return self._evaluated(self._count, tree, windows_KBT)

    @property
    def device_bytes(self) -> int:
        """What a step takes of a device's memory, as the compiler has laid it out; of a host's also what is being saved."""
        taken = device_bytes(self.compiled)
        if platforms.target(self.devices) == "cpu":  # a save goes on beside training, from a copy in the same memory
            leaves = jax.tree.leaves(self.state)
            taken += sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        return taken


def device_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program takes of a device's memory, as the compiler has laid it out."""
    found = compiled.memory_analysis()
    assert found is not None  # every backend that trains says it
    taken = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(taken + found.generated_code_size_in_bytes - found.alias_size_in_bytes)


def begins(marked_BT: jax.Array) -> jax.Array:
    """The place in its row at which the example of each id of packed windows begins: int32 [B, T]."""
    place_T = jnp.arange(marked_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(marked_BT & packing.BEGINS != 0, place_T, 0), axis=1)


def learnt(marked_BT: jax.Array) -> jax.Array:
    """1 where the id that follows is learnt, of packed windows: float32 [B, T - 1]."""
    return (marked_BT[:, 1:] & packing.LEARNT != 0).astype(jnp.float32)


def one_each(devices: jax.sharding.Mesh) -> NamedSharding:
    """One value a device: every process has its own say."""
    return NamedSharding(devices, PartitionSpec(mesh.AXES))


_program = lru_cache(maxsize=8)(Program)  # arms of one shape share one, and so compile once


def program_of(experiment: Experiment, store: Store, devices: jax.sharding.Mesh, settings: Run, replicas: int = 1) -> Program:
    """The program of a cohort of experiments like this one; the `replica` axis of the mesh is filled up."""
    return program_for(experiment, store.tokenizer.size, store.tokenizer.padded_size, devices, settings, replicas)


def program_for(
    experiment: Experiment, vocabulary: int, padded: int, devices: jax.sharding.Mesh, settings: Run, replicas: int = 1
) -> Program:
    """The same of a vocabulary without and with padding, whatever is in it."""
    ways = devices.shape["replica"]
    return _program(
        shape(experiment),
        vocabulary,
        padded,
        -(-replicas // ways) * ways,
        devices,
        settings.microbatches,
        settings.remat,
        execution_of(settings, devices),
    )
