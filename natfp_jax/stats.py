"""The statistics of a verdict: splits by document, permutation within prompt, intervals, scores, correction for many tests.

Owns what is claimed about arrays of predictions. Must not know texts, classifiers, models or jax. Randomness comes in as a
generator, and no result depends on the order of the texts.

Letters after an underscore name the axes: N texts, K classes, D documents, G groups of texts, P pairs of levels, L levels,
R resamples, C columns.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, factorial, perm
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm, poisson_binom
from sklearn.metrics import roc_auc_score

__all__ = [
    "LEAST_LEVELS",
    "PARTS",
    "agreement_p",
    "auc_interval",
    "bits_per_text",
    "bootstrap_interval",
    "first_documents",
    "grouped",
    "holm",
    "levels_interval",
    "pairwise_auc",
    "permutation_p",
    "share_interval",
    "sign_p",
    "split",
    "summed",
    "thinned",
    "whole_permutation_p",
]

PARTS = ("training", "validation", "test")
LEAST_LEVELS = 5  # below, a resampling of levels has too few different outcomes to give an interval

_EXACT = 20_000  # trials

Interval = tuple[float, float]


def split(documents: Sequence[str], seed: int, validation: float, test: float) -> NDArray[np.str_]:
    """The part ("training", "validation" or "test") of each row, decided by its document and the seed alone.

    A document is placed by a hash, so it lands on the same side whatever other documents there are and in any order. The
    fractions are expectations: of D documents about `test` * D are for testing, with binomial spread. A larger `test`
    only adds documents to the test part.

    Args:
      documents: the id of the document behind each row.
      seed: another seed gives an independent split.
      validation: the fraction of the documents for validation.
      test: the fraction of the documents for testing.
    """

    def part(document: str) -> str:
        place = _place(f"{seed}/{document}")
        return "test" if place < test else "validation" if place < test + validation else "training"

    part_of = {document: part(document) for document in set(documents)}
    return np.array([part_of[document] for document in documents], dtype="U10")


def _place(name: str) -> float:
    """A number from 0 to 1 that a name has whatever else there is."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def thinned(documents: Sequence[str], seed: int, fraction: float) -> NDArray[np.bool_]:
    """Whether the document of each row is among the first `fraction` of all, in an order that `split` is independent of.

    Of a larger fraction a smaller one is a part; a document is in or out whatever others there are.
    """
    inside = {document: _place(f"{seed}/thinned/{document}") < fraction for document in set(documents)}
    return np.array([inside[document] for document in documents])


def first_documents(documents: Sequence[str], seed: int, rows: int) -> NDArray[np.bool_]:
    """Whether the document of each row is among the first in the order of `thinned`, as many as have so many rows together.

    Two at least, where there are two.
    """
    sizes = Counter(documents)
    order = sorted(sizes, key=lambda document: _place(f"{seed}/thinned/{document}"))
    upto = np.cumsum([sizes[document] for document in order])
    count = max(int(np.searchsorted(upto, rows, side="right")), 2)
    inside = set(order[:count])
    return np.array([document in inside for document in documents])


