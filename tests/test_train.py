"""The trainer: what a setting may change, what a mesh may change, what stops it, and that it learns."""

import dataclasses
import json
import math
import shutil
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from natfp_jax import config, mesh, params, train
from natfp_jax.ceiling import log_likelihood
from natfp_jax.config import Corpus, Data, Experiment, Model, Optimiser, Stories, replace
from natfp_jax.corpus import prepare
from natfp_jax.datasets import stories
from natfp_jax.errors import UserError
from natfp_jax.order import Order, order_hash
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder
from natfp_jax.sample import Strategy
from natfp_jax.train import load_params

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]


def made(shape):
    return mesh.make(config.Mesh(*shape), jax.devices()[: math.prod(shape)])


def refused(call, *args, **settings):
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- invariant 1: one seed, one stream --------------------------------------------------------------------------------


def test_the_seed_of_init_leaves_the_order_alone_and_the_reverse(tiny, tiny_run, train_arm, tmp_path):
    base = tiny_run.record(16)
    other_init = train_arm(replace(tiny, "seeds.init", 1), tmp_path / "init").record(16)
    other_order = train_arm(replace(tiny, "seeds.order", 1), tmp_path / "order").record(16)
    assert other_init["order_hash"] == base["order_hash"] != other_order["order_hash"]
    assert other_order["init_hash"] == base["init_hash"] != other_init["init_hash"]
    assert len({base["weights"], other_init["weights"], other_order["weights"]}) == 3


def test_cadence_validation_and_tensorboard_change_no_weight_and_no_hash(tiny, tiny_run, train_arm, tmp_path):
    settings = {"log_every": 5, "checkpoints": (0.1, 0.9), "validation_windows": 40, "tensorboard": True}
    run = train_arm(tiny, tmp_path / "run", **settings)
    base, other = tiny_run.record(16), run.record(16)
    for name in ("fingerprint", "weights", "order_hash", "init_hash", "tokens"):
        assert other[name] == base[name]
    assert other["val_loss"] != base["val_loss"]  # of more windows
    assert [line["step"] for line in run.metrics() if "loss" in line] == [5, 10, 15]
    assert [line["step"] for line in run.metrics() if "val_loss" in line] == [0, 2, 14, 16]
    assert list((run.folder / "tensorboard").glob("events.*"))


def test_the_logged_steps_are_those_of_the_schedule(tiny, tiny_run):
    lines = [line for line in tiny_run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16]
    rate = train.optim.schedule(tiny.optimiser, 16)
    for line in lines:
        assert line["learning_rate"] == float(rate(line["step"] - 1))  # of the update that made this step
        assert 0 < line["gradient_norm"] < 10
    assert lines[0]["loss"] == pytest.approx(math.log(300), abs=0.3)  # close to knowing nothing of 300 ids
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_kept_steps(tiny):
    assert tiny.kept_steps(()) == [0, 16]
    assert tiny.kept_steps((0.5, 0.25, 1.0, 0.0, 0.26)) == [0, 4, 8, 16]


# --- invariant 3: what is fed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), *MESHES])
def test_the_same_rows_are_fed_on_every_mesh(shape, tiny, tiny_store, train_arm, tmp_path, monkeypatch):
    """The trainer runs with a step that only looks at its batch; the hash is then that of what it saw."""
    fed = []

    def look(state, windows_BT):
        fed.append(np.asarray(windows_BT))
        return state, {"loss": np.float32(1)}

    state = train.State({"w": jax.numpy.zeros(2)}, {"m": jax.numpy.zeros(2)})
    program = train._Program(init=lambda seed: state, step=look, evaluate=lambda tree, windows: 0.0, state=state)
    monkeypatch.setattr(train, "_program_of", lambda *args: program)
    run = train_arm(tiny, tmp_path / "run", devices=made(shape), name="looking")
    pool, order = tiny_store.windows(32, 64), Order(64, 8, 0)
    rows = [order.rows(step) for step in range(16)]
    assert len(fed) == 16
    for batch, rows_B in zip(fed, rows, strict=True):
        np.testing.assert_array_equal(batch, pool.rows(rows_B))
    assert run.record(16)["order_hash"] == order_hash(pool.sha256(), np.concatenate(rows))


# --- many devices -----------------------------------------------------------------------------------------------------


class Enough(Exception):
    pass


@pytest.fixture
def four_steps(train_arm, tmp_path):
    """Trains the first four steps of an experiment."""

    def trained(experiment, **settings):
        seen = []

        def advance(steps):
            seen.append(steps)
            if sum(seen) == 5:
                raise Enough

        with pytest.raises(Enough):
            train_arm(experiment, tmp_path / "run", advance=advance, checkpoints=(0.25,), **settings)
        return RunFolder(tmp_path / "run")

    return trained


