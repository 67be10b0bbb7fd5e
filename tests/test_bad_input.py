"""What is wrong beyond the study's own fields: folders of others, files of others, damaged files, disks that are full.

What cannot be mended is answered with one line, exit code 2 and nothing written over; what can be made again is set aside and
made again, or refused where the user is strict. `test_cli` has the mistakes in a study.
"""

import errno
import hashlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from test_stages import STUDY as TINY
from test_stages import results

from natfp_jax import cli, config, files, mesh, processes, stages, texts
from natfp_jax.config import Run
from natfp_jax.stopping import STOPPED

STUDY = replace(TINY, name="small", twin=None, sampling=replace(TINY.sampling, checkpoints=(1.0,)))

FILE = "from natfp_jax.config import *\n\nstudy = from_json(Study, {!r})\n"


@pytest.fixture(scope="module", autouse=True)
def one_of_the_devices():
    """As on most machines; programs for one device are compiled already."""
    make = mesh.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make", lambda axes: make(axes, jax.devices()[:1]))
        patch.setattr(processes, "start", lambda *_: None)  # JAX runs in this process already
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
    for name in ("parquet", "manifest.json"):
        shutil.copy(folder / f"init1.step16.draw0-00000-of-00003.{name}", folder / f"init0.step16.draw0-00000-of-00003.{name}")
    assert re.search(
        r"init0.step16.draw0-00000-of-00003.parquet was drawn from weights [0-9a-f]{64}, expected [0-9a-f]{64}", refused()
    )


# --- what is damaged --------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def hand_written(path):
    path.write_text('{"record": {"step": 16}, "files": {}, "inputs": "1"}\n')


def lose(path):
    path.unlink()


def relabel(path):
    """Every file is what was written, but the record says other weights: found once they are loaded."""
    listed = files.read_json(path)
    files.write_json(path, {**listed, "record": {**listed["record"], "weights": "0" * 64}})


DRAW, ATTRIBUTION, STEP = (
    "studies/small/draws/init0.step16.draw0-00000-of-00003",
    "studies/small/attribution.json",
    "runs/INIT1/checkpoints/16",
)
# What is damaged; how; what is set aside; and what is lost beside it, without which nobody would read it.
DAMAGE = {
    "draw, cut": (f"{DRAW}.parquet", cut, f"{DRAW}.parquet", [ATTRIBUTION]),
    "draw, flipped": (f"{DRAW}.parquet", flip, f"{DRAW}.parquet", [ATTRIBUTION]),
    "draw, empty": (f"{DRAW}.parquet", empty, f"{DRAW}.parquet", [ATTRIBUTION]),
    "draw's manifest, flipped": (f"{DRAW}.manifest.json", flip, f"{DRAW}.manifest.json", []),
    "draw's manifest, empty": (f"{DRAW}.manifest.json", empty, f"{DRAW}.manifest.json", []),
    "attribution, cut": (ATTRIBUTION, cut, ATTRIBUTION, []),
    "attribution, flipped": (ATTRIBUTION, flip, ATTRIBUTION, []),
    "attribution, by hand": (ATTRIBUTION, hand_written, ATTRIBUTION, []),
    "timings": ("studies/small/timings.json", cut, "studies/small/timings.json", []),
    "summary": ("studies/small/report/summary.json", flip, "studies/small/report/summary.json", []),
    "ids": ("corpora/*/train-00001-of-00002.bin", flip, "corpora/*", []),
    "validation": ("corpora/*/validation.bin", cut, "corpora/*", []),
    "prompts, lost": ("corpora/*/prompts.jsonl", lose, "corpora/*", []),
    "tokenizer": ("corpora/*/tokenizer.json", flip, "corpora/*", []),
    "meta, flipped": ("corpora/*/meta.json", flip, "corpora/*", []),
    "meta, empty": ("corpora/*/meta.json", empty, "corpora/*", []),
    "data's description": ("data/stories/*/*/dataset_info.json", cut, "data/stories/*/*", []),
    "data": ("data/stories/*/*/*array_record*", flip, "data/stories/*/*", ["corpora/*/meta.json"]),
    "data's manifest": ("data/stories/*/*/manifest.json", flip, "data/stories/*/*", []),
    "checkpoint's manifest": (f"{STEP}/manifest.json", flip, STEP, []),
    "checkpoint's manifest, lost": (f"{STEP}/manifest.json", lose, STEP, []),
    "weights": (
        f"{STEP}/params/d/*",
        flip,
        STEP,
        ["studies/small/draws/init1.step16.draw0-00000-of-00003.parquet", ATTRIBUTION],
    ),
    "record": ("runs/INIT1/checkpoints/0/manifest.json", relabel, "runs/INIT1/checkpoints/0", [STEP]),
    "lineage": ("runs/INIT1/lineage.json", cut, "runs/INIT1/lineage.json", []),
}

WHOLE = {"draw, cut", "attribution, by hand", "ids", "data", "weights", "record", "lineage"}  # one that each stage reads


@pytest.fixture
def spoilt(request, out):
    """A finished study with one damage; the path that is to be set aside."""
    name, damage, aside, lost = DAMAGE[request.param]

    def one(pattern):
        return max(out.glob(pattern.replace("INIT1", runs_of(out)["init1"].name)), key=lambda path: path.stat().st_size)

    aside = one(aside)
    damage(one(name))
    for other in lost:
        path = one(other)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return aside


