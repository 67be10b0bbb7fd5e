"""The documentation that every machine has: that of the standard library and of the packages that natfp_jax requires.

Owns which source files are read, and the docstrings found in them. Source files are parsed, never imported. They differ
between Python versions and package versions, which is why both are in the name of data made from them. Must not know what the
docstrings are for.
"""

import ast
import gc
import hashlib
import importlib.metadata
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Definition", "Docstring", "Machine", "is_prose"]

_LETTERS = 0.85  # of the characters: letters and white space, so that tables, formulas and listings stay out
_SKIPPED = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "testing", "tests"}
_TEST_FILE = re.compile(r"(test_.*|.*_test|conftest)\.py")
_SURROGATE = re.compile("[\ud800-\udfff]")  # which UTF-8 cannot hold

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """A docstring as written, and the classes and functions that it is of, from the outermost; of a module there are none."""

    file: str  # package:path
    line: int
    owners: tuple[Definition, ...]
    text: str


@dataclass(frozen=True)
class Machine:
    """The standard library, and packages by name with their versions."""

    packages: dict[str, str]

    @classmethod
    def here(cls) -> "Machine":
        """With the installed packages that natfp_jax requires without extras."""
        return cls(_required_packages())

    @property
    def parts(self) -> list[str]:
        """What is read, in words."""
        return [f"Python {platform.python_version()}", *(f"{name} {version}" for name, version in self.packages.items())]

    @property
    def name(self) -> str:
        """Another for another version of anything that is read."""
        digest = hashlib.sha256("\n".join(self.parts).encode()).hexdigest()[:16]
        return f"python{platform.python_version()}-{digest}"

    def docstrings(self) -> Iterator[Docstring]:
        """Those of every file, in the order of the files and their statements."""
        for name, path in self.files():
            try:
                source = path.read_bytes()
            except OSError:
                continue
            yield from _docstrings(name, source)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yields (package:path, file), without tests."""
        standard = Path(sysconfig.get_path("stdlib"))
        for folder, folders, names in os.walk(standard):
            folders[:] = sorted(set(folders) - _SKIPPED)
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix == ".py" and not _TEST_FILE.fullmatch(name):
                    yield f"python:{path.relative_to(standard).as_posix()}", path
        for package in self.packages:
            for file in sorted(importlib.metadata.files(package) or ()):
                if file.suffix == ".py" and not _SKIPPED & set(file.parts) and not _TEST_FILE.fullmatch(file.name):
                    yield f"{package}:{file.as_posix()}", Path(str(file.locate()))


def is_prose(text: str) -> bool:
    """Whether a text is mostly words, and UTF-8 can hold it."""
    return not _SURROGATE.search(text) and sum(c.isalpha() or c.isspace() for c in text) >= _LETTERS * len(text)


def _required_packages() -> dict[str, str]:
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


def _docstrings(file: str, source: bytes) -> list[Docstring]:
    """Those of one file; none where it does not parse."""
    if b'"""' not in source and b"'''" not in source:  # saves a third of the parsing
        return []
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no cycle: without the collector, parsing takes two thirds of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
        return list(_walk(file, tree, 1, ()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    finally:
        if collecting:
            gc.enable()


def _walk(file: str, node: ast.AST, line: int, owners: tuple[Definition, ...]) -> Iterator[Docstring]:
    """The docstrings of a module, class or function and of those within it. Others are met in its statements only."""
    body: list[ast.stmt] = getattr(node, "body", [])
    if isinstance(node, Definition):
        owners = (*owners, node)
    if isinstance(node, ast.Module | Definition):
        first = body[0] if body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield Docstring(file, line, owners, first.value.value)
    for name in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _walk(file, child, getattr(child, "lineno", line), owners)
