"""Killed at any moment, a run ends with the bits of an untouched one; and no two processes make the same run.

As a program (`python test_resume.py ROOT FOLDER MINUTES WAIT`) this file trains one arm, and says at which step it is. At step
WAIT it waits for a signal.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from natfp_jax import checkpoint, config, files, mesh
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Corpus, Data, Experiment, Model, Run, Stories
from natfp_jax.corpus import prepare
from natfp_jax.errors import Damaged, Stopped, UserError
from natfp_jax.lineage import identity
from natfp_jax.lock import alone, held
from natfp_jax.member import Member
from natfp_jax.progress import Progress
from natfp_jax.runs import MetricsLog, RunFolder, metrics
from natfp_jax.stopping import STOPPED, Stop
from natfp_jax.train import train
from tests.soak import meshes

CORPUS = Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.1, shards=2)
EXPERIMENT = Experiment(model=Model(width=32, layers=2, heads=4), data=Data(seq_len=32, windows=160, epochs=3, batch=8))
SETTINGS = Run(checkpoints=(0.1, 0.3, 0.5, 0.7, 0.9), log_every=3, validation_windows=16)


def work(root, folder, minutes, wait):
    """Trains as the command does: what a kill left half done is set aside, and a signal is answered with a saved step."""
    store, data = prepare(CORPUS, root, Progress(quiet=True)), EXPERIMENT.data
    pool = store.pool(data).sha256()
    done = 0

    def advance(steps):
        nonlocal done
        done += steps
        print(done, flush=True)
        late = time.monotonic() + meshes.STUCK
        while done == wait and not stop.requested and time.monotonic() < late:
            time.sleep(0.01)

    who = identity(EXPERIMENT, store.sha256, store.tokenizer.sha256, pool)
    stop, settings = Stop(), replace(SETTINGS, save_minutes=minutes)
    with alone(folder), stop.installed():
        while True:
            done = 0
            try:
                arm = Member("arm", EXPERIMENT, who, store, RunFolder(folder))
                train([arm], folder / "restart", settings, mesh.make(config.Mesh()), advance, stop)
            except Damaged as damage:
                files.set_aside(damage.path)
            except Stopped as stopped:
                print(stopped, file=sys.stderr)
                sys.exit(STOPPED)
            else:
                return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs deaf to Ctrl-C
    work(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
    sys.exit()


def started(root, folder, minutes=1e-4, wait=-1):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(config.__file__).parents[1])
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")  # the first process compiles for all
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, __file__, str(root), str(folder), str(minutes), str(wait)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process):
    _, errors = process.communicate(timeout=meshes.STUCK)
    assert process.returncode == 0, errors


def everything(run, steps):
    """All that a run has recorded, all of it whole."""
    lines, damaged = metrics(run.metrics)
    assert damaged == 0
    for step in steps:
        checkpoint.verify(run.checkpoints, step)
    return [run.record(step) for step in steps], lines, files.read_json(run.folder / "lineage.json")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- invariant 4 ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_untouched_one(tiny_store, tmp_path):
    root, moments = tiny_store.folder.parent.parent, random.Random(0)
    finished(started(root, tmp_path / "untouched"))
    kills = 0
    for first, last in ((0, 5), (7, 20), (21, 40), (43, 59)):  # one kill somewhere in each stretch of the 60 steps
        process = started(root, tmp_path / "killed")
        target = moments.randint(first, last)
        for line in process.stdout:
            if int(line) >= target:
                time.sleep(moments.uniform(0, 0.1))  # in the middle of a step, a save, a line
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=meshes.STUCK)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3  # the last one may have ended first
    finished(started(root, tmp_path / "killed"))
    steps = (0, 6, 18, 30, 42, 54, 60)
    killed, whole = (everything(RunFolder(tmp_path / name), steps) for name in ("killed", "untouched"))
    assert killed == whole
    assert len({record["weights"] for record in whole[0]}) == 7
    assert [line["step"] for line in whole[1] if "loss" in line] == list(range(3, 61, 3))
    assert not list((tmp_path / "killed").glob(".*.tmp"))


class Killed(BaseException):
    """Passes every handler, as a kill would."""


@pytest.fixture
def cuts(monkeypatch):
    """Every write to the folder of a run in turn is the first that does not happen; what is saved is sealed at once.

    A kill in the middle of a save is the business of the tests with processes.
    """

    class Cuts:
        last: int | None = None  # the write that is not made any more
        writes = 0

    cuts = Cuts()

    def cut(kind, name, after=lambda *args: None):
        original = getattr(kind, name)

        def write(*args, **settings):
            if cuts.writes == cuts.last:
                raise Killed
            cuts.writes += 1
            original(*args, **settings)
            after(*args)

        monkeypatch.setattr(kind, name, write)

    settle = Checkpoints.settle
    monkeypatch.setattr(Checkpoints, "settle", lambda self, wait=False: settle(self, wait=True))
    cut(files, "write_json")
    cut(MetricsLog, "write")
    cut(Checkpoints, "save", after=lambda self, *args: self._manager.wait_until_finished())
    return cuts


def restarts(folder):
    """The steps of the restart states."""
    return [step for place in (folder / "restart").iterdir() for step in checkpoint.steps(place)]


@pytest.mark.parametrize("minutes", [10, 1e-9])
def test_a_run_that_is_cut_at_any_write_ends_with_the_bits_of_an_untouched_one(minutes, cuts, tiny, train_arm, tmp_path):
    settings = {"log_every": 4, "checkpoints": (0.5,), "save_minutes": minutes}
    whole = everything(train_arm(tiny, tmp_path / "whole", **settings), (0, 8, 16))
    total, unsealed, written, first = cuts.writes, [], [], []
    # Owner; validation loss, checkpoint and its manifest; logged steps; lineage; restart states and their manifests.
    assert total == (1 + 3 * 3 + 4 + 1) + (0 if minutes > 1 else 2 * 7)
    places = range(0, total, 1 if minutes > 1 else 2)
    for last in places:
        folder, cuts.writes, cuts.last = tmp_path / f"cut{last}", 0, last
        with pytest.raises(Killed):
            train_arm(tiny, folder, **settings)
        written.append(len(list((folder / "checkpoints").glob("[0-9]*"))))
        cuts.last, run = None, None
        while run is None:
            advanced = []
            try:
                run = train_arm(tiny, folder, **settings, advance=advanced.append)
            except Damaged as damage:
                unsealed.append((last, damage.path.relative_to(folder).as_posix()))
                files.set_aside(damage.path)
        first.append(16 - advanced.count(1) if 1 in advanced else 16)
        assert everything(run, (0, 8, 16)) == whole, f"cut before write {last}"
        assert not list((folder / "restart").iterdir())
    assert first == sorted(first)
    if minutes > 1:  # it was cut where it should be, and no more was trained again than had to be
        assert written == [0] * 3 + [1] * 5 + [2] * 5 + [3] * 2
        assert unsealed == [(3, "checkpoints/0"), (8, "checkpoints/8"), (13, "checkpoints/16")]
        assert first == [0] * 9 + [8] * 5 + [16]
    else:
        assert first[0] == 0
        assert len(set(first)) > 6  # of restart states, most of them


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on_from_the_step_that_was_under_way(number, tiny_store, tmp_path):
    root = tiny_store.folder.parent.parent
    process = started(root, tmp_path / "stopped", minutes=10, wait=11)
    steps = [int(next(process.stdout)) for _ in range(12)]  # 0 first
    process.send_signal(number)
    out, errors = process.communicate(timeout=meshes.STUCK)
    steps += map(int, out.split())
    assert process.returncode == STOPPED == 75
    assert errors.splitlines()[-1] == f"arm arm is saved at step {steps[-1] + 1}; the same command goes on from here"
    assert "Traceback" not in errors
    assert steps[-1] < 50
    run = RunFolder(tmp_path / "stopped")
    saved = restarts(run.folder) + checkpoint.steps(run.checkpoints)
    assert max(saved) == steps[-1] + 1
    process = started(root, tmp_path / "stopped", minutes=10)
    assert int(next(process.stdout)) == steps[-1] + 1
    finished(process)
    finished(started(root, tmp_path / "untouched", minutes=10))
    kept = (0, 6, 18, 30, 42, 54, 60)
    assert everything(run, kept) == everything(RunFolder(tmp_path / "untouched"), kept)
    assert not list((run.folder / "restart").iterdir())


def test_a_stop_is_answered_within_two_steps_and_costs_no_bit(tiny, tiny_run, train_arm, tmp_path):
    """At every step in turn: before the first, at kept steps, at the last."""
    stop, done, saved, said = Stop(), [], [], []

    def advance(steps):
        done.append(steps)
        stop.requested = True

    while len(done) < 40:
        stop.requested = False
        try:
            run = train_arm(tiny, tmp_path / "run", checkpoints=(0.25, 0.5), stop=stop, advance=advance)
        except Stopped as stopped:
            said.append(str(stopped))
            saved.append(max(restarts(tmp_path / "run") + checkpoint.steps(tmp_path / "run" / "checkpoints")))
        else:
            break
    assert saved == [1, 2, 4, 6, 8, 10, 12, 14, 16]  # what was asked is read once the next step is under way
    where = [*(f"saved at step {step}" for step in saved[:-1]), "finished"]
    assert said == [f"arm arm is {what}; the same command goes on from here" for what in where]
    assert everything(run, (0, 4, 8, 16)) == everything(tiny_run, (0, 4, 8, 16))


@pytest.mark.parametrize(
    "names", [[".experiment.json.12345.tmp"], [".lock", ".experiment.json.1.tmp", ".experiment.json.2.tmp"]]
)
def test_what_a_process_killed_in_its_first_write_leaves_is_cleared_away(names, tiny, tiny_run, train_arm, tmp_path):
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).write_text('{"fingerpr')
    run = train_arm(tiny, tmp_path / "run", checkpoints=(0.25, 0.5))
    assert everything(run, (0, 4, 8, 16)) == everything(tiny_run, (0, 4, 8, 16))
    assert not list(run.folder.glob(".*.tmp"))


def test_any_changed_byte_of_the_log_is_found(tiny_run, tmp_path):
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    whole, none = metrics(run.metrics)
    original = run.metrics.read_bytes()
    assert none == 0
    assert len(whole) == 4 + 8 == len(original.splitlines())
    assert run.damaged_metrics() is None
    for place in range(len(original)):
        spoilt = bytearray(original)
        spoilt[place] ^= 1
        run.metrics.write_bytes(spoilt)
        lines, damaged = metrics(run.metrics)
        assert (len(lines), damaged) == (
            (10, 1) if original[place : place + 1] == b"\n" and place + 1 < len(original) else (11, 1)
        )
        assert [line for line in whole if line in lines] == lines
        said = f"{run.metrics} has {len(lines)} whole lines and 1 damaged ones, expected 12 whole ones"
        assert run.damaged_metrics() == said
    run.metrics.write_bytes(b"".join(original.splitlines(keepends=True)[:-1]))
    assert run.damaged_metrics() == f"{run.metrics} has 11 whole lines and 0 damaged ones, expected 12 whole ones"
    run.metrics.unlink()
    assert run.damaged_metrics() == f"{run.metrics} has 0 whole lines and 0 damaged ones, expected 12 whole ones"


def test_a_line_that_was_cut_is_written_again(tiny, tiny_run, train_arm, tmp_path):
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    run = train_arm(tiny, tmp_path / "run", checkpoints=(0.25, 0.5))
    assert path.read_bytes() == (tiny_run.folder / "metrics.jsonl").read_bytes()
    assert everything(run, (0, 4, 8, 16)) == everything(tiny_run, (0, 4, 8, 16))


def test_a_checkpoint_that_is_asked_for_later_is_the_one_that_was_kept_from_the_start(tiny, tiny_run, train_arm, tmp_path):
    run = train_arm(tiny, tmp_path / "run")
    last = run.folder / "checkpoints" / "16"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in last.rglob("*") if path.is_file()}
    assert len(before) > 3
    for checkpoints, steps in [((0.5,), 8), ((0.25, 0.5), 4), ((0.25,), 0)]:  # no more steps than are needed
        advanced = []
        train_arm(tiny, tmp_path / "run", checkpoints=checkpoints, advance=advanced.append)
        assert advanced.count(1) == steps
        assert sum(advanced) == 16
    for step in (0, 4, 8, 16):
        found, kept = run.record(step), tiny_run.record(step)
        found.pop("parent")  # the last checkpoint descends from the one before it at its time
        kept.pop("parent")
        assert found == kept
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert run.record(16)["parent"]["step"] == 0
    assert metrics(run.metrics) == metrics(tiny_run.metrics)
    assert [r["step"] for r in files.read_json(run.folder / "lineage.json")["checkpoints"]] == [0, 4, 8, 16]


def test_a_run_is_complete_once_its_lineage_names_every_checkpoint(tiny_run, tmp_path):
    steps = [0, 4, 8, 16]
    run = RunFolder(tmp_path / "run")
    assert not run.complete(steps)
    shutil.copytree(tiny_run.folder, run.folder)
    assert run.complete(steps)
    assert not run.complete([*steps, 12])
    path = run.folder / "lineage.json"
    lineage = files.read_json(path)
    files.write_json(path, {**lineage, "checkpoints": lineage["checkpoints"][:-1]})
    assert not run.complete(steps)  # of a process killed after its last checkpoint
    path.unlink()
    assert not run.complete(steps)


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from natfp_jax.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


class Said(Progress):
    """What was said, in a list."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(holder, tmp_path):
    folder, said = tmp_path / "run", Said()
    assert held(folder)
    with pytest.raises(UserError) as caught, alone(folder, said):
        pass
    assert str(caught.value).startswith(f"{folder} is in use by another process (pid {holder.pid} on ")
    assert "\n" not in str(caught.value)
    assert said.lines == []
    holder.kill()
    holder.wait()
    assert not held(folder)
    with alone(folder, said):
        assert held(folder)
        assert f"pid {os.getpid()} on " in (folder / ".lock").read_text()
        assert str(holder.pid) not in (folder / ".lock").read_text()
    assert not held(folder)
    assert said.lines == [
        f"{folder} was left by pid {holder.pid} on {socket.gethostname()}, which ended in its work: going on from there"
    ]


def test_a_lock_that_was_given_up_tells_of_nobody(tmp_path):
    folder, said = tmp_path / "run", Said()
    assert not held(folder)
    for _ in range(2):
        with alone(folder, said):
            assert held(folder)
        assert not held(folder)
        assert (folder / ".lock").read_text() == ""

    def failing():
        with alone(folder, said):
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert (folder / ".lock").read_text() == ""
    assert said.lines == []


def test_another_holder_is_waited_for_where_that_was_asked(holder, tmp_path):
    folder, said, taken = tmp_path / "run", Said(), threading.Event()

    def wait():
        with alone(folder, said, wait=True):
            taken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not taken.wait(1)
    who = f"pid {holder.pid} on {socket.gethostname()}"
    assert said.lines == [f"another process ({who}) is at work on {folder}: waiting for it"]
    holder.kill()
    assert taken.wait(10)
    thread.join(10)
    assert said.lines[1:] == [f"{folder} was left by {who}, which ended in its work: going on from there"]
