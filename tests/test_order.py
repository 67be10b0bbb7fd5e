"""The order of windows: whole epochs, keyed by (seed, epoch), a pure function of the step, proved by a hash."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.stats import chisquare

from natfp_jax.order import Order, order_hash

SEEDS = st.integers(0, 2**32 - 1)


def epoch_of(windows, seed, epoch):
    return Order(windows, 1, seed).permute(np.arange(windows), epoch)


@given(st.integers(1, 5000), SEEDS, st.integers(0, 50))
def test_every_epoch_is_a_permutation(windows, seed, epoch):
    assert_array_equal(np.sort(epoch_of(windows, seed, epoch)), np.arange(windows))


@pytest.mark.parametrize("windows", [1, 2, 3, 255, 256, 257, 65536, 65537])
def test_every_epoch_is_a_permutation_beside_powers_of_two(windows):
    assert_array_equal(np.sort(epoch_of(windows, 3, 1)), np.arange(windows))


def test_random_access_beyond_32_bits():
    windows = 2**40 + 12345
    order = Order(windows, 64, 5)
    rows = order.rows(2**33)
    assert len(set(rows.tolist())) == 64
    assert rows.min() >= 0
    assert 2**36 < rows.max() < windows


@given(st.integers(20, 500), SEEDS)
def test_each_epoch_has_its_own_order(windows, seed):
    orders = {tuple(epoch_of(windows, seed, epoch)) for epoch in range(4)}
    orders |= {tuple(epoch_of(windows, (seed + 1) % 2**32, epoch)) for epoch in range(4)}
    assert len(orders) == 8


def test_the_seed_is_not_added_to_the_epoch():
    """Where it is (as in Grain), seed 0 in epoch 1 sees the windows just as seed 1 in epoch 0."""
    orders = {(seed, epoch): tuple(epoch_of(64, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert orders[0, 1] != orders[1, 0]
    assert len(set(orders.values())) == 36


@given(st.integers(1, 60), st.integers(1, 3), SEEDS, st.data())
@settings(max_examples=40)
def test_the_rows_do_not_depend_on_the_batch(windows, epochs, seed, data):
    seen = windows * epochs
    batch = data.draw(st.sampled_from([b for b in range(1, seen + 1) if seen % b == 0]))
    order = Order(windows, batch, seed)
    rows = [order.rows(step) for step in range(seen // batch)]
    assert all(r.shape == (batch,) and r.dtype == np.int64 for r in rows)
    assert_array_equal(np.concatenate(rows), np.concatenate([epoch_of(windows, seed, epoch) for epoch in range(epochs)]))
    step = data.draw(st.integers(0, len(rows) - 1))  # pure: whatever was asked before, and of another object
    assert_array_equal(order.rows(step), rows[step])
    assert_array_equal(Order(windows, batch, seed).rows(step), rows[step])


def test_an_order_is_fixed():
    """A change here changes what every run is fed: do not adapt these numbers, undo the change."""
    assert Order(10, 4, 0).rows(0).tolist() + Order(10, 4, 0).rows(1).tolist() == [0, 3, 4, 1, 9, 7, 8, 6]
    assert Order(10, 4, 1).rows(0).tolist() + Order(10, 4, 1).rows(1).tolist() == [5, 1, 6, 4, 9, 8, 0, 2]
    assert Order(1000, 8, 7).rows(130).tolist() == [564, 420, 210, 488, 99, 107, 927, 489]  # in the second epoch


def test_any_window_is_as_likely_at_any_place():
    windows, seeds = 200, 4000
    places = np.array([0, 1, 99, 199])
    drawn = np.array([Order(windows, 1, seed).permute(places, 0) for seed in range(seeds)])
    for place in range(len(places)):
        assert chisquare(np.bincount(drawn[:, place], minlength=windows)).pvalue > 1e-4
    following = (drawn[:, 1] - drawn[:, 0]) % windows  # and neighbours say nothing of one another
    assert chisquare(np.bincount(following, minlength=windows)[1:]).pvalue > 1e-4


def test_any_order_of_a_few_windows_is_as_likely():
    few = np.arange(3)
    ranks = [tuple(np.argsort(Order(40, 1, seed).permute(few, epoch)).tolist()) for seed in range(600) for epoch in range(2)]
    counts = [ranks.count(order) for order in set(ranks)]
    assert len(counts) == 6
    assert chisquare(counts).pvalue > 1e-4


def reference_hash(pool, rows):
    state = bytes.fromhex(pool)
    for row in rows:
        state = hashlib.sha256(state + int(row).to_bytes(8, "little")).digest()
    return state.hex()


@given(st.integers(1, 60), SEEDS, st.data())
def test_the_hash_proves_the_rows_whatever_the_batch(windows, seed, data):
    pool = hashlib.sha256(b"pool").hexdigest()
    rows = np.concatenate([epoch_of(windows, seed, epoch) for epoch in (0, 1)])
    expected = reference_hash(pool, rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    state = pool
    for batch in np.split(rows, cuts):
        state = order_hash(state, batch)
    assert state == expected
    assert order_hash(hashlib.sha256(b"another pool").hexdigest(), rows) != expected
    if windows > 1:
        assert order_hash(pool, rows[::-1]) != expected or rows.tolist() == rows[::-1].tolist()
    assert order_hash(pool, rows[:-1]) != expected


def test_the_hash_holds_indices_of_64_bits():
    rows = np.array([0, 2**32, 2**40 + 1, 2**62])
    assert order_hash("00" * 32, rows) == reference_hash("00" * 32, rows)
    assert order_hash("00" * 32, rows) != order_hash("00" * 32, rows % 2**32)
