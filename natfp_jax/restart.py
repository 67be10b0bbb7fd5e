"""Restart states: what a cohort that was stopped or killed goes on from.

Owns where they lie and how long. A state is known by the arms that it is of, in their order; it stays until none of them wants
it any more, however they are grouped by then. Whoever holds the lock of one of its arms may read and remove it: to write it
takes the locks of all. Must not know what is in a state.

    <root>/<arms>/<step>/             a checkpoint
    <root>/<arms>/wanted/<arm>        one empty file for each arm that may still go on from here
"""

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from natfp_jax import checkpoint, files, places

__all__ = ["claim", "folder", "found", "release"]


def folder(root: Path, arms: Sequence[str]) -> Path:
    """Of the states of these arms, by their fingerprints."""
    return root / files.hash_json(list(arms))[:16]


def claim(root: Path, arms: Sequence[str], after: int) -> None:
    """Makes the folder ready for states of these arms, and removes those past step `after`: they will be made again."""
    _clear(root)
    place = folder(root, arms)
    for arm in arms:
        places.make(place / "wanted")
        (place / "wanted" / arm).touch()
    for step in checkpoint.steps(place):
        if step > after:
            checkpoint.remove(place, step)


def found(root: Path, arms: Iterable[str], locked: bool = True) -> list[tuple[Path, int]]:
    """Folder and step of all states that are wanted by one of these arms, whatever others they are of.

    Args:
      locked: whether the arms are locked; else others may be saving.

    Raises:
      Damaged: a state has no manifest.
    """
    whole = checkpoint.steps if locked else checkpoint.sealed
    return [(place, step) for place in sorted(_wanted(root, arms)) for step in whole(place)]


def release(root: Path, arms: Sequence[str]) -> None:
    """Forgets what these arms could go on from; a state that no arm wants any more is removed."""
    for place in _wanted(root, arms):
        # Another command may do the same for the last other arm: both then find nothing left.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if {mark.name for mark in (place / "wanted").iterdir()} <= set(arms):
                _remove(place)
                continue
            for arm in arms:
                (place / "wanted" / arm).unlink(missing_ok=True)
            if not any((place / "wanted").iterdir()):
                _remove(place)


def _wanted(root: Path, arms: Iterable[str]) -> set[Path]:
    return {path.parent.parent for arm in arms for path in root.glob(f"[!.]*/wanted/{arm}")}


def _clear(root: Path) -> None:
    """Removes what a killed process was removing."""
    if not places.remote(root):
        for remains in root.glob(".*.removed"):
            shutil.rmtree(remains, ignore_errors=True)
        return
    below = list(root.iterdir()) if root.is_dir() else []
    wanted = {path.parent.parent.name for path in root.glob("*/wanted/*")}  # then: who begins a folder says first who wants it
    for remains in (path for path in below if path.name not in wanted and ".damaged" not in path.name):
        places.remove(remains)


def _remove(place: Path) -> None:
    """At once: a process that is killed leaves no part of it under its own name, or in an object store none that is wanted."""
    if places.remote(place):
        places.remove(place / "wanted")
        places.remove(place, files.MANIFEST)
        return
    hidden = place.with_name(f".{place.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    place.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
