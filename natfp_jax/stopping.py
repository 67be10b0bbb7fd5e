"""What a signal does.

Owns SIGTERM and Ctrl-C: they end the process at once where every file is whole or absent, and ask for a stop where there is
something to save first. Must not know what is saved.
"""

import contextlib
import os
import signal
import threading
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
        """Answers signals inside of the context, in a thread: Python's own handlers wait for the end of a call into JAX.

        An exception, Python's own answer to Ctrl-C, is lost where it is raised inside a callback of JAX, and becomes a
        traceback in threads of Orbax.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        ours = [n for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
        if not ours:  # the caller has its own way with them
            yield
            return
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        outer = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

        def listen() -> None:
            while number := os.read(told, 1):
                if number[0] in ours:
                    self._answer()

        listener = threading.Thread(target=listen, daemon=True, name="natfp signals")
        listener.start()
        for number in ours:
            signal.signal(number, lambda *_: None)  # the system tells the thread
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])
            signal.set_wakeup_fd(outer)
            os.close(tell)
            listener.join()
            os.close(told)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal only sets `requested`; whoever asks for that saves and raises `Stopped`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _answer(self) -> None:
        if self._deferred and not self.requested:
            self.requested = True
            os.write(2, _SOON.encode())
            return
        cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a bar of progress hides it
        os.write(2, f"{cursor}{_LINE}".encode())
        os._exit(STOPPED)
