"""How many texts it takes to detect that sources can be told apart.

Owns the power of the project's own test, labels permuted within prompts (`stats.permutation_p`), as a function of numbers. Must
not know texts, studies, files or jax, and draws nothing.

What is assumed: every prompt has one text of each of m classes, each text is recognised with the probability a = 1/m + excess,
independently, and otherwise taken for any other class alike. The number of hits T is then binomial. What T is compared with is
not: labels are permuted given the predictions, and that has consequences which the textbook's test of a proportion lacks.

- m = 2: a prompt tells something only if its two texts got different classes. It does with the probability a² + (1-a)², and is
  then right with the probability a² / (a² + (1-a)²). Given how many prompts tell something, the test is the exact sign test; so
  the power is that of the sign test averaged over this binomial number, without any approximation.
- m > 2: a permutation leaves f labels in place, with the known law of the fixed points of a permutation. Over predictions and
  permutations, hits at a prompt are so many of f with the chance a and of m-f with the chance (1-a)/(m-1). Every permutation
  has one hit a prompt in the mean, so that this mixture has the mean variance of the laws given the predictions, and the sum
  over prompts has the law that T is compared with, but for its width, which varies from one set of predictions to another:
  pairs of texts of a prompt got one class or not, and of uniform predictions these events are pairwise independent. That
  this width and T vary together is left out: in simulations with 3 to 5 classes the power was 0 to 0.003 above the claim.

The p-value is an estimate from finitely many permutations: p < level says that at most k of them have as many hits, which is
that the exact p-value lies below the k-th least of uniform numbers. So the level that is really applied follows a beta law.

Letters after an underscore name the axes: D numbers of prompts, U levels, V widths, X hits above the mean.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, betaincinv, betaln, ndtri, xlog1py, xlogy  # scipy.stats takes seconds to import

from natfp_jax.errors import UserError

__all__ = ["MOST", "Plan", "least_excess", "power", "prompts_needed"]

MOST = 10**7  # prompts
_LEVELS, _WIDTHS = 8, 16  # equally likely values that stand for a law
_REACH = 6  # standard deviations, beyond which is 1e-9
_NODES = 1000  # of the numbers of prompts that tell something; all of them below 27,000 prompts
_FEW = 400  # prompts, below which it shows that hits are whole numbers
_TOLD_APART = 1e-5  # of two excesses


@dataclass(frozen=True)
class Plan:
    """What is tested, and how strictly.

    Attributes:
      classes: m, the sources; chance is 1/m.
      alpha: the error of the whole family of tests.
      tests: how many tests the family has: Holm's first step compares the least p-value with alpha / tests.
      permutations: of one test; its p-value is at least 1 / (1 + permutations).
      design_effect: how many times the variance of the accuracy is that of as many independent texts (Kish 1965); n texts
        count as n / design_effect. Exact where texts of one prompt resemble each other; where some documents give away
        more than others the labels are permuted as before, and n / design_effect is on the safe side.

    Raises:
      UserError: a number is out of its range.
    """

    classes: int
    alpha: float = 0.05
    tests: int = 1
    permutations: int = 9_999
    design_effect: float = 1.0

    def __post_init__(self) -> None:
        bounds = {"classes": (2, 100), "alpha": (1e-9, 0.999), "tests": (1, 10**6), "permutations": (1, 10**9)}
        for name, (low, high) in {**bounds, "design_effect": (0.01, 10**6)}.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} {getattr(self, name)}: give a number from {low:,} to {high:,}")

    @property
    def level(self) -> float:
        """What a p-value has to lie below."""
        return self.alpha / self.tests

    @property
    def permutations_needed(self) -> int:
        """The least number of permutations with which any p-value can lie below the level."""
        return math.floor(1 / self.level * (1 + 1e-12))

    @property
    def possible(self) -> bool:
        """Whether a p-value can lie below the level at all."""
        return self.permutations >= self.permutations_needed

    @property
    def most(self) -> float:
        """The excess of a classifier that is always right."""
        return 1 - 1 / self.classes


def power(plan: Plan, prompts: int, excess: float) -> float:
    """The probability that the test finds what is there.

    Args:
      plan: what is tested.
      prompts: of the test part, each with one text a class; `MOST` at most.
      excess: of the accuracy over chance, from 0 to 1 - 1/m.

    Raises:
      UserError: there is no prompt, or no such excess.
    """
    if not 1 <= prompts <= MOST:
        raise UserError(f"prompts {prompts}: give 1 to {MOST:,}")
    _check_excess(plan, excess)
    independent = math.floor(prompts / plan.design_effect * (1 + 1e-12))
    if not plan.possible or independent < 1:
        return 0.0
    accuracy = min(1 / plan.classes + excess, 1.0)
    level_U = _levels(plan)
    if plan.classes == 2:
        return _of_two(independent, accuracy, level_U)
    return _of_many(plan.classes, independent, accuracy, level_U)


def _check_excess(plan: Plan, excess: float) -> None:
    if not 0 <= excess <= plan.most * (1 + 1e-12):
        raise UserError(f"excess {excess}: {plan.classes} classes have a chance of 1/{plan.classes}, give 0 to {plan.most:.4g}")


def _levels(plan: Plan) -> NDArray[np.float64]:
    """Equally likely exact p-values below which the estimate lies below the level."""
    # p = (1 + count) / (1 + permutations) < level, as the report has it, with an inequality that rounding does not turn.
    largest = math.ceil(plan.level * (1 + plan.permutations) * (1 - 1e-12)) - 1
    return np.asarray(betaincinv(largest, plan.permutations + 1 - largest, _middles(_LEVELS)), dtype=np.float64)


def _middles(number: int) -> NDArray[np.float64]:
    return (np.arange(number) + 0.5) / number


def _of_two(prompts: int, accuracy: float, level_U: NDArray[np.float64]) -> float:
    both_right, both_wrong = accuracy**2, (1 - accuracy) ** 2
    telling = both_right + both_wrong
    spread = _REACH * math.sqrt(prompts * telling * (1 - telling)) + 1
    low, high = max(0, math.floor(prompts * telling - spread)), min(prompts, math.ceil(prompts * telling + spread))
    told_D = np.unique(np.linspace(low, high, min(high - low + 1, _NODES)).round()).astype(np.int64)
    chance_D = np.exp(
        xlogy(told_D, telling)
        + xlog1py(prompts - told_D, -telling)
        - np.log1p(prompts)
        - betaln(prompts - told_D + 1, told_D + 1)
    )
    right_UD = _least_right(told_D, level_U[:, None])
    found_D = bdtrc(right_UD - 1, told_D, both_right / telling).mean(axis=0)
    return float(found_D @ chance_D / chance_D.sum())


def _least_right(told_D: NDArray[np.int64], level_U1: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least number of right prompts that the sign test rejects at, D + 1 where none does: [U, D]."""
    right_UD = np.clip(np.ceil((told_D + 1 - ndtri(level_U1) * np.sqrt(told_D)) / 2), 0, told_D + 1)
    while (short := bdtrc(right_UD - 1, told_D, 0.5) > level_U1).any():
        right_UD = right_UD + short
    while (far := (right_UD > 0) & (bdtrc(right_UD - 2, told_D, 0.5) <= level_U1)).any():
        right_UD = right_UD - far
    return right_UD


