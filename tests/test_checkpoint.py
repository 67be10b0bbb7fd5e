"""Checkpoints: bit for bit, whole or absent."""

import math

import jax
import numpy as np
import pytest

from natfp_jax import config, mesh, params
from natfp_jax.checkpoint import Checkpoints, with_shardings
from natfp_jax.config import Model
from natfp_jax.errors import UserError
from natfp_jax.lineage import weight_hash

SPECS = params.table(Model(width=16, layers=1, heads=2), 128)
RECORD = {"step": 3, "weights": "abc", "parent": None, "val_loss": 0.1 + 0.2, "numerics": {"mesh": {"data": 1}, "flags": ""}}


def laid(shape):
    devices = mesh.make(config.Mesh(*shape), jax.devices()[: math.prod(shape)])
    shardings = mesh.param_shardings(devices, SPECS)
    return params.init(SPECS, 0, shardings), with_shardings(params.abstract(SPECS), shardings)


def moments(tree):
    half = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) / 2, leaf.sharding), tree)
    return {"mu": half, "count": jax.device_put(np.int32(7), jax.devices()[0])}


def template(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


@pytest.mark.parametrize("there", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(there, tmp_path):
    tree, _ = laid((2, 2, 2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, tree, moments(tree), RECORD)
    _, abstract = laid(there)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3]
        assert checkpoints.record(3) == RECORD
        restored, nothing = checkpoints.restore(3, abstract)
        assert nothing is None
        _, optimiser = checkpoints.restore(3, abstract, template(moments(laid(there)[0])))
    assert weight_hash(restored) == weight_hash(tree)
    assert weight_hash(optimiser["mu"]) == weight_hash(moments(tree)["mu"])
    assert int(optimiser["count"]) == 7
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding


def test_an_earlier_step_can_be_added_and_changes_no_later_one(tmp_path):
    tree, abstract = laid((1, 1, 1))
    later = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) + 1, leaf.sharding), tree)
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (0, 10):
            checkpoints.save(step, later, moments(later), {**RECORD, "step": step})
        before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        checkpoints.save(5, tree, moments(tree), RECORD)
        assert checkpoints.steps() == [0, 5, 10]
        assert weight_hash(checkpoints.restore(5, abstract)[0]) == weight_hash(tree)
        assert weight_hash(checkpoints.restore(10, abstract)[0]) == weight_hash(later)
    assert {path: path.read_bytes() for path in before} == before


def test_all_steps_are_kept(tmp_path):
    tree, _ = laid((1, 1, 1))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in range(7):
            checkpoints.save(step, {"w": tree["norm"]}, {"m": tree["norm"]}, {"step": step})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == list(range(7))
        assert [checkpoints.record(step)["step"] for step in range(7)] == list(range(7))


def test_a_step_that_is_not_there(tmp_path):
    tree, abstract = laid((1, 1, 1))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, tree, moments(tree), RECORD)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(5, abstract)
    assert str(caught.value) == f"{tmp_path / 'checkpoints'} has no checkpoint at step 5, only [4]: train it first"


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path):
    """What Orbax leaves of a killed process: a folder under a temporary name."""
    tree, abstract = laid((1, 1, 1))
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(4, tree, moments(tree), RECORD)
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    (folder / "8.orbax-checkpoint-tmp" / "params").mkdir()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [4]
        checkpoints.save(8, tree, moments(tree), RECORD)
        assert checkpoints.steps() == [4, 8]
        assert weight_hash(checkpoints.restore(8, abstract)[0]) == weight_hash(tree)
