"""Texts are drawn from the model's own probabilities, with noise of their own, whatever stands beside them."""

import itertools
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import binomtest, chisquare, norm

from natfp_jax import config, mesh, params, rng, turns
from natfp_jax.config import Model, Sampling
from natfp_jax.errors import UserError
from natfp_jax.model import head, hidden, logits
from natfp_jax.sample import at_once, categorical, draw_key, log_probability, new_slots_for, programs_of, rows_for, slots_for
from natfp_jax.strategy import Greedy, MinP, RepetitionPenalty, Temperature, TopK, TopP, effective, remembers, strategy_of
from natfp_jax.turns import draw

EOS = 0
MODEL = Model(width=32, layers=2, heads=2, kv_heads=1)
SMALL, LARGE = 20, 300  # vocabularies: most of one block of 128 is padding; two blocks and a part of the third are not
STRATEGIES = [
    (),
    (Temperature(0.7), TopK(30)),
    (Temperature(1.3), TopP(0.8)),
    (RepetitionPenalty(1.7), MinP(0.05)),
]
PLAIN = STRATEGIES[0]
ONE = mesh.make(config.Mesh(), jax.devices()[:1])

# Shapes are few, since each is compiled anew: (new tokens, texts of a batch) of each vocabulary.
SHAPES = {SMALL: (12, 500), LARGE: (3, 2000)}


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


