"""Texts are drawn from the model's own probabilities, with noise of their own, whatever stands beside them."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import binomtest, chisquare, norm

from natfp_jax import config, mesh, params, rng
from natfp_jax.config import Model, Sampling
from natfp_jax.model import head, hidden, logits
from natfp_jax.sample import Drawn, Strategy, draw, draw_key, effective, pad_prompts
from natfp_jax.sample import _categorical as categorical

EOS = 0
MODEL = Model(width=32, layers=2, heads=2, kv_heads=1)
SMALL, LARGE = 20, 300  # vocabularies: most of one block of 128 is padding; two blocks and a part of the third are not
STRATEGIES = [Strategy(), Strategy(0.7, top_k=30), Strategy(1.3, top_p=0.8)]
PLAIN = STRATEGIES[0]

# Shapes are few, since each is compiled anew: (prompt slots, new tokens, texts of a batch) of each vocabulary.
SHAPES = {SMALL: (10, 12, 500), LARGE: (10, 3, 2000)}


def weights(vocabulary, seed=0, model=MODEL, spread=0.3):
    """Parameters far from their start, so that every one of them matters."""
    specs = params.table(model, -(-vocabulary // 128) * 128)
    random = np.random.default_rng(seed)
    return params.nest(
        {
            path: jnp.asarray((0 if spec.scale is not None else 1) + spread * random.normal(size=spec.shape), jnp.float32)
            for path, spec in specs.items()
        }
    )


def prompts_of(count, vocabulary, longest=10, seed=0):
    random = np.random.default_rng(seed)
    return [[EOS, *random.integers(1, vocabulary, random.integers(0, longest)).tolist()] for _ in range(count)]


def words_of(numbers):
    return np.array([rng.words(int(number)) for number in numbers], np.uint32).reshape(-1, 2)


def drawn(tree, key, prompts, numbers=None, *, vocabulary, strategy=PLAIN, batch=None, new=None, shard=None):
    """Draws every prompt in batches of one shape, the last one filled up; returns host arrays."""
    width, usual_new, usual_batch = SHAPES[vocabulary]
    new, batch = new or usual_new, batch or usual_batch
    tokens_NP, length_N = pad_prompts(prompts, EOS, width)
    rows = words_of(range(len(prompts)) if numbers is None else numbers)
    found = []
    for first in range(0, len(prompts), batch):
        real = min(batch, len(prompts) - first)
        some = [*range(first, first + real), *[first] * (batch - real)]
        arrays = rows[some], tokens_NP[some], length_N[some]
        if shard is not None:
            arrays = jax.device_put(arrays, shard)
        out = draw(tree, key, *arrays, model=MODEL, strategy=strategy, vocabulary=vocabulary, eos=EOS, new_tokens=new)
        found.append([np.asarray(array)[:real] for array in out])
    return Drawn(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def reference(z_V, strategy):
    """Probabilities in float64, by the definitions: the k largest, then the fewest that hold top_p, each with its ties."""
    z_V = np.asarray(z_V, np.float64) / strategy.temperature
    kept = np.isfinite(z_V)
    if strategy.top_k is not None and strategy.top_k < kept.sum():
        kept &= z_V >= sorted(z_V[kept])[-strategy.top_k]
    p_V = np.where(kept, np.exp(z_V - z_V[kept].max()), 0)
    p_V /= p_V.sum()
    if strategy.top_p < 1:
        total, least = 0.0, 1.0
        for p in sorted(p_V[p_V > 0].tolist(), reverse=True):
            if total >= strategy.top_p:
                break
            total, least = total + p, p
        p_V[p_V < least] = 0
        p_V /= p_V.sum()
    return p_V


@partial(jax.jit, static_argnames="vocabulary")
def every_logit(tree, tokens_BT, vocabulary):
    """By the forward pass without a cache: [B, T, V]."""
    return logits(hidden(MODEL, tree, tokens_BT), head(tree), vocabulary)


def next_p(tree, ids, vocabulary, strategy=PLAIN):
    """The model's probabilities of what follows `ids`."""
    tokens_1T = np.array([[*ids, *[EOS] * (10 - len(ids))]], np.int32)
    return reference(every_logit(tree, tokens_1T, vocabulary)[0, len(ids) - 1], strategy)


