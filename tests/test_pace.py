"""How fast training goes is said from the steps that were done in the time, the first one left out."""

import re

import jax
import pytest

from natfp_jax import flops, pace
from natfp_jax.config import Data, Experiment, Model
from natfp_jax.pace import Pace, TextPace

EXPERIMENT = Experiment(model=Model(width=32, layers=2, heads=4), data=Data(seq_len=32, windows=64, batch=8))


def said(times, replicas=1, first=0):
    """What is said of steps that end at these times, in seconds."""
    lines, clock = [], iter(times)
    devices = jax.sharding.Mesh(jax.devices()[:1], "x")
    with Pace(lines.append, EXPERIMENT, 128, replicas, devices, lambda: next(clock)) as found:
        for step in range(len(times)):
            found.step(first + step + 1)
    return lines


def test_the_mean_is_said_at_the_end_without_the_first_step():
    (line,) = said([100.0, 100.5, 101.0], replicas=3)
    tokens = 3 * 8 * 32 / 0.5
    operations = tokens * flops.per_token(EXPERIMENT.model, 128, 32) / 1e12
    assert line == f"2 steps of 3 arms at {tokens:,.0f} tokens/s, {operations:.3g} TFLOP/s"


def test_every_minute_says_its_own_pace():
    lines = said([0.0, 30.0, pace.EVERY, 1.5 * pace.EVERY, 2 * pace.EVERY + 1], first=10)
    assert [line.partition(":")[0] for line in lines[:2]] == ["step 13 of 1 arm", "step 15 of 1 arm"]
    rates = [float(re.search(r"([\d,.]+) tokens/s", line)[1].replace(",", "")) for line in lines]
    assert rates == pytest.approx([2 * 256 / 60, 2 * 256 / 61, 4 * 256 / 121], abs=0.6)


@pytest.mark.parametrize("times", [[], [1.0]])
def test_nothing_is_said_of_nothing(times):
    assert said(times) == []


def test_texts_and_tokens_are_said_every_minute_with_the_time_left_and_at_the_end():
    lines, clock = [], iter([0.0, 30.0, 80.0, 100.0, 200.0, 200.0])
    with TextPace(lines.append, 1000, lambda: next(clock)) as found:
        for texts, tokens in ((100, 1000), (100, 3000), (300, 6000), (500, 10_000)):
            found.drawn(texts, tokens)
    assert lines == [
        "200 of 1,000 texts: 2 texts/s, 50 tokens/s, 0:05:20 left",
        "1,000 of 1,000 texts: 5 texts/s, 100 tokens/s, 0:00:00 left",
        "1,000 texts at 5 texts/s, 100 tokens/s",
    ]


def test_nothing_is_said_of_texts_that_were_not_drawn():
    lines = []
    with pytest.raises(KeyError), TextPace(lines.append, 10):
        raise KeyError
    assert lines == []
