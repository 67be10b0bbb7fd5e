"""The folder of a run: `runs/<fingerprint>/`.

Owns what lies in it (experiment.json, checkpoints/, metrics.jsonl, lineage.json) and whose it is. Must not know how training
works.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natfp_jax import files
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Experiment, to_json
from natfp_jax.errors import UserError
from natfp_jax.lineage import Identity
from natfp_jax.lock import LOCK

__all__ = ["MetricsLog", "RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """One run on disk, shared by every study that needs the experiment."""

    folder: Path

    def checkpoints(self) -> Checkpoints:
        """The kept checkpoints, to be used as a context."""
        return Checkpoints(self.folder / "checkpoints")

    def complete(self, steps: list[int]) -> bool:
        """Whether all of `steps` are kept and their lineage is gathered."""
        path = self.folder / "lineage.json"
        if self.missing(steps) or not path.exists():
            return False
        return set(steps) <= {record["step"] for record in files.read_json(path)["checkpoints"]}

    def missing(self, steps: list[int]) -> list[int]:
        """Those of `steps` that have no checkpoint yet, ascending."""
        if not (self.folder / "checkpoints").is_dir():
            return sorted(steps)
        with self.checkpoints() as checkpoints:
            return sorted(set(steps) - set(checkpoints.steps()))

    def check_owner(self, identity: Identity) -> None:
        """Checks that the folder is not another experiment's.

        Raises:
          UserError: it is.
        """
        path = self.folder / "experiment.json"
        if path.exists() and (owner := files.read_json(path).get("fingerprint")) != identity.fingerprint:
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
        remains = [other for other in others if other.match(".*.tmp")]  # of a killed process
        self.check_owner(identity)
        if not path.exists() and len(others) > len(remains):
            raise UserError(f"{self.folder} is not empty and has no experiment.json: move it away or give another --out")
        if not path.exists():
            owner_record = {"fingerprint": identity.fingerprint, "inputs": identity.inputs, "experiment": to_json(experiment)}
            files.write_json(path, owner_record)
        for other in remains:
            other.unlink()

    def record(self, step: int) -> dict[str, Any]:
        """What was recorded with the checkpoint at `step`."""
        with self.checkpoints() as checkpoints:
            return checkpoints.record(step)

    def write_lineage(self, identity: Identity) -> None:
        """Gathers the records of all checkpoints, for readers without Orbax."""
        with self.checkpoints() as checkpoints:
            records = [checkpoints.record(step) for step in checkpoints.steps()]
        lineage = {"fingerprint": identity.fingerprint, "inputs": identity.inputs, "checkpoints": records}
        files.write_json(self.folder / "lineage.json", lineage)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, by step."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return sorted((json.loads(line) for line in lines), key=lambda line: line["step"])


class MetricsLog:
    """metrics.jsonl, a line a logged step, and TensorBoard where asked for.

    Lines of steps after `after` up to `until`, which are trained again, are dropped; later ones, of a run that was finished
    before an earlier checkpoint was asked for, stay.
    """

    def __init__(self, folder: Path, after: int, until: int, tensorboard: bool) -> None:
        self._path = folder / "metrics.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a kill may have cut the last one
        with files.whole_file(self._path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in whole if not after < json.loads(line)["step"] <= until)
        self._writer = _summary_writer(folder / "tensorboard") if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """Appends one line."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()


def _summary_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard needs an extra: pip install 'natfp-jax[tensorboard]'") from None
    return SummaryWriter(str(folder))
