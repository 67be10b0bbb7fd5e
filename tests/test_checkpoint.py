"""Checkpoints: bit for bit, whole or absent, and what was written."""

import errno
import math
import shutil

import jax
import numpy as np
import pytest

from natfp_jax import checkpoint, config, files, mesh, params
from natfp_jax.checkpoint import Checkpoints, with_shardings
from natfp_jax.config import Model
from natfp_jax.errors import Damaged, UserError
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


def saved(folder, *steps, keep=None):
    """Saves the same state at each step; returns it and its template."""
    tree, abstract = laid((1, 1, 1, 1))
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree, moments(tree), {**RECORD, "step": step})
    return tree, abstract


def damaged(call, *args):
    with pytest.raises(Damaged) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == f"{caught.value.path} {caught.value.why}"
    return caught.value


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("there", [(1, 1, 1, 1), (1, 8, 1, 1), (1, 1, 4, 2), (8, 1, 1, 1), (2, 1, 2, 2)])
def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(there, tmp_path):
    tree, _ = laid((1, 2, 2, 2))
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, tree, moments(tree), RECORD)
    _, abstract = laid(there)
    assert checkpoint.steps(folder) == [3]
    assert checkpoint.record(folder, 3) == RECORD
    checkpoint.verify(folder, 3)
    restored, nothing = checkpoint.restore(folder, 3, abstract)
    assert nothing is None
    _, optimiser = checkpoint.restore(folder, 3, abstract, template(moments(laid(there)[0])))
    assert weight_hash(restored) == weight_hash(tree)
    assert weight_hash(optimiser["mu"]) == weight_hash(moments(tree)["mu"])
    assert int(optimiser["count"]) == 7
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding


def test_an_earlier_step_can_be_added_and_changes_no_later_one(tmp_path):
    tree, abstract = laid((1, 1, 1, 1))
    later = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) + 1, leaf.sharding), tree)
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (0, 10):
            checkpoints.save(step, later, moments(later), {**RECORD, "step": step})
        checkpoints.settle(wait=True)
        before = contents(folder)
        checkpoints.save(5, tree, moments(tree), {**RECORD, "step": 5})
    assert checkpoint.steps(folder) == [0, 5, 10]
    assert weight_hash(checkpoint.restore(folder, 5, abstract)[0]) == weight_hash(tree)
    assert weight_hash(checkpoint.restore(folder, 10, abstract)[0]) == weight_hash(later)
    assert {path: path.read_bytes() for path in before} == before


def test_all_steps_are_kept(tmp_path):
    tree, _ = laid((1, 1, 1, 1))
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in range(7):
            checkpoints.save(step, {"w": tree["norm"]}, {"m": tree["norm"]}, {"step": step})
    assert checkpoint.steps(folder) == list(range(7))
    assert [checkpoint.record(folder, step)["step"] for step in range(7)] == list(range(7))


def test_of_the_disposable_ones_the_last_are_kept(tmp_path):
    folder = tmp_path / "restart"
    tree, abstract = saved(folder, *range(5), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]
    assert checkpoint.steps(folder) == [3, 4]
    for step in (3, 4):
        checkpoint.verify(folder, step)
        assert weight_hash(checkpoint.restore(folder, step, abstract)[0]) == weight_hash(tree)


def test_no_folder_has_no_steps(tmp_path):
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_a_step_that_is_not_there(tmp_path):
    folder = tmp_path / "checkpoints"
    _, abstract = saved(folder, 4)
    with pytest.raises(UserError) as caught:
        checkpoint.restore(folder, 5, abstract)
    assert str(caught.value) == f"{folder} has no checkpoint at step 5, only [4]: train it first"


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path):
    """What Orbax leaves of a killed process: a folder under a temporary name."""
    folder = tmp_path / "checkpoints"
    saved(folder, 4)
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    (folder / "8.orbax-checkpoint-tmp" / "params").mkdir()
    assert checkpoint.steps(folder) == [4]
    tree, abstract = saved(folder, 8)
    assert checkpoint.steps(folder) == [4, 8]
    checkpoint.verify(folder, 8)
    assert weight_hash(checkpoint.restore(folder, 8, abstract)[0]) == weight_hash(tree)


# --- saving goes on beside training -----------------------------------------------------------------------------------


def test_a_saved_state_is_the_one_that_was_given_whatever_becomes_of_it(tmp_path):
    """Training gives the old state up to the next step as soon as `save` has returned."""
    tree, abstract = laid((1, 1, 1, 1))
    before, folder = weight_hash(tree), tmp_path / "checkpoints"
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 3, tree), donate_argnums=0)
    with Checkpoints(folder) as checkpoints:
        state = moments(tree)
        half = weight_hash(state["mu"])
        checkpoints.save(3, tree, state, RECORD)
        jax.block_until_ready((spoil(tree), spoil(state["mu"])))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
    restored, optimiser = checkpoint.restore(folder, 3, abstract, template(moments(laid((1, 1, 1, 1))[0])))
    assert weight_hash(restored) == before
    assert weight_hash(optimiser["mu"]) == half


