"""The decoder (Flax Linen).

Owns the forward pass and the key-value cache. Parameter shapes stand in `params.table`, and a test holds this module's tree
against it; values never come from here. Must not know training, sampling or files.

Letters: B batch, T tokens, S cache slots, V vocabulary, D width, L layers, N query heads, K key-value heads, H head width,
F MLP width.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from natfp_jax import lora, platforms, rng
from natfp_jax.attention import Rotary, causal, masked, rotate
from natfp_jax.config import Lora, Model
from natfp_jax.embedding import look_up
from natfp_jax.mesh import Devices, constrain
from natfp_jax.params import Params, dims, rotated

__all__ = [
    "Cache",
    "Decoder",
    "Learning",
    "Slots",
    "both_ways",
    "decode",
    "empty_cache",
    "head",
    "hidden",
    "logits",
    "unrolled",
]


Remat = Literal["none", "dots", "full"]
_SAVED = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


# A CPU gains a fifth from layers without a loop around them, which would copy each layer's weights and gradients in and out of
# the stacked ones; an accelerator hides that, and compiles the shorter program sooner. Of deep models, so many a turn.
_UNROLLED = 16


class Slots(NamedTuple):
    """Rotated keys and values of one layer: `k_BKSH`, `v_BKSH`."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


Cache = tuple[Slots, ...]  # an array a layer: a part of one for all would be copied before it is read


class _Place(NamedTuple):
    """Where tokens stand that attend to a cache: their positions, what they may attend to, and their first slot."""

    position_BT: jax.Array
    mask_BTS: jax.Array
    slot: jax.Array | int


class Learning(NamedTuple):
    """How the decoder is computed while it learns; the default is as it is used."""

    adapters: Lora | None = None
    dropout: float = 0.0  # of what attention and MLP add to their input (Vaswani et al., 2017, section 5.4)


_USED = Learning()


def _weight(module: nn.Module, name: str, *shape: int, dtype: Any) -> jax.Array:
    return module.param(name, nn.initializers.zeros_init(), shape, jnp.float32).astype(dtype)


_BIASED = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o"}  # what of `Model.biases` says that a matrix has one; else "mlp"


def _product(module: "_Attention | _MLP", name: str, x: jax.Array, inputs: str, outputs: str) -> jax.Array:
    """[B, T, inputs] → [B, T, outputs] by the matrix of a name, what adapts it, and its bias."""
    size = dims(module.model, 0)
    shape = [size[letter.upper()] for letter in inputs + outputs]
    w = _weight(module, name, *shape, dtype=x.dtype)
    y = _adapted(module, name, jnp.einsum(f"bt{inputs},{inputs}{outputs}->bt{outputs}", x, w), x, inputs, outputs)
    return _biased(module, name, y, outputs)


def _biased(module: "_Attention | _MLP", name: str, y: jax.Array, outputs: str) -> jax.Array:
    if _BIASED.get(name, "mlp") not in module.model.biases:
        return y
    size = dims(module.model, 0)
    return y + _weight(module, f"{name}_bias", *(size[letter.upper()] for letter in outputs), dtype=y.dtype)


def _is_adapted(module: "_Attention | _MLP", name: str) -> bool:
    adapters = module.learning.adapters
    return adapters is not None and name in adapters.targets


def _adapted(module: "_Attention | _MLP", name: str, y: jax.Array, x: jax.Array, inputs: str, outputs: str) -> jax.Array:
    """The product `y` of `x` and a matrix, and by its adapters, where it has any."""
    adapters = module.learning.adapters
    if adapters is None or not _is_adapted(module, name):
        return y
    size = {**dims(module.model, 0), "R": adapters.rank}
    a, b = (
        _weight(module, name + part, *(size[letter.upper()] for letter in letters), dtype=x.dtype)
        for part, letters in ((lora.A, f"{inputs}r"), (lora.B, f"r{outputs}"))
    )
    low = jnp.einsum(f"bt{inputs},{inputs}r->btr", x, a)
    return y + adapters.alpha / adapters.rank * jnp.einsum(f"btr,r{outputs}->bt{outputs}", low, b)


