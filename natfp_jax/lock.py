"""One process at a time.

Owns the lock of a folder: waiting for another process that makes the same files, or refusing beside it. In an object store
it is another way (flags.py). Must not know what is made.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from natfp_jax import flags, places
from natfp_jax.errors import UserError
from natfp_jax.progress import Progress

__all__ = ["LOCK", "alone", "held", "holder"]

LOCK = ".lock"
_TRIES, _PAUSE = 5, 0.05  # seconds; `held` has a lock for a moment


@contextlib.contextmanager
def alone(folder: Path, progress: Progress | None = None, wait: bool = False) -> Iterator[None]:
    """Holds the lock of `folder`, which is created. A killed process holds nothing: the system gives its lock up.

    In an object store it is known within `flags.RENEWED` seconds whether another process holds it, and within `flags.GONE`
    that one was killed; on the machine that it was on, at once.

    Args:
      progress: where given, a lock that a killed process left is told of here.
      wait: another holder is waited for.

    Raises:
      UserError: another process holds it, and is not waited for.
    """
    if places.remote(folder):
        with flags.raised(folder / LOCK, progress, wait):
            yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # what some systems say of a folder in which nothing can be made, such as /proc
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --out") from None
    with open(folder / LOCK, "a+") as file:
        if not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if not wait:
                raise UserError(f"{folder} is in use by another process ({holder}): wait for it or stop it")
            if progress is not None:
                progress.say(f"another process ({holder}) is at work on {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if (stale := file.read().strip()) and progress is not None:
            progress.say(f"{folder} was left by {stale}, which ended in its work: going on from there")
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        os.fsync(file.fileno())  # other hosts read it over NFS while it is open here
        try:
            yield
        finally:
            file.truncate(0)


def _taken(file: IO[str]) -> bool:
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        except OSError as error:  # a network file system without locks
            where = os.path.dirname(file.name)
            raise UserError(f"{where} is on a file system without locks ({error.strerror}): give another --out") from None
        else:
            return True
    return False


def holder(folder: Path) -> str:
    """Who holds the lock of `folder`, which is held, in words that are the same for all who see the same folder."""
    if places.remote(folder):
        return flags.holder(folder / LOCK)
    lock = folder / LOCK
    return lock.read_text() if lock.exists() else "none"


def held(folder: Path, proven: bool = False) -> bool:
    """Whether some process holds the lock of `folder` now.

    Args:
      proven: in an object store, where a process that was killed seems to hold it still, it is waited until that is known.
    """
    if places.remote(folder):
        return flags.proven(folder / LOCK) if proven else flags.seen(folder / LOCK)
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
