"""Training one arm.

Owns the loop, what is saved and when, and what is recorded at each kept checkpoint. Everything but the state is a function of
the step, so a restart from any saved state gives the bits of an untouched run. Must not know studies, sampling or reports.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from natfp_jax import checkpoint, mesh, optim, params, processes
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Experiment, Run
from natfp_jax.corpus import Store
from natfp_jax.errors import Damaged, Stopped, UserError
from natfp_jax.lineage import Identity, code, numerics, weight_hash
from natfp_jax.loss import block_length
from natfp_jax.order import Order, order_hash
from natfp_jax.params import Params
from natfp_jax.program import State, one_each, program_of
from natfp_jax.runs import MetricsLog, RunFolder
from natfp_jax.stopping import Stop

__all__ = ["EARLY", "check", "conditions", "load_params", "replay", "train"]

EARLY = (1, 2, 4, 8)  # steps whose weights are hashed, so that an audit can prove the descent from step 0 in a moment
SKIPS = 10  # steps left out one after another before a run that skips them is given up
_GO_ON, _SAVE, _STOP = 0, 1, 2  # what a process asks for; the most of them is what all do


def load_params(run: RunFolder, step: int, experiment: Experiment, store: Store, devices: jax.sharding.Mesh) -> Params:
    """The parameters of `run` at `step`, laid over the mesh.

    Raises:
      UserError: there is no such checkpoint.
      Damaged: it is not what was saved.
    """

    def checked() -> str:
        checkpoint.verify(run.checkpoints, step, "params")
        return str(run.record(step)["weights"])

    weights = processes.led(checked)
    tree, _ = checkpoint.restore(run.checkpoints, step, program_of(experiment, store, devices, Run()).state.params)
    if (got := weight_hash(tree)) != weights:
        raise Damaged(
            run.checkpoints / str(step), f"is damaged: its weights have sha256 {got}, expected {weights}", agreed=True
        )
    return tree


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(
    experiment: Experiment,
    identity: Identity,
    store: Store,
    run: RunFolder,
    settings: Run,
    devices: jax.sharding.Mesh,
    name: str,
    advance: Callable[[int], None],
    stop: Stop | None = None,
) -> int:
    """Trains until every kept checkpoint exists, from the last saved state before the first that is missing.

    Args:
      name: how messages call the arm.
      advance: called with the number of steps done, now or earlier: all of the experiment's in the end.
      stop: where given, a signal is answered by saving after the step under way, the same one on all processes.

    Returns:
      How many steps were done now.

    Raises:
      UserError: the folder belongs to another experiment, the batch does not divide over the mesh, the validation part has no
        whole batch, or the loss or a gradient is not finite.
      Damaged: a saved state that it would go on from, or a checkpoint, is not what was saved.
      Stopped: `stop` was requested.
    """
    kept = experiment.kept_steps(settings.checkpoints)
    check(experiment, store, settings, devices)
    begun = processes.led(lambda: _begun(run, experiment, identity, kept))
    missing: list[int] = begun["missing"]
    if not missing:
        advance(experiment.steps)
        return 0
    with (
        nullcontext() if stop is None else stop.deferred(),
        _Trainer(experiment, identity, store, run, settings, devices, name, stop) as trainer,
    ):
        first = trainer.begin(begun["start"], missing)
        advance(first)
        for _ in range(first, missing[-1]):
            trainer.advance()
            advance(1)
    processes.led(lambda: run.finish(identity))
    if stop is not None and stop.requested:  # while the last of it was saved
        raise Stopped(f"arm {name} is finished; the same command goes on from here")
    advance(experiment.steps - missing[-1])
    return missing[-1] - first


def _begun(run: RunFolder, experiment: Experiment, identity: Identity, kept: list[int]) -> dict[str, Any]:
    """The kept steps that are missing, and the saved state to start from: its folder's name and its record."""
    run.claim(experiment, identity)
    missing = run.missing(kept)
    if not missing:
        run.finish(identity)  # a process killed after its last checkpoint has not
        return {"missing": []}
    before = [
        (step, folder.name)
        for folder in (run.restart, run.checkpoints)
        for step in checkpoint.steps(folder)
        if step < missing[0]
    ]
    start = max(before, key=lambda found: (found[0], found[1] == run.checkpoints.name), default=None)
    for later in checkpoint.steps(run.restart):  # of a training that went further: an earlier checkpoint is missing since
        if start is None or later > start[0]:
            checkpoint.remove(run.restart, later)
    if start is None:
        return {"missing": missing, "start": None}
    step, place, folder = start[0], run.folder / start[1], start[1]
    checkpoint.verify(place, step)
    record = checkpoint.record(place, step)
    if record["fingerprint"] != identity.fingerprint:
        raise Damaged(
            place / str(step), f"is a state of the experiment {record['fingerprint']}, expected {identity.fingerprint}"
        )
    return {"missing": missing, "start": {"folder": folder, "record": record}}


