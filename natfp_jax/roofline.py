"""The least time that products of matrices take: operations over the unit's rate, or bytes over bandwidth.

That is the roofline of Williams et al., 2009, of one product after another. Owns the count of the products in a traced
program, with the lengths of loops around them, and what one device has of them. It counts what is carried out: what the
backward pass computes again is there once more; XLA's own cost analysis counts the body of a loop once. Must not know chips,
nor what is sent between devices.

What one device has: an array that holds rows of the batch is cut over `data`, `fsdp` and `replica`, any other, such as a
weight, is there whole; both are cut over `tensor`. Elementwise operations count nothing: at best they are part of the
products beside them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.extend.core import Literal as Constant

__all__ = ["Product", "Rates", "Time", "operations", "products", "time_of"]

_ROWS = ("replica", "data", "fsdp")
Format = Literal["bf16", "f32", "exact"]


class Product(NamedTuple):
    """Products of two arrays, as one device carries them out."""

    flops: float  # of one, on one device
    bytes: float  # that it reads and writes
    times: int  # in one execution of the program
    all_flops: float  # of one, on all devices
    format: Format  # of the factors; exact: float32 without rounding them first


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    bf16: float  # FLOP of products
    f32: float
    exact: float
    bandwidth: float  # bytes of its memory


class Time(NamedTuple):
    """Seconds at the least, by what bounds each product."""

    compute: float
    memory: float

    @property
    def total(self) -> float:
        """Both."""
        return self.compute + self.memory


def operations(found: Iterable[Product]) -> float:
    """FLOP on all devices together."""
    return sum(one.all_flops * one.times for one in found)


def time_of(found: Iterable[Product], rates: Rates) -> Time:
    """The seconds that products take on a device, one after another."""
    compute = memory = 0.0
    for one in found:
        by_unit, by_memory = one.flops / getattr(rates, one.format), one.bytes / rates.bandwidth
        if by_unit >= by_memory:
            compute += one.times * by_unit
        else:
            memory += one.times * by_memory
    return Time(compute, memory)


def products(program: ClosedJaxpr, rows: Iterable[bool], mesh: Mapping[str, int], loops: int = 1) -> list[Product]:
    """The products of a program.

    Args:
      program: as traced, on the whole mesh.
      rows: of each of its inputs, whether it holds rows of the batch.
      mesh: axes and sizes.
      loops: how often a loop goes round whose count is not in the program.
    """
    counted = _Counted(loops)
    counted.walk(program.jaxpr, list(rows), dict(mesh), 1, 1)
    return counted.found


class _Counted:
    """A walk through a program; `rows` says of each value whether it comes from what holds rows."""

    def __init__(self, loops: int) -> None:
        self.loops = loops
        self.found: list[Product] = []
        self.looped = False  # inside of a loop over replicas, or over a sampler's tokens: no array has the axis of replicas

    def walk(self, jaxpr: Jaxpr, rows: list[bool], mesh: dict[str, int], times: int, ways: int) -> list[bool]:
        """What of its outputs holds rows. `mesh`: the axes that are left to the compiler; `ways`: so many do the same."""
        known: dict[Var, bool] = dict(zip(jaxpr.invars, rows, strict=True))

        def of(atom: Any) -> bool:
            return not isinstance(atom, Constant) and known.get(atom, False)

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [of(atom) for atom in eqn.invars], mesh, times, ways)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, given: list[bool], mesh: dict[str, int], times: int, ways: int) -> list[bool]:
        name, parameters = eqn.primitive.name, eqn.params
        if name == "dot_general":
            carries, product = _product(eqn, given, mesh, times, ways, 0 if self.looped else 1)
            self.found.append(product)
            return [carries]
        # Of loops the first round says what holds rows: the next replica's weights hold none either.
        if name == "scan":
            return self.walk(parameters["jaxpr"].jaxpr, given, mesh, times * parameters["length"], ways)
        if name == "while":
            inputs = given[parameters["cond_nconsts"] :]
            before, self.looped = self.looped, True
            outs = self.walk(parameters["body_jaxpr"].jaxpr, inputs, mesh, times * self.loops, ways)
            self.looped = before
            return outs
        if name == "cond":
            return self._costliest(parameters["branches"], given[1:], mesh, times, ways)
        if name == "shard_map":
            # The name of JAX 0.10, and of later ones.
            manual = parameters.get("newly_manual_axes", parameters.get("manual_axes", frozenset()))
            inner = {axis: size for axis, size in mesh.items() if axis not in manual}
            ways *= math.prod(size for axis, size in mesh.items() if axis in manual)
            return self.walk(parameters["jaxpr"], given, inner, times, ways)
        for within in ("jaxpr", "call_jaxpr"):
            if (inside := parameters.get(within)) is not None:
                return self.walk(getattr(inside, "jaxpr", inside), given, mesh, times, ways)
        return [any(given)] * len(eqn.outvars)

    def _costliest(
        self, branches: Iterable[ClosedJaxpr], given: list[bool], mesh: dict[str, int], times: int, ways: int
    ) -> list[bool]:
        """Of branches the one with the most operations."""
        before, most, outs = len(self.found), list[Product](), list[bool]()
        for branch in branches:
            here = self.walk(branch.jaxpr, given, mesh, times, ways)
            outs = [any(each) for each in zip(outs or here, here, strict=True)]
            most = max(most, self.found[before:], key=operations)
            del self.found[before:]
        self.found += most
        return outs


def _product(eqn: Any, given: list[bool], mesh: dict[str, int], times: int, ways: int, leading: int) -> tuple[bool, Product]:
    """Whether the outcome holds rows, and the product; `leading`: axes of replicas that arrays have in front, 0 or 1."""
    (left, right), out = (atom.aval for atom in eqn.invars), eqn.outvars[0].aval
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    flops = 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    # Two arrays of rows that have nothing but the axis of the replicas in common are summed over their rows: the gradient of a
    # weight. What they have in common besides is rows: of each row, or of each device's.
    summed = all(given) and len(batched) <= leading and not any(axis for axis in batched)
    carries = any(given) and not summed
    cut, tensor = math.prod(mesh.get(axis, 1) for axis in _ROWS), mesh.get("tensor", 1)
    moved = sum(
        math.prod(array.shape) * array.dtype.itemsize / (cut if holds else mesh.get("replica", 1)) / tensor
        for array, holds in ((left, given[0]), (right, given[1]), (out, carries))
    )
    return carries, Product(flops / math.prod(mesh.values()), moved, times, float(flops * ways), _format(eqn, left, right))


def _format(eqn: Any, left: Any, right: Any) -> Format:
    if np.dtype("float32") not in (left.dtype, right.dtype):
        return "bf16"
    precision = eqn.params["precision"]
    return "exact" if precision is not None and jax.lax.Precision.HIGHEST in tuple(np.ravel(precision)) else "f32"
