"""Training one cohort: arms of one shape, together.

Owns the loop, what is saved and when, and what is recorded at each kept checkpoint. Everything but the state is a function of
the step, so a restart from any saved state gives the bits of an untouched run. Kept checkpoints belong to the arms; a restart
state belongs to the cohort, and counts for no other one. Must not know studies, sampling or reports.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from natfp_jax import checkpoint, mesh, optim, params, processes
from natfp_jax.blocks import block_length
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Experiment, Run
from natfp_jax.corpus import Store
from natfp_jax.errors import Damaged, Failed, Stopped, UserError
from natfp_jax.lineage import Identity, code, numerics, weight_hash
from natfp_jax.optim import Hyperparameters
from natfp_jax.order import Order, order_hash
from natfp_jax.pace import Pace
from natfp_jax.params import Params
from natfp_jax.program import Program, State, execution_of, one_each, program_of
from natfp_jax.runs import MetricsLog, RunFolder
from natfp_jax.stopping import Stop

__all__ = ["EARLY", "Member", "check", "conditions", "fitting", "laid", "load_params", "quiet", "replay", "train"]

EARLY = (1, 2, 4, 8)  # steps whose weights are hashed, so that an audit can prove the descent from step 0 in a moment
SKIPS = 10  # steps left out one after another before a run that skips them is given up
_ROOM = 0.8  # of a device's memory; the rest is for one arm's state and what is copied while saving
_GO_ON, _SAVE, _STOP = 0, 1, 2  # what a process asks for; the most of them is what all do


@dataclass(frozen=True)
class Member:
    """One arm of a cohort."""

    name: str  # how messages call it
    experiment: Experiment
    identity: Identity
    store: Store
    run: RunFolder


def _called(members: Sequence[Member]) -> str:
    """`arm init0 is`, `arms init0, init1 are`: how messages begin."""
    names = [member.name for member in members]
    if len(names) == 1:
        return f"arm {names[0]} is"
    return f"arms {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''} are"


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
    tree, _ = checkpoint.restore(run.checkpoints, step, program_of(experiment, store, devices, Run()).one.params)
    if (got := weight_hash(tree)) != weights:
        raise Damaged(
            run.checkpoints / str(step), f"is damaged: its weights have sha256 {got}, expected {weights}", agreed=True
        )
    return tree


# --- arms that fit together ---


def fitting(
    group: Sequence[Member], settings: Run, devices: jax.sharding.Mesh, say: Callable[[str], None]
) -> Iterator[list[Member]]:
    """Cuts arms of one shape into cohorts as large as memory and `settings.cohort` allow, as equal as can be."""
    base, there = group[0], _ROOM * processes.led(lambda: mesh.device_memory(devices))
    size, ways = min(len(group), settings.cohort or len(group)), devices.shape["replica"]
    while size > ways:  # fewer would leave devices without an arm, and make none of them lighter
        needed = _needed(program_of(base.experiment, base.store, devices, settings, size))
        if needed is not None and needed <= there:
            break
        takes = "more than there is" if needed is None else f"{needed / 1e9:.2f} GB"
        say(f"{size} arms together take {takes} of the {there / 1e9:.2f} GB that a device can give: fewer at a time")
        fits = size // 2 if needed is None else int(size * there / needed)
        size = max(ways, min(fits, size - 1) // ways * ways)
    cohorts = -(-len(group) // size)
    for place in range(cohorts):
        yield list(group[place * len(group) // cohorts : (place + 1) * len(group) // cohorts])


def _needed(program: Program) -> int | None:
    """The bytes that a step takes of a device, as the first process finds; None: so many that it does not compile."""
    try:
        found = program.device_bytes
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler knows the memory that it compiles for
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = None
    return processes.led(lambda: found)


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(
    cohort: Sequence[Member],
    settings: Run,
    devices: jax.sharding.Mesh,
    advance: Callable[[int], None],
    stop: Stop | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Trains until every arm has every kept checkpoint, from the last state that all have before the first that one lacks.

    Args:
      cohort: arms of one shape, none twice.
      advance: called with the number of arms' steps done, now or earlier: all of the experiments' in the end.
      stop: where given, a signal is answered by saving after the step under way, the same one on all processes.
      say: told now and then how fast it goes.

    Returns:
      How many steps were done now, of all arms together.

    Raises:
      Failed: the loss or gradient of an arm is not finite; the others are trained to their end.
      UserError: a folder belongs to another experiment, the batch does not divide over the mesh, or a validation part has no
        whole batch.
      Damaged: a saved state that it would go on from, or a checkpoint, is not what was saved.
      Stopped: `stop` was requested.
    """
    for member in cohort:
        check(member.experiment, member.store, settings, devices)
    steps, kept = cohort[0].experiment.steps, cohort[0].experiment.kept_steps(settings.checkpoints)
    begun = processes.led(lambda: _begun(cohort, kept))
    active = [member for member, missing in zip(cohort, begun["missing"], strict=True) if missing]
    missing = [steps for steps in begun["missing"] if steps]
    there = [member for member in cohort if member not in active]
    if there:
        advance(steps * len(there))
    if not active:
        return 0
    last: int = max(max(steps) for steps in missing)
    with (
        nullcontext() if stop is None else stop.deferred(),
        _Trainer(active, settings, devices, stop) as trainer,
    ):
        first = trainer.begin(begun["start"], missing)
        advance(first * len(active))
        with Pace(say, active[0].experiment, active[0].store.tokenizer.padded_size, len(active), devices) as pace:
            for step in range(first, last):
                trainer.advance()
                pace.step(step + 1)
                advance(len(active))
    whole = [*there, *(arm.member for arm in trainer.arms if arm.failure is None)]
    processes.led(lambda: _finish(whole))
    if failures := [arm.failure for arm in trainer.arms if arm.failure is not None]:
        raise Failed("; ".join(failures), agreed=True)
    if stop is not None and stop.requested:  # while the last of it was saved
        raise Stopped(f"{_called(active)} finished; the same command goes on from here")
    advance((steps - last) * len(active))
    return (last - first) * len(active)


