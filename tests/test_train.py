"""The trainer: what a setting may change, what a mesh may change, what stops it, and that it learns."""

import copy
import dataclasses
import json
import math
import shutil
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from natfp_jax import checkpoint, config, files, mesh, optim, params, program, train
from natfp_jax.ceiling import log_likelihoods
from natfp_jax.config import Corpus, Data, Experiment, Model, Optimiser, Run, Stories, replace
from natfp_jax.corpus import prepare
from natfp_jax.datasets import stories
from natfp_jax.errors import Damaged, UserError
from natfp_jax.order import Order, order_hash
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder, metrics
from natfp_jax.train import load_params

MESHES = [
    (1, 2, 2, 2),
    (2, 2, 2, 1),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 8, 1, 1), (1, 1, 4, 2))),
]


def made(shape):
    return mesh.make(config.Mesh(*shape), jax.devices()[: math.prod(shape)])


def refused(call, *args, **settings):
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logged(run):
    """The lines of the log, all of which are whole."""
    lines, damaged = metrics(run.metrics)
    assert damaged == 0
    return lines


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
    assert [line["step"] for line in logged(run) if "loss" in line] == [5, 10, 15]
    assert [line["step"] for line in logged(run) if "val_loss" in line] == [0, 2, 14, 16]
    assert list((run.folder / "tensorboard").glob("events.*"))


def rates(experiment):
    return optim.schedule(optim.hyperparameters(experiment.optimiser, 16), experiment.optimiser.schedule, 16)


def test_the_logged_steps_are_those_of_the_schedule(tiny, tiny_run):
    lines = [line for line in logged(tiny_run) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16]
    rate = rates(tiny)
    for line in lines:
        # of the update that made this step; in float32, where the cosines of many steps at once are not those of one by one
        assert line["learning_rate"] == pytest.approx(float(rate(line["step"] - 1)), rel=1e-6)
        assert 0 < line["gradient_norm"] < 10
    assert lines[0]["loss"] == pytest.approx(math.log(300), abs=0.3)  # close to knowing nothing of 300 ids
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_kept_steps(tiny):
    assert tiny.kept_steps(()) == [0, 16]
    assert tiny.kept_steps((0.5, 0.25, 1.0, 0.0, 0.26)) == [0, 4, 8, 16]


def looking(monkeypatch, step, evaluate=lambda tree, windows_KBT: np.zeros(len(windows_KBT))):
    """The trainer runs with another step, which leaves the state as it is."""

    def fake(*args):
        compiled = copy.copy(program.program_of(*args))
        compiled.step, compiled.evaluate = step, evaluate
        return compiled

    monkeypatch.setattr(train, "program_of", fake)


# --- invariant 3: what is fed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), *MESHES])
def test_the_same_rows_are_fed_on_every_mesh(shape, tiny, tiny_store, train_arm, tmp_path, monkeypatch):
    """The trainer runs with a step that only looks at its batch; the hash is then that of what it saw."""
    fed = []

    def look(state, numbers, windows_KBT, asked_N, noise_K2):
        (windows_BT,) = {row.tobytes(): row for row in np.asarray(windows_KBT)}.values()
        fed.append(windows_BT)
        one_K = np.ones(len(windows_KBT), np.float32)
        return state, {"loss": one_K, "gradient_norm": one_K, "asked": asked_N.max()}

    looking(monkeypatch, look)
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
    there = [line for line in logged(tiny_run) if line["step"] <= 4]
    for here, line in zip(logged(run), there, strict=True):
        assert here.keys() == line.keys()
        for name in here:
            assert here[name] == pytest.approx(line[name], rel=2e-6), name
    weights = params.flatten(load_params(tiny_run, 4, tiny, tiny_store, one_device))
    for path, leaf in params.flatten(load_params(run, 4, tiny, tiny_store, devices)).items():
        np.testing.assert_allclose(leaf, weights[path], rtol=0, atol=2e-4, err_msg=path)


def test_weights_and_moments_lie_as_the_table_says_and_the_old_state_is_given_up(tiny, tiny_store):
    devices = made((1, 2, 2, 2))
    compiled = train.program_of(tiny, tiny_store, devices, Run())
    specs = params.table(tiny.model, tiny_store.tokenizer.padded_size)
    old = compiled.stack([lambda: compiled.init(0)])
    windows = mesh.lay(tiny_store.windows(32, 32).rows(np.arange(8))[None], mesh.batch_sharding(devices))
    numbers = train.laid(compiled, [optim.hyperparameters(tiny.optimiser, 16)])
    new, found = compiled.step(old, numbers, windows, train._signals(devices)[train._SAVE])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not windows.is_deleted()
    assert np.isfinite(found["loss"]).all()
    assert int(found["asked"]) == train._SAVE
    moments = [
        part for part in jax.tree.leaves(new.optimiser, is_leaf=lambda part: isinstance(part, dict)) if isinstance(part, dict)
    ]
    assert len(moments) == 2
    for tree in (new.params, *moments):
        flat = params.flatten(tree)
        assert flat.keys() == specs.keys()
        for path, leaf in flat.items():
            assert leaf.dtype == np.float32
            expected = NamedSharding(devices, PartitionSpec("replica", *specs[path].partition))
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
            parts = math.prod(devices.shape[axis] for axis in specs[path].partition if axis is not None)
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}


