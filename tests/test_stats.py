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


def test_auc_interval_agrees_with_resampling_documents_one_by_one():
    random = default_rng(0)
    for classes in (2, 3):
        document = np.repeat(np.arange(60), 2 * classes)
        labels = np.tile(np.repeat(np.arange(classes), 2), 60)
        scores = random.dirichlet(np.ones(classes), len(labels)).round(1) + 0.5 * np.eye(classes)[labels]  # with ties
        scores /= scores.sum(axis=1, keepdims=True)
        rows = [np.flatnonzero(document == d) for d in range(60)]
        drawn = [np.concatenate([rows[d] for d in random.integers(0, 60, 60)]) for _ in range(300)]
        areas = [stats.pairwise_auc(scores[some], labels[some]) for some in drawn]
        interval = stats.auc_interval(scores, labels, document, random, 1000)
        assert interval == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.02)  # about 5 Monte Carlo errors
        assert interval[0] < stats.pairwise_auc(scores, labels) < interval[1]


# --- the sign test ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=9))
def test_the_sign_test_is_the_permutation_test_by_enumeration(predicted):
    """Of every way to swap the labels at each prompt, the part with at least as many hits."""
    predicted_N, labels = np.array(predicted).ravel(), np.tile([0, 1], len(predicted))
    prompts = np.repeat(np.arange(len(predicted)), 2)
    hits = np.count_nonzero(predicted_N == labels)
    law = law_by_enumeration(predicted_N, labels, prompts)
    exact = sum(chance for number, chance in law.items() if number >= hits)
    assert stats.sign_p(predicted_N == labels, labels, prompts) == pytest.approx(exact)


def test_the_sign_test_is_for_two_classes_with_one_text_each():
    assert stats.sign_p([1, 1, 1], [0, 1, 2], ["a", "a", "a"]) is None
    assert stats.sign_p([1, 1, 1, 1], [0, 0, 1, 1], ["a"] * 4) is None


# --- shared noise -----------------------------------------------------------------------------------------------------