def drawn(
    tree,
    keys,
    prompts,
    numbers=None,
    *,
    vocabulary,
    strategy=PLAIN,
    batch=None,
    new=None,
    devices=None,
    model=None,
    given=None,
    **more,
):
    """One text of each prompt: of one draw, or of a list of draws, each of a tree of its own."""
    usual_new, usual_batch = SHAPES[vocabulary]
    padded = -(-vocabulary // 128) * 128
    programs = programs_of(model or MODEL, strategy, vocabulary, padded, EOS, batch or usual_batch, devices or ONE, **more)
    several = isinstance(keys, list)
    loaders = [partial(lambda one: one, one) for one in (tree if several else [tree])]
    numbers = range(len(prompts)) if numbers is None else numbers
    keys = keys if several else [keys]
    found = draw(programs, programs.weights(loaders), keys, numbers, prompts, new or usual_new, given=given)
    return found if several else found[0]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def reference(z_V, strategy, seen=()):
    """Probabilities in float64, by the definitions: the k largest, the fewest that hold p, and so on, each with its ties."""
    z_V = np.asarray(z_V, np.float64).copy()

    def p_of(z_V):
        p_V = np.where(np.isfinite(z_V), np.exp(z_V - z_V[np.isfinite(z_V)].max()), 0)
        return p_V / p_V.sum()

    for step in strategy:
        kept = np.isfinite(z_V)
        match step:
            case RepetitionPenalty(value):
                for i in set(seen):
                    z_V[i] = z_V[i] / value if z_V[i] > 0 else z_V[i] * value
            case Temperature(value):
                z_V /= value
            case TopK(k):
                if k < kept.sum():
                    kept &= z_V >= sorted(z_V[kept])[-k]
            case TopP(p):
                total, least, p_V = 0.0, 1.0, p_of(z_V)
                for one in sorted(p_V[p_V > 0].tolist(), reverse=True):
                    if total >= p:
                        break
                    total, least = total + one, one
                kept &= p_V >= least
            case MinP(p):
                p_V = p_of(z_V)
                kept &= p_V >= p * p_V.max()
            case Greedy():
                kept = np.arange(len(z_V)) == np.argmax(z_V)
        z_V[~kept] = -np.inf
    return p_of(z_V)


@partial(jax.jit, static_argnames="vocabulary")
def every_logit(tree, tokens_BT, vocabulary):
    """By the forward pass without a cache: [B, T, V]."""
    return logits(hidden(MODEL, tree, tokens_BT), head(tree), vocabulary)


def next_p(tree, ids, vocabulary, strategy=PLAIN):
    """The model's probabilities of what follows `ids`."""
    tokens_1T = np.array([[*ids, *[EOS] * (10 - len(ids))]], np.int32)
    return reference(every_logit(tree, tokens_1T, vocabulary)[0, len(ids) - 1], strategy, ids)


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


STEPS = st.one_of(
    st.builds(RepetitionPenalty, st.sampled_from([0.5, 1.3, 3.0])),
    st.builds(Temperature, st.sampled_from([0.25, 0.5, 1.75])),
    st.builds(TopK, st.sampled_from([1, 2, 3, 17, 64, 1000])),
    st.builds(TopP, st.sampled_from([1e-9, 0.1, 0.3, 0.501, 0.77, 0.95, 0.9999])),
    st.builds(MinP, st.sampled_from([0.003, 0.11, 0.4, 0.93])),
    st.just(Greedy()),
)


@settings(max_examples=200, derandomize=True)
@given(
    values=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    padding=st.integers(0, 4),
    strategy=st.lists(STEPS, max_size=3).map(tuple),
    seen=st.sets(st.integers(0, 63)),
)
@example(values=[3, 3, 3, 3], padding=0, strategy=(TopK(2),), seen=set())
@example(values=[1, 2, 2, 0], padding=2, strategy=(TopK(1000), TopP(1e-9)), seen=set())
@example(values=[0] * 37, padding=3, strategy=(TopP(0.3),), seen=set())
@example(values=[8, 8, -8, -8], padding=0, strategy=(RepetitionPenalty(2.0),), seen={0, 2})
@example(values=[5, 9, 9, 2], padding=1, strategy=(Greedy(),), seen=set())
def test_the_effective_distribution_is_its_definition_ties_included(values, padding, strategy, seen):
    z_V = np.full(64, -np.inf, np.float32)  # one shape, few compilations
    z_V[: len(values)] = np.array(values, np.float32) / 8
    z_V = np.roll(z_V, padding)
    for place, step in enumerate(strategy):  # else rounding decides, in the reference too
        before = np.sort(reference(z_V, strategy[:place], seen))[::-1]
        if isinstance(step, TopP):
            assume(np.abs(np.cumsum(before) - step.p).min() > 1e-5)
        elif isinstance(step, MinP):
            assume(np.abs(before / before[0] - step.p).min() > 1e-5)
    expected = reference(z_V, strategy, seen)
    seen_V = np.isin(np.arange(64), list(seen))
    found = np.exp(np.asarray(jax.nn.log_softmax(effective(strategy, jnp.asarray(z_V), seen_V)), np.float64))
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-30)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_what_is_tied_with_the_last_one_kept_is_kept_wherever_it_stands():
    z_V = np.full(1000, -3.0, np.float32)  # no multiple of what a processor handles at once
    tied = np.array([0, 3, 9, 64, 999])
    z_V[tied] = 1.1
    for strategy in ((TopK(2),), (TopP(0.01),), (MinP(0.99),), (Temperature(0.9), TopK(3), TopP(0.5))):
        log_p_V = np.asarray(jax.nn.log_softmax(effective(strategy, jnp.asarray(z_V))))
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(log_p_V)), tied)
        np.testing.assert_allclose(log_p_V[tied], np.log(1 / 5), rtol=1e-6)


def test_rows_of_a_batch_have_their_own_distribution():
    random = np.random.default_rng(0)
    z_BV, seen_BV = random.normal(size=(3, 5, 256)).astype(np.float32) * 3, random.random((3, 5, 256)) < 0.2
    for strategy in (*STRATEGIES, (Greedy(),)):
        found = np.exp(np.asarray(jax.nn.log_softmax(effective(strategy, jnp.asarray(z_BV), seen_BV)), np.float64))
        for place in itertools.product(range(3), range(5)):
            expected = reference(z_BV[place], strategy, np.flatnonzero(seen_BV[place]))
            np.testing.assert_allclose(found[place], expected, rtol=2e-5, atol=1e-30)


