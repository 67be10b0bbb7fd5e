"""Children begin with their parent's weights, bit for bit, prove it, and keep every promise that other arms keep.

Conversations are of stories: who lost what. Parents are checkpoints of the tiny experiment.
"""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from natfp_jax import checkpoint, config, lora, mesh, params
from natfp_jax.chat import Chat
from natfp_jax.config import (
    Conversations,
    Corpus,
    Data,
    Experiment,
    Lora,
    Optimiser,
    Parent,
    Perturb,
    Run,
    Seeds,
    Template,
)
from natfp_jax.corpus import prepare
from natfp_jax.datasets.stories import story
from natfp_jax.errors import Stopped
from natfp_jax.lineage import identity
from natfp_jax.member import Member, Origin
from natfp_jax.params import flatten
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder
from natfp_jax.stopping import Stop
from natfp_jax.train import load_params, train

ADAPTED = Lora(rank=2, targets=("q", "v", "o", "down"))
STEPS = (0, 4, 8)


def conversations(path, count):
    """Questions about the first stories, and their answers."""
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            lost = re.search(r"(\w+ \w+ \w+) the (\w+) lost a (\w+ \w+)", story(0, index))
            asked = f"{index}: what did the {lost[2]} lose?"
            file.write(json.dumps({"prompt": asked, "response": f"A {lost[3]}."}) + "\n")
    return path


@pytest.fixture(scope="module")
def asked_store(tiny_store, tmp_path_factory):
    """500 conversations under the tokenizer of the tiny store."""
    folder = tmp_path_factory.mktemp("asked")
    corpus = Corpus(
        source=Conversations(str(conversations(folder / "asked.jsonl", 500))),
        template=Template(user="Q: {content}\n", assistant="A: {content}"),
        tokenizer=str(tiny_store.folder / "tokenizer.json"),
        validation_fraction=0.1,
        prompt_fraction=0.1,
        shards=2,
    )
    return prepare(corpus, folder, Progress(quiet=True))


@pytest.fixture(scope="module")
def child(tiny, asked_store):
    """An experiment of 8 steps, two epochs of four, that begins with the end of the tiny one."""
    return Experiment(
        corpus=Corpus(source=Conversations()),  # what it was made from does not matter any more
        model=tiny.model,
        data=Data(seq_len=64, windows=32, epochs=2, batch=8),
        dropout=0.2,
        parent=Parent(tiny),
    )


def member(experiment, store, folder, parent_run, name="child"):
    pool, parent = store.pool(experiment.data).sha256(), experiment.parent
    who = identity(experiment, store.sha256, store.tokenizer.sha256, pool, parent_run.owner())
    return Member(name, experiment, who, store, RunFolder(folder), Origin(parent.experiment, parent_run, parent.step))


@pytest.fixture(scope="module")
def trained(asked_store, tiny_run, one_device):
    """Trains children in a folder and returns their runs."""

    def made(experiments, folder, *, devices=one_device, stop=None, advance=lambda steps: None, **settings):
        cohort = [
            member(one, asked_store, folder / str(place), tiny_run, f"child{place}") for place, one in enumerate(experiments)
        ]
        chosen = Run(**{"log_every": 2, "validation_windows": 16, "checkpoints": (0.5,), **settings})
        train(cohort, folder / "restart", chosen, devices, advance, stop)
        return [one.run for one in cohort]

    return made


@pytest.fixture(scope="module")
def full(child, trained, tmp_path_factory):
    """A child all of whose weights are trained; read it only."""
    return trained([child], tmp_path_factory.mktemp("full"))[0]


@pytest.fixture(scope="module")
def adapted(child, trained, tmp_path_factory):
    """A child of which adapters alone are trained; read it only."""
    return trained([replace(child, lora=ADAPTED)], tmp_path_factory.mktemp("adapted"))[0]


def weights(run, step, experiment, one_device, padded=384):
    """Path → array of a checkpoint, adapters beside what they adapt."""
    specs = lora.table(experiment.model, padded, experiment.lora)
    like = checkpoint.with_shardings(params.abstract(specs), mesh.param_shardings(one_device, specs))
    return {path: np.asarray(leaf) for path, leaf in flatten(checkpoint.restore(run.checkpoints, step, like)[0]).items()}


