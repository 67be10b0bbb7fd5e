"""Eight CPU devices for every test of this process, no legacy keys, and one place for what all processes compile.

Tests of the command line run in processes of their own, with the devices of the machine.
"""

import atexit
import json
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and processes that tests start, have the environment of this one
    compilations = tempfile.mkdtemp(prefix="natfp-compilations-")
    atexit.register(shutil.rmtree, compilations, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compilations
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from hypothesis import settings

from natfp_jax import config, mesh
from natfp_jax.config import Conversations, Corpus, Data, Experiment, Model, Run, Stories
from natfp_jax.corpus import prepare
from natfp_jax.lineage import identity
from natfp_jax.member import Member
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder
from natfp_jax.train import train

jax.config.update("jax_legacy_prng_key", "error")
settings.register_profile("untimed", deadline=None)  # how fast an example is depends on what else the machine does
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_users(tmp_path_factory):
    """Nothing is written below the user's cache folder, nor read from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """360 stories, 66,000 ids of a vocabulary of 300 (384 padded)."""
    corpus = Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.1, shards=2)
    return prepare(corpus, tmp_path_factory.mktemp("tiny"), Progress(quiet=True))


@pytest.fixture(scope="session")
def talk_corpus(tmp_path_factory):
    """300 conversations, all different, but not all of their questions; 12 have more than 64 tokens in one."""
    lines = []
    for i in range(300):
        n = i if i % 4 else i + 1
        asked = f"Which is number {n}?" + " word" * 60 * (i % 25 == 24)
        talk = [("system", "Be brief.")] * (i % 7 == 0) + [("user", asked), ("assistant", f"It is {2 * n}, says {i}.")]
        talk += [("user", "And then?"), ("assistant", "Nothing.")] * (i % 6 == 0)
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in talk]}) + "\n")
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    path.write_text("".join(lines))
    return Corpus(source=Conversations(str(path)), vocabulary=300, validation_fraction=0.15, prompt_fraction=0.25, shards=2)


@pytest.fixture(scope="session")
def talk_store(talk_corpus, tmp_path_factory):
    """Its store."""
    return prepare(talk_corpus, tmp_path_factory.mktemp("talk"), Progress(quiet=True))


@pytest.fixture(scope="session")
def tiny():
    """An experiment of 16 steps, two epochs of eight."""
    return Experiment(model=Model(width=32, layers=2, heads=4), data=Data(seq_len=32, windows=64, epochs=2, batch=8))


@pytest.fixture(scope="session")
def one_device():
    """The mesh of one device."""
    return mesh.make(config.Mesh(), jax.devices()[:1])


@pytest.fixture(scope="session")
def train_arm(tiny_store, one_device):
    """Trains an experiment in a folder and returns its run."""

    def trained(
        experiment, folder, *, store=tiny_store, devices=one_device, name="arm", advance=lambda n: None, stop=None, **settings
    ):
        data = experiment.data
        pool = store.pool(data).sha256()
        who = identity(experiment, store.sha256, store.tokenizer.sha256, pool)
        run = RunFolder(folder)
        chosen = Run(**{"log_every": 2, "validation_windows": 16, **settings})
        train([Member(name, experiment, who, store, run)], folder / "restart", chosen, devices, advance, stop)
        return run

    return trained


@pytest.fixture(scope="session")
def tiny_run(tiny, train_arm, tmp_path_factory):
    """The tiny experiment, trained without a break; read it only."""
    return train_arm(tiny, tmp_path_factory.mktemp("runs") / "tiny", checkpoints=(0.25, 0.5))
