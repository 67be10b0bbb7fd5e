"""What proves a checkpoint's descent.

Owns the hashes of weights, the identity of an experiment on a prepared corpus, and the numerics record. Must not know how
training works or where files lie.
"""

import hashlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from natfp_jax import config
from natfp_jax.config import Experiment
from natfp_jax.params import Params, flatten

__all__ = ["Identity", "identity", "numerics", "weight_hash"]

RECIPE = 1  # raised when a change of the code leads the same experiment to other weights: old runs are then not its own
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "scikit-learn")


def weight_hash(params: Params) -> str:
    """sha256 over path, shape, dtype and little-endian bytes of every parameter, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in flatten(params).items():
        value = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {value.shape} {value.dtype.name}\n".encode())
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Identity:
    """What an experiment is once its corpus is known: the hashes that decide the weights, and the fingerprint over all."""

    fingerprint: str
    inputs: dict[str, str]  # the sha256 of "corpus", "tokenizer", "pool"; the "recipe" of the code

    @property
    def short(self) -> str:
        """The first 16 digits, used as a folder's name."""
        return self.fingerprint[:16]


def identity(experiment: Experiment, corpus: str, tokenizer: str, pool: str) -> Identity:
    """The identity of `experiment` on a corpus, tokenizer and pool with these sha256."""
    inputs = {"corpus": corpus, "tokenizer": tokenizer, "pool": pool, "recipe": str(RECIPE)}
    return Identity(config.fingerprint(experiment, inputs), inputs)


def numerics(mesh: jax.sharding.Mesh, **shapes: Any) -> dict[str, Any]:
    """What bits may depend on beyond the experiment: versions, devices, mesh, threads, flags and the given block shapes."""
    device = mesh.devices.flat[0]
    return {
        "backend": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        **shapes,
    }
