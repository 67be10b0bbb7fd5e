"""Drawing texts: the jitted functions.

Owns what a row of texts carries from token to token, the keys of the noise, and the programs that begin rows, draw some more
tokens of them or score those that are given, and bring together those that are left. Must not know which rows are drawn when
(`turns.py`), files, arms or studies.

A text's bits depend on its weights, its draw's key, its prompt and the number of rows of a device: its slots are decided by the
length of its prompt and by how far it is, never by its place or its companions.

Letters: R draws side by side over `replica`, B rows, P slots of the prompt, S of all, W new tokens, V vocabulary, b blocks of
it.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from natfp_jax import mesh, platforms, rng
from natfp_jax.blocks import row_blocks
from natfp_jax.config import Model
from natfp_jax.model import Cache, decode, empty_cache, head, logits, unrolled
from natfp_jax.params import Params, Spec, abstract, count, dims, nest, table
from natfp_jax.strategy import Strategy, effective, remembers

__all__ = [
    "NEW_SLOTS",
    "New",
    "Programs",
    "Rows",
    "at_once",
    "categorical",
    "draw_key",
    "log_probability",
    "new_slots_for",
    "pad_prompts",
    "programs_of",
    "prompt_words",
    "rows_for",
    "slots_for",
]

_ROOM = 0.5  # of a device's memory
# Texts a device: more only make the caches leave the processor's own, or wait for one another.
_MOST = {"cpu": 256, "accelerator": 4096}
_THREADS = 16  # with more of them the caches of all batches take more memory than they are worth
NEW_SLOTS = 32  # of a text that has only begun; fewer would only make more programs
_BLOCK = 128  # ids of a block; the padded vocabulary is a multiple of it


def slots_for(tokens: int, least: int = 16) -> int:
    """The slots that hold so many tokens of a prompt: a power of two, so that few programs serve all lengths."""
    return max(least, 1 << (tokens - 1).bit_length())


def new_slots_for(tokens: int) -> int:
    """The slots that hold so many new tokens."""
    return slots_for(tokens, NEW_SLOTS)


def draw_key(seed: int, arm: str, step: int, strategy: Strategy, number: int) -> jax.Array:
    """The key of one draw. `arm` is the experiment's fingerprint: no two arms, checkpoints, strategies or draws share noise."""
    return rng.stream(seed, "sample", arm, step, repr(strategy), number)


def prompt_words(ids: Sequence[int]) -> np.ndarray:
    """The two 32-bit words of each prompt's id: uint32 [N, 2]."""
    return np.array([rng.words(int(number)) for number in ids], np.uint32).reshape(-1, 2)


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged ids → `tokens_BP` int32, padded on the right with `pad`, and `length_B`."""
    tokens_BP = np.full((len(prompts), width), pad, np.int32)
    for row, ids in zip(tokens_BP, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens_BP, np.array([len(ids) for ids in prompts], np.int32)


class Rows(NamedTuple):
    """Texts under way, all of one age: so many tokens drawn, of which the last has not been read by the model yet."""

    key_B: jax.Array  # the noise of a text: its draw's and its prompt's
    length_B: jax.Array  # of the prompts
    token_B: jax.Array  # drawn last
    done_B: jax.Array  # ended, or never begun: the place is only filled
    seen_BV: jax.Array | None  # the ids that prompt or text have, where the strategy remembers
    cache: Cache


class New(NamedTuple):
    """What was drawn or given: ids and their log-probability under the strategy, in nats; behind a text's end EOS and zero."""

    id_BW: jax.Array
    log_p_BW: jax.Array


