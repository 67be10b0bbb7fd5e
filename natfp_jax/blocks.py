"""A batch in blocks of tokens.

Owns how many tokens a block has. Must not know what is done with one.

Letters: B rows, b rows of a block, T tokens, t tokens of a block.
"""

import jax
import jax.numpy as jnp

__all__ = ["BLOCK_ROWS", "block_length", "blocks", "row_blocks"]

BLOCK_ROWS = 1024  # tokens a block, so that a block's logits stay near the cache; in the numerics record


def block_length(batch: int, length: int) -> int:
    """The largest divisor of `length` with at most `BLOCK_ROWS` tokens in a block of `batch` rows; at least 1."""
    return max((t for t in range(1, length + 1) if length % t == 0 and batch * t <= BLOCK_ROWS), default=1)


def blocks(array: jax.Array) -> jax.Array:
    """[B, T, ...] → [blocks, B, t, ...]: cut along the tokens, so that rows stay on the device that holds them."""
    batch, length = array.shape[:2]
    t = block_length(batch, length)
    return jnp.moveaxis(array.reshape(batch, length // t, t, *array.shape[2:]), 1, 0)


def row_blocks(array: jax.Array, length: int | None = None) -> jax.Array:
    """[B, ...] → [blocks, b, ...]: whole rows, the largest divisor of their number with at most so many tokens.

    `length`: tokens of a row; None: the array is [B, T, ...].
    """
    batch, each = array.shape[0], array.shape[1] if length is None else length
    rows = max((b for b in range(1, batch + 1) if batch % b == 0 and b * each <= BLOCK_ROWS), default=1)
    return array.reshape(batch // rows, rows, *array.shape[1:])
