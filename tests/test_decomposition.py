"""Distances and components: scipy, an analysis of variance, planted effects, nulls, and the coverage of intervals."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy import sparse
from scipy.spatial.distance import jensenshannon
from scipy.stats import binom

from natfp_jax.decomposition import (
    Design,
    by_frequencies,
    by_places,
    components,
    debiased,
    divergences,
    frequency_distances,
)

FACTORS = ("init", "order")


def cells_of(*sizes):
    return tuple(itertools.product(*(tuple(map(str, range(size))) for size in sizes)))


def squares(values_AX):
    """Squared differences of every two arms."""
    return (values_AX[:, None] - values_AX) ** 2


# --- divergences ------------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_a_divergence_is_scipys(pieces, seed):
    random = default_rng(seed)
    p, q = random.dirichlet(np.full(pieces, 0.3), size=2)
    p[0] = 0  # what one never uses
    p /= p.sum()
    assert divergences(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, rel=1e-9, abs=1e-13)
    assert divergences(p, p) == 0
    assert divergences(p, q) == divergences(q, p) <= 1


def test_a_debiased_distance_is_made_of_crossed_halves():
    uses = default_rng(0).integers(1, 50, size=(2, 3, 7)).astype(float)
    p = uses / uses.sum(axis=-1, keepdims=True)

    def apart(a, b):
        return jensenshannon(p[0, a], p[1, b], base=2) ** 2

    distance, noise = debiased(uses)
    assert noise == pytest.approx([apart(a, a) for a in range(3)])
    for a, b in itertools.product(range(3), repeat=2):
        expected = (apart(a, b) + apart(b, a)) / 2 - (apart(a, a) + apart(b, b)) / 2
        assert distance[a, b] == pytest.approx(expected, abs=1e-12)


# --- components -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(2, 2), (4, 3), (5, 5)])
def test_components_are_those_of_a_two_way_analysis_of_variance(first, second):
    values = default_rng(first).normal(size=(first, second, 6))
    grand, rows, columns = values.mean(axis=(0, 1)), values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    of_rows = second * ((rows - grand) ** 2).sum(axis=(0, 1)) / (first - 1)
    of_columns = first * ((columns - grand) ** 2).sum(axis=(0, 1)) / (second - 1)
    rest = ((values - rows - columns + grand) ** 2).sum(axis=(0, 1)) / ((first - 1) * (second - 1))
    found = components(Design(FACTORS, cells_of(first, second)), squares(values.reshape(-1, 6)))
    assert list(found) == ["init", "order", "interaction and chaos", "all"]
    # A component is twice a variance, since two runs differ.
    assert found["init"] == pytest.approx(2 * (of_rows - rest) / second)
    assert found["order"] == pytest.approx(2 * (of_columns - rest) / first)
    assert found["interaction and chaos"] == pytest.approx(2 * rest)
    assert found["all"] == pytest.approx(found["init"] + found["order"] + found["interaction and chaos"])


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 2)])
def test_known_variances_are_recovered_and_twins_part_interaction_from_chaos(sizes):
    random, repeats = default_rng(0), 40_000
    names, spreads = ("init", "order", "dropout")[: len(sizes)], (1.0, 0.7, 0.5)[: len(sizes)]

    def effect(spread, *axes):
        shape = [size if k in axes else 1 for k, size in enumerate(sizes)]
        return spread * random.normal(size=(*shape, repeats))

    every = range(len(sizes))
    values = sum(effect(spread, k) for k, spread in enumerate(spreads)) + effect(0.6, 0, 1) + effect(0.4, *every)
    settled = np.broadcast_to(values, (*sizes, repeats)).reshape(-1, repeats)
    twins = settled[[0, 0, 3]]  # two of one cell, one of another
    arms = np.concatenate([settled, twins])
    arms = arms + 0.3 * random.normal(size=arms.shape)  # chaos
    cells = cells_of(*sizes)
    found = components(Design(names, cells, (cells[0], cells[0], cells[3])), squares(arms))
    expected = {name: 2 * spread**2 for name, spread in zip(names, spreads, strict=True)}
    expected |= {"interaction": 2 * (0.6**2 + 0.4**2), "chaos": 2 * 0.3**2}
    for name, value in expected.items():
        mean, error = found[name].mean(), found[name].std() / np.sqrt(repeats)
        assert abs(mean - value) < 4.5 * error, name
        assert error < 0.05
    assert found["all"].mean() == pytest.approx(sum(expected.values()), abs=0.1)


def test_a_factor_whose_levels_are_equal_has_a_component_of_exactly_zero():
    values = np.repeat(default_rng(0).normal(size=(3, 1, 9)), 4, axis=1).reshape(-1, 9)
    found = components(Design(FACTORS, cells_of(3, 4), (("0", "0"),)), squares(np.concatenate([values, values[:1]])))
    assert not found["order"].any()
    assert not found["interaction"].any()
    assert (found["init"] == found["all"]).all()
    assert not found["chaos"].any()


def test_components_of_places_are_means_with_shares_that_add_up():
    random, cells = default_rng(0), cells_of(3, 3)
    values = random.normal(size=(3, 1, 400)) + 0.5 * random.normal(size=(1, 3, 400)) + 0.2 * random.normal(size=(3, 3, 400))
    documents = [f"document {n // 2}" for n in range(400)]
    rows = by_places(Design(FACTORS, cells), squares(values.reshape(9, -1)), documents, default_rng(0), 999)
    of = {row.component: row for row in rows}
    assert sum(of[name].share for name in ("init", "order", "interaction and chaos")) == pytest.approx(1)
    assert (of["all"].share, of["all"].share_ci95) == (1, (1, 1))
    for name, value in {"init": 2, "order": 0.5, "interaction and chaos": 0.08}.items():
        low, high = of[name].ci95
        assert low < of[name].bits < high
        assert low - (high - low) / 2 < value < high + (high - low) / 2
        assert of[name].share_ci95[0] < of[name].share < of[name].share_ci95[1]
    nothing = by_places(Design(FACTORS, cells), np.zeros((9, 9, 400)), documents, default_rng(0), 999)
    assert [(row.bits, row.ci95, row.share) for row in nothing] == [(0, (0, 0), None)] * 4


# --- frequencies ------------------------------------------------------------------------------------------------------


class Grid:
    """Texts of a 3 x 3 grid with a twin and a second draw of its first cell, with known chances of 30 pieces."""

    def __init__(self, init, order, interaction, chaos, seed=0):
        random = default_rng(seed)

        def effect(spread, *shape):
            return spread * random.normal(size=(*shape, 30))

        logits = effect(1.0, 1, 1) + effect(init, 3, 1) + effect(order, 1, 3) + effect(interaction, 3, 3)
        settled = logits.reshape(9, 30)
        moved = np.concatenate([settled, settled[:1]]) + effect(chaos, 10)
        chances = np.exp(np.concatenate([moved, moved[:1]]))
        self.chances = chances / chances.sum(axis=1, keepdims=True)
        cells = cells_of(3, 3)
        self.design = Design(FACTORS, cells, cells[:1], cells[:1])
        documents = self.of_documents(random, 20_000, 0.5).mean(axis=0)
        apart = np.array([[divergences(p, q) for q in documents] for p in documents])
        self.truth = {name: float(value) for name, value in components(self.design, apart).items()}

    def of_documents(self, random, documents, spread):
        """Each document has chances of its own, about which all arms have theirs: [documents, arms, pieces]."""
        p = self.chances * np.exp(spread * random.normal(size=(documents, 1, 30)))
        return p / p.sum(axis=-1, keepdims=True)

    def estimated(self, seed, documents=120, length=40, spread=0.5):
        """Components of drawn texts."""
        random = default_rng(seed)
        counts = random.multinomial(length, self.of_documents(random, documents, spread)).reshape(-1, 30)
        arms, names = np.tile(np.arange(11), documents), np.repeat([f"document {d}" for d in range(documents)], 11)
        found = frequency_distances(sparse.csr_array(counts.astype(float)), arms, names, 0, default_rng(seed))
        return {row.component: row for row in by_frequencies(self.design, found)}


REPEATS = 60


@pytest.fixture(scope="module")
def planted():
    grid = Grid(init=0.3, order=0.2, interaction=0.15, chaos=0.1)
    return grid, [grid.estimated(seed) for seed in range(REPEATS)]


def test_planted_components_are_recovered_and_intervals_cover_them(planted):
    grid, found = planted
    assert grid.truth["init"] > grid.truth["order"] > grid.truth["chaos"] > 0
    for name, value in grid.truth.items():
        bits = np.array([one[name].bits for one in found])
        assert abs(bits.mean() - value) < 4.5 * bits.std() / np.sqrt(REPEATS), name
        covered = sum(one[name].ci95[0] <= value <= one[name].ci95[1] for one in found)
        assert covered >= binom.ppf(1e-4, REPEATS, 0.93), (name, covered)


def test_shares_are_of_the_distance_in_all_factors(planted):
    _, found = planted
    for one in found[:5]:
        parts = [one[name].share for name in ("init", "order", "interaction", "chaos")]
        assert sum(parts) == pytest.approx(one["all"].share) == 1
        assert one["init"].share_ci95[0] < one["init"].share < one["init"].share_ci95[1]
        assert one["sampling noise"].share is one["null"].share is None


def test_without_effects_components_are_about_zero_where_plain_divergences_are_not():
    grid = Grid(init=0, order=0, interaction=0, chaos=0)
    found = [grid.estimated(seed) for seed in range(REPEATS)]
    noise = np.mean([one["sampling noise"].bits for one in found])
    for name in ("init", "order", "interaction", "chaos", "all", "null"):
        bits = np.array([one[name].bits for one in found])
        assert abs(bits.mean()) < 4.5 * bits.std() / np.sqrt(REPEATS), name
        assert abs(bits.mean()) < noise / 10
        covered = sum(one[name].ci95[0] <= 0 <= one[name].ci95[1] for one in found)
        assert covered >= binom.ppf(1e-4, REPEATS, 0.95)
        assert 0 < sum(value < 0 for value in bits) < REPEATS  # not clipped
    assert sum(one["all"].share is None for one in found) > REPEATS / 2


def test_sampling_noise_is_what_theory_says_of_so_many_pieces():
    grid = Grid(init=0, order=0, interaction=0, chaos=0)
    found = [grid.estimated(seed, length=100, spread=0)["sampling noise"] for seed in range(6)]
    # Halves of n and m pieces: (V - 1) (1 / n + 1 / m) / (8 ln 2), here of about 6,000 each.
    expected = 29 / (4 * 6_000 * np.log(2))
    assert np.mean([row.bits for row in found]) == pytest.approx(expected, rel=0.12)
    assert all(row.ci95[0] < expected < row.ci95[1] for row in found)
    other = grid.estimated(0, length=100, spread=0.5)["sampling noise"]
    assert other.bits > 1.5 * expected  # what the documents of the halves differ in is noise too


def test_distances_do_not_depend_on_the_order_of_texts():
    random = default_rng(0)
    counts, arms = random.integers(0, 4, size=(240, 12)).astype(float), np.tile(np.arange(4), 60)
    documents = np.repeat([f"document {d}" for d in range(60)], 4)
    first = frequency_distances(sparse.csr_array(counts), arms, documents, 0, default_rng(1))
    mixed = random.permutation(240)
    again = frequency_distances(sparse.csr_array(counts[mixed]), arms[mixed], documents[mixed], 0, default_rng(1))
    assert np.array_equal(first.distance_AAB, again.distance_AAB)
    assert np.array_equal(first.noise_AB, again.noise_AB)


def test_a_torn_grid_is_refused():
    for cells in (cells_of(2, 2)[:3], (*cells_of(2, 2), ("0", "0")), cells_of(2, 1), cells_of(3)):
        with pytest.raises(ValueError, match=r"grid|two or more"):
            Design(FACTORS, cells)
    with pytest.raises(ValueError, match="no cells"):
        Design(FACTORS, cells_of(2, 2), (("7", "7"),))