@pytest.mark.parametrize("shape", MESHES)
def test_training_on_many_devices_is_training_on_one(shape, tiny, tiny_store, tiny_run, one_device, four_steps):
    devices = made(shape)
    run = four_steps(tiny, devices=devices)
    for step in (0, 4):
        one, many = tiny_run.record(step), run.record(step)
        assert many["numerics"]["mesh"] == dict(zip(mesh.AXES, shape, strict=True))
        for name in ("fingerprint", "init_hash", "order_hash"):
            assert many[name] == one[name]
    assert run.record(0)["weights"] == tiny_run.record(0)["weights"]
    there = [line for line in tiny_run.metrics() if line["step"] <= 4]
    for here, line in zip(run.metrics(), there, strict=True):
        assert here.keys() == line.keys()
        for name in here:
            assert here[name] == pytest.approx(line[name], rel=2e-6), name
    weights = params.flatten(load_params(tiny_run, 4, tiny, tiny_store, one_device))
    for path, leaf in params.flatten(load_params(run, 4, tiny, tiny_store, devices)).items():
        np.testing.assert_allclose(leaf, weights[path], rtol=0, atol=2e-4, err_msg=path)


def test_weights_and_moments_lie_as_the_table_says_and_the_old_state_is_given_up(tiny, tiny_store):
    devices = made((2, 2, 2))
    program = train._program_of(tiny, tiny_store, devices)
    specs = params.table(tiny.model, tiny_store.tokenizer.padded_size)
    old = program.init(0)
    windows = jax.device_put(tiny_store.windows(32, 32).rows(np.arange(8)), mesh.batch_sharding(devices))
    new, metrics = program.step(old, windows)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not windows.is_deleted()
    assert np.isfinite(float(metrics["loss"]))
    moments = [
        part for part in jax.tree.leaves(new.optimiser, is_leaf=lambda part: isinstance(part, dict)) if isinstance(part, dict)
    ]
    assert len(moments) == 2
    for tree in (new.params, *moments):
        flat = params.flatten(tree)
        assert flat.keys() == specs.keys()
        for path, leaf in flat.items():
            assert leaf.dtype == np.float32
            assert leaf.sharding.is_equivalent_to(NamedSharding(devices, specs[path].partition), leaf.ndim), path
            parts = math.prod(devices.shape[axis] for axis in specs[path].partition if axis is not None)
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}


def test_bfloat16_trains_with_weights_in_float32(tiny, tiny_store, tiny_run, one_device, four_steps):
    half = replace(tiny, "model.dtype", "bfloat16")
    run = four_steps(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(load_params(run, 4, half, tiny_store, one_device))} == {np.dtype("float32")}
    assert run.record(4)["init_hash"] == tiny_run.record(4)["init_hash"]
    assert run.record(4)["weights"] != tiny_run.record(4)["weights"]
    assert run.record(4)["val_loss"] == pytest.approx(tiny_run.record(4)["val_loss"], rel=1e-2)


# --- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shape", "part"),
    [
        ({"data.batch": 4, "data.windows": 64}, (8, 1, 1), "experiment.data.batch 4 does not divide over data 8 x fsdp 1 = 8"),
        ({"model.heads": 2}, (2, 1, 4), "parameter layers/attention/q: N = 2 does not divide over mesh.tensor = 4"),
        ({"data.windows": 63}, (1, 1, 1), "steps are not whole: windows 63 x epochs 2 / batch 8 = 15.75"),
        ({"data.windows": 80_000}, (1, 1, 1), "the corpus is too small: 80000 windows of 32 + 1 tokens were asked for"),
        ({"model.width": 30}, (1, 1, 1), "model.width 30 over model.heads 4"),
    ],
)
def test_what_cannot_run_leaves_nothing_behind(changes, shape, part, tiny, train_arm, tmp_path):
    for path, value in changes.items():
        tiny = replace(tiny, path, value)
    assert part in refused(train_arm, tiny, tmp_path / "run", devices=made(shape))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seq_len", "batch", "part"), [(32, 512, "expected a batch of 512"), (8000, 1, "validation part has")])
def test_too_little_to_validate_on(seq_len, batch, part, tiny, train_arm, tmp_path):
    small = dataclasses.replace(tiny, data=Data(seq_len=seq_len, windows=batch, batch=batch))
    message = refused(train_arm, small, tmp_path / "run")
    assert part in message
    assert "validation_fraction" in message
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize("finished", [True, False])
def test_the_folder_of_another_experiment_is_left_as_it_is(finished, tiny, train_arm, tmp_path):
    def stop(steps):
        if not finished:
            raise KeyboardInterrupt

    try:
        run = train_arm(tiny, tmp_path / "run", advance=stop)
        owner = run.record(0)["fingerprint"]
    except KeyboardInterrupt:
        owner = json.loads((tmp_path / "run" / "experiment.json").read_text())["fingerprint"]
    before = contents(tmp_path)
    assert len(before) > 5
    message = refused(train_arm, replace(tiny, "seeds.init", 1), tmp_path / "run")
    assert f"{tmp_path / 'run'} holds the run {owner}, expected " in message
    assert contents(tmp_path) == before