def test_a_strategy_has_a_step_for_every_field_that_a_configuration_sets():
    sampling = Sampling(temperature=(0.5, 1.0), top_k=7, top_p=0.25, min_p=0.1, repetition_penalty=1.2)
    whole = (RepetitionPenalty(1.2), Temperature(0.5), TopK(7), TopP(0.25), MinP(0.1))
    assert strategy_of(sampling, 0.5) == whole
    assert strategy_of(sampling, 1.0) == (whole[0], *whole[2:])
    assert strategy_of(Sampling(), 1.0) == ()
    assert strategy_of(Sampling(greedy=True, repetition_penalty=1.2), 1.0) == (RepetitionPenalty(1.2), Greedy())
    assert remembers(whole)
    assert not remembers(whole[1:])


@pytest.mark.parametrize("other", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_greedy_and_something_else_is_refused(other):
    sampling = Sampling(greedy=True, **other)
    with pytest.raises(UserError, match="greedy takes the most likely id, always: leave out"):
        strategy_of(sampling, sampling.temperatures[0])


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
    tokens = np.asarray(several(keys, log_p_V + 3))  # no distribution needs to be normalised
    found = jax.vmap(log_probability, (None, 0))(log_p_V + 3, tokens)
    assert tokens.dtype == np.int32
    np.testing.assert_allclose(found, np.asarray(log_p_V)[tokens], atol=1e-5)
    assert fits(tokens, np.exp(np.asarray(log_p_V, np.float64))) > 1e-3
    alone = jnp.full(128 * blocks, -jnp.inf).at[-70].set(0.0)
    assert set(np.asarray(several(keys, alone)).tolist()) == {128 * blocks - 70}


@pytest.mark.parametrize(
    "strategy", [PLAIN, STRATEGIES[3], *(pytest.param(steps, marks=pytest.mark.slow) for steps in STRATEGIES[1:3])]
)
def test_tokens_have_the_models_frequencies_at_each_place(strategy):
    tree, prompt = weights(LARGE), [EOS, 5, 260, 17]
    found = drawn(tree, draw_key(0, "arm", 1, PLAIN, 0), [prompt] * 16_000, vocabulary=LARGE, strategy=strategy)
    first, second = found.id_NW[:, :2].T
    p_V = next_p(tree, prompt, LARGE, strategy)
    assert fits(first, p_V) > 1e-3
    common = int(np.argmax(np.where(np.arange(len(p_V)) == EOS, 0, p_V)))
    followed = second[first == common]
    assert len(followed) > 500
    assert fits(followed, next_p(tree, [*prompt, common], LARGE, strategy)) > 1e-3
    assert found.id_NW.max() < LARGE


def test_padding_is_never_drawn_however_flat_the_distribution():
    flat = jax.tree.map(jnp.zeros_like, weights(SMALL))
    ids = drawn(flat, draw_key(0, "arm", 1, PLAIN, 0), [[EOS]] * 5000, vocabulary=SMALL).id_NW
    assert set(ids[:, 0].tolist()) == set(range(SMALL))
    assert ids.max() < SMALL
    assert fits(ids[:, 0], np.r_[np.full(SMALL, 1 / SMALL), np.zeros(128 - SMALL)]) > 1e-3


# --- the end of a text ------------------------------------------------------------------------------------------------


def test_a_text_ends_with_its_first_eos_or_at_the_limit():
    prompts = prompts_of(1000, SMALL)
    found = drawn(weights(SMALL), draw_key(3, "arm", 1, PLAIN, 0), prompts, vocabulary=SMALL)
    for ids, length in zip(found.id_NW, found.length_N, strict=True):
        ends = np.flatnonzero(ids == EOS)
        assert length == (ends[0] + 1 if len(ends) else 12)
        assert (ids[length:] == EOS).all()
    assert {1, 2, 12} <= set(found.length_N.tolist())
    assert 0.05 < (found.length_N == 12).mean() < 0.95


@pytest.mark.slow
def test_fewer_new_tokens_are_the_beginning_of_more():
    """Bit for bit, so that texts of several lengths can share one draw."""
    tree, prompts, key = weights(SMALL), prompts_of(200, SMALL), draw_key(0, "arm", 1, PLAIN, 0)
    long = drawn(tree, key, prompts, vocabulary=SMALL, new=70, batch=100)
    assert (long.length_N > 64).any()
    for new in (1, 6, 16, 33, 64):
        short = drawn(tree, key, prompts, vocabulary=SMALL, new=new, batch=100)
        np.testing.assert_array_equal(short.length_N, np.minimum(long.length_N, new))
        np.testing.assert_array_equal(short.id_NW, long.id_NW[:, :new])
        np.testing.assert_array_equal(short.log_p_NW, long.log_p_NW[:, :new])


def test_greedy_texts_are_the_most_likely_ids_whatever_the_key():
    tree, prompts = weights(LARGE), prompts_of(300, LARGE)
    one, other = (
        drawn(tree, draw_key(seed, "arm", 1, PLAIN, 0), prompts, vocabulary=LARGE, strategy=(Greedy(),), batch=300, new=8)
        for seed in (0, 1)
    )
    assert same(one, other)
    assert (one.log_p_NW == 0).all()
    for prompt, ids, length in zip(prompts, one.id_NW, one.length_N, strict=True):
        whole = [*prompt, *ids[:length].tolist()]
        z_TV = np.asarray(every_logit(tree, np.array([[*whole, *[EOS] * (20 - len(whole))]]), LARGE))[0]
        for place, token in enumerate(ids[:length], start=len(prompt) - 1):
            assert z_TV[place, token] >= z_TV[place].max() - 1e-4


# --- invariant 6: neighbours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "strategy", "new"),
    [(SMALL, PLAIN, 12), (LARGE, STRATEGIES[2], 3), pytest.param(SMALL, STRATEGIES[3], 40, marks=pytest.mark.slow)],
)
def test_a_text_is_bitwise_the_same_whatever_its_place_its_companions_and_their_number(vocabulary, strategy, new):
    tree, key, batch = weights(vocabulary), draw_key(0, "arm", 1, PLAIN, 0), SHAPES[vocabulary][1]
    prompts, numbers = prompts_of(batch, vocabulary), np.random.default_rng(1).integers(0, 2**63, batch)

    def together(rows, others=()):
        """The texts of `rows` before `others`, in one batch."""
        ids = [prompts[row] for row in rows] + [prompt for prompt, _ in others]
        known = [numbers[row] for row in rows] + [number for _, number in others]
        return drawn(tree, key, ids, known, vocabulary=vocabulary, strategy=strategy, new=new)

    whole = together(range(batch))
    order = np.random.default_rng(2).permutation(batch)
    assert same(together(order), [array[order] for array in whole])
    strangers = [(prompt, 2**63 + i) for i, prompt in enumerate(prompts_of(batch, vocabulary, seed=9))]
    kept = range(5, 102)
    mixed = together(kept, strangers[: batch - len(kept)])
    assert same([array[: len(kept)] for array in mixed], [array[kept] for array in whole])
    assert not np.array_equal(mixed.id_NW[len(kept) :], whole.id_NW[len(kept) :])
    long = [([EOS, *[7] * 50], 2**63 + i) for i in range(20)]  # of another number of slots
    for few in (range(40, 43), range(7, 8)):  # the rest of the batch is filled up
        assert same([array[: len(few)] for array in together(few, long)], [array[few] for array in whole])
    first = drawn(
        tree,
        key,
        [long[0][0], *prompts[40:43]],
        [long[0][1], *numbers[40:43]],
        vocabulary=vocabulary,
        strategy=strategy,
        new=new,
    )
    assert same([array[1:] for array in first], [array[40:43] for array in whole])


