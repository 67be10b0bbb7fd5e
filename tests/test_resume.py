"""Killed at any moment, a run ends with the bits of an untouched one; and no two processes make the same run.

As a program (`python test_resume.py ROOT FOLDER`) this file trains one arm, and says at which step it is.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natfp_jax import config, files, mesh
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Corpus, Data, Experiment, Model, Run, Stories
from natfp_jax.corpus import prepare
from natfp_jax.errors import UserError
from natfp_jax.lineage import identity
from natfp_jax.lock import alone, held
from natfp_jax.progress import Progress
from natfp_jax.runs import MetricsLog, RunFolder
from natfp_jax.train import train

CORPUS = Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.1, shards=2)
EXPERIMENT = Experiment(model=Model(width=32, layers=2, heads=4), data=Data(seq_len=32, windows=160, epochs=3, batch=8))
SETTINGS = Run(checkpoints=(0.1, 0.3, 0.5, 0.7, 0.9), log_every=3, validation_windows=16)


def work(root, folder):
    store, data = prepare(CORPUS, root, Progress(quiet=True)), EXPERIMENT.data
    pool = store.windows(data.seq_len, data.windows).sha256()
    done = 0

    def advance(steps):
        nonlocal done
        done += steps
        print(done, flush=True)

    who = identity(EXPERIMENT, store.sha256, store.tokenizer.sha256, pool)
    with alone(folder):
        train(EXPERIMENT, who, store, RunFolder(folder), SETTINGS, mesh.make(config.Mesh()), "arm", advance)


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.exit()


def started(root, folder):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(config.__file__).parents[1])
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")  # the first process compiles for all
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, __file__, str(root), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process):
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors


def everything(run, steps):
    """All that a run has recorded."""
    lineage = json.loads((run.folder / "lineage.json").read_text())
    return [run.record(step) for step in steps], run.metrics(), lineage


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
        process.communicate(timeout=100)
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


def test_a_run_that_is_cut_at_any_write_ends_with_the_bits_of_an_untouched_one(tiny, train_arm, tmp_path, monkeypatch):
    """Every write to the folder in turn is the first that does not happen."""
    writes = 0
    last = None  # the write that is not made any more

    def cut(kind, name):
        original = getattr(kind, name)

        def write(*args, **settings):
            nonlocal writes
            if writes == last:
                raise Killed
            writes += 1
            return original(*args, **settings)

        monkeypatch.setattr(kind, name, write)

    cut(files, "write_json")
    cut(MetricsLog, "write")
    cut(Checkpoints, "save")
    settings = {"log_every": 4, "checkpoints": (0.5,)}
    whole = everything(train_arm(tiny, tmp_path / "whole", **settings), (0, 8, 16))
    total, written = writes, []
    assert total == 1 + 3 * 2 + 4 + 1  # owner; validation loss and checkpoint; logged steps; lineage
    for last in range(total):
        writes = 0
        with pytest.raises(Killed):
            train_arm(tiny, tmp_path / f"cut{last}", **settings)
        written.append(len(list((tmp_path / f"cut{last}" / "checkpoints").glob("[0-9]*"))))
        writes, keep, last = 0, last, None
        run = train_arm(tiny, tmp_path / f"cut{keep}", **settings)
        assert everything(run, (0, 8, 16)) == whole, f"cut before write {keep}"
    assert written == [0] * 3 + [1] * 4 + [2] * 4 + [3]  # it was cut where it should be


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
    assert run.metrics() == tiny_run.metrics()
    assert [r["step"] for r in json.loads((run.folder / "lineage.json").read_text())["checkpoints"]] == [0, 4, 8, 16]


def test_a_run_is_complete_once_its_lineage_names_every_checkpoint(tiny_run, tmp_path):
    steps = [0, 4, 8, 16]
    run = RunFolder(tmp_path / "run")
    assert not run.complete(steps)
    shutil.copytree(tiny_run.folder, run.folder)
    assert run.complete(steps)
    assert not run.complete([*steps, 12])
    path = run.folder / "lineage.json"
    lineage = json.loads(path.read_text())
    path.write_text(json.dumps({**lineage, "checkpoints": lineage["checkpoints"][:-1]}))
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


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    assert not held(folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[1])},
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert held(folder)
        with pytest.raises(UserError) as caught, alone(folder):
            pass
        assert str(caught.value).startswith(f"{folder} is in use by another process (pid {holder.pid} on ")
        assert "\n" not in str(caught.value)
    finally:
        holder.kill()
        holder.communicate()
    assert not held(folder)
    with alone(folder):
        assert held(folder)
        assert f"pid {os.getpid()} on " in (folder / ".lock").read_text()
        assert str(holder.pid) not in (folder / ".lock").read_text()
    assert not held(folder)
