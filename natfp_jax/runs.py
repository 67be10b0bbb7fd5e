"""The folder of a run: `runs/<fingerprint>/`.

Owns what lies in it (experiment.json, checkpoints/, metrics.jsonl, lineage.json) and whose it is. Must not know how training
works.
"""

import json
import time
import zlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from natfp_jax import checkpoint, files, places
from natfp_jax.config import Experiment, to_json
from natfp_jax.errors import Damaged, UserError
from natfp_jax.files import canonical_json
from natfp_jax.lineage import Identity
from natfp_jax.lock import LOCK

__all__ = ["MetricsLog", "RunFolder", "damaged_lines", "metrics"]

_LINES_SECONDS = 60


@dataclass(frozen=True)
class RunFolder:
    """One run on disk, shared by every study that needs the experiment."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the kept checkpoints, which belong to the experiment."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log of the training, a JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def _lineage(self) -> Path:
        return self.folder / "lineage.json"

    @property
    def finished(self) -> bool:
        """Whether its training has come to an end; also where lineage.json cannot be read."""
        try:
            return self._lineage.exists() and files.read_remade(self._lineage)["metrics"] is not None
        except Damaged:
            return True

    def complete(self, steps: list[int]) -> bool:
        """Whether all of `steps` are kept and their lineage is gathered; another study may be adding more.

        Raises:
          Damaged: lineage.json is not what was written.
        """
        if self.missing(steps) or not self._lineage.exists():
            return False
        return set(steps) <= {record["step"] for record in files.read_remade(self._lineage)["checkpoints"]}

    def missing(self, steps: list[int]) -> list[int]:
        """Those of `steps` that have no checkpoint yet, ascending."""
        return sorted(set(steps) - set(checkpoint.sealed(self.checkpoints)))

    def owner(self) -> str:
        """The fingerprint of the experiment that the folder says it is of."""
        owner = files.read_json(self.folder / "experiment.json", f"move {self.folder} away")
        return str(owner["fingerprint"])

    def check_owner(self, identity: Identity) -> None:
        """Checks that the folder is not another experiment's.

        Raises:
          UserError: it is.
        """
        path = self.folder / "experiment.json"
        if path.exists() and (owner := self.owner()) != identity.fingerprint:
            raise UserError(
                f"{self.folder} holds the run {owner}, expected {identity.fingerprint}: move it away or give another --out"
            )

    def claim(self, experiment: Experiment, identity: Identity) -> None:
        """Writes whose folder this is, or checks it.

        Raises:
          UserError: it is another experiment's, or holds files of no known owner.
        """
        path = self.folder / "experiment.json"
        others = [other for other in self.folder.iterdir() if other.name != LOCK] if self.folder.is_dir() else []
        remains = [other for other in others if fnmatch(other.name, ".*.tmp")]  # of a killed process
        self.check_owner(identity)
        if not path.exists() and len(others) > len(remains):
            raise UserError(f"{self.folder} is not empty and has no experiment.json: move it away or give another --out")
        if not path.exists():
            owner_record = {"fingerprint": identity.fingerprint, "inputs": identity.inputs, "experiment": to_json(experiment)}
            files.write_json(path, owner_record)
        for other in remains:
            other.unlink()

    def record(self, step: int) -> dict[str, Any]:
        """What was recorded with the kept checkpoint at `step`.

        Raises:
          Damaged: it is not what was written, or is another experiment's.
        """
        found = checkpoint.record(self.checkpoints, step)
        owner = self.owner()
        if found["fingerprint"] != owner:
            place = self.checkpoints / str(step)
            raise Damaged(place, f"is a checkpoint of the experiment {found['fingerprint']}, expected {owner}")
        return found

    def records(self) -> list[dict[str, Any]]:
        """The records of all kept checkpoints, by step."""
        return [self.record(step) for step in checkpoint.steps(self.checkpoints)]

    def reopen(self) -> None:
        """Says in lineage.json, if the run was finished, that it goes on: the checkpoints that are there stand, not the log."""
        if self._lineage.exists():
            written, there = files.read_remade(self._lineage), checkpoint.steps(self.checkpoints)
            stand = [record for record in written["checkpoints"] if record["step"] in there]
            files.write_json(self._lineage, {**written, "checkpoints": stand, "metrics": None})

    def finish(self, identity: Identity) -> None:
        """Gathers the records of all checkpoints in lineage.json, and sorts the log."""
        _write(self.metrics, metrics(self.metrics)[0])  # a checkpoint that was made again has its line at the end
        log = {"lines": len(metrics(self.metrics)[0]), "sha256": files.hash_file(self.metrics)}
        lineage = {
            "fingerprint": identity.fingerprint,
            "inputs": identity.inputs,
            "checkpoints": self.records(),
            "metrics": log,
        }
        files.write_json(self._lineage, lineage)

    def damaged_metrics(self) -> str | None:
        """What is wrong with the log of a finished run, in words; while it goes on there is nothing to hold it to."""
        expected = files.read_remade(self._lineage)["metrics"]
        if expected is None:
            return None
        lines, damaged = metrics(self.metrics)
        if self.metrics.exists() and files.hash_file(self.metrics) == expected["sha256"]:
            return None
        return (
            f"{self.metrics} has {len(lines)} whole lines and {damaged} damaged ones, expected {expected['lines']} whole ones"
        )


def metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a log, by step, and the number of others."""
    found, damaged = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        line = _checked(text)
        if line is None:
            damaged += 1
        else:
            found.append(line)
    return sorted(found, key=lambda line: (line["step"], "val_loss" in line)), damaged


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    with files.whole_file(path, "w", encoding="utf-8") as file:
        file.writelines(f"{_line(line)}\n" for line in lines)


