"""Adapters: what they compute, how they begin, and that they alone are trained."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import MODELS, NAMES, PADDED, VOCABULARY, distance, reference, tokens, weights
from test_optim import orthogonal
from test_params import assert_same

from natfp_jax import config, descent, lora, mesh, optim, params
from natfp_jax.config import Data, Experiment, Lora, Model, Optimiser, Perturb
from natfp_jax.errors import UserError
from natfp_jax.lineage import weight_hash
from natfp_jax.model import Decoder, Learning, hidden
from natfp_jax.params import flatten, nest
from natfp_jax.program import Program
from natfp_jax.train import laid, quiet

ALL = ("q", "k", "v", "o", "gate", "up", "down")
BASE = Model(width=32, layers=2, heads=4)
SMALL = Model(width=24, layers=1, heads=6, kv_heads=2, mlp_width=20)
SOME = Lora(rank=3, alpha=5.0)


def every(model):
    """Adapters of all matrices that the model has."""
    return dataclasses.replace(SOME, targets=tuple(name for name in ALL if name != "gate" or model.mlp == "swiglu"))


def adapted(model, adapters):
    """A decoder and adapters, all drawn at random."""
    random = np.random.default_rng(7)
    drawn = {
        path: jnp.asarray(0.3 * random.normal(size=spec.shape), jnp.float32)
        for path, spec in lora.adapters(model, PADDED, adapters).items()
    }
    return nest({**flatten(weights(model)), **drawn})


def defined(tree, adapters):
    """W + alpha / rank · A B of every layer, in float64, with the parameters of a decoder alone."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}
    for path in [path for path in leaves if path.endswith(lora.A)]:
        name = path.removesuffix(lora.A)
        a, b = leaves.pop(path), leaves.pop(name + lora.B)
        product = np.stack([np.tensordot(*layer, axes=1) for layer in zip(a, b, strict=True)])
        leaves[name] = leaves[name] + adapters.alpha / adapters.rank * product
    return nest(leaves)


# --- what they compute ------------------------------------------------------------------------------------------------


