"""Classifiers of texts, as scikit-learn estimators with text in.

Owns how a text becomes counts and how counts become a class. A classifier sees text alone: subwords are found by encoding
the text again. Must not know models, draws, prompts, splits or p-values.

A unigram classifier is a bag of pieces (`bag`) under a multinomial logistic regression (`linear`). A study counts the pieces
of all its texts once (`featurise`), and each comparison fits on rows of that matrix: the same numbers as the whole pipeline
(`unigram`) gives, without reading the texts again.

Letters after an underscore name the axes: N texts, V pieces.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.sparsefuncs import mean_variance_axis

from natfp_jax.errors import UserError

__all__ = ["Features", "Tokenizer", "bag", "choose", "featurise", "linear", "telling", "unigram", "words"]

WORD = re.compile(r"\w+|[^\w\s]")

Pieces = Callable[[list[str]], Sequence[Sequence[Hashable]]]


class Tokenizer(Protocol):
    """What is needed of the study's tokenizer."""

    def encode_batch(self, texts: list[str], /) -> Sequence[Sequence[int]]:
        """The ids of each text."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """The text of the ids."""
        ...


def words(texts: Iterable[str]) -> list[list[str]]:
    """The words and the single signs of punctuation of each text, as written: case and marks are part of a fingerprint."""
    return [WORD.findall(text) for text in texts]


def bag(pieces: Pieces) -> Pipeline:
    """A transformer from texts to counts of pieces; the vocabulary is what it is fitted on.

    Args:
      pieces: splits texts, such as `words` or a tokenizer's `encode_batch`.
    """
    return Pipeline([("pieces", FunctionTransformer(pieces)), ("counts", CountVectorizer(analyzer=list, dtype=np.float64))])


def linear(C: float = 1.0) -> LogisticRegression:
    """Multinomial logistic regression with an L2 penalty, for any number of classes.

    It works on plain counts: the log-odds of two sources of independent pieces are linear in them, so the best classifier
    of such sources is in reach. Newton's method starts at zero and draws nothing, so a fit is deterministic, and a piece
    that no training text has keeps weight zero. It reaches a tolerance at which the order of the columns decides no text;
    at scikit-learn's default solver and tolerance it decides about one in a thousand.
    """
    return LogisticRegression(C=C, solver="newton-cg", tol=1e-6, max_iter=1000)


def unigram(pieces: Pieces, C: float = 1.0) -> Pipeline:
    """The whole classifier, from texts to classes: `fit(texts, labels)`, `predict`, `predict_proba`, `classes_`."""
    return Pipeline([*bag(pieces).steps, ("linear", linear(C))])


@dataclass(frozen=True, eq=False)
class Features:
    """The counted pieces of a collection of texts.

    Attributes:
      kind: the classifier that they are for, "subwords" or "words".
      counts_NV: how often each text has each piece, float64.
      names_V: how a report shows each piece, str.
    """

    kind: str
    counts_NV: sparse.csr_array
    names_V: NDArray[np.object_]


def featurise(kind: Literal["subwords", "words"], texts: Sequence[str], tokenizer: Tokenizer) -> Features:
    """Counts the pieces of all texts of a study, once for all comparisons.

    Columns hold the pieces of all texts, test texts among them, in sorted order. That tells a classifier nothing: a fit uses
    the columns that its own rows have.

    Raises:
      UserError: no text has a piece.
    """
    pieces: Pieces = tokenizer.encode_batch if kind == "subwords" else words
    vectoriser = bag(pieces)
    try:
        counts_NV = sparse.csr_array(vectoriser.fit_transform(list(texts)))
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        raise UserError(
            f"none of {len(texts)} texts has {kind}: every continuation is empty; look at the samples, "
            "and train longer or draw at an earlier checkpoint"
        ) from None
    found = vectoriser["counts"].get_feature_names_out().tolist()
    names = [_shown(piece, tokenizer) for piece in found] if kind == "subwords" else found
    return Features(kind, counts_NV, np.array(names, dtype=object))


def _shown(piece: int, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode([piece])
    # A part of a character, or a special token, has no text of its own.
    return f"<{piece}>" if not text or "\N{REPLACEMENT CHARACTER}" in text else text


def choose(
    counts_NV: sparse.csr_array,
    labels_N: NDArray[Any],
    training_N: NDArray[np.bool_],
    validation_N: NDArray[np.bool_],
    regularisation: Sequence[float],
) -> LogisticRegression:
    """The linear classifier with the C that does best on the validation rows, fitted on training and validation rows.

    Best is the smallest log-loss; of equals, the smallest C. Log-loss and not accuracy, because it is a proper score that
    uses every probability: on some hundred validation texts accuracies tie or differ by luck. C is a prior on weights and
    does not scale with the number of texts, so it stands when the validation rows join the training rows. Other rows are
    never looked at, and columns without a count in these rows are weightless.
    """

    def loss(C: float) -> float:
        fitted = linear(C).fit(counts_NV[training_N], labels_N[training_N])
        return float(log_loss(labels_N[validation_N], fitted.predict_proba(counts_NV[validation_N]), labels=fitted.classes_))

    best = min(sorted(regularisation), key=loss)
    known_N = training_N | validation_N
    return linear(best).fit(counts_NV[known_N], labels_N[known_N])


def telling(
    fitted: LogisticRegression, counts_NV: sparse.csr_array, names_V: NDArray[np.object_], count: int
) -> list[list[str]]:
    """The pieces that speak most for each class, strongest first, in the order of `fitted.classes_`.

    A piece is ranked by its weight times the standard deviation of its count: how far it moves the log-odds of a typical
    text (a standardised coefficient). Its bare weight would rank pieces that hardly occur. Only pieces that speak for a class
    are listed, so a list may be shorter than `count`.

    Args:
      fitted: a fitted linear classifier.
      counts_NV: the rows that it was fitted on.
      names_V: how each piece is shown.
      count: how many pieces a class gets at most.
    """
    weights_KV = np.vstack([-fitted.coef_, fitted.coef_]) if len(fitted.classes_) == 2 else fitted.coef_
    _, variance_V = mean_variance_axis(counts_NV, axis=0)
    score_KV = weights_KV * np.sqrt(variance_V)
    best_KV = np.argsort(-score_KV, axis=1, kind="stable")[:, :count]
    return [[str(names_V[v]) for v in best if score[v] > 0] for best, score in zip(best_KV, score_KV, strict=True)]
