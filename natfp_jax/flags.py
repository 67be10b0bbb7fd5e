"""One process at a time, in an object store.

Owns how a folder of a store is held: nothing there can be locked, and no system gives up what a killed process held. So who
wants a folder looks whether another's flag is there, raises its own, an object of a name that no other ever has, and looks
again: of two that come at once at least one sees the other, as listings of a store are consistent at once, and lowers its
flag. A holder renews its own; a flag that was not renewed for `GONE` seconds, by the clock of who looks, is of a process that
is no more. So no clocks are compared. Must not know what is made in the folder.

    <folder>/<random>.json    a flag: whose it is, and how often it was renewed
    <folder>/<random>.gone    that its process was taken for gone: the flag counts no more, even if it is renewed
    <folder>/holder           who held the folder last, in words
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from natfp_jax.errors import UserError
from natfp_jax.progress import Progress
from natfp_jax.stopping import STOPPED

__all__ = ["GONE", "RENEWED", "holder", "proven", "raised", "seen"]

RENEWED, GONE = 15.0, 60.0  # seconds
_PAUSE = 0.5
_GONE = ".gone"
_HOLDER = "holder"  # written by who holds the folder, and by none that only looks


@contextlib.contextmanager
def raised(folder: Path, progress: Progress | None, wait: bool) -> Iterator[None]:
    """Holds `folder`, whose flags these are; the arguments are those of `lock.alone`.

    Raises:
      UserError: another process holds it, and is not waited for.
    """
    for attempt in itertools.count(1):
        _wait_for_none(folder, progress, wait)
        mine = folder / f"{uuid.uuid4().hex}.json"
        said = _myself()
        try:
            mine.write_text(_flag(said, 0))
        except Exception as error:  # of whatever library speaks to the store
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{folder.parent} cannot be written ({why}): check the bucket's name and the credentials") from None
        if [path.name for path in _others(folder)] == [mine.name]:
            break
        mine.unlink(missing_ok=True)
        time.sleep(_PAUSE * attempt * int(mine.name[:4], 16) / 2**16)  # of those that met here, one comes back first
    done = threading.Event()
    keeper = threading.Thread(target=_renew, args=(mine, said, done), daemon=True, name="natfp flag")
    keeper.start()
    try:
        (folder / _HOLDER).write_text(f"{said['holder']} {mine.name}")
        yield
    finally:
        done.set()
        keeper.join()
        mine.unlink(missing_ok=True)


def holder(folder: Path) -> str:
    """Who holds the folder now: the same words wherever they are read."""
    try:
        return (folder / _HOLDER).read_text()
    except FileNotFoundError:
        return "none"


def seen(folder: Path) -> bool:
    """Whether any flag is up: also that of a process that was killed."""
    return bool(_others(folder))


def proven(folder: Path) -> bool:
    """Whether a process holds the folder: its flag is watched until it is renewed, or has not been for `GONE` seconds."""
    watched = dict[str, tuple[str, float]]()
    while flags := _swept(folder, watched, None):
        if any(lives for _, lives in flags):
            return True
        time.sleep(_PAUSE)
    return False


def _others(folder: Path) -> list[Path]:
    try:
        there = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # no flag was ever raised
        return []
    gone = {path.stem for path in there if path.suffix == _GONE}
    return [path for path in there if path.suffix == ".json" and path.stem not in gone]


def _wait_for_none(folder: Path, progress: Progress | None, wait: bool) -> None:
    """Returns once no flag is up."""
    watched, told = dict[str, tuple[str, float]](), False
    while flags := _swept(folder, watched, progress):
        for found, lives in flags:
            if lives and not wait:
                where = folder.parent
                raise UserError(f"{where} is in use by another process ({found['holder']}): wait for it or stop it")
            if not told and progress is not None:
                said = "is" if lives else "may still be"
                progress.say(f"another process ({found['holder']}) {said} at work on {folder.parent}: waiting for it")
                told = True
        time.sleep(_PAUSE)


def _swept(
    folder: Path, watched: dict[str, tuple[str, float]], progress: Progress | None
) -> list[tuple[dict[str, Any], bool | None]]:
    """Removes the flags of processes that are no more; of the others whose they are, and whether these are known to be at work.

    `watched`: flag → what it said, and since when; to be given again.
    """
    left = list[tuple[dict[str, Any], bool | None]]()
    for path in _others(folder):
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        before, since = watched.setdefault(path.name, (text, time.monotonic()))
        found = _read(text)
        lives = True if before != text else _lives(found)
        if lives is False or (lives is None and time.monotonic() - since > GONE):
            if lives is None:  # it may come back
                path.with_suffix(_GONE).write_text("")
            path.unlink(missing_ok=True)
            if progress is not None:
                progress.say(f"{folder.parent} was left by {found['holder']}, which ended in its work: going on from there")
            continue
        if before != text:
            watched[path.name] = text, time.monotonic()
        left.append((found, lives))
    return left


def _renew(mine: Path, said: dict[str, Any], done: threading.Event) -> None:
    """Shows that this process is at work, and ends it once it must be taken for gone."""
    number, last, pause = 0, time.monotonic(), RENEWED
    while not done.wait(pause):
        number, why = number + 1, ", and another process may be at work there"
        try:
            mine.write_text(_flag(said, number))
            gone = mine.with_suffix(_GONE).exists()
            last, pause = time.monotonic(), RENEWED
        except Exception as error:  # of whatever library speaks to the store
            gone, why, pause = time.monotonic() - last > GONE - RENEWED, f" ({' '.join(str(error).split())[:200]})", 1
        if gone and not done.is_set():
            line = f"{mine.parent.parent} could not be held{why}; the same command goes on from here"
            print(f"natfp: {line}", file=sys.stderr, flush=True)
            os._exit(STOPPED)


# --- whose a flag is ----------------------------------------------------------------------------------------------------


def _flag(said: dict[str, Any], number: int) -> str:
    return json.dumps({**said, "renewed": number})


def _read(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
        return {"holder": str(found["holder"]), "machine": found.get("machine"), "process": found.get("process")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"holder": "unknown", "machine": None, "process": None}


def _myself() -> dict[str, Any]:
    said = {"holder": f"pid {os.getpid()} on {socket.gethostname()}", "machine": _machine()}
    return {**said, "process": [os.getpid(), _started(os.getpid())]}


def _lives(found: dict[str, Any]) -> bool | None:
    """Whether a flag's process is at work, where that is known: on its own machine."""
    if found["machine"] is None or found["machine"] != _machine():
        return None
    pid, started = found["process"]
    return _started(pid) == started


def _machine() -> str | None:
    """What numbers of processes are of: one start of one system, and what of it a container sees."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, which tells it from an earlier one of its number; None: there is none."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