def _finish(members: Sequence[Member]) -> None:
    for member in members:
        member.run.finish(member.identity)


def _key(cohort: Sequence[Member]) -> list[str]:
    """What a restart state is known by."""
    return [member.identity.fingerprint for member in cohort]


def _begun(cohort: Sequence[Member], kept: list[int]) -> dict[str, Any]:
    """The kept steps that each arm lacks, and the saved state to start from: its step, its folder's name and its records."""
    for member in cohort:
        member.run.claim(member.experiment, member.identity)
    missing = [member.run.missing(kept) for member in cohort]
    lacks = {member.identity.fingerprint: steps[0] for member, steps in zip(cohort, missing, strict=True) if steps}
    if not lacks:
        _finish(cohort)  # a process killed after the last checkpoint has not
        return {"missing": missing, "start": None}
    active = [member for member in cohort if member.identity.fingerprint in lacks]
    there = set.intersection(*(set(checkpoint.steps(member.run.checkpoints)) for member in active))
    saved = max((step for step in there if step < min(lacks.values())), default=None)
    restart: tuple[int, int] | None = None  # the step, and whose folder it is in
    for owner, member in enumerate(cohort):
        for step in checkpoint.steps(member.run.restart):
            record = checkpoint.record(member.run.restart, step)
            if _goes_on(record, lacks):
                restart = max((step, owner), restart or (step, owner))
            else:
                # Of other arms that were trained together; or of a training that went further than a checkpoint that is lost.
                checkpoint.remove(member.run.restart, step)
    if restart is not None and (saved is None or restart[0] > saved):
        step, owner = restart
        place = cohort[owner].run.restart
        checkpoint.verify(place, step)
        start = {"step": step, "restart": checkpoint.record(place, step), "folder": str(place)}
        return {"missing": missing, "start": start}
    if saved is None:
        return {"missing": missing, "start": None}
    for member in active:
        checkpoint.verify(member.run.checkpoints, saved)
        owner, expected = checkpoint.record(member.run.checkpoints, saved)["fingerprint"], member.identity.fingerprint
        if owner != expected:
            state = member.run.checkpoints / str(saved)
            raise Damaged(state, f"is a state of the experiment {owner}, expected {expected}")
    return {"missing": missing, "start": {"step": saved, "arms": [member.run.record(saved) for member in active]}}


def _goes_on(record: dict[str, Any], lacks: dict[str, int]) -> bool:
    """Whether a restart state is of all arms that lack checkpoints, and before the first that one of them lacks."""
    arms = dict(zip(record.get("cohort", ()), record.get("arms", ()), strict=True))
    if not set(lacks) <= set(arms):
        return False
    # An arm that had failed by then lacks its further checkpoints for ever.
    waiting = [step for who, step in lacks.items() if arms[who]["failure"] is None]
    return not waiting or bool(record["step"] < min(waiting))


