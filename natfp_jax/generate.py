"""Texts of one model, for a human who wants to look.

Owns how one prompt is continued a few times. Must not know studies, nor how texts look on the screen.
"""

import hashlib

import jax

from natfp_jax.config import Sampling
from natfp_jax.errors import UserError
from natfp_jax.sample import draw_key, programs_of
from natfp_jax.strategy import strategy_of
from natfp_jax.trained import Trained
from natfp_jax.turns import draw

__all__ = ["continuations"]

_ROWS = 8  # drawn together: always as many, so that a text does not depend on how many are asked for


def continuations(trained: Trained, prompt: str, texts: int, sampling: Sampling, devices: jax.sharding.Mesh) -> list[str]:
    """So many continuations of a prompt, each with noise of its own; of an empty one, whole texts.

    A model that was trained on conversations is asked the prompt, in its template, and answers.

    Args:
      sampling: its strategy, seed and number of new tokens.

    Raises:
      UserError: the prompt is longer than what the model was trained on, or with its texts than what it has positions for, or
        no UTF-8, or the strategy contradicts itself; or there is nothing that a model of conversations is asked.
    """
    tokenizer, (temperature,) = trained.tokenizer, sampling.temperatures
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 (character {error.start + 1}): give it as UTF-8") from None
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    if trained.chat is not None:
        if not prompt.strip():
            raise UserError("the model was trained on conversations, and is asked nothing: give a question (--prompt)")
        (ids,) = trained.chat.asked([[{"role": "user", "content": prompt.strip()}]])
    if len(ids) > trained.context:
        raise UserError(
            f"the prompt has {len(ids)} tokens with EOS, the model was trained on {trained.context} at a time: shorten it"
        )
    new, most = sampling.lengths[-1], trained.limit
    if most is not None and len(ids) + new > most:
        raise UserError(
            f"the prompt's {len(ids)} tokens and {new} new ones are more than the model can have, {most}: ask for fewer"
        )
    strategy = strategy_of(sampling, temperature)
    sizes = tokenizer.size, tokenizer.padded_size, trained.end_id, _ROWS
    programs = programs_of(trained.model, strategy, *sizes, devices, sampling.cache)
    key = draw_key(sampling.seed, trained.fingerprint, trained.step, strategy, 0)
    numbers = [int(hashlib.sha256(f"{number} {prompt}".encode()).hexdigest()[:16], 16) for number in range(texts)]
    weights = programs.weights([lambda: trained.params])
    (drawn,) = draw(programs, weights, [key], numbers, [ids] * texts, sampling.lengths[-1])
    return tokenizer.decode_batch([row[:length].tolist() for row, length in zip(drawn.id_NW, drawn.length_N, strict=True)])
