"""How far apart the models of a grid are in what they expect next, after the same prompts.

Owns the distributions of the token after a prompt under each checkpoint, and their distances. They are the plain softmax, at
temperature 1 and without truncation, padding ids masked: what the models have learnt, whatever is drawn from it. Nothing is
drawn, so there is no sampling noise. Must not know what is made of the distances.

Letters after an underscore name the axes: N prompts, A arms, V ids, B rows of a batch, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from natfp_jax import mesh, processes, stats
from natfp_jax.config import Model
from natfp_jax.decomposition import divergences
from natfp_jax.model import head, hidden, logits
from natfp_jax.params import Params
from natfp_jax.prompts import Prompts
from natfp_jax.sample import pad_prompts
from natfp_jax.study import Draw, Grid
from natfp_jax.workspace import Workspace

__all__ = ["NextTokens", "next_token_logits", "next_tokens"]

PROMPTS = 500  # about: a mean over more hardly moves, and the interval says how much it might
MOST = 2**27  # probabilities of all models, which are in memory at once: 1 GiB
_ROWS = 128  # prompts of a forward pass, about


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Distances in bits between the arms of a grid, cells before twins, at each prompt; and the documents of the prompts."""

    distance_AAN: NDArray[np.float64]
    documents: list[str]


@partial(jax.jit, static_argnames=("model", "vocabulary"))
def _last(params: Params, tokens_BT: jax.Array, length_B: jax.Array, *, model: Model, vocabulary: int) -> jax.Array:
    x_BTD = hidden(model, params, tokens_BT)  # causal: what pads a row on the right reaches nothing before it
    return logits(x_BTD[jnp.arange(len(length_B)), length_B - 1], head(params), vocabulary)


def next_token_logits(
    params: Params, prompts: Sequence[Sequence[int]], model: Model, vocabulary: int, batch: int, devices: jax.sharding.Mesh
) -> NDArray[np.float32]:
    """The logits of the token after each prompt: [N, V], minus infinity at the ids from `vocabulary` on.

    Args:
      prompts: ragged ids; every prompt has at least one.
      batch: prompts that are read together.
    """
    width, rows, found = max(map(len, prompts)), mesh.text_sharding(devices), []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        tokens_BT, length_B = pad_prompts([*some, *[some[0]] * (batch - len(some))], 0, width)  # one shape, one compilation
        last_BV = _last(params, *mesh.lay((tokens_BT, length_B), rows), model=model, vocabulary=vocabulary)
        found.append(processes.gathered(last_BV)[: len(some)])
    return np.concatenate(found)


def next_tokens(work: Workspace, grids: Sequence[Grid], test: NDArray[np.integer]) -> list[NextTokens]:
    """Of each grid the distances between its models after some of the test prompts.

    Args:
      test: the rows of the prompts of the test part.

    Raises:
      Damaged: a checkpoint is not what was saved.
    """
    if not grids:
        return []
    documents = [work.prompts.documents[row] for row in test]
    arms = max(len(grid.models) for grid in grids)
    count = min(PROMPTS, MOST // (arms * work.store.tokenizer.padded_size))
    # Whole documents, the same ones at every checkpoint and whatever the other prompts are.
    kept = test[stats.first_documents(documents, work.study.attribution.split_seed, count)]
    prompts = Prompts(work.prompts.table.take(kept))
    steps = sum(len(grid.models) for grid in grids) * len(kept)
    found = []
    with work.progress.task("next tokens", steps, "prompts") as advance:
        for grid in grids:
            weights = processes.led(partial(_weights, work, grid.models))
            known: dict[tuple[str, Model], NDArray[np.float64]] = {}
            p_ANV = []
            for one, sha256 in zip(grid.models, weights, strict=True):
                # Of bitwise equal weights once: their distance is then zero, not about zero.
                of = sha256, work.arms[one.arm].experiment.model
                if of not in known:
                    known[of] = softmax(_logits(work, one, prompts).astype(np.float64), axis=1)
                p_ANV.append(known[of])
                advance(len(kept))
            distance_AAN = np.zeros((len(p_ANV), len(p_ANV), len(kept)))
            for a, p_NV in enumerate(p_ANV):
                for b in range(a):
                    distance_AAN[a, b] = distance_AAN[b, a] = divergences(p_NV, p_ANV[b])
            found.append(NextTokens(distance_AAN, prompts.documents))
    return found


def _weights(work: Workspace, models: Sequence[Draw]) -> list[str]:
    """The hash of each model's weights."""
    return [work.run_of(one.arm).record(one.step)["weights"] for one in models]


def _logits(work: Workspace, one: Draw, prompts: Prompts) -> NDArray[np.float32]:
    arm, tokenizer, ways = work.arms[one.arm], work.store.tokenizer, mesh.text_ways(work.devices)
    params = work.params_of(one.arm, one.step)
    batch = max(_ROWS // ways, 1) * ways
    return next_token_logits(params, prompts.encoded(tokenizer), arm.experiment.model, tokenizer.size, batch, work.devices)