class _Trainer:
    """One arm under way: its state, and what its next checkpoint will say of the steps so far. A context manager."""

    def __init__(
        self,
        experiment: Experiment,
        identity: Identity,
        store: Store,
        run: RunFolder,
        settings: Run,
        devices: jax.sharding.Mesh,
        name: str,
        stop: Stop | None,
    ) -> None:
        self.experiment, self.identity, self.run, self.settings, self.name = experiment, identity, run, settings, name
        self.stop = stop
        data = experiment.data
        self.program = program_of(experiment, store, devices, settings)
        self.rows, self.signals = mesh.batch_sharding(devices), _signals(devices)
        self.pool = store.windows(data.seq_len, data.windows)
        self.validation = _validation(store, experiment, settings)
        self.order = Order(data.windows, data.batch, experiment.seeds.order)
        self.rate = optim.schedule(experiment.optimiser, experiment.steps)
        self.numerics = conditions(experiment, settings, devices)
        self.checkpoints = Checkpoints(run.checkpoints)
        self.restarts = Checkpoints(run.restart, keep=settings.restarts)
        self.saved_at = time.monotonic()
        self.late: tuple[int, dict[str, jax.Array]] | None = None

    def __enter__(self) -> "_Trainer":
        return self

    def __exit__(self, *failure: Any) -> None:
        try:
            self.checkpoints.__exit__(*failure)
        finally:
            self.restarts.__exit__(*failure)

    def begin(self, start: dict[str, Any] | None, missing: list[int]) -> int:
        """Takes the saved state, or makes that of step 0; returns its step."""
        self.missing = missing
        if start is None:
            self.step, self.fed = 0, self.identity.inputs["pool"]
            self.init_hash: str | None = None
            self.parent: dict[str, Any] | None = None
            self.early: dict[str, str] = {}
            self.before: list[dict[str, Any]] = []
            self.skipped: list[int] = []
            self.state = self.program.init(self.experiment.seeds.init, self.experiment.perturb)
        else:
            record, folder = start["record"], self.run.folder / start["folder"]
            like = self.program.state
            self.state = State(*checkpoint.restore(folder, record["step"], like.params, like.optimiser))
            if "weights" in record and (got := weight_hash(self.state.params)) != record["weights"]:
                place = folder / str(record["step"])
                raise Damaged(place, f"is damaged: its weights have sha256 {got}, expected {record['weights']}", agreed=True)
            self.step, self.fed, self.init_hash = record["step"], record["order_hash"], record["init_hash"]
            self.parent = {"step": record["step"], "weights": record["weights"]} if "weights" in record else record["parent"]
            self.early, self.skipped, self.before = dict(record["early"]), list(record["skipped"]), list(record["before"])
            if record["numerics"] != self.numerics:
                self.before.append({"until": record["step"], "numerics": record["numerics"]})
        after = -1 if start is None else self.step
        logs: list[MetricsLog] = []  # of the first process alone
        processes.led(lambda: logs.append(MetricsLog(self.run.metrics, after, missing[-1], self.settings.tensorboard)))
        self.log = logs[0] if logs else None
        if start is None:
            self._keep()
        return self.step

    def advance(self) -> None:
        """One step, and what is to be saved after it.

        Raises:
          UserError: the loss or a gradient is not finite.
          Stopped: a process was asked to stop.
        """
        rows_B = self.order.rows(self.step)
        self.fed = order_hash(self.fed, rows_B)
        windows_BT = mesh.lay(self.pool.rows(rows_B), self.rows)
        self.state, metrics = self.program.step(self.state, windows_BT, self.signals[self._asks()])
        # A step's metrics are read once the next step is under way, so that the device never waits.
        asked = self._look()
        self.step += 1
        self.late = self.step, metrics
        due = self.step in self.missing
        if due or asked or self.step in EARLY:
            asked = max(asked, self._look())
        if self.step in EARLY:
            self.early[str(self.step)] = weight_hash(self.state.params)
        if due:
            self._keep()
        elif asked:
            self.restarts.save(self.step, *self.state, self._record())
        if due or asked:
            self.saved_at = time.monotonic()
        if asked == _STOP:
            for store in (self.checkpoints, self.restarts):
                store.settle(wait=True)
            raise Stopped(f"arm {self.name} is saved at step {self.step}; the same command goes on from here")
        for store in (self.checkpoints, self.restarts):
            store.settle()

    def _asks(self) -> int:
        if self.stop is not None and self.stop.requested:
            return _STOP
        late = time.monotonic() - self.saved_at > 60 * self.settings.save_minutes
        return _SAVE if processes.first() and late else _GO_ON

    def _look(self) -> int:
        """Reads the metrics of the last step that were not read yet; what the processes asked for in it."""
        if self.late is None:
            return _GO_ON
        step, metrics = self.late
        self.late = None
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm")}
        good = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(good) < len(values):
            self._not_finite(step, values)
        if self.log is not None and step % self.settings.log_every == 0:
            self.log.write(step, **good, learning_rate=float(self.rate(step - 1 - len(self.skipped))))
        return int(metrics["asked"])

    def _not_finite(self, step: int, values: dict[str, float]) -> None:
        if self.experiment.optimiser.nonfinite == "skip":
            self.skipped.append(step)
            if self.skipped[-SKIPS:] != list(range(step - SKIPS + 1, step + 1)):
                return
        what, value = next((name, value) for name, value in values.items() if not math.isfinite(value))
        self._give_up(step, what.replace("_", " "), value)

    def _give_up(self, step: int, what: str, value: float) -> None:
        good = "none" if self.parent is None else self.parent["step"]
        skipped = f", after {SKIPS} skipped steps" if len(self.skipped) >= SKIPS else ""
        raise UserError(
            f"arm {self.name}: {what} {value} at step {step}{skipped}, last good checkpoint {good} in {self.run.folder}: "
            "lower experiment.optimiser.learning_rate"
        )

    def _record(self) -> dict[str, Any]:
        data = self.experiment.data
        return {
            "fingerprint": self.identity.fingerprint,
            "step": self.step,
            "tokens": self.step * data.batch * data.seq_len,
            "init_hash": self.init_hash,
            "order_hash": self.fed,
            "early": dict(self.early),
            "skipped": list(self.skipped),
            "parent": self.parent,
            "numerics": self.numerics,
            "before": list(self.before),  # the numerics records of earlier stretches of training, and where each ended
            "code": code(),
        }

    def _keep(self) -> None:
        weights = weight_hash(self.state.params)
        losses = [float(self.program.evaluate(self.state.params, mesh.lay(batch, self.rows))) for batch in self.validation]
        val_loss = math.fsum(losses) / len(losses)
        if not math.isfinite(val_loss):  # the last update may have spoiled the weights
            self._give_up(self.step, "validation loss", val_loss)
        self.init_hash = self.init_hash or weights
        if self.log is not None:  # first: a process killed between the two drops this line and writes it again
            self.log.write(self.step, val_loss=val_loss)
        self.checkpoints.save(self.step, *self.state, {**self._record(), "weights": weights, "val_loss": val_loss})
        self.parent = {"step": self.step, "weights": weights}


