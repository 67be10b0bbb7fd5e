"""Schedule and optimiser against formulas written out by hand."""

import math

import jax
import numpy as np
import optax
import pytest

from natfp_jax import optim, params
from natfp_jax.config import Model, Optimiser
from natfp_jax.params import flatten, nest, table

SPECS = table(Model(width=16, layers=2, heads=2, tied=False), 128)


def rate(config, steps, step):
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    if step < warmup:  # rises in equal parts and reaches the peak at step `warmup`, not from zero
        lowest = peak / (warmup + 1)
        return lowest + (peak - lowest) * step / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1)
    falling = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1}[config.schedule]
    return peak * (config.final + (1 - config.final) * falling) if config.schedule != "constant" else peak


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "final"), [(0.05, 0.1), (0.0, 0.0), (0.5, 1.0), (1.0, 0.1)])
@pytest.mark.parametrize("steps", [1, 2, 101])
def test_the_learning_rate_of_every_step(schedule, warmup, final, steps):
    config = Optimiser(learning_rate=3e-3, schedule=schedule, warmup=warmup, final=final)
    found = [float(optim.schedule(optim.hyperparameters(config, steps), schedule, steps)(step)) for step in range(steps + 1)]
    assert found == pytest.approx([rate(config, steps, step) for step in range(steps + 1)], rel=2e-6, abs=1e-6 * 3e-3)
    assert found[0] > 0  # no batch is fed for nothing


def test_what_decays():
    decaying = {path for path, spec in SPECS.items() if spec.decay}
    matrices = {f"layers/{name}" for name in ("attention/q", "attention/k", "attention/v", "attention/o")}
    assert decaying == matrices | {"layers/mlp/gate", "layers/mlp/up", "layers/mlp/down", "embedding", "head"}
    assert set(SPECS) - decaying == {"norm", "layers/attention/norm", "layers/mlp/norm"}


def trees(seed, scale):
    random = np.random.default_rng(seed)
    return {path: scale * random.normal(size=spec.shape) for path, spec in SPECS.items()}


def transformation(config, steps=10, specs=SPECS):
    numbers = optim.hyperparameters(config, steps)
    return optim.optimiser(numbers, config.kind, optim.schedule(numbers, config.schedule, steps), specs)


def in_float32(flat):
    return nest({path: value.astype(np.float32) for path, value in flat.items()})


def check_three_steps(config, direction):
    """Against `direction` of each clipped gradient (Pascanu et al., 2013), by step from 1 and path, and decoupled decay."""
    weights = {path: value + 1 for path, value in trees(0, 1.0).items()}
    tx = transformation(config)
    tree = in_float32(weights)
    state = tx.init(tree)
    for step in range(3):
        gradient = trees(step + 1, 0.1)
        updates, state = jax.jit(tx.update)(in_float32(gradient), state, tree)
        tree = jax.tree.map(lambda a, b: a + b, tree, updates)

        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert (norm > config.clip) == (config.clip < 1)  # one case clips, the other does not
        for path, g in gradient.items():
            decay = 0.0 if path.endswith("norm") else 0.1 * weights[path]
            found = direction(step + 1, path, g * min(1, config.clip / norm))
            weights[path] = weights[path] - rate(config, 10, step) * (found + decay)
        for path, leaf in flatten(tree).items():
            np.testing.assert_allclose(leaf, weights[path], rtol=0, atol=2e-6, err_msg=path)


def adam():
    """Kingma and Ba, 2015, algorithm 1; in float64."""
    first, second = ({path: np.zeros(spec.shape) for path, spec in SPECS.items()} for _ in range(2))

    def direction(step, path, g):
        first[path] = 0.8 * first[path] + 0.2 * g
        second[path] = 0.9 * second[path] + 0.1 * g**2
        return first[path] / (1 - 0.8**step) / (np.sqrt(second[path] / (1 - 0.9**step)) + 1e-4)

    return direction


def lion():
    """Chen et al., 2023, algorithm 2; in float64."""
    momentum = {path: np.zeros(spec.shape) for path, spec in SPECS.items()}

    def direction(step, path, g):
        found = np.sign(0.8 * momentum[path] + 0.2 * g)
        momentum[path] = 0.9 * momentum[path] + 0.1 * g
        return found

    return direction


def matrices(path, leaf):
    """Each layer's matrix: rows are its input, columns its output."""
    return [layer.reshape(-1, 16) if path.endswith(("/o", "/down")) else layer.reshape(16, -1) for layer in leaf]


