"""Training one cohort: arms of one shape, together.

Owns the loop, and what is saved when. Everything but the state is a function of the step, so a restart from any saved state
gives the bits of an untouched run. Kept checkpoints belong to the arms, a restart state to the cohort. Must not know studies,
sampling or reports.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import jax
import numpy as np

from natfp_jax import checkpoint, descent, lora, mesh, optim, params, places, processes, restart
from natfp_jax.blocks import block_length
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.cohort import begun, called, fingerprints, finish
from natfp_jax.config import Experiment, Run
from natfp_jax.corpus import Store
from natfp_jax.errors import Damaged, Failed, Stopped, UserError
from natfp_jax.lineage import numerics, weight_hash
from natfp_jax.member import Member, Underway, validation_batches
from natfp_jax.optim import Hyperparameters
from natfp_jax.order import Order
from natfp_jax.pace import Pace
from natfp_jax.params import Params
from natfp_jax.program import Program, State, execution_of, one_each, program_of
from natfp_jax.runs import RunFolder
from natfp_jax.stopping import Stop

__all__ = ["EARLY", "check", "check_laid", "conditions", "laid", "load_params", "load_weights", "quiet", "replay", "train"]

EARLY = (1, 2, 4, 8)  # steps whose weights are hashed, so that an audit can prove the descent from step 0 in a moment
_GO_ON, _SAVE, _STOP = 0, 1, 2  # what a process asks for; the most of them is what all do


def load_params(run: RunFolder, step: int, experiment: Experiment, store: Store, devices: jax.sharding.Mesh) -> Params:
    """The parameters of `run` at `step`, laid over the mesh.

    Raises:
      UserError: there is no such checkpoint.
      Damaged: it is not what was saved.
    """
    return load_weights(run, step, experiment, store.tokenizer.padded_size, devices)


def load_weights(run: RunFolder, step: int, experiment: Experiment, padded: int, devices: jax.sharding.Mesh) -> Params:
    """The same, of a vocabulary of so many ids with padding; adapters are merged into what they adapt."""
    processes.led(lambda: checkpoint.verify(run.checkpoints, step, "params"))
    specs = lora.table(experiment.model, padded, experiment.lora)
    like = checkpoint.with_shardings(params.abstract(specs), mesh.param_shardings(devices, specs))
    tree, _ = checkpoint.restore(run.checkpoints, step, like)
    _check_weights(tree, run, step)
    return tree if experiment.lora is None else descent.merged(tree, experiment.lora, mesh.param_shardings(devices, specs))


def _check_weights(tree: Params, run: RunFolder, step: int) -> None:
    expected = processes.led(lambda: run.record(step)["weights"])
    if (got := weight_hash(tree)) != expected:
        why = f"is damaged: its weights have sha256 {got}, expected {expected}"
        raise Damaged(run.checkpoints / str(step), why, agreed=True)


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(
    cohort: Sequence[Member],
    restarts: Path,
    settings: Run,
    devices: jax.sharding.Mesh,
    advance: Callable[[int], None],
    stop: Stop | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Trains until every arm has every kept checkpoint, from the last state that all have before the first that one lacks.

    Args:
      cohort: arms of one shape, none twice.
      restarts: the folder of the states that a stopped or killed cohort goes on from.
      advance: called with the number of arms' steps done, now or earlier: all of the experiments' in the end.
      stop: where given, a signal is answered by saving after the step under way, the same one on all processes.
      say: told now and then how fast it goes.

    Returns:
      How many steps were done now, of all arms together.

    Raises:
      Failed: the loss or gradient of an arm is not finite; the others are trained to their end.
      UserError: a folder belongs to another experiment, the batch does not divide over the mesh, a validation part has no
        whole batch, or there is no room for what is to be saved.
      Damaged: a saved state that it would go on from, or a checkpoint, is not what was saved.
      Stopped: `stop` was requested.
    """
    for member in cohort:
        check(member.experiment, member.store, settings, devices)
    steps, kept = cohort[0].experiment.steps, cohort[0].experiment.kept_steps(settings.checkpoints)
    start = processes.led(lambda: begun(cohort, kept, restarts))
    active = [member for member, missing in zip(cohort, start["missing"], strict=True) if missing]
    there = [member for member in cohort if member not in active]
    if there:
        advance(steps * len(there))
    if not active:
        return 0
    with nullcontext() if stop is None else stop.deferred():
        with _Trainer(active, restarts, settings, devices, stop) as trainer:
            first = trainer.begin(start["start"], [missing for missing in start["missing"] if missing])
            advance(first * len(active))
            with Pace(say, active[0].experiment, active[0].store.tokenizer.padded_size, len(active), devices) as pace:
                while trainer.wanted:
                    trainer.advance()
                    pace.step(trainer.step)
                    advance(len(active))
        failed = [arm for arm in trainer.arms if arm.failure is not None]
        whole = [*there, *(arm.member for arm in trainer.arms if arm not in failed)]
        processes.led(lambda: finish(whole, restarts))
        if failed:  # tried again, they go on from their checkpoints
            processes.led(lambda: restart.release(restarts, fingerprints([arm.member for arm in failed])))
            raise Failed("; ".join(str(arm.failure) for arm in failed), agreed=True)
        if stop is not None and processes.most(stop.requested):  # while the last of it was saved
            raise Stopped(f"{called(active)} finished; the same command goes on from here")
    advance((steps - trainer.step) * len(active))
    return (trainer.step - first) * len(active)


