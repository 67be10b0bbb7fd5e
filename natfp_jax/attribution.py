"""One comparison: can held-out texts be given to their sources, and how well could anyone do it?

Owns the verdict on given texts: the split, the fit, the scores, and the likelihood ceiling beside them. Must not know how
texts were drawn, what the sources are, or which other comparisons a study has; no result depends on those.

Letters after an underscore name the axes: N texts, A arms, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from sklearn.metrics import confusion_matrix
from sklearn.metrics.cluster import contingency_matrix

from natfp_jax import classify, config, rng, stats
from natfp_jax.classify import Features
from natfp_jax.errors import UserError

__all__ = ["Ceiling", "Comparison", "Result", "attribute", "ceiling", "ceiling_scores", "parts"]

TELLING = 20  # pieces listed for each class
LEAST_DOCUMENTS = 2  # of each part: an interval over one document has no width


@dataclass(frozen=True, eq=False)
class Comparison:
    """The texts of one comparison, row by row.

    Attributes:
      name: what the comparison is called; with the split seed it decides the random streams of its p-value and intervals.
      rows: the row of each text in the study's features.
      labels: the class of each text. A class may pool several arms.
      prompts: the prompt of each text.
      documents: the document that the prompt of each text comes from.

    Raises:
      ValueError: lengths differ, there are fewer than two classes, a prompt is of two documents, or the classes do not have
        equally many texts at each prompt (chance would not be 1/K).
    """

    name: str
    rows: NDArray[np.integer]
    labels: Sequence[str]
    prompts: Sequence[str]
    documents: Sequence[str]

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
    named = np.asarray(documents)
    sizes = {part: len(np.unique(named[parts_N == part])) for part in stats.PARTS}
    if min(sizes.values()) < LEAST_DOCUMENTS:
        got = ", ".join(f"{size} for {part}" for part, size in sizes.items())
        raise UserError(
            f"{of}: the split leaves {got} of {sum(sizes.values())} prompt documents, each part needs "
            f"{LEAST_DOCUMENTS}; raise sampling.prompts, or change attribution.test_fraction {settings.test_fraction} "
            f"or attribution.validation_fraction {settings.validation_fraction}"
        )
    return parts_N


@dataclass(frozen=True)
class Result:
    """What one classifier reached on the test texts of one comparison.

    Attributes:
      classifier: which, "subwords" or "words".
      classes: the sources, sorted.
      accuracy: the fraction of the test texts that got their own class.
      chance: 1 / number of classes.
      ci95: percentile interval of the accuracy, documents resampled.
      p_value: of the accuracy, labels permuted within prompts; not corrected for other comparisons.
      auc: mean over pairs of classes.
      bits_per_text: log2 of the number of classes less the log-loss in bits; may be negative.
      test_texts: how many texts the numbers above are of.
      test_prompts: how many prompts these texts continue.
      c: the inverse penalty that the validation part chose.
      confusion: test texts; rows are true classes, columns the classes given.
      telling: the pieces that speak most for each class, strongest first.
    """

    classifier: str
    classes: tuple[str, ...]
    accuracy: float
    chance: float
    ci95: tuple[float, float]
    p_value: float
    auc: float
    bits_per_text: float
    test_texts: int
    test_prompts: int
    c: float
    confusion: list[list[int]]
    telling: dict[str, list[str]]


@dataclass(frozen=True)
class Ceiling:
    """What the best possible classifier reached on the test texts of one comparison."""

    accuracy: float
    ci95: tuple[float, float]  # percentile interval, documents resampled


def attribute(features: Features, comparison: Comparison, settings: config.Attribution) -> Result:
    """Chooses and fits a classifier on training and validation texts, and judges it on the test texts.

    The p-value and the interval cover the choice of test texts, not the training of the classifier or of the models.

    Raises:
      UserError: a part has too few documents, or the texts to train on are all empty.
    """
    labels_N = np.unique(np.asarray(comparison.labels), return_inverse=True)[1]
    parts_N = comparison.parts(settings)
    training_N, validation_N, test_N = (parts_N == part for part in stats.PARTS)

    counts_NV = features.counts_NV[comparison.rows]
    # Only the pieces of the rows that are fitted on: the others are weightless, but would make the last bits depend on
    # what else the study has.
    used_V = np.flatnonzero(counts_NV[~test_N].sum(axis=0))
    if not len(used_V):
        raise UserError(f"comparison {comparison.name}: no training text has {features.kind}; look at the samples")
    counts_NV, names_V = counts_NV[:, used_V], features.names_V[used_V]
    fitted = classify.choose(counts_NV, labels_N, training_N, validation_N, settings.regularisation)

    probabilities_NK = fitted.predict_proba(counts_NV[test_N])
    predicted_N = probabilities_NK.argmax(axis=1)
    labels_N = labels_N[test_N]
    prompts_N, documents_N = np.asarray(comparison.prompts)[test_N], np.asarray(comparison.documents)[test_N]
    correct_N = predicted_N == labels_N

    def random(purpose: str) -> np.random.Generator:
        return rng.generator(settings.split_seed, "attribution", comparison.name, features.kind, purpose)

    classes = comparison.classes
    telling = classify.telling(fitted, counts_NV[~test_N], names_V, TELLING)
    return Result(
        classifier=features.kind,
        classes=classes,
        accuracy=float(correct_N.mean()),
        chance=1 / len(classes),
        ci95=stats.bootstrap_interval(correct_N, documents_N, random("bootstrap"), settings.bootstraps),
        p_value=stats.permutation_p(predicted_N, labels_N, prompts_N, random("permutation"), settings.permutations),
        auc=stats.pairwise_auc(probabilities_NK, labels_N),
        bits_per_text=stats.bits_per_text(probabilities_NK, labels_N),
        test_texts=len(labels_N),
        test_prompts=len(np.unique(prompts_N)),
        c=float(fitted.C),
        confusion=confusion_matrix(labels_N, predicted_N, labels=range(len(classes))).tolist(),
        telling=dict(zip(classes, telling, strict=True)),
    )


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
    score_N = ceiling_scores(log_likelihood_NA[test_N], np.asarray(comparison.labels)[test_N], pools_A)
    random = rng.generator(settings.split_seed, "attribution", comparison.name, "ceiling", "bootstrap")
    documents_N = np.asarray(comparison.documents)[test_N]
    return Ceiling(float(score_N.mean()), stats.bootstrap_interval(score_N, documents_N, random, settings.bootstraps))