def fits(tokens, p_V):
    """The p-value of Pearson's test; ids that are expected fewer than five times count together."""
    counts = np.bincount(tokens, minlength=len(p_V))
    assert not counts[p_V == 0].any()
    expected = p_V * len(tokens)
    often = expected >= 5
    seen, due = counts[often], expected[often]
    if expected[~often].sum() >= 5:
        seen, due = np.append(seen, counts[~often].sum()), np.append(due, expected[~often].sum())
    return chisquare(seen, due * seen.sum() / due.sum()).pvalue if len(seen) > 1 else 1.0


# --- the effective distribution ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    padding=st.integers(0, 4),
    temperature=st.sampled_from([0.25, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 2, 3, 17, 64, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.3, 0.501, 0.77, 0.95, 0.9999, 1.0]),
)
@example(values=[3, 3, 3, 3], padding=0, temperature=1.0, top_k=2, top_p=1.0)
@example(values=[1, 2, 2, 0], padding=2, temperature=1.0, top_k=1000, top_p=1e-9)
@example(values=[0] * 37, padding=3, temperature=1.0, top_k=None, top_p=0.3)
def test_the_effective_distribution_is_its_definition_ties_included(values, padding, temperature, top_k, top_p):
    strategy = Strategy(temperature, top_k, top_p)
    z_V = np.full(64, -np.inf, np.float32)  # one shape, few compilations
    z_V[: len(values)] = np.array(values, np.float32) / 8
    z_V = np.roll(z_V, padding)
    expected = reference(z_V, strategy)
    without = np.sort(reference(z_V, Strategy(temperature, top_k)))[::-1]
    assume(np.abs(np.cumsum(without) - top_p).min() > 1e-5 or top_p == 1)  # else rounding decides, in the reference too
    found = np.exp(np.asarray(effective(jnp.asarray(z_V), strategy), np.float64))
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-30)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_what_is_tied_with_the_last_one_kept_is_kept_wherever_it_stands():
    z_V = np.full(1000, -3.0, np.float32)  # no multiple of what a processor handles at once
    tied = np.array([0, 3, 9, 64, 999])
    z_V[tied] = 1.1
    for strategy in (Strategy(top_k=2), Strategy(top_p=0.01), Strategy(0.9, 3, 0.5)):
        log_p_V = np.asarray(effective(jnp.asarray(z_V), strategy))
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(log_p_V)), tied)
        np.testing.assert_allclose(log_p_V[tied], np.log(1 / 5), rtol=1e-6)


def test_rows_of_a_batch_have_their_own_distribution():
    z_BV = np.random.default_rng(0).normal(size=(3, 5, 256)).astype(np.float32) * 3
    for strategy in STRATEGIES:
        found = np.exp(np.asarray(effective(jnp.asarray(z_BV), strategy), np.float64))
        for place in itertools.product(range(3), range(5)):
            np.testing.assert_allclose(found[place], reference(z_BV[place], strategy), rtol=2e-5, atol=1e-30)


def test_a_strategy_takes_every_field_that_a_configuration_has_for_it():
    assert Strategy.of(Sampling(temperature=0.5, top_k=7, top_p=0.25)) == Strategy(0.5, 7, 0.25)


# --- frequencies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_draw_in_two_steps_has_the_frequencies_of_the_distribution(blocks):
    random = np.random.default_rng(blocks)
    z_V = random.normal(size=128 * blocks) * 1.5
    z_V[random.permutation(128 * blocks)[: 40 * blocks]] = -np.inf  # top-k leaves holes everywhere
    if blocks > 1:
        z_V[128:256] = -np.inf  # a block without any id
    z_V[-60:] = -np.inf  # padding
    log_p_V = jax.nn.log_softmax(jnp.asarray(z_V, jnp.float32))
    keys = jax.random.split(rng.stream(0, "test", blocks), 30_000)
    several = jax.jit(jax.vmap(categorical, (0, None)))
    tokens = np.asarray(several(keys, log_p_V))
    assert tokens.dtype == np.int32
    assert fits(tokens, np.exp(np.asarray(log_p_V, np.float64))) > 1e-3
    alone = jnp.full(128 * blocks, -jnp.inf).at[-70].set(0.0)
    assert set(np.asarray(several(keys, alone)).tolist()) == {128 * blocks - 70}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_have_the_models_frequencies_at_each_place(strategy):
    tree, prompt = weights(LARGE), [EOS, 5, 260, 17]
    found = drawn(tree, draw_key(0, "arm", 1, 0), [prompt] * 16_000, vocabulary=LARGE, strategy=strategy)
    first, second = found.ids_BN[:, :2].T
    p_V = next_p(tree, prompt, LARGE, strategy)
    assert fits(first, p_V) > 1e-3
    common = int(np.argmax(np.where(np.arange(len(p_V)) == EOS, 0, p_V)))
    followed = second[first == common]
    assert len(followed) > 500
    assert fits(followed, next_p(tree, [*prompt, common], LARGE, strategy)) > 1e-3
    assert found.ids_BN.max() < LARGE


