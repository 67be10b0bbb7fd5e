"""A list of published checkpoints, with what is claimed of each.

Owns the file of the list, the folders that it names, and that all of them are of one architecture. Must not know what the
claims mean, and reads no tensor.

    [[checkpoint]]
    branch = "seed1"         # the training, or the branch of a repository that it was published on
    path = "seed1/step1000"  # a folder in Hugging Face's layout, seen from the file; or hf://OWNER/NAME@REVISION
    init = 1                 # the seed of the initial weights, as claimed
    order = 0                # the seed of the order of the data, as claimed
    step = 1000              # as claimed
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic

from natfp_jax.config import Strict
from natfp_jax.errors import UserError
from natfp_jax.published import HUB, Folder, located, opened

__all__ = ["Listed", "Suite", "read"]

_KEYS = "a checkpoint has branch, path, init, order and step"
# Kinds of tensors that are no weights, but what transformers once saved of masks; so are single numbers, such as a masked
# logit, which in half precision is minus infinity.
_MASKS = ("I", "U", "BOOL")


@dataclass(frozen=True)
class Listed(Strict):
    """One checkpoint, by what is claimed of it."""

    branch: Annotated[str, pydantic.Field(min_length=1)]
    path: Annotated[str, pydantic.Field(min_length=1)]
    init: int
    order: int
    step: Annotated[int, pydantic.Field(ge=0)]


@dataclass(frozen=True)
class _File(Strict):
    checkpoint: Annotated[list[Listed], pydantic.Field(min_length=2)]


@dataclass(frozen=True)
class Suite:
    """Checkpoints of one architecture.

    Attributes:
      listed: in the order of branches as they first appear, then of steps.
      folders: of each.
      tensors: name → shape, of the weights.
    """

    listed: tuple[Listed, ...]
    folders: tuple[Folder, ...]
    tensors: Mapping[str, tuple[int, ...]]


def read(path: Path) -> Suite:
    """The list at `path`, every folder of it looked through.

    Raises:
      UserError: the file is no such list, two of its lines contradict each other, a folder is not what it has to be, or is of
        another architecture than the first.
    """
    listed = _listed(path)
    folders = []
    for one in listed:
        place = one.path if one.path.startswith(HUB) else str(path.parent / one.path)
        try:
            folders.append(opened(located(place)))
        except UserError as error:
            raise UserError(f"{path}: branch {one.branch}, step {one.step}: {error}") from None
    found = [_weights(folder) for folder in folders]
    for folder, tensors in zip(folders, found, strict=True):
        _check_alike(folders[0], found[0], folder, tensors)
    return Suite(listed, tuple(folders), found[0])


def _listed(path: Path) -> tuple[Listed, ...]:
    if not path.is_file():
        raise UserError(f"{path} is no file: give a list of checkpoints, a TOML file of [[checkpoint]] tables")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no TOML ({' '.join(str(error).split())[:120]}): mend that line") from None
    try:
        # JSON mode, as of all configurations: a table is then a dataclass, and a date a text.
        listed = pydantic.TypeAdapter(_File).validate_json(json.dumps(values, default=str), strict=True).checkpoint
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_problem(error)}: {_KEYS}") from None
    seen, seeds = set[tuple[str, int]](), dict[str, tuple[int, int]]()
    for one in listed:
        if (one.branch, one.step) in seen:
            raise UserError(
                f"{path} lists branch {one.branch}, step {one.step} twice: leave one out, or give it another branch"
            )
        seen.add((one.branch, one.step))
        before = seeds.setdefault(one.branch, (one.init, one.order))
        if before != (one.init, one.order):
            raise UserError(
                f"{path}: branch {one.branch} has init {one.init} and order {one.order} at step {one.step}, expected "
                f"{before[0]} and {before[1]} as at its first: give other seeds another branch"
            )
    places = list(seeds)
    return tuple(sorted(listed, key=lambda one: (places.index(one.branch), one.step)))


def _problem(error: pydantic.ValidationError) -> str:
    """The first, with its place: checkpoints are counted from 1, as a reader of the file does."""
    problem: Any = error.errors()[0]
    place = [f"{part + 1}" if isinstance(part, int) else str(part) for part in problem["loc"]]
    said = str(problem["msg"])
    said = "unknown key" if problem["type"] == "unexpected_keyword_argument" else said[0].lower() + said[1:]
    return f"{' '.join(place)}: {said}"


def _weights(folder: Folder) -> dict[str, tuple[int, ...]]:
    parts = sorted(folder.tensors.items())
    return {name: part.shape for name, part in parts if part.shape and not part.kind.startswith(_MASKS)}


def _check_alike(
    first: Folder, expected: Mapping[str, tuple[int, ...]], folder: Folder, got: Mapping[str, tuple[int, ...]]
) -> None:
    """That a folder has the tensors of the first one.

    Raises:
      UserError: it has not.
    """
    remedy = "list checkpoints of one architecture, saved alike"
    if strange := sorted(expected.keys() ^ got.keys()):
        has, lacks = (first, folder) if strange[0] in expected else (folder, first)
        raise UserError(f"{lacks.path} has no tensor {strange[0]!r}, which {has.path} has: {remedy}")
    for name, shape in got.items():
        if shape != expected[name]:
            raise UserError(
                f"{folder.path}: {name} has the shape {shape}, expected {expected[name]} as in {first.path}: {remedy}"
            )
    if not got:
        raise UserError(f"{folder.path} holds no weights: {remedy}")