def _dropped(x_BTD: jax.Array, rate: float, words_B2: jax.Array | None, place: int) -> jax.Array:
    """What is left of `x_BTD`, made up for; a row's noise depends on its own key alone. Without noise, all of it."""
    if words_B2 is None:
        return x_BTD

    def kept(words_2: jax.Array) -> jax.Array:
        return jax.random.bernoulli(rng.fold(rng.unpacked(words_2), place), 1 - rate, x_BTD.shape[1:])

    return jnp.where(jax.vmap(kept)(words_B2), x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def _rms_norm(x_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    # In float32 whatever the compute dtype: the sum of squares of a wide row does not fit bfloat16's precision.
    wide = x_BTD.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale_D).astype(x_BTD.dtype)


def _normed(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float) -> jax.Array:
    """LayerNorm where there is a bias, else RMSNorm."""
    if bias_D is None:
        return _rms_norm(x_BTD, scale_D, epsilon)
    wide = x_BTD.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale_D + bias_D).astype(x_BTD.dtype)


def _norm_of(module: "_Attention | _MLP", x_BTD: jax.Array) -> jax.Array:
    """The input of a part of a block, normed."""
    model = module.model
    scale_D, bias_D = _weight(module, "norm", model.width, dtype=jnp.float32), None
    if model.norm == "layer":
        bias_D = _weight(module, "norm_bias", model.width, dtype=jnp.float32)
    return _normed(x_BTD, scale_D, bias_D, model.norm_epsilon)


def _rotary(model: Model) -> Rotary | None:
    if model.positions == "learned":
        return None
    return Rotary(model.rope_theta, rotated(model, dims(model, 0)["H"]), model.rope_scaling)