def _resampled(
    columns_NC: NDArray[np.float64], documents_N: ArrayLike, random: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """The sums of the columns over documents drawn with replacement: [R, C]."""
    _, document_N = np.unique(np.asarray(documents_N), return_inverse=True)
    sums_DC = np.column_stack([np.bincount(document_N, weights=column_N) for column_N in columns_NC.T])
    # Documents with equal sums are interchangeable: drawing how many of each kind come up is drawing documents with
    # replacement, and takes memory for the kinds only.
    kinds, count = np.unique(sums_DC, axis=0, return_counts=True)
    chances = count / count.sum()
    return np.array([random.multinomial(len(sums_DC), chances) @ kinds for _ in range(resamples)])


def _percentiles(values_R: Sequence[float] | NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    correct_N: ArrayLike, documents_N: ArrayLike, random: np.random.Generator, resamples: int, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean of `correct_N`, documents resampled whole (cluster bootstrap; Davison & Hinkley 1997).

    It covers the choice of test documents, not the training of the classifier or of the models.

    Args:
      correct_N: the score of each text, from 0 to 1.
      documents_N: the document behind each text.
      random: where the resampling comes from.
      resamples: how many samples of documents are drawn.
      level: the coverage that is aimed at.
    """
    correct = np.asarray(correct_N, dtype=np.float64)
    drawn_RC = _resampled(np.column_stack([correct, np.ones_like(correct)]), documents_N, random, resamples)
    return _percentiles(drawn_RC[:, 0] / drawn_RC[:, 1], level)


def share_interval(
    correct_N: ArrayLike,
    bound_N: ArrayLike,
    chance: float,
    documents_N: ArrayLike,
    random: np.random.Generator,
    resamples: int,
    level: float = 0.95,
) -> Interval | None:
    """Percentile interval of the share of the bound's excess that a classifier reaches; documents resampled whole.

    The share is (accuracy - chance) / (bound - chance), both on the same texts, so that what makes documents hard for both
    cancels.

    Args:
      correct_N: the classifier's score of each text.
      bound_N: the bound's score of each text, such as the likelihood ceiling's.

    Returns:
      None where a resample has a bound that is not above chance: there is no excess to have a share of.
    """
    correct, bound = np.asarray(correct_N, dtype=np.float64), np.asarray(bound_N, dtype=np.float64)
    columns_NC = np.column_stack([correct - chance, bound - chance])
    excess_RC = _resampled(columns_NC, documents_N, random, resamples)
    if (excess_RC[:, 1] <= 0).any():
        return None
    return _percentiles(excess_RC[:, 0] / excess_RC[:, 1], level)


def levels_interval(
    pairs_P: Sequence[tuple[str, str]],
    correct_PN: ArrayLike,
    documents_N: ArrayLike,
    random: np.random.Generator,
    resamples: int,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of the mean accuracy over pairs of levels, levels and documents resampled (the Multi-Bootstrap).

    The method of Sellam et al. 2022 (arXiv 2106.16163): seeds and test items are both samples, and both are drawn with
    replacement. A pair counts as often as its two levels come up together; a level drawn twice makes no pair with itself.
    So the interval is of runs in general, where `bootstrap_interval` is of these runs. Where levels differ much it is a
    little too narrow: in simulations of five to ten levels a nominal 95 % covers 88 to 92 %.

    Args:
      pairs_P: the two levels of each pair; a pair may come several times, once for each level of another factor.
      correct_PN: the score of each text in each pair, from 0 to 1.
      documents_N: the document behind each text, the same in every pair.

    Raises:
      ValueError: there are fewer than five levels.
    """
    names = sorted({name for pair in pairs_P for name in pair})
    if len(names) < LEAST_LEVELS:
        raise ValueError(f"got {len(names)} levels, expected {LEAST_LEVELS} or more")
    level_P2 = np.array([[names.index(name) for name in pair] for pair in pairs_P])
    _, document_N = np.unique(np.asarray(documents_N), return_inverse=True)
    size_D = np.bincount(document_N)
    sum_PD = np.stack([np.bincount(document_N, weights=row_N) for row_N in np.asarray(correct_PN, dtype=np.float64)])

    def count(outcomes: int) -> NDArray[np.int64]:
        return np.bincount(random.integers(outcomes, size=outcomes), minlength=outcomes)

    means: list[float] = []
    while len(means) < resamples:
        weight_P = count(len(names))[level_P2].prod(axis=1)
        if not weight_P.any():  # one level alone came up
            continue
        weight_D = count(len(size_D))
        means.append((weight_P @ (sum_PD @ weight_D)) / (weight_P.sum() * (weight_D @ size_D)))
    return _percentiles(means, level)


def _hits_pmf(predicted_K: Sequence[int], labels_K: Sequence[int]) -> NDArray[np.float64]:
    """The distribution of the number of hits at one prompt when its labels are permuted at random.

    A permutation places labels on texts as rooks on a board; hits lie in the rectangles "predicted k" x "labelled k". Rook
    numbers of disjoint rectangles multiply, and inclusion-exclusion turns them into exact counts (Riordan 1958, chapter 7).
    Integers throughout, so the alternating sum loses nothing.
    """
    rooks = np.array([1], dtype=object)
    for r, c in zip(predicted_K, labels_K, strict=True):
        rooks = np.convolve(rooks, np.array([comb(r, j) * perm(c, j) for j in range(min(r, c) + 1)], dtype=object))
    size = sum(labels_K)
    at_least = [int(rook) * factorial(size - j) for j, rook in enumerate(rooks)]
    exactly = [
        sum((-1) ** (j - hits) * comb(j, hits) * at_least[j] for j in range(hits, len(at_least)))
        for hits in range(len(at_least))
    ]
    return np.array([number / factorial(size) for number in exactly])


def permutation_p(
    predicted_N: ArrayLike, labels_N: ArrayLike, prompts_N: ArrayLike, random: np.random.Generator, permutations: int
) -> float:
    """p-value of the accuracy: labels permuted among the texts of one prompt, the classifier fixed.

    p = (1 + #{T* >= T}) / (1 + permutations), where T is the number of hits, an integer, so that ties are exact. Prompts may
    have different numbers of texts. Prompts with equal counts of predictions and of labels have one distribution of hits,
    which is computed exactly (so a prompt should have hundreds of texts at most) and drawn from as often as there are such
    prompts: the same law as permuting every label, at a cost that does not grow with the number of prompts.

    Args:
      predicted_N: the class that each text was given.
      labels_N: the class that each text is of.
      prompts_N: the prompt of each text.
      random: where the permutations come from.
      permutations: how many are drawn.
    """
    predicted_N, labels_N = np.asarray(predicted_N), np.asarray(labels_N)
    classes, code_2N = np.unique(np.stack([predicted_N, labels_N]), return_inverse=True)
    prompts, prompt_N = np.unique(np.asarray(prompts_N), return_inverse=True)
    P, K = len(prompts), len(classes)
    count_2PK = [np.bincount(prompt_N * K + code_N, minlength=P * K).reshape(P, K) for code_N in code_2N]
    # The law of hits does not change when classes are renamed, so pairs (predicted, labelled) are sorted to meet more equals.
    pairs_PK = np.sort(count_2PK[0] * (len(labels_N) + 1) + count_2PK[1], axis=1)
    kinds, times = np.unique(pairs_PK, axis=0, return_counts=True)
    hits = np.zeros(permutations, dtype=np.int64)
    for kind_K, number in zip(kinds, times, strict=True):
        pmf = _hits_pmf(*(part.tolist() for part in np.divmod(kind_K, len(labels_N) + 1)))
        hits += random.multinomial(number, pmf, size=permutations) @ np.arange(len(pmf))
    observed = np.count_nonzero(predicted_N == labels_N)
    return float((1 + np.count_nonzero(hits >= observed)) / (1 + permutations))


def whole_permutation_p(
    predicted_N: ArrayLike, labels_N: ArrayLike, prompts_N: ArrayLike, random: np.random.Generator, permutations: int
) -> float:
    """`permutation_p` where texts of one class at a prompt are one document: its texts keep one label, whatever it is.

    Texts of a document are alike, so that labels permuted text by text would call their likeness a fingerprint.
    """
    classes, code_2N = np.unique(np.stack([np.asarray(predicted_N), np.asarray(labels_N)]), return_inverse=True)
    prompts, prompt_N = np.unique(np.asarray(prompts_N), return_inverse=True)
    P, K = len(prompts), len(classes)
    count_PKK = np.bincount((prompt_N * K + code_2N[1]) * K + code_2N[0], minlength=P * K * K).reshape(P, K, K)
    documents_PK = np.tile(np.arange(K), (P, 1))

    def hits(given_PK: NDArray[np.integer]) -> int:
        return int(np.take_along_axis(count_PKK, given_PK[..., None], axis=2).sum())

    observed = hits(documents_PK)
    drawn = sum(hits(random.permuted(documents_PK, axis=1)) >= observed for _ in range(permutations))
    return (1 + drawn) / (1 + permutations)


def sign_p(correct_N: ArrayLike, labels_N: ArrayLike, prompts_N: ArrayLike) -> float | None:
    """The exact sign test on discordant prompts, one-sided, for two classes with one text of each at every prompt.

    A prompt whose two texts got the same class has one hit whatever the labels: it tells nothing. Of the others each is
    right or wrong as a whole, and under the null as likely one as the other. So this is the test of `permutation_p`
    without its random draws.

    Returns:
      The p-value; None where classes and texts are others.
    """
    labels_N, prompts_N = np.asarray(labels_N), np.asarray(prompts_N)
    _, prompt_N, texts_P = np.unique(prompts_N, return_inverse=True, return_counts=True)
    if len(np.unique(labels_N)) != 2 or (texts_P != 2).any():
        return None
    hits_P = np.bincount(prompt_N, weights=np.asarray(correct_N, dtype=np.float64))
    right, wrong = int(np.count_nonzero(hits_P == 2)), int(np.count_nonzero(hits_P == 0))
    return float(binomtest(right, right + wrong, alternative="greater").pvalue) if right + wrong else 1.0


def agreement_p(same_N: ArrayLike, chance_N: ArrayLike) -> float:
    """Whether two draws agree too often to be independent: one-sided, exact up to 20,000 trials.

    Given the first draw's outcome, an independent second one of the same distribution is equal to it with the probability
    that this outcome had. So the number of agreements has a Poisson-binomial distribution that is known.

    Args:
      same_N: whether the two outcomes of each trial are equal.
      chance_N: the probability that the first one's outcome had.
    """
    # A sum of float32 probabilities may end a little above 1.
    chance = np.minimum(np.asarray(chance_N, dtype=np.float64), 1.0)
    agreements = np.count_nonzero(same_N)
    if len(chance) > _EXACT:  # the cost of the exact law grows as the square; the normal one is as good here
        spread = np.sqrt((chance * (1 - chance)).sum())
        return float(norm.sf((agreements - 0.5 - chance.sum()) / spread)) if spread > 0 else 1.0
    return float(np.clip(poisson_binom(chance).sf(agreements - 1), 0, 1))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted for a family of tests (Holm 1979), in the order given: rejecting those <= a has family error <= a."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def pairwise_auc(probabilities_NK: NDArray[np.floating], labels_N: NDArray[np.integer]) -> float:
    """Area under the ROC curve, averaged over the pairs of classes (Hand & Till 2001): 0.5 is chance for any number of classes.

    Args:
      probabilities_NK: the probability of each class, rows summing to 1.
      labels_N: the class of each text as a column number; every class occurs.
    """
    if probabilities_NK.shape[1] == 2:
        return float(roc_auc_score(labels_N, probabilities_NK[:, 1]))
    return float(roc_auc_score(labels_N, probabilities_NK, multi_class="ovo", average="macro"))


def bits_per_text(probabilities_NK: NDArray[np.floating], labels_N: NDArray[np.integer]) -> float:
    """What a text tells of its class: log2 K less the mean log-loss in bits. Not clipped: a bad classifier is below zero.

    A probability of zero counts as the smallest normal float64, 2^-1022, so that the result is finite.
    """
    held = probabilities_NK[np.arange(len(labels_N)), labels_N]
    return float(np.log2(probabilities_NK.shape[1]) + np.log2(np.maximum(held, np.finfo(np.float64).tiny)).mean())


def auc_interval(
    probabilities_NK: NDArray[np.floating],
    labels_N: NDArray[np.integer],
    documents_N: ArrayLike,
    random: np.random.Generator,
    resamples: int,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `pairwise_auc`, documents resampled whole.

    Args:
      probabilities_NK, labels_N: as for `pairwise_auc`; every document has texts of every class.
    """
    K = probabilities_NK.shape[1]
    names, document_N = np.unique(np.asarray(documents_N), return_inverse=True)
    ranked = [
        _Ranked.of(probabilities_NK[:, positive], labels_N, document_N, positive, negative)
        for positive, negative in ([(1, 0)] if K == 2 else itertools.permutations(range(K), 2))
    ]

    def once() -> float:
        times_D = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names)).astype(np.float64)
        return float(np.mean([one.auc(times_D) for one in ranked]))

    return _percentiles([once() for _ in range(resamples)], level)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """The texts of two classes in the order of a score, sorted once for all resamples."""

    above_N: NDArray[np.intp]  # the document of each text of the one class
    below_N: NDArray[np.intp]  # and of the other
    less_N: NDArray[np.intp]  # of each text of the one class, how many of the other have a smaller score
    ties_N: NDArray[np.intp]  # and how many no larger one

    @classmethod
    def of(
        cls,
        score_N: NDArray[np.floating],
        labels_N: NDArray[np.integer],
        document_N: NDArray[np.intp],
        positive: int,
        negative: int,
    ) -> "_Ranked":
        above, below = (
            rows[np.argsort(score_N[rows], kind="stable")]
            for rows in (np.flatnonzero(labels_N == label) for label in (positive, negative))
        )
        less, ties = (np.searchsorted(score_N[below], score_N[above], side=side) for side in ("left", "right"))
        return cls(document_N[above], document_N[below], less, ties)

    def auc(self, times_D: NDArray[np.float64]) -> float:
        """The area with the texts of each document counted so many times: pairs in the right order, a tie half."""
        above_N = times_D[self.above_N]
        upto = np.concatenate([[0.0], np.cumsum(times_D[self.below_N])])
        # Not as a product of vectors, whose threads take longer to meet; whole numbers add up exactly in any order.
        right = np.sum(above_N * (upto[self.less_N] + upto[self.ties_N]))
        return float(right / (2 * above_N.sum() * upto[-1]))


# --- several texts in one decision ------------------------------------------------------------------------------------


def grouped(prompts_N: ArrayLike, documents_N: ArrayLike, size: int, random: np.random.Generator) -> NDArray[np.int64]:
    """The group of each text: `size` prompts each, the same prompts for every source; -1 for those that are left over.

    Documents come in random order with their prompts side by side, so that few groups share a document.
    """
    prompts, first, prompt_N = np.unique(np.asarray(prompts_N), return_index=True, return_inverse=True)
    _, document_P = np.unique(np.asarray(documents_N)[first], return_inverse=True)
    place_D = random.permutation(document_P.max() + 1)
    place_P = np.empty(len(prompts), np.int64)
    place_P[np.argsort(place_D[document_P], kind="stable")] = np.arange(len(prompts))
    group_P = np.where(place_P < len(prompts) // size * size, place_P // size, -1)
    return group_P[prompt_N]


def summed(
    log_NK: NDArray[np.floating], labels_N: ArrayLike, sources_N: ArrayLike, groups_N: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[np.integer]]:
    """Log-probabilities of all texts of one source in one group, added up as those of independent texts.

    Args:
      log_NK: of each text, such as a classifier's of each class under equal priors, or a model's of each text.
      sources_N: what drew each text; a class may pool several sources, a decision is on one.
      groups_N: of `grouped`; texts of group -1 are left out.

    Returns:
      The sums [G, K], their labels and their groups.
    """
    kept_N = groups_N >= 0
    sources, source_N = np.unique(np.asarray(sources_N)[kept_N], return_inverse=True)
    count = len(sources)
    found_G, first, decision_N = np.unique(groups_N[kept_N] * count + source_N, return_index=True, return_inverse=True)
    sums_GK = np.zeros((len(found_G), log_NK.shape[1]))
    np.add.at(sums_GK, decision_N, log_NK[kept_N])
    return sums_GK, np.asarray(labels_N)[kept_N][first], found_G // count
