"""What arms differ in and what they share: differences rebuild one value from the other, and every departure is said."""

import copy

from hypothesis import given
from hypothesis import strategies as st

from natfp_jax.contrast import differences, held

NAMES = st.sampled_from(["a", "b", "c"])
LEAVES = st.none() | st.booleans() | st.integers(0, 3) | st.lists(st.integers(0, 2), max_size=2)
TREES = st.dictionaries(NAMES, st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1)), max_size=3)


@given(TREES, TREES)
def test_differences_are_all_that_it_takes(old, new):
    """The old value, with the differences put into it, is the new one; where there are none both are the same."""
    found, made = differences(old, new), copy.deepcopy(old)
    for path, (before, after) in found.items():
        *folders, name = path.split(".")
        place = made
        for folder in folders:
            place = place[folder]
        assert place.get(name) == before
        place[name] = after

    def bare(value):  # what is not there and what is nothing are the same
        return {k: bare(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    assert bare(made) == bare(new)
    assert differences(old, old) == {}
    assert sorted(differences(new, old)) == sorted(found)


def arm(name, **fields):
    known = {"pool": "f" * 64, "windows": 6400, "epochs": 1, "steps": 200, "tokens": 409_600, "parameters": 700_000}
    return {"id": name, **known, **fields}


def test_what_is_held_fixed_is_said():
    windows, rest = held([arm("base"), arm("init1")])
    assert windows == "Held fixed: all 2 arms were fed the same 6,400 windows (sha256 `ffffffffffff`), each once."
    assert rest == "Held fixed: how often each window is seen, steps, training tokens, parameters."


def test_what_arms_began_with_is_said_where_they_have_a_parent():
    origin = {"fingerprint": "a" * 64, "step": 200, "weights": "b" * 64}
    other = {**origin, "fingerprint": "c" * 64}
    said = held([arm("base", origin=origin), arm("order1", origin=origin)])
    assert said[0] == "Held fixed: all 2 arms began with step 200 of run aaaaaaaaaaaaaaaa (weights `bbbbbbbbbbbb`)."
    assert len(said) == 3
    said = held([arm("base", origin=origin), arm("order1", origin=origin), arm("init1", origin=other), arm("new")])
    assert said[0] == (
        "Not held fixed: what the arms began with. base, order1: step 200 of run aaaaaaaaaaaaaaaa (weights `bbbbbbbbbbbb`); "
        "init1: step 200 of run cccccccccccccccc (weights `bbbbbbbbbbbb`); new: no parent."
    )


def test_what_cannot_be_held_fixed_is_one_line():
    arms = [arm("base", epochs=3), arm("batch64", epochs=3, steps=100), arm("width192", epochs=3, parameters=1_300_000)]
    windows, rest = held(arms)
    assert windows.startswith("Held fixed: all 3 arms")
    assert windows.endswith("each 3 times.")
    assert rest == (
        "Not held fixed, since it follows from the factors: steps (200; batch64 100), parameters (700,000; width192 1,300,000)."
    )


def test_other_windows_are_said_and_many_arms_are_counted():
    arms = [arm("base"), *(arm(f"first{n}", pool=f"{n}" * 64) for n in range(1, 7))]
    assert held(arms)[0] == (
        "Not held fixed: the windows. base was fed 6,400 windows (sha256 `ffffffffffff`), each once; "
        "first1, first2, first3, first4 and 2 more: other windows."
    )
    windows, rest = held([arm("base"), arm("epochs5", epochs=5, steps=1000)])
    assert windows == "Held fixed: all 2 arms were fed the same 6,400 windows (sha256 `ffffffffffff`)."
    assert "how often each window is seen (1; epochs5 5), steps (200; epochs5 1,000)" in rest
