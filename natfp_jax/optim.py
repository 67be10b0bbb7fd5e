"""Schedule and optimiser.

Owns how a gradient becomes an update. What is a number among the settings is an array, so that replicas which differ in it are
one program; which parameters decay, and which are matrices of a layer, stands in the table. Must not know what the loss is.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from natfp_jax.config import Optimiser
from natfp_jax.params import Spec, nest

__all__ = ["Hyperparameters", "hyperparameters", "optimiser", "schedule"]

_RMS = 0.2  # of an update before the learning rate, by Liu et al.


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


def optimiser(
    numbers: Hyperparameters, kind: str, rate: optax.Schedule, specs: dict[str, Spec]
) -> optax.GradientTransformation:
    """Clipping by the global norm; a direction; decoupled weight decay on what the table says; the learning rate.

    An update is −rate · (direction + weight_decay · weight). The direction is, by `kind`,

    - `adamw`: Adam's, with `beta1`, `beta2` and `epsilon` (Loshchilov and Hutter, 2019, arXiv 1711.05101).
    - `lion`: sign(beta1 · momentum + (1 − beta1) · gradient), where `beta2` is the decay of the momentum, which is renewed
      after that; `epsilon` is ignored (Chen et al., 2023, arXiv 2302.06675, algorithm 2).
    - `muon`: of a layer's matrix its momentum, made orthogonal by five steps of Newton and Schulz (Jordan, 2024,
      kellerjordan.github.io/posts/muon), times 0.2 · √(the greater of its two sides), which gives it the root mean square that
      is usual of Adam, so that a rate and a decay mean about the same (Liu et al., 2025, arXiv 2502.16982, section 2.2). The
      momentum decays by `beta1` and looks ahead as Nesterov's does, its bias corrected as Dozat (2016) does it; `epsilon` is
      added to the norm that a matrix is divided by. Everything else (embedding, head, biases, norms) has Adam's direction from
      the same numbers.

    Args:
      numbers: of one replica; they may be traced.
      kind: of `config.Optimiser`.
      rate: the learning rate by step.
      specs: the parameter table.
    """
    adam = optax.scale_by_adam(numbers.beta1, numbers.beta2, numbers.epsilon)
    direction = {
        "adamw": lambda: adam,
        "lion": lambda: optax.scale_by_lion(numbers.beta1, numbers.beta2),
        "muon": lambda: optax.partition(
            {"matrix": _muon(numbers, specs), "other": adam},
            nest({path: "matrix" if _is_matrix(spec) else "other" for path, spec in specs.items()}),
        ),
    }[kind]()
    decay = optax.add_decayed_weights(numbers.weight_decay, nest({path: spec.decay for path, spec in specs.items()}))
    # Nested as in `optax.adamw`: its states have been saved.
    return optax.chain(
        optax.clip_by_global_norm(numbers.clip), optax.chain(direction, decay, optax.scale_by_learning_rate(rate))
    )


def _is_matrix(spec: Spec) -> bool:
    """Whether each layer has a matrix of it, perhaps with one side in heads, and not a vector."""
    return spec.dims.startswith("L") and spec.decay


def _sides(spec: Spec) -> MuonDimensionNumbers:
    """The axes of the input and of the output of each layer's matrix: one is the width or a rank, the other all heads, say."""
    cut, end = 2 if spec.dims[1] in "DR" else len(spec.dims) - 1, len(spec.dims)
    return MuonDimensionNumbers(tuple(range(1, cut)), tuple(range(cut, end)))


def _muon(numbers: Hyperparameters, specs: dict[str, Spec]) -> optax.GradientTransformation:
    """Muon of the layers' matrices, as `optax.partition` hands them over: the others are nodes without a leaf."""

    def scale(spec: Spec) -> float:
        return _RMS * math.sqrt(max(math.prod(spec.shape[axis] for axis in axes) for axes in _sides(spec)))

    def tree(of: Callable[[Spec], Any]) -> Any:
        return nest({path: of(spec) if _is_matrix(spec) else optax.MaskedNode() for path, spec in specs.items()})

    scales = tree(scale)
    return optax.chain(
        scale_by_muon(beta=numbers.beta1, eps=numbers.epsilon, weight_dimension_numbers=tree(_sides)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
    )