def test_padding_is_never_drawn_however_flat_the_distribution():
    flat = jax.tree.map(jnp.zeros_like, weights(SMALL))
    ids = drawn(flat, draw_key(0, "arm", 1, 0), [[EOS]] * 5000, vocabulary=SMALL).ids_BN
    assert set(ids[:, 0].tolist()) == set(range(SMALL))
    assert ids.max() < SMALL
    assert fits(ids[:, 0], np.r_[np.full(SMALL, 1 / SMALL), np.zeros(128 - SMALL)]) > 1e-3


# --- the end of a text ------------------------------------------------------------------------------------------------


def test_a_text_ends_with_its_first_eos_or_at_the_limit():
    prompts = prompts_of(1000, SMALL)
    found = drawn(weights(SMALL), draw_key(3, "arm", 1, 0), prompts, vocabulary=SMALL)
    for ids, length in zip(found.ids_BN, found.length_B, strict=True):
        ends = np.flatnonzero(ids == EOS)
        assert length == (ends[0] + 1 if len(ends) else 12)
        assert (ids[length:] == EOS).all()
    assert {1, 2, 12} <= set(found.length_B.tolist())
    assert 0.05 < (found.length_B == 12).mean() < 0.95


def test_more_new_tokens_only_lengthen_a_text():
    """The noise is that of the place: the beginning stays as it was."""
    tree, prompts, key = weights(SMALL), prompts_of(500, SMALL), draw_key(0, "arm", 1, 0)
    short, long = (drawn(tree, key, prompts, vocabulary=SMALL, new=new) for new in (6, 12))
    assert (short.ids_BN == long.ids_BN[:, :6]).all(axis=1).mean() > 0.99
    assert len(np.unique(long.ids_BN, axis=0)) > 300


# --- invariant 6: neighbours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "strategy"), [(SMALL, PLAIN), (LARGE, STRATEGIES[-1])])
def test_a_text_is_bitwise_the_same_whatever_its_place_its_companions_and_their_number(vocabulary, strategy):
    tree, key, batch = weights(vocabulary), draw_key(0, "arm", 1, 0), SHAPES[vocabulary][2]
    prompts, numbers = prompts_of(batch, vocabulary), np.random.default_rng(1).integers(0, 2**63, batch)

    def together(rows, others=()):
        """The texts of `rows` before `others`, in one batch."""
        ids = [prompts[row] for row in rows] + [prompt for prompt, _ in others]
        known = [numbers[row] for row in rows] + [number for _, number in others]
        return drawn(tree, key, ids, known, vocabulary=vocabulary, strategy=strategy)

    whole = together(range(batch))
    order = np.random.default_rng(2).permutation(batch)
    assert same(together(order), [array[order] for array in whole])
    strangers = [(prompt, 2**63 + i) for i, prompt in enumerate(prompts_of(batch, vocabulary, seed=9))]
    kept = range(5, 102)
    mixed = together(kept, strangers[: batch - len(kept)])
    assert same([array[: len(kept)] for array in mixed], [array[kept] for array in whole])
    assert not np.array_equal(mixed.ids_BN[len(kept) :], whole.ids_BN[len(kept) :])
    for few in (range(40, 43), range(7, 8)):  # the rest of the batch is the first of them again and again
        assert same(together(few), [array[few] for array in whole])


def test_across_batch_shapes_few_texts_change():
    """Stated: at most one of 1,000 texts of 24 tokens (measured elsewhere: 4e-6 a token, one text of 10,000)."""
    tree, prompts, key = weights(LARGE), prompts_of(3000, LARGE), draw_key(0, "arm", 1, 0)
    one, other = (drawn(tree, key, prompts, vocabulary=LARGE, batch=batch, new=24) for batch in (256, 37))
    changed = (one.ids_BN != other.ids_BN).any(axis=1)
    assert changed.mean() <= 1e-3
    np.testing.assert_allclose(one.log_probability_B[~changed], other.log_probability_B[~changed], atol=1e-3)


