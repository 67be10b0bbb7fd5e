"""The chips that programs are planned for, and what a name such as `v5e:4x4` asks for.

Owns the one table of what a JAX device of each kind can do, from the vendors' data sheets, and the measure of a host, which has
none. Must not know programs.
"""

import difflib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from natfp_jax.errors import UserError
from natfp_jax.platforms import Platform

__all__ = ["CHIPS", "Chip", "Slice", "chips_in", "host", "of_kind", "parse"]

_GIB = 1 << 30
_CPU: Literal["cpu"] = "cpu"


@dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind has, at its best."""

    name: str  # as in the name of a slice
    platform: Platform
    kinds: tuple[str, ...]  # how the `device_kind` of such a device begins
    bf16: float  # FLOP/s of dense products in bfloat16
    f32: float  # of float32 as JAX takes it where nothing is said: a TPU rounds to bfloat16, a GPU to TF32
    exact: float  # of float32 without that: six passes on a TPU, the other units of a GPU
    memory: float  # bytes
    bandwidth: float  # of it, bytes/s
    link: float  # bytes/s that it can send to others of its slice or node, by all its links
    devices: int = 1  # JAX devices of a chip
    lent: float = 1.0  # the part of the memory that JAX takes

    @property
    def usable(self) -> int:
        """Bytes that a program can have."""
        return int(self.lent * self.memory)


def _tpu(name: str, kinds: tuple[str, ...], bf16: float, gib: float, bandwidth: float, link: float, devices: int = 1) -> Chip:
    """Of a chip's numbers those of a device."""
    rates = (bf16 / devices, bf16 / devices, bf16 / 6 / devices)
    return Chip(name, "tpu", kinds, *rates, gib * _GIB / devices, bandwidth / devices, link / devices, devices)


def _gpu(
    name: str, kinds: tuple[str, ...], bf16: float, tf32: float, f32: float, gib: float, bandwidth: float, link: float
) -> Chip:
    # XLA_PYTHON_CLIENT_MEM_FRACTION is 0.75 where it is not set.
    return Chip(name, "gpu", kinds, bf16, tf32, f32, gib * _GIB, bandwidth, link, lent=0.75)


# TPUs: cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e, tpu7x (links: half of the two-way bandwidth). JAX sees the cores of v3
# and tpu7x, and the whole chips of the others. Their memory is what libtpu 0.0.42 says a program can have; of v3 the data
# sheet's. GPUs: the data sheets of A100 (2021), H100 (2023) and H200 (2024), without sparsity; NVLink one way, or PCIe. Their
# memory is in GiB, which is what the data sheets call GB, less one or two that the driver keeps (not measured).
CHIPS = (
    _tpu("v3", ("TPU v3",), 123e12, 32, 900e9, 328e9, devices=2),
    _tpu("v4", ("TPU v4",), 275e12, 30.75, 1228e9, 300e9),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75, 819e9, 200e9),
    _tpu("v5p", ("TPU v5",), 459e12, 95.74, 2765e9, 600e9),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25, 1638e9, 400e9),
    _tpu("tpu7x", ("TPU7x", "TPU v7"), 2307e12, 189.5, 7380e9, 600e9, devices=2),
    _gpu("a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 156e12, 19.5e12, 39, 1555e9, 300e9),
    _gpu("a100-40-pcie", ("NVIDIA A100-PCIE-40GB",), 312e12, 156e12, 19.5e12, 39, 1555e9, 32e9),
    _gpu("a100-pcie", ("NVIDIA A100 80GB PCIe",), 312e12, 156e12, 19.5e12, 79, 1935e9, 32e9),
    _gpu("a100", ("NVIDIA A100",), 312e12, 156e12, 19.5e12, 79, 2039e9, 300e9),
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 378e12, 51e12, 79, 2000e9, 64e9),
    _gpu("h100-nvl", ("NVIDIA H100 NVL",), 835e12, 417e12, 60e12, 93, 3900e9, 300e9),
    _gpu("h100", ("NVIDIA H100",), 989e12, 494e12, 67e12, 79, 3350e9, 450e9),
    _gpu("h200", ("NVIDIA H200",), 989e12, 494e12, 67e12, 139, 4800e9, 450e9),
)


@dataclass(frozen=True)
class Slice:
    """What is rented: so many devices of one kind."""

    name: str  # as it was asked for
    chip: str
    shape: tuple[int, ...]  # of the chips, as they are laid; of GPUs and of a host the number of devices alone

    @property
    def platform(self) -> Platform:
        """Of its devices."""
        return _CPU if self.chip == _CPU else next(chip.platform for chip in CHIPS if chip.name == self.chip)


def of_kind(kind: str) -> Chip | None:
    """The chip whose devices JAX calls so; None: it stands in no data sheet that is known here."""
    near = [(len(start), chip) for chip in CHIPS for start in chip.kinds if kind.startswith(start)]
    return max(near, key=lambda pair: pair[0])[1] if near else None


def parse(text: str) -> Slice:
    """What `v5e:4x4`, `v5p:2x2x2`, `h200:8` or `cpu:8` ask for.

    Raises:
      UserError: there is no such chip, or the shape is not one of its.
    """
    name, _, size = text.partition(":")
    known = [*(chip.name for chip in CHIPS), _CPU]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}:...?" if near else f"known are {', '.join(known)}"
        raise UserError(f"--topology {text}: no chip is called {name!r}: {hint}")
    found = Slice(text, name, tuple(int(number) for number in size.split("x")) if re.fullmatch(r"\d+(x\d+)*", size) else ())
    dims = {"tpu": 3 if name in ("v4", "v5p", "tpu7x") else 2}.get(found.platform, 1)
    if len(found.shape) != dims or 0 in found.shape:
        wanted = {1: f"{name}:8, the devices", 2: f"{name}:4x4, the chips", 3: f"{name}:2x2x2, the chips"}
        raise UserError(f"--topology {text}: expected such as {wanted[dims]}")
    return found


def host(devices: int, memory: int, seconds: float = 1.0) -> Chip:
    """This machine's processor as so many devices, measured by products and copies; `memory`: of one device."""
    import jax
    import jax.numpy as jnp

    size = 1024
    factor = jax.jit(lambda a: a @ a)

    def product(dtype: str) -> float:
        a = jnp.ones((size, size), dtype)
        return 2 * size**3 / _seconds(lambda: factor(a).block_until_ready(), seconds / 4)

    a = jnp.ones(32 << 20, jnp.float32)  # more than any cache holds
    copied = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place, or the system's new pages would be what is measured

    def copy() -> None:
        nonlocal a
        a = copied(a).block_until_ready()

    bandwidth = 2 * a.nbytes / _seconds(copy, seconds / 2)
    f32 = product("float32")
    # One device computes with all cores: what several do at once, they share.
    each = (rate / devices for rate in (product("bfloat16"), f32, f32, bandwidth, bandwidth / 2))
    bf16, f32, exact, bandwidth, link = each
    return Chip(_CPU, _CPU, (_CPU,), bf16, f32, exact, memory, bandwidth, link)


def _seconds(work: Callable[[], object], budget: float) -> float:
    work()
    taken, until = list[float](), time.monotonic() + budget
    while time.monotonic() < until or not taken:
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def chips_in(chip: Chip, devices: int) -> int:
    """The chips that so many devices are."""
    return math.ceil(devices / chip.devices)
