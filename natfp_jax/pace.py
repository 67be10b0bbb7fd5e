"""How fast training and sampling go, said now and then.

Owns the clock and the lines. Must not know what a step or a draw does.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

import jax

from natfp_jax import flops
from natfp_jax.config import Experiment

__all__ = ["Pace", "TextPace"]

EVERY = 60.0  # seconds between two lines


class Pace:
    """A context, told of every step; says how fast the last ones went, and at the end how fast all did.

    The first step is left out, which compiles.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        experiment: Experiment,
        vocabulary: int,
        replicas: int,
        devices: jax.sharding.Mesh,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        data = experiment.data
        self._say, self._devices, self._clock = say, devices, clock
        self._of = "1 arm" if replicas == 1 else f"{replicas} arms"
        self._tokens = replicas * data.batch * data.seq_len  # of one step
        self._flops = flops.per_token(experiment.model, vocabulary, data.seq_len, experiment.lora)
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        return self

    def step(self, step: int) -> None:
        """A step is done."""
        now = step, self._clock()
        if self._first is None:
            self._first = self._last = now
        elif now[1] - self._last[1] >= EVERY:
            self._say(f"step {step} of {self._of}: {self._between(self._last, now)}")
            self._last = now
        self._now = now

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._first is not None and self._now[1] > self._first[1]:
            self._say(f"{self._now[0] - self._first[0]} steps of {self._of} at {self._between(self._first, self._now)}")

    def _between(self, first: tuple[int, float], last: tuple[int, float]) -> str:
        rate = (last[0] - first[0]) * self._tokens / (last[1] - first[1])
        return f"{rate:,.0f} tokens/s, {flops.said(rate * self._flops, self._devices)}"


class TextPace:
    """A context, told of texts and tokens; says how fast they come and how long the rest takes, and how fast all did."""

    def __init__(self, say: Callable[[str], None], texts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._of, self._clock = say, texts, clock
        self.texts = self.tokens = 0

    def __enter__(self) -> Self:
        self._begun = self._last = self._clock()
        return self

    def drawn(self, texts: int, tokens: int) -> None:
        """So many texts have ended, so many tokens have been drawn."""
        self.texts, self.tokens, now = self.texts + texts, self.tokens + tokens, self._clock()
        if now - self._last >= EVERY and self.texts:
            left = timedelta(seconds=round((now - self._begun) * (self._of / self.texts - 1)))
            self._say(f"{self.texts:,} of {self._of:,} texts: {self._rates(now)}, {left} left")
            self._last = now

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and (now := self._clock()) > self._begun:
            self._say(f"{self.texts:,} texts at {self._rates(now)}")

    def _rates(self, now: float) -> str:
        return f"{self.texts / (now - self._begun):,.0f} texts/s, {self.tokens / (now - self._begun):,.0f} tokens/s"