def _of_many(classes: int, prompts: int, accuracy: float, level_U: NDArray[np.float64]) -> float:
    law = _permuted(classes, accuracy)
    variance = float(law @ (np.arange(classes + 1) - 1.0) ** 2)
    above_X = _above(law, prompts, variance)
    # Between whole numbers of hits, so that it can be stretched; rounded up it is the least number that is rejected at.
    place_U = np.interp(-np.log(level_U), -np.log(np.maximum(above_X, 1e-300)), np.arange(len(above_X)))
    of_one = (1 - 1 / classes) / classes / math.comb(classes, 2)
    stretch_V = np.sqrt(np.maximum(1 + ndtri(_middles(_WIDTHS)) * math.sqrt(of_one / prompts) / variance, 0))
    hits_VU = prompts + np.ceil((place_U - 0.5) * stretch_V[:, None] + 0.5 - 1e-9)
    return float(bdtrc(np.minimum(hits_VU - 1, classes * prompts), classes * prompts, accuracy).mean())


def _permuted(classes: int, accuracy: float) -> NDArray[np.float64]:
    """The law of hits at a prompt whose labels are permuted, over predictions and permutations."""
    other = (1 - accuracy) / (classes - 1)
    law = np.zeros(classes + 1)
    for fixed in range(classes + 1):
        # Permutations of m with so many fixed points, of m!: those that leave nothing of the others in place.
        deranged = sum((-1) ** i / math.factorial(i) for i in range(classes - fixed + 1))
        law += deranged / math.factorial(fixed) * np.convolve(_binomial(fixed, accuracy), _binomial(classes - fixed, other))
    return law


