"""The blocked cross-entropy against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natfp_jax import blocks, config, mesh
from natfp_jax.blocks import block_length
from natfp_jax.loss import blocked_cross_entropy, token_losses

VOCABULARY, PADDED = 37, 64


def inputs(batch=4, length=12, width=16, seed=0):
    random = np.random.default_rng(seed)
    x_BTD = random.normal(size=(batch, length, width)).astype(np.float32)
    w_DV = random.normal(size=(width, PADDED)).astype(np.float32)
    return x_BTD, w_DV, random.integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def plain(x_BTD, w_DV, target_BT):
    """The formula and its gradient in float64, over the unpadded vocabulary."""
    x, w = x_BTD.astype(np.float64), w_DV.astype(np.float64)
    z = x @ w[:, :VOCABULARY]
    log_p = z - z.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    p, picked = np.exp(log_p), np.take_along_axis(log_p, target_BT[..., None], -1)
    dz = (p - np.eye(VOCABULARY)[target_BT]) / target_BT.size
    dw = np.zeros_like(w)
    dw[:, :VOCABULARY] = np.einsum("btd,btv->dv", x, dz)
    return -picked.mean(), dz @ w[:, :VOCABULARY].T, dw


def blocked(x_BTD, w_DV, target_BT, dtype=jnp.float32):
    @jax.jit
    def run(x, w):
        return jax.value_and_grad(lambda x, w: blocked_cross_entropy(x, w, target_BT, VOCABULARY), (0, 1))(x, w)

    value, (dx, dw) = run(x_BTD.astype(dtype), w_DV)
    return value, dx, dw


def assert_close(found, expected, relative):
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one, np.float64) - other).max() < relative * np.abs(other).max()


def test_value_and_gradient_are_those_of_the_formula():
    args = inputs()
    assert_close(blocked(*args), plain(*args), 2e-6)


def test_the_gradient_is_that_of_the_unblocked_formula_by_autodiff():
    x_BTD, w_DV, target_BT = inputs(seed=1)

    def unblocked(x, w):
        log_p = jax.nn.log_softmax((x @ w)[..., :VOCABULARY], axis=-1)
        return -jnp.take_along_axis(log_p, target_BT[..., None], axis=-1).mean()

    value, gradient = jax.value_and_grad(unblocked, (0, 1))(x_BTD, w_DV)
    assert_close(blocked(x_BTD, w_DV, target_BT), (np.asarray(value), *map(np.asarray, gradient)), 2e-6)


def test_the_value_alone_is_the_value_with_its_gradient():
    args = inputs()
    alone = jax.jit(lambda x, w: blocked_cross_entropy(x, w, args[2], VOCABULARY))(*args[:2])
    assert alone == blocked(*args)[0]


@pytest.mark.parametrize("rows", [1, 4, 8, 24, 10**6])
def test_the_length_of_a_block_does_not_matter(rows, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    args = inputs()
    assert_close(blocked(*args), plain(*args), 2e-6)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}])
def test_rows_and_columns_on_devices_of_their_own_have_the_loss_of_all(axes, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 8)
    devices, (x_BTD, w_DV, target_BT) = mesh.make(config.Mesh(replica=1, **axes)), inputs(batch=8, length=24)
    weight_BT = np.where(np.arange(24) % 3, 1, 0).astype(np.float32).repeat(8).reshape(24, 8).T

    @jax.jit
    def run(x, w, target, weight):
        x, target = mesh.constrain(x, "BTD", devices), mesh.constrain(target, "BT", devices)
        return jax.value_and_grad(lambda x, w: blocked_cross_entropy(x, w, target, VOCABULARY, weight, devices), (0, 1))(x, w)

    value, (dx_BTD, dw_DV) = run(x_BTD, w_DV, target_BT, np.ones_like(weight_BT))
    assert_close((value, dx_BTD, dw_DV), plain(x_BTD, w_DV, target_BT), 2e-6)
    value, (dx_BTD, dw_DV) = run(x_BTD, w_DV, target_BT, weight_BT)
    kept = np.arange(24) % 3 > 0
    assert_close((value, np.asarray(dx_BTD)[:, kept], dw_DV), plain(x_BTD[:, kept], w_DV, target_BT[:, kept]), 2e-6)


def test_logits_of_hundreds_do_not_overflow():
    x_BTD, w_DV, target_BT = inputs()
    args = 100 * x_BTD, w_DV, target_BT
    assert_close(blocked(*args), plain(*args), 2e-5)


def test_padding_has_no_probability_and_no_gradient():
    x_BTD, w_DV, target_BT = inputs()
    value, _, dw_DV = blocked(x_BTD, w_DV, target_BT)
    assert (np.asarray(dw_DV)[:, VOCABULARY:] == 0).all()
    assert (np.asarray(dw_DV)[:, :VOCABULARY] != 0).all()
    w_DV[:, VOCABULARY:] = 1e6
    other_value, dx_BTD, other_dw_DV = blocked(x_BTD, w_DV, target_BT)
    assert other_value == value
    assert np.isfinite(dx_BTD).all()
    assert (np.asarray(other_dw_DV) == np.asarray(dw_DV)).all()


def test_a_factor_behind_the_loss_reaches_the_gradient():
    x_BTD, w_DV, target_BT = inputs()
    gradient = jax.grad(lambda x: 3 * blocked_cross_entropy(x, w_DV, target_BT, VOCABULARY))(x_BTD)
    assert_close([gradient], [3 * plain(x_BTD, w_DV, target_BT)[1]], 2e-6)


def test_a_weight_of_zero_leaves_a_token_out():
    """Weights of 0 and 1 on a part of the tokens are the loss of that part alone."""
    x_BTD, w_DV, target_BT = inputs()
    weight_BT = np.zeros(target_BT.shape, np.float32)
    weight_BT[:, :7] = 1

    def loss(x, w, target, weight=None):
        return jax.value_and_grad(lambda x, w: blocked_cross_entropy(x, w, target, VOCABULARY, weight), (0, 1))(x, w)

    value, (dx_BTD, dw_DV) = loss(x_BTD, w_DV, target_BT, weight_BT)
    expected = plain(x_BTD[:, :7], w_DV, target_BT[:, :7])
    assert (np.asarray(dx_BTD)[:, 7:] == 0).all()
    assert_close((value, dx_BTD[:, :7], dw_DV), expected, 2e-6)
    assert loss(x_BTD, w_DV, target_BT, 3 * weight_BT)[0] == pytest.approx(float(value), rel=1e-6)
    assert blocked_cross_entropy(x_BTD, w_DV, target_BT, VOCABULARY, weight_BT) == pytest.approx(float(value), rel=1e-6)


def test_the_losses_of_tokens_are_those_of_the_formula():
    x_BTD, w_DV, target_BT = inputs()
    found_BT = token_losses(x_BTD, w_DV, target_BT, VOCABULARY)
    for b, t in np.ndindex(target_BT.shape):
        here = slice(b, b + 1), slice(t, t + 1)
        assert found_BT[b, t] == pytest.approx(plain(x_BTD[here], w_DV, target_BT[here])[0], rel=1e-4, abs=1e-5)


def test_bfloat16_states():
    args = inputs()
    value, dx_BTD, dw_DV = blocked(*args, dtype=jnp.bfloat16)
    assert (value.dtype, dx_BTD.dtype, dw_DV.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close((value, dx_BTD, dw_DV), plain(*args), 0.02)


@pytest.mark.parametrize(
    ("batch", "length", "expected"), [(32, 64, 32), (8, 64, 64), (1024, 7, 1), (5000, 64, 1), (3, 341, 341), (100, 60, 10)]
)
def test_block_length(batch, length, expected):
    assert block_length(batch, length) == expected
    assert length % expected == 0
