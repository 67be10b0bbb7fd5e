"""The table of chips, the names of slices, and the measure of a host."""

import math

import pytest

from natfp_jax import chips
from natfp_jax.errors import UserError


def refused(text):
    with pytest.raises(UserError) as caught:
        chips.parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "platform", "shape"),
    [
        ("v5e:4x4", "tpu", (4, 4)),
        ("v5p:2x2x2", "tpu", (2, 2, 2)),
        ("v6e:8x8", "tpu", (8, 8)),
        ("h200:8", "gpu", (8,)),
        ("cpu:8", "cpu", (8,)),
    ],
)
def test_a_slice_is_read_from_its_name(text, platform, shape):
    found = chips.parse(text)
    assert (found.name, found.platform, found.shape) == (text, platform, shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "did you mean"),
        ("abacus:3", "known are v3, v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "expected such as v5e:4x4"),
        ("v5e:16", "expected such as v5e:4x4"),
        ("v5p:4x4", "expected such as v5p:2x2x2"),
        ("h200:2x4", "expected such as h200:8"),
        ("cpu:0", "expected such as cpu:8"),
        ("cpu:x", "expected such as cpu:8"),
    ],
)
def test_what_is_no_slice_is_answered_with_one_line(text, message):
    assert message in refused(text)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_a_device_is_known_by_the_longest_name_that_it_begins_with(kind, name):
    found = chips.of_kind(kind)
    assert found is not None
    assert found.name == name


def test_of_a_chip_that_jax_sees_as_two_devices_each_has_half():
    v3 = next(chip for chip in chips.CHIPS if chip.name == "v3")
    assert v3.bf16 * v3.devices == 123e12
    assert v3.memory * v3.devices == 32 * 2**30
    assert [chips.chips_in(v3, devices) for devices in (1, 2, 8)] == [1, 1, 4]


def test_every_chip_rounds_before_it_is_exact_and_stands_once():
    assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)
    for chip in chips.CHIPS:
        assert chip.bf16 >= chip.f32 > chip.exact > 0
        assert 0 < chip.usable <= chip.memory


def test_devices_of_a_host_share_what_is_measured():
    one, four = chips.host(1, 2**30, seconds=0.2), chips.host(4, 2**30, seconds=0.2)
    assert all(math.isfinite(rate) and rate > 1e8 for rate in (one.bf16, one.f32, one.exact, one.bandwidth))
    assert four.f32 < one.f32
    assert four.memory == 2**30
