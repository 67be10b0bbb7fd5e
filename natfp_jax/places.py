"""Where folders lie: on this machine, or in an object store such as `gs://bucket/folder`.

Owns what the two do not share. A store has no folders, only names with slashes; its objects appear whole, in a listing at once,
and cannot be renamed, locked, appended to or mapped into memory. Everything else of a place in a store is that of a `Path`.
Must not know what is kept where.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from natfp_jax.errors import UserError

__all__ = ["cache", "check", "copy_out", "here", "make", "names", "place", "put", "remote", "remove", "rename", "sizes"]

_EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme → the extra of this package that brings what speaks it
_STREAMS = 16  # objects that are asked for at once


def place(text: str) -> Path:
    """The folder or file of that name. In a store it is one of `universal_pathlib`, which behaves as a `Path`.

    Raises:
      UserError: what speaks to that store is not installed, or there is no such kind.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text)
    scheme = "gs" if scheme == "gcs" else scheme  # two names of one store
    if scheme in ("file", "local") or not rest.strip("/"):
        raise UserError(f"{text} is no place in an object store: give a folder, or one such as gs://bucket/folder")
    try:
        import fsspec
        from upath import UPath

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        needed = f"pip install 'natfp-jax[{extra}]'" if extra else " ".join(str(error).split())
        raise UserError(f"{text} needs what is not installed: {needed}") from None
    except ValueError:
        raise UserError(
            f"{text}: no object store is called {scheme}://: give a folder, or one such as gs://bucket/folder"
        ) from None
    for name in {scheme, _EXTRAS.get(scheme, scheme)}:  # Orbax makes a connection of its own, by the other name
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False  # others' objects are to be seen at once
    return cast(Path, UPath(f"{scheme}://{rest.strip('/')}"))


def remote(path: Path) -> bool:
    """Whether it is in an object store."""
    return not isinstance(path, Path)


def check(folder: Path) -> None:
    """Raises a UserError if the store of a folder does not answer."""
    if not remote(folder):
        return
    try:
        next(iter(folder.glob("*")), None)
    except Exception as error:  # of whatever library speaks to that store
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{folder} cannot be reached ({said}): check the bucket's name and this machine's credentials"
        ) from None


def cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "natfp_jax"


def here(folder: Path) -> Path:
    """Where a folder is worked on: itself, or for one in a store a folder of the same name on this machine."""
    if not remote(folder):
        return folder
    return cache() / "places" / sha256(str(folder.parent).encode()).hexdigest()[:16] / folder.name


# --- what only folders of a file system need, and what stores do in another way -----------------------------------------


def make(folder: Path) -> None:
    """Makes a folder; in a store there is none to be made."""
    if not remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def sizes(folder: Path, wanted: Iterable[str]) -> dict[str, int]:
    """Name → bytes of those of the `wanted` files that are below a folder."""
    if not remote(folder):
        paths = {name: folder / name for name in wanted}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    found = _listed(folder)
    return {name: found[name] for name in wanted if name in found}


def names(folder: Path) -> set[str]:
    """The files below a folder, relative to it."""
    if not remote(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return set(_listed(folder))


def _listed(folder: Path) -> dict[str, int]:
    """Name → bytes of all objects below a folder of a store."""
    above = _key(folder).rstrip("/") + "/"
    found = _store(folder).find(above, detail=True)
    return {name.removeprefix(above): int(entry["size"]) for name, entry in found.items() if name.startswith(above)}


def put(file: Path, path: Path) -> None:
    """Writes a file of this machine into a store, whole."""
    _store(path).put_file(str(file), _key(path))


def copy_out(path: Path, file: Path) -> None:
    """Copies an object to a file of this machine.

    Raises:
      FileNotFoundError: there is none.
    """
    _store(path).get_file(_key(path), str(file))


def rename(path: Path, target: Path) -> None:
    """Renames a file or folder. In a store it is copied and then removed: a process killed meanwhile leaves parts of both."""
    if not remote(path):
        path.rename(target)
        return
    below = names(path)
    pairs = [(path / name, target / name) for name in below] or [(path, target)]
    _each(lambda pair: _store(path).cp_file(*map(_key, pair)), pairs)
    if below:
        remove(path)
    else:
        path.unlink()


def remove(folder: Path, first: str = "") -> None:
    """Removes a folder of a store, and its files named `first` before all others: what says that the rest is whole."""
    below = names(folder)
    for some in ({name for name in below if name.rpartition("/")[2] == first}, below):
        _each(lambda name: _unlink(folder / name), some)
        below -= some
    with contextlib.suppress(FileNotFoundError):  # some stores have folders all the same
        _store(folder).rm(_key(folder), recursive=True)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process may remove the same
        _store(path).rm_file(_key(path))


def _each(action: Callable[[Any], Any], of: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(action, of))


def _store(path: Any) -> Any:
    """The file system of fsspec that a path is of."""
    return path.fs


def _key(path: Any) -> str:
    """Its name there."""
    return str(path.path)