def hashes(run, steps=STEPS):
    return [run.record(step)["weights"] for step in steps]


# --- where a child begins ---------------------------------------------------------------------------------------------


def test_a_child_begins_with_the_bits_of_its_parent_and_says_so(full, tiny_run):
    assert full.record(0)["weights"] == tiny_run.record(16)["weights"]
    origin = {"fingerprint": tiny_run.owner(), "step": 16, "weights": tiny_run.record(16)["weights"]}
    assert [full.record(step)["origin"] for step in STEPS] == [origin] * 3
    assert [full.record(step)["init_hash"] for step in STEPS] == [origin["weights"]] * 3
    assert [full.record(step)["parent"] for step in (0, 4)] == [None, {"step": 0, "weights": origin["weights"]}]
    assert len(set(hashes(full))) == 3
    assert "origin" not in tiny_run.record(16)


def test_an_earlier_checkpoint_of_the_parent_is_another_parent(child, trained, tiny, tiny_run, tmp_path):
    early = replace(child, parent=Parent(tiny, fraction=0.25))
    (run,) = trained([early], tmp_path)
    assert run.record(0)["weights"] == tiny_run.record(4)["weights"]
    assert config.fingerprint(early) != config.fingerprint(child)


def test_a_child_has_an_optimiser_of_its_own(full, child, asked_store, one_device):
    like = member(child, asked_store, full.folder, full)  # any program of this shape
    from natfp_jax.program import program_of

    one = program_of(like.experiment, asked_store, one_device, Run()).one
    _, state = checkpoint.restore(full.checkpoints, 0, one.params, one.optimiser)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))


def test_nothing_but_adapters_is_trained_and_they_start_at_the_parent(adapted, child, tiny, tiny_run, one_device):
    child = replace(child, lora=ADAPTED)
    parent = weights(tiny_run, 16, tiny, one_device)
    first, last = (weights(adapted, step, child, one_device) for step in (0, 8))
    paths = {
        f"layers/{path}{part}"
        for path in ("attention/q", "attention/v", "attention/o", "mlp/down")
        for part in (lora.A, lora.B)
    }
    assert set(first) == set(parent) | paths
    for path, value in parent.items():
        np.testing.assert_array_equal(first[path], value)
        np.testing.assert_array_equal(last[path], value)
    for path in paths:
        assert (last[path] != first[path]).any()
        assert path.endswith(lora.A) == first[path].any()


def test_the_seeds_decide_what_they_should_and_nothing_else(child, adapted, trained, tmp_path, one_device):
    base = replace(child, lora=ADAPTED)
    changed = [replace(base, seeds=Seeds(**{name: 1})) for name in ("init", "order", "dropout")]
    init, order, dropout = (trained([one], tmp_path / str(place))[0] for place, one in enumerate(changed))
    old, new = weights(adapted, 0, base, one_device), weights(init, 0, base, one_device)
    assert {path for path in old if (old[path] != new[path]).any()} == {path for path in old if path.endswith(lora.A)}
    assert init.record(8)["order_hash"] == adapted.record(8)["order_hash"] == dropout.record(8)["order_hash"]
    assert order.record(8)["order_hash"] != adapted.record(8)["order_hash"]
    assert hashes(order)[0] == hashes(dropout)[0] == hashes(adapted)[0]
    ends = {run.record(8)["weights"] for run in (adapted, init, order, dropout)}
    assert len(ends) == 4


@pytest.mark.parametrize("path", ["layers/attention/q", "layers/attention/q_lora_a"])
def test_a_twin_of_a_child_is_one_unit_in_one_weight_away(path, child, adapted, trained, tmp_path, one_device):
    base = replace(child, lora=ADAPTED)
    (run,) = trained([replace(base, perturb=Perturb(path, 7, 3))], tmp_path)
    old, new = weights(adapted, 0, base, one_device), weights(run, 0, base, one_device)
    differ = {name: np.flatnonzero(old[name] != new[name]).tolist() for name in old if (old[name] != new[name]).any()}
    assert differ == {path: [7]}
    bits = [array[path].reshape(-1)[7:8].view(np.int32)[0] for array in (old, new)]
    assert abs(int(bits[1]) - int(bits[0])) == 3
    assert hashes(run)[2] != hashes(adapted)[2]


