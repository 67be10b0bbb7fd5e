"""Both gradients of the embedding are the sum of the rows that belong to an id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natfp_jax import config, mesh
from natfp_jax.embedding import look_up

V, D = 50, 16


def inputs(*shape):
    random = np.random.default_rng(0)
    table = random.standard_normal((*shape[:-2], V, D), np.float32)
    return table, random.integers(0, V - 5, shape, np.int32), random.standard_normal((*shape, D), np.float32)


def gradient(table_VD, tokens_BT, dx_BTD, products, dtype, devices=None):
    def weighed(table):
        return (look_up(table, tokens_BT, dtype, devices, products).astype(jnp.float32) * dx_BTD).sum()

    return jax.grad(weighed)(table_VD)


def summed(tokens_BT, dx_BTD):
    found = np.zeros((V, D))
    np.add.at(found, tokens_BT, np.asarray(dx_BTD, np.float64))
    return found


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_the_gradient_is_the_sum_of_rows(products, dtype, error):
    table, tokens, dx = inputs(64, 48)  # three blocks
    found = jax.jit(gradient, static_argnums=(3, 4))(table, tokens, dx, products, dtype)
    assert found.dtype == jnp.float32
    expected = summed(tokens, dx)
    assert np.abs(found - expected).max() <= error * np.abs(expected).max()
    assert not found[V - 5 :].any()
    np.testing.assert_array_equal(look_up(table, tokens, dtype, products=products), jnp.asarray(table)[tokens].astype(dtype))


@pytest.mark.parametrize("products", [True, False])
def test_rows_on_devices_of_their_own_have_the_gradient_of_all(products):
    table, tokens, dx = inputs(64, 48)
    devices = mesh.make(config.Mesh(data=2, fsdp=2, tensor=2))
    found = jax.jit(gradient, static_argnums=(3, 4, 5))(table, tokens, dx, products, jnp.float32, devices)
    expected = summed(tokens, dx)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("products", [True, False])
def test_replicas_together_each_have_their_own(products):
    table, tokens, dx = inputs(3, 8, 12)
    found = jax.vmap(lambda *one: gradient(*one, products, jnp.float32))(table, tokens, dx)
    for place in range(3):
        np.testing.assert_allclose(found[place], summed(tokens[place], dx[place]), rtol=0, atol=1e-4)
