"""Judgements on plain numbers: which start, which lineage, which step, and that they abstain."""

import numpy as np
from numpy.random import default_rng

from natfp_jax.kinship import assigned, clearly, lineages, named, votes


def test_starts_are_assigned_where_most_agree_and_not_where_as_many_do_not():
    assert assigned(np.array([[6.0, 0.0], [0.0, 3.0]])) == [(0, True), (1, True)]
    assert assigned(np.array([[1.0, 0.0], [0.0, 1.0]])) == [(0, True), (1, True)], "undisputed"
    assert assigned(np.array([[3.0, 0.0], [3.0, 0.0]]))[0][1] is False
    assert assigned(np.array([[6.0], [3.0]])) == [(0, True), (None, True)]
    assert assigned(np.array([[1.0, 2.0], [2.0, 1.0]])) == [(1, True), (0, True)]
    assert assigned(np.array([[1.0, 1.0], [1.0, 1.0]])) != [(0, True), (1, True)]
    assert assigned(np.zeros((1, 1))) == [(None, True)]
    assert assigned(np.zeros((2, 0))) == [(None, True), (None, True)]


def test_a_cosine_is_clearly_larger_by_size_and_by_signs():
    random = default_rng(9)
    noise = random.standard_normal(64) / 10
    assert clearly(0.5 + noise, 0.4 + noise[::-1])
    assert not clearly(0.5 + noise, 0.49 + noise), "too little to mean anything"
    assert not clearly(np.r_[np.full(60, 0.4), 8, 8, 8, 8], np.full(64, 0.4)), "a few parts alone"
    assert not clearly(np.full(64, np.nan), np.full(64, 0.1))
    false_alarms = sum(clearly(random.standard_normal(64), random.standard_normal(64)) for _ in range(4000))
    assert false_alarms / 4000 < 0.005


def test_a_lineage_has_the_name_that_two_thirds_of_it_claim():
    assert named(["a", "a", "a", "b"]) == "a"
    assert named(["a", "a", "b", "b"]) is None
    assert named(["a", "b"]) is None
    assert named(["a"]) is None
    assert named([{"a", "b"}, {"b"}, {"b"}]) == "b"
    assert named([{"a", "b"}, {"a", "b"}]) is None


def test_strangers_are_no_lineage_however_near():
    """Of several that are not one's own one is the nearest by necessity."""
    near, far = np.full(20, 0.9), np.full(20, 0.1)

    def directions(node, others):
        return np.stack([near if {node, other} in ({0, 2}, {1, 3}) else far for other in others])

    nodes = {1: [0, 1], 2: [2, 3]}
    assert lineages(nodes, directions, "abcd".__getitem__) == [[0], [1], [2], [3]]
    for trainings in ("abab", "abba"):  # as claimed, and swapped
        assert lineages(nodes, directions, trainings.__getitem__) == [[0, 2], [1, 3]]


def test_steps_vote_by_the_distances_that_others_have():
    def usual(one, other):
        return None if 99 in (one, other) else abs(one - other) + 1.0

    assert votes({2: 7.0, 4: 5.0, 99: 1.0}, usual, 1, 8, 0.2) == (0, 2)
    assert votes({2: 2.0, 4: 4.0}, usual, 1, 8, 0.2) == (2, 0)
    assert votes({2: 40.0, 4: 0.0}, usual, 1, 8, 0.2) == (0, 0), "of neither"
