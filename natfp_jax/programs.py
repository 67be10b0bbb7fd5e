"""Compiled programs, kept from one process to the next.

Owns where. Must not know what is compiled.
"""

import jax

from natfp_jax import places

__all__ = ["keep"]


def keep() -> None:
    """Lets JAX keep what it compiles below the user's cache folder, unless `JAX_COMPILATION_CACHE_DIR` says where."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(places.cache()))
