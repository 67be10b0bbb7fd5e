"""Schedule and optimiser.

Owns how a gradient becomes an update. What is a number among the settings is an array, so that replicas which differ in it are
one program; which parameters decay stands in the table. Must not know what the loss is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natfp_jax.config import Optimiser
from natfp_jax.params import Spec, nest

__all__ = ["Hyperparameters", "hyperparameters", "optimiser", "schedule"]


class Hyperparameters(NamedTuple):
    """The numbers of `config.Optimiser`: float32 scalars, or arrays of one value a replica."""

    learning_rate: Any
    warmup: Any  # whole steps
    final: Any
    beta1: Any
    beta2: Any
    epsilon: Any
    weight_decay: Any
    clip: Any


def hyperparameters(config: Optimiser, steps: int) -> Hyperparameters:
    """The numbers of one replica that is trained for so many steps."""
    given = {name: np.float32(getattr(config, name)) for name in Hyperparameters._fields}
    return Hyperparameters(**{**given, "warmup": np.float32(round(config.warmup * steps))})


def schedule(numbers: Hyperparameters, kind: str, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, linear or constant.

    The first step already moves: warm-up starts at one part of `warmup + 1`, so that no batch is fed for nothing.
    (Optax's own schedules take Python numbers only, which would make replicas of other rates other programs.)
    """

    def rate(step: Any) -> jax.Array:
        done = jnp.clip((step - numbers.warmup) / jnp.maximum(steps - numbers.warmup, 1), 0, 1)
        falling = {"cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "linear": 1 - done, "constant": jnp.ones_like(done)}[kind]
        after = falling if kind == "constant" else numbers.final + (1 - numbers.final) * falling
        return numbers.learning_rate * jnp.where(step < numbers.warmup, (step + 1) / (numbers.warmup + 1), after)

    return rate


def optimiser(numbers: Hyperparameters, kind: str, steps: int, specs: dict[str, Spec]) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) after clipping by the global norm; decay on what the table says."""
    return optax.chain(
        optax.clip_by_global_norm(numbers.clip),
        optax.adamw(
            schedule(numbers, kind, steps),
            b1=numbers.beta1,
            b2=numbers.beta2,
            eps=numbers.epsilon,
            weight_decay=numbers.weight_decay,
            mask=nest({path: spec.decay for path, spec in specs.items()}),
        ),
    )