class Counted:
    """Programs that say what they were asked for."""

    def __init__(self, programs):
        self.programs, self.turns, self.merged = programs, [], 0

    def __getattr__(self, name):
        return getattr(self.programs, name)

    def turn(self, weights, rows, age, until, *sizes):
        self.turns.append((age, until))
        return self.programs.turn(weights, rows, age, until, *sizes)

    def arrange(self, sources, *places):
        self.merged += len(sources) > 1
        return self.programs.arrange(sources, *places)


def test_rows_that_have_ended_make_room_and_change_nothing():
    """Texts of very different lengths in many small batches, against one batch that holds all of them at once."""
    tree, key, prompts, batch, new = weights(SMALL), draw_key(0, "arm", 1, PLAIN, 0), prompts_of(1000, SMALL), 20, 200
    programs = Counted(programs_of(MODEL, (), SMALL, 128, EOS, batch, ONE))
    told = []
    (small,) = draw(
        programs, programs.weights([lambda: tree]), [key], range(1000), prompts, new, lambda *counts: told.append(counts)
    )
    order = np.random.default_rng(0).permutation(1000)
    (other,) = draw(programs, programs.weights([lambda: tree]), [key], order, [prompts[i] for i in order], new)
    assert same(other, [array[order] for array in small])
    assert programs.merged > 10
    assert [sum(counts) for counts in zip(*told, strict=True)] == [1000, small.length_N.sum()]
    assert small.length_N.max() == new
    drawn_tokens = sum(until - age for age, until in programs.turns) * batch / 2  # of either call
    waiting = sum(small.length_N[first : first + batch].max() for first in range(0, 1000, batch)) * batch
    assert small.length_N.sum() > 0.6 * drawn_tokens
    assert small.length_N.sum() < 0.35 * waiting, "were they to wait for the longest text of their batch"
    large = drawn(tree, key, prompts, vocabulary=SMALL, batch=1000, new=new)
    assert (small.id_NW != large.id_NW).any(axis=1).mean() <= 2e-3  # of another shape: nearly the same


