"""The decoder against its definition in float64, what it may see, and its cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from natfp_jax import params
from natfp_jax.config import Model
from natfp_jax.model import Decoder, _gated, both_ways, decode, empty_cache, head, hidden, logits, unrolled

VOCABULARY, PADDED = 100, 128
MODELS = {
    "swiglu, tied": Model(width=32, layers=2, heads=4),
    "gelu, head, one key-value head": Model(width=32, layers=3, heads=4, kv_heads=1, mlp="gelu", tied=False),
    "two key-value heads, other constants": Model(
        width=48, layers=2, heads=6, kv_heads=2, mlp_width=40, tied=False, rope_theta=500.0, norm_epsilon=1e-2
    ),
    "side by side, LayerNorm, biases, a part rotated": Model(
        width=32,
        layers=2,
        heads=2,
        mlp="gelu_exact",
        norm="layer",
        biases=("qkv", "o", "mlp"),
        parallel=True,
        tied=False,
        rope_fraction=0.5,
    ),
    "learned positions, norms of heads, their width, biases": Model(
        width=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=10,
        qk_norm=True,
        biases=("qkv", "mlp"),
        positions="learned",
        context=20,
    ),
    "one layer, one head": Model(width=16, layers=1, heads=1, mlp="gelu"),
}
MODEL = MODELS["two key-value heads, other constants"]
# The last one has no choice that those before it have not.
NAMES = [*list(MODELS)[:5], pytest.param(list(MODELS)[5], marks=pytest.mark.slow)]


def weights(model, seed=0):
    """Every parameter drawn at random, so that none is hidden by a zero or a one of the init."""
    random = np.random.default_rng(seed)
    specs = params.table(model, PADDED)
    drawn = {
        path: (
            random.normal(size=spec.shape) * (0.3 if path not in ("embedding", "positions") else 1) + (spec.scale is None)
        ).astype(np.float32)
        for path, spec in specs.items()
    }
    return jax.tree.map(jnp.asarray, params.nest(drawn))


def tokens(rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length)).astype(np.int32)


# --- the definition, in float64 ---------------------------------------------------------------------------------------


def rms_norm(x, scale, epsilon):
    """Zhang and Sennrich, 2019."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, bias, epsilon):
    """Ba, Kiros and Hinton, 2016."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


def normed(x, p, model, layer=()):
    scale = p["norm"][layer]
    if model.norm == "layer":
        return layer_norm(x, scale, p["norm_bias"][layer], model.norm_epsilon)
    return rms_norm(x, scale, model.norm_epsilon)


def rotary(x_TH, theta, fraction):
    """Su et al., 2021: the pair (i, i + H/2) of the first H dimensions at position t is turned by t · theta^(-2i/H)."""
    T, H = len(x_TH), int(x_TH.shape[1] * fraction)
    out = x_TH.copy()
    for t in range(T):
        for i in range(H // 2):
            angle = t * theta ** (-2 * i / H)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            out[t, [i, i + H // 2]] = turn @ x_TH[t, [i, i + H // 2]]
    return out


def attention(x_TD, p, layer, model, later=False):
    """Vaswani et al., 2017, with grouped queries (Ainslie et al., 2023): query head n reads key-value head n // (N / K)."""
    T, N, K = len(x_TD), model.heads, model.kv_heads or model.heads
    out_TD = np.zeros_like(x_TD) + (p["o_bias"][layer] if "o" in model.biases else 0)

    def head(name, n):
        x_TH = x_TD @ p[name][layer][:, n] + (p[f"{name}_bias"][layer][n] if "qkv" in model.biases else 0)
        if name == "v":
            return x_TH
        if model.qk_norm:
            x_TH = rms_norm(x_TH, p[f"{name}_norm"][layer], model.norm_epsilon)
        return x_TH if model.positions == "learned" else rotary(x_TH, model.rope_theta, model.rope_fraction)

    for n in range(N):
        q_TH, k_TH, v_TH = head("q", n), head("k", n // (N // K)), head("v", n // (N // K))
        for t in range(T):
            seen = len(x_TD) if later else t + 1
            score = k_TH[:seen] @ q_TH[t] / np.sqrt(q_TH.shape[1])
            weight = np.exp(score - score.max())
            out_TD[t] += (weight / weight.sum()) @ v_TH[:seen] @ p["o"][layer][n]
    return out_TD


def mlp(x_TD, p, layer, model):
    """SwiGLU (Shazeer, 2020), or GELU, or its tanh form (Hendrycks and Gimpel, 2016)."""

    def product(x, name):
        return x @ p[name][layer] + (p[f"{name}_bias"][layer] if "mlp" in model.biases else 0)

    up = product(x_TD, "up")
    if model.mlp == "swiglu":
        gate = product(x_TD, "gate")
        up = up * gate / (1 + np.exp(-gate))
    elif model.mlp == "gelu_exact":
        up = up / 2 * (1 + erf(up / np.sqrt(2)))
    else:
        up = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return product(up, "down")


def reference(tree, ids_T, model, later=False):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    x = p["embedding"][ids_T] + (p["positions"][: len(ids_T)] if model.positions == "learned" else 0)
    for layer in range(model.layers):
        a, m = p["layers"]["attention"], p["layers"]["mlp"]
        attended = attention(normed(x, a, model, layer), a, layer, model, later)
        x = x + attended + mlp(normed(x if model.parallel else x + attended, m, model, layer), m, layer, model)
    x = normed(x, p, model)
    return x, x @ (p["embedding"].T if model.tied else p["head"])


def forward(model, tree, ids_BT):
    @jax.jit
    def run(tree):
        x_BTD = hidden(model, tree, ids_BT)
        return x_BTD, logits(x_BTD, head(tree), VOCABULARY)

    return run(tree)


def distance(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_is_the_definition(name):
    model, ids_BT = MODELS[name], tokens(2, 9)
    tree = weights(model)
    x_BTD, z_BTV = forward(model, tree, ids_BT)
    assert z_BTV.dtype == jnp.float32
    for row, ids_T in enumerate(ids_BT):
        x_TD, z_TV = reference(tree, ids_T, model)
        assert distance(x_BTD[row], x_TD) < 1e-5
        assert distance(z_BTV[row, :, :VOCABULARY], z_TV[:, :VOCABULARY]) < 1e-5
    assert np.isneginf(z_BTV[..., VOCABULARY:]).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_modules_parameters_are_those_of_the_table(name):
    model = MODELS[name]
    module = Decoder(model, vocabulary=PADDED)
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in params.flatten(tree).items()}
    assert found == {path: (spec.shape, jnp.float32) for path, spec in params.table(model, PADDED).items()}


def test_a_state_depends_on_its_token_and_those_before():
    """By gradients: the state at t has one with respect to the embedding of every token up to t, and none of later ones."""
    ids_BT = np.arange(8, dtype=np.int32)[None]  # every token once, so that a row of the embedding is a position
    tree = weights(MODEL)

    def state(embedding, t):
        return hidden(MODEL, {**tree, "embedding": embedding}, ids_BT)[0, t].sum()

    gradient = jax.jit(jax.vmap(jax.grad(state), (None, 0)))(tree["embedding"], jnp.arange(8))
    seen = (np.asarray(gradient)[:, :8] != 0).any(axis=-1)
    assert (seen == np.tri(8, dtype=bool)).all()


def test_rows_of_a_batch_do_not_meet():
    tree, ids_BT = weights(MODEL), tokens(3, 7)
    changed = ids_BT.copy()
    changed[1] = (changed[1] + 1) % VOCABULARY
    before, after = forward(MODEL, tree, ids_BT)[0], forward(MODEL, tree, changed)[0]
    assert (np.asarray(before)[[0, 2]] == np.asarray(after)[[0, 2]]).all()
    assert (np.asarray(before)[1] != np.asarray(after)[1]).any()


# --- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_is_the_definition_without_the_causal_mask_and_padding_changes_nothing(name):
    model, lengths = MODELS[name], [1, 5, 9]
    tree, ids_BT = weights(model), tokens(3, 9)
    there_BT = np.arange(9) < np.array(lengths)[:, None]
    run = jax.jit(partial(both_ways, model))
    x_BTD, other_BTD = run(tree, ids_BT, there_BT), run(tree, np.where(there_BT, ids_BT, 7), there_BT)
    for row, length in enumerate(lengths):
        assert distance(x_BTD[row, :length], reference(tree, ids_BT[row, :length], model, later=True)[0]) < 1e-5
        assert (np.asarray(x_BTD[row, :length]) == np.asarray(other_BTD[row, :length])).all()


def test_both_ways_a_state_depends_on_every_token_that_is_there():
    """By gradients, as of the causal states; a padded one has none."""
    ids_BT = np.arange(8, dtype=np.int32)[None]
    tree, there_BT = weights(MODEL), np.arange(8)[None] < 6

    def state(embedding, t):
        return both_ways(MODEL, {**tree, "embedding": embedding}, ids_BT, there_BT)[0, t].sum()

    gradient = jax.jit(jax.vmap(jax.grad(state), (None, 0)))(tree["embedding"], jnp.arange(6))
    seen = (np.asarray(gradient)[:, :8] != 0).any(axis=-1)
    assert (seen == (np.arange(8) < 6)).all()


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_a_cache_is_the_full_forward_pass_for_ragged_prompts(name):
    """Slots and masks as in the sampler: prompts padded on the right, new tokens of all rows in common slots behind them."""
    model, lengths, width, new = MODELS[name], np.array([1, 3, 6, 8]), 8, 5
    tree = weights(model)
    ids_BT = tokens(4, width + new)
    prompts_BP = np.where(np.arange(width) < lengths[:, None], ids_BT[:, :width], 0)
    slots, place = np.arange(width + new), np.arange(width)
    step = jax.jit(partial(decode, model, unrolled(model, tree)))
    causal_BPP = (place[None, :, None] >= place) & (place < lengths[:, None, None])
    mask_BPS = np.pad(causal_BPP, ((0, 0), (0, 0), (0, new)))
    position_BP = np.broadcast_to(place, (4, width)).astype(np.int32)
    x_BPD, cache = step(prompts_BP, position_BP, mask_BPS, empty_cache(model, 4, width + new), 0)

    full_BTD = np.asarray(jax.jit(lambda ids: hidden(model, tree, ids))(ids_BT))
    scale = np.abs(full_BTD).max()
    for row, length in enumerate(lengths):
        assert np.abs(x_BPD[row, :length] - full_BTD[row, :length]).max() < 1e-5 * scale
    for t in range(new):
        mask_BS = (slots < lengths[:, None]) | ((slots >= width) & (slots <= width + t))
        here = lengths + t
        token_B1 = ids_BT[np.arange(4), here][:, None]
        x_B1D, cache = step(token_B1, here[:, None].astype(np.int32), mask_BS[:, None], cache, np.int32(width + t))
        assert np.abs(x_B1D[:, 0] - full_BTD[np.arange(4), here]).max() < 1e-5 * scale
    K, H = model.kv_heads or model.heads, model.head_width or model.width // model.heads
    assert {array.shape for slots in cache for array in slots} == {(4, K, width + new, H)}
    assert len(cache) == model.layers


def test_a_cache_of_another_precision_stays_close():
    model, ids_BT = MODELS["two key-value heads, other constants"], tokens(3, 6)
    weights_of = unrolled(model, weights(model))
    mask_BTT = np.broadcast_to(np.tri(6, dtype=bool), (3, 6, 6))
    position_BT = np.broadcast_to(np.arange(6), (3, 6))
    full, half = (
        jax.jit(partial(decode, model))(weights_of, ids_BT, position_BT, mask_BTT, empty_cache(model, 3, 6, dtype), 0)
        for dtype in ("float32", "bfloat16")
    )
    assert {array.dtype for slots in half[1] for array in slots} == {jnp.dtype("bfloat16")}
    assert half[0].dtype == jnp.float32
    assert 1e-5 < distance(half[0], np.asarray(full[0], np.float64)) < 0.05


def test_weights_for_decoding_are_the_same_numbers_in_the_compute_dtype():
    model = replace(MODELS["gelu, head, one key-value head"], dtype="bfloat16")
    tree = weights(model)
    found = unrolled(model, tree)
    assert len(found["layers"]) == model.layers
    for layer, its in enumerate(found["layers"]):
        for part, leaves in its.items():
            for name, leaf in leaves.items():
                expected = tree["layers"][part][name][layer]
                assert leaf.dtype == (jnp.float32 if name == "norm" else jnp.bfloat16)
                np.testing.assert_array_equal(leaf, expected.astype(leaf.dtype))
    assert (found["norm"].dtype, found["head"].dtype, found["embedding"].dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_stays_close():
    model, ids_BT = MODELS["swiglu, tied"], tokens(4, 16)
    half = replace(model, dtype="bfloat16")
    tree = weights(model)
    x_BTD, z_BTV = forward(half, tree, ids_BT)
    assert x_BTD.dtype == jnp.bfloat16
    assert z_BTV.dtype == jnp.float32
    full_BTV = np.asarray(forward(model, tree, ids_BT)[1])[..., :VOCABULARY]
    assert 1e-4 < distance(z_BTV[..., :VOCABULARY], full_BTV) < 0.05  # it is computed in bfloat16, and not badly


def test_the_gradient_of_the_gated_product_is_that_of_autodiff():
    random = np.random.default_rng(0)
    gate, up, w, weight = (
        random.standard_normal(shape).astype(np.float32) for shape in ((2, 8, 6), (2, 8, 6), (6, 5), (2, 8, 5))
    )

    def by(product):
        return jax.grad(lambda args: jnp.vdot(product(*args), weight))((3 * gate, up, w))

    for one, other in zip(by(_gated), by(lambda gate, up, w: (jax.nn.silu(gate) * up) @ w), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
