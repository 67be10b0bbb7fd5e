"""How fast training goes, said now and then.

Owns the clock and the line. Must not know what a step does.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import jax

from natfp_jax import flops
from natfp_jax.config import Experiment

__all__ = ["Pace"]

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
        self._flops = flops.per_token(experiment.model, vocabulary, data.seq_len)
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
