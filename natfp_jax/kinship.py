"""Which checkpoints are of one training, as far as numbers between them say.

Owns three judgements, and what each of them takes for clear: which start belongs to which seed, which checkpoints go on from
one another, and where in a training a checkpoint lies. Must not know files, tensors, or how a judgement is put into words.

Each of them may abstain, and is made so that a healthy training is not blamed for what is wrong with another:

- **Starts.** Seeds get starts, no two the same one, such that most branches agree: a branch has a voice for the start that it
  lists, and two for those that its later steps descend from. Where another choice has nearly as many, nothing is said.
- **Lineages.** Checkpoints of neighbouring steps belong together if each is the other's nearest in direction from the common
  start, clearly so before all others of that step. What hangs together is a lineage. It has the name of the branch that claims
  most of it, if that is two thirds; where no branch does, something was exchanged, but it is not known what.
- **Places.** In trainings of one recipe the distances between the checkpoints of two steps are nearly the same. A checkpoint
  whose distances from the rest of its branch are those of another step, from wherever one looks, is of that step.

Letters after an underscore name the axes: I seeds, J starts, K candidates, P parts.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["assigned", "beyond", "clearly", "joined", "lineages", "means", "named", "votes"]

FAMILY = 1e-6  # the probability that any start of a suite shows where it should not
GAP, ERRORS = 0.05, 3.0  # by which a cosine is clearly the larger: in the mean over parts, and in errors of that mean
_FEWEST = 9  # parts: of fewer the signs alone do not make so many errors
_AHEAD = 2  # listed steps that are looked ahead, so that one checkpoint from elsewhere does not end a lineage
_SAME = 3  # times nearer to what is usual of one step than of another: it is of the one
_CLEAR = 1.5  # voices: more than a branch has that is wrong in its step 0 alone
_NEVER = -1e9

Numbers = NDArray[np.float64]


def beyond(tests: int) -> float:
    """What none of so many z exceeds by chance, but for FAMILY: by Hoeffding's inequality and Bonferroni's."""
    return math.sqrt(2 * math.log(tests / FAMILY))


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Of each of so many things the number of its group: what pairs join is in one, and groups are counted as they appear."""
    edges = np.array(list(pairs), int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (count, count))
    found: list[int] = connected_components(graph, directed=False)[1].tolist()
    return found


# --- starts -----------------------------------------------------------------------------------------------------------


def assigned(support_IJ: Numbers) -> list[tuple[int | None, bool]]:
    """Of each seed its start, if there is one left for it, and whether every other choice is clearly the worse one.

    Args:
      support_IJ: how many speak for it.
    """
    seeds, starts = support_IJ.shape
    # A seed may go without: each has a place of its own for that.
    padded = np.hstack([support_IJ, np.where(np.eye(seeds, dtype=bool), 0.0, _NEVER)])

    def best(worth: Numbers) -> tuple[float, NDArray[np.int64]]:
        rows, chosen = linear_sum_assignment(worth, maximize=True)
        return float(worth[rows, chosen].sum()), chosen

    most, chosen = best(padded)
    found: list[tuple[int | None, bool]] = []
    for i, j in enumerate(chosen.tolist()):
        without = padded.copy()
        without[i, j] = _NEVER
        if padded[i, j] == 0:  # to get a start that nobody speaks for is to go without
            without[i, padded[i] == 0] = _NEVER
        own = j if j < starts and padded[i, j] > 0 else None
        undisputed = own is not None and np.count_nonzero(support_IJ[i]) == np.count_nonzero(support_IJ[:, own]) == 1
        found.append((own, bool(undisputed or most - best(without)[0] >= _CLEAR)))
    return found


# --- lineages ---------------------------------------------------------------------------------------------------------


def means(cosines_KP: Numbers) -> Numbers:
    """Over parts; NaN is no part, and what has none is infinitely far."""
    mean_K, known_K = np.full(len(cosines_KP), -np.inf), ~np.isnan(cosines_KP).all(1)
    mean_K[known_K] = np.nanmean(cosines_KP[known_K], axis=1)
    return mean_K


