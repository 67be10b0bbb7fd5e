"""One arm of a cohort, before its training and under way.

Owns what of a training belongs to the arm alone: its batches, its kept checkpoints with what they record, its log, and whether
its numbers are still finite. Must not know its companions.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from natfp_jax import checkpoint, optim, processes
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Experiment, Run
from natfp_jax.corpus import Store
from natfp_jax.errors import UserError
from natfp_jax.lineage import Identity, code, weight_hash
from natfp_jax.order import Order, order_hash
from natfp_jax.packing import LEARNT
from natfp_jax.program import State
from natfp_jax.runs import MetricsLog, RunFolder

__all__ = ["Member", "Origin", "Underway", "validation_batches"]

SKIPS = 10  # steps left out one after another before a run that skips them is given up


@dataclass(frozen=True)
class Origin:
    """The checkpoint that an arm begins with: of another run, its parent."""

    experiment: Experiment
    run: RunFolder
    step: int

    def record(self) -> dict[str, Any]:
        """What is recorded of it: whose it is, its step, and the hash of its weights.

        Raises:
          Damaged: its own record is not what was written.
        """
        found = self.run.record(self.step)
        return {name: found[name] for name in ("fingerprint", "step", "weights")}


@dataclass(frozen=True)
class Member:
    """One arm of a cohort."""

    name: str  # how messages call it
    experiment: Experiment
    identity: Identity
    store: Store
    run: RunFolder
    origin: Origin | None = None  # None: it begins with the init seed


class Underway:
    """One arm under way: its batches, its files, and what its next checkpoint will say of the steps so far."""

    def __init__(self, member: Member, settings: Run, conditions: dict[str, Any]) -> None:
        self.member, self.settings, self.numerics = member, settings, conditions
        experiment, data = member.experiment, member.experiment.data
        self.pool = member.store.pool(data)
        self.validation = validation_batches(member.store, experiment, settings)
        # What a batch counts for in their mean: of conversations, what there is of it to be learnt.
        self.learnt = [float((batch & LEARNT != 0).sum()) if member.store.chat else 1.0 for batch in self.validation]
        self.order = Order(data.windows, data.batch, experiment.seeds.order)
        self.numbers = optim.hyperparameters(experiment.optimiser, experiment.steps)
        rate = optim.schedule(self.numbers, experiment.optimiser.schedule, experiment.steps)
        self.rate_N = np.asarray(rate(np.arange(experiment.steps)))  # at once: asked for one by one, each would wait for a step
        self.checkpoints = Checkpoints(member.run.checkpoints)
        self.failure: str | None = None
        self.log: MetricsLog | None = None

    # --- where it stands ---

    def begin(self, record: dict[str, Any] | None, missing: list[int]) -> None:
        """Takes up what a record says, or nothing: before step 0."""
        self.missing = missing
        self.fed: str = self.member.identity.inputs["pool"]
        self.init_hash: str | None = None
        self.parent: dict[str, Any] | None = None
        self.origin: dict[str, Any] | None = None
        self.early: dict[str, str] = {}
        self.before: list[dict[str, Any]] = []
        self.skipped: list[int] = []
        if record is None and self.member.origin is not None:
            self.origin = processes.led(self.member.origin.record)
        if record is not None:
            self.origin = record.get("origin")
            self.fed, self.init_hash, self.parent = record["order_hash"], record["init_hash"], record["parent"]
            if "weights" in record:
                self.parent = {"step": record["step"], "weights": record["weights"]}
            self.early, self.skipped, self.before = dict(record["early"]), list(record["skipped"]), list(record["before"])
            self.failure = record.get("failure")
            if record["numerics"] != self.numerics:
                self.before.append({"until": record["step"], "numerics": record["numerics"]})

    def wants(self, step: int) -> bool:
        """Whether it lacks a checkpoint at `step` or later, and can still have it; later steps are its companions' alone."""
        return self.failure is None and step <= self.missing[-1]

    def record(self, step: int) -> dict[str, Any]:
        """What is true of the arm at `step`."""
        data = self.member.experiment.data
        return {
            "fingerprint": self.member.identity.fingerprint,
            "step": step,
            "tokens": step * data.batch * data.seq_len,
            "init_hash": self.init_hash,
            "order_hash": self.fed,
            "early": dict(self.early),
            "skipped": list(self.skipped),
            "parent": self.parent,
            **({} if self.origin is None else {"origin": self.origin}),
            "numerics": self.numerics,
            "before": list(self.before),  # the numerics records of earlier stretches of training, and where each ended
            "code": code(),
        }

    # --- a step ---

    def batch(self, step: int) -> np.ndarray:
        """The windows of the next step, which count as fed."""
        rows_B = self.order.rows(step)
        self.fed = order_hash(self.fed, rows_B)
        return self.pool.rows(rows_B)

    def look(self, step: int, values: dict[str, float]) -> None:
        """Takes note of the loss and the norm of the gradient before the update of `step`."""
        if not self.wants(step):
            return
        good = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(good) < len(values):
            self._not_finite(step, values)
        if self.failure is None and step % self.settings.log_every == 0:
            self._write(step, **good, learning_rate=float(self.rate_N[step - 1 - len(self.skipped)]))

    def _not_finite(self, step: int, values: dict[str, float]) -> None:
        if self.member.experiment.optimiser.nonfinite == "skip":
            self.skipped.append(step)
            if self.skipped[-SKIPS:] != list(range(step - SKIPS + 1, step + 1)):
                return
        what, value = next((name, value) for name, value in values.items() if not math.isfinite(value))
        self._give_up(step, what.replace("_", " "), value)

    def _give_up(self, step: int, what: str, value: float) -> None:
        good = "none" if self.parent is None else self.parent["step"]
        skipped = f", after {SKIPS} skipped steps" if len(self.skipped) >= SKIPS else ""
        self.failure = (
            f"arm {self.member.name}: {what} {value} at step {step}{skipped}, last good checkpoint {good} in "
            f"{self.member.run.folder}: lower its learning rate"
        )

    # --- files ---

    def open_log(self, start: int | None) -> None:
        """Goes on with the log of a training that starts after the step `start`; None: anew.

        Lines of steps before its own last checkpoint stand, though companions are trained through them again.
        """
        kept = processes.led(lambda: checkpoint.steps(self.member.run.checkpoints))
        own = max((step for step in kept if step < self.missing[0]), default=-1)
        self.logged = max(own, -1 if start is None else start)
        logs: list[MetricsLog] = []  # of the first process alone
        path, tensorboard = self.member.run.metrics, self.settings.tensorboard
        processes.led(lambda: logs.append(MetricsLog(path, self.logged, self.missing[-1], tensorboard)))
        self.log = logs[0] if logs else None

    def _write(self, step: int, **values: float) -> None:
        if self.log is not None and step > self.logged:
            self.log.write(step, **values)

    def settle_log(self) -> None:
        """Writes the log up to here, before a state is saved that goes on behind it, and in the end."""
        if self.log is not None:
            self.log.settle()

    def keep(self, step: int, state: State, val_loss: float) -> None:
        """Saves its checkpoint of `step`, if it lacks that."""
        weights = weight_hash(state.params)
        self.init_hash = self.init_hash or weights
        if step not in self.missing:
            # One that is there already is what later ones descend from, if it is the same.
            there = processes.led(lambda: self.member.run.record(step))
            self._write(step, val_loss=there["val_loss"])
            if there["weights"] == weights:
                self.parent = {"step": step, "weights": weights}
            return
        if not math.isfinite(val_loss):  # the last update may have spoiled the weights
            self._give_up(step, "validation loss", val_loss)
            return
        self._write(step, val_loss=val_loss)  # first: a process killed between the two drops this line and writes it again
        self.settle_log()
        self.checkpoints.save(step, *state, {**self.record(step), "weights": weights, "val_loss": val_loss})
        self.parent = {"step": step, "weights": weights}


def validation_batches(store: Store, experiment: Experiment, settings: Run) -> list[np.ndarray]:
    """Whole batches of validation windows.

    Raises:
      UserError: there is none.
    """
    batch, seq_len = experiment.data.batch, experiment.data.seq_len
    windows = store.validation_windows(seq_len, max(settings.validation_windows, batch))
    if len(windows) < batch:
        raise UserError(
            f"the validation documents hold {len(windows)} windows of {seq_len + 1} tokens, expected a batch of {batch}: "
            "raise experiment.corpus.validation_fraction or lower experiment.data.batch"
        )
    return np.split(windows[: len(windows) // batch * batch], len(windows) // batch)
