"""The likelihood of texts under each arm, from which the Bayes-optimal attribution follows.

Owns teacher-forced scoring under the effective distribution. Must not know where texts come from or which arms are compared.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from natfp_jax import mesh, processes
from natfp_jax.config import Model
from natfp_jax.model import head, hidden, logits
from natfp_jax.params import Params
from natfp_jax.sample import Strategy, effective, pad_prompts

__all__ = ["log_likelihood"]


@partial(jax.jit, static_argnames=("model", "strategy", "vocabulary"))
def _score(
    params: Params,
    tokens_BT: jax.Array,
    prompt_B: jax.Array,
    ids_BN: jax.Array,
    length_B: jax.Array,
    *,
    model: Model,
    strategy: Strategy,
    vocabulary: int,
) -> jax.Array:
    x_BTD = hidden(model, params, tokens_BT)  # causal: what pads a row on the right reaches nothing before it
    place_N = jnp.arange(ids_BN.shape[1])
    x_BND = jnp.take_along_axis(x_BTD, ((prompt_B - 1)[:, None] + place_N)[..., None], axis=1)
    log_p_BNV = effective(logits(x_BND, head(params), vocabulary), strategy)
    log_p_BN = jnp.take_along_axis(log_p_BNV, ids_BN[..., None], axis=-1)[..., 0]
    return jnp.where(place_N < length_B[:, None], log_p_BN, 0.0).sum(axis=1)


def log_likelihood(
    params: Params,
    prompts: list[list[int]],
    continuations: list[list[int]],
    model: Model,
    strategy: Strategy,
    vocabulary: int,
    batch: int,
    devices: jax.sharding.Mesh,
) -> np.ndarray:
    """log p(continuation | prompt) in nats for every text, float32 [n]. A drawn EOS counts, a truncation adds nothing.

    Args:
      prompts, continuations: ragged ids; every prompt has at least one id.
      batch: texts that are scored together.
    """
    width, new = max(map(len, prompts)), max(map(len, continuations))
    rows = mesh.text_sharding(devices)
    out = np.empty(len(prompts), np.float32)
    for first in range(0, len(prompts), batch):
        some = range(first, min(first + batch, len(prompts)))
        filled = [*some, *([some[0]] * (batch - len(some)))]  # one shape, one compilation
        tokens_BT, _ = pad_prompts([prompts[i] + continuations[i] for i in filled], 0, width + new)
        ids_BN, length_B = pad_prompts([continuations[i] for i in filled], 0, new)
        prompt_B = np.array([len(prompts[i]) for i in filled], np.int32)
        arrays = mesh.lay((tokens_BT, prompt_B, ids_BN, length_B), rows)
        scores = _score(params, *arrays, model=model, strategy=strategy, vocabulary=vocabulary)
        out[first : first + len(some)] = processes.gathered(scores)[: len(some)]
    return out
