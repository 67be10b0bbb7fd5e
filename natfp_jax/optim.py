"""Schedule and optimiser.

Owns how a gradient becomes an update; which parameters decay stands in the table. Must not know what the loss is.
"""

import optax

from natfp_jax.config import Optimiser
from natfp_jax.params import Spec, nest

__all__ = ["optimiser", "schedule"]


def schedule(config: Optimiser, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, linear or constant.

    The first step already moves: warm-up starts at one part of `warmup + 1`, so that no batch is fed for nothing.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final
    warmup = round(config.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def optimiser(config: Optimiser, steps: int, specs: dict[str, Spec]) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) after clipping by the global norm; decay on what the table says."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=nest({path: spec.decay for path, spec in specs.items()}),
        ),
    )
