"""Counted operations against a count by hand, and what is said of a chip."""

from types import SimpleNamespace

import numpy as np
import pytest

from natfp_jax import flops
from natfp_jax.config import Lora, Model


def test_operations_are_those_of_a_count_by_hand():
    model = Model(width=8, layers=3, heads=4, kv_heads=2, mlp_width=20)
    # a layer: q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 20; once, the head 8 x 100
    weights = 3 * (2 * 64 + 2 * 32 + 3 * 160) + 800
    attention = (
        3 * 8 * 16 * 6
    )  # scores and weighed values, 2 operations each, forward once and backward twice, half of them causal
    assert flops.per_token(model, 100, 16) == 6 * weights + attention


def test_where_adapters_alone_are_trained_no_other_weight_has_a_gradient():
    model, lora = Model(width=8, layers=3, heads=4, kv_heads=2, mlp_width=20), Lora(rank=2, targets=("q", "v", "down"))
    adapters = 3 * ((8 * 2 + 2 * 8) + (8 * 2 + 2 * 4) + (20 * 2 + 2 * 8))  # q, v, down
    weights = 3 * (2 * 64 + 2 * 32 + 3 * 160) + 800
    assert flops.per_token(model, 100, 16, lora) == 4 * weights + 6 * adapters + 6 * 3 * 8 * 16


def test_an_untied_embedding_is_looked_up_and_not_counted():
    tied, untied = (Model(width=8, layers=1, heads=2, tied=tied) for tied in (True, False))
    assert flops.per_token(tied, 100, 16) == flops.per_token(untied, 100, 16)


def devices(kind, count=4):
    return SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * count), size=count)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_nearest_name(kind, peak):
    assert flops.peak(SimpleNamespace(device_kind=kind)) == peak


def test_the_part_of_the_peak_is_that_of_all_devices():
    assert flops.said(989e12, devices("NVIDIA H100 80GB HBM3")) == "989 TFLOP/s, MFU 25.0 %"
    assert flops.said(2e11, devices("cpu")) == "0.2 TFLOP/s"
