"""Files that are whole or absent, and are what was written.

Owns how anything reaches the disk (under a temporary name, fsynced, renamed) or an object store, the seals by which damage is
found, and what becomes of a damaged file. Knows nothing of what is written.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from natfp_jax import places
from natfp_jax.errors import Damaged, UserError

__all__ = [
    "MANIFEST",
    "canonical_json",
    "carried",
    "clear",
    "fetched",
    "hash_file",
    "hash_json",
    "manifest",
    "read_json",
    "read_remade",
    "set_aside",
    "sync",
    "verify",
    "whole_file",
    "write_json",
]

MANIFEST = "manifest.json"
_SEAL = "sha256"  # the last field of a JSON file: the hash of all others
_DAMAGED = ".damaged"


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Opens a temporary neighbour of `path`; on success it is fsynced and renamed to `path`, on failure it is removed.

    In an object store `path` is written at once, from a temporary file of this machine.
    """
    if places.remote(path):
        with tempfile.TemporaryDirectory() as folder:
            spool = Path(folder, "whole")
            with open(spool, mode, encoding=encoding) as file:
                yield file
            places.put(spool, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes the temporary files that a killed process left below a folder of its own."""
    if not places.remote(folder):
        for remains in folder.rglob(".*.tmp"):
            remains.unlink()


def sync(path: Path) -> None:
    """Makes the names in a folder, such as that of a file just renamed, survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- sealed JSON ------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as indented JSON with its seal, whole or not at all."""
    with whole_file(path, "w", encoding="utf-8") as file:
        file.write(_sealed(value))


def _sealed(value: dict[str, Any]) -> str:
    if _SEAL in value:
        raise ValueError(f"the field {_SEAL} is the seal's own")
    return json.dumps({**value, _SEAL: hash_json(value)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, remedy: str = "remove it") -> dict[str, Any]:
    """Reads what `write_json` has written; the seal is checked and left out.

    Args:
      remedy: what a user can do about a damaged file before running the same command again.

    Raises:
      UserError: the file is missing, or any byte of it is another.
    """
    try:
        return read_remade(path)
    except Damaged as damage:
        raise UserError(f"{damage}: {remedy} and run the same command again") from None


def read_remade(path: Path) -> dict[str, Any]:
    """`read_json` of a file that the program can make again.

    Raises:
      UserError: the file is missing.
      Damaged: any byte of it is another.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Damaged(path, f"is not valid JSON ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict) or _SEAL not in value:
        raise Damaged(path, f"is no JSON object with the seal {_SEAL!r}")
    seal = value.pop(_SEAL)
    # The text too: a changed space changes no value, but the file is not what was written.
    if seal != hash_json(value) or text != _sealed(value):
        raise Damaged(path, f"is not what was written: its contents have sha256 {hash_json(value)}, its seal says {seal}")
    return value


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def hash_json(value: Any) -> str:
    """sha256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# --- manifests --------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """sha256, in hexadecimal, of a file."""
    return _measured(path)["sha256"]


def _measured(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.seek(0, os.SEEK_END)}


def manifest(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Relative path → bytes and sha256 of the files `names` below `folder`: all of them by default, but its own manifest."""
    ordered = sorted(_below(folder) if names is None else names)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        found = pool.map(_measured, [folder / name for name in ordered])
        return {name: {"bytes": one["bytes"], "sha256": one["sha256"]} for name, one in zip(ordered, found, strict=True)}


def verify(folder: Path, listed: dict[str, dict[str, Any]], whole: bool = False) -> None:
    """Checks files below `folder` against their manifest; with `whole`, that there are no others.

    Raises:
      Damaged: one is missing, longer, shorter or different. `path` is the folder, the message names the file.
    """
    sizes = places.sizes(folder, listed)
    for name, expected in listed.items():
        if (size := sizes.get(name)) != expected["bytes"]:
            got = "is missing" if size is None else f"has {size} bytes"
            raise Damaged(folder, f"is damaged: {name} {got}, expected {expected['bytes']} bytes")
    if whole and (others := sorted(_below(folder) - set(listed))):
        raise Damaged(folder, f"is damaged: {others[0]} is not in its manifest")
    for name, found in manifest(folder, listed).items():
        if found["sha256"] != listed[name]["sha256"]:
            raise Damaged(folder, f"is damaged: {name} has sha256 {found['sha256']}, expected {listed[name]['sha256']}")


def _below(folder: Path) -> set[str]:
    return places.names(folder) - {MANIFEST}


# --- folders of an object store, on this machine ------------------------------------------------------------------------


def fetched(folder: Path, listed: dict[str, dict[str, Any]]) -> Path:
    """Where this machine has the files of a folder, checked against their manifest: there, or in a copy of one in a store.

    What of a copy is whole is not copied again.

    Raises:
      Damaged: one of the folder's files is not what was written.
    """
    if not places.remote(folder):
        verify(folder, listed)
        return folder
    own = places.here(folder)
    for name, expected in listed.items():
        file = own / name
        if file.is_file() and _measured(file) == expected:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=own) as space:
            copy = Path(space, "copy")
            try:
                places.copy_out(folder / name, copy)
            except FileNotFoundError:
                raise Damaged(folder, f"is damaged: {name} is missing, expected {expected['bytes']} bytes") from None
            if (found := _measured(copy)) != expected:
                said = f"has {found['bytes']} bytes and sha256 {found['sha256']}, expected {expected['sha256']}"
                raise Damaged(folder, f"is damaged: {name} {said}")
            os.replace(copy, file)
    return own


def carried(own: Path, folder: Path, names: Iterable[str]) -> None:
    """Writes files of a folder of this machine into one of a store, in their order: the last says that the others are there."""
    for name in names:
        places.put(own / name, folder / name)


def set_aside(path: Path) -> Path:
    """Renames a damaged file or folder, so that it is used no more and still can be looked at; returns its new name."""
    number, aside = 1, path.with_name(f"{path.name}{_DAMAGED}")
    while aside.exists():
        number, aside = number + 1, path.with_name(f"{path.name}{_DAMAGED}-{number + 1}")
    places.rename(path, aside)
    if not places.remote(path):
        sync(path.parent)
    return aside
