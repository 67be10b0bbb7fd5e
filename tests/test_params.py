"""Init depends on seed, path, layer and shape alone; the table says the rest."""

import math

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.stats import kstest

from natfp_jax import config, mesh, params
from natfp_jax.config import Llama3Rope, Model, Perturb
from natfp_jax.errors import UserError
from natfp_jax.lineage import weight_hash

PADDED = 384
BASE = Model(width=32, layers=2, heads=4)
UNTIED = config.replace(BASE, "tied", False)


def initial(model=BASE, seed=0, devices=None, perturb=None):
    specs = params.table(model, PADDED)
    shardings = None if devices is None else mesh.param_shardings(devices, specs)
    return params.init(specs, seed, shardings, perturb)


@pytest.fixture(scope="module")
def base():
    return jax.device_get(params.flatten(initial()))


def assert_same(one, other, except_for=()):
    assert set(one) - set(except_for) == set(other) - set(except_for)
    for path in set(one) - set(except_for):
        assert_array_equal(np.asarray(one[path]).view(np.uint32), np.asarray(other[path]).view(np.uint32), err_msg=path)


# --- invariant 2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 8, 1), (1, 4, 1, 2), (1, 1, 1, 4), (2, 1, 2, 2), (8, 1, 1, 1)]
)
def test_init_is_the_same_on_every_mesh(shape, base):
    devices = mesh.make(config.Mesh(*shape), jax.devices()[: math.prod(shape)])
    tree = initial(devices=devices)
    assert_same(base, params.flatten(tree))
    assert weight_hash(tree) == weight_hash(params.nest(base))
    for path, spec in params.table(BASE, PADDED).items():  # and is laid out as the table says
        leaf = params.flatten(tree)[path]
        expected = tuple(
            length // (1 if axis is None else devices.shape[axis])
            for length, axis in zip(spec.shape, spec.partition, strict=True)
        )
        assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}


def test_a_deeper_model_has_the_same_shallow_layers(base):
    deeper = params.flatten(initial(config.replace(BASE, "layers", 5)))
    assert deeper["layers/attention/q"].shape[0] == 5
    assert_same(base, {path: leaf[:2] if path.startswith("layers/") else leaf for path, leaf in deeper.items()})


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"tied": False}, {"head"}),
        ({"mlp": "gelu", "mlp_width": 96}, {"layers/mlp/gate"}),  # 96 is the width that SwiGLU has by default
        ({"kv_heads": 2}, {"layers/attention/k", "layers/attention/v"}),
        ({"rope_theta": 500.0, "norm_epsilon": 1e-3, "dtype": "bfloat16"}, set()),
        ({"init_scale": 0.1}, {"embedding"}),
        ({"mlp_width": 64}, {"layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"}),
        ({"norm": "layer"}, {"norm_bias", "layers/attention/norm_bias", "layers/mlp/norm_bias"}),
        ({"biases": ("qkv",)}, {f"layers/attention/{name}_bias" for name in "qkv"}),
        (
            {"biases": ("o", "mlp")},
            {"layers/attention/o_bias", *(f"layers/mlp/{name}_bias" for name in ("gate", "up", "down"))},
        ),
        ({"qk_norm": True}, {"layers/attention/q_norm", "layers/attention/k_norm"}),
        ({"positions": "learned", "context": 16}, {"positions"}),
        ({"parallel": True, "rope_fraction": 0.5, "rope_scaling": Llama3Rope()}, set()),
    ],
)
def test_a_change_of_one_parameter_changes_no_other(changes, other, base):
    model = BASE
    for field, value in changes.items():
        model = config.replace(model, field, value)
    changed = params.flatten(initial(model))
    assert_same(base, changed, except_for=other)
    assert all(path not in base or path not in changed or not np.array_equal(base[path], changed[path]) for path in other)


def test_seeds_paths_and_layers_share_no_numbers(base):
    rows = {}
    for seed in (0, 1, 2):
        for path, leaf in params.flatten(initial(UNTIED, seed)).items():
            if params.table(UNTIED, PADDED)[path].scale:
                parts = leaf if path.startswith("layers/") else leaf[None]
                rows.update({(seed, path, layer): np.asarray(part).reshape(-1) for layer, part in enumerate(parts)})
    n = min(map(len, rows.values()))
    assert len(rows) == 3 * (2 + 5 * 2)
    correlation = np.corrcoef([row[:n] for row in rows.values()])
    assert abs(correlation - np.eye(len(rows))).max() < 5 / math.sqrt(n)


