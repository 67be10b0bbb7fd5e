"""What proves a checkpoint's descent.

Owns the hashes of weights, the identity of an experiment on a prepared corpus, and the numerics record. Must not know how
training works or where files lie.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from natfp_jax import __version__, config, processes
from natfp_jax.config import Experiment
from natfp_jax.files import hash_file, hash_json
from natfp_jax.mesh import cores
from natfp_jax.params import Params, flatten

__all__ = ["Identity", "code", "identity", "numerics", "weight_hash"]

RECIPE = 2  # raised when a change of the code leads the same experiment to other weights: old runs are then not its own
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "scikit-learn")


def weight_hash(params: Params) -> str:
    """sha256 over path, shape, dtype and little-endian bytes of every parameter, in the order of the paths.

    With many processes all of them call it, and all get it.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(params).items():
        value = np.ascontiguousarray(processes.gathered(leaf))
        digest.update(f"{path} {value.shape} {value.dtype.name}\n".encode())
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Identity:
    """What an experiment is once its corpus is known: the hashes that decide the weights, and the fingerprint over all."""

    fingerprint: str
    inputs: dict[str, str]  # the sha256 of "corpus", "tokenizer", "pool"; the "recipe" of the code; of a child its "parent"

    @property
    def short(self) -> str:
        """The first 16 digits, used as a folder's name."""
        return self.fingerprint[:16]


def identity(experiment: Experiment, corpus: str, tokenizer: str, pool: str, parent: str | None = None) -> Identity:
    """The identity of `experiment` on a corpus, tokenizer and pool with these sha256, and of a parent with this fingerprint."""
    inputs = {"corpus": corpus, "tokenizer": tokenizer, "pool": pool, "recipe": str(RECIPE)}
    inputs |= {} if parent is None else {"parent": parent}
    return Identity(config.fingerprint(experiment, inputs), inputs)


@functools.cache
def code() -> str:
    """The version of natfp_jax: its number, and sha256 over its source files."""
    package = Path(__file__).parent
    listed = {path.relative_to(package).as_posix(): hash_file(path) for path in package.rglob("*.py")}
    return f"{__version__} {hash_json(listed)}"


def numerics(mesh: jax.sharding.Mesh, **shapes: Any) -> dict[str, Any]:
    """What bits may depend on beyond the experiment: versions, devices, mesh, threads, flags and the given block shapes."""
    device = mesh.devices.flat[0]
    return {
        "backend": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "mesh": dict(mesh.shape),
        # Sums over a host's own devices and sums between processes are taken in another order.
        "collectives": ("processes" if jax.distributed.is_initialized() else "host") if mesh.size > 1 else "none",
        "cpu_threads": cores(),
        # Without the number of devices that a host's CPU stands for: the mesh says it, and processes share it in many ways.
        "xla_flags": re.sub(r"\s*--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip(),
        "matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        **shapes,
    }
