"""Devices, axes, and what is laid over them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from natfp_jax import config, mesh, params
from natfp_jax.config import Model
from natfp_jax.errors import UserError

SPECS = params.table(Model(width=32, layers=2, heads=4, kv_heads=2, tied=False), 384)


def refused(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(data, fsdp, tensor, devices=8):
    return mesh.make(config.Mesh(data, fsdp, tensor), jax.devices()[:devices])


@pytest.mark.parametrize(
    ("asked", "devices", "sizes"),
    [
        ((0, 1, 1), 8, (8, 1, 1)),
        ((0, 2, 2), 8, (2, 2, 2)),
        ((1, 1, 1), 1, (1, 1, 1)),
        ((1, 4, 2), 8, (1, 4, 2)),
        ((0, 3, 1), 6, (2, 3, 1)),
    ],
)
def test_data_takes_what_the_other_axes_leave(asked, devices, sizes):
    made_mesh = made(*asked, devices)
    assert tuple(made_mesh.shape[axis] for axis in mesh.AXES) == sizes
    assert made_mesh.devices.reshape(-1).tolist() == jax.devices()[:devices]
    assert set(made_mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("asked", [(3, 1, 1), (0, 3, 1), (2, 2, 1), (0, 16, 1), (8, 2, 1)])
def test_axes_that_do_not_multiply_to_the_devices(asked):
    data, fsdp, tensor = asked
    expected = f"run.mesh data {data or 'rest'} x fsdp {fsdp} x tensor {tensor} does not multiply to the 8 devices at hand"
    assert refused(made, *asked) == expected


def test_a_batch_divides_over_the_axes_that_hold_rows():
    for batch in (4, 8):
        mesh.check_batch("batch", batch, made(2, 2, 2))
    message = refused(mesh.check_batch, "experiment.data.batch", 6, made(2, 2, 2))
    assert message == "experiment.data.batch 6 does not divide over data 2 x fsdp 2 = 4 devices"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8), "parameter layers/attention/q: N = 4 does not divide over mesh.tensor = 8"),
        ((2, 1, 4), "parameter layers/attention/k: K = 2 does not divide over mesh.tensor = 4"),
    ],
)
def test_a_dimension_that_does_not_divide(shape, message):
    assert refused(mesh.check_params, SPECS, made(*shape)) == message
    mesh.check_params(SPECS, made(1, 4, 2))
    odd = params.table(Model(width=36, heads=2), 384)
    assert refused(mesh.check_params, odd, made(1, 8, 1)) == "parameter embedding: D = 36 does not divide over mesh.fsdp = 8"


def test_every_parameter_lies_as_its_letters_say():
    expected = {
        "embedding": ("tensor", "fsdp"),
        "layers/attention/norm": (None, "fsdp"),
        "layers/attention/q": (None, "fsdp", "tensor", None),
        "layers/attention/k": (None, "fsdp", "tensor", None),
        "layers/attention/v": (None, "fsdp", "tensor", None),
        "layers/attention/o": (None, "tensor", None, "fsdp"),
        "layers/mlp/norm": (None, "fsdp"),
        "layers/mlp/gate": (None, "fsdp", "tensor"),
        "layers/mlp/up": (None, "fsdp", "tensor"),
        "layers/mlp/down": (None, "tensor", "fsdp"),
        "norm": ("fsdp",),
        "head": ("fsdp", "tensor"),
    }
    found = params.flatten(mesh.param_shardings(made(2, 2, 2), SPECS))
    assert {path: sharding.spec for path, sharding in found.items()} == {p: PartitionSpec(*s) for p, s in expected.items()}


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2), (1, 1, 8)])
def test_a_batch_is_the_same_on_every_mesh(shape):
    rows = np.arange(8 * 5, dtype=np.int32).reshape(8, 5)
    devices = made(*shape)
    laid = jax.device_put(rows, mesh.batch_sharding(devices))
    np.testing.assert_array_equal(laid, rows)
    here = 8 // (shape[0] * shape[1])
    assert {shard.data.shape for shard in laid.addressable_shards} == {(here, 5)}
    for shard in laid.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert len(jax.device_put(rows, mesh.replicated(devices)).sharding.device_set) == 8
