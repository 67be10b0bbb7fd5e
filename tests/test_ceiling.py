"""Likelihoods are those that texts were drawn with, and the verdicts on texts of real models are sound."""

import dataclasses
import json
from functools import lru_cache

import jax
import numpy as np
import pytest
from scipy.stats import binom
from test_sample import EOS, LARGE, MODEL, ONE, PLAIN, SMALL, STRATEGIES, drawn, every_logit, prompts_of, reference, weights

from natfp_jax import config, mesh
from natfp_jax.attribution import Comparison, attribute, ceiling
from natfp_jax.ceiling import log_likelihoods
from natfp_jax.config import Attribution
from natfp_jax.ladder import prepare
from natfp_jax.sample import draw_key
from natfp_jax.strategy import Greedy, TopK


def scored(tree, prompts, texts, vocabulary, strategy=STRATEGIES[0], batch=100, devices=1, replica=1):
    over = mesh.make(config.Mesh(replica=replica), jax.devices()[:devices])
    tree = jax.device_put(tree, mesh.replicated(over))
    return log_likelihoods(tree, prompts, texts, MODEL, strategy, vocabulary, batch, over).sum(axis=1)


def texts_of(found):
    return [ids[:length].tolist() for ids, length in zip(found.id_NW, found.length_N, strict=True)]


def by_hand(tree, prompts, texts, vocabulary, strategy):
    """Each text under the definition of the effective distribution, in float64."""
    tokens = np.zeros((len(prompts), 22), np.int32)
    for row, prompt, text in zip(tokens, prompts, texts, strict=True):
        row[: len(prompt) + len(text)] = prompt + text
    z_BTV = np.asarray(every_logit(tree, tokens, vocabulary))
    return np.array(
        [
            sum(
                np.log(reference(z_TV[len(prompt) - 1 + n], strategy, prompt + text[:n])[token]) for n, token in enumerate(text)
            )
            for z_TV, prompt, text in zip(z_BTV, prompts, texts, strict=True)
        ]
    )


# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "strategy"), [(SMALL, STRATEGIES[0]), (LARGE, STRATEGIES[2]), (LARGE, STRATEGIES[3])])
def test_recorded_and_teacher_forced_likelihoods_are_those_of_the_forward_pass(vocabulary, strategy):
    tree, prompts = weights(vocabulary), prompts_of(250, vocabulary)
    found = drawn(tree, draw_key(0, "arm", 1, PLAIN, 0), prompts, vocabulary=vocabulary, strategy=strategy)
    texts = texts_of(found)
    expected = by_hand(tree, prompts, texts, vocabulary, strategy)
    recorded, forced = found.log_p_NW.sum(axis=1), scored(tree, prompts, texts, vocabulary, strategy)
    if strategy == STRATEGIES[0]:
        ended = np.array([text[-1] == EOS for text in texts])
        assert 0.1 < ended.mean() < 0.95
        certain = np.ones(250, bool)
    else:  # an id on the edge of top-k or top-p may be in or out by a rounding
        certain = np.isfinite(expected) & np.isfinite(forced)
        assert certain.mean() > 0.98
    assert len({len(prompt) for prompt in prompts}) > 5
    np.testing.assert_allclose(recorded[certain], expected[certain], atol=2e-4)
    np.testing.assert_allclose(forced[certain], expected[certain], atol=2e-4)
    assert (recorded < 0).all()


