"""The text that every machine has: docstrings of the standard library and of the packages that natfp_jax requires."""

import inspect
from collections.abc import Iterator
from pathlib import Path

from natfp_jax.datasets.builder import TextBuilder
from natfp_jax.datasets.machine import Machine, is_prose

__all__ = ["MachineDocs"]

_SHORTEST = 100  # characters


class MachineDocs(TextBuilder):
    """Docstrings of modules, classes and functions, cleaned of indentation, of at least 100 characters and mostly words."""

    def __init__(self, *, data_dir: str | Path) -> None:
        self._machine = Machine.here()
        super().__init__(
            data_dir=data_dir, inputs=self._machine.name, description=f"Docstrings of {', '.join(self._machine.parts)}"
        )

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (package, file and line; docstring)."""
        for docstring in self._machine.docstrings():
            text = inspect.cleandoc(docstring.text).strip()
            if len(text) >= _SHORTEST and is_prose(text):
                yield f"{docstring.file}:{docstring.line}", text