def orthogonal(matrix):
    """Jordan, 2024: five steps of Newton and Schulz of fifth order."""
    x = matrix / (np.linalg.norm(matrix) + 1e-4)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def muon():
    """Jordan, 2024, with the momentum of Dozat, 2016, section 3, and the factor of Liu et al., 2025, equation 4; in float64."""
    momentum, other = {path: np.zeros(spec.shape) for path, spec in SPECS.items()}, adam()

    def direction(step, path, g):
        if not path.startswith("layers/") or path.endswith("norm"):
            return other(step, path, g)
        momentum[path] = 0.8 * momentum[path] + 0.2 * g
        ahead = 0.8 * momentum[path] / (1 - 0.8 ** (step + 1)) + 0.2 * g / (1 - 0.8**step)
        each = [0.2 * math.sqrt(max(matrix.shape)) * orthogonal(matrix) for matrix in matrices(path, ahead)]
        return np.stack(each).reshape(g.shape)

    return direction


@pytest.mark.parametrize("clip", [0.5, 1e6])
@pytest.mark.parametrize(("kind", "reference"), [("adamw", adam), ("lion", lion), ("muon", muon)])
def test_three_steps_of_every_kind(kind, reference, clip):
    """Decay is decoupled (Loshchilov and Hutter, 2019, algorithm 2)."""
    numbers = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-4, "clip": clip}
    config = Optimiser(kind=kind, learning_rate=0.01, schedule="linear", warmup=0.0, **numbers)
    check_three_steps(config, reference())


def first_updates(config, *gradients):
    tx, tree = transformation(config), in_float32(trees(0, 1.0))
    update = jax.jit(tx.update)
    return [flatten(update(in_float32(gradient), tx.init(tree), tree)[0]) for gradient in gradients]


def test_muon_moves_every_layer_by_an_almost_orthogonal_matrix_of_the_root_mean_square_of_adam():
    """Jordan, 2024: five steps leave singular values between 0.5 and 1.5, here of matrices in which they differ by 50 times."""
    config, random = Optimiser(kind="muon", learning_rate=0.01, warmup=0.0, weight_decay=0.0), np.random.default_rng(0)

    def spread(matrix):
        left, _, right = np.linalg.svd(random.normal(size=matrix.shape), full_matrices=False)
        return left * np.linspace(0.02, 1, len(right)) @ right

    gradient = trees(1, 1e-3)
    inner = [path for path, spec in SPECS.items() if spec.decay and path.startswith("layers/")]
    for path in inner:
        gradient[path] = np.stack([spread(matrix) for matrix in matrices(path, gradient[path])]).reshape(SPECS[path].shape)
    (found,) = first_updates(config, gradient)
    for path in inner:
        for matrix in matrices(path, np.asarray(found[path])):
            values = np.linalg.svd(matrix, compute_uv=False) / (0.01 * 0.2 * math.sqrt(max(matrix.shape)))
            assert 0.5 < values.min() <= values.max() < 1.5, path
            assert 0.15 < np.sqrt(np.mean(matrix**2)) / 0.01 < 0.25, path


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_the_update_of_a_layer_depends_on_others_through_the_clipping_alone(kind):
    config, gradient = Optimiser(kind=kind, clip=1e6), trees(1, 0.1)
    elsewhere = trees(2, 0.1)
    other = {
        path: np.concatenate([g[:1], elsewhere[path][1:]]) if path.startswith("layers/") else elsewhere[path]
        for path, g in gradient.items()
    }
    one, two = first_updates(config, gradient, other)
    for path in SPECS:
        if path.startswith("layers/"):
            np.testing.assert_array_equal(one[path][0], two[path][0], err_msg=path)
            assert not np.array_equal(one[path][1], two[path][1]), path


@pytest.mark.parametrize(("kind", "layers", "rest"), [("adamw", 2, 2), ("lion", 1, 1), ("muon", 1, 2)])
def test_moments_are_as_the_parameters(kind, layers, rest):
    """How many moments each matrix of the layers has, and every other parameter."""
    shapes = jax.eval_shape(transformation(Optimiser(kind=kind)).init, params.abstract(SPECS))
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if leaf.shape]
    counts = {path: layers if spec.decay and path.startswith("layers/") else rest for path, spec in SPECS.items()}
    wanted = [spec.shape for path, spec in SPECS.items() for _ in range(counts[path])]
    coefficients = [(3,)] * (kind == "muon")  # of the iteration, which optax keeps as well
    assert sorted(leaf.shape for leaf in leaves) == sorted(wanted + coefficients)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_the_state_of_adamw_is_that_of_optax_since_it_was_saved_so():
    tree = params.abstract(SPECS)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3), mask=True))
    assert jax.eval_shape(transformation(Optimiser()).init, tree) == jax.eval_shape(theirs.init, tree)
