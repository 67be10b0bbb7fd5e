"""Many processes as one program.

Owns their start-up, what the first one does for all, agreement between them, values that are spread over them, and the watch
over lost ones. With one process everything here is trivial. Must not know what is computed.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from natfp_jax.errors import Damaged, Stopped, UserError
from natfp_jax.launcher import Launch
from natfp_jax.places import place

__all__ = [
    "LOST",
    "agree",
    "barrier",
    "first",
    "gathered",
    "is_loss",
    "leading",
    "leave",
    "led",
    "lost",
    "many",
    "most",
    "start",
    "together",
    "watched",
]

LOST = 75  # exit code: sysexits' EX_TEMPFAIL, "try the same again"
_ALL_TIME_MS = 30 * 24 * 3600 * 1000  # a wait for work whose length is not known; a lost process ends it
_LOSS = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Gg]loo|NCCL|[Cc]onnection|heartbeat|[Pp]eer|another task")
_ARGUMENTS = "give --coordinator, --processes and --process"
_COUNTED = ("arguments", "skypilot", "slurm", "ompi")  # a TPU's host, or a job of Kubernetes, may be the only one
_BLOCK = 4096  # bytes; texts of many lengths are broadcast in few shapes, each of which is compiled
_turn = 0  # of the waits that all processes do in the same order: names a barrier once

Value = TypeVar("Value")


def start(launch: Launch | None, heartbeat_seconds: int) -> None:
    """Joins the other processes; to be called before anything is computed.

    A process alone also joins, itself, where the host's CPU stands for several devices: it then sums as many processes do, and
    its weights are bitwise theirs.

    Ends the process with the code `LOST` where the others do not come in three times `heartbeat_seconds`: the runtime would
    wait longer and end it without a word.

    Raises:
      UserError: the launcher's environment is not what JAX expects.
    """
    # A signal must reach our own handlers: training stops at a step that all processes agree on, and other stages at once.
    jax.config.update("jax_enable_preemption_service", False)
    # The runtime ends a process without a word, so our own watch, which says why, comes first.
    limits = {"heartbeat_timeout_seconds": 3 * heartbeat_seconds, "shutdown_timeout_seconds": heartbeat_seconds}
    if launch is None:
        if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
            with contextlib.suppress(UserError):  # who computes before is alone, and the numerics record says how it sums
                _join(60, coordinator_address=f"localhost:{_free_port()}", num_processes=1, process_id=0, **limits)
        return
    given = {}
    if launch.coordinator is not None:
        given = {"coordinator_address": launch.coordinator, "num_processes": launch.processes, "process_id": launch.process}
        given["cluster_detection_method"] = "deactivate"
    _join(3 * heartbeat_seconds, **given, **limits)
    if launch.method in _COUNTED and launch.processes != 1 and not many():
        raise UserError(f"JAX found one process where {launch.method} says that there are more: {_ARGUMENTS}")


def _join(seconds: int, **arguments: Any) -> None:
    # XLA's programs for CPUs, once they come from the compilation cache, start sums that do not depend on one another in an
    # order of each device's own, and gloo then takes one for the other (jax 0.10.2: 5 of 5 runs of 8 devices aborted).
    flag, before = "--xla_cpu_enable_concurrency_optimized_scheduler=false", os.environ.get("XLA_FLAGS", "")
    if flag not in before:
        os.environ["XLA_FLAGS"] = f"{before} {flag}".strip()

    def late() -> None:
        where = arguments.get("coordinator_address", "the address that the launcher gives")
        line = f"the other processes did not come to {where} in {seconds} s: start all of them again, where all can reach that"
        print(f"natfp: {line}", file=sys.stderr, flush=True)
        os._exit(LOST)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=2 * seconds)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        os.environ["XLA_FLAGS"] = before  # where JAX was at work already, the flag has no effect, and is not to be recorded
        why = " ".join(str(error).split())[:300]
        raise UserError(f"the other processes cannot be joined ({why}): check the launcher and the address") from None
    finally:
        timer.cancel()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def first() -> bool:
    """Whether this is the process that writes files and speaks for all."""
    return jax.process_index() == 0


def many() -> bool:
    """Whether there are several."""
    return jax.process_count() > 1


# --- together ---------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Waits until every process is here."""
    global _turn
    if jax.process_count() > 1:
        _turn += 1
        multihost.get_barrier_sync_fn()(key=f"natfp-{_turn}", timeout_ms=_ALL_TIME_MS)


