"""Counted products against counts by hand and the formula of model FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natfp_jax import config, flops, mesh, platforms
from natfp_jax.config import Data, Experiment, Model, Run
from natfp_jax.program import program_for
from natfp_jax.roofline import Rates, operations, products, time_of
from natfp_jax.sample import programs_of
from natfp_jax.training_cost import training

ONE = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
VOCABULARY = 384


def counted(function, *arrays, rows=None, **more):
    found = jax.jit(function).trace(*arrays).jaxpr
    return products(found, rows or [True] * len(found.jaxpr.invars), more.pop("mesh", ONE), **more)


def array(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_is_two_operations_a_pair_and_moves_its_three_arrays():
    (found,) = counted(jnp.matmul, array(3, 5), array(5, 7), rows=[True, False])
    assert found.flops == found.all_flops == 2 * 3 * 5 * 7
    assert found.bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert (found.times, found.format) == (1, "f32")


def test_loops_multiply_and_of_branches_the_costliest_counts():
    def function(n, x, w):
        def layer(x, _):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ w, x), None

        x, _ = jax.lax.scan(layer, x, None, length=3)
        return jax.lax.cond(n > 1, lambda: x @ w, lambda: (x @ w) @ w)

    found = counted(function, array(dtype=np.int32), array(4, 4), array(4, 4), loops=5)
    assert operations(found) == (3 * 5 + 2) * 2 * 4**3


def test_what_is_computed_again_counts_again():
    def loss(x, w, again):
        block = lambda x: jnp.tanh(x @ w)  # noqa: E731
        return (jax.checkpoint(block) if again else block)(x).sum()

    once, twice = (
        operations(counted(lambda x, w, again=again: jax.grad(loss, (0, 1))(x, w, again), array(4, 4), array(4, 4)))
        for again in (False, True)
    )
    assert (once, twice) == (3 * 2 * 4**3, 4 * 2 * 4**3)


def test_rows_are_cut_over_the_devices_and_weights_are_read_whole_by_each():
    shape = {"replica": 1, "data": 2, "fsdp": 4, "tensor": 1}
    (found,) = counted(jnp.matmul, array(16, 5), array(5, 7), rows=[True, False], mesh=shape)
    assert found.flops == 2 * 16 * 5 * 7 / 8
    assert found.all_flops == 2 * 16 * 5 * 7
    assert found.bytes == 4 * (16 * 5 / 8 + 5 * 7 + 16 * 7 / 8)

    def gradient(x, w):
        return jax.grad(lambda w: jnp.tanh(x @ w).sum())(w)

    forward, backward = counted(gradient, array(16, 5), array(5, 7), rows=[True, False], mesh=shape)
    assert forward.bytes == found.bytes
    assert backward.bytes == 4 * (16 * 5 / 8 + 16 * 7 / 8 + 5 * 7), "the gradient of a weight is as large as the weight"


def test_each_product_is_bounded_by_the_unit_or_by_the_memory():
    found = counted(lambda x, w, y: (x @ w, y @ y), array(1, 64), array(64, 64), array(64, 64))
    rates = Rates(bf16=1.0, f32=2.0, exact=1.0, bandwidth=1.0)
    vector, square = 2 * 64 * 64 / 2, 2 * 64**3 / 2
    moved = 4 * (64 + 64 * 64 + 64)
    assert moved > vector
    assert time_of(found, rates) == (square, moved)
    (exact,) = counted(lambda x: jnp.matmul(x, x, precision="highest"), array(4, 4))
    (half,) = counted(jnp.matmul, array(4, 4, dtype=jnp.bfloat16), array(4, 4, dtype=jnp.bfloat16))
    assert (exact.format, half.format) == ("exact", "bf16")


# --- a step of training -------------------------------------------------------------------------------------------------

EXPERIMENT = Experiment(model=Model(width=64, layers=3, heads=4, kv_heads=2), data=Data(seq_len=32, windows=64, batch=16))


def step(platform, replicas=1, experiment=EXPERIMENT, over=None, **settings):
    return operations(counted_step(platform, replicas, experiment, over, **settings))


def counted_step(platform, replicas=1, experiment=EXPERIMENT, over=None, **settings):
    devices = mesh.make(over or config.Mesh(data=1), jax.devices()[: 8 if over else 1])
    with platforms.planned(platform):
        made = program_for(experiment, VOCABULARY, VOCABULARY, devices, Run(**settings), replicas).traced
    rows = [value.aval.shape[1:] == (16, 33) for value in made.jaxpr.jaxpr.invars]
    return products(made.jaxpr, rows, devices.shape, -(-replicas // devices.shape["replica"]))


MODEL = flops.per_token(EXPERIMENT.model, VOCABULARY, 32) * 16 * 32
ATTENTION = 6 * 3 * 64 * 32 * 16 * 32  # the half that is masked is computed too
LOOKED_UP = 2 * VOCABULARY * 64 * 16 * 32  # an accelerator's gradient of the embedding, by products with one-hot rows


def test_a_step_has_the_operations_of_the_formula_and_what_is_masked():
    assert step("tpu") == MODEL + ATTENTION + LOOKED_UP


@pytest.mark.parametrize("execution", ["strict", "fast"])
@pytest.mark.parametrize("over", [None, config.Mesh(replica=2, fsdp=4), config.Mesh(replica=2, fsdp=2, tensor=2)])
def test_a_cohort_has_the_operations_of_its_arms_whatever_the_mesh_and_execution(execution, over):
    assert step("tpu", 4, over=over, execution=execution) == 4 * step("tpu")


@pytest.mark.parametrize("over", [config.Mesh(fsdp=8), config.Mesh(replica=2, data=4)])
def test_a_device_moves_as_much_whether_its_replica_is_in_a_loop_or_not(over):
    replicas = over.replica  # one of each device
    strict, fast = (
        sum(one.bytes * one.times for one in counted_step("tpu", replicas, over=over, execution=execution))
        for execution in ("strict", "fast")
    )
    assert strict == fast


def test_parts_of_a_batch_have_the_operations_of_the_whole():
    assert step("tpu", microbatches=4) == step("tpu")


def test_remat_computes_the_layers_again():
    layers = 2 * 16 * 32 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)  # forward
    scores = 4 * ATTENTION / 6  # the two products of attention, masked and not
    full, dots = step("tpu", remat="full"), step("tpu", remat="dots")
    assert full > dots > step("tpu")
    assert dots - step("tpu") == scores, "attention alone has batch dimensions"
    down = 2 * 16 * 32 * 3 * 64 * 192
    assert full - step("tpu") == pytest.approx(layers + scores - down, rel=0.02), "the last product of a block is not needed"


def test_a_device_of_a_sampler_reads_weights_and_cache_for_every_token():
    model = Model(width=64, layers=2, heads=4)
    for over in (config.Mesh(data=1), config.Mesh(replica=2, data=4)):
        devices = mesh.make(over, jax.devices()[: 8 if over.replica > 1 else 1])
        made = programs_of(model, (), VOCABULARY, VOCABULARY, 0, 4, devices)
        traced = made.traced_turn(16, 32, 16)
        weights, *rest = jax.tree.map(lambda _: True, traced.in_avals[0])
        rows = [False] * len(jax.tree.leaves(weights)) + [True] * len(jax.tree.leaves(rest))
        found = products(traced.jaxpr, rows, devices.shape)
        matrices = VOCABULARY * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192)
        cache = 2 * 2 * 4 * 48 * 64  # keys and values, layers, rows
        least = 4 * (matrices + cache)
        assert least < sum(one.bytes * one.times for one in found) < 1.2 * least
        assert sum(one.flops for one in found) == 2 * 4 * matrices + 2 * 2 * 4 * 48 * 64 * 2


def test_what_is_planned_as_training_has_these_operations(one_device):
    from natfp_jax.chips import CHIPS

    chip = next(chip for chip in CHIPS if chip.name == "v5e")
    with platforms.planned("tpu"):
        found = training(["arm"], EXPERIMENT, (VOCABULARY, VOCABULARY), Run(), chip, one_device, lambda line: None)
    assert found.executed == step("tpu")
    assert found.flops == MODEL
    assert found.sent == ()
    assert found.utilisation == pytest.approx(MODEL / found.time.seconds / 197e12)
