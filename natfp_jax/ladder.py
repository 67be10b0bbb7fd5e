"""The ladder of classifiers: from pieces that are counted to texts that are read.

Owns what each rung prepares of a study's texts once, and how it is chosen, fitted and asked for one comparison. Must not know
prompts, documents, p-values, or what the classes are.

Letters after an underscore name the axes: N texts, K classes, V pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from natfp_jax import classify, config, reading
from natfp_jax.classify import Features
from natfp_jax.encoder import Encoder
from natfp_jax.errors import UserError
from natfp_jax.language_models import LanguageModels
from natfp_jax.reader import Reader

__all__ = ["NETWORKS", "Counted", "Judged", "Read", "Rung", "Task", "prepare"]

TELLING = 20  # pieces listed for each class
NETWORKS = ("lm", "transformer", "encoder")  # what is trained anew for each comparison


class Tokenizer(classify.Tokenizer, reading.Tokenizer, Protocol):
    """What the rungs need of the study's tokenizer."""


@dataclass(frozen=True, eq=False)
class Task:
    """The texts of one comparison, and what each is for. A text that is for nothing is not looked at.

    Attributes:
      name: what messages call it.
      rows: the row of each text among those that the rung was prepared with.
      labels_N: the class of each as a number from 0.
      training_N, validation_N, test_N: masks.
      tried_N: the mask of the texts with which settings are chosen: all, or enough of very many.
    """

    name: str
    rows: NDArray[np.integer]
    labels_N: NDArray[np.integer]
    training_N: NDArray[np.bool_]
    validation_N: NDArray[np.bool_]
    test_N: NDArray[np.bool_]
    tried_N: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Judged:
    """What a fitted rung says of the test texts.

    Attributes:
      probabilities_NK: of each class.
      chosen: what the validation part chose; of a network, after how many looks at it training ended best.
      telling: the pieces that speak most for each class, strongest first; empty where a rung has no such pieces.
      classifier: what was fitted, from texts to classes, with the same probabilities.
      validation_bits: bits per text on the validation texts of the classifier fitted on the training texts alone (log2 of
        the number of classes less the log-loss in bits; `stats.bits_per_text`), whose probabilities are at the scale that
        suits these texts best. No test text is in it, so classifiers may be chosen by it. All are a little flattered by that
        scale, and by what else was chosen there: a penalty, or a network's epoch.
    """

    probabilities_NK: NDArray[np.float64]
    chosen: dict[str, float]
    telling: list[list[str]]
    classifier: Any
    validation_bits: float


class Rung(Protocol):
    """One classifier, ready for every comparison of the texts that it was prepared with."""

    @property
    def kind(self) -> str:
        """What it is called."""
        ...

    def judge(self, task: Task, settings: config.Attribution) -> Judged:
        """Chosen on the validation texts, fitted on these and the training texts, asked for the test texts.

        Raises:
          UserError: there is nothing to be fitted on.
        """
        ...


@dataclass(frozen=True, eq=False)
class Counted:
    """Counts of pieces under a logistic regression."""

    features: Features

    @property
    def kind(self) -> str:
        """What it is called."""
        return self.features.kind

    def judge(self, task: Task, settings: config.Attribution) -> Judged:
        """As `Rung.judge`."""
        known_N = task.training_N | task.validation_N
        # One part at a time: of a million texts each takes about a gigabyte.
        counts_NV = self.features.counts_NV[task.rows[known_N]]
        used_V = np.flatnonzero(counts_NV.sum(axis=0))
        if not len(used_V):
            raise UserError(f"{task.name}: no training text has {self.kind}; look at the samples")
        if self.kind == "ngrams":  # hashed columns are the same whatever else the study has, and most are dropped anyway
            used_V = np.arange(counts_NV.shape[1])
        elif len(used_V) < counts_NV.shape[1]:
            # Only the pieces of the rows that are fitted on: the others are weightless, but would make the last bits depend
            # on what else the study has.
            counts_NV = counts_NV[:, used_V]
        among = classify.candidates(self.features.kind, settings.regularisation)
        masks = (mask_N[known_N] for mask_N in (task.training_N, task.validation_N, task.tried_N))
        fitted, loss = classify.choose(among, counts_NV, task.labels_N[known_N], *masks)
        telling = classify.telling(fitted, counts_NV, TELLING)
        return Judged(
            fitted.predict_proba(self.features.counts_NV[task.rows[task.test_N]][:, used_V]),
            classify.chosen(fitted),
            [self.features.names(used_V[columns]) for columns in telling],
            self.features.whole(fitted, used_V),
            _bits(loss, len(fitted.classes_)),
        )


@dataclass(frozen=True, eq=False)
class Read:
    """A network that reads the texts token by token, trained anew for each comparison."""

    kind: str
    texts: Sequence[str]
    tokenizer: Tokenizer

    def judge(self, task: Task, settings: config.Attribution) -> Judged:
        """As `Rung.judge`; the weights are fitted on the training texts alone, the validation texts say when to stop."""

        def part(mask_N: NDArray[np.bool_]) -> tuple[list[str], list[int]]:
            return [self.texts[row] for row in task.rows[mask_N]], task.labels_N[mask_N].tolist()

        network = self._unfitted(settings).fit(*part(task.training_N), validation=part(task.validation_N))
        looks, bits = int(np.argmin(network.losses_)) + 1, _bits(min(network.losses_), len(network.classes_))
        return Judged(network.predict_proba(part(task.test_N)[0]), {"looks": looks}, [], network, bits)

    def _unfitted(self, settings: config.Attribution) -> LanguageModels | Reader | Encoder:
        if self.kind == "encoder":
            if settings.encoder is None:
                raise UserError(
                    "the classifier encoder has no weights: give its folder, as attribution.encoder or, with --texts, --encoder"
                )
            return Encoder(settings.encoder, seed=settings.split_seed)
        return {"lm": LanguageModels, "transformer": Reader}[self.kind](self.tokenizer, seed=settings.split_seed)


def _bits(loss: float, classes: int) -> float:
    """What a text tells of its class, by a log-loss in nats."""
    return float((np.log(classes) - loss) / np.log(2))


def prepare(kind: Any, texts: Sequence[str], tokenizer: Tokenizer) -> Rung:
    """A rung for all comparisons of these texts.

    Args:
      kind: one of `config.Attribution.classifiers`.
      texts: of all comparisons.
      tokenizer: what makes subwords of them.

    Raises:
      UserError: pieces are counted, and no text has one.
    """
    if kind in NETWORKS:
        return Read(kind, texts, tokenizer)
    return Counted(classify.featurise(kind, texts, tokenizer))
