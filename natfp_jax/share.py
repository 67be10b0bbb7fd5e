"""Which arms of a study are whose, where the tasks of a job array share it.

Owns how arms are dealt. It is decided by the study alone, never by what is done already, so that tasks need not talk to one
another, and one that is started again finds its own arms. Must not know files or processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from natfp_jax import flops
from natfp_jax.errors import UserError
from natfp_jax.study import Arm

__all__ = ["Share", "dealt", "share"]


@dataclass(frozen=True)
class Share:
    """One of the tasks that share a study."""

    task: int  # from 0
    tasks: int

    def __str__(self) -> str:
        return f"{self.task}-of-{self.tasks}"


def share(task: int | None, tasks: int | None) -> Share | None:
    """The share that a command line asks for; None: the whole study.

    Raises:
      UserError: one is given without the other, or there is no such task.
    """
    if task is None and tasks is None:
        return None
    if task is None or tasks is None:
        given, other = ("--task", "--tasks N") if tasks is None else ("--tasks", "--task I")
        raise UserError(f"got {given} without {other}: give both, such as --task 0 --tasks 4, or none")
    if tasks < 1:
        raise UserError(f"--tasks is {tasks}, expected at least 1: give the number of tasks")
    if not 0 <= task < tasks:
        raise UserError(f"--task is {task}, expected 0 to {tasks - 1} for --tasks {tasks}: count from 0")
    return Share(task, tasks)


def dealt(arms: Sequence[Arm], tasks: int) -> list[list[Arm]]:
    """The arms of each task, in the study's order; a task may have none.

    The heaviest arm first, each to the task that has least to do so far (Graham, 1969): no task has more than 4/3 of what the
    best dealing would give the busiest one. Arms of one shape that fall to a task are still a cohort.
    """
    cost = [_operations(arm) for arm in arms]
    hands: list[list[int]] = [[] for _ in range(tasks)]
    load = [0] * tasks
    for place in sorted(range(len(arms)), key=lambda place: -cost[place]):
        hand = load.index(min(load))
        hands[hand].append(place)
        load[hand] += cost[place]
    return [[arms[place] for place in sorted(hand)] for hand in hands]


def _operations(arm: Arm) -> int:
    """Those of its training, of the vocabulary that was asked for."""
    one = arm.experiment
    tokens = one.data.windows * one.data.epochs * one.data.seq_len
    return tokens * flops.per_token(one.model, one.corpus.vocabulary, one.data.seq_len, one.lora)
