"""What devices send, against programs whose collectives follow from what is written."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from natfp_jax import config, mesh, model
from natfp_jax.blocks import BLOCK_ROWS
from natfp_jax.collectives import Collective, collectives, sent
from natfp_jax.config import Data, Experiment, Model
from natfp_jax.embedding import look_up
from natfp_jax.program import Program


def laid(shape, devices, *axes):
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(devices, PartitionSpec(*axes)))


def of(function, devices, *arrays, out=(), unknown=1):
    """The collectives of a compiled function, and what it sends by kind and axes."""
    compiled = jax.jit(function, out_shardings=NamedSharding(devices, PartitionSpec(*out))).lower(*arrays).compile()
    found = collectives(compiled.as_text(), devices.shape, unknown)
    return found, sent(found)


@pytest.fixture(scope="module")
def eight():
    return mesh.make(config.Mesh(replica=1, data=2, fsdp=4))


@pytest.mark.parametrize(("axis", "n"), [("data", 2), ("fsdp", 4)])
def test_a_sum_over_an_axis_is_an_all_reduce_along_it(eight, axis, n):
    def summed(x):
        return jax.shard_map(
            lambda part: jax.lax.psum(part, axis), mesh=eight, in_specs=PartitionSpec(axis), out_specs=PartitionSpec()
        )(x)

    found, total = of(summed, eight, laid((n * 16, 8), eight, axis))
    assert [(one.kind, one.axes, one.times) for one in found] == [("all-reduce", (axis,), 1)]
    assert total == {("all-reduce", (axis,)): 2 * (n - 1) / n * 16 * 8 * 4}


def test_a_sum_over_two_axes_names_both(eight):
    def summed(x):
        rows = PartitionSpec(("data", "fsdp"))
        return jax.shard_map(
            lambda part: jax.lax.psum(part, ("data", "fsdp")), mesh=eight, in_specs=rows, out_specs=PartitionSpec()
        )(x)

    _, total = of(summed, eight, laid((64, 8), eight, ("data", "fsdp")))
    assert total == {("all-reduce", ("data", "fsdp")): 2 * 7 / 8 * 8 * 8 * 4}


def test_what_is_gathered_in_a_scan_counts_as_often_as_the_scan_goes_round(eight):
    def layers(x, w_LDF):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        def local(x, w_LDF):
            return jax.lax.scan(layer, x, w_LDF)[0]

        return jax.shard_map(
            local,
            mesh=eight,
            in_specs=(PartitionSpec(), PartitionSpec(None, "fsdp")),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(x, w_LDF)

    found, total = of(layers, eight, laid((8, 64), eight), laid((5, 64, 64), eight, None, "fsdp"))
    assert sum(one.times for one in found) == 5
    assert total == {("all-gather", ("fsdp",)): 5 * 3 * 16 * 64 * 4}


def test_a_loop_whose_count_is_not_in_the_program_goes_round_as_often_as_is_said(eight):
    def rounds(count, x):
        def local(count, x):
            return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.psum(x, "data") / 2, x)

        spec = PartitionSpec("fsdp")
        return jax.shard_map(local, mesh=eight, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False)(count, x)

    count = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(eight, PartitionSpec()))
    _, total = of(rounds, eight, count, laid((4, 8), eight, "fsdp"), out=("fsdp",), unknown=7)
    assert total == {("all-reduce", ("data",)): 7 * 8 * 4}


def test_a_permute_sends_what_it_is_given_along_the_axis_of_its_pairs(eight):
    def moved(x):
        pairs = [(place, (place + 1) % 4) for place in range(4)]
        spec = PartitionSpec("fsdp")
        local = lambda x: jax.lax.ppermute(x, "fsdp", pairs)  # noqa: E731
        return jax.shard_map(local, mesh=eight, in_specs=spec, out_specs=spec)(x)

    _, total = of(moved, eight, laid((8, 3), eight, "fsdp"), out=("fsdp",))
    assert total == {("collective-permute", ("fsdp",)): 2 * 3 * 4}


def test_on_one_device_nothing_is_sent(one_device):
    assert of(lambda x: x.sum(), one_device, laid((8, 3), one_device)) == ([], {})


# What XLA writes for 2 x 8 TPUs, cut to what is read: groups as parts of a mesh, loops without a known count, what is
# asynchronous, and a reduce-scatter as the fusion of an all-reduce.
TPU = """
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (param.1: f32[64]) -> f32[8] {
  %param.1 = f32[64]{0:T(128)} parameter(0)
  %all-reduce.9 = f32[64]{0:T(128)} all-reduce(%param.1), replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %dynamic-slice.1 = f32[8]{0:T(128)} dynamic-slice(%all-reduce.9, %c), dynamic_slice_sizes={8}
}

