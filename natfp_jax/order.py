"""The order in which windows are seen.

Owns the map (order seed, step) → window indices, a pure function, and the order hash that proves it. Must not know what a
window contains, nor the mesh, nor how many processes read it.
"""

import hashlib

import numpy as np

__all__ = ["Order", "order_hash"]

_ROUNDS = 12  # with fewer, the marginals of tiny pools are measurably uneven


class Order:
    """Every epoch visits each of `windows` windows once, in a permutation keyed by (order seed, epoch).

    The permutation is a Feistel network over the next even number of bits with cycle walking (Black and Rogaway, *Ciphers with
    arbitrary finite domains*, 2002): random access in constant memory, the same on every machine.
    """

    def __init__(self, windows: int, batch: int, seed: int) -> None:
        self.windows, self.batch, self.seed = windows, batch, seed
        self._half = np.uint64(max(4, (max(windows - 1, 1).bit_length() + 1) // 2))  # bits of one half
        self._mask = np.uint64((1 << int(self._half)) - 1)

    def _encrypt(self, index_N: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = index_N >> self._half, index_N & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right

    def permute(self, position_N: np.ndarray, epoch: int) -> np.ndarray:
        """The windows at positions of an epoch, each in [0, windows)."""
        keys = np.random.SeedSequence([self.seed, epoch]).generate_state(_ROUNDS, np.uint64)
        index_N = self._encrypt(position_N.astype(np.uint64), keys)
        while (outside := index_N >= self.windows).any():
            index_N[outside] = self._encrypt(index_N[outside], keys)
        return index_N.astype(np.int64)

    def rows(self, step: int) -> np.ndarray:
        """The window indices of the batch at `step` (from 0): int64 [batch]."""
        place_B = step * self.batch + np.arange(self.batch, dtype=np.int64)
        epoch_B, position_B = np.divmod(place_B, self.windows)
        rows_B = np.empty(self.batch, np.int64)
        for epoch in np.unique(epoch_B):
            here = epoch_B == epoch
            rows_B[here] = self.permute(position_B[here], int(epoch))
        return rows_B


def _mix(x_N: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood, 2014), a bijection with full avalanche."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def order_hash(digest: str, rows_B: np.ndarray) -> str:
    """The order hash after `rows_B`, the window indices of one batch as fed; the first `digest` is the pool's token hash.

    h ← sha256(h ‖ uint64 index), row by row, so that the hash does not depend on the batch size. Hexadecimal in and out.
    """
    state = bytes.fromhex(digest)
    for row in rows_B.astype("<u8"):
        state = hashlib.sha256(state + row.tobytes()).digest()
    return state.hex()
