"""The likelihoods that the ceiling is made of: of every draw's test texts, under every arm that it is compared with.

Owns by what they are computed, and what the sampler's record is used for. Must not know what is made of them.

All arms are treated alike, the generating one too: two computations of one number round differently, and models that are a
unit in the last place apart would be told by that.

Letters after an underscore name the axes: N texts, W tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from natfp_jax import mesh, processes, texts
from natfp_jax.ceiling import log_likelihoods
from natfp_jax.drawing import scored
from natfp_jax.prompts import Prompts
from natfp_jax.strategy import strategy_of
from natfp_jax.study import Draw
from natfp_jax.workspace import Workspace

__all__ = ["likelihoods"]

Ids = tuple[list[list[int]], list[list[int]]]  # ids of prompts, and of the texts behind them
_ROWS = 128  # texts of a forward pass, about


def likelihoods(work: Workspace, drawn: Mapping[Draw, Any], test: np.ndarray) -> dict[tuple[Draw, str, int], np.ndarray]:
    """(draw, arm, step) → log-likelihood of the draw's test texts under the arm's checkpoint: [texts, lengths].

    Args:
      drawn: the rows of every draw, in the order of the prompts.
      test: which of them count.

    Raises:
      Damaged: a checkpoint is not what was saved.
    """
    pairs: dict[tuple[str, int], list[Draw]] = {}  # checkpoint → draws that are compared with its own
    for comparison in work.comparisons:
        for one in comparison.draws:
            for other in comparison.draws:
                compared = pairs.setdefault((other.arm, other.step), [])
                if one not in compared:
                    compared.append(one)
    hashes = processes.led(lambda: [work.run_of(arm).record(step)["weights"] for arm, step in pairs])
    # Arms of bitwise equal weights and shape are one model, and have its likelihoods together, so that they tie exactly.
    models = {
        (arm, step): (weights, work.arms[arm].experiment.model, _writing(work, arm))
        for (arm, step), weights in zip(pairs, hashes, strict=True)
    }
    lengths = work.study.sampling.lengths

    def recorded(one: Draw) -> np.ndarray:
        return texts.dense(drawn[one]["log_probabilities"].take(test), lengths[-1])

    def summed(log_p_NW: np.ndarray) -> np.ndarray:
        """Of each text's beginnings, a column a length, from those of its ids."""
        # The last is the whole text, which may have more ids for an arm of another tokenizer.
        ends = [*lengths[:-1], None]
        return np.stack([log_p_NW[:, :end].sum(axis=1, dtype=np.float64) for end in ends], axis=1)

    checkpoints = {model: pair for pair, model in models.items()}  # one that is it
    asked = {(one, models[pair]): None for pair, compared in pairs.items() for one in compared}
    known: dict[tuple[Draw, Any], np.ndarray] = {}
    unknown: dict[Any, list[Draw]] = {}
    cut: dict[tuple[Draw, Any], np.ndarray] = {}  # those with an id of no probability, id by id
    for one, model in asked:
        if model == models[one.arm, one.step] and _by_sampler(work, one.arm):
            known[one, model] = summed(recorded(one))  # what it would find again, bit for bit
        else:
            unknown.setdefault(model, []).append(one)
    anew = _all_anew(work, {one: rows.take(test) for one, rows in drawn.items()}) if work.reencoded else None
    with work.progress.task("likelihood ceiling", sum(map(len, unknown.values())) * len(test), "texts") as advance:
        for model, some in unknown.items():
            arm, step = checkpoints[model]
            if anew is None:
                found = _under(work, arm, step, {one: drawn[one]["ids"].take(test) for one in some}, test, advance)
            else:
                found = _by_forward_pass(work, arm, step, {one: anew[one, arm] for one in some}, advance)
            for one, log_p_NW in zip(some, found, strict=True):
                if np.isneginf(log_p_NW).any():
                    cut[one, model] = log_p_NW
                else:
                    known[one, model] = summed(log_p_NW)
    # On the edge of a truncation rounding decides, and what was drawn is not impossible. An id that the generating arm's own
    # pass has lost speaks for nobody: a near copy, which has lost it too, would else be told by that alone.
    for (one, model), log_p_NW in cut.items():
        own_NW = cut.get((one, models[one.arm, one.step]))
        lost_NW = np.isneginf(log_p_NW) & np.isneginf(own_NW) if own_NW is not None else np.zeros_like(log_p_NW, bool)
        known[one, model] = summed(np.where(lost_NW, recorded(one)[:, : log_p_NW.shape[1]], log_p_NW))
    return {(one, *pair): known[one, models[pair]] for pair, compared in pairs.items() for one in compared}


