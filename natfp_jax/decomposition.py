"""How far apart the runs of a crossed grid are, and how much of that is each factor's.

Owns the distances between runs, by the pieces that their texts consist of and by given distributions, and what becomes of these
distances in a grid of two or more factors: a component each, their interaction, chaos, and sampling noise beside them. Must
not know how texts were drawn or what the factors are.

The distance is the Jensen-Shannon divergence in bits, which is the square of a distance in a Hilbert space: JS(p, q) =
||f(p) - f(q)||^2 for some map f (Fuglede & Topsoe 2004). So what is known of squares holds for it, whatever its size.

**Components.** Let f of a run be m + a_i + b_o + c_io + e, with effects of the two factors, of their interaction, and of what
no factor decides (the chaos that a twin shows), independent and of mean zero over levels drawn at random. The squared distance
of two runs is on average twice the variance of every effect in which they differ. With V for twice a variance,

    both factors differ    V1 + V2 + V12 + Vchaos      only the second    V2 + V12 + Vchaos
    only the first         V1 + V12 + Vchaos           a twin             Vchaos

and so V1 is the first less the second, and so on: the estimator of a two-way analysis of variance, whose sums of squares are
sums of squared distances (Anderson 2001, PERMANOVA). A component is unbiased, so that one of nothing is below zero as often as
above; it is not clipped. Of more factors, V of each is the distance of runs that differ in all, less that of those which differ
in all but this one; what is left beside chaos is all interactions together. Without a twin these two are one.

**Noise.** Texts are few, and a divergence of counted frequencies is too large by what the counts vary. The documents are cut
in halves: the first half of a and the second of b are as far apart as a and b are, and the noise; the two halves of one run
as far as the noise alone. So the distance of a and b is the mean over the halves crossed, less the mean of both own ones. In
the space of f this is the product of f(a) - f(b) in one half with the same in the other, whose noises are independent (a
cross-validated distance; Walther et al. 2016): of two draws of one run it is zero on average, exactly. What the documents of a
half have in common cancels, since every run continues the same prompts.

Letters after an underscore name the axes: N texts or places, A arms, V pieces or ids, H halves, B resamples, F pairs of arms,
X whatever distances are of: places, resamples, or nothing.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.special import entr

from natfp_jax import stats
from natfp_jax.counts import LEAST_DOCUMENTS, by_document, spread

__all__ = [
    "Component",
    "Design",
    "Frequencies",
    "by_frequencies",
    "by_places",
    "components",
    "debiased",
    "divergences",
    "frequency_distances",
]

RESAMPLES = 200  # of the documents: an end of an interval is then known to a twentieth of its width
BLOCK = 10  # resamples at once: what bounds the memory

Distances = NDArray[np.float64]
Cell = tuple[str, ...]


@dataclass(frozen=True)
class Design:
    """Which arm is what, in the order of the distances: the cells of the grid, then twins, then second draws of cells.

    Attributes:
      factors: their names.
      cells: the levels of each arm of the grid, every combination once.
      twins: the cells that further arms are twins of.
      again: the cells that further draws are of: the null.

    Raises:
      ValueError: there are fewer than two factors, or the cells are no full grid of two or more levels each.
    """

    factors: tuple[str, ...]
    cells: tuple[Cell, ...]
    twins: tuple[Cell, ...] = ()
    again: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        levels = [sorted(set(some)) for some in zip(*self.cells, strict=True)]
        if len(levels) != len(self.factors) or len(levels) < 2 or min(map(len, levels)) < 2:
            raise ValueError(f"got the factors {self.factors} with the levels {levels}, expected two or more of both")
        if sorted(self.cells) != sorted(itertools.product(*levels)):
            raise ValueError(f"the cells are no full grid of the levels {levels}")
        if unknown := [cell for cell in (*self.twins, *self.again) if cell not in self.cells]:
            raise ValueError(f"there are no cells {unknown} in the grid")

    @property
    def arms(self) -> int:
        """How many arms and further draws there are."""
        return len(self.cells) + len(self.twins) + len(self.again)


@dataclass(frozen=True)
class Component:
    """What one source contributes to the distance of two runs.

    Attributes:
      component: a factor's name, "interaction", "chaos" or both together, "all", "sampling noise", "null".
      bits: Jensen-Shannon divergence.
      ci95: percentile interval, documents resampled: it covers the texts, not other levels.
      share: of "all", the distance of runs that differ in every factor; None of what is no part of it, or without a distance.
      share_ci95: its percentile interval.
    """

    component: str
    bits: float
    ci95: tuple[float, float]
    share: float | None
    share_ci95: tuple[float, float] | None


BESIDE = ("sampling noise", "null")  # no parts of the distance of two runs


# --- distances --------------------------------------------------------------------------------------------------------


def _entropy(p_V: NDArray[np.float64]) -> NDArray[np.float64]:
    bits: NDArray[np.float64] = entr(p_V).sum(axis=-1) / np.log(2)
    return bits


def divergences(p_AV: ArrayLike, q_AV: ArrayLike) -> NDArray[np.float64]:
    """The Jensen-Shannon divergence in bits, over the last axis; axes before it broadcast. Of equal rows it is exactly zero."""
    p, q = np.asarray(p_AV, dtype=np.float64), np.asarray(q_AV, dtype=np.float64)
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def debiased(uses_HAV: NDArray[np.floating]) -> tuple[Distances, NDArray[np.float64]]:
    """Distances of arms without the noise of their counts, [A, A], and that noise, [A]: the divergence of an arm's halves.

    Args:
      uses_HAV: how often each arm uses each piece in each of two halves of the documents.
    """
    first_AV, second_AV = uses_HAV / np.maximum(uses_HAV.sum(axis=-1, keepdims=True), 1)
    crossed_AA = np.stack([divergences(first_V, second_AV) for first_V in first_AV])
    noise_A = np.diag(crossed_AA)
    return (crossed_AA + crossed_AA.T) / 2 - (noise_A[:, None] + noise_A) / 2, noise_A


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Distances by frequencies of pieces: those found, then those of every resample."""

    distance_AAB: Distances
    noise_AB: NDArray[np.float64]


