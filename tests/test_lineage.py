"""The hashes and records that prove a checkpoint's descent."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from natfp_jax import __version__, files, lineage, mesh, params
from natfp_jax.config import Experiment, Mesh, Perturb, Run, Seeds, fingerprint, from_json, replace
from natfp_jax.lineage import code, identity, numerics, weight_hash
from natfp_jax.order import Order, order_hash
from natfp_jax.train import load_params, replay

TREE = {"a": {"x": np.array([[1.0, -2.0], [0.0, 4.0]], np.float32)}, "b": np.array([5.0, 6.0, 7.0, 8.0], np.float32)}


def test_the_weight_hash_is_that_of_names_and_bytes():
    text = hashlib.sha256()
    text.update(b"a/x (2, 2) float32\n" + np.array([1, -2, 0, 4], "<f4").tobytes())
    text.update(b"b (4,) float32\n" + np.array([5, 6, 7, 8], "<f4").tobytes())
    assert weight_hash(TREE) == text.hexdigest()
    assert weight_hash(jax.tree.map(jax.numpy.asarray, TREE)) == text.hexdigest()
    assert weight_hash({"b": TREE["b"], "a": TREE["a"]}) == text.hexdigest()
    assert weight_hash({**TREE, "b": TREE["b"].astype(">f4").astype("<f4")}) == text.hexdigest()


def test_any_bit_path_shape_or_type_changes_the_weight_hash():
    x, b = TREE["a"]["x"], TREE["b"]
    found = [weight_hash(TREE)]
    for bit in range(32 * 4):
        flipped = x.copy()
        flipped.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << (bit % 32))
        found.append(weight_hash({"a": {"x": flipped}, "b": b}))
    others = [
        {"a": {"y": x}, "b": b},
        {"a": {}, "x": x, "b": b},
        {"a": {"x": x.reshape(4)}, "b": b},
        {"a": {"x": x.reshape(1, 4)}, "b": b},
        {"a": {"x": x.T.copy()}, "b": b},
        {"a": {"x": x}, "b": b.reshape(2, 2)},
        {"a": {"x": x.view(np.int32)}, "b": b},
        {"a": {"x": x.astype(np.float16)}, "b": b},
        {"a": {"x": b.reshape(2, 2)}, "b": x.reshape(4)},
        {"a": {"x": x}},
        {"a": {"x": x}, "b": b, "c": b},
    ]
    found += [weight_hash(tree) for tree in others]
    assert len(set(found)) == 1 + 128 + len(others)


def test_the_identity_names_the_inputs(monkeypatch):
    experiment = Experiment(seeds=Seeds(order=2))
    one = identity(experiment, corpus="c", tokenizer="t", pool="p")
    assert one.inputs == {"corpus": "c", "tokenizer": "t", "pool": "p", "recipe": str(lineage.RECIPE)}
    assert one.fingerprint == fingerprint(experiment, one.inputs)
    assert one.fingerprint.startswith(one.short)
    assert len(one.short) == 16
    hashes = {"corpus": "c", "tokenizer": "t", "pool": "p"}
    others = [identity(experiment, **{**hashes, name: "x"}).fingerprint for name in hashes]
    monkeypatch.setattr(lineage, "RECIPE", lineage.RECIPE + 1)
    others.append(identity(experiment, **hashes).fingerprint)
    assert len({one.fingerprint, *others}) == 5


def test_each_checkpoint_names_its_parent(tiny, tiny_store, one_device, tiny_run):
    records = {step: tiny_run.record(step) for step in (0, 4, 8, 16)}
    pool = tiny_store.windows(32, 64)
    order, rows = Order(64, 8, 0), np.empty(0, np.int64)
    for before, step in zip((None, 0, 4, 8), (0, 4, 8, 16), strict=True):
        record = records[step]
        tree = load_params(tiny_run, step, tiny, tiny_store, one_device)
        assert record["step"] == step
        assert record["tokens"] == step * 8 * 32
        assert record["weights"] == weight_hash(tree)
        assert record["init_hash"] == records[0]["weights"]
        assert record["parent"] == (None if before is None else {"step": before, "weights": records[before]["weights"]})
        rows = np.concatenate([order.rows(s) for s in range(step)]) if step else rows
        assert record["order_hash"] == order_hash(pool.sha256(), rows)
        assert record["fingerprint"] == tiny_run_identity(tiny, tiny_store).fingerprint
        assert record["numerics"] == numerics(
            one_device, batch=8, loss_block=32, microbatches=1, remat="none", execution="strict"
        )
        assert record["code"] == code()
        assert record["skipped"] == []
    assert len({record["weights"] for record in records.values()}) == 4
    for step, record in records.items():
        assert list(record["early"]) == [name for name in ("1", "2", "4", "8") if int(name) <= step]
        assert record["early"].items() <= records[16]["early"].items()
    assert records[16]["early"]["4"] == records[4]["weights"]
    assert records[16]["early"]["8"] == records[8]["weights"]
    assert len(set(records[16]["early"].values())) == 4
    fresh = params.init(params.table(tiny.model, tiny_store.tokenizer.padded_size), tiny.seeds.init)
    assert records[0]["weights"] == weight_hash(fresh)


def test_the_early_weights_are_those_that_follow_from_the_seeds_alone(tiny, tiny_store, one_device, tiny_run):
    found = {step: weight_hash(tree) for step, tree in replay(tiny, tiny_store, Run(), one_device, 8)}
    assert list(found) == list(range(9))
    assert found[0] == tiny_run.record(0)["weights"]
    assert {step: found[int(step)] for step in ("1", "2", "4", "8")} == tiny_run.record(16)["early"]


def tiny_run_identity(tiny, store):
    return identity(tiny, store.sha256, store.tokenizer.sha256, store.windows(32, 64).sha256())


def test_the_files_of_a_run_hold_its_identity_and_records(tiny, tiny_store, tiny_run):
    who = tiny_run_identity(tiny, tiny_store)
    owner = files.read_json(tiny_run.folder / "experiment.json")
    assert owner["fingerprint"] == who.fingerprint
    assert owner["inputs"] == who.inputs
    assert fingerprint(from_json(Experiment, owner["experiment"]), owner["inputs"]) == who.fingerprint
    log = (tiny_run.folder / "metrics.jsonl").read_bytes()
    assert files.read_json(tiny_run.folder / "lineage.json") == {
        "fingerprint": who.fingerprint,
        "inputs": who.inputs,
        "checkpoints": [tiny_run.record(step) for step in (0, 4, 8, 16)],
        "metrics": {"lines": log.count(b"\n"), "sha256": hashlib.sha256(log).hexdigest()},
    }
    assert tiny_run.records() == [tiny_run.record(step) for step in (0, 4, 8, 16)]
    assert not list((tiny_run.folder / "restart").iterdir())  # of no use any more


def test_the_code_is_that_of_all_source_files(tmp_path, monkeypatch):
    """A copy has the same; one more space or another name makes another."""
    package = Path(lineage.__file__).parent
    assert code() == f"{__version__} {code().split()[1]}"
    assert len(code().split()[1]) == 64
    copy = tmp_path / "natfp_jax"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(lineage, "__file__", str(copy / "lineage.py"))
    found = [code.__wrapped__()]
    path = copy / "datasets" / "stories.py"
    path.write_text(path.read_text() + " ")
    found.append(code.__wrapped__())
    path.rename(copy / "stories.py")
    found.append(code.__wrapped__())
    assert found[0] == code()
    assert len(set(found)) == 3


def test_the_numerics_record_says_what_bits_depend_on(one_device):
    record = numerics(one_device, batch=3)
    assert record["batch"] == 3
    assert record["mesh"] == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    assert record["collectives"] == "none"
    assert record["backend"] == "cpu"
    assert record["versions"]["jax"] == jax.__version__
    assert json.loads(json.dumps(record)) == record
    assert numerics(mesh.make(Mesh(2, 2, 2, 1)))["collectives"] == "host"


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        ("", ""),
        ("--xla_force_host_platform_device_count=8", ""),  # the mesh says how many devices there are
        ("--xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math=true"),
        ("--xla_a=1 --xla_force_host_platform_device_count=16 --xla_b=2", "--xla_a=1 --xla_b=2"),
        ("--xla_force_host_platform_device_count=2 --xla_a=1", "--xla_a=1"),
    ],
)
def test_the_numerics_record_has_every_flag_but_the_number_of_devices(flags, recorded, one_device, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert numerics(one_device)["xla_flags"] == recorded


@pytest.mark.parametrize("ulps", [1, -2])
def test_a_twin_starts_one_weight_beside_its_base(ulps, tiny, tiny_store, one_device, tiny_run, train_arm, tmp_path):
    twin = replace(tiny, "perturb", Perturb("layers/mlp/up", 77, ulps))
    run = train_arm(twin, tmp_path / "twin")
    base = params.flatten(load_params(tiny_run, 0, tiny, tiny_store, one_device))
    flat = params.flatten(load_params(run, 0, twin, tiny_store, one_device))
    for path, leaf in base.items():
        differing = np.flatnonzero(np.asarray(leaf) != np.asarray(flat[path]))
        assert differing.tolist() == ([77] if path == "layers/mlp/up" else []), path
    weight = np.asarray(base["layers/mlp/up"]).reshape(-1)[77]
    for _ in range(abs(ulps)):
        weight = np.nextafter(weight, np.float32(ulps * np.inf))
    assert np.asarray(flat["layers/mlp/up"]).reshape(-1)[77] == weight
    records = [one.record(16) for one in (run, tiny_run)]
    assert records[0]["order_hash"] == records[1]["order_hash"]
    for name in ("fingerprint", "init_hash", "weights"):
        assert records[0][name] != records[1][name]
    assert records[0]["init_hash"] == run.record(0)["weights"]