def check_forward(model, adapters):
    tree, ids_BT = adapted(model, adapters), tokens(2, 9)
    apart = jax.jit(lambda tree: hidden(model, tree, ids_BT, learning=Learning(adapters=adapters)))(tree)
    merged = descent.merged(tree, adapters)
    joint = jax.jit(lambda tree: hidden(model, tree, ids_BT))(merged)
    expected = np.stack([reference(defined(tree, adapters), ids_T, model)[0] for ids_T in ids_BT])
    assert distance(apart, expected) < 1e-5
    assert distance(joint, expected) < 1e-5
    assert distance(reference(weights(model), ids_BT[0], model)[0], expected[0]) > 0.1
    assert set(flatten(merged)) == set(params.table(model, PADDED))


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_with_adapters_is_the_merged_one_and_the_definition(name):
    check_forward(MODELS[name], every(MODELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["q", "k", "o", "gate", "down"])
def test_every_matrix_is_adapted_by_itself(target):
    check_forward(SMALL, dataclasses.replace(SOME, targets=(target,)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_merged_is_the_definition_and_the_rest_stays(name):
    model = MODELS[name]
    adapters = dataclasses.replace(every(model), targets=("q", "o", "down"))
    tree = adapted(model, adapters)
    merged, expected = flatten(descent.merged(tree, adapters)), flatten(defined(tree, adapters))
    changed = {"layers/attention/q", "layers/attention/o", "layers/mlp/down"}
    assert_same(flatten(weights(model)), merged, except_for=changed)
    for path in changed:
        np.testing.assert_allclose(merged[path], expected[path], rtol=0, atol=1e-6)
    assert descent.merged(tree, None) is tree


@pytest.mark.parametrize("name", NAMES)
def test_the_modules_parameters_are_those_of_the_table(name):
    model = MODELS[name]
    adapters = every(model)
    module = Decoder(model, vocabulary=PADDED, learning=Learning(adapters=adapters))
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(tree).items()}
    assert found == {path: (spec.shape, jnp.float32) for path, spec in lora.table(model, PADDED, adapters).items()}
    assert lora.table(model, PADDED, None) == params.table(model, PADDED)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_the_parents(name):
    model, ids_BT = MODELS[name], tokens(2, 9)
    adapters, parent = every(model), weights(model)
    tree = descent.begun(lora.table(model, PADDED, adapters), 0, None, None, parent)
    found = jax.jit(lambda tree: hidden(model, tree, ids_BT, learning=Learning(adapters=adapters)))(tree)
    np.testing.assert_array_equal(found, jax.jit(lambda tree: hidden(model, tree, ids_BT))(parent))


def test_a_target_that_the_model_lacks_is_told_in_one_line():
    with pytest.raises(UserError, match=r'^lora\.targets names "gate", which a model with mlp="gelu" lacks$'):
        lora.table(dataclasses.replace(BASE, mlp="gelu"), PADDED, Lora(targets=("q", "gate")))


def test_what_is_trained_and_what_stays_are_all_together():
    adapters = every(BASE)
    tree = adapted(BASE, adapters)
    trained, still = lora.split(tree, adapters)
    assert set(flatten(trained)) == set(lora.adapters(BASE, PADDED, adapters))
    assert set(flatten(still)) == set(params.table(BASE, PADDED))
    assert_same(flatten(lora.joined(trained, still)), flatten(tree))
    assert lora.split(tree, None) == (tree, {})
    assert lora.joined(tree, {}) is tree


# --- how they begin ---------------------------------------------------------------------------------------------------


def begun(model=BASE, adapters=SOME, seed=0, devices=None, perturb=None, parent=11):
    """At step 0, of a parent with an init seed of its own."""
    specs = lora.table(model, PADDED, adapters)
    plain = params.table(model, PADDED)
    shardings = None if devices is None else mesh.param_shardings(devices, specs)
    its = None if devices is None else mesh.param_shardings(devices, plain)
    origin = None if parent is None else params.init(plain, parent, its)
    return descent.begun(specs, seed, shardings, perturb, origin)


@pytest.fixture(scope="module")
def base():
    return jax.device_get(flatten(begun()))


def test_adapters_begin_with_the_variance_of_their_input_and_at_zero():
    adapters = dataclasses.replace(every(BASE), rank=32)
    leaves = flatten(begun(adapters=adapters))
    inputs = {"down": 96}  # and 32 of all others, of `o` as well: four heads of eight
    for target in ALL:
        path = f"layers/{'mlp' if target in ('gate', 'up', 'down') else 'attention'}/{target}"
        values = np.asarray(leaves[path + lora.A]) * math.sqrt(inputs.get(target, 32))
        assert abs(values.std() - 1) < 4 / math.sqrt(2 * values.size), target
        assert abs(values.mean()) < 4 / math.sqrt(values.size), target
        assert not leaves[path + lora.B].any()


def test_the_parent_stays_as_it_is_and_only_adapters_take_the_seed(base):
    assert_same(flatten(params.init(params.table(BASE, PADDED), 11)), {p: v for p, v in base.items() if "lora" not in p})
    other = flatten(begun(seed=1))
    a = {path for path in base if path.endswith(lora.A)}
    assert_same(base, other, except_for=a)
    assert all(not np.array_equal(base[path], other[path]) for path in a)
    without = flatten(begun(parent=None))
    assert_same(without, flatten(params.init(lora.table(BASE, PADDED, SOME), 0)))
    assert_same({p: v for p, v in base.items() if "lora" in p}, {p: v for p, v in without.items() if "lora" in p})


@pytest.mark.parametrize(
    ("model", "adapters", "but"),
    [
        ({}, {"targets": ALL}, set()),
        ({}, {"targets": ("v",)}, set()),
        ({}, {"alpha": 1.0}, set()),
        ({"layers": 5}, {}, set()),
        ({"mlp": "gelu", "tied": False, "rope_theta": 9.0}, {}, set()),
        ({"kv_heads": 2}, {}, {"layers/attention/v" + lora.B}),  # and A keeps its shape
        ({}, {"rank": 4}, {f"layers/attention/{name}{part}" for name in "qv" for part in (lora.A, lora.B)}),
    ],
)
def test_adapters_depend_on_seed_path_layer_and_shape_alone(model, adapters, but, base):
    changed = flatten(begun(dataclasses.replace(BASE, **model), dataclasses.replace(SOME, **adapters)))
    shared = {path for path in base if "lora" in path and path in changed}
    assert len(shared) == (2 if adapters.get("targets") == ("v",) else 4)
    assert_same({p: base[p] for p in shared}, {p: changed[p][:2] for p in shared}, except_for=but)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 8, 1), (1, 4, 1, 2), (2, 1, 2, 2), (8, 1, 1, 1)])