@pytest.mark.parametrize(("kind", "copies"), [("adamw", (2, 2)), ("lion", (1, 1)), ("muon", (1, 2))])
def test_moments_of_every_optimiser_lie_as_the_table_says(kind, copies, tiny, tiny_store):
    """So many of each matrix of the layers, and of every other parameter."""
    devices = made((1, 2, 2, 2))
    state = train.program_of(replace(tiny, "optimiser.kind", kind), tiny_store, devices, Run()).state.optimiser
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey)).removeprefix("matrix/")
        found.append((names.removeprefix("other/"), leaf.sharding))
    specs = params.table(tiny.model, tiny_store.tokenizer.padded_size)
    for name, spec in specs.items():
        shardings = [sharding for other, sharding in found if other == name]
        assert shardings == [NamedSharding(devices, PartitionSpec("replica", *spec.partition))] * copies[len(spec.dims) < 3]
    assert {sharding.spec for name, sharding in found if name not in specs} == {PartitionSpec("replica")}  # counts


def test_bfloat16_trains_with_weights_in_float32(tiny, tiny_store, tiny_run, one_device, four_steps):
    half = replace(tiny, "model.dtype", "bfloat16")
    run = four_steps(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(load_params(run, 4, half, tiny_store, one_device))} == {np.dtype("float32")}
    assert run.record(4)["init_hash"] == tiny_run.record(4)["init_hash"]
    assert run.record(4)["weights"] != tiny_run.record(4)["weights"]
    assert run.record(4)["val_loss"] == pytest.approx(tiny_run.record(4)["val_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        pytest.param({"microbatches": 8}, (1, 1, 1, 1), marks=pytest.mark.slow),
        ({"microbatches": 2}, (1, 2, 2, 2)),
        pytest.param({"remat": "dots"}, (1, 1, 1, 1), marks=pytest.mark.slow),
        ({"remat": "full", "microbatches": 2}, (1, 1, 4, 2)),
    ],
)
def test_what_saves_memory_changes_last_bits_alone_and_is_recorded(
    settings, shape, tiny, tiny_store, tiny_run, one_device, four_steps
):
    devices = made(shape)
    run = four_steps(tiny, devices=devices, **settings)
    one, other = tiny_run.record(4), run.record(4)
    for name in ("fingerprint", "init_hash", "order_hash", "tokens"):
        assert other[name] == one[name]
    chosen = {"microbatches": 1, "remat": "none", **settings}
    assert {name: other["numerics"][name] for name in chosen} == chosen
    there = [line for line in logged(tiny_run) if line["step"] <= 4]
    for here, line in zip(logged(run), there, strict=True):
        assert here == pytest.approx(line, rel=2e-6)
    weights = params.flatten(load_params(tiny_run, 4, tiny, tiny_store, one_device))
    for path, leaf in params.flatten(load_params(run, 4, tiny, tiny_store, devices)).items():
        np.testing.assert_allclose(leaf, weights[path], rtol=0, atol=2e-4, err_msg=path)


# --- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shape", "part"),
    [
        (
            {"data.batch": 4, "data.windows": 64},
            (1, 8, 1, 1),
            "experiment.data.batch 4 does not divide over data 8 x fsdp 1 = 8",
        ),
        ({"model.heads": 2}, (1, 2, 1, 4), "parameter layers/attention/q: N = 2 does not divide over mesh.tensor = 4"),
        ({"data.windows": 63}, (1, 1, 1, 1), "steps are not whole: windows 63 x epochs 2 / batch 8 = 15.75"),
        ({"data.windows": 80_000}, (1, 1, 1, 1), "the corpus is too small: 80000 windows of 32 + 1 tokens were asked for"),
        ({"model.width": 30}, (1, 1, 1, 1), "model.width 30 is no multiple of model.heads 4"),
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
            raise Enough

    try:
        run = train_arm(tiny, tmp_path / "run", advance=stop)
        owner = run.record(0)["fingerprint"]
    except Enough:
        owner = files.read_json(tmp_path / "run" / "experiment.json")["fingerprint"]
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


@pytest.mark.parametrize(("kept", "good"), [(1, 1), (2, 0)])
def test_a_gradient_that_is_not_finite_stops_with_arm_step_and_last_good_checkpoint(kept, good, tiny, train_arm, tmp_path):
    """The first update makes weights whose squares overflow: the second loss is a number, its gradient is none.

    So a checkpoint of the weights after it would be worth nothing.
    """
    wild = replace(tiny, "optimiser.learning_rate", 1e30)
    found = refused(train_arm, wild, tmp_path / "run", name="init0-order1", checkpoints=(kept / 16,))
    message = f"arm init0-order1: gradient norm nan at step 2, last good checkpoint {good} in {tmp_path / 'run'}"
    assert found == f"{message}: lower its learning rate"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "1"][: good + 1]
    assert not list((tmp_path / "run" / "restart").iterdir())