@pytest.mark.parametrize("spoilt", DAMAGE, indirect=True)
def test_damage_is_refused_where_the_user_is_strict(refused, spoilt):
    said = refused("--strict")
    assert str(spoilt) in said
    assert said.endswith(": remove it, or run the same command without --strict")


@pytest.mark.parametrize(
    "spoilt",
    [what if what in WHOLE else pytest.param(what, marks=pytest.mark.slow) for what in DAMAGE],
    indirect=True,
)
def test_damage_is_set_aside_and_made_again_otherwise(monkeypatch, capsys, study, finished, out, spoilt):
    monkeypatch.setattr(sys, "argv", ["natfp", "run", str(study), "--out", str(out)])
    damaged = {p.relative_to(spoilt): p.read_bytes() for p in [spoilt, *spoilt.rglob("*")] if p.is_file()}
    cli.main()
    said = capsys.readouterr()
    aside = spoilt.with_name(f"{spoilt.name}.damaged")
    told = " ".join(said.err.split())  # lines are folded
    assert f"set aside as {aside}, going on from what is whole".replace(" ", "") in told.replace(" ", "")
    assert str(spoilt) in told.replace(" ", "")
    assert told.count("set aside as") == 1
    assert "init 0 vs 1" in said.out
    assert {p.relative_to(aside): p.read_bytes() for p in [aside, *aside.rglob("*")] if p.is_file()} == damaged
    assert results(out, "small") == results(finished, "small")
    before = tree(out)
    cli.main()  # and all is well
    again = capsys.readouterr()
    assert (again.out, again.err) == (said.out, "")
    assert tree(out) == before


def test_damage_of_the_same_file_again_has_another_name(monkeypatch, study, finished, out):
    monkeypatch.setattr(sys, "argv", ["natfp", "run", str(study), "--out", str(out)])
    path = out / ATTRIBUTION
    for name in ("attribution.json.damaged", "attribution.json.damaged-2", "attribution.json.damaged-3"):
        path.write_text(name)
        cli.main()
        assert path.with_name(name).read_text() == name
    assert results(out, "small") == results(finished, "small")


@pytest.mark.parametrize("strict", [[], ["--strict"]])
@pytest.mark.parametrize("name", ["studies/small/study.json", "studies/small/arms.json", "runs/INIT1/experiment.json"])
@pytest.mark.parametrize("damage", [cut, flip, empty, hand_written])
def test_a_damaged_owner_is_refused_in_any_case(refused, out, name, damage, strict):
    """Whose folder it is cannot be made again."""
    path = out / name.replace("INIT1", runs_of(out)["init1"].name)
    damage(path)
    assert f"{path} is " in refused(*strict)
    assert not list(out.rglob("*.damaged"))


def test_a_damaged_log_is_told_of_and_changes_no_number(monkeypatch, capsys, study, finished, out):
    path = runs_of(out)["init1"] / "metrics.jsonl"
    flip(path)
    monkeypatch.setattr(sys, "argv", ["natfp", "run", str(study), "--out", str(out)])
    cli.main()
    told = capsys.readouterr().err.replace("\n", "").replace(" ", "")
    assert (
        f"{path} has 5 whole lines and 1 damaged ones, expected 6 whole ones: the curves show what is whole".replace(" ", "")
        in told
    )
    found, whole = results(out, "small"), results(finished, "small")
    found.pop("metrics"), whole.pop("metrics")
    assert found == whole
    assert not list(out.rglob("*.damaged"))


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
    "immutable": (PermissionError(errno.EPERM, "Operation not permitted", "somewhere"), "Operation not permitted: somewhere"),
    "wrapped": (ValueError(f'RESOURCE_EXHAUSTED: Error writing "norm": [OS error 28: ENOSPC {SAID}]'), SAID),
    "sqlite": (sqlite3.OperationalError("database or disk is full"), SAID),
}


@pytest.mark.parametrize(("error", "told"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("lost", ["draws", "attribution.json"])
def test_a_disk_that_takes_no_more(refused, out, monkeypatch, error, told, lost):
    """Whatever it is wrapped in, and whether a file's name comes with it."""
    path = out / "studies" / "small" / lost
    path = path / "init1.step16.draw0-00000-of-00003.parquet" if lost == "draws" else path
    path.unlink()

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((texts.pq, "write_table") if lost == "draws" else (files, "_sealed")), full)
        said = refused()
    assert said == f"natfp: {told}: make room or give another --out, then run the same command again"
    assert not list(out.rglob("*.tmp"))
    if error is ERRORS["write"][0]:
        cli.main()  # with room again
        assert path.exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_a_place_where_no_folder_can_be_made(refused):
    said = refused("--out", "/proc/somewhere")
    assert said.startswith("natfp: /proc/somewhere/studies/small cannot be made (")
    assert said.endswith("): give another --out")


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
        os.kill(os.getpid(), int(number))
        time.sleep(9)
    except BaseException:
        print("ignored")
cli._stages = work
study, number = sys.argv[1:]
sys.argv = ["natfp", "run", study]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_would_swallow_ends_the_process(number, study):
    command = [sys.executable, "-c", SWALLOWED, str(study), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == STOPPED == 75
    assert (done.stdout, done.stderr) == ("", "natfp: stopped; the same command goes on from here\n")


def test_a_study_that_is_missing(tmp_path):
    done = natfp("run", tmp_path / "none.py", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"natfp: {tmp_path / 'none.py'} is no file: give a study such as configs/quickstart.py\n"
    assert not (tmp_path / "out").exists()
