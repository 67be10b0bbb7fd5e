"""How sure a classifier may be of one text.

Owns the scale by which probabilities are put right, and the verdict on a text at a chosen rate of false accusations. Must not
know classifiers, texts or files; draws nothing.

Letters after an underscore name the axes: N texts, K classes, M held-out texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from natfp_jax.errors import UserError

__all__ = ["ABSTAINS", "NONE", "Calibration", "best_scale", "conformal_p", "log_loss", "log_odds", "logs", "rescaled"]

ABSTAINS, NONE = -1, -2  # verdicts beside the numbers of the classes
_SCALES = (-12.0, 6.0)  # log of the scale of the scores: from no opinion to certainty


def log_loss(score_NK: NDArray[np.float64], label_N: NDArray[np.integer], doubt: float = 0.0) -> float:
    """The mean log-loss, in nats, of the probabilities that are the softmax of the scores.

    Args:
      doubt: the share of each label that is spread over all classes.
    """
    loss_NK = -log_softmax(score_NK, axis=1)
    return float((1 - doubt) * loss_NK[np.arange(len(label_N)), label_N].mean() + doubt * loss_NK.mean())


def best_scale(score_NK: NDArray[np.float64], label_N: NDArray[np.integer], doubt: float = 0.0) -> float:
    """The factor of the scores with the least `log_loss` (temperature scaling; Guo et al., 2017).

    Where every text got its class, no scale is too large for labels without doubt.
    """
    found = minimize_scalar(lambda log: log_loss(np.exp(log) * score_NK, label_N, doubt), bounds=_SCALES, method="bounded")
    return float(np.exp(found.x))


def rescaled(probability_NK: NDArray[np.floating], scale: float) -> NDArray[np.float64]:
    """Probabilities whose log-odds are `scale` times those of the given ones; 1 changes no bit."""
    if scale == 1:
        return np.asarray(probability_NK, dtype=np.float64)
    found: NDArray[np.float64] = softmax(scale * logs(probability_NK), axis=1)
    return found


def logs(probability_NK: NDArray[np.floating]) -> NDArray[np.float64]:
    """The logarithms; of zero, that of the smallest normal number."""
    return np.log(np.maximum(np.asarray(probability_NK, dtype=np.float64), np.finfo(np.float64).tiny))


def log_odds(probability_NK: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of each class against all others: as the probabilities, but apart where these are all but 1."""
    rest_NK = np.stack([np.delete(probability_NK, k, axis=1).sum(axis=1) for k in range(probability_NK.shape[1])], axis=1)
    return logs(probability_NK) - logs(rest_NK)


def conformal_p(score_N: ArrayLike, held_M: ArrayLike) -> NDArray[np.float64]:
    """How unusually low each score is among held-out ones: (1 + #{held <= score}) / (M + 1).

    If a score and the held-out ones are exchangeable, it is at most a with a probability of at most a, whatever their
    distribution, on average over held-out texts (Vovk, Gammerman and Shafer, 2005).
    """
    held = np.sort(np.asarray(held_M, dtype=np.float64))
    found: NDArray[np.float64] = (1 + np.searchsorted(held, score_N, side="right")) / (len(held) + 1)
    return found


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a classifier said of texts that it was not fitted on, no two of them of one document.

    Attributes:
      own: of each class, the log-odds of that class that the held-out texts of it got.
      strangers: of each source that is none of the classes, how `typical` its texts are of the class that they would be
        given to: texts set aside, or those of a class that a classifier of the others was not shown. Empty: unknown sources
        are not reckoned with.
    """

    own: Sequence[NDArray[np.float64]]
    strangers: Mapping[str, NDArray[np.float64]]

    def typical(self, probability_NK: NDArray[np.floating]) -> NDArray[np.float64]:
        """How typical a text is of each class, from 0 to 1: the two-sided conformal p-value of its log-odds.

        Two-sided, since texts of an unknown source may look more like a class than its own texts ever do.
        """
        odds_NK = log_odds(probability_NK)
        each = zip(odds_NK.T, self.own, strict=True)
        sides_2NK = np.array([(conformal_p(odds_N, held), conformal_p(-odds_N, -held)) for odds_N, held in each]).transpose(
            1, 2, 0
        )
        found: NDArray[np.float64] = np.minimum(1.0, 2 * sides_2NK.min(axis=0))
        return found

    def accusable(self, probability_NK: NDArray[np.floating]) -> NDArray[np.float64]:
        """How `typical` each text is of its most probable class."""
        return self.typical(probability_NK)[np.arange(len(probability_NK)), np.argmax(probability_NK, axis=1)]

    def verdicts(self, probability_NK: NDArray[np.floating], rate: float) -> NDArray[np.int64]:
        """The number of a class, `ABSTAINS` or `NONE` for each text.

        A class is *plausible* for a text if `conformal_p` of the class's log-odds among its held-out texts is above
        `rate`: only that part of its own texts has log-odds so low.

        - A class: it alone is plausible, it is the most probable, and of no source of `strangers` more than `rate` of the
          texts are so typical of theirs. So whatever known source a text is of, it is accused of another with a
          probability of at most `rate`; and so is a text of a stranger that was set aside. Where strangers are classes that
          were left out, this is so for each of them under the classifier of the others. For sources that nobody has
          seen it is no promise unless very many were left out: a new source is unlike all of K others once in K + 1 times.
        - `NONE`, none of these: there are strangers, and no class of which the text is more typical than `rate`. A text
          of a known source is called so with a probability of at most `rate`.
        - `ABSTAINS`: anything else. Several classes are plausible, or one is but a stranger's text may well look so.

        Args:
          probability_NK: of each class.
          rate: of false accusations, above 0 and below 1.

        Raises:
          UserError: there are too few held-out texts to promise the rate.
        """
        if not 0 < rate < 1:
            raise UserError(f"--false-accusations {rate}: give a rate above 0 and below 1")
        fewest = min(map(len, [*self.own, *self.strangers.values()]))
        if rate * (fewest + 1) < 1:
            raise UserError(
                f"--false-accusations {rate} needs {ceil(1 / rate) - 1} held-out texts of each source, the classifier was "
                f"calibrated with {fewest}: give {ceil(1e4 / (fewest + 1)) / 1e4} or more, or make a classifier from more texts"
            )
        odds_NK, typical_NK = log_odds(probability_NK), self.typical(probability_NK)
        p_NK = np.stack([conformal_p(odds_N, held_M) for odds_N, held_M in zip(odds_NK.T, self.own, strict=True)], axis=1)
        top_N, each_N = odds_NK.argmax(axis=1), np.arange(len(odds_NK))
        accused_N = ((p_NK > rate).sum(axis=1) == 1) & (p_NK[each_N, top_N] > rate)
        for held_M in self.strangers.values():
            accused_N &= conformal_p(-typical_NK[each_N, top_N], -held_M) <= rate
        none_N = (typical_NK <= rate).all(axis=1) & bool(self.strangers)
        found: NDArray[np.int64] = np.where(none_N, NONE, np.where(accused_N, top_N, ABSTAINS))
        return found
