"""Windows of the token store.

Owns the map window → ids: window i of the store is ids [i · (seq_len + 1), (i + 1) · (seq_len + 1)) of the shards one after
another. Must not know text, nor in which order windows are seen.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["Windows", "open_ids", "within"]

_BLOCK = 1 << 22  # ids that are hashed at once


def open_ids(path: Path, dtype: str) -> np.ndarray:
    """The ids of one file, memory-mapped, read-only: [tokens]."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def within(indices: np.ndarray, count: int) -> np.ndarray:
    """The indices, int64 [N]; raises an IndexError if one is outside of a pool of so many windows."""
    index_N = np.asarray(indices, np.int64)
    if index_N.size and (index_N.min() < 0 or index_N.max() >= count):
        raise IndexError(f"window indices {index_N.min()} to {index_N.max()}, the pool has {count}")
    return index_N


class Windows:
    """`count` windows, each of `seq_len` + 1 ids, of the shards one after another, from the window `first` on."""

    def __init__(self, shards: Sequence[np.ndarray], seq_len: int, count: int, first: int = 0) -> None:
        self.seq_len, self.count, self.first = seq_len, count, first
        self._shards = [shard for shard in shards if len(shard)]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The windows at `indices` [N], each in [0, count) and counted from the first one: int32 [N, seq_len + 1].

        Raises:
          IndexError: an index is outside of the pool.
        """
        index_N = within(indices, self.count)
        length = self.seq_len + 1
        out_NL = np.empty((len(index_N), length), np.int32)
        start_N = (self.first + index_N) * length
        shard_N = np.searchsorted(self._ends, start_N, side="right")
        for out_L, start, shard in zip(out_NL, start_N.tolist(), shard_N.tolist(), strict=True):
            self._copy(out_L, start, shard)
        return out_NL

    def _copy(self, out: np.ndarray, start: int, shard: int) -> None:
        """Fills `out` with the ids from `start` on, which lies in `shard`."""
        filled = 0
        while filled < len(out):
            ids = self._shards[shard]
            place = start + filled - (int(self._ends[shard]) - len(ids))
            piece = ids[place : place + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1

    def sha256(self) -> str:
        """The pool's hash: sha256 over its ids in order, as little-endian bytes of the store's width."""
        digest = hashlib.sha256()
        length = self.seq_len + 1
        skipped, left = self.first * length, self.count * length
        for shard in self._shards:
            ids = shard[skipped : skipped + left]
            for start in range(0, len(ids), _BLOCK):
                digest.update(ids[start : start + _BLOCK].tobytes())
            skipped, left = max(0, skipped - len(shard)), left - len(ids)
        return digest.hexdigest()
