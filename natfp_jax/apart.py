"""One factor of a crossed grid, held apart from the others: is its trace the same in runs that no classifier was shown?

Owns the verdict on held-out strata and its test over runs. A *stratum* is one combination of the levels of all other factors;
it has a run of every level of the factor. A classifier of the levels is fitted on the runs of some strata and asked for the
texts of another's, which are of other documents too. Must not know how a classifier works or what the factors are.

The test is over runs. If the factor leaves no trace that holds across strata, it is arbitrary which of a stratum's runs is
called which level: the labels of the runs are exchanged within every stratum by itself (all of them alike would change
nothing). A classifier that is fitted on exchanged labels is the same one with its classes renamed, so every relabelling is a
sum over the counts of one table, and nothing is fitted again. That runs differ from one another, as they do, is no evidence
against this null; an accuracy within a stratum cannot tell the two apart.

Letters after an underscore name the axes: N texts, M test texts, S strata, L levels (where it comes twice, first the run's
own, then the one that it is given), R relabellings.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix
from sklearn.metrics.cluster import contingency_matrix

from natfp_jax import attribution, config, rng, stats
from natfp_jax.ladder import Rung, Task

__all__ = ["Crossed", "HeldOut", "held_out", "relabelling_p"]

EXACT = 20_000  # relabellings that are all counted: those of 4 x 4 runs are 13,824


@dataclass(frozen=True, eq=False)
class Crossed:
    """The texts of a grid of runs, row by row.

    Attributes:
      name: what the grid is called; with the split seed it decides the random streams.
      rows: the row of each text among those that the classifiers were prepared with.
      levels: the level that each text's run has of the factor.
      strata: the levels that it has of all other factors, as one name.
      documents: the document that the prompt of each text comes from.

    Raises:
      ValueError: lengths differ, there are fewer than two levels or strata, or the runs do not have equally many texts of
        each document, one run for every level in every stratum.
    """

    name: str
    rows: NDArray[np.integer]
    levels: Sequence[str]
    strata: Sequence[str]
    documents: Sequence[str]

    def __post_init__(self) -> None:
        lengths = {len(self.rows), len(self.levels), len(self.strata), len(self.documents)}
        if len(lengths) != 1:
            raise ValueError(f"grid {self.name}: rows, levels, strata and documents have lengths {sorted(lengths)}")
        L, S = len(set(self.levels)), len(set(self.strata))
        if min(L, S) < 2:
            raise ValueError(f"grid {self.name}: got {L} levels in {S} strata, expected two or more of both")
        runs = [f"{level}\0{stratum}" for level, stratum in zip(self.levels, self.strata, strict=True)]
        texts = contingency_matrix(self.documents, runs)
        if texts.shape[1] != L * S or (texts != texts[:, :1]).any():
            raise ValueError(f"grid {self.name}: the runs do not have equally many texts of each document")


@dataclass(frozen=True)
class Relabelled:
    """A test over the relabellings of runs.

    Attributes:
      p_value: how many relabellings do as well as the true one, itself among them.
      least_p: the least value that `p_value` can have, by the number of runs alone.
      relabellings: how many were counted.
      exact: whether these are all that there are.
    """

    p_value: float
    least_p: float
    relabellings: int
    exact: bool


@dataclass(frozen=True)
class HeldOut:
    """How well the levels of a factor are recognised in runs that the classifier was not shown.

    Attributes:
      classifier: which rung of the ladder.
      levels, strata: how many there are.
      chance: 1 / levels.
      accuracy: fitted on all strata but one, asked for that one's test texts; every test text is judged once.
      ci95: its percentile interval, documents resampled: of these runs, not of others.
      one_accuracy: fitted on one stratum, asked for another's test texts; the mean over all such pairs.
      one_ci95: its percentile interval.
      within_accuracy: fitted on one stratum, asked for its own test texts.
      within_ci95: its percentile interval.
      p_value, least_p, relabellings, exact: the test of `one_accuracy` over runs (`Relabelled`).
      training_texts: how many texts the classifier behind `accuracy` was chosen and fitted with, of one stratum left out.
      test_texts: how many texts the accuracies are of.
    """

    classifier: str
    levels: int
    strata: int
    chance: float
    accuracy: float
    ci95: tuple[float, float]
    one_accuracy: float
    one_ci95: tuple[float, float]
    within_accuracy: float
    within_ci95: tuple[float, float]
    p_value: float
    least_p: float
    relabellings: int
    exact: bool
    training_texts: int
    test_texts: int


def relabelling_p(counts_SSLL: NDArray[np.integer], random: np.random.Generator, permutations: int) -> Relabelled:
    """Whether runs of one level are alike across strata: labels exchanged among the runs of every stratum by itself.

    The statistic is the number of texts that a classifier of another stratum gives the level of their run, an integer, so that
    ties are exact. The first stratum keeps its labels, since only how strata lie to one another matters: (L!)^(S-1)
    relabellings differ. Up to 20,000 all are counted; else so many random ones, and p = (1 + #{T* >= T}) / (1 + permutations).

    Args:
      counts_SSLL: fitted on stratum s and asked for the texts of stratum t, to how many of run i it gave the class of run j:
        [s, t, i, j]; what is on the diagonal of strata is not looked at.
      random: where the relabellings come from.
      permutations: how many are drawn where they are too many to count.
    """
    S, L = counts_SSLL.shape[0], counts_SSLL.shape[2]
    every = factorial(L) ** (S - 1)
    if exact := every <= EXACT:
        own = tuple(range(L))
        some = itertools.product([own], *([list(itertools.permutations(own))] * (S - 1)))
        run_RSL = np.array(list(some))  # the run that bears each label; the true labels come first
    else:
        run_RSL = random.permuted(np.broadcast_to(np.arange(L), (1 + permutations, S, L)), axis=2)
        run_RSL[0] = np.arange(L)
    hits_R = np.zeros(len(run_RSL), np.int64)
    for s, t in itertools.permutations(range(S), 2):
        hits_R += counts_SSLL[s, t, run_RSL[:, t], run_RSL[:, s]].sum(axis=1)
    return Relabelled(float(np.mean(hits_R >= hits_R[0])), 1 / len(run_RSL), len(run_RSL), exact)


def held_out(rung: Rung, grid: Crossed, settings: config.Attribution) -> HeldOut:
    """Fits classifiers of the levels on some strata and judges them on the test texts of others.

    Raises:
      UserError: a part has too few documents, or the texts to train on are all empty.
    """
    parts_N = attribution.parts(grid.documents, settings, f"grid {grid.name}")
    level_N, stratum_N = (np.unique(np.asarray(names), return_inverse=True)[1] for names in (grid.levels, grid.strata))
    test_N = parts_N == "test"
    level_M, stratum_M, documents_M = level_N[test_N], stratum_N[test_N], np.asarray(grid.documents)[test_N]
    L, S = int(level_N.max()) + 1, int(stratum_N.max()) + 1

    def hits(strata: list[int]) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """Fitted on these strata: the level that each test text is given, and whether that is its own."""
        known_N = ~test_N & np.isin(stratum_N, strata)
        training_N, validation_N = ((parts_N == part) & known_N for part in ("training", "validation"))
        tried_N = attribution.tried(grid.documents, settings, known_N)
        task = Task(f"grid {grid.name}", grid.rows, level_N, training_N, validation_N, test_N, tried_N)
        given_M = rung.judge(task, settings).probabilities_NK.argmax(axis=1)
        return given_M, given_M == level_M

    ones = [hits([s]) for s in range(S)]
    right_SM = np.stack([right_M for _, right_M in ones])
    counts_SSLL = np.array(
        [
            [confusion_matrix(level_M[stratum_M == t], given_M[stratum_M == t], labels=range(L)) for t in range(S)]
            for given_M, _ in ones
        ]
    )
    # Of two strata all but one are one.
    rest_SM = right_SM[::-1] if S == 2 else np.stack([hits([t for t in range(S) if t != s])[1] for s in range(S)])
    text_M = np.arange(len(level_M))
    within_M = right_SM[stratum_M, text_M]

    def random(purpose: str) -> np.random.Generator:
        return rng.generator(settings.split_seed, "apart", grid.name, rung.kind, purpose)

    def measured(score_M: NDArray[np.floating | np.bool_], purpose: str) -> tuple[float, tuple[float, float]]:
        interval = stats.bootstrap_interval(score_M, documents_M, random(purpose), settings.bootstraps)
        return float(score_M.mean()), interval

    accuracy, ci95 = measured(rest_SM[stratum_M, text_M], "all others")
    one_accuracy, one_ci95 = measured((right_SM.sum(axis=0) - within_M) / (S - 1), "one other")
    within_accuracy, within_ci95 = measured(within_M, "within")
    test = relabelling_p(counts_SSLL, random("relabelling"), settings.permutations)
    return HeldOut(
        classifier=rung.kind,
        levels=L,
        strata=S,
        chance=1 / L,
        accuracy=accuracy,
        ci95=ci95,
        one_accuracy=one_accuracy,
        one_ci95=one_ci95,
        within_accuracy=within_accuracy,
        within_ci95=within_ci95,
        p_value=test.p_value,
        least_p=test.least_p,
        relabellings=test.relabellings,
        exact=test.exact,
        training_texts=int((~test_N).sum()) * (S - 1) // S,
        test_texts=len(level_M),
    )