def failing(steps, monkeypatch, validation=()):
    """The trainer runs with a step whose loss or gradient is not finite at the given steps: step → name.

    After the `validation` steps it is the validation loss that is not.
    """
    seen = []

    def step(state, numbers, windows_KBT, asked_N, noise_K2):
        seen.append(None)
        values = {"loss": np.float32([1]), "gradient_norm": np.float32([2]), "asked": asked_N.max()}
        if len(seen) in steps:
            values[steps[len(seen)]] = np.float32([np.inf])
        return state, values

    looking(monkeypatch, step, lambda tree, windows_KBT: np.array([np.nan if len(seen) in validation else 1.0]))


@pytest.mark.parametrize(
    ("steps", "validation", "what", "good"),
    [
        ({5: "loss"}, (), "loss inf at step 5", 4),
        ({5: "gradient_norm"}, (), "gradient norm inf at step 5", 4),
        ({8: "loss"}, (), "loss inf at step 8", 4),  # the last step before a checkpoint
        ({16: "gradient_norm"}, (), "gradient norm inf at step 16", 8),  # and the last one of all
        ({}, (8,), "validation loss nan at step 8", 4),
        ({}, (0,), "validation loss nan at step 0", "none"),
    ],
)
def test_whatever_is_not_finite_stops_before_a_checkpoint_of_it(
    steps, validation, what, good, tiny, train_arm, tmp_path, monkeypatch
):
    failing(steps, monkeypatch, validation)
    message = refused(train_arm, tiny, tmp_path / "run", checkpoints=(0.25, 0.5), log_every=1)
    assert message.startswith(f"arm arm: {what}, last good checkpoint {good} in {tmp_path / 'run'}: ")
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert kept == [step for step in (0, 4, 8) if good != "none" and step <= good]


def test_a_step_that_is_not_finite_can_be_skipped_and_leaves_the_state_as_it_was(tiny, tiny_store, one_device):
    windows = mesh.lay(tiny_store.windows(32, 32).rows(np.arange(8))[None], mesh.batch_sharding(one_device))
    quiet = train._signals(one_device)[train._GO_ON]
    for nonfinite in ("skip", "stop"):
        compiled = train.program_of(replace(tiny, "optimiser.nonfinite", nonfinite), tiny_store, one_device, Run())
        numbers = train.laid(compiled, [optim.hyperparameters(tiny.optimiser, 16)])
        like = jax.tree.map(lambda leaf: leaf.sharding, compiled.state)
        good = jax.device_get(compiled.stack([lambda compiled=compiled: compiled.init(0)]))
        bad = good._replace(params={**good.params, "norm": np.full_like(good.params["norm"], np.inf)})
        after, found = compiled.step(jax.device_put(bad, like), numbers, windows, quiet)
        assert not np.isfinite(found["loss"][0])
        same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(bad), strict=True)]
        assert all(same) == (nonfinite == "skip")
        moved, found = compiled.step(jax.device_put(good, like), numbers, windows, quiet)
        assert np.isfinite(found["loss"][0])
        assert not np.array_equal(moved.params["norm"], good.params["norm"])


def test_skipped_steps_are_recorded_and_take_no_step_of_the_schedule(tiny, train_arm, tmp_path, monkeypatch):
    failing({3: "loss", 6: "gradient_norm", 16: "loss"}, monkeypatch)
    run = train_arm(replace(tiny, "optimiser.nonfinite", "skip"), tmp_path / "run", log_every=1, checkpoints=(0.25, 0.5))
    assert {step: run.record(step)["skipped"] for step in (0, 4, 8, 16)} == {0: [], 4: [3], 8: [3, 6], 16: [3, 6, 16]}
    lines = {line["step"]: line for line in logged(run) if "learning_rate" in line}
    assert list(lines) == list(range(1, 17))
    for step, line in lines.items():
        assert ("loss" in line) == (step not in (3, 16))
        assert ("gradient_norm" in line) == (step != 6)
    rate = rates(tiny)
    for step, updates in ((1, 0), (2, 1), (4, 2), (5, 3), (7, 4), (15, 12)):  # of which the third and sixth were none
        assert lines[step]["learning_rate"] == float(rate(updates))