@pytest.mark.parametrize("vocabulary", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_texts_that_are_given_have_the_likelihood_of_the_forward_pass_under_another_model(vocabulary):
    """The sampler scores what it did not draw, of each draw the texts that it is given."""
    trees, prompts = [weights(vocabulary, seed=seed) for seed in range(3)], prompts_of(300, vocabulary)
    keys = [draw_key(0, f"arm {number}", 1, PLAIN, 0) for number in range(3)]
    theirs = [drawn(tree, key, prompts, vocabulary=vocabulary) for tree, key in zip(trees, keys, strict=True)]
    moved = [theirs[(number + 1) % 3] for number in range(3)]
    for some, texts in (([0], moved[:1]), ([0, 1, 2], moved)):
        over = mesh.make(config.Mesh(replica=len(some)), jax.devices()[: len(some)])
        laid = [jax.device_put(trees[number], mesh.replicated(over)) for number in some]
        ids = [one.id_NW for one in texts]
        found = drawn(laid, keys[: len(some)], prompts, vocabulary=vocabulary, batch=100, devices=over, given=ids)
        for tree, one, scores in zip(trees, texts, found, strict=False):
            np.testing.assert_array_equal(scores.id_NW, one.id_NW)
            np.testing.assert_array_equal(scores.length_N, one.length_N)
            expected = by_hand(tree, prompts, texts_of(one), vocabulary, ())
            np.testing.assert_allclose(scores.log_p_NW.sum(axis=1), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("strategy", "dtype", "cache"),
    [
        (STRATEGIES[2], "float32", "bfloat16"),
        ((Greedy(),), "bfloat16", None),
        *(
            pytest.param(strategy, "float32", "bfloat16", marks=pytest.mark.slow)
            for strategy in (*STRATEGIES[:2], STRATEGIES[3], (Greedy(),))
        ),
        *(pytest.param(strategy, "bfloat16", None, marks=pytest.mark.slow) for strategy in STRATEGIES),
    ],
)
def test_in_low_precision_a_draw_given_to_its_own_sampler_has_what_was_recorded(strategy, dtype, cache):
    """Where a forward pass would say of some of them that they cannot be drawn."""
    model, key, prompts = dataclasses.replace(MODEL, dtype=dtype), draw_key(0, "arm", 1, PLAIN, 0), prompts_of(300, LARGE)
    made = {"vocabulary": LARGE, "strategy": strategy, "model": model, "cache": cache, "batch": 64, "new": 40}
    one = drawn(weights(LARGE), key, prompts, **made)
    again = drawn(weights(LARGE), draw_key(1, "other", 2, PLAIN, 3), prompts, given=[one.id_NW], **made)
    np.testing.assert_array_equal(again.id_NW, one.id_NW)
    np.testing.assert_array_equal(again.log_p_NW, one.log_p_NW)
    assert np.isfinite(one.log_p_NW).all()
    if strategy == (Greedy(),):
        forced = log_likelihoods(weights(LARGE), prompts, texts_of(one), model, strategy, LARGE, 100, ONE)
        assert np.isneginf(forced).any()


def test_a_drawn_eos_counts_and_a_truncation_adds_nothing():
    tree, prompt = weights(SMALL), [EOS, 7, 8]
    open_end, ended, longer = scored(tree, [prompt] * 3, [[4, 5], [4, 5, EOS], [4, 5, 6]], SMALL)
    p_V = reference(every_logit(tree, np.array([[EOS, 7, 8, 4, 5, 0, 0]]), SMALL)[0, 4], ())
    assert ended - open_end == pytest.approx(np.log(p_V[EOS]), abs=1e-5)
    assert longer - open_end == pytest.approx(np.log(p_V[6]), abs=1e-5)


def test_what_the_strategy_cannot_draw_has_likelihood_zero():
    tree, prompt = weights(SMALL), [EOS, 7, 8]
    p_V = reference(every_logit(tree, np.array([[EOS, 7, 8, 0]]), SMALL)[0, 2], ())
    order = np.argsort(-p_V[:SMALL])
    texts = [[int(token)] for token in order]
    found = scored(tree, [prompt] * SMALL, texts, SMALL, (TopK(3),))
    np.testing.assert_allclose(found[:3], np.log(p_V[order[:3]] / p_V[order[:3]].sum()), atol=1e-5)
    assert np.isneginf(found[3:]).all()


def test_a_likelihood_depends_on_neither_companions_nor_batch_nor_mesh():
    tree, prompts = weights(SMALL), prompts_of(130, SMALL)
    texts = texts_of(drawn(tree, draw_key(0, "arm", 1, PLAIN, 0), prompts, vocabulary=SMALL))
    whole = scored(tree, prompts, texts, SMALL)
    order = np.random.default_rng(0).permutation(130)
    permuted = scored(tree, [prompts[i] for i in order], [texts[i] for i in order], SMALL)
    np.testing.assert_array_equal(permuted, whole[order])
    for replica in (1, 2, 8):
        found = scored(tree, prompts, texts, SMALL, batch=64, devices=8, replica=replica)
        np.testing.assert_allclose(found, whole, atol=1e-4)


# --- verdicts on texts of models --------------------------------------------------------------------------------------


class Ids:
    """A tokenizer of texts that are numbers."""

    def encode_batch(self, texts):
        return [[int(number) for number in text.split()] for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))