class _Arm:
    """One arm under way: its batches, its files, and what its next checkpoint will say of the steps so far."""

    def __init__(self, member: Member, settings: Run, conditions: dict[str, Any]) -> None:
        self.member, self.settings, self.numerics = member, settings, conditions
        experiment, data = member.experiment, member.experiment.data
        self.pool = member.store.windows(data.seq_len, data.windows)
        self.validation = _validation(member.store, experiment, settings)
        self.order = Order(data.windows, data.batch, experiment.seeds.order)
        self.numbers = optim.hyperparameters(experiment.optimiser, experiment.steps)
        rate = optim.schedule(self.numbers, experiment.optimiser.schedule, experiment.steps)
        self.rate_N = np.asarray(rate(np.arange(experiment.steps)))  # at once: asked for one by one, each would wait for a step
        self.checkpoints = Checkpoints(member.run.checkpoints)
        self.failure: str | None = None
        self.log: MetricsLog | None = None

    def begin(self, record: dict[str, Any] | None, missing: list[int]) -> None:
        """Takes up what a record says, or nothing: before step 0."""
        self.missing = missing
        self.fed: str = self.member.identity.inputs["pool"]
        self.init_hash: str | None = None
        self.parent: dict[str, Any] | None = None
        self.early: dict[str, str] = {}
        self.before: list[dict[str, Any]] = []
        self.skipped: list[int] = []
        if record is not None:
            self.fed, self.init_hash, self.parent = record["order_hash"], record["init_hash"], record["parent"]
            if "weights" in record:
                self.parent = {"step": record["step"], "weights": record["weights"]}
            self.early, self.skipped, self.before = dict(record["early"]), list(record["skipped"]), list(record["before"])
            self.failure = record.get("failure")
            if record["numerics"] != self.numerics:
                self.before.append({"until": record["step"], "numerics": record["numerics"]})

    def open_log(self, after: int) -> None:
        """Goes on with the log of the training, after a step; before step 0 after -1."""
        path, until = self.member.run.metrics, max(self.missing, default=-1)
        logs: list[MetricsLog] = []  # of the first process alone
        if self.missing:
            processes.led(lambda: logs.append(MetricsLog(path, after, until, self.settings.tensorboard)))
        self.log = logs[0] if logs else None

    def batch(self, step: int) -> np.ndarray:
        """The windows of the next step, which count as fed."""
        rows_B = self.order.rows(step)
        self.fed = order_hash(self.fed, rows_B)
        return self.pool.rows(rows_B)

    def look(self, step: int, values: dict[str, float]) -> None:
        """Takes note of the loss and the norm of the gradient before the update of `step`."""
        if self.failure is not None:
            return
        good = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(good) < len(values):
            self._not_finite(step, values)
        if self.log is not None and self.failure is None and step % self.settings.log_every == 0 and step <= self.missing[-1]:
            self.log.write(step, **good, learning_rate=float(self.rate_N[step - 1 - len(self.skipped)]))

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
            f"{self.member.run.folder}: lower experiment.optimiser.learning_rate"
        )

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
            "numerics": self.numerics,
            "before": list(self.before),  # the numerics records of earlier stretches of training, and where each ended
            "code": code(),
        }

    def keep(self, step: int, state: State, val_loss: float) -> None:
        """Saves its checkpoint of `step`, if it lacks that."""
        weights = weight_hash(state.params)
        self.init_hash = self.init_hash or weights
        if step not in self.missing:
            # One that is there already is what later ones descend from, if it is the same.
            there = processes.led(lambda: self.member.run.record(step))
            if self.log is not None:
                self.log.write(step, val_loss=there["val_loss"])
            if there["weights"] == weights:
                self.parent = {"step": step, "weights": weights}
            return
        if not math.isfinite(val_loss):  # the last update may have spoiled the weights
            self._give_up(step, "validation loss", val_loss)
            return
        if self.log is not None:  # first: a process killed between the two drops this line and writes it again
            self.log.write(step, val_loss=val_loss)
        self.checkpoints.save(step, *state, {**self.record(step), "weights": weights, "val_loss": val_loss})
        self.parent = {"step": step, "weights": weights}