def led(action: Callable[[], Value]) -> Value:
    """Does `action` on the first process alone, while the others wait; its result, a JSON value, is everyone's.

    What is read of files and then decided upon goes through this: on a shared file system the processes may see a file at
    different times, and would then go different ways.

    Raises:
      UserError, Damaged: what `action` raised, on every process.
    """
    if jax.process_count() == 1:
        try:
            return action()
        except UserError as error:
            raise _agreed(error) from None
    told: dict[str, Any] = {}
    failure: BaseException | None = None
    if first():
        try:
            told = {"value": action()}
        except Damaged as error:
            told, failure = {"damaged": str(error.path), "why": error.why}, _agreed(error)
        except UserError as error:
            told, failure = {"error": str(error)}, _agreed(error)
        except Exception as error:
            told, failure = {"error": f"the first process failed ({type(error).__name__}); it says why"}, error
    barrier()
    told = json.loads(_broadcast(json.dumps(told)))
    if failure is not None:
        raise failure
    if "damaged" in told:
        raise _agreed(Damaged(place(told["damaged"]), told["why"]))
    if "error" in told:
        raise _agreed(UserError(told["error"]))
    value: Value = told["value"]
    return value


def _agreed(error: UserError) -> UserError:
    error.agreed = True
    return error


@contextlib.contextmanager
def leading(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enters `context` on the first process alone, before any process goes on."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        led(enter)
        yield


def _broadcast(text: str) -> str:
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(text.encode()))))
    data = np.zeros(-(-size // _BLOCK) * _BLOCK, np.uint8)
    if first():
        data[:size] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)[:size]).decode()


def agree(what: dict[str, str]) -> None:
    """Checks that all processes have the same `what`: name → value.

    Raises:
      UserError: on every process, naming the first value that differs, and whose it is.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps([socket.gethostname(), what]).encode()
    size_P = np.asarray(multihost_utils.process_allgather(np.int64(len(mine))))
    data = np.zeros(-(-int(size_P.max()) // _BLOCK) * _BLOCK, np.uint8)
    data[: len(mine)] = np.frombuffer(mine, np.uint8)
    data_PN = np.asarray(multihost_utils.process_allgather(data), np.uint8)
    said = [json.loads(bytes(row[:size]).decode()) for row, size in zip(data_PN, size_P.tolist(), strict=True)]
    host, expected = said[0]
    for process, (other, found) in enumerate(said):
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                raise _agreed(
                    UserError(
                        f"process {process} on {other} has another {name} than process 0 on {host}: {found.get(name)} and "
                        f"{expected.get(name)}; start all processes with the same code, command and files"
                    )
                )


def most(value: int) -> int:
    """The largest of all processes' values."""
    return int(value) if not many() else int(np.max(multihost_utils.process_allgather(np.int64(value))))


def together(error: BaseException | None) -> bool:
    """Whether every process comes to the same error: a stop, or what all know of; one alone always does."""
    return not many() or isinstance(error, Stopped) or (isinstance(error, UserError) and error.agreed)


def gathered(tree: Any) -> Any:
    """The values of arrays that may be spread over processes, whole, on the host of every process."""

    def one(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


# --- lost processes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(heartbeat_seconds: int) -> Iterator[None]:
    """Ends this process, with a line that says so and the code `LOST`, once another has not answered for that long.

    A network that is cut leaves a collective waiting for ever, and the runtime ends the process in its own way; threads that
    meet those of other processes at barriers find it out sooner.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    every = heartbeat_seconds / 5
    meet = multihost.get_barrier_sync_fn()
    met = time.monotonic()

    def beat() -> None:
        nonlocal met
        number = 0
        while not done.is_set():
            number += 1
            try:
                meet(key=f"natfp-beat-{number}", timeout_ms=int(1000 * (heartbeat_seconds - every)))
            except Exception as error:  # whatever the runtime makes of it
                if not done.wait(0.5):  # where all have come to the end, some leave before others
                    lost(" ".join(str(error).split())[:200])
            met = time.monotonic()
            done.wait(every)

    def watch() -> None:
        # A barrier ends in time at the first process alone: to the others its answer may not come, and they go by their clock.
        while not done.wait(every / 5):
            if (silent := time.monotonic() - met) > heartbeat_seconds:
                lost(f"no answer for {silent:.0f} s")

    for work in (beat, watch):
        threading.Thread(target=work, daemon=True, name=f"natfp {work.__name__}").start()
    try:
        yield
        barrier()
    finally:
        done.set()


def leave(code: int, together: bool) -> NoReturn:
    """Ends the process at once: its usual end would wait for the others.

    Args:
      together: all of them leave now. The first one then goes last: the runtime of the others ends them, in its own way, as
        soon as it is gone.
    """
    if together and many():
        with contextlib.suppress(Exception):  # those that are gone already cannot be waited for
            multihost.get_barrier_sync_fn()(key="natfp-leave", timeout_ms=5000)
        if first():
            time.sleep(0.5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_loss(error: BaseException) -> bool:
    """Whether an error is the runtime's over a process that is gone, which it raises as several types."""
    kinds = (jax.errors.JaxRuntimeError, ValueError, RuntimeError)
    return many() and isinstance(error, kinds) and _LOSS.search(str(error)) is not None


def lost(why: str) -> NoReturn:
    """Ends the process: another one is gone. Clean-up would wait for it."""
    where = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    print(f"natfp: {where} has lost another process ({why}); the same command goes on from here", file=sys.stderr, flush=True)
    leave(LOST, together=False)
