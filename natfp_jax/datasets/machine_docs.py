"""The text that every machine has: docstrings of the standard library and of the packages that natfp_jax requires.

Source files are parsed, never imported. The documents differ between Python versions and package versions, which is why both
are in the name of the data.
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from natfp_jax.datasets.builder import TextBuilder

__all__ = ["MachineDocs"]

_SHORTEST = 100  # characters
_LETTERS = 0.85  # of the characters: letters and white space, so that tables, formulas and listings stay out
_SKIPPED = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "testing", "tests"}
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")
_SURROGATE = re.compile("[\ud800-\udfff]")  # which UTF-8 cannot hold


class MachineDocs(TextBuilder):
    """Docstrings of modules, classes and functions, cleaned of indentation, of at least 100 characters and mostly words."""

    def __init__(self, *, data_dir: str | Path) -> None:
        self._packages = _required_packages()
        made_of = [f"Python {platform.python_version()}", *(f"{name} {version}" for name, version in self._packages.items())]
        digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
        super().__init__(
            data_dir=data_dir,
            inputs=f"python{platform.python_version()}-{digest}",
            description=f"Docstrings of {', '.join(made_of)}",
        )

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (package, file and line; docstring)."""
        for key, path in self._files():
            try:
                source = path.read_bytes()
            except OSError:
                continue
            for line, text in _docstrings(source):
                yield f"{key}:{line}", text

    def _files(self) -> Iterator[tuple[str, Path]]:
        standard = Path(sysconfig.get_path("stdlib"))
        for folder, folders, names in os.walk(standard):
            folders[:] = sorted(set(folders) - _SKIPPED)
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix == ".py" and not _TEST_FILE.fullmatch(name):
                    yield f"python:{path.relative_to(standard).as_posix()}", path
        for package in self._packages:
            for file in sorted(importlib.metadata.files(package) or ()):
                if file.suffix == ".py" and not _SKIPPED & set(file.parts) and not _TEST_FILE.fullmatch(file.name):
                    yield f"{package}:{file.as_posix()}", Path(str(file.locate()))


def _required_packages() -> dict[str, str]:
    """The versions of the installed packages that natfp_jax requires without extras, by name."""
    versions = {}
    try:
        requirements = importlib.metadata.requires("natfp-jax") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        requirements = []
    for requirement in sorted(requirements):
        name = re.match(r"[\w.-]+", requirement)
        if name and "extra ==" not in requirement:
            try:
                versions[name[0]] = importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def _docstrings(source: bytes) -> list[tuple[int, str]]:
    """The documents of one file with their lines; none where it does not parse."""
    if b'"""' not in source and b"'''" not in source:  # saves a third of the parsing
        return []
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no cycle: without the collector, parsing takes two thirds of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
        return [(line, text) for line, doc in _walk(tree, 1) if _is_document(text := inspect.cleandoc(doc).strip())]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    finally:
        if collecting:
            gc.enable()


def _walk(node: ast.AST, line: int) -> Iterator[tuple[int, str]]:
    """The docstrings of a module, class or function and of those within it. Others are met in its statements only."""
    body: list[ast.stmt] = getattr(node, "body", [])
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        first = body[0] if body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield line, first.value.value
    for name in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _walk(child, getattr(child, "lineno", line))


def _is_document(text: str) -> bool:
    if len(text) < _SHORTEST or _SURROGATE.search(text):
        return False
    return sum(c.isalpha() or c.isspace() for c in text) >= _LETTERS * len(text)