def test_agreements_of_independent_draws_are_as_often_as_they_should_be():
    """Uniform among many pairs of draws, and beyond doubt where a tenth of the noise is shared."""
    random, trials, p_values, shared = default_rng(0), 300, [], []
    for _ in range(200):
        chances = random.dirichlet(np.full(20, 0.3), trials)
        first, again = (np.array([random.choice(20, p=row) for row in chances]) for _ in range(2))
        held = chances[np.arange(trials), first]
        p_values.append(stats.agreement_p(first == again, held))
        coupled = np.where(np.arange(trials) < trials // 5, first, again)
        shared.append(stats.agreement_p(first == coupled, held))
    assert np.count_nonzero(np.array(p_values) <= 0.05) <= binom.isf(1e-6, 200, 0.05)
    assert np.count_nonzero(np.array(p_values) <= 0.5) >= binom.isf(1 - 1e-6, 200, 0.4)  # counts are discrete
    assert max(shared) < 0.05


def test_of_very_many_agreements_the_normal_law_is_near_the_exact_one(monkeypatch):
    """As near as the theorem of Berry and Esseen has it (its constant: Shevtsova 2010)."""
    chances = default_rng(0).dirichlet([1, 4], 21_000)[:, 0]
    variance = chances * (1 - chances)
    bound = 0.56 * (variance * (chances**2 + (1 - chances) ** 2)).sum() / variance.sum() ** 1.5
    for more in (-150, 0, 60, 150):
        same = np.arange(21_000) < round(chances.sum()) + more
        near = stats.agreement_p(same, chances)
        monkeypatch.setattr(stats, "_EXACT", 10**6)
        assert near == pytest.approx(stats.agreement_p(same, chances), abs=bound)
        monkeypatch.undo()


@given(st.lists(st.integers(0, 12), min_size=2), st.integers(0, 9), st.integers(1, 40))
def test_first_documents_are_whole_and_two_at_least(documents, seed, rows):
    named = list(map(str, documents))
    inside = stats.first_documents(named, seed, rows)
    kept = {name for name, one in zip(named, inside, strict=True) if one}
    assert not kept & {name for name, one in zip(named, inside, strict=True) if not one}
    assert len(kept) >= min(2, len(set(named)))
    assert inside.sum() <= rows or len(kept) <= 2
    assert (stats.first_documents(named[::-1], seed, rows) == inside[::-1]).all()


def test_agreements_are_counted_exactly():
    chances = [0.2, 0.5, 0.9]
    law = [
        np.prod([p if hit else 1 - p for p, hit in zip(chances, hits, strict=True)])
        for hits in itertools.product((0, 1), repeat=3)
    ]
    number = [sum(hits) for hits in itertools.product((0, 1), repeat=3)]
    two = sum(p for p, n in zip(law, number, strict=True) if n >= 2)
    assert stats.agreement_p([True, False, True], chances) == pytest.approx(two)
    assert stats.agreement_p([True, True], [1.0, 1.0000001]) == 1.0


# --- the share of the ceiling -----------------------------------------------------------------------------------------


def test_a_share_covers_its_truth_and_gains_from_pairing():
    """Documents that are hard for both cancel: the interval of the ratio is narrower than that of the accuracy alone."""
    covered, runs, widths = 0, 300, []
    for run in range(runs):
        random = default_rng(run)
        ease = np.clip(random.normal(0, 0.15, 300), -0.2, 0.2).repeat(4)
        bound = random.random(1200) < 0.75 + ease
        correct = np.where(random.random(1200) < 0.6, bound, random.random(1200) < 0.5)  # reads 60 % of what the bound does
        low, high = stats.share_interval(correct, bound, 0.5, np.arange(300).repeat(4), random, 400)
        covered += low <= 0.6 <= high
        widths.append(
            (high - low, 4 * np.subtract(*stats.bootstrap_interval(correct, np.arange(300).repeat(4), random, 400)[::-1]))
        )
    assert binom.isf(1 - 1e-6, runs, 0.93) <= covered <= binom.isf(1e-6, runs, 0.96)
    assert np.mean([share < accuracy for share, accuracy in widths]) > 0.9


def test_there_is_no_share_of_no_excess():
    random = default_rng(0)
    assert stats.share_interval([1, 0] * 50, [1, 0] * 50, 0.5, np.arange(100), random, 999) is None


# --- intervals over runs ----------------------------------------------------------------------------------------------


def simulated_levels(random, levels, documents, spread):
    """Hits of every pair of levels, whose accuracy is chance plus the distance of what the levels are."""
    place = random.normal(size=(levels, 3))
    pairs = list(itertools.combinations(range(levels), 2))
    chance = np.array([0.5 + spread * np.linalg.norm(place[a] - place[b]) for a, b in pairs])
    return [(f"{a}", f"{b}") for a, b in pairs], random.random((len(pairs), documents)) < np.clip(chance, 0, 1)[:, None]


def test_an_interval_over_levels_is_of_runs_in_general():
    spread, runs, documents = 0.1, 150, 400
    many = default_rng(0).normal(size=(2, 100_000, 3))
    truth = 0.5 + spread * np.linalg.norm(many[0] - many[1], axis=1).mean()
    covered = of_these = 0
    for run in range(runs):
        random = default_rng(1 + run)
        pairs, correct = simulated_levels(random, 8, documents, spread)
        low, high = stats.levels_interval(pairs, correct, np.arange(documents), random, 300)
        covered += low <= truth <= high
        low, high = stats.bootstrap_interval(correct.ravel(), np.tile(np.arange(documents), len(pairs)), random, 300)
        of_these += low <= truth <= high
    assert binom.isf(1 - 1e-6, runs, 0.85) <= covered
    assert of_these < covered / 2  # an interval of these runs says little of others


def test_an_interval_over_levels_needs_five():
    pairs, correct = simulated_levels(default_rng(0), 4, 10, 0.1)
    with pytest.raises(ValueError, match="got 4 levels, expected 5"):
        stats.levels_interval(pairs, correct, np.arange(10), default_rng(0), 999)


# --- several texts in one decision ------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(0, 99))
def test_groups_are_of_whole_prompts_and_of_one_size(prompts, size, sources, seed):
    prompt = np.tile(np.arange(prompts), sources)
    document = prompt // 3
    group = stats.grouped(prompt, document, size, default_rng(seed))
    assert (group.reshape(sources, prompts) == group[:prompts]).all()
    numbers, counts = np.unique(group[:prompts], return_counts=True)
    kept = numbers >= 0
    assert (counts[kept] == size).all()
    assert numbers[kept].tolist() == list(range(prompts // size))


def test_a_document_is_in_as_few_groups_as_can_be():
    group = stats.grouped(np.arange(300), np.arange(300) // 3, 30, default_rng(0))
    assert all(len(set(group[document : document + 3])) == 1 for document in range(0, 300, 3))


def test_sums_are_of_one_source_and_one_group():
    log = np.arange(12.0).reshape(6, 2)
    sums, labels, groups = stats.summed(log, list("xxxyyy"), [0, 0, 0, 1, 1, 1], np.array([0, 0, -1, 0, 0, -1]))
    assert sums.tolist() == [[2, 4], [14, 16]]
    assert (labels.tolist(), groups.tolist()) == (["x", "y"], [0, 0])