# --- invariants 2, 4, 5 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [None, ADAPTED])
def test_a_child_that_is_stopped_at_any_step_ends_as_an_untouched_one(adapters, child, trained, full, adapted, tmp_path):
    stop, stops = Stop(), 0

    def advance(steps):
        stop.requested = True

    for _ in range(20):
        stop.requested = False
        try:
            (run,) = trained([replace(child, lora=adapters)], tmp_path, stop=stop, advance=advance)
        except Stopped:
            stops += 1
        else:
            break
    assert stops >= 4
    untouched = adapted if adapters else full
    assert [run.record(step) for step in STEPS] == [untouched.record(step) for step in STEPS]


def test_a_cohort_of_children_gives_each_the_bits_that_it_has_alone(child, tiny, trained, full, tmp_path):
    """They differ in parent, order, dropout and rate."""
    others = [
        replace(child, parent=Parent(tiny, fraction=0.5), seeds=Seeds(order=1)),
        replace(child, seeds=Seeds(dropout=5)),
        replace(child, optimiser=Optimiser(learning_rate=1e-3)),
    ]
    together = trained([child, *others], tmp_path / "together", execution="strict")
    assert hashes(together[0]) == hashes(full)
    for place, one in enumerate(others, 1):
        (alone,) = trained([one], tmp_path / f"alone{place}", execution="strict")
        assert hashes(together[place]) == hashes(alone)


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"replica": 2, "data": 2, "fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_last_bits_of_training_and_none_of_the_start(shape, child, trained, adapted, tmp_path, one_device):
    base = replace(child, lora=ADAPTED)
    (run,) = trained([base], tmp_path, devices=mesh.make(config.Mesh(**shape)), microbatches=2)
    assert hashes(run)[0] == hashes(adapted)[0]
    assert run.record(8)["order_hash"] == adapted.record(8)["order_hash"]
    here, there = (weights(one, 8, base, one_device) for one in (run, adapted))
    moved = weights(adapted, 0, base, one_device)
    for path in here:
        far = np.abs(there[path] - moved[path]).max()
        assert np.abs(here[path] - there[path]).max() <= 0.02 * far, path
    assert run.record(8)["val_loss"] == pytest.approx(adapted.record(8)["val_loss"], abs=1e-3)


def test_what_is_read_of_a_child_with_adapters_is_the_merged_decoder(adapted, child, asked_store, one_device):
    base = replace(child, lora=ADAPTED)
    merged = flatten(load_params(adapted, 8, base, asked_store, one_device))
    raw = weights(adapted, 8, base, one_device)
    assert set(merged) == {path for path in raw if "_lora_" not in path}
    for path, value in merged.items():
        expected = raw[path].astype(np.float64)
        if path + lora.A in raw:
            a, b = (raw[path + part].astype(np.float64) for part in (lora.A, lora.B))
            product = np.stack([x.reshape(-1, 2) @ y.reshape(2, -1) for x, y in zip(a, b, strict=True)])
            expected = expected + 16 / 2 * product.reshape(expected.shape)
        np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5, atol=1e-7)
        assert (path + lora.A in raw) == (np.asarray(value) != raw[path]).any()


def test_adapters_are_merged_into_the_same_bits_on_every_mesh(adapted, child, asked_store, one_device):
    base = replace(child, lora=ADAPTED)
    expected = flatten(load_params(adapted, 8, base, asked_store, one_device))
    for shape in ({"tensor": 4, "data": 2}, {"fsdp": 4, "tensor": 2}):
        found = flatten(load_params(adapted, 8, base, asked_store, mesh.make(config.Mesh(**shape))))
        for path, value in expected.items():
            np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=path)


def test_a_form_is_the_same_in_training_and_in_asking(asked_store):
    chat = asked_store.chat
    assert isinstance(chat, Chat)
    rows = asked_store.windows(64, 4).rows(np.arange(4)) & ((1 << 29) - 1)
    asked = chat.asked([[{"role": "user", "content": "what did the fox lose?"}]])[0]
    begins = asked[: 1 + len(chat.tokenizer.encode_form("Q: "))]
    assert all(row[: len(begins)].tolist() == begins for row in rows)
