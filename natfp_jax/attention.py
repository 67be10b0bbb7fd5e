"""Attention with rotary positions, by the way that suits the platform.

Owns the choice and the rotation. Must not know parameters, layers or what the keys are of.

Letters: B batch, b some rows of it, T tokens, S cache slots, N query heads, K key-value heads, G query heads of each, H head
width.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from natfp_jax import mesh, platforms
from natfp_jax.blocks import row_blocks
from natfp_jax.config import Llama3Rope
from natfp_jax.mesh import Devices

__all__ = ["Rotary", "causal", "masked", "rotate"]


class Rotary(NamedTuple):
    """How queries and keys are rotated."""

    theta: float
    width: int  # of a head the first so many dimensions; an even number
    scaling: Llama3Rope | None = None

    @property
    def frequency(self) -> jax.Array:
        """By how much each pair is turned at every token: [width / 2]."""
        half = self.width // 2
        frequency = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.scaling is None:
            return frequency
        turns = self.scaling.context * frequency / (2 * math.pi)
        fast = jnp.clip((turns - self.scaling.low) / (self.scaling.high - self.scaling.low), 0, 1)
        return frequency * (fast + (1 - fast) / self.scaling.factor)


def rotate(x_BTNH: jax.Array, position_BT: jax.Array, rotary: Rotary | None) -> jax.Array:
    """Rotary positions (Su et al., 2021), first and second half of what is rotated paired as in Llama; None: none."""
    if rotary is None:
        return x_BTNH
    angle = position_BT[..., None, None].astype(jnp.float32) * rotary.frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned, rest = x_BTNH[..., : rotary.width], x_BTNH[..., rotary.width :]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x_BTNH.dtype) for part in parts] + ([rest] if rest.shape[-1] else []), axis=-1)


def causal(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rotary: Rotary | None,
    devices: Devices | None = None,
    begin_BT: jax.Array | None = None,
) -> jax.Array:
    """Every token attends to itself and those before it, which stand at 0, 1, ...; queries and keys not rotated yet.

    Args:
      rotary: None: they are not rotated at all.
      devices: what rows and heads are laid over, where that is known.
      begin_BT: where a row holds several examples, the place at which each token's own begins: what stands before it is not
        attended to, and positions count from there.
    """
    whole = devices is not None and mesh.whole(devices)
    if platforms.target() == "cpu" and whole:
        given = (q_BTNH, k_BTKH, v_BTKH) if begin_BT is None else (q_BTNH, k_BTKH, v_BTKH, begin_BT)
        blocks = tuple(map(row_blocks, given))
        if len(blocks[0]) > 1:
            # Some rows at a time, whose scores stay in the cache, and are made again for the backward pass instead of kept.
            some = jax.checkpoint(partial(_some_rows, rotary=rotary))
            return jax.lax.map(lambda block: some(*block), blocks).reshape(q_BTNH.shape)
    # A kernel of cuDNN cannot be placed inside of `shard_map` where some axes are left to the compiler (jax issue 21584).
    placed = not isinstance(devices, jax.sharding.AbstractMesh)
    return _rotated(q_BTNH, k_BTKH, v_BTKH, rotary, _fused(q_BTNH) if placed and begin_BT is None else None, begin_BT)


def _some_rows(
    q_bTNH: jax.Array, k_bTKH: jax.Array, v_bTKH: jax.Array, begin_bT: jax.Array | None = None, *, rotary: Rotary | None
) -> jax.Array:
    """As `_rotated`, in the order of operations that is given: the sums divide in the end, the weighed values alone.

    JAX's own divides all weights, which XLA does, or else multiplies by the inverse, as it finds the program around.
    """
    b, T, N, H = q_bTNH.shape
    K, dtype = k_bTKH.shape[2], q_bTNH.dtype
    position_T = _positions(T, begin_bT)
    q_bTKGH = rotate(q_bTNH, position_T, rotary).reshape(b, T, K, N // K, H)
    wide = {"preferred_element_type": jnp.float32}
    z_bKGTS = jnp.einsum("btkgh,bskh->bkgts", q_bTKGH, rotate(k_bTKH, position_T, rotary), **wide) * H**-0.5
    seen = jnp.tril(jnp.ones((T, T), bool))
    if begin_bT is not None:
        seen &= _own(begin_bT)[:, None, None]
    z_bKGTS = jnp.where(seen, z_bKGTS, -jnp.inf)
    weight_bKGTS = jnp.exp(z_bKGTS - jax.lax.stop_gradient(z_bKGTS.max(axis=-1, keepdims=True)))
    scale_bTKG = jnp.moveaxis(1 / weight_bKGTS.sum(axis=-1), 3, 1)
    out_bTKGH = jnp.einsum("bkgts,bskh->btkgh", weight_bKGTS.astype(dtype), v_bTKH, **wide) * scale_bTKG[..., None]
    return out_bTKGH.astype(dtype).reshape(b, T, N, H)


def _positions(T: int, begin_BT: jax.Array | None) -> jax.Array:
    place_T = jnp.arange(T)[None]
    return place_T if begin_BT is None else place_T - begin_BT


def _own(begin_BT: jax.Array) -> jax.Array:
    """Whether a place, the last axis, is not before the beginning of a token's own example: [B, T, T]."""
    return jnp.arange(begin_BT.shape[1]) >= begin_BT[..., None]


def _rotated(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rotary: Rotary | None,
    kernel: Literal["cudnn"] | None,
    begin_BT: jax.Array | None = None,
) -> jax.Array:
    position_T = _positions(q_BTNH.shape[1], begin_BT)
    q_BTNH, k_BTKH = rotate(q_BTNH, position_T, rotary), rotate(k_BTKH, position_T, rotary)
    own = None if begin_BT is None else _own(begin_BT)[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=own, is_causal=True, implementation=kernel)


def _fused(x_BTNH: jax.Array) -> Literal["cudnn"] | None:
    """cuDNN's attention, which never holds all scores, where it takes heads like these: JAX does not choose it by itself."""
    fits = x_BTNH.dtype == jnp.bfloat16 and x_BTNH.shape[-1] % 8 == 0 and x_BTNH.shape[-1] <= 128
    there = jax.default_backend() == "gpu" and "cuda" in jax.extend.backend.get_backend().platform_version
    return "cudnn" if fits and there else None


def masked(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Every token attends to the slots that the mask allows; queries and keys are rotated already.

    The slots of a head lie side by side: reading keys and values is what decoding takes time for, and JAX's own attention,
    which wants the heads inside of the slots, needs ten times as long for it on a CPU.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype, wide = k_BKSH.shape[1], k_BKSH.dtype, {"preferred_element_type": jnp.float32}
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(dtype)
    z_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, k_BKSH, **wide) * H**-0.5
    z_BKGTS = jnp.where(mask_BTS[:, None, None], z_BKGTS, -jnp.inf)
    weight_BKGTS = jnp.exp(z_BKGTS - z_BKGTS.max(axis=-1, keepdims=True))
    scale_BTKG = jnp.moveaxis(1 / weight_BKGTS.sum(axis=-1), 3, 1)
    out_BTKGH = jnp.einsum("bkgts,bksh->btkgh", weight_BKGTS.astype(dtype), v_BKSH, **wide) * scale_BTKG[..., None]
    return out_BTKGH.astype(q_BTNH.dtype).reshape(B, T, N, H)
