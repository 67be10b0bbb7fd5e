"""Devices → mesh.

Owns the axes `data`, `fsdp`, `tensor` and what is laid over them. Must not know the model beyond its parameter table.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from natfp_jax import config
from natfp_jax.errors import UserError
from natfp_jax.params import Params, Spec, nest

__all__ = ["AXES", "batch_sharding", "check_batch", "check_params", "make", "param_shardings", "replicated", "size"]

AXES = ("data", "fsdp", "tensor")


def size(mesh: config.Mesh, devices: int) -> config.Mesh:
    """`mesh` with `data` filled in.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    others = mesh.fsdp * mesh.tensor
    data = mesh.data or devices // others
    if data * others != devices:
        raise UserError(
            f"run.mesh data {mesh.data or 'rest'} x fsdp {mesh.fsdp} x tensor {mesh.tensor} "
            f"does not multiply to the {devices} devices at hand"
        )
    return config.Mesh(data, mesh.fsdp, mesh.tensor)


def make(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices`, by default all there are."""
    devices = jax.devices() if devices is None else devices
    sized = size(mesh, len(devices))
    shape = (sized.data, sized.fsdp, sized.tensor)
    # The axis types are named: the default of make_mesh has changed between JAX versions.
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(name: str, batch: int, mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError if `batch` rows do not divide over the axes that hold rows."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % ways:
        raise UserError(
            f"{name} {batch} does not divide over data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {ways} devices"
        )


def check_params(specs: dict[str, Spec], mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError if a parameter's dimension does not divide over its mesh axis."""
    for path, spec in specs.items():
        for letter, length, axis in zip(spec.dims, spec.shape, spec.partition, strict=True):
            if axis is not None and length % mesh.shape[axis]:
                raise UserError(f"parameter {path}: {letter} = {length} does not divide over mesh.{axis} = {mesh.shape[axis]}")


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; whatever else a row has stays together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: jax.sharding.Mesh, specs: dict[str, Spec]) -> Params:
    """The sharding of every parameter, by the table."""
    return nest({path: NamedSharding(mesh, spec.partition) for path, spec in specs.items()})
