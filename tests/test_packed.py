"""Windows of several examples: each is computed and learnt as if it stood alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_model import PADDED, VOCABULARY, distance, reference, weights

from natfp_jax import blocks, config, mesh, optim, params
from natfp_jax.config import Corpus, Data, Experiment, Lora, MachineQA, Model
from natfp_jax.model import hidden
from natfp_jax.packing import BEGINS, IDS, LEARNT, written
from natfp_jax.program import Program, begins, learnt
from natfp_jax.train import laid, quiet

MODEL = Model(width=16, layers=1, heads=4, kv_heads=2)
DEEP = replace(MODEL, layers=2)
LEARNED = replace(DEEP, positions="learned", context=13)
EOS, LENGTH = 1, 13
ROWS = 8


def window(*examples):
    """Examples one behind another, and padding."""
    marked = np.full(LENGTH, EOS | BEGINS, np.uint32)
    filled = np.concatenate(examples)
    marked[: len(filled)] = filled
    return marked.view(np.int32)


def drawn():
    """The examples of each row; rows have from one to four, and more and less to learn."""
    random, rows = np.random.default_rng(0), []
    for row in range(ROWS):
        lengths = [[13], [5, 6], [3, 2, 8], [2, 4, 3, 3]][row % 4]
        ids = [np.r_[EOS, random.integers(2, VOCABULARY, length - 1)] for length in lengths]
        marks = [np.r_[False, random.random(length - 2) < row / ROWS, True] for length in lengths]
        rows.append([written(*both) for both in zip(ids, marks, strict=True)])
    return rows


EXAMPLES = drawn()
PACKED = np.stack([window(*row) for row in EXAMPLES])
APART = np.stack([window(example) for row in EXAMPLES for example in row])


def program(devices, batch=ROWS, microbatches=1, lora=None, model=MODEL):
    experiment = Experiment(
        corpus=Corpus(source=MachineQA()), model=model, data=Data(seq_len=LENGTH - 1, windows=batch, batch=batch), lora=lora
    )
    ways = devices.shape["replica"]
    return Program(config.shape(experiment), VOCABULARY, PADDED, ways, devices, microbatches, "none", "strict")


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_masks_and_loss_of_two_examples_written_by_hand(one_device):
    first, second = np.array([1, 5, 6, 7]), np.array([1, 8, 9, 10])
    row = window(written(first, [False, False, True, True]), written(second, [False, True, False, True]))
    assert (row[:8] & IDS).tolist() == [1, 5, 6, 7, 1, 8, 9, 10]
    assert np.asarray(begins(row[None, :-1])).tolist() == [[0, 0, 0, 0, 4, 4, 4, 4, 8, 9, 10, 11]]
    assert np.asarray(learnt(row[None])).tolist() == [[0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0]]

    tree, lost = weights(MODEL), []
    for ids, places in ((first, [2, 3]), (second, [1, 3])):
        z_TV = reference(tree, ids, MODEL)[1][:, :VOCABULARY]
        log_p = z_TV - np.log(np.exp(z_TV - z_TV.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z_TV.max(-1, keepdims=True)
        lost += [-log_p[place - 1, ids[place]] for place in places]
    found = jax.jit(program(one_device)._loss)(tree, row[None])
    assert float(found) == pytest.approx(np.mean(lost), rel=1e-5)


# --- states -----------------------------------------------------------------------------------------------------------


def states(model, devices):
    def run(tree, marked_BT):
        return hidden(model, tree, marked_BT[:, :-1] & IDS, devices, begin_BT=begins(marked_BT[:, :-1]))

    return jax.jit(run)


def defined(model):
    """The states of every example, by row, in float64."""
    return [[reference(weights(model), example & IDS, model)[0] for example in row] for row in EXAMPLES]


def places(row):
    """Where the examples of a row stand, those ids of them that are read."""
    ends = np.cumsum([len(example) for example in row])
    return [slice(end - len(example), min(end, LENGTH - 1)) for end, example in zip(ends, row, strict=True)]


@pytest.mark.parametrize(
    ("way", "model"),
    [("blocks of rows", DEEP), ("all at once", DEEP), ("on a mesh", DEEP), ("on a mesh", LEARNED)],
    ids=["blocks of rows", "all at once", "on a mesh", "learned positions"],
)
def test_an_example_has_the_states_that_it_has_alone_and_feels_no_other(way, model, monkeypatch):
    """Feels: to the last bit, whatever the ids of another example are."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 2 * (LENGTH - 1))
    devices = {
        "blocks of rows": mesh.make(config.Mesh(), jax.devices()[:1]),
        "all at once": None,
        "on a mesh": mesh.make(config.Mesh(1, 2, 2, 2), jax.devices()),
    }[way]
    assert len(blocks.row_blocks(PACKED[:, :-1])) == 4
    tree, run = weights(model), states(model, devices)
    found = np.asarray(run(tree, PACKED))
    alone = iter(np.asarray(run(tree, APART[:ROWS])))
    for row, wanted, x_TD in zip(EXAMPLES, defined(model), found, strict=True):
        for place, state in zip(places(row), wanted, strict=True):
            assert distance(x_TD[place], state[: place.stop - place.start]) < 1e-5
            other = next(alone, None)
            if other is not None:
                assert distance(other[: place.stop - place.start], x_TD[place].astype(np.float64)) < 1e-5

    changed, kept = PACKED.copy(), np.ones(PACKED[:, 1:].shape, bool)
    for place, row in enumerate(EXAMPLES):
        its = places(row)[place // 4 % len(row)]  # the first example of some rows, the second of others
        changed[place, its] = (changed[place, its] & ~np.int32(IDS)) | ((changed[place, its] & IDS) + 1) % VOCABULARY
        kept[place, its] = False
    other = np.asarray(run(tree, changed))
    np.testing.assert_array_equal(found[kept], other[kept])
    assert (found[~kept] != other[~kept]).any(axis=-1).all()


# --- loss and gradient ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree():
    return weights(MODEL)


@pytest.fixture(scope="module")
def one_a_row(tree, one_device):
    """Loss and gradient of training with one example a row."""
    loss, gradient = jax.jit(program(one_device)._gradients)(tree, APART, None)
    return float(loss), params.flatten(jax.device_get(gradient))


@pytest.mark.parametrize(
    ("shape", "microbatches"), [((1, 1, 1, 1), 1), ((1, 1, 1, 1), 2), ((1, 1, 1, 1), 4), ((1, 2, 2, 2), 2)]
)
def test_packing_and_parts_change_neither_loss_nor_gradient(shape, microbatches, tree, one_a_row):
    devices = mesh.make(config.Mesh(*shape), jax.devices()[: np.prod(shape)])
    counts = [(PACKED[part::microbatches] & LEARNT != 0).sum() for part in range(microbatches)]
    assert len(set(counts)) == microbatches  # else their plain mean would do
    value, gradient = jax.jit(program(devices, microbatches=microbatches)._gradients)(tree, PACKED, None)
    assert float(value) == pytest.approx(one_a_row[0], rel=1e-5)
    found = params.flatten(jax.device_get(gradient))
    assert set(found) == set(one_a_row[1])
    for path, leaf in found.items():
        assert distance(leaf, one_a_row[1][path].astype(np.float64)) < 2e-5, path


def test_replicas_learn_packed_rows_as_one_alone_and_with_adapters(tree, one_a_row):
    """Inside of `shard_map`, rows and heads of a replica in parts; at first, adapters leave the loss as it is."""
    devices = mesh.make(config.Mesh(2, 1, 2, 2), jax.devices())
    made = program(devices, microbatches=2, lora=Lora(rank=2))
    state = made.stack([lambda: made.init(0, parent=lambda: tree)])
    numbers = laid(made, [optim.hyperparameters(config.Optimiser(), 1)])
    windows = mesh.lay(np.stack([PACKED, PACKED]), mesh.batch_sharding(devices))
    checked = np.asarray(made.evaluate(state.params, windows))
    _, metrics = made.step(state, numbers, windows, quiet(devices))
    np.testing.assert_allclose(checked, one_a_row[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], one_a_row[0], rtol=1e-5)
