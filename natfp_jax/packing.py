"""Examples of different lengths in windows of one length.

Owns the form of an id that says where an example begins and what of it is learnt, and which examples share a window. Must not
know text, nor in which order windows are seen.

A window is filled with whole examples, in store order, until the next one does not fit; what is left of it is padding, of
examples of one id. An example that is longer than a window is left out.

Letters: B rows, T tokens, N examples, W windows.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from natfp_jax.windows import within

__all__ = ["BEGINS", "IDS", "LEARNT", "Packed", "written"]

IDS = (1 << 29) - 1  # the bits of the id itself
BEGINS = 1 << 29  # the first id of an example, which nothing before it is attended from
_BLOCK = 1024  # windows that are read at once
LEARNT = 1 << 30  # an id that the model learns to write


def written(ids: Sequence[int], learnt: Sequence[bool] | np.ndarray) -> np.ndarray:
    """An example as it stands in a store: ids with their marks, uint32."""
    marked = np.asarray(ids, np.uint32) | np.where(learnt, np.uint32(LEARNT), np.uint32(0))
    marked[0] |= BEGINS
    return marked.astype("<u4")


class Packed:
    """Windows, each of `seq_len` + 1 marked ids: all that there are, or with `part` some of them."""

    def __init__(self, shards: Sequence[np.ndarray], seq_len: int, padding: int) -> None:
        """`padding`: the id that fills a window up."""
        self.seq_len, self.first = seq_len, 0
        self._shards = [shard for shard in shards if len(shard)]
        self._padding = np.uint32(padding | BEGINS)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self.count = self.available

    def part(self, count: int, first: int) -> "Packed":
        """`count` windows, from the window `first` on."""
        some = copy.copy(self)  # which has been looked through already
        some.count, some.first = count, first
        return some

    # --- which examples share a window ---

    @cached_property
    def _examples(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Place among all ids and length of each example that fits; how many do not."""
        begin_N = [
            np.flatnonzero(shard & np.uint32(BEGINS)) + (end - len(shard))
            for shard, end in zip(self._shards, self._ends.tolist(), strict=True)
        ]
        place_N = np.concatenate([*begin_N, np.zeros(0, np.int64)]).astype(np.int64)
        length_N = np.diff(np.append(place_N, self._ends[-1] if len(self._ends) else 0))
        fits_N = length_N <= self.seq_len + 1
        return place_N[fits_N], length_N[fits_N], int((~fits_N).sum())

    @cached_property
    def _windows(self) -> np.ndarray:
        """The first example of each window, and behind the last one the number of examples."""
        _, length_N, _ = self._examples
        end_N = np.cumsum(length_N)
        # From any example on, the first that no longer fits into a window that begins with it.
        next_N = np.searchsorted(end_N, end_N - length_N + self.seq_len + 1, side="right").tolist()
        found, at = [0], 0
        while at < len(next_N):
            found.append(at := next_N[at])
        return np.array(found, np.int64)

    @property
    def available(self) -> int:
        """How many windows there are in all."""
        return len(self._windows) - 1

    @property
    def examples(self) -> int:
        """How many examples the windows hold."""
        return int(self._windows[self.first + self.count] - self._windows[self.first])

    @property
    def learnt(self) -> int:
        """How many ids of the windows are learnt, each time that they are seen."""
        return sum(int((rows & LEARNT != 0).sum()) for rows in self._blocks())

    @property
    def left_out(self) -> int:
        """How many examples of the store are longer than a window."""
        return self._examples[2]

    # --- the windows themselves ---

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The windows at `indices` [N], each in [0, count) and counted from the first one: int32 [N, seq_len + 1].

        Raises:
          IndexError: an index is outside of the pool.
        """
        index_N = within(indices, self.count)
        out_NL = np.full((len(index_N), self.seq_len + 1), self._padding, np.uint32)
        for out_L, window in zip(out_NL, (self.first + index_N).tolist(), strict=True):
            self._fill(out_L, window)
        return out_NL.view(np.int32)

    def _fill(self, out: np.ndarray, window: int) -> None:
        place_N, length_N, _ = self._examples
        some = slice(*self._windows[window : window + 2].tolist())
        at = 0
        for place, length in zip(place_N[some].tolist(), length_N[some].tolist(), strict=True):
            shard = int(np.searchsorted(self._ends, place, side="right"))
            start = place - (int(self._ends[shard]) - len(self._shards[shard]))
            out[at : at + length] = self._shards[shard][start : start + length]
            at += length

    def sha256(self) -> str:
        """The pool's hash: sha256 over its windows in order, marks and padding too, as little-endian words of 32 bits."""
        digest = hashlib.sha256()
        for rows in self._blocks():
            digest.update(rows.astype("<u4").tobytes())
        return digest.hexdigest()

    def _blocks(self) -> Iterator[np.ndarray]:
        """All windows, some at a time."""
        for first in range(0, self.count, _BLOCK):
            yield self.rows(np.arange(first, min(first + _BLOCK, self.count)))