def test_a_step_counts_once_it_is_sealed(tmp_path):
    folder = tmp_path / "checkpoints"
    tree, _ = laid((1, 1, 1, 1))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, tree, moments(tree), RECORD)
        assert not (folder / "3" / files.MANIFEST).exists()
        checkpoints.settle(wait=True)
        checkpoint.verify(folder, 3)
        first = contents(folder)
        checkpoints.settle(wait=True)  # nothing is left to be done
        assert contents(folder) == first


@pytest.mark.parametrize(("error", "sealed"), [(ValueError, True), (KeyboardInterrupt, False)])
def test_what_was_saved_before_an_error_counts_and_before_a_kill_is_damaged(error, sealed, tmp_path):
    folder = tmp_path / "checkpoints"
    tree, _ = laid((1, 1, 1, 1))

    def failing():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(3, tree, moments(tree), RECORD)
            checkpoints._manager.wait_until_finished()  # Orbax has committed, nobody has hashed
            raise error

    with pytest.raises(error):
        failing()
    if sealed:
        assert checkpoint.steps(folder) == [3]
        checkpoint.verify(folder, 3)
    else:
        found = damaged(checkpoint.steps, folder)
        assert found.path == folder / "3"
        assert found.why == "has no manifest.json: the process was stopped while it saved this step"


def test_a_failure_to_seal_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    tree, _ = laid((1, 1, 1, 1))

    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    def failing(step, settled):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(step, tree, moments(tree), {**RECORD, "step": step})
            if settled:
                checkpoints.settle(wait=True)
                pytest.fail("it was told too late")

    monkeypatch.setattr(files, "write_json", full)
    for step, settled in ((3, True), (4, False)):
        with pytest.raises(OSError, match="no room"):
            failing(step, settled)
    assert not list(folder.glob("*/manifest.json"))


def test_no_room_is_found_out_before_anything_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    tree, _ = saved(folder, 3)
    before = contents(folder)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves((tree, moments(tree))))
    usage = shutil.disk_usage(tmp_path)
    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        with pytest.raises(
            UserError, match=f"No space left on device: what is saved takes {needed} bytes, {needed - 1} are free"
        ):
            checkpoints.save(4, tree, moments(tree), {**RECORD, "step": 4})
        assert contents(folder) == before
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        checkpoints.save(4, tree, moments(tree), {**RECORD, "step": 4})
    assert checkpoint.steps(folder) == [3, 4]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_any_changed_byte_of_any_file_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, 3)
    found = [path for path in contents(folder / "3") if path.name != files.MANIFEST]
    assert len(found) > 5
    for path in found:
        original = path.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1} if original else set():
            spoilt = bytearray(original)
            spoilt[place] ^= 1
            path.write_bytes(spoilt)
            damage = damaged(checkpoint.verify, folder, 3)
            assert damage.path == folder / "3"
            assert f"is damaged: {path.relative_to(folder / '3')} has sha256 " in damage.why
        for other, got in ((original + b"x", f"has {len(original) + 1} bytes"), (None, "is missing")):
            path.unlink() if other is None else path.write_bytes(other)
            expected = f"is damaged: {path.relative_to(folder / '3')} {got}, expected {len(original)} bytes"
            assert damaged(checkpoint.verify, folder, 3).why == expected
        path.write_bytes(original)
        checkpoint.verify(folder, 3)
    (folder / "3" / "other").write_text("")
    assert damaged(checkpoint.verify, folder, 3).why == "is damaged: other is not in its manifest"


def test_one_item_can_be_checked_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, 3)
    path = max((folder / "3" / "optimiser").rglob("*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    checkpoint.verify(folder, 3, "params")
    assert "is damaged: optimiser/" in damaged(checkpoint.verify, folder, 3).why
    path = max((folder / "3" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged: params/" in damaged(checkpoint.verify, folder, 3, "params").why


def test_any_changed_byte_of_the_manifest_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, 3)
    path = folder / "3" / files.MANIFEST
    original = path.read_bytes()
    for place in range(len(original)):
        spoilt = bytearray(original)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        for call in (checkpoint.record, checkpoint.verify):
            damage = damaged(call, folder, 3)
            assert damage.path == folder / "3"
            assert damage.why.startswith("is damaged: its manifest.json is ")


def test_a_step_under_the_name_of_another_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, 3)
    (folder / "3").rename(folder / "4")
    for call in (checkpoint.record, checkpoint.verify):
        assert damaged(call, folder, 4).why == "holds step 3"


def test_what_orbax_cannot_read_is_damaged(tmp_path):
    folder = tmp_path / "checkpoints"
    _, abstract = saved(folder, 3)
    shutil.rmtree(folder / "3" / "params")
    damage = damaged(checkpoint.restore, folder, 3, abstract)
    assert damage.path == folder / "3"
    assert damage.why.startswith("cannot be restored (")
