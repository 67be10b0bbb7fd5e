"""One comparison: can held-out texts be given to their sources, and how well could anyone do it?

Owns the verdict on given texts: the split, the scores of a classifier, and the likelihood ceiling beside them. Must not know
how texts were drawn, how a classifier works, what the sources are, or which other comparisons a study has; no result depends
on those.

Letters after an underscore name the axes: N texts, A arms, K classes, G decisions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from sklearn.metrics import confusion_matrix
from sklearn.metrics.cluster import contingency_matrix

from natfp_jax import config, rng, stats
from natfp_jax.errors import UserError
from natfp_jax.ladder import Rung, Task

__all__ = [
    "Ceiling",
    "Comparison",
    "Pooled",
    "Result",
    "Verdict",
    "attribute",
    "ceiling",
    "ceiling_scores",
    "parts",
    "task",
    "tried",
]

LEAST_DOCUMENTS = 2  # of each part: an interval over one document has no width
LEAST_GROUPS = 20  # that several texts are pooled in: fewer would say nothing
TRIED = 100_000  # texts with which settings are chosen, about: more would choose the same


@dataclass(frozen=True, eq=False)
class Comparison:
    """The texts of one comparison, row by row.

    Attributes:
      name: what the comparison is called; with the split seed it decides the random streams of its p-value and intervals.
      rows: the row of each text among those that the classifiers were prepared with.
      labels: the class of each text. A class may pool several arms.
      prompts: the prompt of each text.
      documents: the document that the prompt of each text comes from.
      sources: what drew each text, where a class pools several; left out: its class.
      whole: texts of one class at a prompt are alike for other reasons than their class, as those of one document are: their
        labels are permuted together.

    Raises:
      ValueError: lengths differ, there are fewer than two classes, a prompt is of two documents, or the classes do not have
        equally many texts at each prompt (chance would not be 1/K).
    """

    name: str
    rows: NDArray[np.integer]
    labels: Sequence[str]
    prompts: Sequence[str]
    documents: Sequence[str]
    sources: Sequence[str] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        lengths = {len(self.rows), len(self.labels), len(self.prompts), len(self.documents)}
        if len(lengths) != 1:
            raise ValueError(f"comparison {self.name}: rows, labels, prompts and documents have lengths {sorted(lengths)}")
        if len(set(self.labels)) < 2:
            raise ValueError(f"comparison {self.name}: got the classes {sorted(set(self.labels))}, expected two or more")
        if len(set(zip(self.prompts, self.documents, strict=True))) != len(set(self.prompts)):
            raise ValueError(f"comparison {self.name}: a prompt is of two documents")
        texts_PK = contingency_matrix(self.prompts, self.labels)
        if (texts_PK != texts_PK[:, :1]).any():
            raise ValueError(f"comparison {self.name}: the classes do not have equally many texts at each prompt")

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return tuple(sorted(set(self.labels)))

    def parts(self, settings: config.Attribution) -> NDArray[np.str_]:
        """The part of each text: "training", "validation" or "test".

        Raises:
          UserError: a part has too few documents.
        """
        return parts(self.documents, settings, f"comparison {self.name}")


def parts(documents: Sequence[str], settings: config.Attribution, of: str) -> NDArray[np.str_]:
    """The part of each text by its document: "training", "validation" or "test".

    Raises:
      UserError: a part has too few documents.
    """
    parts_N = stats.split(documents, settings.split_seed, validation=settings.validation_fraction, test=settings.test_fraction)
    found = Counter(dict(zip(documents, parts_N.tolist(), strict=True)).values())
    sizes = {part: found[part] for part in stats.PARTS}
    if min(sizes.values()) < LEAST_DOCUMENTS:
        got = ", ".join(f"{size} for {part}" for part, size in sizes.items())
        raise UserError(
            f"{of}: the split leaves {got} of {sum(sizes.values())} prompt documents, each part needs "
            f"{LEAST_DOCUMENTS}; raise sampling.prompts, or change attribution.test_fraction {settings.test_fraction} "
            f"or attribution.validation_fraction {settings.validation_fraction}"
        )
    return parts_N


def tried(
    documents: Sequence[str], settings: config.Attribution, known_N: NDArray[np.bool_], fraction: float = 1.0
) -> NDArray[np.bool_]:
    """Which texts settings are chosen with: those of enough of the documents, where very many texts are known.

    Args:
      known_N: the training and validation texts.
      fraction: of the documents that these are of.
    """
    return stats.thinned(documents, settings.split_seed, fraction * min(1, TRIED / max(known_N.sum(), 1)))


@dataclass(frozen=True)
class Pooled:
    """Decisions on several texts of one source, at several prompts."""

    texts: int  # of one decision, in the mean
    decisions: int
    accuracy: float
    ci95: tuple[float, float]  # percentile interval, groups of prompts resampled


@dataclass(frozen=True)
class Result:
    """What one classifier reached on the test texts of one comparison.

    Attributes:
      classifier: which rung of the ladder.
      classes: the sources, sorted.
      accuracy: the fraction of the test texts that got their own class.
      chance: 1 / number of classes.
      ci95: percentile interval of the accuracy, documents resampled.
      p_value: of the accuracy, labels permuted within prompts; not corrected for other comparisons.
      sign_p: the exact sign test of the same, where there are two classes with one text of each at a prompt.
      auc: mean over pairs of classes.
      auc_ci95: percentile interval of the AUC, documents resampled.
      bits_per_text: log2 of the number of classes less the log-loss in bits; may be negative.
      validation_bits: the same on the validation texts, of the classifier that was fitted on the training texts alone, at
        the scale that suits the validation texts best (`ladder.Judged`).
      share: of the ceiling's excess over chance, how much the classifier reads; None without an excess or a ceiling.
      share_ci95: its percentile interval, documents resampled.
      pooled: decisions on several texts.
      training_texts: how many texts it was chosen and fitted with.
      test_texts: how many texts the numbers above are of.
      test_prompts: how many prompts these texts continue.
      chosen: what the validation part chose.
      confusion: test texts; rows are true classes, columns the classes given.
      telling: the pieces that speak most for each class, strongest first.
    """

    classifier: str
    classes: tuple[str, ...]
    accuracy: float
    chance: float
    ci95: tuple[float, float]
    p_value: float
    sign_p: float | None
    auc: float
    auc_ci95: tuple[float, float]
    bits_per_text: float
    validation_bits: float
    share: float | None
    share_ci95: tuple[float, float] | None
    pooled: list[Pooled]
    training_texts: int
    test_texts: int
    test_prompts: int
    chosen: dict[str, float]
    confusion: list[list[int]]
    telling: dict[str, list[str]]


@dataclass(frozen=True)
class Ceiling:
    """What the best possible classifier reached on the test texts of one comparison."""

    accuracy: float
    ci95: tuple[float, float]  # percentile interval, documents resampled
    pooled: list[Pooled]
    scores_N: NDArray[np.float64] = field(repr=False)  # of each test text


@dataclass(frozen=True, eq=False)
class Verdict:
    """A result, the test texts that it is made from, and the classifier from texts to numbers of classes."""

    result: Result
    correct_N: NDArray[np.bool_]
    labels_N: NDArray[np.integer]
    prompts_N: NDArray[np.str_]
    documents_N: NDArray[np.str_]
    classifier: Any


def task(comparison: Comparison, settings: config.Attribution, fraction: float = 1.0) -> Task:
    """What each text of a comparison is for.

    Args:
      fraction: of the training and validation documents that are used; the test texts are the same whatever it is.

    Raises:
      UserError: a part has too few documents.
    """
    labels_N = np.unique(np.asarray(comparison.labels), return_inverse=True)[1]
    parts_N = comparison.parts(settings)
    test_N = parts_N == "test"
    known_N = ~test_N & stats.thinned(comparison.documents, settings.split_seed, fraction)
    training_N, validation_N = ((parts_N == part) & known_N for part in ("training", "validation"))
    named = np.asarray(comparison.documents)
    if min(len(np.unique(named[part_N])) for part_N in (training_N, validation_N)) < LEAST_DOCUMENTS:
        raise UserError(
            f"comparison {comparison.name}: of {fraction:g} of the documents to learn from too few are left, each part needs "
            f"{LEAST_DOCUMENTS}; raise sampling.prompts, or the least of attribution.learning_curve {settings.learning_curve}"
        )
    tried_N = tried(comparison.documents, settings, known_N, fraction)
    return Task(f"comparison {comparison.name}", comparison.rows, labels_N, training_N, validation_N, test_N, tried_N)


def attribute(
    rung: Rung,
    comparison: Comparison,
    settings: config.Attribution,
    bound: Ceiling | None = None,
    fraction: float = 1.0,
) -> Verdict:
    """Chooses and fits a classifier on training and validation texts, and judges it on the test texts.

    The p-value and the intervals cover the choice of test texts, not the training of the classifier or of the models.

    Args:
      bound: the ceiling of the same comparison and settings.
      fraction: of the training and validation documents that are used; the test texts are the same whatever it is.

    Raises:
      UserError: a part has too few documents, or the texts to train on are all empty.
    """
    asked = task(comparison, settings, fraction)
    judged, test_N = rung.judge(asked, settings), asked.test_N

    probabilities_NK, labels_N = judged.probabilities_NK, asked.labels_N[test_N]
    predicted_N = probabilities_NK.argmax(axis=1)
    prompts_N, documents_N = np.asarray(comparison.prompts)[test_N], np.asarray(comparison.documents)[test_N]
    correct_N = predicted_N == labels_N
    # The statistics sort by them many times, and a million names take seconds each time.
    prompt_N, document_N = (np.unique(names_N, return_inverse=True)[1] for names_N in (prompts_N, documents_N))

    def random(purpose: str) -> np.random.Generator:
        return rng.generator(settings.split_seed, "attribution", comparison.name, rung.kind, purpose)

    classes, chance = comparison.classes, 1 / len(comparison.classes)
    permuted = stats.whole_permutation_p if comparison.whole else stats.permutation_p
    share = None
    if bound is not None:
        share = stats.share_interval(correct_N, bound.scores_N, chance, document_N, random("share"), settings.bootstraps)
    log_NK = np.log(np.maximum(probabilities_NK, np.finfo(np.float64).tiny))

    def hits(sums_GK: NDArray[np.float64], labels_G: NDArray[np.integer]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = sums_GK.argmax(axis=1) == labels_G
        return found

    result = Result(
        classifier=rung.kind,
        classes=classes,
        accuracy=float(correct_N.mean()),
        chance=chance,
        ci95=stats.bootstrap_interval(correct_N, document_N, random("bootstrap"), settings.bootstraps),
        p_value=permuted(predicted_N, labels_N, prompt_N, random("permutation"), settings.permutations),
        sign_p=stats.sign_p(correct_N, labels_N, prompt_N),
        auc=stats.pairwise_auc(probabilities_NK, labels_N),
        auc_ci95=stats.auc_interval(probabilities_NK, labels_N, document_N, random("auc"), settings.bootstraps),
        bits_per_text=stats.bits_per_text(probabilities_NK, labels_N),
        validation_bits=judged.validation_bits,
        share=float((correct_N.mean() - chance) / (bound.accuracy - chance))
        if bound is not None and share is not None
        else None,
        share_ci95=share,
        pooled=_pooled(log_NK, labels_N, test_N, comparison, settings, hits, random),
        training_texts=int((asked.training_N | asked.validation_N).sum()),
        test_texts=len(labels_N),
        test_prompts=int(prompt_N.max()) + 1,
        chosen=judged.chosen,
        confusion=confusion_matrix(labels_N, predicted_N, labels=range(len(classes))).tolist(),
        telling=dict(zip(classes, judged.telling, strict=True)) if judged.telling else {},
    )
    return Verdict(result, correct_N, labels_N, prompts_N, documents_N, judged.classifier)


def _pooled(
    log_NK: NDArray[np.float64],
    labels_N: NDArray[Any],
    test_N: NDArray[np.bool_],
    comparison: Comparison,
    settings: config.Attribution,
    score: Callable[[NDArray[np.float64], NDArray[Any]], NDArray[Any]],
    random: Callable[[str], np.random.Generator],
) -> list[Pooled]:
    """Decisions on 4, 16, ... test texts of one source, as long as there are enough of them.

    Args:
      log_NK: log-probabilities of each test text that add up.
      score: from those of each decision, and its label, to its score.
    """
    named = comparison.prompts, comparison.documents, comparison.labels if comparison.sources is None else comparison.sources
    # Numbers in the order of the names: they are sorted by for every size.
    prompts_N, documents_N, sources_N = (np.unique(np.asarray(names)[test_N], return_inverse=True)[1] for names in named)
    found, size, prompts = [], 4, int(prompts_N.max()) + 1
    while prompts // size >= LEAST_GROUPS:
        # Whatever is judged, a classifier or the ceiling, has the same groups.
        groups = rng.generator(settings.split_seed, "attribution", comparison.name, "groups", size)
        grouped_N = stats.grouped(prompts_N, documents_N, size, groups)
        sums_GK, labels_G, groups_G = stats.summed(log_NK, labels_N, sources_N, grouped_N)
        score_G = score(sums_GK, labels_G)
        ci95 = stats.bootstrap_interval(score_G, groups_G, random(f"pooled {size}"), settings.bootstraps)
        each = int(np.count_nonzero(grouped_N >= 0)) // len(score_G)  # a source may have several texts at a prompt
        found.append(Pooled(each, len(score_G), float(score_G.mean()), ci95))
        size *= 4
    return found


def ceiling_scores(log_likelihood_NA: ArrayLike, labels_N: ArrayLike, pools_A: ArrayLike) -> NDArray[np.float64]:
    """The score, from 0 to 1, of the Bayes-optimal attribution of each text under equal priors.

    A class that pools arms has their mixture with equal weights. A text scores 1 if its class alone is the likeliest, 1/k if
    it is one of k that tie exactly (all minus infinity is such a tie), else 0.

    Args:
      log_likelihood_NA: the log-probability of each text under each arm; may be minus infinity.
      labels_N: the class of each text.
      pools_A: the class of each arm.

    Raises:
      ValueError: a log-likelihood is NaN or plus infinity, or the classes of texts and of arms differ.
    """
    likelihood_NA, labels, pools = np.asarray(log_likelihood_NA, dtype=np.float64), np.asarray(labels_N), np.asarray(pools_A)
    if np.isnan(likelihood_NA).any() or np.isposinf(likelihood_NA).any():
        raise ValueError("a log-likelihood is NaN or plus infinity")
    classes = np.unique(pools)
    if not np.isin(labels, classes).all():
        raise ValueError(f"got texts of {np.unique(labels).tolist()}, expected the classes of the arms {classes.tolist()}")
    mixture_NK = np.empty((len(labels), len(classes)))
    for k, name in enumerate(classes):
        # Sorted, since a sum in another order may differ in its last bit and break an exact tie.
        arms_NA = np.sort(likelihood_NA[:, pools == name], axis=1)
        mixture_NK[:, k] = logsumexp(arms_NA, axis=1) - np.log(arms_NA.shape[1])
    best_NK = mixture_NK == mixture_NK.max(axis=1, keepdims=True)
    own_N = best_NK[np.arange(len(labels)), np.searchsorted(classes, labels)]
    score_N: NDArray[np.float64] = own_N / best_NK.sum(axis=1)
    return score_N


def ceiling(
    log_likelihood_NA: NDArray[np.floating], pools_A: Sequence[str], comparison: Comparison, settings: config.Attribution
) -> Ceiling:
    """The likelihood ceiling on the same test texts that the classifiers are judged on.

    Args:
      log_likelihood_NA: the log-probability of each text of the comparison under each of its arms. Rows outside the test
        part are not looked at and may hold anything. Two draws of one arm must have equal columns, so that a null ties.
      pools_A: the class of each arm.
      comparison: the texts.
      settings: the same as for `attribute`.

    Raises:
      UserError: a part has too few documents.
    """
    test_N = comparison.parts(settings) == "test"
    labels_N, documents_N = np.asarray(comparison.labels)[test_N], np.asarray(comparison.documents)[test_N]
    likelihood_NA = np.asarray(log_likelihood_NA[test_N], dtype=np.float64)
    score_N = ceiling_scores(likelihood_NA, labels_N, pools_A)

    def random(purpose: str) -> np.random.Generator:
        return rng.generator(settings.split_seed, "attribution", comparison.name, "ceiling", purpose)

    def score(sums_GA: NDArray[np.float64], labels_G: NDArray[Any]) -> NDArray[np.float64]:
        return ceiling_scores(sums_GA, labels_G, pools_A)

    ci95 = stats.bootstrap_interval(score_N, documents_N, random("bootstrap"), settings.bootstraps)
    pooled = _pooled(likelihood_NA, labels_N, test_N, comparison, settings, score, random)
    return Ceiling(float(score_N.mean()), ci95, pooled, score_N)
