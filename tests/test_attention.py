"""Attention some rows at a time is attention, forward and backward, with as many key-value heads as there may be."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natfp_jax import attention, blocks, config, mesh
from natfp_jax.attention import Rotary, causal
from natfp_jax.blocks import row_blocks

THETA = 100.0
ROTARY = Rotary(THETA, 8)  # as wide as the heads
ONE = mesh.make(config.Mesh(), jax.devices()[:1])


def inputs(batch, length, heads, kv_heads, width=8):
    random = np.random.default_rng(0)
    shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def plain(q, k, v):
    """In float64: rotated as complex numbers, one query after another."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    half = q.shape[-1] // 2
    turn = np.exp(1j * np.arange(q.shape[1])[:, None] * THETA ** (-np.arange(half) / half))[None, :, None]
    q, k = ((x[..., :half] + 1j * x[..., half:]) * turn for x in (q, k))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros(v.shape[:1] + q.shape[1:3] + v.shape[3:])
    for t in range(q.shape[1]):
        z = np.einsum("bnh,bsnh->bns", q[:, t], k[:, : t + 1].conj()).real / np.sqrt(2 * half)
        p = np.exp(z - z.max(-1, keepdims=True))
        out[:, t] = np.einsum("bns,bsnh->bnh", p / p.sum(-1, keepdims=True), v[:, : t + 1])
    return out


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [1, 40, 1024])
def test_attention_is_that_of_the_formula(whole, kv_heads, rows, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    q, k, v, _ = inputs(6, 20, 4, kv_heads)
    found = jax.jit(causal, static_argnums=(3, 4))(q, k, v, ROTARY, ONE if whole else None)
    np.testing.assert_allclose(found, plain(q, k, v), rtol=0, atol=5e-6)


def test_both_ways_have_one_gradient(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 40)
    *qkv, weight = inputs(6, 20, 4, 2)

    def gradient(whole):
        return jax.jit(jax.grad(lambda qkv: jnp.vdot(causal(*qkv, ROTARY, ONE if whole else None), weight)))(qkv)

    for one, other in zip(gradient(True), gradient(False), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "backend", "version", "kernel"),
    [
        (jnp.bfloat16, 64, "gpu", "cuda 13000", "cudnn"),
        (jnp.float32, 64, "gpu", "cuda 13000", None),
        (jnp.bfloat16, 36, "gpu", "cuda 13000", None),
        (jnp.bfloat16, 256, "gpu", "cuda 13000", None),
        (jnp.bfloat16, 64, "gpu", "rocm 70000", None),
        (jnp.bfloat16, 64, "cpu", "cpu", None),
    ],
)
def test_the_fused_kernel_is_taken_where_it_fits(dtype, width, backend, version, kernel, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: SimpleNamespace(platform_version=version))
    assert attention._fused(jnp.zeros((1, 1, 1, width), dtype)) == kernel


@pytest.mark.parametrize(("batch", "length", "rows"), [(32, 128, 8), (16, 256, 4), (6, 300, 3), (5, 300, 1), (4, 5000, 1)])
def test_blocks_of_whole_rows(batch, length, rows):
    assert row_blocks(jnp.zeros((batch, length, 2))).shape == (batch // rows, rows, length, 2)
