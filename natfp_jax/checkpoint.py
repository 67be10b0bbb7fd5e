"""Checkpoints: Orbax behind one small face, and the manifests that make them tell the truth.

Owns how a training state and its record lie on disk. A step is whole once its manifest is there: sha256 over every file of
it, written after Orbax has committed, checked before anything is restored. Orbax alone restores flipped bits without a word.
Must not know what is in a state, nor when one is taken.

    <folder>/<step>/params/, optimiser/     Orbax's
    <folder>/<step>/manifest.json           the record of the step, and the hash of every file
"""

import contextlib
import errno
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import orbax.checkpoint as ocp

from natfp_jax import files, places, processes
from natfp_jax.errors import Damaged, UserError
from natfp_jax.files import MANIFEST

__all__ = ["Checkpoints", "record", "remove", "restore", "sealed", "steps", "verify", "with_shardings"]

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every step of a save as news

_ITEMS = ("params", "optimiser")


# --- reading ----------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """The steps that are whole, ascending, where no other process is at work.

    Raises:
      Damaged: a step has no manifest.
    """
    found = _folders(folder)
    for step in found:
        if not (folder / str(step) / MANIFEST).exists():
            raise Damaged(folder / str(step), f"has no {MANIFEST}: the process was stopped while it saved this step")
    return found


def sealed(folder: Path) -> list[int]:
    """The steps that are whole, ascending, where another process may be at work: what it is saving is no damage."""
    return [step for step in _folders(folder) if (folder / str(step) / MANIFEST).exists()]


def _folders(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a step.

    Raises:
      Damaged: its manifest is not what was written, or is of another step.
    """
    found: dict[str, Any] = _manifest(folder, step)["record"]
    return found


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    place = folder / str(step)
    try:
        listed = files.read_remade(place / MANIFEST)
    except Damaged as damage:
        raise Damaged(place, f"is damaged: its {MANIFEST} {damage.why}") from None
    if listed["record"]["step"] != step:
        raise Damaged(place, f"holds step {listed['record']['step']}")
    return listed


def verify(folder: Path, step: int, item: Literal["params"] | None = None) -> None:
    """Checks every file of a step, or of one item of it, against its manifest.

    Raises:
      Damaged: one is not what was written.
    """
    listed = _manifest(folder, step)["files"]
    some = {name: entry for name, entry in listed.items() if item is None or name.startswith(f"{item}/")}
    files.verify(folder / str(step), some, whole=item is None)


def restore(folder: Path, step: int, params: Any, optimiser: Any = None) -> tuple[Any, Any]:
    """The parameters, and the optimiser state if asked for, of the given shapes and shardings; `verify` comes before it.

    Raises:
      UserError: there is no such step.
      Damaged: Orbax cannot read it.
    """
    if not (folder / str(step) / MANIFEST).exists():
        raise UserError(f"{folder} has no checkpoint at step {step}, only {steps(folder)}: train it first")

    items = {"params": params} if optimiser is None else {"params": params, "optimiser": optimiser}
    place = folder / str(step)
    if not _direct(folder):
        listed = _manifest(folder, step)["files"]
        place = files.fetched(place, {name: entry for name, entry in listed.items() if name.split("/")[0] in items})

    def item(name: str) -> Any:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(_orbax(place / name), items[name])

    try:
        return item("params"), None if optimiser is None else item("optimiser")
    except Exception as error:  # Orbax raises whatever it likes over a damaged file
        if processes.is_loss(error) or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # which says nothing of the file
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Damaged(folder / str(step), f"cannot be restored ({why})") from error
    finally:
        if not _direct(folder):
            shutil.rmtree(place)


def _direct(folder: Path) -> bool:
    """Whether Orbax reads and writes there by itself, every process its own part: in file systems, and in Google's store."""
    return not places.remote(folder) or str(folder).startswith("gs://")