class _Trainer:
    """A cohort under way. A context manager."""

    def __init__(self, cohort: Sequence[Member], settings: Run, devices: jax.sharding.Mesh, stop: Stop | None) -> None:
        self.cohort, self.settings, self.stop = cohort, settings, stop
        base = cohort[0]
        self.program = program_of(base.experiment, base.store, devices, settings, len(cohort))
        self.rows, self.signals = mesh.batch_sharding(devices), _signals(devices)
        said = conditions(base.experiment, settings, devices, len(cohort))
        self.arms = [_Arm(member, settings, said) for member in cohort]
        self.numbers = laid(self.program, [arm.numbers for arm in self.arms])
        self.restarts = Checkpoints(base.run.restart, keep=settings.restarts)
        self.saved_at = time.monotonic()
        self.late: tuple[int, dict[str, jax.Array]] | None = None

    @property
    def _stores(self) -> list[Checkpoints]:
        return [*(arm.checkpoints for arm in self.arms), self.restarts]

    def __enter__(self) -> "_Trainer":
        return self

    def __exit__(self, *failure: Any) -> None:
        with ExitStack() as each:
            for store in reversed(self._stores):
                each.callback(store.__exit__, *failure)

    def begin(self, start: dict[str, Any] | None, missing: list[list[int]]) -> int:
        """Takes the saved state, or makes that of step 0; returns its step."""
        self.step: int = 0 if start is None else start["step"]
        records: list[dict[str, Any] | None] = [None] * len(self.arms)
        if start is not None and "restart" in start:
            records = [start["restart"]["arms"][place] for place in self._places(start["restart"])]
        elif start is not None:
            records = start["arms"]
        for arm, record, lacks in zip(self.arms, records, missing, strict=True):
            arm.begin(record, lacks)
        self._check_some_left()
        self.kept = {step for lacks in missing for step in lacks}
        if start is None:
            seeds = [(arm.member.experiment.seeds.init, arm.member.experiment.perturb) for arm in self.arms]
            self.state = self.program.stack([partial(self.program.init, *seed) for seed in seeds])
        elif "restart" in start:
            self.state = self._restarted(start["restart"], Path(start["folder"]))
        else:
            self.state = self.program.stack([partial(self._kept, arm.member, start["step"]) for arm in self.arms])
        for arm in self.arms:  # once there is a state to go on from
            arm.open_log(-1 if start is None else self.step)
        if start is None:
            self._keep()
        return self.step

    def _kept(self, member: Member, step: int) -> State:
        """The state of an arm's own checkpoint."""
        like = self.program.one
        state = State(*checkpoint.restore(member.run.checkpoints, step, like.params, like.optimiser))
        expected = processes.led(lambda: member.run.record(step)["weights"])
        if (got := weight_hash(state.params)) != expected:
            place = member.run.checkpoints / str(step)
            raise Damaged(place, f"is damaged: its weights have sha256 {got}, expected {expected}", agreed=True)
        return state

    def _places(self, record: dict[str, Any]) -> list[int]:
        """Where the arms stand in a restart state."""
        return [record["cohort"].index(who) for who in _key(self.cohort)]

    def _restarted(self, record: dict[str, Any], folder: Path) -> State:
        """The state of the cohort, whatever places its arms had where it was saved."""
        like = self.program.saved(record["replicas"])
        saved = State(*checkpoint.restore(folder, record["step"], like.params, like.optimiser))
        return self.program.fitted(saved, self._places(record))

    def advance(self) -> None:
        """One step of every arm, and what is to be saved after it.

        Raises:
          UserError: no arm is left whose numbers are finite.
          Stopped: a process was asked to stop.
        """
        batches = [arm.batch(self.step) for arm in self.arms]
        windows_KBT = mesh.lay(np.stack(self.program.filled(batches)), self.rows)
        self.state, metrics = self.program.step(self.state, self.numbers, windows_KBT, self.signals[self._asks()])
        # A step's metrics are read once the next step is under way, so that the device never waits.
        asked = self._look()
        self.step += 1
        self.late = self.step, metrics
        due = self.step in self.kept
        if due or asked or self.step in EARLY:
            asked = max(asked, self._look())
        if self.step in EARLY:
            for place, arm in enumerate(self.arms):
                arm.early[str(self.step)] = weight_hash(self.program.take(self.state.params, place))
        if due:
            self._keep()
        if asked and (not due or any(arm.failure for arm in self.arms)):
            record = {"step": self.step, "cohort": _key(self.cohort), "replicas": self.program.replicas}
            arms = [{**arm.record(self.step), "failure": arm.failure} for arm in self.arms]
            self.restarts.save(self.step, *self.state, {**record, "arms": arms})
        if asked or (due and not any(arm.failure for arm in self.arms)):  # what a killed cohort would go on from
            self.saved_at = time.monotonic()
        if asked == _STOP:
            for store in self._stores:
                store.settle(wait=True)
            raise Stopped(f"{_called(self.cohort)} saved at step {self.step}; the same command goes on from here")
        for store in self._stores:
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
        values = {name: processes.gathered(metrics[name]) for name in ("loss", "gradient_norm")}
        for place, arm in enumerate(self.arms):
            arm.look(step, {name: float(value_K[place]) for name, value_K in values.items()})
        self._check_some_left()
        return int(metrics["asked"])

    def _check_some_left(self) -> None:
        failures = [arm.failure for arm in self.arms]
        if all(failures):
            raise Failed("; ".join(map(str, failures)), agreed=True)

    def _keep(self) -> None:
        losses: list[list[float]] = [[] for _ in self.arms]
        for number in range(max(len(arm.validation) for arm in self.arms)):
            batches = [arm.validation[min(number, len(arm.validation) - 1)] for arm in self.arms]
            windows_KBT = mesh.lay(np.stack(self.program.filled(batches)), self.rows)
            found_K = processes.gathered(self.program.evaluate(self.state.params, windows_KBT))
            for place, arm in enumerate(self.arms):
                if number < len(arm.validation):  # of other text there may be more
                    losses[place].append(float(found_K[place]))
        kept = [place for place, arm in enumerate(self.arms) if arm.failure is None and self.step <= arm.missing[-1]]
        saved = [place for place in kept if self.step in self.arms[place].missing]
        for place in saved:  # else what is still being written would count as room
            self.arms[place].checkpoints.settle(wait=True)
        if saved:
            needed = len(saved) * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.program.one))
            processes.led(lambda: self.arms[saved[0]].checkpoints.check_room(needed))
        for place in kept:
            val_loss = math.fsum(losses[place]) / len(losses[place])
            self.arms[place].keep(self.step, self.program.take(self.state, place), val_loss)
        self._check_some_left()