class _Trainer:
    """A cohort under way. A context manager."""

    def __init__(
        self, cohort: Sequence[Member], restarts: Path, settings: Run, devices: jax.sharding.Mesh, stop: Stop | None
    ) -> None:
        self.cohort, self.restarts_root, self.settings, self.stop = cohort, restarts, settings, stop
        base = cohort[0]
        self.program = program_of(base.experiment, base.store, devices, settings, len(cohort))
        self.rows, self.signals = mesh.batch_sharding(devices), _signals(devices)
        said = conditions(base.experiment, settings, devices, len(cohort))
        self.arms = [Underway(member, settings, said) for member in cohort]
        self.numbers = laid(self.program, [arm.numbers for arm in self.arms])
        self.stores = [arm.checkpoints for arm in self.arms]
        self.saved_at = time.monotonic()
        self.late: tuple[int, dict[str, jax.Array]] | None = None

    def __enter__(self) -> "_Trainer":
        return self

    def __exit__(self, *failure: Any) -> None:
        with ExitStack() as each:
            for store in reversed(self.stores):
                each.callback(store.__exit__, *failure)
            for arm in self.arms:
                each.callback(arm.settle_log)

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
        self.kept = {step for lacks in missing for step in lacks}
        if start is None:
            self.state = self.program.stack([partial(self._begun, arm.member) for arm in self.arms])
        elif "restart" in start:
            self.state = self._restarted(start["restart"], places.place(start["folder"]))
        else:
            self.state = self.program.stack([partial(self._kept, arm.member, start["step"]) for arm in self.arms])
        processes.led(self._reopen)
        self.restarts = Checkpoints(restart.folder(self.restarts_root, fingerprints(self.cohort)), keep=self.settings.restarts)
        self.stores.append(self.restarts)
        for arm in self.arms:  # once there is a state to go on from
            arm.open_log(None if start is None else self.step)
        if start is None:
            self._keep()
        return self.step

    def _reopen(self) -> None:
        restart.claim(self.restarts_root, fingerprints(self.cohort), after=self.step)
        for arm in self.arms:
            arm.member.run.reopen()

    def _begun(self, member: Member) -> State:
        """The state of an arm at step 0."""
        one, origin = member.experiment, member.origin
        parent = None
        if origin is not None:
            parent = partial(load_params, origin.run, origin.step, origin.experiment, member.store, self.program.devices)
        return self.program.init(one.seeds.init, one.perturb, parent)

    def _kept(self, member: Member, step: int) -> State:
        """The state of an arm's own checkpoint."""
        like = self.program.one
        state = State(*checkpoint.restore(member.run.checkpoints, step, like.params, like.optimiser))
        _check_weights(state.params, member.run, step)
        return state

    def _places(self, record: dict[str, Any]) -> list[int]:
        """Where the arms stand in a restart state."""
        return [record["cohort"].index(who) for who in fingerprints(self.cohort)]

    def _restarted(self, record: dict[str, Any], folder: Path) -> State:
        """The state of the cohort, whatever places its arms had where it was saved."""
        like = self.program.saved(record["replicas"])
        try:
            saved = State(*checkpoint.restore(folder, record["step"], like.params, like.optimiser))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{folder / str(record['step'])} of {len(record['cohort'])} arms does not fit the memory of these devices: "
                "train on those that it was saved on, or move it away to go on from the kept checkpoints"
            ) from None
        return self.program.fitted(saved, self._places(record))

    @property
    def wanted(self) -> bool:
        """Whether any arm wants a further step."""
        return any(arm.wants(self.step + 1) for arm in self.arms)

    def advance(self) -> None:
        """One step of every arm, and what is to be saved after it.

        Raises:
          UserError: there is no room for what is to be saved.
          Stopped: a process was asked to stop.
        """
        batches = [arm.batch(self.step) for arm in self.arms]
        windows_KBT = mesh.lay(np.stack(self.program.filled(batches)), self.rows)
        noise_K2 = self.program.noise([arm.member.experiment.seeds.dropout for arm in self.arms], self.step)
        asked_N = self.signals[self._asks()]
        self.state, metrics = self.program.step(self.state, self.numbers, windows_KBT, asked_N, noise_K2)
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
        if asked and self.wanted and (not due or any(arm.failure for arm in self.arms)):
            record = {"step": self.step, "cohort": fingerprints(self.cohort), "replicas": self.program.replicas}
            arms = [{**arm.record(self.step), "failure": arm.failure} for arm in self.arms]
            for store in self.stores:  # else what is still being written would count as room
                store.settle(wait=True)
            for arm in self.arms:
                arm.settle_log()
            self.restarts.save(self.step, *self.state, {**record, "arms": arms})
        if asked or (due and not any(arm.failure for arm in self.arms)):  # what a killed cohort would go on from
            self.saved_at = time.monotonic()
        if asked == _STOP and self.wanted:
            for store in self.stores:
                store.settle(wait=True)
            raise Stopped(f"{called(self.cohort)} saved at step {self.step}; the same command goes on from here")
        for store in self.stores:
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
        return int(metrics["asked"])

    def _keep(self) -> None:
        kept = [place for place, arm in enumerate(self.arms) if arm.wants(self.step)]
        if not kept:
            return
        losses: list[list[float]] = [[] for _ in self.arms]
        for number in range(max(len(arm.validation) for arm in self.arms)):
            batches = [arm.validation[min(number, len(arm.validation) - 1)] for arm in self.arms]
            windows_KBT = mesh.lay(np.stack(self.program.filled(batches)), self.rows)
            found_K = processes.gathered(self.program.evaluate(self.state.params, windows_KBT))
            for place, arm in enumerate(self.arms):
                if number < len(arm.validation):  # of other text there may be more
                    losses[place].append(float(found_K[place]))
        saved = [place for place in kept if self.step in self.arms[place].missing]
        for place in saved:  # else what is still being written would count as room
            self.arms[place].checkpoints.settle(wait=True)
        if saved:
            needed = len(saved) * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.program.one))
            processes.led(lambda: self.arms[saved[0]].checkpoints.check_room(needed))
        for place in kept:
            each = self.arms[place].learnt
            val_loss = math.fsum(map(mul, losses[place], each)) / math.fsum(each)
            self.arms[place].keep(self.step, self.program.take(self.state, place), val_loss)


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
    experiment: Experiment,
    store: Store,
    settings: Run,
    devices: jax.sharding.Mesh,
    until: int,
    parent: Callable[[], Params] | None = None,
) -> Iterator[tuple[int, Params]]:
    """The weights after each step from the seeds alone, and a parent's where it has one, step 0 first; nothing is written."""
    data = experiment.data
    program, order = program_of(experiment, store, devices, settings), Order(data.windows, data.batch, experiment.seeds.order)
    pool, rows, none = store.pool(data), mesh.batch_sharding(devices), quiet(devices)
    numbers = laid(program, [optim.hyperparameters(experiment.optimiser, experiment.steps)])
    state = program.stack([partial(program.init, experiment.seeds.init, experiment.perturb, parent)])
    yield 0, program.take(state.params, 0)
    for step in range(until):
        windows_KBT = mesh.lay(np.stack(program.filled([pool.rows(order.rows(step))])), rows)
        state, _ = program.step(state, numbers, windows_KBT, none, program.noise([experiment.seeds.dropout], step))
        yield step + 1, program.take(state.params, 0)


