"""Eight CPU devices for every test of this process, and no legacy keys.

Tests of the command line run in processes of their own, with the devices of the machine.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_legacy_prng_key", "error")
