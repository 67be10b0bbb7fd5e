"""A list of published checkpoints is read, or answered with one line."""

import numpy as np
import pytest
from numpy.random import default_rng

from natfp_jax import suite
from natfp_jax.errors import UserError
from natfp_jax.progress import Progress
from natfp_jax.suite_audit import audit
from tests.references import write

QUIET = Progress(quiet=True)


GOOD = '[[checkpoint]]\nbranch = "a"\npath = "x"\ninit = 0\norder = 0\nstep = 0\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[checkpoint]\n", "is no TOML"),
        ("", "checkpoint: field required"),
        (GOOD, "should have at least 2 items"),
        (GOOD + GOOD, "lists branch a, step 0 twice"),
        (GOOD + GOOD.replace("step = 0", "steps = 1"), "checkpoint 2 .*: a checkpoint has branch, path, init, order and step"),
        (GOOD + GOOD.replace("step = 0", "step = 1\nseed = 3"), "checkpoint 2 seed: unknown key"),
        (GOOD + GOOD.replace("step = 0", 'step = "1"'), "checkpoint 2 step: input should be a valid integer"),
        (GOOD + GOOD.replace("step = 0", "step = 1.0"), "checkpoint 2 step: input should be a valid integer"),
        (GOOD + GOOD.replace("step = 0", "step = -1"), "checkpoint 2 step: input should be greater than or equal to 0"),
        (GOOD + GOOD.replace("step = 0", "step = 1979-05-27"), "checkpoint 2 step: input should be a valid integer"),
        (GOOD + GOOD.replace('"a"', '""'), "checkpoint 2 branch: "),
        (
            GOOD + GOOD.replace("init = 0\norder = 0\nstep = 0", "init = 1\norder = 0\nstep = 1"),
            "give other seeds another branch",
        ),
        ("suite = 1\n" + GOOD + GOOD.replace('"a"', '"b"'), "suite: unknown key"),
        (GOOD + GOOD.replace('"a"', '"b"'), "branch a, step 0: .*x is no folder"),
    ],
)
def test_a_list_that_is_none_is_one_line(tmp_path, text, message):
    path = tmp_path / "suite.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        suite.read(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_list_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        suite.read(tmp_path / "suite.toml")
    (tmp_path / "suite.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no TOML"):
        suite.read(tmp_path / "suite.toml")


def test_paths_are_seen_from_the_list_and_the_hub_is_asked_by_name(tmp_path, monkeypatch):
    write(tmp_path / "below" / "x", {}, {"a": np.ones((2, 2), np.float32)})
    asked = []

    def located(place):
        asked.append(place)
        return tmp_path / "below" / "x"

    monkeypatch.setattr(suite, "located", located)
    text = GOOD + GOOD.replace('"x"', '"hf://owner/name@step1"').replace("step = 0", "step = 1")
    (tmp_path / "below" / "suite.toml").write_text(text)
    suite.read(tmp_path / "below" / "suite.toml")
    assert asked == [str(tmp_path / "below" / "x"), "hf://owner/name@step1"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.ones((2, 3), np.float32)}, r"a has the shape \(2, 3\), expected \(2, 2\) as in"),
        ({"b": np.ones((2, 2), np.float32)}, "has no tensor 'a', which .* has"),
        ({"a": np.ones((2, 2), np.float32), "b": np.ones(1, np.float32)}, "has no tensor 'b', which .* has"),
        ({"a": np.full((2, 2), np.nan, np.float32)}, "numbers that are not finite"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(tmp_path, tensors, message):
    write(tmp_path / "x", {}, {"a": np.ones((2, 2), np.float32)})
    write(tmp_path / "y", {}, tensors)
    (tmp_path / "suite.toml").write_text(GOOD + GOOD.replace('"x"', '"y"').replace("step = 0", "step = 1"))
    with pytest.raises(UserError, match=message) as refused:
        audit(tmp_path / "suite.toml", QUIET)
    assert "\n" not in str(refused.value)


def test_masks_and_counters_are_no_weights(tmp_path):
    weights = {"a": default_rng(10).standard_normal((20, 20)).astype(np.float32)}
    no_weights = {"mask": np.ones((4, 4), bool), "ids": np.arange(4), "masked": np.array(-np.inf, np.float16)}
    write(tmp_path / "x", {}, weights | no_weights)
    write(tmp_path / "y", {}, weights | {"mask": np.zeros((4, 4), bool)})
    (tmp_path / "suite.toml").write_text(GOOD + GOOD.replace('"x"', '"y"').replace('"a"', '"b"'))
    assert suite.read(tmp_path / "suite.toml").tensors == {"a": (20, 20)}