def _binomial(trials: int, chance: float) -> NDArray[np.float64]:
    return np.array([math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(trials + 1)])


def _above(law: NDArray[np.float64], prompts: int, variance: float) -> NDArray[np.float64]:
    """The probability of at least x hits more than one a prompt, for x from 0: [X]; the last is 0."""
    most, window = (len(law) - 2) * prompts, 2 * math.ceil(20 * math.sqrt(prompts * variance)) + 1
    size, reach = min((prompts + most + 1, most), (window, window // 2))  # a circle holds what lies within 20 deviations
    turns = np.exp(-2j * np.pi * np.arange(size // 2 + 1)[:, None] * (np.arange(len(law)) - 1) / size)
    pmf_X = np.fft.irfft((turns @ law) ** prompts, size)[: reach + 1]
    return np.append(np.cumsum(np.maximum(pmf_X, 0)[::-1])[::-1], 0.0)


def prompts_needed(plan: Plan, excess: float, wanted: float = 0.8) -> int | None:
    """The least number of test prompts, each with one text a class, from which on an excess is detected with the wanted power.

    Hits are whole numbers, so that of few prompts one more may have a little less power: it is the number after the last
    that has too little.

    Returns:
      The number; None where the permutations are too few for any p-value to lie below the level, or `MOST` prompts are.

    Raises:
      UserError: there is no such excess, or the wanted power is none.
    """
    _check_wanted(wanted)
    _check_excess(plan, excess)
    if not excess > 0:
        raise UserError(f"excess {excess}: give a number above 0")
    if not plan.possible:
        return None
    alone = Plan(plan.classes, plan.alpha, plan.tests, plan.permutations)

    def enough(prompts: int) -> bool:
        return power(alone, prompts, excess) >= wanted

    start = _textbook(alone, excess, wanted) / alone.classes
    if start > 0.8 * MOST:
        return None
    # A test of whole hits is stricter than the approximation, by about one or two of them.
    low, high = 0, math.ceil(start + 2 / (alone.classes * excess)) + 2
    while not enough(high):
        low, high = high, math.ceil(1.2 * high)
    if low == 0 and not enough(likely := math.floor(0.98 * start) or 1):
        low = likely
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    # Of two classes the number of prompts that tell something varies, which evens out that hits are whole numbers.
    ahead = 4 * math.isqrt(high) + 4 if plan.classes > 2 and high < _FEW else 0
    while short := [more for more in range(high, high + ahead) if not enough(more)]:
        high = short[-1] + 1
    return math.ceil(high * plan.design_effect * (1 - 1e-12))


def _check_wanted(wanted: float) -> None:
    if not 0 < wanted < 1:
        raise UserError(f"power {wanted}: give a number between 0 and 1")


def _textbook(plan: Plan, excess: float, wanted: float) -> float:
    """The texts that the normal approximation of the one-sided test of a proportion asks for (Fleiss 1981): where to begin."""
    return (_deviations(plan, wanted, excess) / excess) ** 2


def _deviations(plan: Plan, wanted: float, excess: float) -> float:
    """How far from chance an accuracy is to be, times the root of the number of texts; 0 or more."""
    chance, accuracy = 1 / plan.classes, min(1 / plan.classes + excess, 1.0)
    found = -ndtri(plan.level) * math.sqrt(chance * (1 - chance)) + ndtri(wanted) * math.sqrt(accuracy * (1 - accuracy))
    return max(float(found), 0.0)


def least_excess(plan: Plan, prompts: int, wanted: float = 0.8) -> float | None:
    """The least excess over chance that so many test prompts, each with one text a class, detect with the wanted power.

    Returns:
      The excess, to a hundred-thousandth; None where even a classifier that is always right would not be found out.

    Raises:
      UserError: there is no prompt, or the wanted power is none.
    """
    _check_wanted(wanted)
    if power(plan, prompts, plan.most) < wanted:
        return None
    alone = prompts * plan.classes / plan.design_effect
    low, high = 0.0, min(3 / math.sqrt(alone) * _deviations(plan, wanted, 0.0), plan.most)
    if power(plan, prompts, high) < wanted:
        low, high = high, plan.most
    while high - low > _TOLD_APART:
        middle = (low + high) / 2
        low, high = (low, middle) if power(plan, prompts, middle) >= wanted else (middle, high)
    return high
