"""Streams are addressed by name, and no two share their numbers."""

import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import natfp_jax
from natfp_jax import rng
from natfp_jax.sample import draw_key
from natfp_jax.strategy import Greedy, Temperature

SEEDS = st.integers(0, 2**32 - 1) | st.integers(0, 3)
NAMES = st.integers(0, 2**64 - 1) | st.integers(0, 3) | st.text(max_size=5) | st.sampled_from(["init", "order", "0", "1", ""])
ADDRESSES = st.tuples(SEEDS, st.lists(NAMES, min_size=1, max_size=3).map(tuple))
TEXT_FIRST = st.tuples(SEEDS, st.text(max_size=5), st.lists(NAMES, max_size=2)).map(lambda a: (a[0], (a[1], *a[2])))


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def same(a, b):
    return a[0] == b[0] and [(type(n), n) for n in a[1]] == [(type(n), n) for n in b[1]]


@given(ADDRESSES, ADDRESSES)
@settings(max_examples=150)
def test_two_streams_are_alike_only_where_seed_and_names_are(a, b):
    assert (bits(rng.stream(a[0], *a[1])) == bits(rng.stream(b[0], *b[1]))) == same(a, b)


@given(TEXT_FIRST, TEXT_FIRST)
def test_two_generators_are_alike_only_where_seed_and_names_are(a, b):
    draws = [rng.generator(seed, *names).integers(2**63, size=2).tolist() for seed, names in (a, b)]
    assert (draws[0] == draws[1]) == same(a, b)


@given(TEXT_FIRST)
def test_a_name_more_is_another_stream(address):
    seed, names = address
    for further in (0, "", names[-1]):
        assert bits(rng.stream(seed, *names)) != bits(rng.stream(seed, *names, further))
        assert rng.generator(seed, *names).integers(2**63) != rng.generator(seed, *names, further).integers(2**63)


def test_no_collision_among_many_streams():
    names = [
        "init",
        "order",
        "dropout",
        "sample",
        "split",
        "attribution",
        "embedding",
        "head",
        *range(40),
        *map(str, range(40)),
    ]
    seeds = np.arange(100, dtype=np.uint32)
    of_seeds = [jax.vmap(lambda seed, name=name: jax.random.key_data(rng.stream(seed, name)))(seeds) for name in names]
    found = np.concatenate(of_seeds)
    assert found.shape == (8800, 2)
    assert len(np.unique(found, axis=0)) == 8800
    numbers = {rng.generator(seed, str(name)).integers(2**63) for seed in range(20) for name in names[:48]}
    assert len(numbers) == 20 * 48


def test_no_two_arms_checkpoints_strategies_or_draws_share_noise():
    grid = list(itertools.product((0, 1), ("a0", "0a", ""), (0, 1), ((Greedy(),), (), (Temperature(0.5),)), (0, 1)))
    assert len({bits(draw_key(*place)) for place in grid}) == len(grid)


@given(st.text(), st.integers(0, 2**64 - 1))
def test_a_name_is_two_words(text, number):
    for name in (text, number):
        assert len(rng.words(name)) == 2
        assert all(0 <= word < 2**32 for word in rng.words(name))
    high, low = rng.words(number)
    assert high * 2**32 + low == number
    assume(text)
    assert rng.words(text) != rng.words(text + text)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_numbers_that_are_no_names(number):
    with pytest.raises(ValueError, match=f"got {number}, expected an integer from 0 to"):
        rng.words(number)


def test_streams_are_fixed():
    """A change here changes every weight and text that was ever made: do not adapt these numbers, undo the change."""
    assert bits(rng.stream(7, "init", 3)) == (1184776527, 3083783167)
    assert rng.generator(7, "split", 3).integers(1000, size=4).tolist() == [745, 809, 502, 383]


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_a_stream_is_threefry_whatever_the_default(implementation):
    before = rng.stream(7, "init")
    with jax.default_prng_impl(implementation):
        key = rng.stream(7, "init")
        assert bits(key) == bits(before)
        assert jax.random.key_impl(key) == "threefry2x32"


def test_packed_keys_are_the_same_keys():
    keys = jax.random.split(rng.stream(7, "init"), 5)
    numbers = rng.packed(keys)
    assert (numbers.shape, numbers.dtype) == ((5, 2), np.uint32)
    assert (jax.random.bits(rng.unpacked(numbers)[3]) == jax.random.bits(keys[3])).all()
    assert jax.random.key_impl(rng.unpacked(numbers)) == "threefry2x32"


def test_a_traced_seed_gives_the_same_stream():
    assert bits(jax.jit(lambda seed: rng.stream(seed, "init", 3))(np.uint32(7))) == bits(rng.stream(7, "init", 3))


def test_only_this_file_creates_keys():
    creating = re.compile(r"random\.(key|PRNGKey|wrap_key_data|default_rng|RandomState|seed|Generator)\(|^import random", re.M)
    files = sorted(Path(natfp_jax.__file__).parent.rglob("*.py"))
    assert [path.name for path in files if creating.search(path.read_text(encoding="utf-8"))] == ["rng.py"]
