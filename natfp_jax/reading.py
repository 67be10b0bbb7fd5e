"""What classifiers that read a text token by token have in common.

Owns the face of such an estimator, how texts become rows of ids, which rows a batch has, when training ends, and how scores
become probabilities. Must not know what a network computes of a row, models of a study, draws or prompts.

A row is EOS, the ids of the text encoded again, EOS: how long a text is belongs to it. A row is cut behind `tokens` ids that
follow the first EOS.

The rows are put in the order of their texts before anything is drawn, so a fit does not depend on the order in which they are
given: on one machine it has the same bits.

Letters after an underscore name the axes: N texts, K classes, B rows of a batch, T ids of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
import optax
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from natfp_jax import optim, params, rng, stats
from natfp_jax.calibration import best_scale, log_loss
from natfp_jax.config import Optimiser
from natfp_jax.errors import UserError
from natfp_jax.optim import Hyperparameters
from natfp_jax.params import Params, Spec

__all__ = [
    "Network",
    "Parted",
    "Rows",
    "TextReader",
    "Tokenizer",
    "early_stopped",
    "parted",
    "scores",
    "trained",
]

HELD = 0.15  # of the texts, for validation where none are given
_EIGHT = 8  # row lengths are multiples of it, so that blocks of a batch's logits come out even


class Tokenizer(Protocol):
    """What is needed of the study's tokenizer."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document; no text has it."""
        ...

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def padded_size(self) -> int:
        """The size of the embedding."""
        ...

    def encode_batch(self, texts: list[str], /) -> Sequence[Sequence[int]]:
        """The ids of each text."""
        ...


# --- rows -------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Texts as ids: `ids_NT` with zeros behind the first `length_N` of a row, int32. A length of 0 is no row at all."""

    ids_NT: Any
    length_N: Any

    def take(self, index: NDArray[np.integer], count: int) -> "Rows":
        """Some rows, filled up to `count` with such as are none."""
        return Rows(*(np.pad(a[index], [(0, count - len(index)), *[(0, 0)] * (a.ndim - 1)]) for a in self))


def _ragged(texts: Sequence[str], tokenizer: Tokenizer, tokens: int) -> list[list[int]]:
    eos = tokenizer.eos_id
    return [[eos, *ids[:tokens], eos][: tokens + 1] for ids in tokenizer.encode_batch(list(texts))]


def _pairs(texts: Sequence[str], labels: Sequence[Any]) -> tuple[list[str], NDArray[Any]]:
    if len(texts) != len(labels):
        raise UserError(f"{len(texts)} texts have {len(labels)} labels, expected one each; give a label for every text")
    return list(texts), np.asarray(list(labels))


def _rows(ragged: Sequence[Sequence[int]], tokens: int) -> Rows:
    ids_NT, length_N = np.zeros((len(ragged), tokens + 1), np.int32), np.zeros(len(ragged), np.int32)
    for n, row in enumerate(ragged):
        length_N[n] = min(len(row), tokens + 1)
        ids_NT[n, : length_N[n]] = row[: tokens + 1]
    return Rows(ids_NT, length_N)


class Parted(NamedTuple):
    """The texts of a fit, each part in the order of its texts, and the numbers of their classes."""

    classes: NDArray[Any]
    training: tuple[list[str], NDArray[np.integer]]
    validation: tuple[list[str], NDArray[np.integer]]


def parted(
    texts: Sequence[str], labels: Sequence[Any], validation: tuple[Sequence[str], Sequence[Any]] | None, seed: int
) -> Parted:
    """What a fit trains on and validates with.

    Args:
      texts: to train on.
      labels: the class of each.
      validation: texts and labels; None: about a seventh of `texts`, by a hash of the text and the seed.
      seed: of that hash.

    Raises:
      UserError: there are fewer than two classes, no texts to train on or to validate with, or validation texts of other
        classes.
    """
    texts, named = _pairs(texts, labels)
    if validation is None:
        held_N = stats.split(texts, seed, HELD, 0.0) == "validation"
        others, other_named = [texts[n] for n in np.flatnonzero(held_N)], named[held_N]
        texts, named = [texts[n] for n in np.flatnonzero(~held_N)], named[~held_N]
    else:
        others, other_named = _pairs(*validation)
    classes, label_N = np.unique(named, return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"a classifier needs texts of two classes to train on, got {len(texts)} of {classes.tolist()}; give more texts"
        )
    if not len(others) or not np.isin(other_named, classes).all():
        raise UserError(
            f"got {len(others)} validation texts of {np.unique(other_named).tolist()}, expected some, of the classes "
            f"to train on {classes.tolist()}; give more texts"
        )
    held_label_N = np.searchsorted(classes, other_named)
    return Parted(classes, _ordered(texts, label_N), _ordered(others, held_label_N))