def test_they_begin_alike_on_every_mesh(shape):
    devices, adapters = mesh.make(config.Mesh(*shape), jax.devices()), every(BASE)
    tree = begun(adapters=adapters, devices=devices)
    assert weight_hash(tree) == weight_hash(begun(adapters=adapters))
    for path, sharding in flatten(mesh.param_shardings(devices, lora.table(BASE, PADDED, adapters))).items():
        assert flatten(tree)[path].sharding == sharding


@pytest.mark.parametrize("shape", [None, (1, 2, 2, 2)])
@pytest.mark.parametrize("path", ["layers/attention/k", "embedding", "layers/attention/v" + lora.A])
@pytest.mark.parametrize("ulps", [1, -7])
def test_a_twin_differs_in_one_weight_by_the_ulps(shape, path, ulps, base):
    devices = None if shape is None else mesh.make(config.Mesh(*shape), jax.devices())
    twin = flatten(begun(devices=devices, perturb=Perturb(path, 123, ulps)))
    assert_same(base, twin, except_for={path})
    before, after = (np.asarray(leaf).reshape(-1).view(np.int32).astype(np.int64) for leaf in (base[path], twin[path]))
    steps = np.where(before >= 0, after - before, before - after)
    assert np.flatnonzero(steps).tolist() == [123]
    assert steps[123] == ulps
    assert twin[path].sharding == flatten(begun(devices=devices))[path].sharding


@pytest.mark.parametrize(
    ("perturb", "part"),
    [
        (Perturb("layers/attention/k" + lora.A), "is none of embedding, layers/"),
        (Perturb("layers/attention/q" + lora.A, 10**6), "is outside layers/attention/q_lora_a, which has 192 values"),
    ],
)
def test_a_twin_of_nothing(perturb, part):
    with pytest.raises(UserError, match=part) as caught:
        begun(perturb=perturb)
    assert "\n" not in str(caught.value)


# --- how they are trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["muon", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("adamw", "lion"))])
def test_every_optimiser_moves_adapters_and_nothing_else(kind, one_device):
    """At first B alone, for A has no gradient while B is zero; then both."""
    model = Model(width=16, layers=1, heads=2, kv_heads=1)
    experiment = Experiment(
        model=model,
        data=Data(seq_len=8, windows=8, batch=4),
        optimiser=Optimiser(kind=kind, learning_rate=1e-2, weight_decay=0.0),
        lora=every(model),
    )
    made = Program(config.shape(experiment), VOCABULARY, PADDED, 1, one_device, 1, "none", "strict")
    state = made.stack([lambda: made.init(0, parent=lambda: weights(model))])
    its = {path for path in flatten(made.one.params) if path.endswith((lora.A, lora.B))}
    kept = [leaf.shape for leaf in jax.tree.leaves(made.one.optimiser) if len(leaf.shape) > 1]
    assert sorted(kept) == sorted([flatten(made.one.params)[path].shape for path in its] * (2 if kind == "adamw" else 1))
    numbers, windows = laid(made, [optim.hyperparameters(experiment.optimiser, 2)]), tokens(4, 9)[None]
    before = jax.device_get(flatten(made.take(state.params, 0)))
    for parts in ((lora.B,), (lora.A, lora.B)):
        state, metrics = made.step(state, numbers, mesh.lay(windows, mesh.batch_sharding(one_device)), quiet(one_device))
        after = jax.device_get(flatten(made.take(state.params, 0)))
        moved = {path for path in after if not np.array_equal(before[path], after[path])}
        assert moved == {path for path in its if path.endswith(parts)}
        assert float(metrics["gradient_norm"][0]) > 0
        before = after


def test_muon_makes_every_adapter_orthogonal_between_its_own_two_sides():
    model = Model(width=16, layers=2, heads=2)
    specs = lora.adapters(model, PADDED, every(model))
    random = np.random.default_rng(0)
    gradient = {path: random.normal(size=spec.shape).astype(np.float32) for path, spec in specs.items()}
    numbers = optim.hyperparameters(Optimiser(kind="muon", weight_decay=0.0, clip=1e6), 10)
    tx, tree = optim.optimiser(numbers, "muon", lambda step: 0.01, specs), nest(gradient)
    found = flatten(jax.jit(tx.update)(tree, tx.init(tree), tree)[0])
    for path, leaf in gradient.items():
        for given, update in zip(leaf, found[path], strict=True):
            sides = (-1, SOME.rank) if path.endswith(lora.A) else (SOME.rank, -1)
            matrix = given.reshape(sides).astype(np.float64)
            expected = -0.01 * 0.2 * math.sqrt(max(matrix.shape)) * orthogonal(matrix)
            assert distance(np.asarray(update).reshape(sides), expected) < 1e-3, path