@pytest.mark.parametrize("axes", [config.Mesh(), config.Mesh(replica=8), config.Mesh(replica=2, fsdp=4)])
def test_the_mesh_decides_neither_noise_nor_texts(axes):
    """Eight devices that hold 37 rows each draw, bitwise, the texts of one device that draws 37 at a time."""
    tree, prompts, key = weights(LARGE), prompts_of(8 * 37, LARGE), draw_key(0, "arm", 1, 0)
    one = drawn(tree, key, prompts, vocabulary=LARGE, batch=37, new=24)
    over = mesh.make(axes, jax.devices()[:8])
    assert mesh.text_ways(over) == 8
    spread = jax.device_put(tree, mesh.replicated(over))
    eight = drawn(spread, key, prompts, vocabulary=LARGE, batch=8 * 37, new=24, shard=mesh.text_sharding(over))
    assert same(one, eight)


def test_the_same_call_again_gives_the_same_bits():
    tree, prompts = weights(SMALL), prompts_of(500, SMALL)
    one, again = (drawn(tree, draw_key(0, "arm", 1, 0), prompts, vocabulary=SMALL) for _ in range(2))
    assert same(one, again)


# --- whose noise ------------------------------------------------------------------------------------------------------


def test_no_two_seeds_arms_checkpoints_or_draws_share_a_key():
    arms = ["a", "b", "0", "1", "a" * 64]
    addresses = list(itertools.product((0, 1, 2), arms, (0, 1, 2, 2**33), (0, 1, 2)))
    keys = {tuple(jax.random.key_data(draw_key(*address)).tolist()) for address in addresses}
    assert len(keys) == len(addresses)


def check_agreement(tree, prompts, a, b):
    """Independent draws of a distribution p agree with probability sum p²."""
    tokens, length = pad_prompts(prompts, EOS, 10)
    z_BV = np.asarray(every_logit(tree, tokens, SMALL), np.float64)[np.arange(len(prompts)), length - 1]
    p_BV = np.exp(z_BV - logsumexp(z_BV, axis=1, keepdims=True))
    chance_B = (p_BV**2).sum(axis=1)
    assert 0.02 < chance_B.mean() < 0.5
    z = ((a == b).mean() - chance_B.mean()) * len(a) / np.sqrt((chance_B * (1 - chance_B)).sum())
    assert abs(z) < norm.isf(5e-4)


@pytest.mark.parametrize(
    "other", [(0, "arm", 8, 1), (0, "arm", 16, 0), (0, "another", 8, 0), (1, "arm", 8, 0)], ids=["draw", "step", "arm", "seed"]
)
def test_equal_weights_agree_as_often_as_independent_draws_do(other):
    tree, prompts = weights(SMALL), prompts_of(5000, SMALL)
    a, b = (drawn(tree, draw_key(*address), prompts, vocabulary=SMALL).ids_BN[:, 0] for address in ((0, "arm", 8, 0), other))
    check_agreement(tree, prompts, a, b)


def test_prompts_of_equal_text_have_noise_of_their_own():
    """Also where their ids differ in the high word alone."""
    tree, prompts, key = weights(SMALL), [[EOS, 3, 4]] * 5000, draw_key(0, "arm", 8, 0)
    low, high = range(5000), [number << 32 for number in range(5000)]
    a, b = (drawn(tree, key, prompts, numbers, vocabulary=SMALL).ids_BN[:, 0] for numbers in (low, high))
    assert a[0] == b[0]  # the same id, 0
    check_agreement(tree, prompts[:-1], a[1:], b[1:])
    check_agreement(tree, prompts[:-1], a[1:], a[:-1])


def test_places_of_a_text_have_noise_of_their_own():
    """Of tokens that a flat distribution gives, any two of a text are equal as often as chance has it."""
    flat = jax.tree.map(jnp.zeros_like, weights(SMALL))
    ids = drawn(flat, draw_key(0, "arm", 8, 0), [[EOS]] * 10_000, vocabulary=SMALL).ids_BN
    whole = ids[(ids[:, :5] != EOS).all(axis=1)]
    for one, other in itertools.combinations(range(5), 2):
        equal, chance = (whole[:, one] == whole[:, other]).sum(), 1 / (SMALL - 1)
        assert binomtest(int(equal), len(whole), chance).pvalue > 1e-3