def laid(program: Program, numbers: Sequence[Hyperparameters]) -> Hyperparameters:
    """The numbers of all arms, an array of each."""
    stacked: Hyperparameters = jax.tree.map(lambda *each: np.stack(each), *program.filled(numbers))
    return mesh.lay(stacked, mesh.stacked(mesh.replicated(program.devices)))


def _signals(devices: jax.sharding.Mesh) -> list[jax.Array]:
    """What a process can ask for, on its own devices: made once, so that it costs nothing a step."""
    sharding = one_each(devices)
    shape = (devices.size,)
    return [
        jax.make_array_from_callback(shape, sharding, lambda index, asked=asked: np.full(1, asked, np.int32))  # type: ignore[misc]
        for asked in (_GO_ON, _SAVE, _STOP)
    ]


def quiet(devices: jax.sharding.Mesh) -> jax.Array:
    """What processes that ask for nothing hand to a step."""
    return _signals(devices)[_GO_ON]


def conditions(experiment: Experiment, settings: Run, devices: jax.sharding.Mesh, replicas: int = 1) -> dict[str, Any]:
    """The numerics record of a training on this machine, `replicas` arms together."""
    data, execution = experiment.data, execution_of(settings, devices)
    block = block_length(data.batch // settings.microbatches, data.seq_len)
    # Arms that are taken one after another do not depend on their number.
    together = {} if execution == "strict" else {"replicas": replicas}
    shapes = {"batch": data.batch, "loss_block": block, "microbatches": settings.microbatches, "remat": settings.remat}
    return numerics(devices, execution=execution, **together, **shapes)


def replay(
    experiment: Experiment, store: Store, settings: Run, devices: jax.sharding.Mesh, until: int
) -> Iterator[tuple[int, Params]]:
    """The weights after each step from the seeds alone, step 0 first; nothing is written."""
    data = experiment.data
    program, order = program_of(experiment, store, devices, settings), Order(data.windows, data.batch, experiment.seeds.order)
    pool, rows, none = store.windows(data.seq_len, data.windows), mesh.batch_sharding(devices), quiet(devices)
    numbers = laid(program, [optim.hyperparameters(experiment.optimiser, experiment.steps)])
    state = program.stack([partial(program.init, experiment.seeds.init, experiment.perturb)])
    yield 0, program.take(state.params, 0)
    for step in range(until):
        windows_KBT = mesh.lay(np.stack(program.filled([pool.rows(order.rows(step))])), rows)
        state, _ = program.step(state, numbers, windows_KBT, none)
        yield step + 1, program.take(state.params, 0)


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