%fused_computation.1 (param.2: bf16[1,96]) -> bf16[8,96] {
  %param.2 = bf16[1,96]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,96]{1,0} all-gather(%param.2), channel_id=5, replica_groups=mesh['a'=2,'b'=8] {'b'}
}

%async_collective_fusion.2 (param.3: bf16[1,96]) -> bf16[8,96] {
  %param.3 = bf16[1,96]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,96]{1,0} all-gather(%param.3), channel_id=5, replica_groups=mesh['a'=2,'b'=8] {'b'}
}

%cond.1 (wide.param: (s32[], bf16[4,2])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(12), metadata={op_name="jit(step)"}
  %wide.param = (s32[]{:T(128)}, bf16[4,2]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.3), direction=LT
}

%body.1 (wide.param.1: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %wide.param.1 = (s32[]{:T(128)}, /*index=1*/bf16[4,2]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[4,2]{1,0} get-tuple-element(%wide.param.1), index=1
  %start.1 = (bf16[4,2], bf16[4,2], u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,8},{8,0}}
  %collective-permute-done.1 = bf16[4,2]{1,0} collective-permute-done(%start.1)
  ROOT %tuple = (s32[], bf16[4,2]) tuple(%i, %collective-permute-done.1)
}

ENTRY %main (p: f32[64], q: bf16[1,96], r: (s32[], bf16[4,2])) -> f32[8] {
  %p = f32[64]{0:T(128)} parameter(0)
  %q = bf16[1,96]{1,0} parameter(1)
  %r = (s32[], bf16[4,2]) parameter(2)
  %while.1 = (s32[], bf16[4,2]) while(%r), condition=%cond.1, body=%body.1
  %fusion.1 = bf16[8,96]{1,0} fusion(%q), kind=kLoop, calls=%fused_computation.1
  %fusion.2 = bf16[8,96]{1,0} fusion(%q), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %fusion.3 = f32[8]{0:T(128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_what_a_tpu_compiler_writes_is_read():
    shape = {"replica": 2, "data": 1, "fsdp": 8, "tensor": 1}
    assert set(collectives(TPU, shape)) == {
        Collective("collective-permute", ("replica",), 4 * 2 * 2, 12),
        Collective("all-gather", ("fsdp",), 7 * 96 * 2, 1),
        Collective("reduce-scatter", ("fsdp",), 7 / 8 * 64 * 4, 1),
    }
    assert sum(sent(collectives(TPU, shape)).values()) == 12 * 16 + 7 * 96 * 2 + 224


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['a'=2,'b'=8] {'a'}", ("replica",)),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}", ("fsdp",)),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", ("replica",)),
        ("mesh['a'=2,'b'=8] {'a','b'}", ("replica", "fsdp")),
        ("[8,2]<=[2,8]T(1,0)", ("replica",)),
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("replica",)),
        ("{}", ("replica", "fsdp")),
    ],
)
def test_groups_are_read_however_they_are_written(groups, axes):
    text = TPU.replace("[2,8]<=[16]", groups)
    found = collectives(text, {"replica": 2, "data": 1, "fsdp": 8, "tensor": 1})
    assert [one.axes for one in found if one.kind == "reduce-scatter"] == [axes]


def test_groups_that_cannot_be_read_are_told_of_and_not_left_out():
    text = TPU.replace("[2,8]<=[16]", "somehow")
    with pytest.raises(ValueError, match=r"all-reduce.9"):
        collectives(text, {"replica": 2, "data": 1, "fsdp": 8, "tensor": 1})


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"replica": 2, "data": 2, "fsdp": 2}])
@pytest.mark.parametrize("products", [True, False])
def test_a_step_adds_gradients_over_devices_once_however_many_blocks_a_batch_has(axes, products, monkeypatch):
    monkeypatch.setattr(model, "look_up", partial(look_up, products=products))
    devices = mesh.make(config.Mesh(**axes))
    shape = Experiment(model=Model(width=32, layers=1, heads=4), data=Data(seq_len=1024, windows=64, batch=16))
    made = Program(shape, 300, 384, devices.shape["replica"], devices, 1, "none", "fast")
    assert 16 / devices.size * 1024 > BLOCK_ROWS, "a device has several blocks"
    found = [one for one in collectives(made.compiled.as_text(), devices.shape) if one.kind == "all-reduce"]
    assert {one.times for one in found} == {1}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made.one.params))
    of_embedding = made.one.params["embedding"].size  # its gradient is that of looking up and that of the head
    n = devices.size // devices.shape["replica"]
    assert sum(one.bytes for one in found) <= 2 * (n - 1) / n * 4 * (parameters + of_embedding) * 1.01