def frequency_distances(
    counts_NV: sparse.csr_array, arms_N: NDArray[np.integer], documents_N: ArrayLike, seed: int, random: np.random.Generator
) -> Frequencies:
    """How far apart arms are by the pieces that their texts consist of, with resamples of the documents.

    Pieces of fewer than ten documents count as one: they would add more noise than distance. Documents are resampled within
    their half, with the texts of all arms. Where noise is as large as the distance the spread of the resamples is too wide,
    by up to a factor of 1.7 where there is no distance at all: they have the noise of the texts as well as their own.

    Args:
      arms_N: the number of the arm of each text.
      seed: decides which documents are in which half.
      random: where the resampling comes from.

    Raises:
      ValueError: there are fewer than four documents.
    """
    names, document_N = np.unique(np.asarray(documents_N), return_inverse=True)
    looked_V = np.flatnonzero(spread(counts_NV, names[document_N]) >= LEAST_DOCUMENTS)
    uses_DAV = by_document(counts_NV, looked_V, arms_N, names[document_N])
    first_D = stats.first_documents(names.tolist(), seed, len(names) // 2)
    halves = [np.flatnonzero(first_D), np.flatnonzero(~first_D)]
    if len(names) < 4:
        raise ValueError(f"got {len(names)} documents, expected 4 or more: two in both halves")
    shape = int(arms_N.max()) + 1, len(looked_V) + 1
    half_HDAV = [uses_DAV[half] for half in halves]

    def counted(weights_HBD: Sequence[NDArray[np.float64]]) -> list[tuple[Distances, NDArray[np.float64]]]:
        uses_HBAV = [
            (uses_DAV.T @ weights_BD.T).T.reshape(-1, *shape)
            for uses_DAV, weights_BD in zip(half_HDAV, weights_HBD, strict=True)
        ]
        return [debiased(np.stack(halves_HAV)) for halves_HAV in zip(*uses_HBAV, strict=True)]

    def drawn(size: int) -> NDArray[np.float64]:
        return random.multinomial(size, np.full(size, 1 / size), size=BLOCK).astype(np.float64)

    found = counted([np.ones((1, len(half))) for half in halves])
    for _ in range(RESAMPLES // BLOCK):
        found += counted([drawn(len(half)) for half in halves])
    return Frequencies(np.stack([d for d, _ in found], axis=-1), np.stack([noise for _, noise in found], axis=-1))


# --- components -------------------------------------------------------------------------------------------------------


def components(design: Design, distance_AAX: Distances) -> dict[str, NDArray[np.float64]]:
    """Each component, in the unit of the distances: [X] from [A, A, X].

    Every pair of cells that differ in all factors is set against the pairs that differ from it in one, so that a factor whose
    levels are equal has a component of exactly zero.
    """
    place = {cell: row for row, cell in enumerate(design.cells)}
    pairs = [
        (one, other)
        for one, other in itertools.combinations(design.cells, 2)
        if all(a != b for a, b in zip(one, other, strict=True))
    ]

    def apart(some: Sequence[tuple[Cell, Cell]]) -> Distances:
        rows, columns = ([place[pair[side]] for pair in some] for side in (0, 1))
        return distance_AAX[rows, columns]

    whole_FX, found = apart(pairs), dict[str, NDArray[np.float64]]()
    for k, name in enumerate(design.factors):
        # Of both runs in turn the factor is set to the other's level.
        same = [[(a, (*b[:k], a[k], *b[k + 1 :])) for a, b in pairs], [((*a[:k], b[k], *a[k + 1 :]), b) for a, b in pairs]]
        found[name] = (whole_FX - (apart(same[0]) + apart(same[1])) / 2).mean(axis=0)
    total_X = whole_FX.mean(axis=0)
    rest_X = total_X - sum(found.values())
    if replicates := _replicates(design):
        chaos_X = distance_AAX[tuple(np.array(replicates).T)].mean(axis=0)
        found |= {"interaction": rest_X - chaos_X, "chaos": chaos_X}
    else:
        found["interaction and chaos"] = rest_X
    found["all"] = total_X
    if design.again:
        first = len(design.cells) + len(design.twins)
        seconds = range(first, design.arms)
        found["null"] = distance_AAX[[place[cell] for cell in design.again], list(seconds)].mean(axis=0)
    return found


def _replicates(design: Design) -> list[tuple[int, int]]:
    """The pairs of arms that differ in nothing but a twin's weight."""
    of: dict[Cell, list[int]] = {}
    for row, cell in enumerate((*design.cells, *design.twins)):
        of.setdefault(cell, []).append(row)
    return [pair for some in of.values() for pair in itertools.combinations(some, 2)]


def by_places(
    design: Design, distance_AAN: Distances, documents_N: ArrayLike, random: np.random.Generator, resamples: int
) -> list[Component]:
    """Components of distances that are means over places, such as prompts, and have no noise.

    Args:
      documents_N: the document that each place is of; documents are resampled whole.
    """
    found = components(design, distance_AAN)
    total_N = found["all"]
    rows = []
    for name, value_N in found.items():
        share = None
        if name not in BESIDE and total_N.mean() > 0:
            share = stats.share_interval(value_N, total_N, 0.0, documents_N, random, resamples)
        rows.append(
            Component(
                component=name,
                bits=float(value_N.mean()),
                ci95=stats.bootstrap_interval(value_N, documents_N, random, resamples),
                share=float(value_N.mean() / total_N.mean()) if share is not None else None,
                share_ci95=share,
            )
        )
    return rows


def by_frequencies(design: Design, distances: Frequencies) -> list[Component]:
    """Components of distances by frequencies of pieces, and beside them the noise of a half of the texts of an arm."""
    noise_B = distances.noise_AB.mean(axis=0)
    # Resamples have the noise of the texts and their own, about twice as much: their spread is told about what was found.
    noise_B[1:] += noise_B[0] - noise_B[1:].mean()
    found: Mapping[str, NDArray[np.float64]] = {**components(design, distances.distance_AAB), "sampling noise": noise_B}
    total_B = found["all"]
    rows = []
    for name, (bits, *resampled) in found.items():
        # Without a distance there is nothing to have a share of.
        shared = name not in BESIDE and (total_B > 0).all()
        rows.append(
            Component(
                component=name,
                bits=float(bits),
                ci95=_interval(np.array(resampled)),
                share=float(bits / total_B[0]) if shared else None,
                share_ci95=_interval(np.array(resampled) / total_B[1:]) if shared else None,
            )
        )
    return rows


def _interval(values_B: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values_B, [0.025, 0.975])
    return float(low), float(high)
