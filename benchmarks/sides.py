"""The sides of a comparison, each in a process of its own, timed in turn.

Owns the processes: all are built and warm before the first round, and sleep while another one is timed. So a change of the
machine's mood hits every side alike. Must not know what is compared with what, nor how a table looks.
"""

import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Side", "Timing", "agreed", "in_turn", "started"]

AGREE = {"float32": 1e-4, "bfloat16": 1e-2}  # relative: how near the losses of all sides must be
CHECKED = 3  # steps whose losses are compared

# `build(**arguments)` gives a function: steps → losses of these steps, of every model that it trains.
Build = Callable[..., Callable[[int], Any]]


@dataclass(frozen=True)
class Side:
    """Processes that are timed together, from the start of the first to the end of the last."""

    name: str
    build: Build
    arguments: Sequence[dict[str, Any]]  # of one process each
    cores: Sequence[Sequence[int]]  # of one process each
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, and the peak memory of all processes together, in bytes."""

    seconds: list[float]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a part of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def _serve(connection: Any, build: Build, arguments: dict[str, Any], cores: Sequence[int], environment: dict[str, str]) -> None:
    os.environ.update(environment)  # before anything that reads it is imported
    os.sched_setaffinity(0, cores)
    run = build(**arguments)
    while (steps := connection.recv()) is not None:
        begun = time.perf_counter()
        losses = run(steps)
        seconds = time.perf_counter() - begun
        connection.send((seconds, losses, _peak_bytes()))


def _peak_bytes() -> int:
    """The most that this process has had: of the accelerator's memory if it uses one, else of the host's."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if torch is None and jax is not None and (stats := jax.local_devices()[0].memory_stats()) is not None:
        return int(stats["peak_bytes_in_use"])
    status = Path("/proc/self/status")
    if status.exists():  # the other figure begins at what the process had that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Running:
    def __init__(self, side: Side) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in side.arguments]
        self.name, self.pipes = side.name, [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(theirs, side.build, arguments, cores, side.environment))
            for (_, theirs), arguments, cores in zip(pairs, side.arguments, side.cores, strict=True)
        ]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()

    def run(self, steps: int) -> tuple[float, list[Any], int]:
        """Seconds, losses of each process, peak memory."""
        begun = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(steps)
        said = [pipe.recv() for pipe in self.pipes]
        seconds = time.perf_counter() - begun
        return seconds, [losses for _, losses, _ in said], sum(peak for _, _, peak in said)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join()


@contextmanager
def started(sides: Sequence[Side]) -> Iterator[dict[str, _Running]]:
    """Starts all sides at once; a side is asked for its first steps once it is built."""
    running: dict[str, _Running] = {}
    try:
        for side in sides:
            running[side.name] = _Running(side)
        yield running
    finally:
        for one in running.values():
            one.close()


def in_turn(running: dict[str, _Running], steps: dict[str, int], rounds: int) -> dict[str, Timing]:
    """Times every side once a round, in an order that moves by one a round."""
    names = list(running)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took, _, peaks[name] = running[name].run(steps[name])
            seconds[name].append(took)
    return {name: Timing(seconds[name], peaks[name]) for name in names}


def agreed(running: dict[str, _Running], dtype: str) -> float:
    """Lets every side train a few steps: the largest relative difference between the losses of any two.

    Raises:
      RuntimeError: it is too large, so that the work is not the same.
    """

    def of_side(one: _Running) -> list[Any]:
        return [replica for process in one.run(CHECKED)[1] for replica in zip(*process, strict=True)]

    losses = {name: of_side(one) for name, one in running.items()}
    first, *others = losses.values()
    worst = 0.0
    for mine, theirs in ((mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True)):
        worst = max(worst, *(abs(a - b) / abs(a) for a, b in zip(mine, theirs, strict=True)))
    if not worst <= AGREE[dtype]:
        raise RuntimeError(f"losses differ by {worst:.1e}, so that the work is not the same: {losses}")
    return worst
