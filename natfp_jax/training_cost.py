"""What training costs: a step of a cohort, compiled from shapes alone.

Owns bytes, operations, what is sent and the least seconds of it. Must not know studies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from natfp_jax import collectives, config, flops, roofline
from natfp_jax.chips import Chip
from natfp_jax.cohort import cuts, needed
from natfp_jax.config import Experiment, Run
from natfp_jax.costs import Memory, Sent, Time, asked_for, held, rates
from natfp_jax.program import Program, execution_of, program_for

__all__ = ["Training", "memory_of", "training"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """Arms of one shape."""

    arms: tuple[str, ...]
    together: int  # arms of a cohort
    cohorts: int
    execution: str
    steps: int
    tokens: int  # of a step, of all arms of a cohort
    memory: Memory
    flops: float  # of a step, by the formula of model FLOPs utilisation
    executed: float  # that are carried out in products, what is computed again once more
    sent: tuple[Sent, ...]
    time: Time
    utilisation: float  # model FLOPs over the peak, in that time
    seconds: float  # of all cohorts


def training(
    names: Sequence[str],
    experiment: Experiment,
    sizes: tuple[int, int],
    settings: Run,
    chip: Chip,
    devices: jax.sharding.Mesh,
    say: Say,
) -> Training:
    """Arms of one shape, as many at a time as there is room for."""
    ways = devices.shape["replica"]

    def program(replicas: int) -> Program:
        return program_for(experiment, *sizes, devices, settings, replicas)

    def bytes_of(replicas: int) -> int | None:
        if chip.platform == "tpu" and held(program(replicas).state) > chip.usable:  # its compiler would find no room either
            return None
        say(f"compiles a step of {replicas} arms for {devices.size} devices")
        return needed(program(replicas))

    parts = cuts(len(names), settings.cohort, ways, chip.usable, bytes_of, say)
    together = max(end - begin for begin, end in parts)
    if -(-together // ways) == 1:  # else it has been compiled
        say(f"compiles a step of {together} arms for {devices.size} devices")
    made = program(together)
    memory = memory_of(made, chip.usable)
    replicas, data = made.replicas, experiment.data
    text = made.compiled.as_text() if memory.rest is not None and devices.size > 1 else ""
    sent = collectives.sent(collectives.collectives(text or "", devices.shape, replicas // ways)) if text else {}
    traced = made.traced
    products = roofline.products(traced.jaxpr, _batch_rows(traced, data), devices.shape, replicas // ways)
    taken = roofline.time_of(products, rates(chip))
    # All that is kept is read and written once, and the gradient read.
    update = (2 * held(made.state) + held(made.state.params)) / chip.bandwidth
    time = Time(taken.compute, taken.memory + update, sum(sent.values()) / chip.link)
    tokens = together * data.batch * data.seq_len
    counted = flops.per_token(experiment.model, sizes[1], data.seq_len, experiment.lora) * tokens
    return Training(
        arms=tuple(names),
        together=together,
        cohorts=len(parts),
        execution=execution_of(settings, devices),
        steps=experiment.steps,
        tokens=tokens,
        memory=memory,
        flops=counted,
        executed=roofline.operations(products),
        sent=tuple(Sent(kind, axes, amount) for (kind, axes), amount in sorted(sent.items())),
        time=time,
        utilisation=counted / time.seconds / devices.size / max(chip.bf16, chip.f32),  # a CPU is quicker in float32
        seconds=len(parts) * experiment.steps * time.seconds,
    )


def memory_of(program: Program, usable: int) -> Memory:
    """What training takes of a device: a step, or its state and that of one arm, which is saved."""
    parameters, state = held(program.state.params), held(program.state)
    saving, rest = state + held(program.one), None
    try:
        taken = program.device_bytes
        rest = taken - state
    except jax.errors.JaxRuntimeError as error:
        taken = asked_for(error)
    return Memory(parameters, state - parameters, rest, max(taken, saving), usable)


def _batch_rows(traced: jax.stages.Traced, data: config.Data) -> list[bool]:
    """Which inputs of a step hold rows of the batch: the windows."""
    return [value.aval.shape[1:] == (data.batch, data.seq_len + 1) for value in traced.jaxpr.jaxpr.invars]
