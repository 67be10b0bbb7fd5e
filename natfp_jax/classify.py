"""Classifiers of texts by counts, as scikit-learn estimators with text in.

Owns how a text becomes counts, how counts become a class, and how settings are chosen on a validation part. A classifier sees
text alone: subwords are found by encoding the text again. Must not know models, draws, prompts, splits or p-values.

A unigram classifier is a bag of subwords or words under a multinomial logistic regression (`linear`); an n-gram classifier
counts runs of up to three subwords and keeps those that tell most. `pipeline` is either, from texts to classes. A study
counts the pieces of all its texts once (`featurise`), and each comparison fits on rows of that matrix: the same numbers as
the whole pipeline gives, without reading the texts again.

Letters after an underscore name the axes: N texts, V pieces, K classes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from sklearn.feature_selection import SelectKBest, chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline
from sklearn.utils.sparsefuncs import mean_variance_axis
from sklearn.utils.validation import check_is_fitted

from natfp_jax import calibration
from natfp_jax.errors import UserError

__all__ = [
    "Bag",
    "Choice",
    "Features",
    "Subwords",
    "Tokenizer",
    "bag",
    "candidates",
    "choose",
    "chosen",
    "counting",
    "featurise",
    "linear",
    "pipeline",
    "shown",
    "telling",
]

Bag = Literal["subwords", "words", "ngrams"]

WORD = r"\w+|[^\w\s]"  # words and single signs of punctuation, as written: case and marks are part of a fingerprint
LONGEST = 3  # subwords of a run
COLUMNS = 2**20  # that runs are hashed into: of 100,000 texts of 50 subwords a fifth shares its column with another
KEPT = (1_000, 10_000)  # runs to choose from; far fewer lose what many weak ones tell, far more are fitted to noise

_CHUNK = 8192  # texts whose ids are in memory as Python numbers at once


class Tokenizer(Protocol):
    """What is needed of the study's tokenizer."""

    def encode_batch(self, texts: list[str], /) -> Sequence[Sequence[int]]:
        """The ids of each text."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """The text of the ids."""
        ...


# --- from texts to counts ---------------------------------------------------------------------------------------------


class Subwords(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Counts of subwords; a column for each that it is fitted on, in the order of the ids.

    What scikit-learn's `CountVectorizer` does with an analyzer, without a Python object a subword.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def fit(self, texts: Sequence[str], labels: Any = None) -> Self:
        """Learns which subwords there are.

        Raises:
          ValueError: no text has any.
        """
        self.fit_transform(texts)
        return self

    def fit_transform(self, texts: Sequence[str], labels: Any = None, **_: Any) -> sparse.csr_array:
        """`fit` and `transform`, reading the texts once."""
        counts = self._counted(texts)
        used = counts.sum(axis=0) > 0
        self.vocabulary_ = np.flatnonzero(used)
        if not len(self.vocabulary_):
            raise ValueError("empty vocabulary: no text has subwords")
        # Renumbered and not sliced: of a million texts the counts take more than a gigabyte.
        place_V = (np.cumsum(used) - 1).astype(counts.indices.dtype)
        shape = len(texts), len(self.vocabulary_)
        return sparse.csr_array((counts.data, place_V[counts.indices], counts.indptr), shape=shape)

    def transform(self, texts: Sequence[str]) -> sparse.csr_array:
        """The counts [N, V], float64; subwords that it was not fitted on are left out."""
        check_is_fitted(self)
        counts = self._counted(texts)
        counts.resize(len(texts), max(counts.shape[1], self.vocabulary_[-1] + 1))
        return counts[:, self.vocabulary_]

    def get_feature_names_out(self, _: Any = None) -> NDArray[np.object_]:
        """The text of each column."""
        return np.array([shown([id_], self.tokenizer) for id_ in self.vocabulary_.tolist()], dtype=object)

    def _counted(self, texts: Sequence[str]) -> sparse.csr_array:
        """A column an id, for every id up to the largest that occurs."""
        parts = list(self._parts(texts))
        width = max((part.shape[1] for part in parts), default=0)
        for part in parts:
            part.resize(part.shape[0], width)
        return sparse.vstack(parts, format="csr") if parts else sparse.csr_array((0, 0))

    def _parts(self, texts: Sequence[str]) -> Iterator[sparse.csr_array]:
        for first in range(0, len(texts), _CHUNK):
            rows = self.tokenizer.encode_batch(list(texts[first : first + _CHUNK]))
            starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)  # of 64 bits, column numbers would have 64 too
            ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, starts[-1])
            part = sparse.csr_array((np.ones(len(ids)), ids, starts), shape=(len(rows), int(ids.max(initial=-1)) + 1))
            part.sum_duplicates()
            yield part


def _runs(tokenizer: Tokenizer, text: str) -> list[str]:
    """Every run of up to three subwords of a text, as their ids."""
    ids = list(map(str, tokenizer.encode_batch([text])[0]))
    return [" ".join(ids[start : start + length]) for length in range(1, LONGEST + 1) for start in range(len(ids) - length + 1)]


def bag(kind: Bag, tokenizer: Tokenizer) -> Any:
    """A transformer from texts to counts of pieces, float64 [N, V].

    For words and subwords the columns are what it is fitted on; runs are hashed (Weinberger et al. 2009), so that nothing is
    learnt and memory does not grow with their number.
    """
    if kind == "subwords":
        return Subwords(tokenizer)
    if kind == "words":
        return CountVectorizer(token_pattern=WORD, lowercase=False, dtype=np.float64)
    return HashingVectorizer(analyzer=partial(_runs, tokenizer), n_features=COLUMNS, alternate_sign=False, norm=None)


def counting(kind: Bag, tokenizer: Tokenizer, pieces_V: NDArray[Any] | None = None) -> Any:
    """A `bag` that counts known pieces without being fitted.

    Args:
      pieces_V: the ids of subwords in rising order, or the words; of runs none are needed.
    """
    if kind == "subwords":
        counter = Subwords(tokenizer)
        counter.vocabulary_ = np.asarray(pieces_V)
        return counter
    if kind == "words":
        return bag(kind, tokenizer).set_params(vocabulary=list(pieces_V if pieces_V is not None else ()))
    return bag(kind, tokenizer)


def shown(ids: list[int], tokenizer: Tokenizer) -> str:
    """Subwords as a report shows them."""
    text = tokenizer.decode(ids)
    # A part of a character, or a special token, has no text of its own.
    return f"<{' '.join(map(str, ids))}>" if not text or "\N{REPLACEMENT CHARACTER}" in text else text


# --- from counts to classes -------------------------------------------------------------------------------------------


def linear(C: float = 1.0) -> LogisticRegression:
    """Multinomial logistic regression with an L2 penalty, for any number of classes.

    It works on plain counts: the log-odds of two sources of independent pieces are linear in them, so the best classifier
    of such sources is in reach. Newton's method starts at zero and draws nothing, so a fit is deterministic, and a piece
    that no training text has keeps weight zero. It reaches a tolerance at which the order of the columns decides no text;
    at scikit-learn's default solver and tolerance it decides about one in a thousand.
    """
    return LogisticRegression(C=C, solver="newton-cg", tol=1e-6, max_iter=1000)


def candidates(kind: Bag, regularisation: Sequence[float]) -> list[Pipeline]:
    """The classifiers of counts that a validation part chooses among, the plainest first.

    Of runs those are kept whose counts differ most between the classes (chi-squared; Yang & Pedersen 1997).
    """
    kept = KEPT if kind == "ngrams" else (None,)
    return [_classifier(some, C) for some in kept for C in sorted(regularisation)]


def _classifier(kept: int | None, C: float) -> Pipeline:
    steps: list[tuple[str, Any]] = [] if kept is None else [("select", SelectKBest(chi2, k=kept))]
    return Pipeline([*steps, ("linear", linear(C))])


def pipeline(kind: Bag, tokenizer: Tokenizer, C: float = 1.0, kept: int = KEPT[0]) -> Pipeline:
    """The whole classifier, from texts to classes: `fit(texts, labels)`, `predict`, `predict_proba`, `classes_`.

    Args:
      kind: "subwords" and "words" are unigrams, "ngrams" runs of up to three subwords.
      C: the inverse penalty.
      kept: how many runs are selected; of unigrams all are.
    """
    return Pipeline([("counts", bag(kind, tokenizer)), *_classifier(kept if kind == "ngrams" else None, C).steps])


class Choice(NamedTuple):
    """What a validation part chose among classifiers.

    Attributes:
      fitted: the best, on training and validation rows.
      loss: the mean log-loss on the validation rows, in nats, of the same classifier fitted on the training rows alone, at
        the scale of its log-probabilities that suits these rows best: as a network's is, so that the two can be compared.
    """

    fitted: Pipeline
    loss: float


def choose(
    among: Sequence[Pipeline],
    counts_NV: sparse.csr_array,
    labels_N: NDArray[Any],
    training_N: NDArray[np.bool_],
    validation_N: NDArray[np.bool_],
    tried_N: NDArray[np.bool_],
) -> Choice:
    """The classifier that does best on the validation rows, fitted on training and validation rows.

    Best is the smallest log-loss; of equals, the first. Log-loss and not accuracy, because it is a proper score that uses
    every probability: on some hundred validation texts accuracies tie or differ by luck. C is a prior on weights and does
    not scale with the number of texts, so it stands when other rows join those that it was tried on. Rows of neither part
    are never looked at, and columns without a count in these rows are weightless.

    Args:
      among: unfitted; of one alone the loss is all that is asked.
      tried_N: the rows of either part that the trials are made with; all, or enough of very many. The loss is then of one
        more fit, on all training rows: it is compared with those of classifiers that have read them all.
    """

    def tried(
        some: list[Pipeline], training: NDArray[np.bool_], validation: NDArray[np.bool_]
    ) -> Iterator[tuple[float, Callable[[], float]]]:
        """The loss as it is, and what finds it at the best scale; of classifiers that select alike.

        Selecting among a million columns takes longer than fitting what is left.
        """
        selecting, train_NV, held_NV = some[0][:-1], counts_NV[training], counts_NV[validation]
        if len(selecting):
            train_NV = selecting.fit_transform(train_NV, labels_N[training])
            held_NV = selecting.transform(held_NV)
        for one in some:
            fitted = one[-1].fit(train_NV, labels_N[training])
            probability_NK, held_N = fitted.predict_proba(held_NV), labels_N[validation]
            place_N = np.searchsorted(fitted.classes_, held_N)
            loss = float(log_loss(held_N, probability_NK, labels=fitted.classes_))
            yield loss, partial(_scaled_loss, calibration.logs(probability_NK), place_N)

    best, scaled, known_N = among[0], None, training_N | validation_N
    if len(among) > 1:
        alike = itertools.groupby(among, key=lambda one: one["select"].k if "select" in one.named_steps else None)
        parts = training_N & tried_N, validation_N & tried_N
        found = [both for _, some in alike for both in tried(list(some), *parts)]
        place = int(np.argmin([loss for loss, _ in found]))
        best, scaled = among[place], found[place][1]
    if scaled is None or not tried_N[known_N].all():
        ((_, scaled),) = tried([best], training_N, validation_N)
    known_NV = counts_NV if known_N.all() else counts_NV[known_N]  # what can be without a copy is the largest matrix
    return Choice(best.fit(known_NV, labels_N[known_N]), scaled())


def _scaled_loss(log_NK: NDArray[np.float64], place_N: NDArray[np.integer]) -> float:
    return calibration.log_loss(calibration.best_scale(log_NK, place_N) * log_NK, place_N)


def chosen(fitted: Pipeline) -> dict[str, float]:
    """What distinguishes a classifier from the other `candidates`."""
    found = {"C": float(fitted["linear"].C)}
    return {"kept": fitted["select"].k, **found} if "select" in fitted.named_steps else found


# --- the counts of a study --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Features:
    """The counted pieces of a collection of texts.

    Attributes:
      kind: the classifier that they are for.
      counts_NV: how often each text has each piece, float64.
    """

    kind: Bag
    counts_NV: sparse.csr_array
    texts: Sequence[str] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    counter: Any = field(repr=False)  # the fitted `bag`

    def names(self, columns: NDArray[np.integer]) -> list[str]:
        """How a report shows the pieces of some columns.

        Of a hashed column the first run that the texts have of it is shown; the others that share it are rare.
        """
        if self.kind != "ngrams":
            return [str(name) for name in self._names_V[columns]]
        return [self._run(int(column)) for column in columns]

    def whole(self, fitted: Pipeline, used_V: NDArray[np.integer]) -> Pipeline:
        """The classifier from texts to classes, with the probabilities of `fitted`.

        Args:
          fitted: one of `candidates`, fitted on some rows of `counts_NV`.
          used_V: the columns that it was fitted on.
        """
        if self.kind == "subwords":
            counter = counting(self.kind, self.tokenizer, self.counter.vocabulary_[used_V])
        elif self.kind == "words":
            counter = counting(self.kind, self.tokenizer, self._names_V[used_V])
        else:
            counter = counting(self.kind, self.tokenizer)
        return Pipeline([("counts", counter), *fitted.steps])

    @cached_property
    def _names_V(self) -> NDArray[np.object_]:
        names: NDArray[np.object_] = self.counter.get_feature_names_out()
        return names

    def _run(self, column: int) -> str:
        first = self.counts_NV[:, [column]].nonzero()[0][0]
        runs = _runs(self.tokenizer, self.texts[first])
        one = HashingVectorizer(analyzer=list, n_features=COLUMNS, alternate_sign=False, norm=None)
        hashed = one.transform([[run] for run in runs]).indices
        return shown([int(id_) for id_ in runs[int(np.argmax(hashed == column))].split()], self.tokenizer)


def featurise(kind: Bag, texts: Sequence[str], tokenizer: Tokenizer) -> Features:
    """Counts the pieces of all texts of a study, once for all comparisons.

    Columns hold the pieces of all texts, test texts among them. That tells a classifier nothing: a fit uses the columns
    that its own rows have.

    Raises:
      UserError: no text has a piece.
    """
    counter = bag(kind, tokenizer)
    try:
        counts_NV = sparse.csr_array(counter.fit_transform(texts))
        counts_NV.sort_indices()  # as in the rows of new texts: sums have one order, and so the same last bits
        if not counts_NV.nnz:
            raise ValueError("empty vocabulary")
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        raise UserError(
            f"none of {len(texts)} texts has {kind}: every continuation is empty; look at the samples, "
            "and train longer or draw at an earlier checkpoint"
        ) from None
    return Features(kind, counts_NV, texts, tokenizer, counter)


def telling(fitted: Pipeline, counts_NV: sparse.csr_array, count: int) -> list[NDArray[np.intp]]:
    """The columns of the pieces that speak most for each class, strongest first, in the order of `fitted.classes_`.

    A piece is ranked by its weight times the standard deviation of its count: how far it moves the log-odds of a typical
    text (a standardised coefficient). Its bare weight would rank pieces that hardly occur. Only pieces that speak for a class
    are listed, so a list may be shorter than `count`.

    Args:
      fitted: one of `candidates`, fitted.
      counts_NV: the rows that it was fitted on.
      count: how many pieces a class gets at most.
    """
    columns_V = np.arange(counts_NV.shape[1])
    if "select" in fitted.named_steps:
        columns_V = fitted["select"].get_support(indices=True)
        counts_NV = counts_NV[:, columns_V]
    coef_KV = fitted["linear"].coef_
    weights_KV = np.vstack([-coef_KV, coef_KV]) if len(fitted.classes_) == 2 else coef_KV
    _, variance_V = mean_variance_axis(counts_NV, axis=0)
    score_KV = weights_KV * np.sqrt(variance_V)
    best_KV = np.argsort(-score_KV, axis=1, kind="stable")[:, :count]
    return [columns_V[[v for v in best if score[v] > 0]] for best, score in zip(best_KV, score_KV, strict=True)]
