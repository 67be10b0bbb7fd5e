"""Looking up rows of the embedding, with a gradient that suits the platform.

Owns the choice. Must not know the layers that follow.

Letters: B rows, T tokens, t tokens of a block, V vocabulary, D width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from natfp_jax import mesh, platforms
from natfp_jax.blocks import blocks

__all__ = ["look_up"]


def look_up(
    table_VD: jax.Array,
    tokens_BT: jax.Array,
    dtype: Any,
    devices: mesh.Devices | None = None,
    products: bool | None = None,
) -> jax.Array:
    """The rows of the tokens, `x_BTD`, in `dtype`.

    Args:
      table_VD: float32.
      devices: where given, the rows of tokens lie over it.
      products: whether the table's gradient is made by products with one-hot rows instead of adding row upon row; the same
        but for the order of the sums. None: on an accelerator, which adds rows in an order that changes from run to run, or
        else slowly, and all the more so where replicas are batched (jax issue 17844).
    """
    by_products = platforms.target() != "cpu" if products is None else products
    return (
        _by_products(table_VD, tokens_BT, table_VD.shape[0], dtype, devices)
        if by_products
        else _rows(table_VD, tokens_BT, dtype)
    )


def _rows(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    return table_VD[tokens_BT].astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _by_products(
    table_VD: jax.Array, tokens_BT: jax.Array, vocabulary: int, dtype: Any, devices: mesh.Devices | None
) -> jax.Array:
    del vocabulary, devices
    return _rows(table_VD, tokens_BT, dtype)


def _forward(
    table_VD: jax.Array, tokens_BT: jax.Array, vocabulary: int, dtype: Any, devices: mesh.Devices | None
) -> tuple[jax.Array, jax.Array]:
    del vocabulary, devices
    return _rows(table_VD, tokens_BT, dtype), tokens_BT


def _backward(
    vocabulary: int, dtype: Any, devices: mesh.Devices | None, tokens_BT: jax.Array, dx_BTD: jax.Array
) -> tuple[jax.Array, None]:
    def summed(tokens_BT: jax.Array, dx_BTD: jax.Array) -> tuple[jax.Array, None]:
        def add(total_VD: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            tokens_Bt, dx_BtD = block
            hot_BtV = jax.nn.one_hot(tokens_Bt, vocabulary, dtype=dtype)
            # Rows are only added up, so nothing may be lost of float32 where the platform would round the factors.
            exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
            return total_VD + jnp.einsum("btv,btd->vd", hot_BtV, dx_BtD, **exact), None

        empty_VD = jnp.zeros((vocabulary, dx_BTD.shape[-1]), jnp.float32)
        return jax.lax.scan(add, empty_VD, (blocks(tokens_BT), blocks(dx_BTD)))[0], None

    return mesh.by_rows(summed, devices, tokens_BT, dx_BTD)[0], None


_by_products.defvjp(_forward, _backward)