def check(experiment: Experiment, store: Store, settings: Run, devices: jax.sharding.Mesh) -> None:
    """Raises a UserError if the experiment cannot run on this mesh, or has no whole batch to be validated on."""
    check_laid(experiment, store.tokenizer.padded_size, settings, devices)
    validation_batches(store, experiment, settings)


def check_laid(experiment: Experiment, padded: int, settings: Run, devices: jax.sharding.Mesh) -> None:
    """Raises a UserError if the experiment cannot run on this mesh, with a vocabulary of this padded size."""
    batch, parts, most = experiment.data.batch, settings.microbatches, experiment.model.context
    if most is not None and experiment.data.seq_len > most:
        raise UserError(
            f"experiment.data.seq_len {experiment.data.seq_len} is more than experiment.model.context {most}: so long a window "
            "has no positions; raise the one or lower the other"
        )
    if batch % parts:
        raise UserError(f"experiment.data.batch {batch} does not divide into run.microbatches {parts}")
    name = "experiment.data.batch" if parts == 1 else f"experiment.data.batch {batch} / run.microbatches {parts} ="
    mesh.check_batch(name, batch // parts, devices)
    specs = lora.table(experiment.model, padded, experiment.lora)
    mesh.check_params(specs, devices)
    if experiment.perturb is not None:
        params.check_perturb({path: spec.shape for path, spec in specs.items()}, experiment.perturb)