@pytest.mark.parametrize("threads", [1, 3])
def test_how_many_batches_are_drawn_side_by_side_changes_nothing(monkeypatch, threads):
    tree, key, prompts = weights(SMALL), draw_key(0, "arm", 1, PLAIN, 0), prompts_of(300, SMALL)
    expected = drawn(tree, key, prompts, vocabulary=SMALL, batch=20, new=60)
    monkeypatch.setattr(turns, "at_once", lambda devices: threads)
    assert same(drawn(tree, key, prompts, vocabulary=SMALL, batch=20, new=60), expected)


def test_what_goes_wrong_in_one_thread_ends_all():
    class Broken(Counted):
        def turn(self, *arguments):
            if len(self.turns) >= 5:
                raise RuntimeError("five turns are enough")
            return super().turn(*arguments)

    programs = Broken(programs_of(MODEL, (), SMALL, 128, EOS, 20, ONE))
    tree, prompts = weights(SMALL), prompts_of(1000, SMALL)
    with pytest.raises(RuntimeError, match="five turns are enough"):
        draw(programs, programs.weights([lambda: tree]), [draw_key(0, "arm", 1, PLAIN, 0)], range(1000), prompts, 60)
    assert len(programs.turns) < 5 + at_once(ONE)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("natfp draws")]


@pytest.mark.slow
def test_across_batch_shapes_few_texts_change():
    """Stated: at most one of 1,000 texts of 24 tokens (benchmarks/changes.py: one of 30,000 of 48)."""
    tree, prompts, key = weights(LARGE), prompts_of(3000, LARGE), draw_key(0, "arm", 1, PLAIN, 0)
    one, other = (drawn(tree, key, prompts, vocabulary=LARGE, batch=batch, new=24) for batch in (256, 37))
    changed = (one.id_NW != other.id_NW).any(axis=1)
    assert changed.mean() <= 1e-3
    np.testing.assert_allclose(one.log_p_NW[~changed], other.log_p_NW[~changed], atol=1e-3)


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(config.Mesh(), marks=pytest.mark.slow),
        pytest.param(config.Mesh(replica=8), marks=pytest.mark.slow),
        config.Mesh(replica=2, fsdp=4),
    ],
)
def test_the_mesh_decides_neither_noise_nor_texts(axes):
    """Eight devices that hold 37 rows each draw, bitwise, the texts of one device that draws 37 at a time."""
    tree, prompts, key = weights(LARGE), prompts_of(8 * 37 + 5, LARGE), draw_key(0, "arm", 1, PLAIN, 0)
    over = mesh.make(axes, jax.devices()[:8])
    assert mesh.text_ways(over) == 8
    spread = jax.device_put(tree, mesh.replicated(over))
    one, eight = (
        drawn(there, key, prompts, vocabulary=LARGE, batch=37, new=40, devices=devices)
        for there, devices in ((tree, ONE), (spread, over))
    )
    assert same(one, eight)


