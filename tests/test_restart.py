"""Restart states stay as long as one of their arms may go on from them, and no longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natfp_jax import restart
from natfp_jax.errors import Damaged
from natfp_jax.files import MANIFEST, write_json

ARMS = "abcd"
groups = st.lists(st.sampled_from(ARMS), min_size=1, unique=True)


def save(root, arms, step):
    """What a cohort does: it makes ready, and saves."""
    place = restart.folder(root, arms)
    write_json(place / str(step) / MANIFEST, {"record": {"step": step}, "files": {}})


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("save"), groups, st.integers(-1, 5)),
            st.tuples(st.just("release"), groups, st.none()),
        )
    )
)
def test_a_state_is_there_for_every_arm_that_was_not_released_since(tmp_path_factory, actions):
    root, wanted, steps = tmp_path_factory.mktemp("restart"), {}, {}
    for what, arms, after in actions:
        key = tuple(arms)
        if what == "save":
            restart.claim(root, arms, after)
            save(root, arms, after + 1)
            wanted[key] = set(arms)
            steps[key] = {step for step in steps.get(key, ()) if step <= after} | {after + 1}
        else:
            restart.release(root, arms)
            for other in [other for other in wanted if set(other) & set(arms)]:
                wanted[other] -= set(arms)
                if not wanted[other]:
                    del wanted[other], steps[other]
        for arm in ARMS:
            expected = {(restart.folder(root, key), step) for key in wanted if arm in wanted[key] for step in steps[key]}
            assert set(restart.found(root, [arm])) == expected
        assert {place.name for place in root.iterdir()} == {restart.folder(root, key).name for key in wanted}
    every = [(restart.folder(root, key), step) for key in wanted if wanted[key] for step in steps[key]]
    assert sorted(restart.found(root, ARMS)) == sorted(every)


def test_arms_in_another_order_have_states_of_their_own(tmp_path):
    assert restart.folder(tmp_path, "ab") != restart.folder(tmp_path, "ba")


def test_what_was_being_saved_when_the_process_was_killed_is_named(tmp_path):
    restart.claim(tmp_path, "ab", -1)
    half = restart.folder(tmp_path, "ab") / "3"
    half.mkdir()
    assert restart.found(tmp_path, "c") == []
    with pytest.raises(Damaged) as damaged:
        restart.found(tmp_path, "cb")
    assert damaged.value.path == half