def compared(name, texts, labels):
    """A rung over equally many texts of each class, and their comparison; prompt i is of document i."""
    prompts = [str(i) for label in dict.fromkeys(labels) for i in range(labels.count(label))]
    rung = prepare("subwords", [" ".join(map(str, text)) for text in texts], Ids())
    return rung, Comparison(name, np.arange(len(texts)), labels, prompts, prompts)


def arms_of(spread, count=600, arms=2):
    """Models that differ by `spread`, their texts, and every text's likelihood under each."""
    base, prompts = weights(SMALL), prompts_of(count, SMALL)
    trees = [
        jax.tree.map(lambda a, b: a + spread * (b - a), base, weights(SMALL, seed=1 + arm)) if spread else base
        for arm in range(arms)
    ]
    draws = [drawn(tree, draw_key(0, f"arm {arm}", 1, PLAIN, 0), prompts, vocabulary=SMALL) for arm, tree in enumerate(trees)]
    texts = [text for found in draws for text in texts_of(found)]
    likelihood_NA = np.stack([scored(tree, prompts * arms, texts, SMALL) for tree in trees], axis=1)
    for arm, found in enumerate(draws):
        likelihood_NA[arm * count : (arm + 1) * count, arm] = found.log_p_NW.sum(axis=1)
    return texts, [f"arm {arm}" for arm in range(arms) for _ in range(count)], likelihood_NA


@lru_cache
def verdict(spread, arms=2):
    texts, labels, likelihood_NA = arms_of(spread, arms=arms)
    rung, comparison = compared(f"{spread} {arms}", texts, labels)
    settings = Attribution()
    bound = ceiling(likelihood_NA, list(dict.fromkeys(labels)), comparison, settings)
    return attribute(rung, comparison, settings, bound).result, bound


@pytest.mark.parametrize(("spread", "arms"), [(0.01, 2), (0.1, 2), (0.3, 2), (0.2, 3)])
def test_no_classifier_beats_the_likelihood_ceiling(spread, arms):
    result, bound = verdict(spread, arms)
    error = np.sqrt(bound.accuracy * (1 - bound.accuracy) / result.test_texts + 0.25 / result.test_texts)
    assert result.accuracy <= bound.accuracy + 3.3 * error
    assert bound.accuracy > 1 / arms - 3.3 * error


def test_the_ceiling_rises_with_the_difference_of_the_models():
    bounds = [verdict(spread)[1].accuracy for spread in (0.01, 0.1, 0.3)]  # above, nearly every text is recognised
    assert bounds == sorted(bounds)
    assert bounds[0] < 0.75


def test_very_different_models_are_told_apart():
    """The positive control: the instrument finds what is surely there."""
    result, bound = verdict(1.0)
    assert bound.accuracy > 0.95
    assert result.accuracy > 0.7
    assert result.p_value == 1e-4


def test_nulls_of_one_model_are_rejected_as_often_as_the_test_claims():
    """Sixty pairs of draws of one model under the same prompts; all but one of 1,000 such series stay within the bound."""
    pairs, count = 60, 200
    tree, prompts = weights(SMALL), prompts_of(count, SMALL)
    settings = dataclasses.replace(Attribution(), bootstraps=999, regularisation=(0.1, 1.0))
    found = []
    for pair in range(pairs):
        draws = [drawn(tree, draw_key(0, "arm", 1, PLAIN, 2 * pair + side), prompts, vocabulary=SMALL) for side in range(2)]
        texts = [text for one in draws for text in texts_of(one)]
        rung, comparison = compared(f"null {pair}", texts, ["draw 0"] * count + ["draw 1"] * count)
        found.append(attribute(rung, comparison, settings).result)
    low, high = binom.interval(0.999, pairs, 0.05)
    assert low <= sum(result.p_value <= 0.05 for result in found) <= high
    accuracies = np.array([result.accuracy for result in found])
    assert abs(accuracies.mean() - 0.5) < 4 * 0.5 / np.sqrt(pairs * found[0].test_texts)
    assert len({json.dumps(result.confusion) for result in found}) > pairs / 2
