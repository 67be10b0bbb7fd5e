"""What a signal does.

Owns SIGTERM and Ctrl-C: they end the process at once where every file is whole or absent, and ask for a stop where there is
something to save first. Must not know what is saved.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

__all__ = ["STOPPED", "Stop"]

STOPPED = 75  # exit code: sysexits' EX_TEMPFAIL, "try the same again"; schedulers can be told to requeue on it
_LINE = "natfp: stopped; the same command goes on from here\n"
_SOON = "natfp: stopping once the next step is saved; a second signal stops at once\n"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether a signal has asked for a stop."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Answers signals inside of the context.

        An exception, Python's own answer to Ctrl-C, is lost where it is raised inside a callback of JAX, and becomes a
        traceback in threads of Orbax.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        ours = [n for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
        for number in ours:  # else the caller has its own way with it
            signal.signal(number, self._answer)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal only sets `requested`; whoever asks for that saves and raises `Stopped`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _answer(self, *_: object) -> None:
        if self._deferred and not self.requested:
            self.requested = True
            os.write(2, _SOON.encode())
            return
        cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a bar of progress hides it
        os.write(2, f"{cursor}{_LINE}".encode())
        os._exit(STOPPED)