@pytest.mark.parametrize("first", [1, 5])
def test_a_run_that_skips_ten_steps_running_is_given_up(first, tiny, train_arm, tmp_path, monkeypatch):
    failing(dict.fromkeys(range(first, first + 9), "gradient_norm"), monkeypatch)
    skip = replace(tiny, "optimiser.nonfinite", "skip")
    assert train_arm(skip, tmp_path / "nine").record(16)["skipped"] == list(range(first, first + 9))
    failing(dict.fromkeys(range(first, first + 10), "gradient_norm"), monkeypatch)
    message = refused(train_arm, skip, tmp_path / "ten", name="init0-order1")
    assert message.startswith(
        f"arm init0-order1: gradient norm inf at step {first + 9}, after 10 skipped steps, last good checkpoint 0 in "
    )


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
        found = log_likelihoods(tree, [[eos]] * len(ids), ids, learner.model, (), size, 64, one_device)
        return exact - found.sum(axis=1)

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


def damaged(call, *args, **settings):
    with pytest.raises(Damaged) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("item", ["params", "optimiser"])
def test_a_damaged_state_is_neither_used_nor_trained_on(
    item, place, tiny, tiny_run, tiny_store, train_arm, one_device, tmp_path
):
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    step = run.checkpoints / "8"
    arrays = max((step / item).rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[int(place * len(data))] ^= 1
    arrays.write_bytes(data)
    if item == "params":
        damage = damaged(load_params, run, 8, tiny, tiny_store, one_device)
        assert damage.path == step
        assert damage.why.startswith(f"is damaged: {arrays.relative_to(step)} has sha256 ")
    shutil.rmtree(run.checkpoints / "16")  # so that training has to go on from step 8
    before = contents(run.folder)
    damage = damaged(train_arm, tiny, run.folder, checkpoints=(0.25, 0.5))
    assert damage.path == step
    assert damage.why.startswith(f"is damaged: {arrays.relative_to(step)} has sha256 ")
    assert contents(run.folder) == before
    step.rename(run.checkpoints / "8.damaged")  # what is done about it
    train_arm(tiny, run.folder, checkpoints=(0.25, 0.5))
    assert run.records() == tiny_run.records()
    assert run.metrics.read_bytes() == tiny_run.metrics.read_bytes()


def test_weights_that_are_not_those_of_the_record_are_neither_used_nor_trained_on(
    tiny, tiny_run, tiny_store, train_arm, one_device, tmp_path
):
    """Every file is what was written, but the record says other weights: of a defect, not of a disk."""
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    path = run.checkpoints / "8" / "manifest.json"
    listed = files.read_json(path)
    weights = listed["record"]["weights"]
    files.write_json(path, {**listed, "record": {**listed["record"], "weights": "0" * 64}})
    shutil.rmtree(run.checkpoints / "16")
    damage = damaged(load_params, run, 8, tiny, tiny_store, one_device)
    assert damage.path == run.checkpoints / "8"
    damage = damaged(train_arm, tiny, run.folder, checkpoints=(0.25,))
    assert damage.path == run.checkpoints / "8"
    assert damage.why == f"is damaged: its weights have sha256 {weights}, expected {'0' * 64}"


def test_a_state_of_another_experiment_is_not_trained_on(tiny, tiny_run, train_arm, tmp_path):
    other = train_arm(replace(tiny, "seeds.init", 1), tmp_path / "other", checkpoints=(0.5,))
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    shutil.rmtree(run.checkpoints / "16")
    shutil.rmtree(run.checkpoints / "8")
    shutil.copytree(other.checkpoints / "8", run.checkpoints / "8")
    damage = damaged(train_arm, tiny, run.folder, checkpoints=(0.25,))
    assert damage.path == run.checkpoints / "8"
    owners = [one.record(0)["fingerprint"] for one in (other, tiny_run)]
    assert damage.why == f"is a checkpoint of the experiment {owners[0]}, expected {owners[1]}"


def test_a_twin_of_nothing_is_refused_before_anything_is_trained(tiny, train_arm, tmp_path):
    assert "is none of" in refused(train_arm, replace(tiny, "perturb", config.Perturb("no/such")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