def _writing(work: Workspace, arm: str) -> tuple[str, int]:
    """What an arm's texts are written by: its tokenizer, and the id that ends them."""
    return work.tokenizer_of(arm).sha256, work.end_of(arm)


def _all_anew(work: Workspace, drawn: Mapping[Draw, Any]) -> dict[tuple[Draw, str], Ids]:
    """(draw, arm) → prompts and texts as the arm's tokenizer writes them; a text that any arm has no positions for is empty.

    So nothing is concluded from it: all arms find it equally likely.
    """
    found = dict[tuple[Draw, str], Ids]()
    for one, rows in drawn.items():
        written = {_writing(work, arm): arm for arm in work.arms}  # an arm of each
        known = {writing: _anew(work, one, arm, rows) for writing, arm in written.items()}
        fits_N = np.ones(len(rows), bool)
        for arm in work.arms:
            if (most := work.limit_of(arm)) is not None:
                fits_N &= [len(a) + len(b) <= most for a, b in zip(*known[_writing(work, arm)], strict=True)]
        for arm in work.arms:
            prompts, continuations = known[_writing(work, arm)]
            kept = [(a, b) if fits else (a[:1], []) for a, b, fits in zip(prompts, continuations, fits_N, strict=True)]
            found[one, arm] = [a for a, _ in kept], [b for _, b in kept]
    return found


def _anew(work: Workspace, one: Draw, arm: str, rows: Any) -> Ids:
    """Prompts and texts of a draw as an arm's tokenizer writes them, and its own end where a text had come to one.

    That is one way to write a text, the usual one, of many: less than the text's whole probability. The arm that has drawn it
    has no other: by the ids that it drew it would be known, though its text is another's too.
    """
    tokenizer, end = work.tokenizer_of(arm), work.end_of(arm)
    ended = [work.end_of(one.arm) in ids[-1:] for ids in rows["ids"].to_pylist()]
    before, texts_N = rows["prompt"].to_pylist(), rows["text"].to_pylist()
    whole = tokenizer.encode_batch([prompt + text for prompt, text in zip(before, texts_N, strict=True)])
    prompts, continuations = [], []
    for ids, alone, done in zip(whole, tokenizer.encode_batch(before), ended, strict=True):
        # Where the two meet, a token may be of both: it is the text's.
        shared = next((n for n, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
        prompts.append([tokenizer.eos_id, *ids[:shared]])
        continuations.append([*ids[shared:], *[end] * done])
    return prompts, continuations


def _by_sampler(work: Workspace, arm: str) -> bool:
    """Whether likelihoods under an arm are what its sampler says.

    In bfloat16 a forward pass is another distribution than the sampler's: a truncation could not have drawn its own texts. But
    a text that is encoded anew may be longer than what a sampler draws.
    """
    return not work.reencoded and "bfloat16" in (work.arms[arm].experiment.model.dtype, work.study.sampling.cache)


def _under(
    work: Workspace, arm: str, step: int, ids: Mapping[Draw, Any], test: np.ndarray, advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """log p of each id of draws' test texts under an arm's checkpoint, draw by draw: [N, W]."""
    sampling, tokenizer = work.study.sampling, work.tokenizer_of(arm)
    prompts = Prompts(work.prompts.table.take(test))
    if _by_sampler(work, arm):
        dense = {one: texts.dense(column, sampling.lengths[-1], work.end_of(arm)) for one, column in ids.items()}
        yield from scored(work, dense, prompts, arm, step, lambda ended, _: advance(ended))
        return
    encoded = prompts.encoded(tokenizer)
    yield from _by_forward_pass(work, arm, step, {one: (encoded, column.to_pylist()) for one, column in ids.items()}, advance)


def _by_forward_pass(
    work: Workspace, arm: str, step: int, written: Mapping[Draw, Ids], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """log p of each id of draws' texts by a forward pass of an arm's checkpoint, draw by draw: [N, W].

    Args:
      written: of each draw the ids of prompts and texts, as the arm has them.
    """
    sampling, model, size = work.study.sampling, work.arms[arm].experiment.model, work.tokenizer_of(arm).size
    params, ways = work.params_of(arm, step), mesh.text_ways(work.devices)
    batch = max(_ROWS // ways, 1) * ways
    for one, (prompts, continuations) in written.items():
        strategy = strategy_of(sampling, one.drawn_at(sampling))
        yield log_likelihoods(params, prompts, continuations, model, strategy, size, batch, work.devices)
        advance(len(continuations))
