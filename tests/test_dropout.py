"""Dropout: its noise is a function of seed, step and row, and of nothing about how a step is carried out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import PADDED, VOCABULARY, tokens, weights
from test_params import assert_same

from natfp_jax import config, mesh, optim, rng
from natfp_jax.config import Data, Experiment, Model
from natfp_jax.model import Learning, _dropped, hidden
from natfp_jax.params import flatten
from natfp_jax.program import Program
from natfp_jax.train import laid, quiet

MODEL = Model(width=16, layers=1, heads=2)  # of more, compiling the generator takes most of the time
ROWS = 8
IDS = tokens(ROWS, 9)


def keys(seed, rows=ROWS):
    root = rng.stream(seed, "dropout", 0)
    return rng.packed(jax.vmap(lambda row: rng.below(root, row))(jnp.arange(rows)))


# --- what is dropped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_is_left_is_made_up_for(rate):
    ones_BTD = jnp.ones((64, 32, 16))
    found = np.asarray(_dropped(ones_BTD, rate, keys(0, 64), 0))
    left = found != 0
    np.testing.assert_allclose(found[left], 1 / (1 - rate), rtol=1e-6)
    assert abs(left.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / left.size)
    assert abs(np.corrcoef(left.reshape(64, -1)) - np.eye(64)).max() < 6 / np.sqrt(32 * 16)  # rows have noise of their own
    assert abs(np.corrcoef(left.ravel(), np.asarray(_dropped(ones_BTD, rate, keys(0, 64), 1) != 0).ravel())[0, 1]) < 0.03


def test_the_noise_of_a_row_is_that_of_its_key():
    found = _dropped(jnp.ones((ROWS, 9, 16)), 0.3, keys(0), 1)
    np.testing.assert_array_equal(found[::-1], _dropped(jnp.ones((ROWS, 9, 16)), 0.3, keys(0)[::-1], 1))


def test_states_are_those_of_the_seed_and_without_noise_nothing_is_dropped():
    tree = weights(MODEL)

    @jax.jit
    def noisy(words_B2):
        return hidden(MODEL, tree, IDS, learning=Learning(dropout=0.3), noise_B2=words_B2)

    one, again, other = np.asarray(noisy(keys(0))), np.asarray(noisy(keys(0))), np.asarray(noisy(keys(1)))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(axis=(1, 2)).all()
    plain = jax.jit(lambda: hidden(MODEL, tree, IDS))()
    np.testing.assert_array_equal(jax.jit(lambda: hidden(MODEL, tree, IDS, learning=Learning(dropout=0.3)))(), plain)


# --- a step -----------------------------------------------------------------------------------------------------------


def experiment(dropout=0.3):
    return Experiment(model=MODEL, data=Data(seq_len=8, windows=ROWS, epochs=2, batch=ROWS), dropout=dropout)


def program(shape=(1, 1, 1, 1), replicas=1, microbatches=1, execution="strict", dropout=0.3):
    devices = mesh.make(config.Mesh(*shape), jax.devices()[: np.prod(shape)])
    form = config.shape(experiment(dropout))
    return Program(form, VOCABULARY, PADDED, replicas, devices, microbatches, "none", execution)


def trained(made, seeds, steps=2):
    """Loss of every step and arm, and the arms' weights in the end."""
    state = made.stack([lambda: made.init(0, parent=lambda: weights(MODEL)) for _ in seeds])
    numbers = laid(made, [optim.hyperparameters(experiment().optimiser, 2) for _ in seeds])
    windows, losses = mesh.lay(np.stack([IDS] * made.replicas), mesh.batch_sharding(made.devices)), []
    for step in range(steps):
        state, metrics = made.step(state, numbers, windows, quiet(made.devices), made.noise(seeds, step))
        losses.append(np.asarray(metrics["loss"])[: len(seeds)])
    return np.array(losses), [jax.device_get(flatten(made.take(state.params, place))) for place in range(len(seeds))]


@pytest.fixture(scope="module")
def solo():
    """Arms with two seeds of dropout, each by itself."""
    made = program()
    found = [trained(made, [seed]) for seed in (0, 1)]
    losses = np.concatenate([one for one, _ in found], axis=1)
    assert_same(trained(made, [0])[1][0], found[0][1][0])
    assert abs(losses[0, 0] - losses[0, 1]) > 1e-3  # the first step has the same weights and rows
    return losses, [one for _, (one,) in found]


def test_steps_have_noise_of_their_own():
    made = program()
    words = {tuple(np.asarray(made.noise([seed], step)).ravel().tolist()) for seed in range(4) for step in range(4)}
    assert len(words) == 16
    assert program(dropout=0.0).noise([0], 0) is None


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1, 1), 2), ((1, 2, 1, 2), 1)])
def test_parts_and_meshes_drop_the_same(shape, microbatches, solo):
    losses, _ = trained(program(shape, microbatches=microbatches), [0], steps=1)
    np.testing.assert_allclose(losses[0, 0], solo[0][0, 0], rtol=1e-5)


@pytest.mark.parametrize("execution", ["strict", "fast"])
def test_arms_with_other_noise_train_together_as_alone(execution, solo):
    losses, arms = trained(program(replicas=2, execution=execution), [0, 1])
    np.testing.assert_allclose(losses, solo[0], rtol=0 if execution == "strict" else 1e-5)
    for one, other in zip(arms, solo[1], strict=True):
        if execution == "strict":
            assert_same(one, other)
        else:
            for path, leaf in other.items():
                np.testing.assert_allclose(one[path], leaf, rtol=0, atol=2e-4, err_msg=path)


def test_nothing_is_dropped_where_a_model_is_evaluated(one_device):
    windows = mesh.lay(IDS[None], mesh.batch_sharding(one_device))
    tree = jax.tree.map(lambda leaf: leaf[None], weights(MODEL))
    np.testing.assert_array_equal(program().evaluate(tree, windows), program(dropout=0.0).evaluate(tree, windows))