def _ordered(texts: list[str], label_N: NDArray[np.integer]) -> tuple[list[str], NDArray[np.integer]]:
    order = sorted(range(len(texts)), key=lambda n: (texts[n], label_N[n]))
    return [texts[n] for n in order], label_N[order]


# --- training ---------------------------------------------------------------------------------------------------------


class Network(Protocol):
    """What is trained: a hashable value, since a step is compiled once for each."""

    @property
    def specs(self) -> dict[str, Spec]:
        """The table of its parameters."""
        ...

    def loss(self, tree: Params, rows: Rows, label_B: jax.Array, noise: jax.Array) -> jax.Array:
        """The mean loss of a batch."""
        ...

    def score(self, tree: Params, rows: Rows) -> jax.Array:
        """What each row is judged by, the row's axis first."""
        ...


class _State(NamedTuple):
    """All that training carries from step to step."""

    params: Params
    optimiser: optax.OptState
    step: Any


def _optimiser(network: Network, numbers: Hyperparameters) -> optax.GradientTransformation:
    # Constant, since it is not known when it ends: what a falling rate would gain, the best epoch has for less.
    return optim.optimiser(numbers, "adamw", optim.schedule(numbers, "constant", 1), network.specs)


@partial(jax.jit, static_argnames="network")
def _step(
    state: _State, numbers: Hyperparameters, rows: Rows, label_B: jax.Array, noise: jax.Array, *, network: Network
) -> _State:
    gradient = jax.grad(network.loss)(state.params, rows, label_B, jax.random.fold_in(noise, state.step))
    updates, optimiser = _optimiser(network, numbers).update(gradient, state.optimiser, state.params)
    return _State(optax.apply_updates(state.params, updates), optimiser, state.step + 1)


