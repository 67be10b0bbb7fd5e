"""What is wrong beyond the study's own fields: folders of others, files of others, disks that are full.

Each is answered with one line, exit code 2 and nothing written over; `test_cli` has the mistakes in a study.
"""

import errno
import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from test_stages import STUDY as TINY

from natfp_jax import cli, config, files, mesh, stages, texts
from natfp_jax.config import Run

STUDY = replace(TINY, name="small", twin=None, sampling=replace(TINY.sampling, checkpoints=(1.0,)))

FILE = "from natfp_jax.config import *\n\nstudy = from_json(Study, {!r})\n"


@pytest.fixture(scope="module", autouse=True)
def one_of_the_devices():
    """As on most machines; programs for one device are compiled already."""
    make = mesh.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make", lambda axes: make(axes, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "small.py"
    path.write_text(FILE.format(config.to_json(STUDY)))
    return path


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """What `natfp run` leaves; read it only."""
    out = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["natfp", "run", str(study), "--out", str(out)])
        cli.main()
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A finished study to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def tree(folder):
    return {
        path.relative_to(folder): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def refused(monkeypatch, capsys, study, out):
    """Runs a verb, which must end with 2 and leave every file as it was; returns its one line on standard error."""

    def run(*arguments, verb="run"):
        before = tree(out)
        monkeypatch.setattr(sys, "argv", ["natfp", verb, str(study), "--out", str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        told = capsys.readouterr()
        assert told.out == ""
        lines = told.err.splitlines()
        assert lines[-1].startswith("natfp: ")
        assert sum(line.startswith("natfp: ") for line in lines) == 1
        assert "Traceback" not in told.err
        assert tree(out) == before
        return lines[-1]

    return run


def runs_of(out):
    """Arm → its run's folder."""
    listed = files.read_json(out / "studies" / "small" / "arms.json")
    return {arm: out / "runs" / entry["fingerprint"][:16] for arm, entry in listed.items()}


# --- what belongs to others -------------------------------------------------------------------------------------------


def test_the_folder_of_another_study(refused, out):
    mine = config.fingerprint(replace(STUDY, run=Run(), sampling=replace(STUDY.sampling, temperature=0.5)))
    its = files.read_json(out / "studies" / "small" / "study.json")["fingerprint"]
    said = refused("sampling.temperature=0.5")
    assert f"holds the study {its[:16]}, expected {mine[:16]} (they differ in sampling.temperature)" in said


@pytest.mark.parametrize("verb", ["run", "train", "sample", "attribute"])
def test_the_run_of_another_experiment(refused, out, verb):
    mine, its = runs_of(out).values()
    shutil.rmtree(mine)
    shutil.copytree(its, mine)
    listed = files.read_json(out / "studies" / "small" / "arms.json")
    said = refused(verb=verb)
    assert str(mine) in said
    for arm in ("init0", "init1"):
        assert listed[arm]["fingerprint"] in said


def test_a_run_folder_that_holds_something_else(refused, out):
    mine = runs_of(out)["init0"]
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert f"{mine} is not empty and has no experiment.json" in refused()


def test_the_draw_of_another_arm(refused, out):
    folder = out / "studies" / "small" / "draws"
    shutil.copy(folder / "init1.step16.draw0.parquet", folder / "init0.step16.draw0.parquet")
    assert re.search(r"init0.step16.draw0.parquet was drawn from weights [0-9a-f]{64}, expected [0-9a-f]{64}", refused())


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all" * 9])
def test_a_draw_that_is_no_sample_file(refused, out, data):
    (out / "studies" / "small" / "draws" / "init0.step16.draw0.parquet").write_bytes(data)
    assert "init0.step16.draw0.parquet is no sample file of natfp" in refused()


@pytest.mark.parametrize("name", ["study.json", "attribution.json"])
def test_a_json_file_that_is_cut(refused, out, name):
    path = out / "studies" / "small" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is not valid JSON" in refused()


def test_a_token_store_that_is_cut(refused, out):
    (path,) = (out / "corpora").glob("*/validation.bin")
    path.write_bytes(path.read_bytes()[:-2])
    assert f"{path} has " in refused()


@pytest.mark.parametrize(("verb", "needed"), [("sample", "train"), ("attribute", "train"), ("report", "attribute")])
def test_a_stage_before_its_time(refused, out, verb, needed):
    shutil.rmtree(out / "runs")
    (out / "studies" / "small" / "attribution.json").unlink()
    assert f"run `natfp {needed}` first" in refused(verb=verb)


def test_a_study_that_another_process_is_at(refused, out):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out / "studies" / "small")], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert f"is in use by another process (pid {holder.pid} on " in refused()
    finally:
        holder.communicate()


HOLDER = """
import sys
from pathlib import Path
from natfp_jax.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


# --- what the system refuses ------------------------------------------------------------------------------------------

SAID = "No space left on device"
ERRORS = {
    "write": (OSError(errno.ENOSPC, SAID), SAID),  # to a file that is open: the system names none
    "open": (OSError(errno.ENOSPC, SAID, "somewhere"), f"{SAID}: somewhere"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "somewhere"), "Permission denied: somewhere"),
    "wrapped": (ValueError(f'RESOURCE_EXHAUSTED: Error writing "norm": [OS error 28: ENOSPC {SAID}]'), SAID),
    "sqlite": (sqlite3.OperationalError("database or disk is full"), SAID),
}


@pytest.mark.parametrize(("error", "told"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("lost", ["draws", "attribution.json"])
def test_a_disk_that_takes_no_more(refused, out, monkeypatch, error, told, lost):
    """Whatever it is wrapped in, and whether a file's name comes with it."""
    path = out / "studies" / "small" / lost
    path = path / "init1.step16.draw0.parquet" if lost == "draws" else path
    path.unlink()

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((texts.pq, "write_table") if lost == "draws" else (files.json, "dump")), full)
        said = refused()
    assert said == f"natfp: {told}: make room or give another --out, then run the same command again"
    assert not list(out.rglob("*.tmp"))
    if error is ERRORS["write"][0]:
        cli.main()  # with room again
        assert path.exists()


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch, study, out):
    def broken(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(stages, "draws", broken)
    monkeypatch.setattr(sys, "argv", ["natfp", "run", str(study), "--out", str(out)])
    with pytest.raises(ValueError, match="Out of memory"):
        cli.main()


def natfp(*arguments):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [Path(sys.executable).with_name("natfp"), *map(str, arguments)], capture_output=True, text=True, env=kept, check=False
    )


