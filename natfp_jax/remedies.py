"""What of `run.` to change where training does not fit.

Owns which settings are tried, in which order. Must not know how a setting is carried out.

Nearest first: the fewest steps away, a step being the next kind of `remat`, twice the `fsdp`, or twice the `microbatches`;
among those as far, fewer microbatches, which make every step longer, and then less `fsdp`, which makes devices send more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import jax

from natfp_jax import mesh
from natfp_jax.config import Experiment, Run
from natfp_jax.costs import Memory, held
from natfp_jax.errors import UserError
from natfp_jax.program import program_for
from natfp_jax.train import check_laid
from natfp_jax.training_cost import memory_of

__all__ = ["Remedy", "nearest"]

_REMAT = ("none", "dots", "full")
_TRIED = 6  # settings that are compiled; those that follow are further away


@dataclass(frozen=True)
class Remedy:
    """Settings, and what training takes under them: it fits, or is the least that was found."""

    overrides: tuple[str, ...]  # of a command line
    memory: Memory


def nearest(
    experiments: list[Experiment],
    sizes: tuple[int, int],
    settings: Run,
    usable: int,
    devices: jax.sharding.Mesh,
    say: Callable[[str], None],
) -> Remedy | None:
    """The nearest settings under which one arm a place of each shape fits, or those that take the least.

    Args:
      experiments: one of each shape.
      sizes: of the vocabulary, without and with padding.
      usable: bytes of a device.
      devices: in any mesh.
      say: told what is compiled.

    Returns:
      None, if there is nothing to try.
    """
    least, tried = None, 0
    flat = list(devices.devices.flat)
    for overrides, run in _candidates(settings, devices):
        laid = mesh.make(run.mesh, flat)
        try:
            for one in experiments:
                check_laid(one, sizes[1], run, laid)
        except UserError:
            continue
        made = [program_for(one, *sizes, laid, run) for one in experiments]
        if any(held(one.state) + held(one.state.params) > usable for one in made):  # with the gradients
            continue
        if tried == _TRIED:
            break
        tried += 1
        say(f"tries {' '.join(overrides)}")
        memory = max((memory_of(one, usable) for one in made), key=lambda found: (not found.fits, found.least))
        if memory.fits:
            return Remedy(overrides, memory)
        if least is None or memory.least < least.memory.least:
            least = Remedy(overrides, memory)
    return least


def _candidates(settings: Run, devices: jax.sharding.Mesh) -> Iterator[tuple[tuple[str, ...], Run]]:
    given, rest = settings.mesh, devices.shape["data"] * devices.shape["fsdp"]
    remats = _REMAT[_REMAT.index(settings.remat) :]
    doubled = [given.fsdp << step for step in range(rest.bit_length()) if rest % (given.fsdp << step) == 0]
    parts = [settings.microbatches << step for step in range(6)]
    steps = product(range(len(remats)), range(len(doubled)), range(len(parts)))
    for remat, fsdp, part in sorted(steps, key=lambda step: (sum(step), step[2], step[1]))[1:]:
        overrides = [f"run.remat={remats[remat]}"] * (remat > 0)
        if fsdp:
            overrides += [f"run.mesh.fsdp={doubled[fsdp]}"] + [f"run.mesh.data={rest // doubled[fsdp]}"] * (given.data > 0)
        overrides += [f"run.microbatches={parts[part]}"] * (part > 0)
        data = rest // doubled[fsdp] if given.data else 0
        laid = replace(given, fsdp=doubled[fsdp], data=data)
        yield tuple(overrides), replace(settings, remat=remats[remat], mesh=laid, microbatches=parts[part])  # type: ignore[arg-type]