class _Attention(nn.Module):
    model: Model
    devices: Devices | None
    learning: Learning

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Slots | None, place: _Place | None, begin_BT: jax.Array | None
    ) -> tuple[jax.Array, Slots | None]:
        x_BTD = _norm_of(self, x_BTD)
        q_BTNH = self._head_normed("q", _product(self, "q", x_BTD, "d", "nh"))
        k_BTKH = self._head_normed("k", _product(self, "k", x_BTD, "d", "kh"))
        v_BTKH = _product(self, "v", x_BTD, "d", "kh")
        q_BTNH = constrain(q_BTNH, "BTNH", self.devices)
        k_BTKH, v_BTKH = constrain(k_BTKH, "BTKH", self.devices), constrain(v_BTKH, "BTKH", self.devices)
        rotary = _rotary(self.model)
        if cache is None:
            out_BTNH = causal(q_BTNH, k_BTKH, v_BTKH, rotary, self.devices, begin_BT)
        else:
            assert place is not None  # there are slots
            q_BTNH, k_BTKH = rotate(q_BTNH, place.position_BT, rotary), rotate(k_BTKH, place.position_BT, rotary)
            new = (jnp.swapaxes(array, 1, 2).astype(cache.k_BKSH.dtype) for array in (k_BTKH, v_BTKH))
            start = (0, 0, place.slot, 0)
            cache = Slots(*(jax.lax.dynamic_update_slice(old, some, start) for old, some in zip(cache, new, strict=True)))
            out_BTNH = masked(q_BTNH, *cache, place.mask_BTS)
        return _product(self, "o", out_BTNH, "nh", "d"), cache

    def _head_normed(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        if not self.model.qk_norm:
            return x_BTNH
        scale_H = _weight(self, f"{name}_norm", x_BTNH.shape[-1], dtype=jnp.float32)
        return _rms_norm(x_BTNH, scale_H, self.model.norm_epsilon)


@jax.custom_vjp
def _gated(gate_BTF: jax.Array, up_BTF: jax.Array, w_FD: jax.Array) -> jax.Array:
    """(SiLU(gate) · up) W. For the backward pass it keeps its arguments alone, where autodiff would keep four arrays more."""
    return jnp.einsum("btf,fd->btd", nn.silu(gate_BTF) * up_BTF, w_FD)


def _gated_forward(gate_BTF: jax.Array, up_BTF: jax.Array, w_FD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _gated(gate_BTF, up_BTF, w_FD), (gate_BTF, up_BTF, w_FD)


def _gated_backward(kept: tuple[jax.Array, ...], d_BTD: jax.Array) -> tuple[jax.Array, ...]:
    gate_BTF, up_BTF, w_FD = kept
    d_BTF = jnp.einsum("btd,fd->btf", d_BTD, w_FD)
    # The same numbers, in a way that nothing can be computed from them before the gradient is there: else XLA sees that the
    # forward pass has had them, and keeps those until now. On CPU it does not heed an optimisation barrier.
    gate_BTF = jnp.where(d_BTF == d_BTF, gate_BTF, 0)
    sigmoid_BTF = jax.nn.sigmoid(gate_BTF)
    silu_BTF = gate_BTF * sigmoid_BTF
    dw_FD = jnp.einsum("btf,btd->fd", silu_BTF * up_BTF, d_BTD)
    return d_BTF * up_BTF * (sigmoid_BTF + silu_BTF * (1 - sigmoid_BTF)), d_BTF * silu_BTF, dw_FD


_gated.defvjp(_gated_forward, _gated_backward)


class _MLP(nn.Module):
    model: Model
    devices: Devices | None
    learning: Learning

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        size, dtype = dims(self.model, 0), x_BTD.dtype
        x_BTD = _norm_of(self, x_BTD)
        up_BTF = constrain(_product(self, "up", x_BTD, "d", "f"), "BTF", self.devices)
        if self.model.mlp != "swiglu":
            return _product(self, "down", nn.gelu(up_BTF, approximate=self.model.mlp == "gelu"), "f", "d")
        gate_BTF = constrain(_product(self, "gate", x_BTD, "d", "f"), "BTF", self.devices)
        out_BTD = _gated(gate_BTF, up_BTF, _weight(self, "down", size["F"], size["D"], dtype=dtype))
        if _is_adapted(self, "down"):  # else what only adapters read would stand in every program
            out_BTD = _adapted(self, "down", out_BTD, nn.silu(gate_BTF) * up_BTF, "f", "d")
        return _biased(self, "down", out_BTD, "d")


class _Block(nn.Module):
    model: Model
    devices: Devices | None
    learning: Learning = _USED

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: Slots | None,
        place: _Place | None,
        begin_BT: jax.Array | None = None,
        noise_B2: jax.Array | None = None,
    ) -> tuple[jax.Array, Slots | None]:
        kept, model, devices = self.learning, self.model, self.devices
        attended_BTD, cache = _Attention(model, devices, kept, name="attention")(x_BTD, cache, place, begin_BT)
        before_BTD = x_BTD
        x_BTD += _dropped(attended_BTD, kept.dropout, noise_B2, 0)
        read_BTD = before_BTD if model.parallel else x_BTD
        x_BTD += _dropped(_MLP(model, devices, kept, name="mlp")(read_BTD), kept.dropout, noise_B2, 1)
        return constrain(x_BTD, "BTD", devices), cache


class Decoder(nn.Module):
    """A pre-norm decoder with scanned layers; `vocabulary` is the padded size.

    Activations are laid over `devices` where given; `remat` says what the backward pass computes again.
    """

    model: Model
    vocabulary: int
    devices: Devices | None = None
    remat: Remat = "none"
    learning: Learning = _USED

    def setup(self) -> None:
        """Declares the parameters that are not in a layer, and the scan over layers."""
        zeros, width = nn.initializers.zeros_init(), self.model.width
        self.embedding = self.param("embedding", zeros, (self.vocabulary, width), jnp.float32)
        # A scanned layer is not merged with its neighbours, so that the costly barriers against it are not needed.
        block = _Block if self.remat == "none" else nn.remat(_Block, policy=_SAVED[self.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": False},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0 if self.learning.dropout else nn.broadcast),
            length=self.model.layers,
            # Where memory is dear, the loop: without it XLA on CPU keeps what it sees computed twice.
            unroll=min(self.model.layers, _UNROLLED) if platforms.target() == "cpu" and self.remat == "none" else 1,
        )(self.model, self.devices, self.learning)
        self.norm = self.param("norm", zeros, (width,), jnp.float32)
        self.norm_bias = self.param("norm_bias", zeros, (width,), jnp.float32) if self.model.norm == "layer" else None
        if self.model.positions == "learned":
            self.positions = self.param("positions", zeros, (self.model.context, width), jnp.float32)
        if not self.model.tied:
            self.head = self.param("head", zeros, (width, self.vocabulary), jnp.float32)

    def __call__(self, tokens_BT: jax.Array, begin_BT: jax.Array | None = None, noise_B2: jax.Array | None = None) -> jax.Array:
        """The normed state after the last layer, `x_BTD`."""
        # Every device looks up in the whole table: its partition by ids cannot be split further beside a `replica` axis.
        table_VD = constrain(self.embedding, "..", self.devices)
        x_BTD = look_up(table_VD, tokens_BT, jnp.dtype(self.model.dtype), self.devices)
        if self.model.positions == "learned":
            T, dtype = tokens_BT.shape[1], x_BTD.dtype
            if begin_BT is None:
                x_BTD += self.positions[:T].astype(dtype)
            else:
                x_BTD += look_up(self.positions, jnp.arange(T) - begin_BT, dtype, self.devices)
        x_BTD = constrain(x_BTD, "BTD", self.devices)
        noise_LB2 = None
        if noise_B2 is not None:
            layer_L, key_B = jnp.arange(self.model.layers), rng.unpacked(noise_B2)
            noise_LB2 = rng.packed(jax.vmap(lambda layer: jax.vmap(lambda key: rng.below(key, layer))(key_B))(layer_L))
        x_BTD, _ = self.layers(x_BTD, None, None, begin_BT, noise_LB2)
        return _normed(x_BTD, self.norm, self.norm_bias, self.model.norm_epsilon)


# --- the forward pass as functions of the parameters ------------------------------------------------------------------


def hidden(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    devices: Devices | None = None,
    remat: Remat = "none",
    learning: Learning = _USED,
    begin_BT: jax.Array | None = None,
    noise_B2: jax.Array | None = None,
) -> jax.Array:
    """The states `x_BTD` that predict the next token, under causal attention.

    Args:
      params: with the adapters that `learning` names.
      devices: where given, how activations lie is not left to the compiler.
      remat: what the backward pass computes again instead of keeping it; "dots": all but products of matrices.
      begin_BT: where rows hold several examples, the place at which each token's own begins; it attends to nothing before.
      noise_B2: the key of each row's dropout, packed; for a rate above 0, and without it nothing is dropped.
    """
    learning = learning if noise_B2 is not None else learning._replace(dropout=0.0)
    decoder = Decoder(model, params["embedding"].shape[0], devices, remat, learning)
    out: Any = decoder.apply({"params": params}, tokens_BT, begin_BT, noise_B2)
    x_BTD: jax.Array = out
    return x_BTD


def unrolled(model: Model, params: Params) -> Params:
    """The parameters as `decode` reads them: a tree a layer, and matrices in the compute dtype, which is half the bytes."""

    def cast(tree: Params) -> Params:
        return {
            name: cast(leaf) if isinstance(leaf, dict) else leaf.astype(jnp.float32 if "norm" in name else model.dtype)
            for name, leaf in tree.items()
        }

    stacked = params["layers"]
    layers = [cast(jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)) for layer in range(model.layers)]
    return {**cast({name: leaf for name, leaf in params.items() if name != "layers"}), "layers": layers}


def empty_cache(model: Model, batch: int, slots: int, dtype: Any = None) -> Cache:
    """A cache of zeros, in the compute dtype unless another is given."""
    size = dims(model, 0)
    shape = (batch, size["K"], slots, size["H"])
    return tuple(Slots(*(jnp.zeros(shape, dtype or model.dtype) for _ in range(2))) for _ in range(model.layers))


def decode(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    mask_BTS: jax.Array,
    cache: Cache,
    slot: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Writes the tokens' keys and values at `slot` onwards and returns their states `x_BTD` with the new cache.

    A token attends to the slots that `mask_BTS` allows; its position is `position_BT`, whatever its slot. So one
    function serves prefill (T = prompt) and decoding (T = 1), and ragged rows may write to one common slot.

    Args:
      params: `unrolled`.
    """
    block, place = _Block(model, None), _Place(position_BT, mask_BTS, slot)
    x_BTD, written = look_up(params["embedding"], tokens_BT, jnp.dtype(model.dtype)), []
    if model.positions == "learned":
        x_BTD += params["positions"][position_BT]
    for layer, slots in zip(params["layers"], cache, strict=True):
        found: Any = block.apply({"params": layer}, x_BTD, slots, place)
        x_BTD, new = found
        written.append(new)
    return _normed(x_BTD, params["norm"], params.get("norm_bias"), model.norm_epsilon), tuple(written)


def both_ways(model: Model, params: Params, tokens_BT: jax.Array, there_BT: jax.Array) -> jax.Array:
    """The states `x_BTD` under attention in both directions: the decoder's own blocks as an encoder.

    To decode all tokens at once, under a mask that hides no later ones, is to encode.

    Args:
      params: as for `hidden`.
      there_BT: the tokens that may be attended to, at least one a row; the states of the others mean nothing.
    """
    B, T = tokens_BT.shape
    mask_BTT = jnp.broadcast_to(there_BT[:, None], (B, T, T))
    return decode(model, unrolled(model, params), tokens_BT, jnp.arange(T)[None], mask_BTT, empty_cache(model, B, T), slot=0)[0]


def head(params: Params) -> jax.Array:
    """The output matrix, `w_DV`: the embedding transposed where the head is tied."""
    return params["head"] if "head" in params else params["embedding"].T


def logits(x_BTD: jax.Array, w_DV: jax.Array, vocabulary: int) -> jax.Array:
    """Logits in float32, minus infinity at the ids from `vocabulary` (unpadded) on."""
    out = jnp.einsum("...d,dv->...v", x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(out.shape[-1]) < vocabulary, out, -jnp.inf)
