"""Devices, axes, and what is laid over them."""

import math

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


def made(replica, data, fsdp, tensor, devices=8):
    return mesh.make(config.Mesh(replica, data, fsdp, tensor), jax.devices()[:devices])


@pytest.mark.parametrize(
    ("asked", "devices", "sizes"),
    [
        ((1, 0, 1, 1), 8, (1, 8, 1, 1)),
        ((1, 0, 2, 2), 8, (1, 2, 2, 2)),
        ((1, 1, 1, 1), 1, (1, 1, 1, 1)),
        ((1, 1, 4, 2), 8, (1, 1, 4, 2)),
        ((1, 0, 3, 1), 6, (1, 2, 3, 1)),
        ((2, 0, 1, 1), 8, (2, 4, 1, 1)),
        ((2, 0, 2, 2), 8, (2, 1, 2, 2)),
        ((8, 0, 1, 1), 8, (8, 1, 1, 1)),
    ],
)
def test_data_takes_what_the_other_axes_leave(asked, devices, sizes):
    made_mesh = made(*asked, devices)
    assert tuple(made_mesh.shape[axis] for axis in mesh.AXES) == sizes
    assert made_mesh.axis_names == mesh.AXES == ("replica", "data", "fsdp", "tensor")
    assert made_mesh.devices.reshape(-1).tolist() == jax.devices()[:devices]
    assert set(made_mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "asked", [(1, 3, 1, 1), (1, 0, 3, 1), (1, 2, 2, 1), (1, 0, 16, 1), (1, 8, 2, 1), (3, 0, 1, 1), (2, 8, 1, 1)]
)
def test_axes_that_do_not_multiply_to_the_devices(asked):
    replica, data, fsdp, tensor = asked
    expected = (
        f"run.mesh replica {replica} x data {data or 'rest'} x fsdp {fsdp} x tensor {tensor} "
        "does not multiply to the 8 devices at hand"
    )
    assert refused(made, *asked) == expected


def test_a_batch_divides_over_the_axes_that_hold_rows():
    for batch in (4, 8):
        mesh.check_batch("batch", batch, made(1, 2, 2, 2))
    message = refused(mesh.check_batch, "experiment.data.batch", 6, made(1, 2, 2, 2))
    assert message == "experiment.data.batch 6 does not divide over data 2 x fsdp 2 = 4 devices"


def test_replicas_share_a_batch_of_training_and_divide_texts():
    devices = made(2, 2, 2, 1)
    mesh.check_batch("experiment.data.batch", 4, devices)
    assert mesh.text_ways(devices) == 8
    assert mesh.text_ways(made(1, 2, 2, 2)) == mesh.text_ways(made(4, 1, 1, 2)) == 4


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1, 8), "parameter layers/attention/q: N = 4 does not divide over mesh.tensor = 8"),
        ((1, 2, 1, 4), "parameter layers/attention/k: K = 2 does not divide over mesh.tensor = 4"),
    ],
)
def test_a_dimension_that_does_not_divide(shape, message):
    assert refused(mesh.check_params, SPECS, made(*shape)) == message
    mesh.check_params(SPECS, made(1, 1, 4, 2))
    odd = params.table(Model(width=36, heads=2), 384)
    assert refused(mesh.check_params, odd, made(1, 1, 8, 1)) == "parameter embedding: D = 36 does not divide over mesh.fsdp = 8"


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
    found = params.flatten(mesh.param_shardings(made(1, 2, 2, 2), SPECS))
    assert {path: sharding.spec for path, sharding in found.items()} == {p: PartitionSpec(*s) for p, s in expected.items()}


SHAPES = [(1, 8, 1, 1), (1, 2, 2, 2), (1, 1, 8, 1), (1, 4, 1, 2), (1, 1, 1, 8), (2, 2, 2, 1), (8, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_the_same_on_every_mesh(shape):
    """Of training, [replica, row, token]; of texts, [row, token]."""
    devices = made(*shape)
    replica, data, fsdp, _ = shape
    batch, texts = (np.arange(math.prod(of), dtype=np.int32).reshape(of) for of in ((8, 8, 5), (8, 5)))
    cuts = [
        (batch, mesh.batch_sharding(devices), (8 // replica, 8 // (data * fsdp), 5)),
        (texts, mesh.text_sharding(devices), (8 // (replica * data * fsdp), 5)),
    ]
    for rows, sharding, part in cuts:
        laid = mesh.lay(rows, sharding)
        np.testing.assert_array_equal(laid, rows)
        assert {shard.data.shape for shard in laid.addressable_shards} == {part}
        for shard in laid.addressable_shards:
            np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert len(mesh.lay(texts, mesh.replicated(devices)).sharding.device_set) == 8


@pytest.mark.parametrize("shape", SHAPES)
def test_an_activation_lies_as_its_letters_say(shape):
    devices = made(*shape)
    array = jax.numpy.arange(8 * 3 * 8 * 2.0).reshape(8, 3, 8, 2)
    laid = jax.jit(lambda x: mesh.constrain(x, "BTNH", devices))(array)
    np.testing.assert_array_equal(laid, array)
    _, data, fsdp, tensor = shape
    assert {shard.data.shape for shard in laid.addressable_shards} == {(8 // (data * fsdp), 3, 8 // tensor, 2)}


def test_an_activation_without_a_mesh_or_on_one_device_is_left_alone():
    array = jax.numpy.ones((2, 3))
    assert mesh.constrain(array, "BT", None) is array
    assert mesh.constrain(array, "BT", made(1, 1, 1, 1, devices=1)) is array
