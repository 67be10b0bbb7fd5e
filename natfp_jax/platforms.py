"""The platform that programs are made for.

Owns which one that is: the devices' own, unless a plan says that they stand for others. Must not know what is chosen by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import jax

__all__ = ["Platform", "planned", "target"]

Platform = Literal["cpu", "gpu", "tpu"]
_PLANNED: ContextVar[Platform | None] = ContextVar("planned", default=None)


@contextmanager
def planned(platform: Platform) -> Iterator[None]:
    """Within it programs are made as for this platform: from a host that has none of it, or on devices that stand for it."""
    before = _PLANNED.set(platform)
    try:
        yield
    finally:
        _PLANNED.reset(before)


def target(devices: jax.sharding.Mesh | None = None) -> str:
    """The platform to choose for.

    Args:
      devices: what a program runs on; left out: JAX's default.
    """
    return _PLANNED.get() or (jax.default_backend() if devices is None else devices.devices.flat[0].platform)
