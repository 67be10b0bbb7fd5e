"""The likelihood of texts under each arm, from which the Bayes-optimal attribution follows.

Owns teacher-forced scoring under the effective distribution. Must not know where texts come from or which arms are compared.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from natfp_jax import mesh, processes
from natfp_jax.config import Model
from natfp_jax.model import head, hidden, logits
from natfp_jax.params import Params
from natfp_jax.sample import pad_prompts
from natfp_jax.strategy import Strategy, effective, remembers

__all__ = ["log_likelihoods"]


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
    w_DV, row_B, place_T = head(params), jnp.arange(len(ids_BN)), jnp.arange(tokens_BT.shape[1])
    seen_BV = None
    if remembers(strategy):
        seen_BV = jnp.zeros((len(ids_BN), w_DV.shape[1]), bool)
        seen_BV = seen_BV.at[row_B[:, None], tokens_BT].max(place_T < prompt_B[:, None])

    def place(seen_BV: jax.Array | None, n: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        z_BV = effective(strategy, logits(x_BTD[row_B, prompt_B - 1 + n], w_DV, vocabulary), seen_BV)
        id_B = ids_BN[:, n]
        log_p_B = z_BV[row_B, id_B] - jax.nn.logsumexp(z_BV, axis=-1)
        return None if seen_BV is None else seen_BV.at[row_B, id_B].set(True), jnp.where(n < length_B, log_p_B, 0.0)

    # Place by place, as texts are drawn: the logits of all of them would take more memory than the model.
    return jax.lax.scan(place, seen_BV, jnp.arange(ids_BN.shape[1]))[1].T


def log_likelihoods(
    params: Params,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    model: Model,
    strategy: Strategy,
    vocabulary: int,
    batch: int,
    devices: jax.sharding.Mesh,
) -> np.ndarray:
    """log p of each id of each text, given what stands before it, in nats: float32 [n, longest], zero behind a text's end.

    Their sum is the text's: a drawn EOS counts, a truncation adds nothing.

    Args:
      prompts, continuations: ragged ids; every prompt has at least one id, and both together have positions.
      batch: texts that are scored together.
    """
    width, new = max(map(len, prompts)), max(1, *map(len, continuations))  # texts may all be empty
    slots = min(width + new, model.context or width + new)  # where positions are learned there are no others
    rows = mesh.text_sharding(devices)
    out = np.empty((len(prompts), new), np.float32)
    for first in range(0, len(prompts), batch):
        some = range(first, min(first + batch, len(prompts)))
        filled = [*some, *([some[0]] * (batch - len(some)))]  # one shape, one compilation
        tokens_BT, _ = pad_prompts([[*prompts[i], *continuations[i]] for i in filled], 0, slots)
        ids_BN, length_B = pad_prompts([continuations[i] for i in filled], 0, new)
        prompt_B = np.array([len(prompts[i]) for i in filled], np.int32)
        arrays = mesh.lay((tokens_BT, prompt_B, ids_BN, length_B), rows)
        scores = _score(params, *arrays, model=model, strategy=strategy, vocabulary=vocabulary)
        out[first : first + len(some)] = processes.gathered(scores)[: len(some)]
    return out
