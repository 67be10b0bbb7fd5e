"""One language model a class: a text is given to the class whose model finds it most likely.

Owns how such models are trained and compared. Must not know where texts come from.

Letters after an underscore name the axes: N texts, K classes, B rows of a batch, T ids of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from natfp_jax import params
from natfp_jax.config import Model, Optimiser
from natfp_jax.loss import blocked_cross_entropy, token_losses
from natfp_jax.model import head, hidden
from natfp_jax.params import Params, Spec
from natfp_jax.reading import Rows, TextReader, Tokenizer, early_stopped, scores, trained

__all__ = ["LanguageModels"]


@dataclass(frozen=True)
class _Network:
    """The decoder, trained to predict the next id."""

    model: Model
    vocabulary: int
    padded: int

    @property
    def specs(self) -> dict[str, Spec]:
        return params.table(self.model, self.padded)

    def loss(self, tree: Params, rows: Rows, label_B: jax.Array, noise: jax.Array) -> jax.Array:
        del label_B, noise
        x_BTD = hidden(self.model, tree, rows.ids_NT[:, :-1])
        return blocked_cross_entropy(x_BTD, head(tree), rows.ids_NT[:, 1:], self.vocabulary, _there(rows))

    def score(self, tree: Params, rows: Rows) -> jax.Array:
        """The log-probability of each row, its end included, in nats."""
        x_BTD = hidden(self.model, tree, rows.ids_NT[:, :-1])
        nll_BT = token_losses(x_BTD, head(tree), rows.ids_NT[:, 1:], self.vocabulary)
        return -(nll_BT * _there(rows)).sum(axis=1)


def _there(rows: Rows) -> jax.Array:
    """Which ids of a row are predicted: all but the first."""
    place_T = jnp.arange(rows.ids_NT.shape[1] - 1)
    return (place_T < rows.length_N[:, None] - 1).astype(jnp.float32)


class LanguageModels(TextReader):
    """Attribution by likelihood ratio.

    A model is first trained on the texts of all classes together, for some epochs. From there every class goes on alone, from
    the same weights, in the same order of rows, at a lower rate: the models differ in their class's text alone, and what
    little text leaves to chance cancels in the ratio. (On 1,000 texts a class of 48 tokens, of two models that had read the
    same windows in another order, it read 61 of 100 texts; models that had each begun at random weights read 57.)

    The classes count as equally likely before a text is read. Sums of log ratios over a text are far too sure of themselves,
    since each model is wrong about later tokens as about earlier ones; one scale, and nothing else, is fitted to the
    validation texts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        tokens: int = 512,
        batch: int = 32,
        learning_rate: float = 3e-3,
        own_rate: float = 1e-3,
        weight_decay: float = 0.1,
        together: int = 3,
        epochs: int = 8,
        patience: int = 1,
        seed: int = 0,
    ) -> None:
        """Stores what it is given.

        Args:
          tokenizer: what makes ids of texts.
          width, layers, heads: of the decoder.
          tokens: how many ids of a text are read, at most; memory goes by the longest text where that is shorter.
          batch: texts a step.
          learning_rate: of the training on all texts together.
          own_rate: the learning rate of each class on its own.
          weight_decay: of matrices.
          together: epochs of the training on all texts, 1 or more.
          epochs: of each class on its own, at most.
          patience: epochs on end that may bring nothing better.
          seed: of the first weights, the orders, and the part held back for validation where none is given.
        """
        self.tokenizer = tokenizer
        self.width = width
        self.layers = layers
        self.heads = heads
        self.tokens = tokens
        self.batch = batch
        self.learning_rate = learning_rate
        self.own_rate = own_rate
        self.weight_decay = weight_decay
        self.together = together
        self.epochs = epochs
        self.patience = patience
        self.seed = seed

    def _network(self) -> _Network:
        model = Model(width=self.width, layers=self.layers, heads=self.heads)
        return _Network(model, self.tokenizer.size, self.tokenizer.padded_size)

    def _specs(self) -> dict[str, Spec]:
        specs = self._network().specs
        return {f"{k}/{path}": spec for k in range(len(self.classes_)) for path, spec in specs.items()}

    def _scores(self, tree: Params, rows: Rows) -> NDArray[np.float64]:
        each = [scores(self._network(), tree[str(k)], rows, self.batch) for k in range(len(self.classes_))]
        return np.stack(each, axis=1)

    def _learn(self, rows: Rows, label_N: NDArray[np.integer], judge: Callable[[Params], float]) -> tuple[Params, list[float]]:
        network = self._network()

        def epochs(phase: str, rate: float, count: int, part_N: NDArray[np.integer], tree: Params | None) -> Iterator[Params]:
            settings = Optimiser(learning_rate=rate, weight_decay=self.weight_decay)
            part = Rows(*(array[part_N] for array in rows))
            return trained(network, tree, settings, part, label_N[part_N], self.batch, count, self.seed, phase)

        *_, common = epochs("together", self.learning_rate, self.together, np.arange(len(label_N)), None)
        alone = [
            epochs("alone", self.own_rate, self.epochs, np.flatnonzero(label_N == k), common) for k in range(len(self.classes_))
        ]
        # One after the other, epoch by epoch: on a CPU, batched products of several models are no faster.
        trees = ({str(k): tree for k, tree in enumerate(each)} for each in zip(*alone, strict=True))
        return early_stopped(trees, judge, self.patience, f"own_rate {self.own_rate}")
