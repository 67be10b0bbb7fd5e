"""What turns logits into the distribution that is drawn from.

Owns the effective distribution: the sampler draws from it, the ceiling scores under it. Must not know models, noise or files.

A strategy is a tuple of steps, each a function of logits and of the ids that a text has already. Letters: V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from natfp_jax.config import Sampling
from natfp_jax.errors import UserError

__all__ = [
    "Greedy",
    "MinP",
    "RepetitionPenalty",
    "Step",
    "Strategy",
    "Temperature",
    "TopK",
    "TopP",
    "effective",
    "remembers",
    "strategy_of",
]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Ids that prompt or text have already become less likely: their logits divided by `value` if positive, else times it.

    Keskar et al., 2019.
    """

    value: float

    def __call__(self, z_V: jax.Array, seen_V: jax.Array) -> jax.Array:
        """The new logits."""
        return jnp.where(seen_V, jnp.where(z_V > 0, z_V / self.value, z_V * self.value), z_V)


@dataclass(frozen=True)
class Temperature:
    """Logits divided by `value`."""

    value: float

    def __call__(self, z_V: jax.Array, seen_V: jax.Array | None) -> jax.Array:
        """The new logits."""
        del seen_V
        return z_V / self.value


@dataclass(frozen=True)
class TopK:
    """The `k` most likely ids, and those that are tied with the last of them."""

    k: int

    def __call__(self, z_V: jax.Array, seen_V: jax.Array | None) -> jax.Array:
        """The new logits."""
        del seen_V
        if self.k >= z_V.shape[-1]:
            return z_V
        return jnp.where(z_V >= jax.lax.top_k(z_V, self.k)[0][..., -1:], z_V, -jnp.inf)


@dataclass(frozen=True)
class TopP:
    """The fewest most likely ids that together have at least `p`, and those tied with the last (Holtzman et al., 2020)."""

    p: float

    def __call__(self, z_V: jax.Array, seen_V: jax.Array | None) -> jax.Array:
        """The new logits."""
        del seen_V
        p_V = jax.nn.softmax(z_V, axis=-1)
        falling = -jnp.sort(-p_V, axis=-1)
        before = jnp.cumsum(falling, axis=-1) - falling  # an id is kept while what stands before it is less than p
        last = jnp.min(jnp.where(before < self.p, falling, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(p_V >= last, z_V, -jnp.inf)


@dataclass(frozen=True)
class MinP:
    """The ids that have at least `p` times the probability of the most likely one (Nguyen et al., 2024)."""

    p: float

    def __call__(self, z_V: jax.Array, seen_V: jax.Array | None) -> jax.Array:
        """The new logits."""
        del seen_V
        return jnp.where(z_V >= z_V.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(self.p)), z_V, -jnp.inf)


@dataclass(frozen=True)
class Greedy:
    """The most likely id alone; of tied ones the first."""

    def __call__(self, z_V: jax.Array, seen_V: jax.Array | None) -> jax.Array:
        """The new logits."""
        del seen_V
        return jnp.where(jnp.arange(z_V.shape[-1]) == z_V.argmax(axis=-1, keepdims=True), 0.0, -jnp.inf)


Step = RepetitionPenalty | Temperature | TopK | TopP | MinP | Greedy
# Hashable, so that it can be a static argument; the noise of a draw is named after how it is written.
Strategy = tuple[Step, ...]


def strategy_of(sampling: Sampling, temperature: float) -> Strategy:
    """The steps of a sampling configuration, at one of its temperatures, in the order in which Hugging Face takes them.

    Raises:
      UserError: it is greedy and asks for something that is not.
    """
    steps: list[Step] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenalty(sampling.repetition_penalty))
    if sampling.greedy:
        if (temperature, sampling.top_k, sampling.top_p, sampling.min_p) != (1, None, 1, 0):
            raise UserError(
                "sampling.greedy takes the most likely id, always: leave out temperature, top_k, top_p and min_p, or greedy"
            )
        return (*steps, Greedy())
    if temperature != 1:
        steps.append(Temperature(temperature))
    if sampling.top_k is not None:
        steps.append(TopK(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopP(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(MinP(sampling.min_p))
    return tuple(steps)


def remembers(strategy: Strategy) -> bool:
    """Whether the distribution depends on the ids that a text has already."""
    return any(isinstance(step, RepetitionPenalty) for step in strategy)


def effective(strategy: Strategy, z_V: jax.Array, seen_V: jax.Array | None = None) -> jax.Array:
    """The logits of the distribution that is drawn from, minus infinity where it cannot be; over the last axis, float32.

    Ids that are tied with the last one kept are kept too, so that the distribution does not depend on the order of ids.

    Args:
      seen_V: the ids that prompt or text have already, for a strategy that `remembers`.
    """
    for step in strategy:
        z_V = step(z_V, seen_V)  # type: ignore[arg-type]  # who remembers is given what was seen
    return z_V
