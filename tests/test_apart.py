"""Held-out levels: relabelling against refitting, planted traces, traces of single runs, and the size of the test."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.stats import binom

from natfp_jax import stats
from natfp_jax.apart import Crossed, held_out, relabelling_p
from natfp_jax.classify import featurise
from natfp_jax.config import Attribution
from natfp_jax.ladder import Counted

SETTINGS = Attribution(regularisation=(0.01,), bootstraps=999)
PIECES = 24


def runs_of(random, levels, strata, factor=0.0, other=0.0, own=0.0):
    """Chances of pieces of each run, [levels, strata, pieces]: log-linear effects of so many standard deviations."""
    effects = (
        factor * random.normal(size=(levels, 1, PIECES)),
        other * random.normal(size=(1, strata, PIECES)),
        own * random.normal(size=(levels, strata, PIECES)),
    )
    chances = np.exp(sum(effects))
    return chances / chances.sum(axis=-1, keepdims=True)


def texts_of(random, chances_LSV, documents, length=20):
    """A rung and a grid of such runs, with a text of every run at each document."""
    levels, strata, _ = chances_LSV.shape
    names = np.array([f"w{v}" for v in range(PIECES)])
    texts, of = [], []
    for level, stratum in itertools.product(range(levels), range(strata)):
        drawn = random.choice(names, size=(documents, length), p=chances_LSV[level, stratum])
        texts += [" ".join(row) for row in drawn]
        of += [(f"level {level}", f"stratum {stratum}", f"document {d}") for d in range(documents)]
    grid = Crossed("a grid", np.arange(len(texts)), *(list(column) for column in zip(*of, strict=True)))
    return Counted(featurise("words", texts, None)), grid


def judged(seed, levels, strata, documents, **effects):
    random = default_rng(seed)
    return held_out(*texts_of(random, runs_of(random, levels, strata, **effects), documents), SETTINGS)


# --- the test ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "strata"), [(2, 3), (3, 2)])
def test_relabelling_is_what_refitting_under_every_relabelling_gives(levels, strata):
    random = default_rng(1)
    rung, grid = texts_of(random, runs_of(random, levels, strata, factor=0.15, own=0.4), documents=60)
    found = held_out(rung, grid, SETTINGS)
    names, rows = sorted(set(grid.levels)), sorted(set(grid.strata))
    accuracies = []
    for orders in itertools.product(itertools.permutations(names), repeat=strata):  # the first stratum's too: all are counted
        new = {
            (level, stratum): label
            for stratum, order in zip(rows, orders, strict=True)
            for level, label in zip(names, order, strict=True)
        }
        labels = [new[pair] for pair in zip(grid.levels, grid.strata, strict=True)]
        accuracies.append(held_out(rung, replace(grid, levels=labels), SETTINGS).one_accuracy)
    assert len(set(accuracies)) > 2
    assert found.p_value == pytest.approx(np.mean(np.array(accuracies) >= found.one_accuracy - 1e-9))
    assert found.least_p == 1 / found.relabellings
    assert found.exact


@given(st.integers(2, 3), st.integers(2, 3), st.randoms(use_true_random=False))
def test_p_does_not_depend_on_what_levels_and_strata_are_called(levels, strata, randomly):
    random = default_rng(randomly.randrange(2**32))
    counts = random.integers(0, 5, size=(strata, strata, levels, levels))
    found = relabelling_p(counts, default_rng(0), 9_999)
    a, b = random.permutation(strata), random.permutation(levels)
    renamed = counts[np.ix_(a, a, b, b)]
    assert relabelling_p(renamed, default_rng(1), 9_999) == found
    assert found.least_p <= found.p_value <= 1


def test_of_two_by_two_the_least_p_is_a_half_and_of_four_by_four_far_below_one_in_a_hundred():
    perfect = {size: np.broadcast_to(9 * np.eye(size, dtype=int), (size, size, size, size)) for size in (2, 3, 4, 5)}
    found = {size: relabelling_p(counts, default_rng(0), 9_999) for size, counts in perfect.items()}
    assert (found[2].p_value, found[2].least_p, found[2].exact) == (0.5, 0.5, True)
    assert (found[3].p_value, found[3].exact) == (1 / 36, True)
    assert (found[4].p_value, found[4].exact) == (1 / 24**3, True)
    assert (found[5].p_value, found[5].least_p, found[5].exact) == (1e-4, 1e-4, False)


def test_random_relabellings_agree_with_all_of_them(monkeypatch):
    counts = default_rng(3).integers(0, 30, size=(3, 3, 3, 3)) + 4 * np.eye(3, dtype=int)
    every = relabelling_p(counts, default_rng(0), 9_999)
    monkeypatch.setattr("natfp_jax.apart.EXACT", 1)
    drawn = relabelling_p(counts, default_rng(0), 99_999)
    assert not drawn.exact
    assert 0 < every.p_value < 0.9
    assert drawn.p_value == pytest.approx(every.p_value, abs=5 * np.sqrt(0.25 / 99_999))


def test_where_runs_differ_and_the_factor_does_nothing_the_test_has_its_size():
    found = [judged(seed, 3, 3, 30, other=0.2, own=0.4) for seed in range(60)]
    for bound in (6 / 36, 1 / 3, 2 / 3):
        hits = sum(one.p_value <= bound + 1e-9 for one in found)
        assert binom.ppf(0.0005, 60, bound - 2 / 36) <= hits <= binom.isf(0.0005, 60, bound)
    # Yet every run is recognised by what it is alone: a permutation of texts would reject nearly always.
    assert np.mean([one.within_accuracy for one in found]) > 0.5
    assert np.mean([one.accuracy for one in found]) == pytest.approx(1 / 3, abs=0.05)


# --- what is recognised -----------------------------------------------------------------------------------------------


def test_a_planted_trace_is_found_in_runs_held_out():
    found = judged(0, 4, 4, 100, factor=0.3, other=0.2, own=0.05)
    assert found.p_value < 0.01
    assert found.least_p < 1e-4
    low, high = found.ci95
    assert 0.25 < low < found.accuracy < high
    assert found.one_accuracy <= found.accuracy + 0.02  # more strata say more
    assert (found.levels, found.strata, found.chance) == (4, 4, 0.25)


def test_a_trace_of_single_runs_is_read_within_strata_and_not_across():
    found = judged(0, 4, 4, 100, own=0.4)
    assert found.within_ci95[0] > 0.5
    assert found.one_accuracy == pytest.approx(0.25, abs=0.07)
    assert found.p_value > 0.05


def test_of_two_strata_all_others_are_one_other():
    found = judged(0, 3, 2, 60, factor=0.3)
    assert found.accuracy == pytest.approx(found.one_accuracy)


def test_neither_runs_nor_documents_are_shared_by_training_and_test():
    """A rung that remembers which texts it was shown."""
    seen = []

    class Watching:
        kind = "watching"

        def judge(self, task, settings):
            seen.append((task.training_N | task.validation_N, task.test_N))
            return rung.judge(task, settings)

    random = default_rng(0)
    rung, grid = texts_of(random, runs_of(random, 2, 3), documents=50)
    found = held_out(Watching(), grid, SETTINGS)
    strata, documents = np.array(grid.strata), np.array(grid.documents)
    test = stats.split(grid.documents, 0, 0.1, 0.4) == "test"
    assert [len(set(strata[known])) for known, _ in seen] == [1, 1, 1, 2, 2, 2]
    for known, asked in seen:
        assert (asked == test).all()
        assert not set(documents[known]) & set(documents[asked])
    assert seen[-1][0].sum() == found.training_texts
    assert found.test_texts == test.sum()


def test_a_grid_with_a_run_that_lacks_or_a_text_too_many_is_refused():
    names = [list(some) for some in zip(*itertools.product("ab", "xy", "12"), strict=True)]
    Crossed("whole", np.arange(8), *names)
    for left in (slice(2, None), slice(1, None)):
        with pytest.raises(ValueError, match="equally many texts"):
            Crossed("torn", np.arange(8)[left], *(column[left] for column in names))
    with pytest.raises(ValueError, match="2 levels in 1 strata"):
        Crossed("flat", np.arange(8), names[0], ["x"] * 8, names[2])