def _signals(devices: jax.sharding.Mesh) -> list[jax.Array]:
    """What a process can ask for, on its own devices: made once, so that it costs nothing a step."""
    sharding = one_each(devices)
    shape = (devices.size,)
    return [
        jax.make_array_from_callback(shape, sharding, lambda index, asked=asked: np.full(1, asked, np.int32))  # type: ignore[misc]
        for asked in (_GO_ON, _SAVE, _STOP)
    ]


def conditions(experiment: Experiment, settings: Run, devices: jax.sharding.Mesh) -> dict[str, Any]:
    """The numerics record of a training on this machine."""
    data = experiment.data
    block = block_length(data.batch // settings.microbatches, data.seq_len)
    return numerics(devices, batch=data.batch, loss_block=block, microbatches=settings.microbatches, remat=settings.remat)


def replay(
    experiment: Experiment, store: Store, settings: Run, devices: jax.sharding.Mesh, until: int
) -> Iterator[tuple[int, Params]]:
    """The weights after each step from the seeds alone, step 0 first; nothing is written. They are given up at the next one."""
    data = experiment.data
    program, order = program_of(experiment, store, devices, settings), Order(data.windows, data.batch, experiment.seeds.order)
    pool, rows, quiet = store.windows(data.seq_len, data.windows), mesh.batch_sharding(devices), _signals(devices)[_GO_ON]
    state = program.init(experiment.seeds.init, experiment.perturb)
    yield 0, state.params
    for step in range(until):
        state, _ = program.step(state, mesh.lay(pool.rows(order.rows(step)), rows), quiet)
        yield step + 1, state.params


def check(experiment: Experiment, store: Store, settings: Run, devices: jax.sharding.Mesh) -> None:
    """Raises a UserError if the experiment cannot run on this mesh, or has no whole batch to be validated on."""
    batch, parts = experiment.data.batch, settings.microbatches
    if batch % parts:
        raise UserError(f"experiment.data.batch {batch} does not divide into run.microbatches {parts}")
    name = "experiment.data.batch" if parts == 1 else f"experiment.data.batch {batch} / run.microbatches {parts} ="
    mesh.check_batch(name, batch // parts, devices)
    specs = params.table(experiment.model, store.tokenizer.padded_size)
    mesh.check_params(specs, devices)
    if experiment.perturb is not None:
        params.check_perturb({path: spec.shape for path, spec in specs.items()}, experiment.perturb)
    _validation(store, experiment, settings)


def _validation(store: Store, experiment: Experiment, settings: Run) -> list[np.ndarray]:
    """Whole batches of validation windows."""
    batch, seq_len = experiment.data.batch, experiment.data.seq_len
    windows = store.validation_windows(seq_len, max(settings.validation_windows, batch))
    if len(windows) < batch:
        raise UserError(
            f"the validation documents hold {len(windows)} windows of {seq_len + 1} tokens, expected a batch of {batch}: "
            "raise experiment.corpus.validation_fraction or lower experiment.data.batch"
        )
    return np.split(windows[: len(windows) // batch * batch], len(windows) // batch)