def damaged_lines(path: Path) -> int:
    """How many lines of a log are not what was written, but for a last one that a kill has cut."""
    found = metrics(path)[1]
    return found - (found > 0 and not path.read_bytes().endswith(b"\n"))


def _checked(text: bytes) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
        crc = line.pop("crc32")
    except (ValueError, KeyError, AttributeError):
        return None
    return line if text.decode() == _line(line) and crc == _crc(line) else None


def _crc(line: dict[str, Any]) -> str:
    return f"{zlib.crc32(canonical_json(line).encode()):08x}"


def _line(line: dict[str, Any]) -> str:
    return json.dumps({**line, "crc32": _crc(line)})


class MetricsLog:
    """metrics.jsonl, a line a logged step, and TensorBoard where asked for.

    Lines of steps after `after` up to `until`, which are trained again, are dropped; later ones, of a run that was finished
    before an earlier checkpoint was asked for, stay. Damaged lines, such as a last one that a kill cut, are dropped too.

    In an object store nothing can be appended: the log is written anew every `_LINES_SECONDS`, and by `settle`.
    """

    def __init__(self, path: Path, after: int, until: int, tensorboard: bool) -> None:
        if tensorboard and places.remote(path):
            raise UserError(f"run.tensorboard needs a folder of this machine, --out is in an object store ({path.parent})")
        self._path = path
        kept, _ = metrics(path)
        self._lines = [line for line in kept if not after < line["step"] <= until]
        _write(path, self._lines)
        self._written, self._written_at = len(self._lines), time.monotonic()
        self._writer = _summary_writer(path.parent / "tensorboard") if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """Appends one line."""
        if places.remote(self._path):
            self._lines.append({"step": step, **values})
            if time.monotonic() - self._written_at > _LINES_SECONDS:
                self.settle()
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def settle(self) -> None:
        """Writes what is not written yet: before a state that goes on behind it is saved, and in the end."""
        if len(self._lines) > self._written:
            _write(self._path, self._lines)
            self._written, self._written_at = len(self._lines), time.monotonic()


def _summary_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard needs an extra: pip install 'natfp-jax[tensorboard]'") from None
    return SummaryWriter(str(folder))
