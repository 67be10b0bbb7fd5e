"""Which arms train together, and from where.

Owns how arms of one shape are cut into cohorts that memory holds, and what the files of a cohort say: which checkpoints its
arms lack, and the last state that all of them can go on from. Must not know how a step is computed or saved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from natfp_jax import checkpoint, mesh, processes, restart
from natfp_jax.config import Run
from natfp_jax.errors import UserError
from natfp_jax.member import Member
from natfp_jax.program import Program, program_of

__all__ = ["begun", "called", "cuts", "fingerprints", "finish", "fitting", "needed", "standing"]

_ROOM = 0.8  # of a device's memory; the rest is for one arm's state and what is copied while saving


def called(members: Sequence[Member]) -> str:
    """`arm init0 is`, `arms init0, init1 are`: how messages begin."""
    names = [member.name for member in members]
    if len(names) == 1:
        return f"arm {names[0]} is"
    return f"arms {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''} are"


# --- arms that fit together ---


def fitting(
    group: Sequence[Member], settings: Run, devices: jax.sharding.Mesh, say: Callable[[str], None]
) -> Iterator[list[Member]]:
    """Cuts arms of one shape into cohorts as large as memory and `settings.cohort` allow, as equal as can be."""
    base, memory = group[0], processes.led(lambda: mesh.device_memory(devices))

    def bytes_of(replicas: int) -> int | None:
        found = needed(program_of(base.experiment, base.store, devices, settings, replicas))
        return processes.led(lambda: found)

    for begin, end in cuts(len(group), settings.cohort, devices.shape["replica"], memory, bytes_of, say):
        yield list(group[begin:end])


def cuts(
    count: int, most: int | None, ways: int, memory: int, bytes_of: Callable[[int], int | None], say: Callable[[str], None]
) -> list[tuple[int, int]]:
    """Where so many arms of one shape are cut into cohorts: the first of each, and the one behind its last.

    Args:
      most: arms of a cohort, if that was asked for.
      ways: devices along `replica`.
      memory: bytes of a device.
      bytes_of: what a step of so many arms takes of it; None: more than there is.
      say: told where fewer are taken than there are.
    """
    there, size = _ROOM * memory, min(count, most or count)
    while size > ways:  # fewer would leave devices without an arm, and make none of them lighter
        taken = bytes_of(size)
        if taken is not None and taken <= there:
            break
        takes = "more than there is" if taken is None else f"{taken / 1e9:.2f} GB"
        say(f"{size} arms together take {takes} of the {there / 1e9:.2f} GB that a device can give: fewer at a time")
        fits = size // 2 if taken is None else int(size * there / taken)
        size = max(ways, min(fits, size - 1) // ways * ways)
    if size == count:
        return [(0, count)]
    unit = min(size, ways)  # arms are cut between turns of all devices along `replica`, which leave none without one
    turns = -(-count // unit)
    cohorts = -(-turns // (size // unit))
    return [(begin, min(end, count)) for begin, end in pairwise(part * turns // cohorts * unit for part in range(cohorts + 1))]


def needed(program: Program) -> int | None:
    """The bytes that a step takes of a device; None: so many that it does not compile."""
    try:
        return program.device_bytes
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler knows the memory that it compiles for
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


# --- from where ---


def fingerprints(cohort: Sequence[Member]) -> list[str]:
    """What the restart states of a cohort are known by."""
    return [member.identity.fingerprint for member in cohort]


def finish(members: Sequence[Member], restarts: Path) -> None:
    """Finishes the folders of arms that have every kept checkpoint."""
    restart.release(restarts, fingerprints(members))  # first: a run that is finished is not looked at again
    for member in members:
        member.run.finish(member.identity)


def standing(member: Member, kept: list[int], restarts: Path) -> list[Any]:
    """What arms have in common that can go on together: a restart state's folder and step, or else the kept steps they lack.

    Says so without the locks, while others may be at work.
    """
    if not (lacks := member.run.missing(kept)):
        return []
    own = max((step for step in checkpoint.sealed(member.run.checkpoints) if step < lacks[0]), default=-1)
    with suppress(UserError):  # one that is damaged, or was removed just now, is told of under the locks
        step, place = max(_states([member], lacks[:1], restarts, locked=False), default=(-1, Path()))
        if step > own:
            return [str(place), step]
    return lacks


def begun(cohort: Sequence[Member], kept: list[int], restarts: Path) -> dict[str, Any]:
    """The kept steps that each arm lacks, and the saved state to start from.

    Arms that lack none are finished, if all do. The state is the cohort's, `{"step", "restart": record, "folder"}`, or the
    checkpoints of its arms, `{"step", "arms": records}`; None: there is none.

    Raises:
      UserError: a folder belongs to another experiment.
      Damaged: what it would start from is not what was saved.
    """
    for member in cohort:
        member.run.claim(member.experiment, member.identity)
    there = [checkpoint.steps(member.run.checkpoints) for member in cohort]
    missing = [sorted(set(kept) - set(steps)) for steps in there]
    active = [member for member, steps in zip(cohort, missing, strict=True) if steps]
    if not active:
        finish(cohort, restarts)  # a process killed after the last checkpoint has not
        return {"missing": missing, "start": None}
    return {"missing": missing, "start": _start(active, [steps[0] for steps in missing if steps], restarts)}


def _start(active: Sequence[Member], first: list[int], restarts: Path) -> dict[str, Any] | None:
    """The last saved state before the first checkpoints that the arms lack."""
    there = set.intersection(*(set(checkpoint.steps(member.run.checkpoints)) for member in active))
    saved = max((step for step in there if step < min(first)), default=None)
    states = _states(active, first, restarts)
    if states and (saved is None or max(states)[0] > saved):
        step, place = max(states)
        checkpoint.verify(place, step)
        return {"step": step, "restart": checkpoint.record(place, step), "folder": str(place)}
    if saved is None:
        return None
    for member in active:
        checkpoint.verify(member.run.checkpoints, saved)
    return {"step": saved, "arms": [member.run.record(saved) for member in active]}


def _states(active: Sequence[Member], first: list[int], restarts: Path, locked: bool = True) -> list[tuple[int, Path]]:
    """Step and folder of the restart states of all these arms, before the first that one of them lacks.

    Of arms that have all failed by then there is none: they are tried again.
    """
    lacks = dict(zip(fingerprints(active), first, strict=True))
    states = restart.found(restarts, lacks, locked)
    return [(step, place) for place, step in states if _goes_on(checkpoint.record(place, step), lacks, active)]


def _goes_on(record: dict[str, Any], lacks: dict[str, int], active: Sequence[Member]) -> bool:
    arms = dict(zip(record["cohort"], record["arms"], strict=True))
    if not set(lacks) <= set(arms):
        return False
    # An arm that had failed by then lacks its further checkpoints for ever.
    waiting = [member for member in active if arms[member.identity.fingerprint]["failure"] is None]
    before = [record["step"] < lacks[member.identity.fingerprint] for member in waiting]
    return bool(waiting) and all(before) and all(_descends(arms[one.identity.fingerprint]["parent"], one) for one in waiting)


def _descends(parent: dict[str, Any] | None, member: Member) -> bool:
    """Whether the checkpoint that a state names as its parent is there, and has not been made anew with other bits."""
    if parent is None:
        return True
    there = parent["step"] in checkpoint.sealed(member.run.checkpoints)
    return there and bool(member.run.record(parent["step"])["weights"] == parent["weights"])
