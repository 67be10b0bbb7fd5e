"""Studies in an object store, by real processes that talk to a server of this machine as they would to Google's."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

if not (find_spec("gcsfs") and find_spec("upath")):
    pytest.skip("needs the extra gcs", allow_module_level=True)

from tests.soak import meshes
from tests.stores import google

NATFP = Path(sys.executable).with_name("natfp")
SLOW = 2 * meshes.STUCK


@pytest.fixture
def bucket():
    with google.bucket() as made:
        yield made


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.py"
    path.write_text(meshes.STUDY)
    return path


@pytest.fixture
def started(bucket, tmp_path):
    """Starts `natfp`; nothing outlives the test."""
    begun = []

    def start(*arguments, devices=1, cache="cache"):
        process = subprocess.Popen(
            [NATFP, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=meshes.environment(devices, XDG_CACHE_HOME=str(tmp_path / cache), **bucket.environment),
        )
        begun.append(process)
        return process

    yield start
    meshes.cleared(begun)


def ended(process, code=0):
    out, errors = process.communicate(timeout=SLOW)
    assert process.returncode == code, errors
    return out, errors


def objects(bucket, below):
    """Of a folder, without what says who holds it."""
    with bucket.lock:
        return {name: data for name, data in bucket.objects.items() if name.startswith(below) and "/.lock/" not in name}


def runs_of(read, names):
    """Run → what proves its training, of its lineage."""
    found = {}
    for name in sorted(name for name in names if name.endswith("lineage.json")):
        lineage = json.loads(read(name))
        steps = [(one["step"], one["weights"], one["order_hash"], one["val_loss"]) for one in lineage["checkpoints"]]
        found[Path(name).parent.name] = lineage["fingerprint"], steps, lineage["metrics"]
    return found


def in_bucket(bucket, below):
    there = objects(bucket, below)
    return runs_of(lambda name: there[name][0], there)


def in_folder(out):
    return runs_of(lambda name: (out / name).read_bytes(), [str(path.relative_to(out)) for path in out.rglob("lineage.json")])


def drawn(out):
    return {path.name: path.read_bytes() for path in (out / "studies" / "soak" / "draws").glob("*.parquet")}


def sealed(bucket):
    """The manifests of the states that a cohort can go on from, in the order of their steps."""
    found = [name for name in list(bucket.objects) if "/restart/" in name and name.endswith("/manifest.json")]
    return sorted(found, key=lambda name: int(name.split("/")[-2]))


@pytest.mark.slow
def test_a_killed_study_in_a_bucket_ends_as_a_local_one_and_is_then_left_alone(bucket, study, started, tmp_path):
    out, local = "gs://bucket/some/out", tmp_path / "out"
    ended(started("run", study, "--out", local))

    first = started("train", study, "--out", out, "run.save_minutes=0.0001", "run.restarts=3")
    late = time.monotonic() + SLOW
    while len(sealed(bucket)) < 2:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < late
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # it is there, and does not end before the second one looks
    _, errors = ended(started("train", study, "--out", out), 2)
    said = [line for line in errors.splitlines() if line.startswith("natfp: ")]
    who = f"pid {first.pid} on {os.uname().nodename}"
    assert said == [f"natfp: {out}/studies/soak is in use by another process ({who}): wait for it or stop it"]
    first.kill()
    first.communicate()

    last = Path(sealed(bucket)[-1]).parent
    weights = max(name for name in bucket.objects if name.startswith(f"{last}/params/d/"))
    data, generation = bucket.objects[weights]
    bucket.objects[weights] = data[:-1] + bytes([data[-1] ^ 1]), generation
    _, errors = ended(started("run", study, "--out", out))
    assert f"was left by {who}" in errors
    assert f"gs://bucket/{last} is damaged" in errors
    assert in_bucket(bucket, "some/out/") == in_folder(local)
    assert len(in_folder(local)) == 2
    whole = objects(bucket, "some/out/")
    for name, data in drawn(local).items():
        assert whole[f"some/out/studies/soak/draws/{name}"][0] == data
    assert not any("/restart/" in name for name in whole)

    ended(started("run", study, "--out", out))
    assert objects(bucket, "some/out/") == whole  # by their generations: nothing was written anew


@pytest.mark.slow
def test_two_processes_in_a_bucket_train_as_one_in_a_folder(bucket, study, started, tmp_path):
    settings = ["train", study, "run.mesh.fsdp=2", "run.log_every=2"]
    ended(started(*settings, "--out", tmp_path / "out", devices=2))
    coordinator = f"localhost:{meshes.free_port()}"
    pair = [
        started(*settings, "--out", "gs://bucket/out", *meshes.command(coordinator, 2, place), cache=f"cache{place}")
        for place in range(2)
    ]
    for process in pair:
        ended(process)
    assert in_bucket(bucket, "out/") == in_folder(tmp_path / "out")
    # Every process wrote its own part of the weights.
    parts = {part for name in bucket.written for part in name.split("/") if part.startswith("ocdbt.process_")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
