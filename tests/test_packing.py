"""Examples in windows: as a plain loop over lists packs them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natfp_jax.packing import BEGINS, IDS, LEARNT, Packed, written
from natfp_jax.program import begins, learnt

PADDING = 7


def example(number, length):
    """Ids that no other example has, the second half of them learnt."""
    return written([1000 * number + place for place in range(length)], [place >= (length + 1) // 2 for place in range(length)])


def shards_of(lengths):
    """Examples of these lengths, shard by shard, and their files."""
    numbers = iter(range(10**6))
    shards = [[example(next(numbers), length) for length in some] for some in lengths]
    return shards, [np.concatenate([*some, np.zeros(0, "<u4")]).astype("<u4") for some in shards]


def naive(shards, seq_len):
    """The windows as lists of examples, and how many examples are too long."""
    windows, space, too_long = [], 0, 0
    for one in (one for some in shards for one in some):
        if len(one) > seq_len + 1:
            too_long += 1
            continue
        if len(one) > space:
            windows.append([])
            space = seq_len + 1
        windows[-1].append(one)
        space -= len(one)
    return windows, too_long


def filled(window, seq_len):
    """A window as ids."""
    ids = [int(one) for some in window for one in some]
    return [*ids, *[PADDING | 1 << 29] * (seq_len + 1 - len(ids))]


LENGTHS = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=5)


@given(lengths=LENGTHS, seq_len=st.integers(1, 14), data=st.data())
def test_windows_hold_whole_examples_in_the_order_of_the_store_until_the_next_does_not_fit(lengths, seq_len, data):
    shards, files = shards_of(lengths)
    windows, too_long = naive(shards, seq_len)
    first = data.draw(st.integers(0, len(windows)))
    count = data.draw(st.integers(0, len(windows) - first))
    packed = Packed(files, seq_len, PADDING)
    assert packed.count == len(windows)
    packed, here = packed.part(count, first), windows[first : first + count]
    assert (packed.available, packed.count, packed.left_out) == (len(windows), len(here), too_long)
    assert packed.examples == sum(map(len, here))
    plain = np.array([filled(window, seq_len) for window in here], np.int32).reshape(len(here), seq_len + 1)
    indices = np.array(data.draw(st.lists(st.integers(0, len(here) - 1), max_size=8)) if here else [], np.int64)
    rows = packed.rows(indices)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, plain[indices])
    assert packed.sha256() == hashlib.sha256(plain.astype("<u4").tobytes()).hexdigest()
    for outside in (-1, len(here)):
        with pytest.raises(IndexError, match=f"the pool has {len(here)}"):
            packed.rows(np.array([outside]))


@given(lengths=LENGTHS, seq_len=st.integers(1, 14))
def test_no_example_is_lost_but_those_that_are_counted(lengths, seq_len):
    shards, files = shards_of(lengths)
    packed = Packed(files, seq_len, PADDING)
    ids = packed.rows(np.arange(packed.count)).view(np.uint32).reshape(-1)
    kept = ids[ids != (PADDING | BEGINS)]
    every = [one for some in shards for one in some]
    fitting = [one for one in every if len(one) <= seq_len + 1]
    assert packed.left_out == len(every) - len(fitting)
    np.testing.assert_array_equal(kept, np.concatenate([*fitting, np.zeros(0, np.uint32)]))


def test_a_window_written_by_hand():
    """Of two examples, one of which fills the window to its last id, and one that does not fit beside another."""
    files = [np.concatenate([written([5, 8, 9], [False, False, True]), written([5, 6], [False, True])])]
    assert [file.tolist() for file in files] == [[5 | 1 << 29, 8, 9 | 1 << 30, 5 | 1 << 29, 6 | 1 << 30]]
    for seq_len, expected in (
        (4, [[5 | BEGINS, 8, 9 | LEARNT, 5 | BEGINS, 6 | LEARNT]]),
        (3, [[5 | BEGINS, 8, 9 | LEARNT, 0 | BEGINS], [5 | BEGINS, 6 | LEARNT, 0 | BEGINS, 0 | BEGINS]]),
        (1, [[5 | BEGINS, 6 | LEARNT]]),
    ):
        packed = Packed(files, seq_len, 0)
        np.testing.assert_array_equal(packed.rows(np.arange(packed.count)), expected)


def test_the_marks_do_not_touch_the_ids():
    assert (IDS & BEGINS, IDS & LEARNT, BEGINS & LEARNT) == (0, 0, 0)
    marked = written([IDS, 0, IDS], [True, True, False])
    assert marked.dtype == np.dtype("<u4")
    assert (marked & IDS).tolist() == [IDS, 0, IDS]
    assert marked.view(np.int32).min() >= 0  # as the signed numbers that training gets
    assert [(marked & mark != 0).tolist() for mark in (BEGINS, LEARNT)] == [[True, False, False], [True, True, False]]


def test_the_hash_of_the_pool_changes_with_an_id_a_mark_and_a_boundary():
    _, (file,) = shards_of([[3, 2, 4, 4, 1]])
    hashes = {Packed([file], 5, PADDING).sha256()}
    for place, bits in ((1, 1), (1, LEARNT), (2, LEARNT), (1, BEGINS), (3, BEGINS)):
        other = file.copy()
        other[place] ^= np.uint32(bits)
        hashes.add(Packed([other], 5, PADDING).sha256())
    hashes |= {Packed([file], 6, PADDING).sha256(), Packed([file], 5, PADDING + 1).sha256()}
    hashes |= {Packed([file], 5, PADDING).part(2, 0).sha256(), Packed([file], 5, PADDING).part(2, 1).sha256()}
    assert len(hashes) == 10
    # Where a shard ends is no boundary of what is read.
    assert Packed([file[:5], file[:0], file[5:]], 5, PADDING).sha256() == Packed([file], 5, PADDING).sha256()


@settings(max_examples=15)  # each shape is compiled
@given(lengths=LENGTHS, seq_len=st.sampled_from([2, 9]))
def test_marks_are_read_as_the_examples_have_them(lengths, seq_len):
    """By plain loops over the examples of a window: nothing of another example is attended to, nothing of padding learnt."""
    shards, files = shards_of(lengths)
    windows, _ = naive(shards, seq_len)
    packed = Packed(files, seq_len, PADDING)
    marked = packed.rows(np.arange(packed.count))
    begin_BT, learnt_BT = np.zeros((len(windows), seq_len + 1), np.int32), np.zeros((len(windows), seq_len + 1), np.float32)
    for row, window in enumerate(windows):
        at = 0
        for one in window:
            begin_BT[row, at : at + len(one)] = at
            learnt_BT[row, at + (len(one) + 1) // 2 : at + len(one)] = 1
            at += len(one)
        begin_BT[row, at:] = np.arange(at, seq_len + 1)  # padding sees nothing but itself
    np.testing.assert_array_equal(begins(marked), begin_BT)
    found = np.asarray(learnt(marked))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, learnt_BT[:, 1:])
    assert not (marked[:, 0] & LEARNT).any()  # else the last of a window would be asked for the first of the next