def trained(
    network: Network,
    tree: Params | None,
    settings: Optimiser,
    rows: Rows,
    label_N: NDArray[np.integer],
    batch: int,
    epochs: int,
    seed: int,
    phase: str,
) -> Iterator[Params]:
    """The parameters after each epoch, in which every row comes once, in an order of its own.

    Args:
      tree: where to start; None: weights drawn from the classifier's own stream.
      settings: of the optimiser; the learning rate stays constant after a warm-up over half an epoch.
      rows: what to train on.
      label_N: the class of each row.
      batch: rows a step, at most: batches of an epoch differ by one row in size, and by none in shape.
      epochs: at most.
      seed: of the weights, the orders and the network's noise.
      phase: names the streams of orders and noise; trainings of one name are fed alike.
    """
    if tree is None:
        # A number from the stream, and not the seed itself, which would give the weights of an arm with an equal init seed.
        tree = params.init(network.specs, int(rng.generator(seed, "classifier", "init").integers(2**32)))
    steps = -(-len(label_N) // batch)
    numbers = optim.hyperparameters(replace(settings, warmup=0.5), steps)
    state, noise = _State(tree, _optimiser(network, numbers).init(tree), np.int32(0)), rng.stream(seed, "classifier", phase)
    for number in range(epochs):
        order = rng.generator(seed, "classifier", phase, number).permutation(len(label_N))
        for index in np.array_split(order, steps):
            labels = np.pad(label_N[index], (0, batch - len(index)))
            state = _step(state, numbers, rows.take(index, batch), labels, noise, network=network)
        yield state.params


def early_stopped(
    trees: Iterator[Params], judge: Callable[[Params], float], patience: int, rate: str, judged: str = "epoch"
) -> tuple[Params, list[float]]:
    """The parameters of the least loss, and the losses, until so many epochs on end have brought nothing better.

    Args:
      trees: the parameters after each epoch, or whatever is judged.
      judge: their loss.
      patience: how many epochs on end may bring nothing better.
      rate: the learning rate, as a message names it.
      judged: what comes before each of `trees`, as a message names it.

    Raises:
      UserError: a loss is not finite.
    """
    best, losses = Params(), list[float]()
    for tree in trees:
        losses.append(judge(tree))
        if not np.isfinite(losses[-1]):
            raise UserError(
                f"the classifier's validation loss is {losses[-1]} after {judged} {len(losses)}, expected a finite number; "
                f"lower its {rate}"
            )
        if min(losses) < min(losses[:-1], default=np.inf):
            best = tree
        elif len(losses) - 1 - int(np.argmin(losses)) >= patience:
            break
    return best, losses


@partial(jax.jit, static_argnames="network")
def _score(tree: Params, rows: Rows, *, network: Network) -> jax.Array:
    return network.score(tree, rows)


def scores(network: Network, tree: Params, rows: Rows, batch: int) -> NDArray[np.float64]:
    """`network.score` of every row, in batches of one shape, so that a row's score does not depend on how many there are."""
    parts = [np.arange(first, min(first + batch, len(rows.length_N))) for first in range(0, len(rows.length_N), batch)]
    found = [np.asarray(_score(tree, rows.take(part, batch), network=network))[: len(part)] for part in parts]
    return np.concatenate(found).astype(np.float64)


# --- the estimator ----------------------------------------------------------------------------------------------------


class TextReader(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """The face that the neural classifiers share; they differ in what they learn and how a row is scored.

    Attributes:
      classes_: the labels, sorted.
      tokens_: how many ids of a text are read: `tokens`, or less where all training texts are shorter.
      scale_: the factor of the scores that suits the validation texts best.
      losses_: the log-loss on the validation texts after each epoch, each at its own best scale, in nats.
      epoch_: the place in `losses_` of the weights that are kept.
      params_: the weights.
    """

    tokenizer: Tokenizer
    tokens: int
    batch: int
    epochs: int
    patience: int
    learning_rate: float
    seed: int

    @abstractmethod
    def _learn(self, rows: Rows, label_N: NDArray[np.integer], judge: Callable[[Params], float]) -> tuple[Params, list[float]]:
        """Returns the weights of the least loss, and the losses; `judge` is what their scores of the validation rows lose."""

    @abstractmethod
    def _scores(self, tree: Params, rows: Rows) -> NDArray[np.float64]:
        """`score_NK`, whose differences speak for a class."""

    @abstractmethod
    def _specs(self) -> dict[str, Spec]:
        """The table of the weights, once the classes are known."""

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags

    def fit(
        self, texts: Sequence[str], labels: Sequence[Any], validation: tuple[Sequence[str], Sequence[Any]] | None = None
    ) -> Self:
        """Learns to tell the classes apart.

        Args:
          texts: to train on.
          labels: the class of each.
          validation: texts and labels by which the epoch and the scale are chosen, and nothing else; None: about a seventh
            of `texts`, by a hash of the text and the seed.

        Raises:
          UserError: there are fewer than two classes, no texts to train on or to validate with, or validation texts of
            other classes.
        """
        self.classes_, (known, label_N), (others, held_label_N) = parted(texts, labels, validation, self.seed)
        ragged = _ragged(known, self.tokenizer, self.tokens)
        self.tokens_ = min(self.tokens, -(-(max(map(len, ragged)) - 1) // _EIGHT) * _EIGHT)
        held = _rows(_ragged(others, self.tokenizer, self.tokens_), self.tokens_)

        def judge(tree: Params) -> float:
            score_NK = self._scores(tree, held)
            if not np.isfinite(score_NK).all():
                return float("nan")
            return log_loss(best_scale(score_NK, held_label_N) * score_NK, held_label_N)

        self.params_, self.losses_ = self._learn(_rows(ragged, self.tokens_), label_N, judge)
        self.epoch_ = int(np.argmin(self.losses_))
        self.scale_ = best_scale(self._scores(self.params_, held), held_label_N)
        return self

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The probability of each class, a row a text, in the order of `classes_`."""
        check_is_fitted(self, "scale_")
        if not len(texts):
            return np.empty((0, len(self.classes_)))
        rows = _rows(_ragged(texts, self.tokenizer, self.tokens_), self.tokens_)
        return softmax(self.scale_ * self._scores(self.params_, rows), axis=1)

    def predict(self, texts: Sequence[str]) -> NDArray[Any]:
        """The most probable class of each text."""
        probability_NK = self.predict_proba(texts)
        return self.classes_[probability_NK.argmax(axis=1)]

    def state(self) -> dict[str, NDArray[Any]]:
        """What a fitted classifier predicts by, as plain arrays; the inverse is `from_state`."""
        check_is_fitted(self, "scale_")
        weights = {f"params/{path}": np.asarray(leaf) for path, leaf in params.flatten(self.params_).items()}
        numbers = {"scale": np.float64(self.scale_), "tokens": np.int64(self.tokens_)}
        return {"classes": self.classes_, **{name: np.asarray(value) for name, value in numbers.items()}, **weights}

    @classmethod
    def from_state(cls, state: dict[str, NDArray[Any]], **settings: Any) -> Self:
        """A fitted classifier from its `state` and what its constructor was given, the tokenizer among it.

        Raises:
          ValueError: the weights are not those of such a classifier.
        """
        found = cls(**settings)
        found.classes_, found.scale_, found.tokens_ = state["classes"], float(state["scale"]), int(state["tokens"])
        own = {path.removeprefix("params/"): leaf for path, leaf in state.items() if path.startswith("params/")}
        got, expected = ({path: leaf.shape for path, leaf in some.items()} for some in (own, found._specs()))
        if got != expected:
            path = min(path for path in {*got, *expected} if got.get(path) != expected.get(path))
            raise ValueError(f"the weight {path} is {got.get(path)}, expected {expected.get(path)}")
        found.params_ = params.nest(own)
        return found
