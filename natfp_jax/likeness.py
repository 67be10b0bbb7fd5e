"""How alike the weights of many checkpoints are, from reading each of them once.

Owns what is measured of pairs of checkpoints: equality, distance, direction, and whether one shows in the other by more than
chance. Must not know what is claimed of a checkpoint.

**Whether a start shows in a checkpoint.** Let s be initial weights that were drawn symmetrically about zero, so that the signs
of their entries are fair coins, independent of each other and of the checkpoint w. Then

    z = Σ a·w·s / √(Σ a²·w²·s²)      over all entries of the matrices,

given w and the magnitudes of s, is a sum of coins over its own standard deviation: a standard normal in the limit, and by
Hoeffding's inequality P(z > x) ≤ exp(-x²/2) at every size, whatever structure w has, and whatever scale or tails s has from
entry to entry. (Of a coefficient of correlation that is true only if the entries of s are alike: not where both have rows of
padding.) The factor a makes all matrices count by their sizes: it is 1 / (root mean square in w · that in s). The
initialisers in use are symmetric, orthogonal ones up to terms that vanish with the size. A tensor of s is left out if it has
fewer than two dimensions, if it is no such draw by its mean, if it is the same as another of s (tied weights, saved twice), or
if it is the same in another start: norms, biases and masks are the same in all.

**Direction.** How two checkpoints lie from a common start is compared matrix by matrix, since an embedding would outweigh
everything else; a model of few matrices has them cut into rows. So a difference of two such cosines comes with the spread that
it has over these parts, and if it means nothing its signs over the parts are coins as above.

**Equality** is of float32 values, or of values rounded to the precision that one side was saved in. A distance would not tell:
rounding to bfloat16 changes a weight more than the first steps of a training do.

It takes one reading of every file, three hashes of every number, and C² products of every number for C checkpoints. It holds
128 C² numbers, and of the weights at most 256 MiB (or, if that is more, one row of a matrix of every checkpoint).

Letters after an underscore name axes: C checkpoints, S starts, T matrices, P parts, N numbers of a block, R rows, W columns.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from natfp_jax.published import Folder

__all__ = ["Likeness", "measured"]

Numbers = NDArray[np.float64]
FLOAT32, BFLOAT16, FLOAT16 = "float32", "bfloat16", "float16"

_BLOCK = 1 << 25  # numbers of all checkpoints that are held at once
_PARTS = 64
_DRAWN = 10.0  # standard deviations, up to which rows and columns have no mean in common
_STILL = 1e-13  # of a squared norm: what is left of a difference by rounding
_ROUNDING = 2.0**-8  # of a norm: the most that rounding to bfloat16 changes


@dataclass(frozen=True)
class Likeness:
    """What was measured; checkpoints are numbered as they were given.

    Attributes:
      digests: sha256 of each checkpoint's weights.
      values: precision → a number that equal tensors have in common once they are rounded to it, (tensors, C).
      exact: precision → whether that rounding changes nothing, (tensors, C).
      inner_PCC: inner products, of the matrices part by part.
      rest_CC: of everything else.
      starts: the checkpoints that may be starts, in the order of the axis S.
      shown_TCS: Σ w·s, matrix by matrix.
      squares_TCS: Σ w²·s².
      norms_TC: Σ w².
      sizes_T: numbers of a matrix.
      drawn_TS: whether the matrix of a start may be a random draw.
      same_TS: a number that equal matrices have in common, whatever their names.
    """

    digests: list[str]
    values: Mapping[str, NDArray[np.int64]]
    exact: Mapping[str, NDArray[np.bool_]]
    inner_PCC: Numbers
    rest_CC: Numbers
    starts: tuple[int, ...]
    shown_TCS: Numbers
    squares_TCS: Numbers
    norms_TC: Numbers
    sizes_T: NDArray[np.int64]
    drawn_TS: NDArray[np.bool_]
    same_TS: NDArray[np.int64]

    # --- equality and distance ----------------------------------------------------------------------------------------

    def equal(self, one: int, other: int) -> str | None:
        """The precision in which both are the same, if every tensor is the same in one that a side of it was saved in."""
        return next((precision for precision in _PRECISIONS if self._equal(one, other, precision).all()), None)

    def equal_if_rounded(self, one: int, other: int) -> bool:
        """Whether roundings, one to bfloat16 and one to float16, may be all that both differ in."""
        bfloat16, float16 = self.exact[BFLOAT16], self.exact[FLOAT16]
        mixed = (bfloat16[:, one] & float16[:, other]) | (float16[:, one] & bfloat16[:, other])
        near = self.distance_CC[one, other] <= _ROUNDING * math.sqrt(self.whole_CC[one, one])
        return bool(near and (mixed | self._equal(one, other, _PRECISIONS[-1])).all())

    def _equal(self, one: int, other: int, coarsest: str) -> NDArray[np.bool_]:
        """Which tensors are equal in a precision up to the coarsest that one side was saved in."""
        found = np.zeros(len(self.values[FLOAT32]), bool)
        for precision in _PRECISIONS[: _PRECISIONS.index(coarsest) + 1]:
            values, exact = self.values[precision], self.exact[precision]
            found |= (values[:, one] == values[:, other]) & (exact[:, one] | exact[:, other])
        return found

    @cached_property
    def whole_CC(self) -> Numbers:
        """Inner products of all weights."""
        found: Numbers = self.inner_PCC.sum(0) + self.rest_CC
        return found

    @cached_property
    def distance_CC(self) -> Numbers:
        """Of all weights; zero where rounding is all that is left."""
        norms_C = np.diagonal(self.whole_CC)
        squared_CC = norms_C[:, None] + norms_C - 2 * self.whole_CC
        squared_CC[squared_CC <= _STILL * np.maximum(norms_C[:, None], norms_C)] = 0
        found: Numbers = np.sqrt(squared_CC)
        return found

    # --- starts -------------------------------------------------------------------------------------------------------

    def descent(self, starts: Sequence[int]) -> tuple[Numbers, Numbers]:
        """z and the cosine of every checkpoint with these starts, all different; (C, starts), NaN where no matrix tells.

        The cosine is the mean of the matrices', weighted by their sizes.
        """
        places = [self.starts.index(start) for start in starts]
        used_TS = self._used(places)
        norms_TCS = self.norms_TC[:, :, None] * self.norms_TC[:, list(starts)][:, None, :]
        used_TCS = used_TS[:, None, :] & (norms_TCS > 0)
        sizes_T11 = self.sizes_T[:, None, None]
        a_TCS = np.where(used_TCS, sizes_T11 / np.sqrt(np.where(used_TCS, norms_TCS, 1)), 0)
        shown_CS = (a_TCS * self.shown_TCS[:, :, places]).sum(0)
        deviation_CS = np.sqrt((a_TCS**2 * self.squares_TCS[:, :, places]).sum(0))
        counted_CS = np.where(used_TCS, sizes_T11, 0).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return shown_CS / deviation_CS, shown_CS / counted_CS

    def _used(self, places: Sequence[int]) -> NDArray[np.bool_]:
        """(T, starts): which matrices tell of a start."""
        used_TS = self.drawn_TS[:, places].copy()
        same_TS = self.same_TS[:, places]
        for t in range(len(same_TS)):
            for s in range(len(places)):
                others = np.delete(same_TS[t], s)
                used_TS[t, s] &= same_TS[t, s] not in others and same_TS[t, s] not in same_TS[:t, s]
        return used_TS

    # --- direction ----------------------------------------------------------------------------------------------------

    def directions(self, start: int, one: int, others: Sequence[int]) -> Numbers:
        """Cosines of how far from the start one lies and others do; (others, P), NaN where one has not moved."""

        def moved(left: int, right: int) -> Numbers:
            inner = self.inner_PCC
            found: Numbers = inner[:, left, right] - inner[:, left, start] - inner[:, start, right] + inner[:, start, start]
            return found

        def norm(which: int) -> Numbers:
            squared_P = moved(which, which)
            return np.sqrt(np.where(squared_P > _STILL * self.inner_PCC[:, which, which], squared_P, np.nan))

        return np.stack([moved(one, other) / (norm(one) * norm(other)) for other in others])


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(
    folders: Sequence[Folder],
    tensors: Mapping[str, tuple[int, ...]],
    starts: Sequence[int],
    advance: Callable[[int], None] = lambda tensors: None,
) -> Likeness:
    """Reads all folders side by side, a block of a tensor at a time.

    Args:
      tensors: name → shape; all folders have them.
      starts: which folders may be starts.
      advance: called with the number of tensors read.

    Raises:
      UserError: a number is not finite, or a file is damaged.
    """
    count, columns = len(folders), [*starts]
    matrices = [name for name, shape in tensors.items() if len(shape) > 1 and all(shape)]
    least = -(-_PARTS // max(len(matrices), 1))  # of one matrix
    parts = max(1, min(len(matrices), _PARTS) * least)
    inner_PCC, rest_CC = np.zeros((parts, count, count)), np.zeros((count, count))
    shown_TCS, squares_TCS = np.zeros((2, len(matrices), count, len(columns)))
    norms_TC, drawn_TS = np.zeros((len(matrices), count)), np.zeros((len(matrices), len(columns)), bool)
    same_TS, known = np.zeros((len(matrices), len(columns)), np.int64), dict[str, int]()
    hashes = [_Hash() for _ in folders]
    values, exact = [np.zeros((len(_PRECISIONS), len(tensors), count), kind) for kind in (np.int64, bool)]
    most = max(1, _BLOCK // count)
    for number, (name, shape) in enumerate(tensors.items()):
        place = matrices.index(name) if name in matrices else None
        for hashed in hashes:
            hashed.begin(f"{name} {shape}")
        means = _Means(len(columns), shape[-1] if shape else 1)
        for piece, index in _blocks(shape, 1 if place is None else least, most):
            block_CN = _block(folders, name, index, hashes)
            inner_CC = block_CN @ block_CN.T
            if place is None:
                rest_CC += inner_CC
                continue
            # Whole matrices share parts where there are many; pieces of one have their own where there are few.
            inner_PCC[(place * least + piece) % parts] += inner_CC
            shown_TCS[place] += inner_CC[:, columns]
            norms_TC[place] += np.diagonal(inner_CC)
            means.add(block_CN[columns])
            block_CN *= block_CN
            squares_TCS[place] += block_CN @ block_CN[columns].T
        for c, hashed in enumerate(hashes):
            for p, (digest, lossless) in enumerate(hashed.end()):
                values[p, number, c], exact[p, number, c] = known.setdefault(f"{shape} {digest}", len(known)), lossless
        if place is not None:
            drawn_TS[place], same_TS[place] = means.none(), values[0, number, columns]
        advance(1)
    return Likeness(
        digests=[hashed.whole.hexdigest() for hashed in hashes],
        values=dict(zip(_PRECISIONS, values, strict=True)),
        exact=dict(zip(_PRECISIONS, exact, strict=True)),
        inner_PCC=inner_PCC,
        rest_CC=rest_CC,
        starts=tuple(starts),
        shown_TCS=shown_TCS,
        squares_TCS=squares_TCS,
        norms_TC=norms_TC,
        sizes_T=np.array([math.prod(tensors[name]) for name in matrices], np.int64),
        drawn_TS=drawn_TS,
        same_TS=same_TS,
    )


def _block(folders: Sequence[Folder], name: str, index: tuple[slice, ...], hashes: Sequence["_Hash"]) -> Numbers:
    """The numbers of a block, a row a folder."""
    block_CN: Numbers | None = None
    for c, (folder, hashed) in enumerate(zip(folders, hashes, strict=True)):
        value_N = folder.read(name, *index).reshape(-1)
        hashed.update(value_N)
        if block_CN is None:
            block_CN = np.empty((len(folders), len(value_N)))
        block_CN[c] = value_N
    assert block_CN is not None
    return block_CN


def _blocks(shape: tuple[int, ...], pieces: int, most: int) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Pieces of the first dimension and the blocks that each is read in, in the order in which a file has them."""
    if not shape:
        yield 0, ()
    if not shape or not all(shape):  # nothing is in it
        return
    rows, row = shape[0], math.prod(shape[1:])
    bounds = np.linspace(0, rows, min(pieces, rows) + 1).astype(int).tolist()
    for piece, (begin, end) in enumerate(pairwise(bounds)):
        for first in range(begin, end, max(1, most // row)):
            rows_here = slice(first, min(first + max(1, most // row), end))
            if row <= most or len(shape) < 3:
                yield piece, (rows_here,)
                continue
            inner = max(1, most // math.prod(shape[2:]))  # a row that is a matrix itself, such as an expert's
            for start in range(0, shape[1], inner):
                yield piece, (rows_here, slice(start, min(start + inner, shape[1])))


class _Means:
    """Whether the rows of matrices, or their columns, have a mean in common."""

    def __init__(self, matrices: int, width: int) -> None:
        self.sums_SW, self.squares_SW = np.zeros((2, matrices, width))
        self.rows_S, self.row_squares_S, self.fourth_S = np.zeros((3, matrices))

    def add(self, block_SN: Numbers) -> None:
        """Some whole rows."""
        block_SRW = block_SN.reshape(len(block_SN), -1, self.sums_SW.shape[1])
        self.sums_SW += block_SRW.sum(1)
        self.rows_S += (block_SRW.sum(2) ** 2).sum(1)
        block_SRW = block_SRW**2
        self.squares_SW += block_SRW.sum(1)
        self.row_squares_S += (block_SRW.sum(2) ** 2).sum(1)
        self.fourth_S += (block_SRW**2).sum((1, 2))

    def none(self) -> NDArray[np.bool_]:
        """Of each matrix: neither, and it is not zero."""
        expected_S = self.squares_SW.sum(1)
        columns_S, column_squares_S = (self.sums_SW**2).sum(1), (self.squares_SW**2).sum(1)
        found = expected_S > 0
        for sums_S, squares_S in ((columns_S, column_squares_S), (self.rows_S, self.row_squares_S)):
            found &= sums_S - expected_S <= _DRAWN * np.sqrt(2 * np.maximum(squares_S - self.fourth_S, 0))
        return found


# --- hashes -----------------------------------------------------------------------------------------------------------


_DTYPES = {FLOAT32: np.dtype(np.float32), BFLOAT16: np.dtype(ml_dtypes.bfloat16), FLOAT16: np.dtype(np.float16)}
_PRECISIONS = tuple(_DTYPES)  # from the finest


def _rounded(value_N: NDArray[np.float32], precision: str) -> tuple[NDArray[Any], bool]:
    """To the nearest, and whether nothing was lost."""
    with np.errstate(over="ignore"):  # infinite, and not exact
        rounded_N = value_N.astype(_DTYPES[precision])
    return rounded_N, bool((rounded_N.astype(np.float32) == value_N).all())


class _Hash:
    """sha256 of a checkpoint's tensors, in every precision, and over all of them."""

    def __init__(self) -> None:
        self.whole = hashlib.sha256()
        self._begun = {precision: hashlib.sha256() for precision in _PRECISIONS}
        self._exact = dict.fromkeys(_PRECISIONS, True)

    def begin(self, name: str) -> None:
        """A tensor begins."""
        self.whole.update(f"{name}\n".encode())
        self._begun = {precision: hashlib.sha256() for precision in _PRECISIONS}
        self._exact = dict.fromkeys(_PRECISIONS, True)

    def update(self, value_N: NDArray[np.float32]) -> None:
        """A block of it."""
        value_N = np.ascontiguousarray(value_N, "<f4")
        for precision in _PRECISIONS:
            rounded_N, exact = _rounded(value_N, precision)
            self._begun[precision].update(rounded_N.view(np.uint8).data)
            self._exact[precision] &= exact

    def end(self) -> list[tuple[str, bool]]:
        """It ends: of each precision its sha256, and whether nothing was lost."""
        found = [(self._begun[precision].hexdigest(), self._exact[precision]) for precision in _PRECISIONS]
        self.whole.update(found[0][0].encode())
        return found
