"""Progress on the terminal, with the time left.

Owns the look of progress. Stages get a `Progress` and say what they count; they never print.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Progress"]

Advance = Callable[[int], None]


class Progress:
    """A context in which stages show what they do: bars with the time left on a terminal, a line a task elsewhere."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        """Prints one line above the bars."""
        self.console.print(line, highlight=False, soft_wrap=True)  # a path stays in one piece

    @contextlib.contextmanager
    def task(self, description: str, total: int | None, unit: str = "") -> Iterator[Advance]:
        """Shows one task; yields `advance(n)`, to be called with the number of units done since the last call."""
        bar = self._bars.add_task(description, total=total, unit=unit)
        if not self.console.is_terminal:
            self.say(f"{description} ({total} {unit})" if total is not None else description)
        try:
            yield lambda n: self._bars.advance(bar, n)
        finally:
            self._bars.remove_task(bar)
