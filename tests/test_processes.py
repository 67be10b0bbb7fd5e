"""Several processes are one program: they agree, stop and fail together, and what they make has the bits of one process.

As a program (`python test_processes.py WHAT FILE PORT N I`) this file is one of N processes that do WHAT, `calls` or `saves`,
and writes what came of it to FILE.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from natfp_jax import config, files, mesh, processes, texts
from natfp_jax.errors import Damaged, UserError
from natfp_jax.launcher import Launch

NATFP = Path(sys.executable).with_name("natfp")
HEARTBEAT = 5  # the least that there is
SLACK = 5  # seconds, for a machine that is busy otherwise


# --- as a program -----------------------------------------------------------------------------------------------------


def calls(path):
    """What every kind of call gives this process, and what it did itself for that."""
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mine, done = jax.process_index(), []

    def act(name, outcome):
        def action():
            done.append(name)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return action

    @contextlib.contextmanager
    def context():
        done.append("entered")
        yield
        done.append("left")

    def failed(call, *arguments):
        try:
            call(*arguments)
        except UserError as error:
            kind = [str(error.path), error.why] if isinstance(error, Damaged) else None
            return {"line": str(error), "agreed": error.agreed, "damaged": kind}
        except ZeroDivisionError:
            return "its own error"

    def both():
        with processes.leading(context()):
            processes.barrier()
            return processes.led(act("inside", list(done)))

    found = {
        "value": processes.led(act("value", {"of": [mine, "é" * 5000, None]})),
        "error": failed(processes.led, act("error", UserError("one line"))),
        "damaged": failed(processes.led, act("damaged", Damaged(Path("some/file"), "is short"))),
        "defect": failed(processes.led, act("defect", ZeroDivisionError("what"))),
        "leading": both(),
        "agreed": failed(processes.agree, {"study": "a", "code": "b"}),
        "differs": failed(processes.agree, {"study": "a", "code": "b" * (1 + mine)}),
        "lacks": failed(processes.agree, {"study": "a"} if mine else {"study": "a", "code": "b"}),
    }
    spread = NamedSharding(mesh.make(config.Mesh()), PartitionSpec(mesh.AXES))
    laid = mesh.lay(np.arange(4.0), spread)
    found["own"] = [float(value) for shard in laid.addressable_shards for value in shard.data]
    found["gathered"] = processes.gathered({"a": laid, "b": 3})["a"].tolist()
    found["most"] = processes.most(3 + mine)
    return {**found, "done": done, "first": processes.first(), "many": processes.many()}


def saves(path):
    """Two folders in turn, each of them still at work while the other begins."""
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from natfp_jax import checkpoint
    from natfp_jax.checkpoint import Checkpoints

    state = {"w": mesh.lay(np.arange(8.0), NamedSharding(mesh.make(config.Mesh(fsdp=4)), PartitionSpec("fsdp")))}
    with Checkpoints(path.with_name("one")) as one, Checkpoints(path.with_name("other"), keep=2) as other:
        for step in range(30):
            for folder in (one, other):
                folder.save(step, state, state, {"step": step})
    return [checkpoint.steps(path.with_name(name)) for name in ("one", "other")]


if __name__ == "__main__":
    what, path, port, number, place = sys.argv[1:]
    processes.start(Launch("arguments", f"localhost:{port}", int(number), int(place)), HEARTBEAT)
    with processes.watched(HEARTBEAT):
        Path(path).write_text(json.dumps({"calls": calls, "saves": saves}[what](Path(path))))
    processes.leave(0, together=True)

from tests.soak import hosts, meshes, studies  # noqa: E402

# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path):
    """Starts `natfp` twice, as one program; nothing outlives the test."""
    begun = []

    def start(*arguments, environments=({}, {}), devices=1):
        coordinator = f"localhost:{meshes.free_port()}"
        pair = [
            subprocess.Popen(
                [NATFP, *map(str, arguments), *map(str, own), *meshes.command(coordinator, 2, place)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=meshes.environment(devices, **{name: value for name, value in more.items() if name != "arguments"}),
            )
            for place, more in enumerate(environments)
            for own in [more.get("arguments", [])]
        ]
        begun.extend(pair)
        return pair

    yield start
    meshes.cleared(begun)


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.py"
    path.write_text(meshes.STUDY)
    return path


def said(errors):
    """The lines of natfp; its libraries say things of their own."""
    return [line for line in errors.splitlines() if line.startswith("natfp: ")]


# --- agreement --------------------------------------------------------------------------------------------------------


def of_both(what, tmp_path):
    """What came of it in each of two processes."""
    port, places = str(meshes.free_port()), [tmp_path / "0.json", tmp_path / "1.json"]
    pair = [
        subprocess.Popen(
            [sys.executable, __file__, what, path, port, "2", str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=meshes.environment(2),
        )
        for place, path in enumerate(places)
    ]
    for code, _, errors in meshes.finished(pair, meshes.STUCK):
        assert code == 0, errors
    return [json.loads(path.read_text()) for path in places]


def test_two_folders_may_be_saved_at_once(tmp_path):
    assert of_both("saves", tmp_path)[0] == [list(range(30)), [28, 29]]


def test_the_first_process_does_and_all_know(tmp_path):
    first, other = of_both("calls", tmp_path)
    assert (first.pop("first"), other.pop("first")) == (True, False)
    assert first.pop("done") == ["value", "error", "damaged", "defect", "entered", "inside", "left"]
    assert other.pop("done") == []
    assert first.pop("defect") == "its own error"
    assert other.pop("defect")["line"] == "the first process failed (ZeroDivisionError); it says why"
    assert (first.pop("own"), other.pop("own")) == ([0.0, 1.0], [2.0, 3.0])
    assert first == other
    assert first["many"]
    assert first["value"] == {"of": [0, "é" * 5000, None]}
    assert first["error"] == {"line": "one line", "agreed": True, "damaged": None}
    assert first["damaged"] == {"line": "some/file is short", "agreed": True, "damaged": ["some/file", "is short"]}
    assert first["leading"] == ["value", "error", "damaged", "defect", "entered"]
    assert first["agreed"] is None
    host = os.uname().nodename
    differs = f"process 1 on {host} has another code than process 0 on {host}: "
    assert first["differs"]["line"].startswith(f"{differs}bb and b; ")
    assert first["lacks"]["line"].startswith(f"{differs}None and b; ")
    assert first["differs"]["agreed"]
    assert first["most"] == 4
    assert first["gathered"] == [0.0, 1.0, 2.0, 3.0]


def test_a_process_that_has_computed_already_stays_alone_and_records_no_flag_that_came_too_late(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # as conftest has it
    jax.block_until_ready(jax.numpy.zeros(1))
    processes.start(None, HEARTBEAT)
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
    assert not processes.many()


def refused(pair):
    """What the first process says: one line; the other one says none."""
    (code, _, errors), (other_code, _, other_errors) = meshes.finished(pair, meshes.STUCK)
    assert (code, other_code) == (2, 2), errors + other_errors
    assert said(other_errors) == []
    assert "Traceback" not in errors + other_errors
    (line,) = said(errors)
    return line


def test_commands_that_differ_are_refused_by_name(both, study, tmp_path):
    others = ({"arguments": ["experiment.seeds.order=0"]}, {"arguments": ["experiment.seeds.order=3"]})
    line = refused(both("train", study, "--out", tmp_path / "out", environments=others))
    assert line.startswith("natfp: process 1 on ")
    assert " has another study than process 0 on " in line
    assert not list((tmp_path / "out").glob("runs/*"))


@pytest.mark.slow
def test_another_version_of_the_code_is_refused_by_name(both, study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(Path(config.__file__).parent, other / "natfp_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "natfp_jax" / "optim.py", "a") as file:
        file.write("# changed\n")
    line = refused(both("train", study, "--out", tmp_path / "out", environments=({}, {"PYTHONPATH": str(other)})))
    assert " has another version of natfp_jax than process 0 on " in line
    assert not list((tmp_path / "out").glob("runs/*"))


def test_what_the_first_process_refuses_ends_all_with_one_line(both, study, tmp_path):
    folder = tmp_path / "out" / "studies" / "soak"
    files.write_json(folder / "arms.json", {})
    files.write_json(folder / "study.json", {"fingerprint": "0" * 64, "study": {}})
    line = refused(both("train", study, "--out", tmp_path / "out"))
    assert line.startswith(f"natfp: {folder} holds the study {'0' * 16}, expected ")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1"}, "natfp: SLURM_NTASKS is 2 without SLURM_STEP_NODELIST and SLURM_PROCID"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "natfp: Open MPI is set by half: got OMPI_COMM_WORLD_SIZE without "),
    ],
)
def test_an_environment_that_is_set_by_half_is_refused(environment, line, study, tmp_path):
    started = [NATFP, "run", study, "--out", tmp_path / "out"]
    ended = subprocess.run(
        started, capture_output=True, text=True, check=False, timeout=meshes.STUCK, env=meshes.environment(1, **environment)
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(line)
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- stopped and lost -------------------------------------------------------------------------------------------------


def until(step, out, pair, before=()):
    """Waits until a run has logged so many steps, in no log of `before`: a run that goes on writes a new one."""
    late = time.monotonic() + meshes.STUCK
    while True:
        for path in out.glob("runs/*/metrics.jsonl"):
            text = path.read_text()
            lines = text[: text.rfind("\n") + 1].splitlines()  # the last line may be under way
            if path.stat().st_ino not in before and any(json.loads(line)["step"] >= step for line in lines):
                return
        assert time.monotonic() < late
        ended = [(process.returncode, process.stderr.read()[-1000:]) for process in pair if process.poll() is not None]
        assert not ended
        time.sleep(0.01)


def test_processes_that_are_stopped_and_killed_end_with_the_bits_of_untouched_ones(both, tmp_path):
    study, out, untouched = tmp_path / "study.py", tmp_path / "out", tmp_path / "untouched"
    study.write_text(hosts.study(32, save_minutes=10))
    command = ["train", study, "run.mesh.fsdp=2", "run.log_every=2", f"run.heartbeat_seconds={HEARTBEAT}", "--out"]
    for code, _, errors in meshes.finished(both(*command, untouched), meshes.STUCK):
        assert code == 0, errors

    # a signal to one process, and not the first: all save the same step
    pair = both(*command, out)
    until(6, out, pair)
    pair[1].send_signal(signal.SIGTERM)
    (code, _, errors), (other_code, _, other_errors) = meshes.finished(pair, meshes.STUCK)
    assert (code, other_code) == (75, 75), errors + other_errors
    (manifest,) = out.glob("restart/*/*/manifest.json")
    saved = json.loads(manifest.read_text())["record"]["step"]
    assert 6 <= saved < 26
    assert said(errors) == [f"natfp: arms init0, init1 are saved at step {saved}; the same command goes on from here"]
    assert [line.partition(";")[0] for line in said(other_errors)] == ["natfp: stopping once the next step is saved"]
    for place in range(2):  # its own part of the weights
        assert (manifest.parent / "params" / f"ocdbt.process_{place}").is_dir()

    # one process with the devices of both goes on from what two have saved
    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    one = [NATFP, *command, alone]
    done = subprocess.run(one, capture_output=True, text=True, env=meshes.environment(2), check=False, timeout=meshes.STUCK)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr

    # a process that is gone: the other one ends by itself
    for killed in (1, 0):
        before = [path.stat().st_ino for path in out.glob("runs/*/metrics.jsonl")]
        pair = both(*command, out)
        until(saved + 4, out, pair, before)
        begun = time.monotonic()
        pair[killed].kill()
        ended = meshes.finished(pair, meshes.STUCK)
        assert time.monotonic() - begun < HEARTBEAT + SLACK
        code, _, errors = ended[1 - killed]
        assert code in ((75,) if killed else (75, 134, -signal.SIGABRT)), errors
        if code == 75:
            assert " has lost another process (" in said(errors)[-1]
        assert manifest.exists()

    pair = both(*command, out)
    for code, _, errors in meshes.finished(pair, meshes.STUCK):
        assert code == 0, errors
    records = [meshes.latest(made) for made in (out, alone, untouched)]
    for record in (record for arms in records for record in arms.values()):
        assert record.pop("code")  # that this one decides nothing is not for this test to say
    assert records[0] == records[1] == records[2]
    made = (out, alone, untouched)
    logs = [{path.parent.name: path.read_bytes() for path in folder.glob("runs/*/metrics.jsonl")} for folder in made]
    assert logs[0] == logs[1] == logs[2]
    assert len(logs[0]) == 2


@pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing()))
def test_hosts_that_lose_their_network_end_soon_and_go_on_later(tmp_path):
    found = hosts.hosts(tmp_path, steps=24, heartbeat_seconds=HEARTBEAT, save_minutes=0.0001)
    assert found["saved_steps"]
    for side in found["sides"]:
        assert side["exit_code"] == 75, side
        assert side["in_words"], side
        assert side["seconds_to_end"] < HEARTBEAT + SLACK, side
    assert found["bitwise_equal_to_untouched"]


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_two_processes_make_what_one_makes_of_the_same_devices(tmp_path):
    one = meshes.trained(meshes.Case("data 8", 1, 8), tmp_path / "one")
    two = meshes.trained(meshes.Case("data 8", 2, 4), tmp_path / "two")
    for name in (*meshes.ROWS, "weights", "val_loss"):
        assert one[name] == two[name], name
    assert len({one["init_hash"], one["order_hash"], one["fed_hash"], one["weights"]}) == 4
    assert one["step"] == 8
    assert one["collectives"] == two["collectives"] == "processes"


def test_two_processes_draw_what_one_draws_of_the_same_devices(tmp_path):
    """Arms side by side, and each draw in several files."""
    study, more = studies.written(tmp_path), ("run.mesh.replica=2", "run.mesh.data=2")
    one, two = tmp_path / "one", tmp_path / "two"
    for verb in ("train", "sample"):
        command = studies.command(study, one, 1, 0, 0, *more, verb=verb)
        subprocess.run(command, env=meshes.environment(4), check=True, capture_output=True)
        with studies.Command(study, two, 2, tmp_path / "compiled", *more, verb=verb) as running:
            ends = running.ended()
        assert [code for code, _ in ends] == [0, 0], ends
    paths = sorted((one / "studies" / "soak" / "draws").glob("*.parquet"))
    assert len(paths) == 10 * 3
    for path in paths:
        other = two / path.relative_to(one)
        assert texts.read(path).equals(texts.read(other)), path.name
