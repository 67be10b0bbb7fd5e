"""A plan as the terminal shows it.

Owns the tables' columns and the words around them. A function of the plan alone.
"""

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax.costs import Memory
from natfp_jax.plan import Plan
from natfp_jax.remedies import Remedy
from natfp_jax.training_cost import Training

__all__ = ["notes", "refused", "tables"]


def tables(plan: Plan) -> Iterator[Table]:
    """What it takes of a device, how long it is, and what devices send."""
    yield _memory(plan)
    yield _time(plan)
    if any(one.sent for one in plan.trainings):
        yield _sent(plan)


def notes(plan: Plan) -> Iterator[str]:
    """What it comes to, and what the numbers are."""
    yield (
        f"{plan.study} on {plan.topology}: at least {_hours(plan.hours)}, {plan.chip_hours:,.2f} chip-hours, of training and "
        f"sampling; {_bytes(plan.disk)} of checkpoints"
    )
    yield (
        "Times are lower bounds: products at the data sheet's rate or bandwidth, the update, and what is sent meanwhile. "
        "Validation, saving, the likelihood ceiling and attribution are left out; every text is taken as of full length"
    )
    if plan.estimated:
        yield (
            f"An estimate: compiled for this host's processor in the place of {plan.chip.name}, whose own compiler lays "
            "memory otherwise; cuDNN's attention, which holds no scores, takes less"
        )
    if plan.chip.platform == "gpu":
        yield (
            f"JAX lends {100 * plan.chip.lent:.0f} % of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION); links are those of "
            "one node"
        )
    if plan.chip.platform == "cpu":
        yield (
            f"Measured just now, of one device: {plan.chip.f32 / 1e9:,.0f} GFLOP/s in float32, {plan.chip.bf16 / 1e9:,.0f} in "
            f"bfloat16, {plan.chip.bandwidth / 1e9:,.1f} GB/s; less where the machine did other things besides"
        )


def refused(plan: Plan, other: Remedy | None) -> str:
    """That it does not fit, and what would."""
    if all(one.memory.fits for one in plan.trainings):
        rows = max(texts.rows for texts in plan.texts if not texts.memory.fits)
        return (
            f"Training fits, sampling {rows} texts at once does not: give a smaller sampling.batch, or a larger run.mesh.tensor"
        )
    if other is None:
        return "It does not fit, and no remat, fsdp or microbatches are left to try: take more chips, or a smaller batch"
    settings, takes = " ".join(other.overrides), _bytes(other.memory.least)
    if other.memory.fits:
        return f"It does not fit. The nearest settings that do, with {takes}: {settings}"
    return f"It does not fit, nor does any setting that was tried: the least, {takes}, is under {settings}; take more chips"


def _memory(plan: Plan) -> Table:
    shown = Table(title=Text(f"bytes of one device, {_bytes(plan.chip.usable)} usable"), box=box.SIMPLE, padding=0)
    shown.add_column("program", overflow="fold")
    for name in ("weights", "optimiser,\ncache", "gradients,\nactivations", "all", "fits"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in plan.trainings:
        shown.add_row(Text(f"train {_called(one)}, {one.together} at a time"), *_cells(one.memory))
    for texts in plan.texts:
        shown.add_row(Text(f"sample {texts.rows} texts of {texts.slots} slots"), *_cells(texts.memory))
    return shown


def _cells(memory: Memory) -> list[str]:
    rest = "no room" if memory.rest is None else _bytes(memory.rest)
    return [_bytes(memory.parameters), _bytes(memory.state), rest, _bytes(memory.least), "yes" if memory.fits else "NO"]


def _time(plan: Plan) -> Table:
    shown = Table(title=Text(f"time at the least, {plan.devices} devices"), box=box.SIMPLE, padding=0)
    shown.add_column("program", overflow="fold")
    for name in ("FLOP\na step", "executed", "step", "bound by", "tokens/s", "MFU %", "steps", "in all"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in plan.trainings:
        shown.add_row(
            Text(f"train {_called(one)}"),
            f"{one.flops:.3g}",
            f"{one.executed / one.flops:.2f} x",
            _seconds(one.time.seconds),
            one.time.bound,
            f"{one.tokens / one.time.seconds:,.0f}",
            f"{100 * one.utilisation:.1f}",
            f"{one.cohorts} x {one.steps:,}" if one.cohorts > 1 else f"{one.steps:,}",
            _hours(one.seconds / 3600),
        )
    for texts in plan.texts:
        rate = texts.everywhere / texts.time.seconds
        all_texts = f"{texts.draws} x {texts.texts:,}"
        shown.add_row(
            "sample",
            "",
            "",
            _seconds(texts.time.seconds),
            texts.time.bound,
            f"{rate:,.0f}",
            "",
            all_texts,
            _hours(texts.seconds / 3600),
        )
    return shown


def _sent(plan: Plan) -> Table:
    shown = Table(title=Text("what a device sends in a step"), box=box.SIMPLE, padding=0)
    for name in ("program", "along", "operation"):
        shown.add_column(name)
    for name in ("bytes", "at the least"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in plan.trainings:
        for number, sent in enumerate(sorted(one.sent, key=lambda sent: -sent.bytes)):
            shown.add_row(
                Text(f"train {_called(one)}" if not number else ""),
                " x ".join(sent.axes) or "the same place",
                sent.kind,
                _bytes(int(sent.bytes)),
                _seconds(sent.bytes / plan.chip.link),
            )
    return shown


def _called(one: Training) -> str:
    return one.arms[0] if len(one.arms) == 1 else f"{one.arms[0]} and {len(one.arms) - 1} more"


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _hours(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 0.1 else _seconds(3600 * hours)
