"""Devices → mesh.

Owns the axes `replica`, `data`, `fsdp`, `tensor` and what is laid over them. Must not know the model beyond its parameter
table.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from natfp_jax import config
from natfp_jax.errors import UserError
from natfp_jax.params import Params, Spec, nest

__all__ = [
    "AXES",
    "Devices",
    "batch_sharding",
    "by_rows",
    "check_batch",
    "check_params",
    "constrain",
    "cores",
    "device_memory",
    "lay",
    "make",
    "param_shardings",
    "replicated",
    "size",
    "stacked",
    "text_sharding",
    "text_ways",
    "whole",
]

_CONTAINER = Path("/sys/fs/cgroup/memory.max")
AXES = ("replica", "data", "fsdp", "tensor")
Devices = jax.sharding.Mesh | jax.sharding.AbstractMesh
_BATCH, _TEXTS = ("data", "fsdp"), ("replica", "data", "fsdp")  # the axes that hold rows of training, and of sampling


def size(mesh: config.Mesh, devices: int) -> config.Mesh:
    """`mesh` with `data` filled in.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    others = mesh.replica * mesh.fsdp * mesh.tensor
    data = mesh.data or devices // others
    if data * others != devices:
        raise UserError(
            f"run.mesh replica {mesh.replica} x data {mesh.data or 'rest'} x fsdp {mesh.fsdp} x tensor {mesh.tensor} "
            f"does not multiply to the {devices} devices at hand"
        )
    return replace(mesh, data=data)


def make(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices`, by default all that all processes have."""
    devices = jax.devices() if devices is None else devices
    sized = size(mesh, len(devices))
    shape = (sized.replica, sized.data, sized.fsdp, sized.tensor)
    # The axis types are named: the default of make_mesh has changed between JAX versions.
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(name: str, batch: int, mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError if `batch` rows of training do not divide over the axes that hold them."""
    ways = math.prod(mesh.shape[axis] for axis in _BATCH)
    if batch % ways:
        product = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in _BATCH)
        raise UserError(f"{name} {batch} does not divide over {product} = {ways} devices")


def check_params(specs: dict[str, Spec], mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError if a parameter's dimension does not divide over its mesh axis."""
    for path, spec in specs.items():
        for letter, length, axis in zip(spec.dims, spec.shape, spec.partition, strict=True):
            if axis is not None and length % mesh.shape[axis]:
                raise UserError(f"parameter {path}: {letter} = {length} does not divide over mesh.{axis} = {mesh.shape[axis]}")


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Batches of training, [K, B, ...]: replicas over `replica`, rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec("replica", _BATCH))


def stacked(sharding: NamedSharding) -> NamedSharding:
    """The sharding of arrays like one's, of all replicas: their axis in front."""
    return NamedSharding(sharding.mesh, PartitionSpec("replica", *sharding.spec))


def text_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of texts over `replica`, `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(_TEXTS))


def whole(mesh: Devices) -> bool:
    """Whether a device has all of a replica: its rows, heads and columns."""
    return all(mesh.shape[axis] == 1 for axis in AXES if axis != "replica")


def text_ways(mesh: jax.sharding.Mesh) -> int:
    """The number of parts that texts are cut into."""
    return math.prod(mesh.shape[axis] for axis in _TEXTS)


def device_memory(mesh: jax.sharding.Mesh) -> int:
    """Bytes that one device of this process has.

    Of the memory of a host, or of the container that it lends, a process's CPU devices have equal parts; other processes there
    are not known.
    """
    local = mesh.local_devices
    stats = local[0].memory_stats() if local[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CONTAINER.read_text().strip() if _CONTAINER.exists() else "max"
    return min(host, host if limit == "max" else int(limit)) // len(local)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lay(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, the same on every process, over the mesh; a process hands over only what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree)


def constrain(array: jax.Array, dims: str, mesh: Devices | None) -> jax.Array:
    """Lays an activation as its letters say: rows over `data` and `fsdp`, heads and MLP columns over `tensor`.

    Without a mesh, or on one device, the array itself.
    """
    if mesh is None or mesh.size == 1:
        return array
    axes = {"B": _BATCH, "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*(axes.get(letter) for letter in dims))))


def by_rows(function: Callable[..., tuple[Any, Any]], mesh: Devices | None, *rows: Any) -> tuple[Any, Any]:
    """`function` of the rows of each device by themselves, as if it had no others: sums, and a value for each row.

    A loop in `function` so adds up what is a device's own, and devices add theirs once, after it; of a loop over all rows the
    compiler makes a sum over devices in every pass. Until then every device has a whole sum, but for `tensor`.

    Args:
      function: maps arrays [B, ...] to what is summed over rows and what is [B, ...].
      rows: arrays [B, ...], or None.
    """
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _BATCH)
    if ways == 1:
        return function(*rows)

    def cut(array: jax.Array) -> jax.Array:
        parts = array.reshape(ways, -1, *array.shape[1:])
        return constrain(parts, "B".ljust(parts.ndim, "."), mesh)

    sums, values = jax.vmap(function, spmd_axis_name=_BATCH)(*jax.tree.map(cut, rows))
    summed, joined = lambda parts: parts.sum(axis=0), lambda parts: parts.reshape(-1, *parts.shape[2:])
    return jax.tree.map(summed, sums), jax.tree.map(joined, values)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: jax.sharding.Mesh, specs: dict[str, Spec]) -> Params:
    """The sharding of every parameter, by the table."""
    return nest({path: NamedSharding(mesh, spec.partition) for path, spec in specs.items()})
