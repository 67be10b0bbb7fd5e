"""The statistics of a verdict: splits by document, permutation within prompt, intervals, scores, correction for many tests.

Owns what is claimed about arrays of predictions. Must not know texts, classifiers, models or jax. Randomness comes in as a
generator, and no result depends on the order of the texts.

Letters after an underscore name the axes: N texts, K classes.
"""

import hashlib
from collections.abc import Sequence
from math import comb, factorial, perm

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

__all__ = ["PARTS", "bits_per_text", "bootstrap_interval", "holm", "pairwise_auc", "permutation_p", "split"]

PARTS = ("training", "validation", "test")


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
        digest = hashlib.sha256(f"{seed}/{document}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return "test" if place < test else "validation" if place < test + validation else "training"

    part_of = {document: part(document) for document in set(documents)}
    return np.array([part_of[document] for document in documents], dtype="U10")


def bootstrap_interval(
    correct_N: ArrayLike, documents_N: ArrayLike, random: np.random.Generator, resamples: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `correct_N`, documents resampled whole (cluster bootstrap; Davison & Hinkley 1997).

    It covers the choice of test documents, not the training of the classifier or of the models.

    Args:
      correct_N: the score of each text, from 0 to 1.
      documents_N: the document behind each text.
      random: where the resampling comes from.
      resamples: how many samples of documents are drawn.
      level: the coverage that is aimed at.
    """
    _, document_N = np.unique(np.asarray(documents_N), return_inverse=True)
    size_D = np.bincount(document_N)
    sum_D = np.bincount(document_N, weights=np.asarray(correct_N, dtype=np.float64))
    # Documents with equal sum and size are interchangeable: drawing how many of each kind come up is drawing documents with
    # replacement, and takes memory for the kinds only.
    kinds, count = np.unique(np.column_stack([sum_D, size_D]), axis=0, return_counts=True)
    chances = count / count.sum()
    drawn = (random.multinomial(len(size_D), chances) @ kinds for _ in range(resamples))
    means = [total / size for total, size in drawn]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
