"""What programs cost on a device: bytes and least seconds.

Owns the words for both, and how they follow from a program and a chip. Must not know which programs there are.

Seconds are those of a roofline: products one after another, each bounded by the unit or by the memory, and the update of all
weights; what devices send goes on beside that. Nothing is quicker, and much is slower.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from natfp_jax.chips import Chip
from natfp_jax.roofline import Rates

__all__ = ["Memory", "Sent", "Time", "asked_for", "held", "rates", "size"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int  # of training with the axis of the arms; of sampling in the dtype of the computation
    state: int  # the optimiser's, or keys and values of the texts under way
    rest: int | None  # gradients, activations, temporaries, code; None: the compiler found no room
    least: int  # what all of it takes, or at least takes where there is no room
    usable: int

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.rest is not None and self.least <= self.usable


@dataclass(frozen=True)
class Sent:
    """What a device sends to others in one step."""

    kind: str
    axes: tuple[str, ...]
    bytes: float


@dataclass(frozen=True)
class Time:
    """The least seconds of one execution, on every device."""

    compute: float  # of products that the unit bounds
    memory: float  # of products that the memory bounds, and of the update
    interconnect: float  # beside that

    @property
    def seconds(self) -> float:
        """Of all."""
        return max(self.compute + self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """What most of it is due to."""
        if self.interconnect > self.compute + self.memory:
            return "interconnect"
        return "compute" if self.compute >= self.memory else "memory"


def rates(chip: Chip) -> Rates:
    """What a device of the chip does."""
    return Rates(chip.bf16, chip.f32, chip.exact, chip.bandwidth)


def asked_for(error: jax.errors.JaxRuntimeError) -> int:
    """The bytes that a TPU's compiler would have needed, 0 where it does not say; raises any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", str(error))
    return 0 if found is None else int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def size(leaf: Any) -> int:
    """Bytes of an array on all devices together, counted once."""
    return math.prod(leaf.shape) * int(leaf.dtype.itemsize)


def held(tree: Any) -> int:
    """Bytes that one device has of arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
