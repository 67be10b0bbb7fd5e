"""A transformer that reads a whole text and names its class.

Owns the network: the decoder's blocks with attention in both directions, the mean of its states, a linear head. Must not know
where texts come from.

Letters after an underscore name the axes: N texts, K classes, B rows of a batch, T ids of a row, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from natfp_jax import params
from natfp_jax.config import Model, Optimiser
from natfp_jax.model import both_ways
from natfp_jax.params import Params, Spec
from natfp_jax.reading import Rows, TextReader, Tokenizer, early_stopped, scores, trained

__all__ = ["Reader"]


@dataclass(frozen=True)
class _Network:
    """The encoder under a linear head."""

    model: Model
    padded: int
    classes: int
    dropout: float

    @property
    def specs(self) -> dict[str, Spec]:
        # The head starts at zero: before training every class is as likely as any.
        head = {
            "class": Spec("DK", (self.model.width, self.classes), 0.0, True),
            "bias": Spec("K", (self.classes,), 0.0, False),
        }
        return {**params.table(self.model, self.padded), **head}

    def loss(self, tree: Params, rows: Rows, label_B: jax.Array, noise: jax.Array) -> jax.Array:
        """The mean cross-entropy, with ids left out at random: a text must be known by more than one of its words."""
        stay_BT = jax.random.bernoulli(noise, 1 - self.dropout, rows.ids_NT.shape)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(self._logits(tree, rows, stay_BT), label_B)
        is_row_B = rows.length_N > 0
        return (loss_B * is_row_B).sum() / is_row_B.sum()

    def score(self, tree: Params, rows: Rows) -> jax.Array:
        """The logits of the classes."""
        return self._logits(tree, rows, True)

    def _logits(self, tree: Params, rows: Rows, stay_BT: jax.Array | bool) -> jax.Array:
        place_T = jnp.arange(rows.ids_NT.shape[1])
        # The first id, EOS, always: nothing is no text, and its mean would be no number.
        there_BT = (place_T < rows.length_N[:, None]) & stay_BT | (place_T == 0)
        x_BTD = both_ways(self.model, tree, rows.ids_NT, there_BT)
        mean_BD = jnp.einsum("btd,bt->bd", x_BTD, there_BT.astype(x_BTD.dtype)) / there_BT.sum(axis=1, keepdims=True)
        return mean_BD @ tree["class"] + tree["bias"]


class Reader(TextReader):
    """A bidirectional transformer, trained from scratch.

    A strong decay, and half of the ids left out at random, are what keeps it from learning some thousand texts by heart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        width: int = 64,
        layers: int = 1,
        heads: int = 4,
        tokens: int = 512,
        batch: int = 32,
        learning_rate: float = 3e-3,
        weight_decay: float = 1.0,
        dropout: float = 0.5,
        epochs: int = 20,
        patience: int = 3,
        seed: int = 0,
    ) -> None:
        """Stores what it is given.

        Args:
          tokenizer: what makes ids of texts.
          width, layers, heads: of the encoder.
          tokens: how many ids of a text are read, at most; memory goes by the longest text where that is shorter.
          batch: texts a step.
          learning_rate: the highest.
          weight_decay: of matrices.
          dropout: the share of a text's ids that a step leaves out.
          epochs: at most.
          patience: epochs on end that may bring nothing better.
          seed: of the first weights, the orders, what is left out, and the part held back for validation where none is given.
        """
        self.tokenizer = tokenizer
        self.width = width
        self.layers = layers
        self.heads = heads
        self.tokens = tokens
        self.batch = batch
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.epochs = epochs
        self.patience = patience
        self.seed = seed

    def _network(self) -> _Network:
        model = Model(width=self.width, layers=self.layers, heads=self.heads)
        return _Network(model, self.tokenizer.padded_size, len(self.classes_), self.dropout)

    def _specs(self) -> dict[str, Spec]:
        return self._network().specs

    def _scores(self, tree: Params, rows: Rows) -> NDArray[np.float64]:
        return scores(self._network(), tree, rows, self.batch)

    def _learn(self, rows: Rows, label_N: NDArray[np.integer], judge: Callable[[Params], float]) -> tuple[Params, list[float]]:
        settings = Optimiser(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        trees = trained(self._network(), None, settings, rows, label_N, self.batch, self.epochs, self.seed, "reader")
        return early_stopped(trees, judge, self.patience, f"learning_rate {self.learning_rate}")
