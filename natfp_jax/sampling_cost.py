"""What drawing texts costs: the sampler's programs, traced and compiled from shapes alone.

Owns bytes and least seconds of them. Must not know studies.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax

from natfp_jax import roofline
from natfp_jax.chips import Chip
from natfp_jax.config import Model, Sampling
from natfp_jax.costs import Memory, Time, asked_for, held, rates
from natfp_jax.program import device_bytes
from natfp_jax.sample import Programs, at_once, new_slots_for, programs_of
from natfp_jax.strategy import strategy_of
from natfp_jax.turns import stretches

__all__ = ["Texts", "texts_of"]


@dataclass(frozen=True)
class Texts:
    """Draws from models of one shape."""

    draws: int
    texts: int  # of one draw
    rows: int  # that a device draws together
    everywhere: int  # that all devices do
    slots: int  # of a text, for its prompt and for what is new
    memory: Memory
    time: Time  # of a token of all rows, in the last stretch
    seconds: float  # of all draws, were each text of full length


def texts_of(
    model: Model,
    sampling: Sampling,
    sizes: tuple[int, int],
    count: int,
    prompt_slots: int,
    rows: int,
    chip: Chip,
    devices: jax.sharding.Mesh,
    say: Callable[[str], None],
) -> Texts:
    """Draws from models of one shape.

    Args:
      sizes: of the vocabulary, without and with padding.
      count: the draws.
      prompt_slots: of every text.
      rows: texts that a device draws together.
      say: told what is compiled.
    """
    new = sampling.lengths[-1]
    # Which id ends a text does not change what it costs.
    made = programs_of(model, strategy_of(sampling, sampling.temperatures[0]), *sizes, 0, rows, devices, sampling.cache)
    last = made.traced_begin(prompt_slots)
    token = _time(last, devices, chip)
    seconds, age, times = token.seconds, 1, dict[int, Time]()
    for until, slots, width in stretches(new):
        if slots not in times:
            last = made.traced_turn(prompt_slots, slots, width)
            times[slots] = token = _time(last, devices, chip)
        seconds += (until - age) * token.seconds
        age = until
    say(f"compiles the sampler for {devices.size} devices, {rows} texts each")
    # Of a draw, whose texts lie in files, on its own part of the devices.
    each, ways = min(sampling.prompts, sampling.file_texts), devices.shape["replica"]
    batches = math.ceil(sampling.prompts / each) * math.ceil(each / (rows * made.ways // ways))
    return Texts(
        draws=count,
        texts=sampling.prompts,
        rows=rows,
        everywhere=rows * made.ways,
        slots=prompt_slots + new_slots_for(new),
        memory=_memory(made, last, chip.usable),
        time=token,
        seconds=math.ceil(count / ways) * batches * seconds,
    )


def _time(traced: jax.stages.Traced, devices: jax.sharding.Mesh, chip: Chip) -> Time:
    """Of reading prompts, or of one token: the loop's count is no part of its program."""
    weights, *rest = jax.tree.map(lambda _: True, traced.in_avals[0])
    rows = [*jax.tree.leaves(jax.tree.map(lambda _: False, weights)), *jax.tree.leaves(rest)]
    taken = roofline.time_of(roofline.products(traced.jaxpr, rows, devices.shape), rates(chip))
    return Time(taken.compute, taken.memory, 0.0)


def _memory(made: Programs, traced: jax.stages.Traced, usable: int) -> Memory:
    weights = held(made.weight_shapes)
    cut = made.ways * made.devices.shape["tensor"]
    batches = at_once(made.devices)
    cache = batches * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(traced.out_info[0].cache)) // cut
    try:
        rest = batches * (device_bytes(traced.lower().compile()) - weights) - cache
    except jax.errors.JaxRuntimeError as error:
        return Memory(weights, cache, None, max(asked_for(error), weights + cache), usable)
    return Memory(weights, cache, rest, weights + cache + rest, usable)