def test_a_real_disk_that_is_full(study, tmp_path):
    """Where this user may mount one; else a limit on the size of a file stands for it."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True, check=False
    ).returncode
    try:
        if mounted:
            done = natfp("run", study, "--out", small / "out")
        else:
            command = f"ulimit -f 40; exec {Path(sys.executable).with_name('natfp')} run {study} --out {small / 'out'}"
            done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.splitlines()
        assert lines[-1].startswith("natfp: ")
        assert lines[-1].endswith("make room or give another --out, then run the same command again")
        assert "Traceback" not in done.stderr
        assert not list(small.glob("out/corpora/*/meta.json"))
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)


SWALLOWED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs deaf to Ctrl-C
from natfp_jax import cli
def work(*_):
    try:  # as in a callback of a library
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    except KeyboardInterrupt:
        print("ignored")
cli._perform = work
sys.argv = ["natfp", "run", "study.py"]
cli.main()
"""


def test_an_interrupt_that_a_library_would_swallow_ends_the_process():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("", "natfp: stopped; the same command goes on from here\n")


def test_a_study_that_is_missing(tmp_path):
    done = natfp("run", tmp_path / "none.py", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"natfp: {tmp_path / 'none.py'} is no file: give a study such as configs/quickstart.py\n"
    assert not (tmp_path / "out").exists()
