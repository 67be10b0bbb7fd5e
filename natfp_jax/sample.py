"""Sampling texts.

Owns the effective distribution (temperature, top-k, top-p, padding masked) that the sampler draws from and the ceiling scores
under, the keys of the noise, and the one jitted loop. Must not know files, arms or studies.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natfp_jax import rng
from natfp_jax.config import Model, Sampling
from natfp_jax.model import decode, empty_cache, head, logits
from natfp_jax.params import Params

__all__ = ["Drawn", "Strategy", "draw", "draw_key", "effective", "pad_prompts"]


class Strategy(NamedTuple):
    """What turns logits into the distribution that is drawn from; hashable, so that it can be a static argument."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, sampling: Sampling) -> "Strategy":
        """The strategy of a sampling configuration."""
        return cls(sampling.temperature, sampling.top_k, sampling.top_p)


class Drawn(NamedTuple):
    """Continuations: `ids_BN`, of which the first `length_B` count, and their log-probability under the strategy, in nats."""

    ids_BN: jax.Array
    length_B: jax.Array
    log_probability_B: jax.Array


def effective(z_V: jax.Array, strategy: Strategy) -> jax.Array:
    """Log-probabilities after temperature, then top-k, then top-p (Holtzman et al., 2020), over the last axis; float32.

    Ids that are tied with the last one kept are kept too, so that the distribution does not depend on the order of ids.
    """
    z_V = z_V / strategy.temperature
    if strategy.top_k is not None and strategy.top_k < z_V.shape[-1]:
        last = jax.lax.top_k(z_V, strategy.top_k)[0][..., -1:]
        z_V = jnp.where(z_V >= last, z_V, -jnp.inf)
    if strategy.top_p < 1:
        p_V = jax.nn.softmax(z_V, axis=-1)
        falling = -jnp.sort(-p_V, axis=-1)
        before = jnp.cumsum(falling, axis=-1) - falling  # an id is kept while what stands before it is less than top_p
        last = jnp.min(jnp.where(before < strategy.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        z_V = jnp.where(p_V >= last, z_V, -jnp.inf)
    return jax.nn.log_softmax(z_V, axis=-1)


def _categorical(key: jax.Array, log_p_V: jax.Array) -> jax.Array:
    """An exact draw in two steps, first the block of 128 ids, then the id in it: p(id) = p(block) · p(id | block).

    One Gumbel value an id would cost more than the model at small sizes; this needs V / 128 + 128 of them. High resolution:
    the default noise is biased for tokens rarer than about 1e-7.
    """
    log_p_bW = log_p_V.reshape(-1, 128)  # the padded vocabulary is a multiple of 128
    block_key, id_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(log_p_bW, axis=-1), mode="high")
    place = jax.random.categorical(id_key, log_p_bW[block], mode="high")
    return (block * log_p_bW.shape[-1] + place).astype(jnp.int32)


def draw_key(seed: int, arm: str, step: int, number: int) -> jax.Array:
    """The key of one draw. `arm` is the experiment's fingerprint: no two arms, checkpoints or draws share noise."""
    return rng.stream(seed, "sample", arm, step, number)


def pad_prompts(prompts: list[list[int]], pad: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged ids → `tokens_BP` int32, padded on the right with `pad`, and `length_B`."""
    tokens_BP = np.full((len(prompts), width), pad, np.int32)
    for row, ids in zip(tokens_BP, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens_BP, np.array([len(ids) for ids in prompts], np.int32)


@partial(jax.jit, static_argnames=("model", "strategy", "vocabulary", "eos", "new_tokens"))
def draw(
    params: Params,
    key: jax.Array,
    prompt_B2: jax.Array,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    *,
    model: Model,
    strategy: Strategy,
    vocabulary: int,
    eos: int,
    new_tokens: int,
) -> Drawn:
    """Draws one continuation of every prompt, up to and including EOS or `new_tokens`.

    Args:
      key: of the draw (`draw_key`).
      prompt_B2: the two 32-bit words of each prompt's id; a text's noise is that of its draw, prompt and place alone.
      tokens_BP: prompts padded on the right. length_B: their lengths, at least 1.
      vocabulary: unpadded. eos: the id that ends a text.
    """
    batch, width = tokens_BP.shape
    key_B = jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(prompt_B2)
    w_DV = head(params)
    slot_S = jnp.arange(width + new_tokens)

    def pick(x_BD: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p_BV = effective(logits(x_BD, w_DV, vocabulary), strategy)
        token_B = jax.vmap(_categorical)(jax.vmap(jax.random.fold_in, (0, None))(key_B, t), log_p_BV)
        return token_B, jnp.take_along_axis(log_p_BV, token_B[:, None], axis=-1)[:, 0]

    # Prefill: all prompts at once, causal; what stands behind a prompt's end is masked for good.
    place_P = jnp.arange(width)
    causal_BPP = (place_P[None, :, None] >= place_P) & (place_P < length_B[:, None, None])
    position_BP = jnp.broadcast_to(place_P, (batch, width))
    x_BPD, cache = decode(model, params, tokens_BP, position_BP, causal_BPP, empty_cache(model, batch, width), 0)
    cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, new_tokens), (0, 0), (0, 0))), cache)
    last_BD = jnp.take_along_axis(x_BPD, (length_B - 1)[:, None, None], axis=1)[:, 0]

    def body(carry: tuple) -> tuple:  # type: ignore[type-arg]
        t, last_BD, cache, done_B, ids_BN, log_p_B = carry
        token_B, log_p_token_B = pick(last_BD, t)
        token_B = jnp.where(done_B, eos, token_B)
        ids_BN = jax.lax.dynamic_update_slice(ids_BN, token_B[:, None], (0, t))
        log_p_B += jnp.where(done_B, 0.0, log_p_token_B)
        done_B |= token_B == eos
        # New tokens of all rows share a slot behind the widest prompt; their rotary positions are their own.
        mask_BS = (slot_S < length_B[:, None]) | ((slot_S >= width) & (slot_S <= width + t))
        position_B1 = (length_B + t)[:, None]
        x_B1D, cache = decode(model, params, token_B[:, None], position_B1, mask_BS[:, None], cache, width + t)
        return t + 1, x_B1D[:, 0], cache, done_B, ids_BN, log_p_B

    def unfinished(carry: tuple) -> jax.Array:  # type: ignore[type-arg]
        return (carry[0] < new_tokens) & ~carry[3].all()

    start = (
        jnp.int32(0),
        last_BD,
        cache,
        jnp.zeros(batch, bool),
        jnp.full((batch, new_tokens), eos, jnp.int32),
        jnp.zeros(batch, jnp.float32),
    )
    _, _, _, _, ids_BN, log_p_B = jax.lax.while_loop(unfinished, body, start)
    ended_BN = jnp.cumsum(ids_BN == eos, axis=1)
    length_B = jnp.minimum((ended_BN == 0).sum(axis=1) + 1, new_tokens)
    return Drawn(ids_BN, length_B, log_p_B)
