"""How the tasks of a job array share a study: all of it is done, nothing twice, and what cannot be shared is refused."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natfp_jax import cli, flops
from natfp_jax.config import Data, Experiment, Factor, Model, Study
from natfp_jax.errors import UserError
from natfp_jax.lock import alone
from natfp_jax.progress import Progress
from natfp_jax.share import Share, dealt, share
from natfp_jax.stages import Work
from natfp_jax.study import Arm, arms

NATFP = Path(sys.executable).with_name("natfp")


def of_widths(widths):
    one = Experiment()
    return [Arm(str(place), (), replace(one, model=Model(width=32 * width, heads=width))) for place, width in enumerate(widths)]


def cost(arm):
    one = arm.experiment
    return flops.per_token(one.model, one.corpus.vocabulary, one.data.seq_len) * one.data.windows * one.data.seq_len


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 15))
def test_every_arm_is_dealt_to_one_task_and_stays_in_the_studys_order(widths, tasks):
    every = of_widths(widths)
    hands = dealt(every, tasks)
    assert len(hands) == tasks
    assert sorted((arm for hand in hands for arm in hand), key=lambda arm: int(arm.id)) == every
    assert all(hand == sorted(hand, key=lambda arm: int(arm.id)) for hand in hands)
    assert dealt(every, tasks) == hands


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 3))
def test_the_busiest_task_has_at_most_four_thirds_of_what_the_best_dealing_gives_it(widths, tasks):
    every = of_widths(widths)
    costs = [cost(arm) for arm in every]
    busiest = max(sum(costs[int(arm.id)] for arm in hand) for hand in dealt(every, tasks))
    best = min(
        max(sum(one for one, hand in zip(costs, hands, strict=True) if hand == task) for task in range(tasks))
        for hands in itertools.product(range(tasks), repeat=len(every))
    )
    assert busiest <= 4 / 3 * best


def test_arms_that_cost_the_same_are_dealt_evenly():
    study = Study("grid", factors=(Factor("seeds.init", (0, 1, 2)), Factor("seeds.order", (0, 1, 2))))
    assert sorted(map(len, dealt(arms(study), 4))) == [2, 2, 2, 3]
    assert [len(hand) for hand in dealt(arms(study), 12)].count(0) == 3


def test_what_a_longer_arm_costs_counts():
    base = Study("length", factors=(Factor("data.epochs", (1, 1, 1, 3)),))
    every = [Arm(str(place), (), Experiment(data=Data(epochs=level))) for place, level in enumerate(base.factors[0].levels)]
    assert [[arm.id for arm in hand] for hand in dealt(every, 2)] == [["3"], ["0", "1", "2"]]


@pytest.mark.parametrize(
    ("task", "tasks", "said"),
    [
        (0, None, "--task without --tasks"),
        (None, 2, "--tasks without --task"),
        (2, 2, "expected 0 to 1"),
        (-1, 2, "expected 0 to 1"),
        (0, 0, "at least 1"),
    ],
)
def test_a_share_that_cannot_be_is_refused(task, tasks, said):
    with pytest.raises(UserError, match=said):
        share(task, tasks)


def test_no_share_is_the_whole_study():
    assert share(None, None) is None
    assert share(1, 3) == Share(1, 3)


STUDY = Study("shared", factors=(Factor("seeds.init", (0, 1)),))


def test_a_share_is_held_once_and_never_beside_a_command_that_does_all_of_it(tmp_path):
    """Locks are of open files, so that one process may stand for several here."""

    def work(mine):
        return Work(STUDY, tmp_path, Progress(quiet=True), share=mine)

    first = work(Share(0, 2))
    with first.claimed():
        held = first.shared()
        held.__enter__()
    try:
        again = work(Share(0, 2))
        with again.claimed(), pytest.raises(UserError, match=r"tasks/0-of-2 is in use by another process"), again.shared():
            pass
        with work(Share(1, 2)).claimed():
            pass
        for other in (Share(0, 3), None):
            with pytest.raises(UserError, match=r"task 0-of-2 of .* is at work"), work(other).claimed():
                pass
    finally:
        held.__exit__(None, None, None)
    with work(None).claimed():
        pass


def test_what_a_killed_task_left_half_written_goes_but_not_what_another_one_is_writing(tmp_path):
    work = Work(STUDY, tmp_path, Progress(quiet=True), share=Share(1, 2))
    with work.claimed():
        pass
    remains = work.folder / "draws" / ".some.parquet.1.tmp"
    remains.parent.mkdir()
    remains.touch()
    with alone(work.folder / "tasks" / "0-of-2"), work.claimed():
        assert remains.exists()
    with work.claimed():
        assert not remains.exists()


def test_only_training_and_sampling_are_shared(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["natfp", "report", "configs/quickstart.py", "--task", "0", "--tasks", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "attribution is done once for all" in capsys.readouterr().err


def test_half_a_share_is_one_line_of_a_real_command():
    ended = subprocess.run(
        [NATFP, "run", "configs/quickstart.py", "--tasks", "2"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "--task I" in ended.stderr