@pytest.mark.slow
def test_over_tensor_few_texts_change():
    model = Model(width=32, layers=2, heads=2, kv_heads=2)
    tree, prompts, key = weights(LARGE, model=model), prompts_of(500, LARGE), draw_key(0, "arm", 1, PLAIN, 0)
    found = []
    for axes, count in ((config.Mesh(), 1), (config.Mesh(tensor=2), 2), (config.Mesh(data=2, tensor=2), 4)):
        over = mesh.make(axes, jax.devices()[:count])
        programs = programs_of(model, (), LARGE, 384, EOS, 100, over)
        laid = jax.device_put(tree, mesh.param_shardings(over, params.table(model, 384)))
        placed = programs.weights([partial(lambda one: one, laid)])
        if count > 1:
            assert placed["layers"][0]["attention"]["q"].addressable_shards[0].data.shape == (1, 32, 1, 16)
        found += draw(programs, placed, [key], range(500), prompts, 24)
    for other in found[1:]:
        changed = (found[0].id_NW != other.id_NW).any(axis=1)
        assert changed.mean() <= 4e-3
        np.testing.assert_allclose(found[0].log_p_NW[~changed], other.log_p_NW[~changed], atol=1e-3)


@pytest.mark.parametrize(
    ("replica", "arms"), [(4, 3), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((2, 2), (4, 1), (2, 1)))]
)
def test_draws_side_by_side_are_the_draws_one_by_one(replica, arms):
    trees, prompts = [weights(SMALL, seed) for seed in range(arms)], prompts_of(70, SMALL)
    keys = [draw_key(0, f"arm {arm}", 1, PLAIN, 0) for arm in range(arms)]
    over = mesh.make(config.Mesh(replica=replica), jax.devices()[: 2 * replica])
    alone = [drawn(tree, key, prompts, vocabulary=SMALL, batch=9) for tree, key in zip(trees, keys, strict=True)]
    together = drawn(trees, keys, prompts, vocabulary=SMALL, batch=9, devices=over)
    for one, other in zip(alone, together, strict=True):
        assert same(one, other)
    assert len({one.id_NW.tobytes() for one in alone}) == arms


@pytest.mark.slow
def test_a_half_precise_cache_changes_texts_and_stays_near():
    tree, prompts, key = weights(LARGE), prompts_of(500, LARGE), draw_key(0, "arm", 1, PLAIN, 0)
    full, half = (drawn(tree, key, prompts, vocabulary=LARGE, new=24, batch=500, cache=cache) for cache in (None, "bfloat16"))
    assert 0.001 < (full.id_NW != half.id_NW).any(axis=1).mean() < 0.3


def test_rows_are_a_power_of_two_that_memory_holds_and_texts_fill():
    model, one = Model(width=512, layers=8, heads=8), ONE

    def rows(texts=10**6, memory=10**11, slots=128, devices=one, cache=None):
        return rows_for(model, 2048, slots, texts, devices, memory, cache)

    assert rows() == 256
    every = at_once(one)
    assert (rows(texts=100 * every), rows(texts=1), rows(texts=33 * every)) == (128, 1, 64)
    found = [rows(memory=memory) for memory in range(10**8, 4 * 10**9, 10**8)]
    assert found == sorted(found)
    assert len(set(found)) > 3
    assert all(count & (count - 1) == 0 for count in found)
    short = 2 * 10**9
    assert rows(memory=short, cache="bfloat16") > rows(memory=short) > rows(memory=short, slots=512)
    over = mesh.make(config.Mesh(replica=2, data=2), jax.devices()[:4])
    assert rows(texts=200, devices=over) == 128  # on two devices each draw
    assert at_once(over) == 1


def test_slots_are_few_sizes():
    assert [slots_for(tokens) for tokens in (1, 16, 17, 64, 65, 1000)] == [16, 16, 32, 64, 128, 1024]
    assert [new_slots_for(tokens) for tokens in (1, 16, 17, 64, 65, 1000)] == [32, 32, 32, 64, 128, 1024]