def _orbax(folder: Path) -> Any:
    return str(folder) if places.remote(folder) else folder.absolute()


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes together with where each array is to lie."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def remove(folder: Path, step: int) -> None:
    """Removes a step: there is never half of one under its own name; in an object store never with its manifest."""
    if places.remote(folder):
        places.remove(folder / str(step), MANIFEST)
        return
    hidden = folder / f".{step}.removed"
    shutil.rmtree(hidden, ignore_errors=True)  # of a killed process
    (folder / str(step)).rename(hidden)
    shutil.rmtree(hidden)


# --- writing ----------------------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes the checkpoints of one folder. A context manager; with many processes, used by all of them alike.

    Saving goes on beside training: `save` returns once the state is copied, `settle` seals what is on disk.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """`keep`: how many steps stay; older ones are removed. None: all.

        Raises:
          UserError: many processes cannot save there together.
        """
        self.folder, self._keep, self._own = folder, keep, folder
        if not _direct(folder):  # a step is saved on this machine, and carried there when it is sealed
            if processes.many():
                raise UserError(
                    f"{folder}: many processes can save together below gs:// and in a folder, not there", agreed=True
                )
            self._own = places.here(folder)
            shutil.rmtree(self._own, ignore_errors=True)  # of a killed process
        self._manager = ocp.CheckpointManager(
            _orbax(self._own),
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=True,
                # Several folders may be saved at once, and processes need not come to their ends in the same order.
                multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix="-".join(folder.parts[-2:])),
            ),
            item_names=_ITEMS,
        )
        self._hashing = ThreadPoolExecutor(1)
        self._saving: tuple[int, dict[str, Any]] | None = None
        self._sealing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            # After an error too, so that what was saved before it counts; not where the other processes do not know of it.
            if kind is None or (issubclass(kind, Exception) and processes.together(value)):
                with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                    self.settle(wait=True)
                    self._manager.close()
        finally:
            self._hashing.shutdown()

    def save(self, step: int, params: Any, optimiser: Any, record: dict[str, Any]) -> None:
        """Saves one step, beside what follows.

        Raises:
          UserError: there is no room for it. What went before is as it was.
        """
        self.settle(wait=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, optimiser)))
        processes.led(lambda: self.check_room(needed))
        args = {"params": ocp.args.StandardSave(params)}
        if optimiser is not None:  # of what is not trained there is none
            args["optimiser"] = ocp.args.StandardSave(optimiser)
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)  # forced: an earlier step may be asked for later
        self._saving = step, record

    def check_room(self, needed: int) -> None:
        """Raises a UserError if there is no room for so many bytes: Orbax would find out in the middle, in many threads."""
        if places.remote(self._own):
            return
        self._own.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self._own).free) < needed:
            raise UserError(
                f"{self._own}: {os.strerror(errno.ENOSPC)}: what is saved takes {needed} bytes, {free} are free: make room "
                "or give another --out, then run the same command again"
            )

    def settle(self, wait: bool = False) -> None:
        """Seals the step that was saved last, if it is committed; with `wait`, returns once it is."""
        if self._saving is not None and (wait or not self._manager.is_saving_in_progress()):
            step, record = self._saving
            self._saving = None  # Orbax tells of a failure once: asked again, it would let a step be sealed that is not there
            self._manager.wait_until_finished()  # where it is finished, this alone tells of a commit that failed
            self._manager.check_for_errors()
            if processes.first():
                self._sealing = self._hashing.submit(self._seal, step, record)
        if self._sealing is not None and (wait or self._sealing.done()):
            self._sealing.result()
            self._sealing = None
        if wait:
            processes.barrier()

    def _seal(self, step: int, record: dict[str, Any]) -> None:
        place, saved = self.folder / str(step), self._own / str(step)
        listed = files.manifest(saved)
        if saved != place:
            files.carried(saved, place, listed)
            shutil.rmtree(saved)
        files.write_json(place / MANIFEST, {"record": record, "files": listed})
        if self._keep is not None:
            for old in steps(self.folder)[: -self._keep]:
                remove(self.folder, old)
