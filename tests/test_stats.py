"""The statistics against exact distributions, brute force, simulation and other implementations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.stats import binom, mannwhitneyu
from sklearn.metrics import log_loss, roc_auc_score

from natfp_jax import stats

IDS = st.text(max_size=8)


# --- split ------------------------------------------------------------------------------------------------------------


@given(rows=st.lists(IDS, min_size=1), others=st.lists(IDS), seed=st.integers(0, 2**32 - 1), order=st.randoms())
def test_a_document_keeps_its_side_whatever_else_there_is(rows, others, seed, order):
    alone = {document: stats.split([document], seed, 0.2, 0.4)[0] for document in rows}
    mixed = rows + others
    order.shuffle(mixed)
    parts = stats.split(mixed, seed, 0.2, 0.4)
    assert set(parts) <= set(stats.PARTS)
    assert all(part == alone.get(document, part) for document, part in zip(mixed, parts, strict=True))
    assert len(set(zip(mixed, parts, strict=True))) == len(set(mixed))


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.4), (0.3, 0.05)])
def test_fractions_lie_within_binomial_bounds(validation, test):
    documents = [f"document {i}" for i in range(5000)]
    for seed in range(3):
        parts = stats.split(documents, seed, validation, test)
        for part, fraction in [("validation", validation), ("test", test)]:
            low, high = binom.interval(1 - 1e-6, len(documents), fraction)
            assert low <= np.count_nonzero(parts == part) <= high


def test_seeds_give_independent_splits():
    documents = [str(i) for i in range(4000)]
    both = (stats.split(documents, 0, 0.1, 0.5) == "test") & (stats.split(documents, 1, 0.1, 0.5) == "test")
    low, high = binom.interval(1 - 1e-6, len(documents), 0.25)
    assert low <= np.count_nonzero(both) <= high


def test_a_larger_test_fraction_only_adds_documents():
    documents = [str(i) for i in range(500)]
    small, large = (stats.split(documents, 0, 0.1, test) == "test" for test in (0.3, 0.4))
    assert large[small].all()
    assert large.sum() > small.sum()


# --- permutation ------------------------------------------------------------------------------------------------------


def law_by_enumeration(predicted, labels, prompts):
    """The exact law of hits: every permutation of labels within every prompt, spelled out."""
    law = {0: 1.0}
    for prompt in sorted(set(prompts)):
        own = [i for i, p in enumerate(prompts) if p == prompt]
        orders = list(itertools.permutations([labels[i] for i in own]))
        new: dict[int, float] = {}
        for order in orders:
            hits = sum(predicted[i] == label for i, label in zip(own, order, strict=True))
            for before, chance in law.items():
                new[before + hits] = new.get(before + hits, 0) + chance / len(orders)
        law = new
    return law


@pytest.mark.parametrize("seed", range(8))
def test_p_equals_enumeration_for_prompts_of_unequal_size(seed):
    random = default_rng(seed)
    sizes = random.integers(1, 6, size=6)
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    labels, predicted = random.integers(0, 3, size=(2, len(prompts)))
    law = law_by_enumeration(predicted.tolist(), labels.tolist(), prompts.tolist())
    observed = np.count_nonzero(predicted == labels)
    exact = sum(chance for hits, chance in law.items() if hits >= observed)
    drawn = 20_000
    p = stats.permutation_p(predicted, labels, prompts, random, drawn)
    low, high = binom.interval(1 - 1e-6, drawn, exact)
    assert low <= p * (1 + drawn) - 1 <= high


def test_p_equals_the_sign_test_where_each_prompt_has_one_text_of_each_of_two_classes():
    # A prompt whose two texts are given the same class has one hit for certain; the others have two or none, a fair coin.
    random = default_rng(0)
    pairs = 300
    labels, prompts = np.tile([0, 1], pairs), np.repeat(np.arange(pairs), 2)
    predicted = np.where(random.random(2 * pairs) < 0.56, labels, 1 - labels)
    hits = (predicted == labels).reshape(pairs, 2).sum(axis=1)
    exact = binom.sf(np.count_nonzero(hits == 2) - 1, np.count_nonzero(hits != 1), 0.5)
    assert 0.001 < exact < 0.5
    drawn = 50_000
    p = stats.permutation_p(predicted, labels, prompts, random, drawn)
    low, high = binom.interval(1 - 1e-6, drawn, exact)
    assert low <= p * (1 + drawn) - 1 <= high


@pytest.mark.parametrize("per_prompt", [[0, 1], [0, 1, 2], [0, 0, 1, 1]])
def test_size_of_the_test_under_the_null(per_prompt):
    random = default_rng(1)
    nulls, prompts = 1000, 40
    labels = np.tile(per_prompt, prompts)
    prompt = np.repeat(np.arange(prompts), len(per_prompt))
    p = np.array(
        [
            stats.permutation_p(random.choice(np.unique(per_prompt), len(labels)), labels, prompt, random, 199)
            for _ in range(nulls)
        ]
    )
    for level in (0.05, 0.2, 0.5):
        assert np.count_nonzero(p <= level) <= binom.isf(1e-6, nulls, level)
    assert np.count_nonzero(p <= 0.5) >= binom.isf(1 - 1e-6, nulls, 0.3)  # not only valid but of use: ties cost a part, no more


def test_p_of_a_perfect_classifier_is_the_smallest_there_is():
    labels, prompts = np.tile([0, 1], 50), np.repeat(np.arange(50), 2)
    assert stats.permutation_p(labels, labels, prompts, default_rng(0), 999) == 1 / 1000


def test_p_is_one_where_nothing_can_be_permuted():
    labels = np.array([0, 1, 0, 1])
    assert stats.permutation_p(labels, labels, np.arange(4), default_rng(0), 999) == 1.0
    assert stats.permutation_p(np.zeros(4, int), labels, [0, 0, 1, 1], default_rng(0), 999) == 1.0


def test_p_does_not_depend_on_the_order_of_rows_or_the_names_of_classes():
    random = default_rng(3)
    labels, prompts = np.tile([0, 1, 2], 30), np.repeat(np.arange(30), 3)
    predicted = random.integers(0, 3, size=90)
    shuffled = random.permutation(90)
    names = np.array(["z", "a", "m"])
    p = stats.permutation_p(predicted, labels, prompts, default_rng(0), 999)
    assert p == stats.permutation_p(predicted[shuffled], labels[shuffled], prompts[shuffled], default_rng(0), 999)
    assert p == stats.permutation_p(names[predicted], names[labels], prompts, default_rng(0), 999)


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_interval_covers_what_it_claims_when_texts_of_a_document_resemble_each_other():
    random = default_rng(0)
    runs, documents, texts = 400, 150, 4
    document = np.repeat(np.arange(documents), texts)
    covered = 0
    for _ in range(runs):
        ease = random.beta(3, 2, size=documents)  # mean 0.6, shared by the texts of a document
        correct = random.random(documents * texts) < ease[document]
        low, high = stats.bootstrap_interval(correct, document, random, 400)
        covered += low <= 0.6 <= high
    assert binom.isf(1 - 1e-6, runs, 0.93) <= covered <= binom.isf(1e-6, runs, 0.96)


def test_copies_of_a_text_do_not_narrow_the_interval():
    random = default_rng(0)
    correct, document = random.random(200) < 0.6, np.arange(200)
    once = stats.bootstrap_interval(correct, document, default_rng(1), 2000)
    often = stats.bootstrap_interval(np.repeat(correct, 10), np.repeat(document, 10), default_rng(1), 2000)
    assert often == pytest.approx(once)


def test_interval_agrees_with_resampling_documents_one_by_one():
    random = default_rng(0)
    document = np.repeat(np.arange(80), random.integers(1, 6, size=80))
    correct = random.random(len(document))
    rows = [np.flatnonzero(document == d) for d in range(80)]
    means = [correct[np.concatenate([rows[d] for d in random.integers(0, 80, 80)])].mean() for _ in range(4000)]
    interval = stats.bootstrap_interval(correct, document, random, 4000)
    assert interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)  # about 5 Monte Carlo errors


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_interval_of_constant_scores_has_no_width(value):
    document = np.repeat(np.arange(10), 3)
    assert stats.bootstrap_interval(np.full(30, value), document, default_rng(0), 999) == (value, value)


# --- Holm -------------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last may not fall below the one before
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]).tolist() == []
    assert stats.holm([0.7, 0.8]).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_definition(p_values):
    """Step down: the i-th smallest of m is rejected at a while it and all before it are <= a / (m - i)."""
    adjusted = stats.holm(p_values)
    m = len(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    for level in adjusted[adjusted < 1]:
        level = math.nextafter(level * (1 + 1e-9), 1)
        rejected = set()
        for i, index in enumerate(sorted(range(m), key=lambda j: p_values[j])):
            if p_values[index] * (m - i) > level:
                break
            rejected.add(index)
        assert rejected == set(np.flatnonzero(adjusted <= level))


# --- scores -----------------------------------------------------------------------------------------------------------


def softmax(random, texts, classes):
    odds = np.exp(random.normal(size=(texts, classes)))
    return odds / odds.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_auc_is_the_mean_of_mann_whitney_over_ordered_pairs(classes):
    random = default_rng(0)
    labels = np.repeat(np.arange(classes), np.arange(classes) + 20)  # unequal classes: every pair still counts the same
    probabilities = softmax(random, len(labels), classes)
    by_pair = []
    for a, b in itertools.permutations(range(classes), 2):
        own, other = probabilities[labels == a, a], probabilities[labels == b, a]
        by_pair.append(mannwhitneyu(own, other).statistic / (len(own) * len(other)))
    assert stats.pairwise_auc(probabilities, labels) == pytest.approx(np.mean(by_pair), rel=1e-12)


def test_auc_of_two_classes_is_the_usual_one():
    probabilities, labels = softmax(default_rng(0), 40, 2), np.tile([0, 1], 20)
    assert stats.pairwise_auc(probabilities, labels) == roc_auc_score(labels, probabilities[:, 1])


@pytest.mark.parametrize("classes", [2, 3])
def test_bits_are_the_number_of_classes_less_the_log_loss(classes):
    probabilities, labels = softmax(default_rng(0), 30, classes), np.arange(30) % classes
    expected = math.log2(classes) - log_loss(labels, probabilities) / math.log(2)
    assert expected < 0  # random guesses with confidence: not clipped
    assert stats.bits_per_text(probabilities, labels) == pytest.approx(expected)


def test_bits_at_the_ends():
    labels = np.array([0, 1])
    assert stats.bits_per_text(np.eye(2), labels) == 1.0
    assert stats.bits_per_text(np.full((2, 2), 0.5), labels) == 0.0
    assert stats.bits_per_text(np.eye(2), labels[::-1]) == 1 - 1022
