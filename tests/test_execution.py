"""How a run is carried out: what less memory may change, what a signal saves, and what becomes of numbers that go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natfp_jax import checkpoint, config, mesh, params, program, train
from natfp_jax.config import Run, replace
from natfp_jax.errors import Damaged, Stopped, UserError
from natfp_jax.files import set_aside
from natfp_jax.runs import metrics
from natfp_jax.stopping import Stop
from natfp_jax.train import load_params

# --- less memory ------------------------------------------------------------------------------------------------------


def test_on_many_devices_too(tiny, tiny_store, one_device, tiny_run, train_arm, tmp_path):
    devices = mesh.make(config.Mesh(1, 2, 2, 2), jax.devices())
    run = train_arm(tiny, tmp_path / "run", devices=devices, microbatches=2, remat="full", checkpoints=(0.25,))
    assert run.record(16)["init_hash"] == tiny_run.record(16)["init_hash"]
    assert run.record(16)["order_hash"] == tiny_run.record(16)["order_hash"]
    ours = params.flatten(load_params(run, 4, tiny, tiny_store, one_device))
    for path, leaf in params.flatten(load_params(tiny_run, 4, tiny, tiny_store, one_device)).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-4, err_msg=path)


def test_remat_keeps_less(tiny, tiny_store, one_device):
    """The memory that the compiled step asks for while it runs."""
    wide = replace(replace(tiny, "model.layers", 4), "data.batch", 32)

    def taken(remat):
        compiled = train.program_of(wide, tiny_store, one_device, Run(remat=remat))
        return compiled.device_bytes

    full, dots, none = taken("full"), taken("dots"), taken("none")
    assert full < dots < none


def test_an_arm_with_copies_of_itself_starts_alike_and_is_fed_alike(
    tiny, tiny_run, tiny_store, one_device, train_arm, tmp_path
):
    pair = train_arm(tiny, tmp_path / "pair", devices=mesh.make(config.Mesh(2, 2, 2, 1), jax.devices()), checkpoints=(0.25,))
    for name in ("init_hash", "order_hash"):
        assert pair.record(16)[name] == tiny_run.record(16)[name]
    ours = params.flatten(load_params(pair, 4, tiny, tiny_store, one_device))
    for path, leaf in params.flatten(load_params(tiny_run, 4, tiny, tiny_store, one_device)).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-4, err_msg=path)


# --- signals and restart states ---------------------------------------------------------------------------------------


def stopped_after(step, tiny, train_arm, folder, **settings):
    """Asks for a stop after so many steps."""
    stop, done = Stop(), []

    def advance(steps):
        done.append(steps)
        stop.requested = stop.requested or sum(done) >= step

    with pytest.raises(Stopped) as caught:
        train_arm(tiny, folder, advance=advance, stop=stop, **settings)
    assert "the same command goes on from here" in str(caught.value)


def test_restart_states_are_saved_by_the_clock_and_old_ones_removed(tiny, tiny_run, train_arm, tmp_path):
    seen = []

    def look(_):
        states = (tmp_path / "run" / "restart").glob("*/[0-9]*")
        seen.append([path.name for path in states if (path / "manifest.json").exists()])

    run = train_arm(tiny, tmp_path / "run", checkpoints=(0.25, 0.5), save_minutes=1e-9, restarts=2, advance=look)
    assert run.records() == tiny_run.records()
    assert max(map(len, seen)) in (2, 3)  # the one before the last two goes once the last one is whole
    assert not list((run.folder / "restart").iterdir())


@pytest.mark.parametrize("damage", ["flip", "manifest", "all"])
def test_a_damaged_restart_state_is_named_and_the_one_before_it_used(damage, tiny, tiny_run, train_arm, tmp_path):
    stopped_after(5, tiny, train_arm, tmp_path / "run", checkpoints=(0.5,), save_minutes=1e-9)
    (folder,) = (tmp_path / "run" / "restart").iterdir()
    steps = checkpoint.steps(folder)
    assert len(steps) == 2
    for step in steps if damage == "all" else steps[-1:]:
        if damage == "manifest":
            (folder / str(step) / "manifest.json").unlink()
        else:
            path = max((folder / str(step) / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    aside, done = [], []
    while True:
        done.clear()
        try:
            run = train_arm(tiny, tmp_path / "run", checkpoints=(0.5,), advance=done.append)
            break
        except Damaged as caught:
            aside.append(int(caught.path.name))
            set_aside(caught.path)
    assert aside == (steps[::-1] if damage == "all" else steps[-1:])
    assert done[0] == (0 if damage == "all" else steps[0])
    assert run.record(8)["weights"] == tiny_run.record(8)["weights"]
    assert run.record(16)["weights"] == tiny_run.record(16)["weights"]


# --- numbers that go wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tiny_store, tiny, monkeypatch):
    """The windows fed at the given steps give a loss that is no number, whatever the weights."""

    def at(*steps):
        rows = tiny_store.windows(32, 64).rows(np.concatenate([train.Order(64, 8, 0).rows(step)[:1] for step in steps]))
        real = program.blocked_cross_entropy

        def loss(x_BTD, w_DV, target_BT, vocabulary, weight_BT, devices):
            bad = jnp.zeros((), bool)
            for row in rows:
                bad |= (target_BT == row[1:]).all(axis=1).any()
            return jnp.where(bad, jnp.nan, 1.0) * real(x_BTD, w_DV, target_BT, vocabulary, weight_BT, devices)

        monkeypatch.setattr(program, "blocked_cross_entropy", loss)
        program._program.cache_clear()

    yield at
    program._program.cache_clear()


def test_skipped_steps_are_recorded_and_leave_the_state_as_it_was(poisoned, tiny, tiny_store, one_device, train_arm, tmp_path):
    skipping = replace(tiny, "optimiser.nonfinite", "skip")
    poisoned(3)  # and in the second epoch, where the same window comes again
    run = train_arm(skipping, tmp_path / "run", checkpoints=(0.1875, 0.25))
    last = run.record(16)
    assert run.record(3)["skipped"] == []
    assert run.record(4)["skipped"] == [4]
    assert last["skipped"][0] == 4
    assert len(last["skipped"]) == 2
    assert last["skipped"][1] > 8
    assert run.record(4)["weights"] == run.record(3)["weights"]
    assert len({record["weights"] for record in run.records()}) == 3
    lines, _ = metrics(run.metrics)
    assert [line for line in lines if line["step"] == 4 and "loss" in line] == []  # nothing is logged that is no number


def test_too_many_skipped_steps_in_a_row_stop(poisoned, tiny, train_arm, tmp_path):
    poisoned(*range(16))
    with pytest.raises(UserError, match="loss nan at step 10, after 10 skipped steps, last good checkpoint 0 in"):
        train_arm(replace(tiny, "optimiser.nonfinite", "skip"), tmp_path / "run")
