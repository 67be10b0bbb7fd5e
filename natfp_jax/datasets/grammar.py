"""Probabilistic grammars whose texts have an exact log-probability.

A grammar is a dictionary: rule → options with integer weights. In an option, `[rule]` draws from a rule, `[rule as slot]` also
binds what was drawn, and `{slot}` repeats it. Weights of a rule sum to a power of two, so that random bits draw without bias.
What the options of a rule begin with is prefix-free, so that a text has at most one derivation: its probability is the
product of its choices, and the entropy of the texts is that of the derivations.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Grammar"]

_REFERENCE = re.compile(r"(\[\w+(?: as \w+)?\]|\{\w+\})")


@dataclass(frozen=True)
class _Draw:
    rule: str
    slot: str | None = None


@dataclass(frozen=True)
class _Recall:
    slot: str


@dataclass(frozen=True)
class _Bind:
    slot: str
    start: int  # in the text so far


_Item = str | _Draw | _Recall | _Bind


@dataclass(frozen=True)
class _Option:
    probability: float
    items: tuple[_Item, ...]


class Grammar:
    """Draws texts from `rules`, beginning with rule `start`.

    Raises:
      ValueError: the weights of a rule do not sum to a power of two, or two of its options begin alike.
    """

    def __init__(self, rules: Mapping[str, Mapping[str, int]], start: str) -> None:
        self._start = start
        self._bits: dict[str, int] = {}
        self._weights = {rule: list(options.values()) for rule, options in rules.items()}
        self._options: dict[str, list[_Option]] = {}
        for rule, options in rules.items():
            total = sum(options.values())
            if total & (total - 1):
                raise ValueError(f"the weights of rule {rule!r} sum to {total}, which is no power of two")
            self._bits[rule] = total.bit_length() - 1
            self._options[rule] = [_Option(weight / total, _items(option)) for option, weight in options.items()]
        self._heads = {rule: [self._head(option) for option in options] for rule, options in self._options.items()}
        for rule, heads in self._heads.items():
            for one, other in itertools.combinations(heads, 2):
                if any(a.startswith(b) or b.startswith(a) for a in one for b in other):
                    raise ValueError(f"two options of rule {rule!r} begin alike, so that a text could have two derivations")

    def _head(self, option: _Option) -> tuple[str, ...]:
        """What the option's text can begin with."""
        match option.items[0]:
            case str(literal):
                return (literal,)
            case _Draw(rule):
                return tuple(head for inner in self._options[rule] for head in self._head(inner))
            case item:
                raise ValueError(f"an option begins with {item}, which parsing cannot foresee")

    def _derive(self, choose: Callable[[str, str], int | None]) -> tuple[str, float] | None:
        """The text and its log2-probability, where `choose` names an option for (rule, text so far), or None to give up."""
        text, log2_probability = "", 0.0
        bound: dict[str, str] = {}
        todo: list[_Item] = [_Draw(self._start)]
        while todo:
            match todo.pop():
                case str(literal):
                    text += literal
                case _Recall(slot):
                    text += bound[slot]
                case _Bind(slot, start):
                    bound[slot] = text[start:]
                case _Draw(rule, slot):
                    chosen = choose(rule, text)
                    if chosen is None:
                        return None
                    option = self._options[rule][chosen]
                    log2_probability += math.log2(option.probability)
                    if slot is not None:
                        todo.append(_Bind(slot, len(text)))
                    todo.extend(reversed(option.items))
        return text, log2_probability

    def draw(self, bits: Callable[[int], int]) -> str:
        """A text, where `bits(n)` gives n independent random bits as an integer."""

        def choose(rule: str, _: str) -> int:
            place = bits(self._bits[rule])
            for chosen, weight in enumerate(self._weights[rule]):
                place -= weight
                if place < 0:
                    return chosen
            raise AssertionError("more bits than were asked for")

        derived = self._derive(choose)
        assert derived is not None
        return derived[0]

    def log_probability(self, text: str) -> float:
        """The log-probability of `text` in nats; minus infinity where the grammar does not derive it."""

        def choose(rule: str, done: str) -> int | None:
            # Nothing but heads is compared here; the whole is, at the end.
            for chosen, heads in enumerate(self._heads[rule]):
                if any(text.startswith(head, len(done)) for head in heads):
                    return chosen
            return None

        derived = self._derive(choose)
        return derived[1] * math.log(2) if derived is not None and derived[0] == text else -math.inf

    def entropy(self) -> float:
        """The entropy of a text in nats: for each rule that of its options plus the mean over them of what they draw."""
        index = {rule: i for i, rule in enumerate(self._options)}
        own_R = np.zeros(len(index))
        draws_RR = np.zeros((len(index), len(index)))  # how often, in the mean, an expansion of a rule draws from another
        for rule, options in self._options.items():
            for option in options:
                own_R[index[rule]] -= option.probability * math.log(option.probability)
                for item in option.items:
                    if isinstance(item, _Draw):
                        draws_RR[index[rule], index[item.rule]] += option.probability
        return float(np.linalg.solve(np.eye(len(index)) - draws_RR, own_R)[index[self._start]])


def _items(option: str) -> tuple[_Item, ...]:
    items: list[_Item] = []
    for part in _REFERENCE.split(option):
        if part.startswith("["):
            rule, _, slot = part[1:-1].partition(" as ")
            items.append(_Draw(rule, slot or None))
        elif part.startswith("{"):
            items.append(_Recall(part[1:-1]))
        elif part:
            items.append(part)
    return tuple(items)
