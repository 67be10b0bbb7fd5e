"""Compiled programs, kept from one process to the next.

Owns where. Must not know what is compiled.
"""

import os
from pathlib import Path

import jax

__all__ = ["keep"]


def keep() -> None:
    """Lets JAX keep what it compiles below the user's cache folder, unless `JAX_COMPILATION_CACHE_DIR` says where."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "natfp_jax"))