class Programs:
    """The functions of one model and strategy on one mesh, for so many rows a device.

    The rows of all devices along `replica`, `data` and `fsdp` stand one behind another: [devices x rows, ...].
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        vocabulary: int,
        padded: int,
        eos: int,
        rows: int,
        devices: jax.sharding.Mesh,
        cache: str | None = None,
    ) -> None:
        """`vocabulary`, `padded`: without and with padding. `eos`: the id that ends a text. `cache`: its dtype."""
        self.model, self.strategy, self.eos, self.rows, self.devices = model, strategy, eos, rows, devices
        self._vocabulary, self._padded, self._cache_dtype = vocabulary, padded, cache
        self._specs = table(model, padded)
        self.ways = mesh.text_ways(devices)
        self._laid, self._none = mesh.text_sharding(devices), mesh.replicated(devices)
        heads = NamedSharding(devices, PartitionSpec(*self._laid.spec, "tensor"))
        one: Any = self._laid
        self._rows_laid = Rows(one, one, one, one, one, cache=heads)  # type: ignore[arg-type]
        self._compiled: dict[tuple[Any, ...], jax.stages.Compiled] = {}
        self._compiling = threading.Lock()

    # --- weights and keys, of the draws that stand side by side ---

    def weights(self, arms: Sequence[Callable[[], Params]]) -> Params:
        """The weights of as many arms as there are places along `replica`, or fewer, which take turns in them: [R, ...].

        An arm's are loaded, laid into its places, and given up before the next one's. Of a parameter every device has all but
        what `tensor` cuts: to gather it anew for every token would cost more than to draw the token.
        """
        all_R = self._no_weights()
        for number, arm in enumerate(arms):
            one = self._unrolled(arm())
            for place in range(number, self.devices.shape["replica"], len(arms)):
                all_R = self._put(all_R, one, mesh.lay(np.int32(place), self._none))
            del one
        return all_R

    @cached_property
    def _unrolled(self) -> Callable[[Params], Params]:
        return jax.jit(partial(unrolled, self.model))

    @cached_property
    def _no_weights(self) -> Callable[[], Params]:
        def empty() -> Params:
            found: Params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.weight_shapes)
            return found

        return jax.jit(empty, out_shardings=self._weight_shardings)

    @cached_property
    def weight_shapes(self) -> Params:
        """Shapes, dtypes and shardings of the weights: [R, ...]."""
        ways = self.devices.shape["replica"]
        shapes = jax.eval_shape(partial(unrolled, self.model), abstract(self._specs))
        found: Params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct((ways, *leaf.shape), leaf.dtype, sharding=sharding),
            shapes,
            self._weight_shardings,
        )
        return found

    @cached_property
    def _weight_shardings(self) -> Params:
        def spread(spec: Spec) -> NamedSharding:
            cut = [
                axis if axis == "tensor" else None
                for letter, axis in zip(spec.dims, spec.partition, strict=True)
                if letter != "L"
            ]
            return NamedSharding(self.devices, PartitionSpec("replica", *cut))

        tree = nest({path: spread(spec) for path, spec in self._specs.items()})
        return {**tree, "layers": [tree["layers"]] * self.model.layers}

    @cached_property
    def _put(self) -> Callable[[Params, Params, jax.Array], Params]:
        def put(all_R: Params, one: Params, place: jax.Array) -> Params:
            return jax.tree.map(lambda every, leaf: every.at[place].set(leaf), all_R, one)

        return jax.jit(put, donate_argnums=0, out_shardings=self._weight_shardings)

    def keys(self, draws: Sequence[jax.Array]) -> jax.Array:
        """The keys of the draws, laid as their weights are, as words: uint32 [R, 2]."""
        words = np.stack([np.asarray(rng.packed(key)) for key in draws])
        places = np.arange(self.devices.shape["replica"]) % len(draws)
        return mesh.lay(words[places], NamedSharding(self.devices, PartitionSpec("replica")))

    # --- rows ---

    def begin(
        self,
        weights: Params,
        keys: jax.Array,
        prompt_B2: np.ndarray,
        tokens_BP: np.ndarray,
        length_B: np.ndarray,
        given_BW: np.ndarray | None = None,
    ) -> tuple[Rows, New]:
        """Reads prompts, padded on the right, and draws the first token of each.

        Args:
          prompt_B2: the two words of each prompt's id (`prompt_words`).
          length_B: 0 where a place is only filled; else at least 1.
          given_BW: the first token of each, to be scored instead of drawn: [rows, 1].
        """
        arguments = weights, keys, *mesh.lay((prompt_B2, tokens_BP, length_B, given_BW), self._laid)
        name = "begin", tokens_BP.shape[1], given_BW is None
        return self._run(name, self._jitted_begin, arguments)

    def turn(
        self,
        weights: Params,
        rows: Rows,
        age: int,
        until: int,
        prompt_slots: int,
        width: int,
        given_BW: np.ndarray | None = None,
    ) -> tuple[Rows, New]:
        """Draws tokens `age` to `until` - 1 of each text, at most `width`; the rows that it is given are given up.

        Args:
          given_BW: these tokens, to be scored instead of drawn: [rows, `width`].
        """
        ages = mesh.lay(np.array([age, until], np.int32), self._none)
        arguments = weights, rows, ages, mesh.lay(given_BW, self._laid)
        name = "turn", prompt_slots, width, _slots(rows), given_BW is None
        return self._run(name, partial(self._jitted_turn, prompt_slots, width), arguments)

    def arrange(self, sources: Sequence[Rows], place_B: np.ndarray, slots: int) -> Rows:
        """Rows of one age brought together, with so many slots.

        Args:
          place_B: which row of the same device's, counted through all sources; -1: none.
        """
        function = self._spread(partial(_arrange, slots), "rows", "rows")
        arguments = tuple(sources), mesh.lay(place_B, self._laid)
        name = "arrange", slots, *map(_slots, sources)
        return self._run(name, lambda: jax.jit(function, out_shardings=self._rows_laid), arguments)

    def grow(self, rows: Rows, slots: int) -> Rows:
        """The same rows, with so many slots."""
        function = self._spread(partial(_grown, slots), "rows")
        return self._run(("grow", slots, _slots(rows)), lambda: jax.jit(function, out_shardings=self._rows_laid), (rows,))

    def _run(self, name: tuple[Any, ...], jitted: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        """Compiles a function the first time, once for all threads, and calls it."""
        if name not in self._compiled:
            with self._compiling:
                if name not in self._compiled:
                    self._compiled[name] = jitted().lower(*arguments).compile()
        return self._compiled[name](*arguments)

    def _jitted_begin(self) -> Any:
        function = self._spread(self._begin, "draws", "draws", "rows", "rows", "rows", "rows")
        return jax.jit(function, out_shardings=(self._rows_laid, self._laid))

    def _jitted_turn(self, prompt_slots: int, width: int) -> Any:
        function = self._spread(partial(self._turn, prompt_slots, width), "draws", "rows", "same", "rows")
        return jax.jit(function, out_shardings=(self._rows_laid, self._laid), donate_argnums=1)

    # --- from shapes alone: the devices may be of a slice that is not at hand ---

    def traced_begin(self, prompt_slots: int) -> jax.stages.Traced:
        """The program that reads prompts with so many slots."""
        count = self.ways * self.rows

        def rows(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *shape), kind, sharding=self._laid)

        spread = NamedSharding(self.devices, PartitionSpec("replica"))
        keys = jax.ShapeDtypeStruct((self.devices.shape["replica"], 2), np.uint32, sharding=spread)
        prompts = rows(np.uint32, 2), rows(np.int32, prompt_slots), rows(np.int32)
        found: jax.stages.Traced = self._jitted_begin().trace(self.weight_shapes, keys, *prompts, None)
        return found

    def traced_turn(self, prompt_slots: int, new_slots: int, width: int) -> jax.stages.Traced:
        """The program that draws at most `width` tokens of rows with so many slots."""
        begun: Rows = self.traced_begin(prompt_slots).out_info[0]
        slots = prompt_slots + new_slots

        def grown(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (*leaf.shape[:2], slots, leaf.shape[3])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self._rows_laid.cache)

        flat = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._laid), begun)
        rows = flat._replace(cache=jax.tree.map(grown, begun.cache))
        ages = jax.ShapeDtypeStruct((2,), np.int32, sharding=self._none)
        found: jax.stages.Traced = self._jitted_turn(prompt_slots, width).trace(self.weight_shapes, rows, ages, None)
        return found

    # --- what a device does with its own rows ---

    def _spread(self, function: Callable[..., Any], *kinds: str) -> Callable[..., Any]:
        """`function` on every device's own rows. `kinds`: of each argument, "rows", "draws" or "same"."""
        if self.ways == 1:
            return function
        specs = {"rows": self._laid.spec, "draws": PartitionSpec("replica"), "same": PartitionSpec()}
        axes = {axis for axis in mesh.AXES if axis != "tensor" or self.devices.shape["tensor"] == 1}
        return jax.shard_map(
            function,
            mesh=self.devices,
            in_specs=tuple(specs[kind] for kind in kinds),
            out_specs=self._laid.spec,
            axis_names=axes,
            check_vma=False,
        )

    def _begin(
        self,
        weights_1: Params,
        key_12: jax.Array,
        prompt_B2: jax.Array,
        tokens_BP: jax.Array,
        length_B: jax.Array,
        given_BW: jax.Array | None,
    ) -> tuple[Rows, New]:
        weights = jax.tree.map(lambda leaf: leaf[0], weights_1)
        key_B = jax.vmap(rng.fold_words, (None, 0))(rng.unpacked(key_12[0]), prompt_B2)
        done_B, length_B = length_B == 0, jnp.maximum(length_B, 1)
        x_BD, cache = self._read(weights, tokens_BP, length_B)
        seen_BV = None
        if remembers(self.strategy):
            there_BP = jnp.arange(tokens_BP.shape[1]) < length_B[:, None]
            rows_B1 = jnp.arange(len(tokens_BP))[:, None]
            seen_BV = jnp.zeros((len(tokens_BP), self._padded), bool).at[rows_B1, tokens_BP].max(there_BP)
        given_B = None if given_BW is None else given_BW[:, 0]
        token_B, log_p_B, done_B, seen_BV = self._pick(weights, x_BD, key_B, jnp.int32(0), given_B, done_B, seen_BV)
        cache = jax.tree.map(lambda a_BKSH: _padded(a_BKSH, tokens_BP.shape[1] + NEW_SLOTS), cache)
        return Rows(rng.packed(key_B), length_B, token_B, done_B, seen_BV, cache), New(token_B[:, None], log_p_B[:, None])

    def _read(self, weights: Params, tokens_BP: jax.Array, length_B: jax.Array) -> tuple[jax.Array, Cache]:
        """The states `x_BD` that follow the prompts, and their keys and values; all places of a prompt at once."""
        count, width = tokens_BP.shape
        place_P = jnp.arange(width)

        def some(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Cache]:
            tokens_bP, length_b = block
            # What stands behind a prompt's end is masked for good.
            mask_bPP = (place_P[None, :, None] >= place_P) & (place_P < length_b[:, None, None])
            position_bP = jnp.broadcast_to(place_P, tokens_bP.shape)
            empty = empty_cache(self.model, len(tokens_bP), width, self._cache_dtype)
            x_bPD, cache = decode(self.model, weights, tokens_bP, position_bP, mask_bPP, empty, 0)
            return jnp.take_along_axis(x_bPD, (length_b - 1)[:, None, None], axis=1)[:, 0], cache

        blocks = row_blocks(tokens_BP), row_blocks(length_B, width)
        if len(blocks[0]) == 1:
            return some((tokens_BP, length_B))
        found: tuple[jax.Array, Cache] = jax.tree.map(
            lambda leaf: leaf.reshape(count, *leaf.shape[2:]), jax.lax.map(some, blocks)
        )
        return found

    def _turn(
        self, prompt_slots: int, width: int, weights_1: Params, rows: Rows, age_2: jax.Array, given_BW: jax.Array | None
    ) -> tuple[Rows, New]:
        weights = jax.tree.map(lambda leaf: leaf[0], weights_1)
        key_B = rng.unpacked(rows.key_B)
        (first, last), count = age_2, len(rows.token_B)
        slot_S = jnp.arange(rows.cache[0].k_BKSH.shape[2])

        def body(carry: tuple[jax.Array, Rows, New]) -> tuple[jax.Array, Rows, New]:
            t, now, new = carry
            # New tokens of all rows share a slot behind the widest prompt; their rotary positions are their own.
            slot = prompt_slots + t - 1
            mask_BS = (slot_S < now.length_B[:, None]) | ((slot_S >= prompt_slots) & (slot_S <= slot))
            position_B1 = (now.length_B + t - 1)[:, None]
            x_B1D, cache = decode(self.model, weights, now.token_B[:, None], position_B1, mask_BS[:, None], now.cache, slot)
            given_B = None if given_BW is None else jax.lax.dynamic_index_in_dim(given_BW, t - first, 1, keepdims=False)
            picked = self._pick(weights, x_B1D[:, 0], key_B, t, given_B, now.done_B, now.seen_BV)
            token_B, log_p_B, done_B, seen_BV = picked
            drawn = New(
                *(
                    jax.lax.dynamic_update_slice(old, some[:, None], (0, t - first))
                    for old, some in zip(new, (token_B, log_p_B), strict=True)
                )
            )
            return t + 1, now._replace(token_B=token_B, done_B=done_B, seen_BV=seen_BV, cache=cache), drawn

        def unfinished(carry: tuple[jax.Array, Rows, New]) -> jax.Array:
            return (carry[0] < last) & ~carry[1].done_B.all()

        empty = New(jnp.full((count, width), self.eos, jnp.int32), jnp.zeros((count, width), jnp.float32))
        _, after, new = jax.lax.while_loop(unfinished, body, (first, rows, empty))
        return after, new

    def _pick(
        self,
        weights: Params,
        x_BD: jax.Array,
        key_B: jax.Array,
        t: jax.Array,
        given_B: jax.Array | None,
        done_B: jax.Array,
        seen_BV: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Token `t` of each text, its log-probability, which have ended by now, and what they have seen."""
        z_BV = effective(self.strategy, logits(x_BD, head(weights), self._vocabulary), seen_BV)
        if given_B is None:
            given_B = jax.vmap(categorical)(jax.vmap(jax.random.fold_in, (0, None))(key_B, t), z_BV)
        token_B, log_p_B = given_B, jax.vmap(log_probability)(z_BV, given_B)
        token_B, log_p_B = jnp.where(done_B, self.eos, token_B), jnp.where(done_B, 0.0, log_p_B)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        return token_B, log_p_B, done_B | (token_B == self.eos), seen_BV


def categorical(key: jax.Array, z_V: jax.Array) -> jax.Array:
    """An exact draw in two steps, first the block of 128 ids, then the id in it: p(id) = p(block) · p(id | block).

    One Gumbel value an id would cost more than the model at small sizes; this needs V / 128 + 128 of them. High resolution:
    the default noise is biased for tokens rarer than about 1e-7.
    """
    z_bW = z_V.reshape(-1, _BLOCK)
    block_key, id_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(z_bW, axis=-1), mode="high")
    place = jax.random.categorical(id_key, z_bW[block], mode="high")
    return (block * _BLOCK + place).astype(jnp.int32)


def log_probability(z_V: jax.Array, token: jax.Array) -> jax.Array:
    """Of an id, by way of the same sums of blocks that it is drawn by."""
    return z_V[token] - jax.nn.logsumexp(jax.nn.logsumexp(z_V.reshape(-1, _BLOCK), axis=-1))


def _padded(a_BKSH: jax.Array, slots: int) -> jax.Array:
    return jnp.pad(a_BKSH, ((0, 0), (0, 0), (0, slots - a_BKSH.shape[2]), (0, 0)))


def _arrange(slots: int, sources: tuple[Rows, ...], place_B: jax.Array) -> Rows:
    def gathered(*each: jax.Array) -> jax.Array:
        one, *more = (leaf[jnp.clip(place_B - number * len(leaf), 0, len(leaf) - 1)] for number, leaf in enumerate(each))
        for number, other in enumerate(more, start=1):
            here_B = place_B >= number * len(each[0])
            one = jnp.where(here_B.reshape(-1, *[1] * (one.ndim - 1)), other, one)
        return one

    rows = jax.tree.map(gathered, *sources)
    return _grown(slots, rows._replace(done_B=rows.done_B | (place_B < 0)))


def _grown(slots: int, rows: Rows) -> Rows:
    return rows._replace(cache=jax.tree.map(lambda a_BKSH: _padded(a_BKSH, slots), rows.cache))


def _slots(rows: Rows) -> int:
    return int(rows.cache[0].k_BKSH.shape[2])


def at_once(devices: jax.sharding.Mesh) -> int:
    """How many batches are drawn side by side by threads of one process.

    A CPU's device takes one small operation after another, most of them on one core: each core has a batch of its own. Where a
    device is one of several, or no CPU, one batch is enough.
    """
    alone = devices.size == 1 and jax.process_count() == 1 and platforms.target(devices) == "cpu"
    return min(_THREADS, mesh.cores()) if alone else 1


def rows_for(
    model: Model, padded: int, slots: int, texts: int, devices: jax.sharding.Mesh, memory: int, cache: str | None = None
) -> int:
    """How many texts a device draws together: a power of two, as many as memory holds and there are.

    Args:
      slots: of a text, for its prompt and for what is new.
      texts: of one draw.
      memory: bytes of a device.
    """
    specs = table(model, padded)
    size, width = dims(model, padded), jnp.dtype(cache or model.dtype).itemsize
    tensor = devices.shape["tensor"]
    weights = count(specs) * jnp.dtype(model.dtype).itemsize // tensor
    # At one time: rows that are drawn, what two batches are brought together into, and those that wait at some ages.
    each = 6 * 2 * size["L"] * size["K"] * size["H"] * slots * width // tensor + 4 * 4 * padded
    fits = int(_ROOM * memory - weights) // (each * at_once(devices))
    most = _MOST["cpu" if platforms.target(devices) == "cpu" else "accelerator"]
    part = -(-texts * devices.shape["replica"] // (mesh.text_ways(devices) * at_once(devices)))
    wanted = max(1, min(fits, most, 1 << (part - 1).bit_length()))
    return 1 << (wanted.bit_length() - 1)


programs_of = lru_cache(maxsize=8)(Programs)  # arms of one shape share one, and so compile once
