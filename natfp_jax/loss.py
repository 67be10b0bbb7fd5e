"""Next-token cross-entropy that never holds all logits.

Owns the blocked loss and its gradient, which is made in the forward pass, where the block's logits are at hand. Must not know
the layers of the decoder.

Letters: B rows, T tokens, t tokens of a block, V vocabulary, D width.
"""

from functools import partial

import jax
import jax.numpy as jnp

from natfp_jax import mesh
from natfp_jax.blocks import blocks
from natfp_jax.mesh import Devices
from natfp_jax.model import logits

__all__ = ["blocked_cross_entropy", "token_losses"]


def _nll(x_BtD: jax.Array, w_DV: jax.Array, target_Bt: jax.Array, vocabulary: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    z_BtV = logits(x_BtD, w_DV, vocabulary)
    total_Bt = jax.nn.logsumexp(z_BtV, axis=-1)
    # Not a gather, which takes a pass of its own, and which the partitioner does not split beside a `replica` axis.
    picked_Bt = jnp.where(jnp.arange(z_BtV.shape[-1]) == target_Bt[..., None], z_BtV, 0).sum(axis=-1)
    return total_Bt - picked_Bt, z_BtV, total_Bt


def token_losses(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, vocabulary: int) -> jax.Array:
    """−log p(target) of every token, in nats, float32 `nll_BT`; for scoring, not for a gradient."""

    def block(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, _nll(inputs[0], w_DV, inputs[1], vocabulary)[0]

    nll = jax.lax.scan(block, None, (blocks(x_BTD), blocks(target_BT)))[1]
    return jnp.moveaxis(nll, 0, 1).reshape(target_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def blocked_cross_entropy(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    target_BT: jax.Array,
    vocabulary: int,
    weight_BT: jax.Array | None = None,
    devices: Devices | None = None,
) -> jax.Array:
    """The mean over all tokens of −log p(target), in nats, float32.

    Args:
      weight_BT: where given, the mean is weighted by it; 0 leaves a token out.
      devices: where given, the rows lie over it.
    """
    whole_DV = _whole(w_DV, x_BTD.dtype, devices)

    def summed(x_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array | None) -> tuple[jax.Array, None]:
        def block(total: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
            x_BtD, target_Bt, weight_Bt = inputs
            nll_Bt, _, _ = _nll(x_BtD, whole_DV, target_Bt, vocabulary)
            return total + _weighted(nll_Bt, weight_Bt).sum(), None

        return jax.lax.scan(block, jnp.float32(0), _inputs(x_BTD, target_BT, weight_BT))

    total, _ = mesh.by_rows(summed, devices, x_BTD, target_BT, weight_BT)
    return total / _count(target_BT, weight_BT)


def _whole(w_DV: jax.Array, dtype: jnp.dtype, devices: Devices | None) -> jax.Array:
    """The head as all blocks read it: its rows are gathered once, before the loop."""
    return mesh.constrain(w_DV.astype(dtype), "DV", devices)


def _inputs(
    x_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    return blocks(x_BTD), blocks(target_BT), None if weight_BT is None else blocks(weight_BT)


def _weighted(array: jax.Array, weight: jax.Array | None) -> jax.Array:
    return array if weight is None else array * weight


def _count(target_BT: jax.Array, weight_BT: jax.Array | None) -> jax.Array | int:
    return target_BT.size if weight_BT is None else weight_BT.sum()


def _forward(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    target_BT: jax.Array,
    vocabulary: int,
    weight_BT: jax.Array | None,
    devices: Devices | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    whole_DV = _whole(w_DV, x_BTD.dtype, devices)

    def summed(
        x_BTD: jax.Array, target_BT: jax.Array, weight_BT: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        def block(
            carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array, jax.Array | None]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            total, dw_DV = carry
            x_BtD, target_Bt, weight_Bt = inputs
            nll_Bt, z_BtV, total_Bt = _nll(x_BtD, whole_DV, target_Bt, vocabulary)
            dz_BtV = jnp.exp(z_BtV - total_Bt[..., None]) - jax.nn.one_hot(target_Bt, z_BtV.shape[-1], dtype=jnp.float32)
            dz_BtV = _weighted(dz_BtV, None if weight_Bt is None else weight_Bt[..., None]).astype(x_BtD.dtype)
            dx_BtD = jnp.einsum("btv,dv->btd", dz_BtV, whole_DV, preferred_element_type=jnp.float32)
            dw_DV += jnp.einsum("btd,btv->dv", x_BtD, dz_BtV, preferred_element_type=jnp.float32)
            dw_DV = mesh.constrain(dw_DV, "DV", devices)
            return (total + _weighted(nll_Bt, weight_Bt).sum(), dw_DV), dx_BtD

        start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
        sums, dx = jax.lax.scan(block, start, _inputs(x_BTD, target_BT, weight_BT))
        return sums, jnp.moveaxis(dx, 0, 1).reshape(x_BTD.shape)

    (total, dw_DV), dx_BTD = mesh.by_rows(summed, devices, x_BTD, target_BT, weight_BT)
    n = _count(target_BT, weight_BT)
    return total / n, ((dx_BTD / n).astype(x_BTD.dtype), (dw_DV / n).astype(w_DV.dtype))


def _backward(
    vocabulary: int, devices: Devices | None, gradient: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BTD, dw_DV = gradient
    return (g * dx_BTD).astype(dx_BTD.dtype), (g * dw_DV).astype(dw_DV.dtype), None, None


blocked_cross_entropy.defvjp(_forward, _backward)