def test_the_values_are_those_of_the_table(base):
    """Standard deviations within four standard errors, and the shape of a normal distribution."""
    expected = {"embedding": 0.02}
    expected |= {f"layers/{path}": 32**-0.5 for path in ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up")}
    drawn = {**base, "head": params.flatten(initial(UNTIED))["head"]}
    for path, scale in {**expected, "head": 32**-0.5}.items():
        values = np.asarray(drawn[path]).reshape(-1) / scale
        assert abs(values.std() - 1) < 4 / math.sqrt(2 * values.size), path
        assert abs(values.mean()) < 4 / math.sqrt(values.size), path
        assert kstest(values, "norm").pvalue > 1e-4, path
    for path in ("norm", "layers/attention/norm", "layers/mlp/norm"):
        assert (base[path] == 1).all()
    for path in ("layers/attention/o", "layers/mlp/down"):
        assert (base[path] == 0).all()
    assert all(leaf.dtype == np.float32 for leaf in base.values())


GOLDEN = {  # JAX version → hash of the init of BASE with seed 0, on a processor with fused multiply-add
    "0.10": "e17c12d7cc9cf90138d5d502e2c7bdd037eb4a7bd3a7852246af712230def793",
    "0.12": "e17c12d7cc9cf90138d5d502e2c7bdd037eb4a7bd3a7852246af712230def793",
}


def test_the_init_is_fixed_for_a_version_of_jax(base):
    version = ".".join(jax.__version__.split(".")[:2])
    found = weight_hash(params.nest(base))
    if version not in GOLDEN:
        pytest.fail(
            f"JAX {version} is not known here: if the tests of the values pass, add {version!r}: {found!r} to GOLDEN, and say "
            "in the release notes whether runs of older versions can still be continued (a hash equal to another one's) or not"
        )
    assert found == GOLDEN[version], (
        f"the init of JAX {version} has changed: every run made before has another init hash. If the code of init, rng or the "
        "table was changed, undo that; if only this processor or an XLA flag differs, the numerics record says so"
    )


def test_the_values_are_fixed_for_every_version_of_jax(base):
    assert base["embedding"][0, :4] == pytest.approx([-0.0144038005, 0.0360638238, -0.0114542814, -0.00423035305], rel=1e-5)
    assert base["layers/mlp/up"][1, 31, -4:] == pytest.approx(
        [-0.1086521894, -0.1652734429, -0.0746214390, -0.2185202539], rel=1e-5
    )


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_of_shapes():
    specs = params.table(Model(width=64, layers=3, heads=4, kv_heads=2, tied=False), PADDED)
    assert {path: spec.shape for path, spec in specs.items()} == {
        "embedding": (384, 64),
        "layers/attention/norm": (3, 64),
        "layers/attention/q": (3, 64, 4, 16),
        "layers/attention/k": (3, 64, 2, 16),
        "layers/attention/v": (3, 64, 2, 16),
        "layers/attention/o": (3, 4, 16, 64),
        "layers/mlp/norm": (3, 64),
        "layers/mlp/gate": (3, 64, 192),  # 8 / 3 · 64, rounded up to a multiple of 32
        "layers/mlp/up": (3, 64, 192),
        "layers/mlp/down": (3, 192, 64),
        "norm": (64,),
        "head": (64, 384),
    }
    assert params.count(specs) == sum(leaf.size for leaf in jax.tree.leaves(params.abstract(specs)))
    assert params.dims(Model(width=64, heads=4, mlp="gelu"), 1)["F"] == 256


def test_nest_and_flatten_are_inverse():
    flat = {"a": 1, "b/c": 2, "b/d/e": 3}
    assert params.nest(flat) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert params.flatten(params.nest(dict(reversed(flat.items())))) == flat
    assert list(params.flatten(params.nest({"b": 1, "a": 2}))) == ["a", "b"]


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (Model(width=30, heads=4), "model.width 30 is no multiple of model.heads 4"),
        (Model(width=36, heads=4), "heads are 9 wide"),
        (Model(width=32, heads=4, head_width=7), "heads are 7 wide"),
        (Model(width=32, heads=4, rope_fraction=0.2), "a part of 0.2 is rotated"),
        (Model(width=36, heads=4, positions="learned"), "give model.context"),
        (Model(rope_scaling=Llama3Rope(low=4.0, high=4.0)), "model.rope_scaling.low 4.0 is not below its high 4.0"),
        (Model(width=48, heads=6, kv_heads=4), "model.heads 6 is no multiple of model.kv_heads 4"),
    ],
)
def test_widths_and_heads_must_fit(model, part):
    with pytest.raises(UserError) as caught:
        params.table(model, PADDED)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the twin ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ulps", [1, -1, 3, -7])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 2, 2), (2, 1, 2, 2)])
def test_a_twin_differs_in_one_weight_by_the_ulps(ulps, shape, base):
    devices = mesh.make(config.Mesh(*shape), jax.devices()[: math.prod(shape)])
    tree = initial(devices=devices)
    twin = initial(devices=devices, perturb=Perturb("layers/attention/q", 1234, ulps))
    flat = params.flatten(twin)
    assert_same(base, flat, except_for={"layers/attention/q"})
    before = base["layers/attention/q"].reshape(-1).view(np.int32).astype(np.int64)
    after = np.asarray(flat["layers/attention/q"]).reshape(-1).view(np.int32).astype(np.int64)
    steps = np.where(before >= 0, after - before, before - after)  # up is away from zero for positive numbers only
    assert np.flatnonzero(steps).tolist() == [1234]
    assert steps[1234] == ulps
    for leaf, original in zip(jax.tree.leaves(twin), jax.tree.leaves(tree), strict=True):
        assert leaf.sharding == original.sharding
        assert leaf.dtype == original.dtype


@pytest.mark.parametrize(
    ("perturb", "parts"),
    [
        (Perturb("layers/attention/qq"), ["perturb.parameter 'layers/attention/qq' is none of embedding, layers/"]),
        (Perturb("norm", 32), ["perturb.index 32 is outside norm, which has 32 values"]),
    ],
)
def test_a_twin_of_nothing(perturb, parts):
    shapes = {path: spec.shape for path, spec in params.table(BASE, PADDED).items()}
    for call in (lambda: initial(perturb=perturb), lambda: params.check_perturb(shapes, perturb)):
        with pytest.raises(UserError) as caught:
            call()
        assert all(part in str(caught.value) for part in parts)
        assert "\n" not in str(caught.value)