def clearly(nearer_P: Numbers, farther_P: Numbers) -> bool:
    """Whether cosines are the larger by more than chance and by enough to mean something; NaN is no part."""
    both_P = nearer_P - farther_P
    both_P = both_P[~np.isnan(both_P)]
    if len(both_P) < _FEWEST:
        return False
    return bool(both_P.mean() >= GAP and both_P.sum() >= ERRORS * math.sqrt(float(both_P @ both_P)))


def lineages(
    nodes: Mapping[int, Sequence[int]],
    directions: Callable[[int, Sequence[int]], Numbers],
    claims: Callable[[int], Collection[str]],
) -> list[list[int]]:
    """The nodes that go on from one another, lineage by lineage; one that nothing clearly goes on from is alone.

    Args:
      nodes: step → what is said to be of it; a node may be at several steps.
      directions: the cosines of one node with others, (K, P).
      claims: of which trainings a node is said to be.
    """
    steps = sorted(nodes)
    every = sorted({node for step in steps for node in nodes[step]})

    def alike(one: int, other: int) -> bool:
        return bool({*claims(one)} & {*claims(other)})

    def nearest(node: int, candidates: Sequence[int]) -> int | None:
        cosines_KP = directions(node, candidates)
        mean_K = means(cosines_KP)
        first = int(mean_K.argmax())
        if np.isneginf(mean_K[first]):
            return None
        others = [k for k, one in enumerate(candidates) if {*claims(one)} != {*claims(candidates[first])}]
        return candidates[first] if all(clearly(cosines_KP[first], cosines_KP[k]) for k in others) else None

    def joins(one: int, other: int, back: Sequence[int], ahead: Sequence[int]) -> bool:
        """Whether a node and its nearest at another step belong together."""
        if len(ahead) + len(back) == 2 or one in ahead or other in back:
            return False  # there was nothing to compare, or a node is at both steps and nearest to itself
        # Against the claims only if those of one's own are there too, and farther: of strangers one is always nearest.
        own = alike(one, other) or (any(alike(one, node) for node in ahead) and any(alike(other, node) for node in back))
        return own and nearest(other, back) == one

    links = []
    for place, step in enumerate(steps):
        for later in steps[place + 1 : place + 1 + _AHEAD]:
            for one in nodes[step]:
                other = nearest(one, nodes[later])
                if other is not None and joins(one, other, nodes[step], nodes[later]):
                    links.append((every.index(one), every.index(other)))
    groups: dict[int, list[int]] = {}
    for node, group in zip(every, joined(len(every), links), strict=True):
        groups.setdefault(group, []).append(node)
    return list(groups.values())


def named(claims: Sequence[Collection[str]]) -> str | None:
    """The branch that a lineage is of, by which branches claim each of its nodes, if most do claim it for one."""
    ranked = Counter(name for names in claims for name in names).most_common()
    (name, most), rest = ranked[0], ranked[1:]
    if most < 2 or most < 2 * (len(claims) - most) or (rest and rest[0][1] == most):
        return None
    return name


# --- places -----------------------------------------------------------------------------------------------------------


def votes(
    distances: Mapping[int, float], usual: Callable[[int, int], float | None], here: int, there: int, least: float
) -> tuple[int, int]:
    """From how many other steps it looks as if a checkpoint were of the step `here`, and from how many, of `there`.

    Args:
      distances: step → the checkpoint's distance from the one of that step.
      usual: what such a distance is between two steps, where it is known.
      least: two steps of which the logarithms of these differ by less are not told apart.
    """
    for_here = for_there = 0
    for step, distance in distances.items():
        near, far = usual(here, step), usual(there, step)
        if step in (here, there) or not near or not far or not distance or abs(math.log(near / far)) < least:
            continue
        from_here, from_there = abs(math.log(distance / near)), abs(math.log(distance / far))
        for_here += _SAME * from_here <= from_there
        for_there += _SAME * from_there <= from_here
    return for_here, for_there