def test_a_folder_of_no_known_owner_is_left_as_it_is(tiny, train_arm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "is not empty and has no experiment.json" in refused(train_arm, tiny, tmp_path / "run")
    assert contents(tmp_path) == {tmp_path / "run" / "thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (1, "arm init0-order1: loss nan at step 3, last good checkpoint 1 in "),
        (2, "arm init0-order1: validation loss nan at step 2, last good checkpoint 0 in "),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_arm_step_and_last_good_checkpoint(kept, message, tiny, train_arm, tmp_path):
    """The first update makes weights whose squares overflow, the second makes them no numbers; the third loss shows it.

    So the loss of step 2 is a number, but a checkpoint of its weights would be worth nothing.
    """
    wild = replace(tiny, "optimiser.learning_rate", 1e30)
    found = refused(train_arm, wild, tmp_path / "run", name="init0-order1", checkpoints=(kept / 16,))
    assert found.startswith(message + str(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "1"][: 3 - kept]


def test_tensorboard_without_its_extra(tiny, train_arm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert "pip install 'natfp-jax[tensorboard]'" in refused(train_arm, tiny, tmp_path / "run", tensorboard=True)


# --- it learns --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner():
    """100 steps, two epochs of 78,000 ids."""
    return Experiment(
        model=Model(width=64, layers=2, heads=2),
        data=Data(seq_len=96, windows=800, epochs=2, batch=16),
        optimiser=Optimiser(learning_rate=1e-2),
    )


def bigrams(store):
    """−log p of ids under counts of pairs in the training part, smoothed by counts of single ids: nats by [before, after]."""
    ids = np.concatenate([np.fromfile(path, store.meta["dtype"]) for path in sorted(store.folder.glob("train-*.bin"))])
    size = store.tokenizer.size
    single = (np.bincount(ids, minlength=size) + 1) / (len(ids) + size)
    pairs = np.zeros((size, size))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    return -np.log((pairs + single) / (pairs.sum(axis=1, keepdims=True) + 1))


def test_the_trainer_approaches_the_exact_likelihood_of_held_out_stories(learner, train_arm, one_device, tmp_path):
    """The mean of (nats of story and EOS under the model) - (exact nats) estimates a divergence, so it is not below zero."""
    corpus = Corpus(source=Stories(count=1500), vocabulary=1024, validation_fraction=0.1, prompt_fraction=0.1, shards=2)
    store = prepare(corpus, tmp_path, Progress(quiet=True))
    run = train_arm(learner, tmp_path / "run", store=store)
    lines = (store.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    eos, size = store.tokenizer.eos_id, store.tokenizer.size
    ids = [[*store.tokenizer.encode(text), eos] for text in texts]
    exact = np.array([stories.log_probability(text) for text in texts])
    assert len(texts) > 100
    assert np.isfinite(exact).all()

    def excess(step):
        tree = load_params(run, step, learner, store, one_device)
        found = log_likelihood(tree, [[eos]] * len(ids), ids, learner.model, Strategy(), size, 64, one_device)
        return exact - found

    learnt, start = excess(learner.steps), excess(0)
    error = learnt.std(ddof=1) / math.sqrt(len(learnt))
    nothing = math.log(size) * np.array([len(row) for row in ids]) + exact
    pairs = bigrams(store)
    by_pairs = np.array([pairs[[eos, *row[:-1]], row].sum() for row in ids]) + exact
    # Measured: 21 ± 0.5 nats; 495 for a model that has learnt nothing, 78 for counts of pairs.
    assert start.mean() == pytest.approx(nothing.mean(), rel=0.05)
    assert learnt.mean() > -3 * error
    assert learnt.mean() < 30 < by_pairs.mean() / 2


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_damaged_weights_are_neither_used_nor_trained_on(tiny, tiny_run, tiny_store, train_arm, one_device, tmp_path, place):
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    arrays = max((tmp_path / "run" / "checkpoints" / "8" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[int(place * len(data))] ^= 1
    arrays.write_bytes(data)
    said = refused(load_params, run, 8, tiny, tiny_store, one_device)
    assert "the checkpoint is damaged" in said or "cannot be restored" in said
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")  # so that training has to go on from step 8
    said = refused(train_arm, tiny, tmp_path / "run", checkpoints=(0.25, 0.5))
    assert "the checkpoint is damaged" in said or "cannot be restored" in said


def test_a_twin_of_nothing_is_refused_before_anything_is_trained(tiny, train_arm, tmp_path):
    assert "is none of" in refused(train_arm, replace(tiny, "perturb", config.Perturb("no/such")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
