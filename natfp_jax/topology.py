"""Devices to plan for, which need not be at hand.

Owns how the devices of a slice are had: TPUs by their compiler alone, GPUs and CPUs as parts of this host's processor. Must not
know what is planned.
"""

import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax

from natfp_jax import chips, config, mesh
from natfp_jax.chips import Chip, Slice
from natfp_jax.errors import UserError

__all__ = ["Rented", "prepare", "rented"]

# What libtpu asks the cloud or the environment for, where there is no TPU.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TPU_MIN_LOG_LEVEL": "4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for who uses the chips
}


@dataclass(frozen=True)
class Rented:
    """Devices, and what stands in the data sheet."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    stand_in: bool  # whether they are a host's, for want of a compiler for what they stand for


def prepare(wanted: Slice) -> None:
    """Keeps JAX on the host; to be called before it has started.

    Raises:
      UserError: the slice is one of TPUs, and their compiler is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    if wanted.platform != "tpu":
        # The other way to say how many, which JAX refuses beside this one.
        flags = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "xla_force_host_platform_device_count" not in flag)
        jax.config.update("jax_num_cpu_devices", wanted.shape[0])
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {wanted.name}: to plan for TPUs takes their compiler: pip install 'natfp-jax[tpu]'")
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)


def rented(wanted: Slice | None) -> Rented:
    """The devices of a slice, or else all that are at hand; a host is measured.

    Raises:
      UserError: there is no such slice, or devices at hand are in no data sheet that is known here.
    """
    if wanted is not None and wanted.platform == "tpu":
        found = _tpus(wanted)
        known = chips.of_kind(found[0].device_kind)
        assert known is not None  # the table has the chip that was asked for
        return Rented(wanted.name, known, found, stand_in=False)
    there = jax.devices()
    if wanted is not None and wanted.platform == "gpu":
        chip = next(chip for chip in chips.CHIPS if chip.name == wanted.chip)
        return Rented(wanted.name, chip, there, stand_in=True)
    name, memory = f"{len(there)} x {there[0].device_kind}", mesh.device_memory(mesh.make(config.Mesh(), there))
    if there[0].platform == "cpu":
        return Rented(name, chips.host(len(there), memory), there, stand_in=False)
    at_hand = chips.of_kind(there[0].device_kind)
    if at_hand is None:
        raise UserError(
            f"{name} are in no data sheet that is known here: give --topology, such as h200:8; known are "
            f"{', '.join(chip.name for chip in chips.CHIPS)}"
        )
    return Rented(name, replace(at_hand, memory=memory, lent=1.0), there, stand_in=False)


def _tpus(wanted: Slice) -> Sequence[jax.Device]:
    """In the order of a mesh over them."""
    from jax.experimental import topologies

    # v4 as JAX sees it, chips and not cores; a chip alone is rented of v5e and v6e.
    options: dict[str, object] = {"chip_config_name": "megacore"} if wanted.chip == "v4" else {}
    if math.prod(wanted.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with _quiet():
            description = topologies.get_topology_desc(platform="tpu", topology_name=wanted.name, **options)
        found: Sequence[jax.Device] = description.devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"--topology {wanted.name}: the TPU compiler knows no slice of {math.prod(wanted.shape)} chips so laid ({said}): "
            "give one that is rented, such as v5e:4x4, v6e:8x8 or v5p:2x4x4"
        ) from None
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a library writes to standard error by itself: libtpu asks for what only a TPU's host has, and says so."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nothing, os.fdopen(os.dup(2), "w") as kept:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)
