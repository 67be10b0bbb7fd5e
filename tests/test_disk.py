"""A disk that is full while a checkpoint is saved: a clear error, what was saved is whole, and with room the run goes on."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from natfp_jax import checkpoint, config, files
from natfp_jax.config import Corpus, Data, Experiment, Factor, Model, Run, Stories, Study
from tests.soak import meshes

STUDY = Study(
    name="full",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.1, shards=2),
        model=Model(width=128, layers=2, heads=4),  # 6 MB a checkpoint
        data=Data(seq_len=32, windows=64, epochs=1, batch=8),
    ),
    factors=(Factor("seeds.init", (0, 1)),),
    run=Run(checkpoints=(0.25, 0.5, 0.75), validation_windows=16),
    sampling=config.Sampling(prompts=30, prompt_chars=20),
)
FILE = "from natfp_jax.config import *\n\nstudy = from_json(Study, {!r})\n"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "full.py"
    path.write_text(FILE.format(config.to_json(STUDY)))
    return path


@contextlib.contextmanager
def disk(folder, size):
    """A file system of its own, of so many bytes; yields a function that makes it larger."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def natfp(*arguments):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [Path(sys.executable).with_name("natfp"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=kept, check=False)


def weights(out):
    """Run and step → the hash of the weights."""
    lineages = [files.read_json(path) for path in sorted(out.glob("runs/*/lineage.json"))]
    return {(one["fingerprint"], record["step"]): record["weights"] for one in lineages for record in one["checkpoints"]}


def whole(out):
    """The steps that are whole, all of them checked."""
    found = [(run / "checkpoints", step) for run in (out / "runs").iterdir() for step in checkpoint.steps(run / "checkpoints")]
    for folder, step in found:
        checkpoint.verify(folder, step)
        assert {path.name for path in (folder / str(step)).iterdir() if path.is_dir()} == {"params", "optimiser"}
    return len(found)


def test_a_disk_that_is_full_while_saving(study, tmp_path):
    done = natfp("train", study, "--out", tmp_path / "roomy")
    assert done.returncode == 0, done.stderr
    with disk(tmp_path / "small", 24 << 20) as enlarged:
        out = tmp_path / "small" / "out"
        done = natfp("train", study, "--out", out)
        assert done.returncode == 2
        lines = done.stderr.splitlines()
        assert ": No space left on device: what is saved takes " in lines[-1]
        assert lines[-1].endswith("make room or give another --out, then run the same command again")
        assert "Traceback" not in done.stderr
        assert 0 < whole(out) < 10
        enlarged(200 << 20)
        done = natfp("train", study, "--out", out)
        assert done.returncode == 0, done.stderr
        assert "damaged" not in done.stderr
        assert whole(out) == 10
        assert weights(out) == weights(tmp_path / "roomy")


def test_processes_that_find_a_disk_full_end_together(study, tmp_path):
    """The first of them alone looks, and none is left to wait for it."""
    with disk(tmp_path / "small", 24 << 20):
        out, port = tmp_path / "small" / "out", meshes.free_port()
        command = [Path(sys.executable).with_name("natfp"), "train", study, "--out", out]
        pair = [
            subprocess.Popen(
                [*map(str, command), *meshes.command(f"localhost:{port}", 2, place)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=meshes.environment(1),
            )
            for place in range(2)
        ]
        (code, _, errors), (other_code, _, other_errors) = meshes.finished(pair, meshes.STUCK)
        assert (code, other_code) == (2, 2), errors + other_errors
        said = [line for line in (errors + other_errors).splitlines() if line.startswith("natfp: ")]
        assert len(said) == 1
        assert ": No space left on device: what is saved takes " in said[0]
        assert 0 < whole(out) < 10


UNSAVED = """
import sys, time
from pathlib import Path
import jax
import numpy as np
from natfp_jax.checkpoint import Checkpoints
folder, wait = Path(sys.argv[1]), sys.argv[2] == "True"
Checkpoints.check_room = lambda self, needed: None
small = {"w": jax.numpy.zeros(8)}
large = {"w": jax.numpy.asarray(np.random.default_rng(0).random(1 << 20, np.float32))}
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, small, small, {"step": 1})
    checkpoints.save(2, large, small, {"step": 2})
    late = time.monotonic() + 60
    try:
        while checkpoints._saving is not None and time.monotonic() < late:
            checkpoints.settle(wait)
    except (OSError, ValueError) as error:
        print(error)
    for _ in range(2):
        checkpoints.settle(wait=True)
"""


@pytest.mark.parametrize("wait", [True, False])
def test_a_step_that_could_not_be_saved_is_not_there(wait, tmp_path):
    """Whether it was waited for or looked at while it was saved, and however often it is asked for.

    In a process of its own: Orbax leaves threads behind, which still wait for one another.
    """
    with disk(tmp_path / "small", 3 << 20):
        folder = tmp_path / "small" / "steps"
        command = [sys.executable, "-c", UNSAVED, str(folder), str(wait)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "No space left on device" in done.stdout, done.stderr
        assert checkpoint.steps(folder) == [1]
        assert not (folder / "2").exists()


UNASKED = """
import sys
from natfp_jax import cli
from natfp_jax.checkpoint import Checkpoints
Checkpoints.check_room = lambda self, needed: None
sys.argv[0] = "natfp"
cli.main()
"""


def test_a_disk_that_another_fills_in_the_middle_of_a_save(study, tmp_path):
    """The room was there when it was asked for; Orbax finds out, in threads of its own, which say so at length."""
    with disk(tmp_path / "small", 24 << 20) as enlarged:
        out = tmp_path / "small" / "out"
        kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-c", UNASKED, "train", str(study), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=kept, check=False)
        assert done.returncode == 2, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("natfp: ")]
        assert said == ["natfp: No space left on device: make room or give another --out, then run the same command again"]
        assert 0 < whole(out) < 10
        enlarged(200 << 20)
        done = natfp("train", study, "--out", out)
        assert done.returncode == 0, done.stderr
        assert whole(out) == 10
