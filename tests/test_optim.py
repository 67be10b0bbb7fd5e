"""Schedule and optimiser against formulas written out by hand."""

import math

import jax
import numpy as np
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


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_three_steps_of_adamw(clip):
    """Loshchilov and Hutter, 2019, algorithm 2, after clipping by the global norm (Pascanu et al., 2013); in float64."""
    config = Optimiser(learning_rate=0.01, schedule="linear", warmup=0.0, beta1=0.8, beta2=0.9, epsilon=1e-4, clip=clip)
    weights = {path: value + 1 for path, value in trees(0, 1.0).items()}
    tx = optim.optimiser(optim.hyperparameters(config, 10), config.schedule, 10, SPECS)
    tree = nest({path: value.astype(np.float32) for path, value in weights.items()})
    state = tx.init(tree)
    first, second = ({path: np.zeros_like(value) for path, value in weights.items()} for _ in range(2))
    for step in range(3):
        gradient = trees(step + 1, 0.1)
        updates, state = jax.jit(tx.update)(nest({p: g.astype(np.float32) for p, g in gradient.items()}), state, tree)
        tree = jax.tree.map(lambda a, b: a + b, tree, updates)

        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert (norm > clip) == (clip < 1)  # one case clips, the other does not
        for path, g in gradient.items():
            g = g * min(1, clip / norm)
            first[path] = 0.8 * first[path] + 0.2 * g
            second[path] = 0.9 * second[path] + 0.1 * g**2
            direction = first[path] / (1 - 0.8 ** (step + 1)) / (np.sqrt(second[path] / (1 - 0.9 ** (step + 1))) + 1e-4)
            decay = 0.0 if path.endswith("norm") else 0.1 * weights[path]
            weights[path] = weights[path] - rate(config, 10, step) * (direction + decay)
        for path, leaf in flatten(tree).items():
            np.testing.assert_allclose(leaf, weights[path], rtol=0, atol=2e-6, err_msg=path)


def test_moments_are_as_the_parameters():
    shapes = jax.eval_shape(
        optim.optimiser(optim.hyperparameters(Optimiser(), 10), "cosine", 10, SPECS).init, params.abstract(SPECS)
    )
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if leaf.shape]
    assert sorted(leaf.shape for leaf in leaves) == sorted(spec.shape for spec in SPECS.values() for _ in range(2))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
