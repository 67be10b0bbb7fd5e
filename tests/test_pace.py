"""How fast training goes is said from the steps that were done in the time, the first one left out."""

import re

import jax
import pytest

from natfp_jax import flops, pace
from natfp_jax.config import Data, Experiment, Model
from natfp_jax.pace import Pace

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