def test_the_same_call_again_gives_the_same_bits():
    tree, prompts = weights(SMALL), prompts_of(500, SMALL)
    one, again = (drawn(tree, draw_key(0, "arm", 1, PLAIN, 0), prompts, vocabulary=SMALL) for _ in range(2))
    assert same(one, again)


# --- whose noise ------------------------------------------------------------------------------------------------------


def test_no_two_seeds_arms_checkpoints_strategies_or_draws_share_a_key():
    arms = ["a", "b", "0", "1", "a" * 64]
    asked = [{}, {"top_k": 5}, {"top_k": 6}, {"top_p": 0.5}, {"min_p": 0.5}, {"repetition_penalty": 1.1}, {"greedy": True}]
    strategies = [strategy_of(Sampling(**one), 1.0) for one in asked] + [strategy_of(Sampling(), 0.5)]
    addresses = list(itertools.product((0, 1, 2), arms, (0, 1, 2, 2**33), strategies, (0, 1, 2)))
    keys = {tuple(jax.random.key_data(draw_key(*address)).tolist()) for address in addresses}
    assert len(keys) == len(addresses)


def check_agreement(tree, prompts, a, b):
    """Independent draws of a distribution p agree with probability sum p²."""
    length = np.array([len(prompt) for prompt in prompts])
    tokens = np.array([[*prompt, *[EOS] * (10 - len(prompt))] for prompt in prompts])
    z_BV = np.asarray(every_logit(tree, tokens, SMALL), np.float64)[np.arange(len(prompts)), length - 1]
    p_BV = np.exp(z_BV - logsumexp(z_BV, axis=1, keepdims=True))
    chance_B = (p_BV**2).sum(axis=1)
    assert 0.02 < chance_B.mean() < 0.5
    z = ((a == b).mean() - chance_B.mean()) * len(a) / np.sqrt((chance_B * (1 - chance_B)).sum())
    assert abs(z) < norm.isf(5e-4)


@pytest.mark.parametrize(
    "other",
    [
        (0, "arm", 8, PLAIN, 1),
        (0, "arm", 16, PLAIN, 0),
        (0, "another", 8, PLAIN, 0),
        (1, "arm", 8, PLAIN, 0),
        (0, "arm", 8, (TopK(SMALL),), 0),
    ],
    ids=["draw", "step", "arm", "seed", "strategy"],
)
def test_equal_weights_agree_as_often_as_independent_draws_do(other):
    tree, prompts = weights(SMALL), prompts_of(5000, SMALL)
    a, b = (
        drawn(tree, draw_key(*address), prompts, vocabulary=SMALL).id_NW[:, 0] for address in ((0, "arm", 8, PLAIN, 0), other)
    )
    check_agreement(tree, prompts, a, b)


def test_prompts_of_equal_text_have_noise_of_their_own():
    """Also where their ids differ in the high word alone."""
    tree, prompts, key = weights(SMALL), [[EOS, 3, 4]] * 5000, draw_key(0, "arm", 8, PLAIN, 0)
    low, high = range(5000), [number << 32 for number in range(5000)]
    a, b = (drawn(tree, key, prompts, numbers, vocabulary=SMALL).id_NW[:, 0] for numbers in (low, high))
    assert a[0] == b[0]  # the same id, 0
    check_agreement(tree, prompts[:-1], a[1:], b[1:])
    check_agreement(tree, prompts[:-1], a[1:], a[:-1])


def test_places_of_a_text_have_noise_of_their_own():
    """Of tokens that a flat distribution gives, any two of a text are equal as often as chance has it."""
    flat = jax.tree.map(jnp.zeros_like, weights(SMALL))
    ids = drawn(flat, draw_key(0, "arm", 8, PLAIN, 0), [[EOS]] * 10_000, vocabulary=SMALL).id_NW
    whole = ids[(ids[:, :5] != EOS).all(axis=1)]
    for one, other in itertools.combinations(range(5), 2):
        equal, chance = (whole[:, one] == whole[:, other]).sum(), 1 / (SMALL - 1)
        assert binomtest(int(equal), len(whole), chance).pvalue > 1e-3
