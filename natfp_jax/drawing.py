"""The sample stage: which draws of a study are made side by side, and what is written of them.

Owns the way from a study's missing files to the sampler and back, and
from its texts to their likelihood by the sampler. Must not know how a token is drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from natfp_jax import mesh, processes, texts
from natfp_jax.lineage import numerics
from natfp_jax.pace import TextPace
from natfp_jax.params import Params
from natfp_jax.prompts import Prompts
from natfp_jax.sample import Programs, draw_key, new_slots_for, programs_of, rows_for, slots_for
from natfp_jax.strategy import strategy_of
from natfp_jax.study import Draw, draws
from natfp_jax.turns import Drawn, draw
from natfp_jax.workspace import Workspace

__all__ = ["sample", "scored"]

_TOGETHER = 1024  # texts that are decoded together
Told = Callable[[int, int], None]  # of texts that have ended, and of tokens that were drawn


def sample(work: Workspace) -> None:
    """Draws what is missing.

    Raises:
      UserError: an arm is not trained, or a file was drawn from something else.
      Damaged: a checkpoint is not what was saved, or a file of a draw not what was written.
    """

    def wanted() -> list[Any]:
        work.check_trained(work.mine)
        missing = work.missing_files(work.mine)
        if missing:  # what is added to has to be whole
            own = (one for one in draws(work.study) if one.arm in work.mine)
            for path in (path for one in own for path in work.draw_paths(one) if texts.exists(path)):
                texts.verify(path)
        return [[*one, numbers] for one, numbers in missing.items()]

    missing = {Draw(*one): tuple(numbers) for *one, numbers in processes.led(wanted)}
    if not missing:
        return
    each = work.study.sampling.file_texts
    count = sum(len(work.prompts.part(number * each, each)) for numbers in missing.values() for number in numbers)
    with (
        work.timed("sample") as amounts,
        work.progress.task("sample", count, "texts") as advance,
        TextPace(work.progress.say, count) as pace,
    ):

        def told(ended: int, tokens: int) -> None:
            advance(ended)
            pace.drawn(ended, tokens)

        for some in _side_by_side(work, missing):
            _draw(work, some, missing[some[0]], told)
        amounts.update(texts=pace.texts, tokens=pace.tokens)


def _side_by_side(work: Workspace, missing: dict[Draw, tuple[int, ...]]) -> Iterator[list[Draw]]:
    """Draws that lack the same files, of models of one shape at one temperature: as many as `replica` has places."""
    groups: dict[Any, list[Draw]] = {}
    for one, numbers in missing.items():
        like = work.arms[one.arm].experiment.model, work.tokenizer_of(one.arm).sha256, work.end_of(one.arm)
        groups.setdefault((*like, one.temperature, numbers), []).append(one)
    places = work.devices.shape["replica"]
    for group in groups.values():
        yield from (group[first : first + places] for first in range(0, len(group), places))


def _rows(work: Workspace) -> int:
    """Texts that a device draws together: the same for all arms, since bits depend on it."""
    sampling = work.study.sampling
    if sampling.batch is not None:
        return sampling.batch
    if rows := processes.led(partial(_recorded_rows, work)):
        return int(rows)
    slots = slots_for(work.longest_prompt) + new_slots_for(sampling.lengths[-1])
    memory = processes.led(lambda: mesh.device_memory(work.devices))
    texts = min(len(work.prompts), sampling.file_texts)
    models = {(arm.experiment.model, work.tokenizer_of(name).padded_size) for name, arm in work.arms.items()}
    return min(rows_for(*model, slots, texts, work.devices, memory, sampling.cache) for model in models)


def _recorded_rows(work: Workspace) -> int | None:
    """What a study that was begun, perhaps where memory is another, has been drawn with."""
    there = (path for one in draws(work.study) for path in work.draw_paths(one) if texts.exists(path))
    first = next(there, None)
    return None if first is None else int(texts.read_record(first)["numerics"]["rows"])


def _draw(work: Workspace, some: list[Draw], numbers: Sequence[int], told: Told) -> None:
    sampling, programs = work.study.sampling, _programs(work, some[0].arm, some[0])
    weights = programs.weights([partial(_weights, work, one.arm, one.step) for one in some])
    keys = [_key(work, one) for one in some]
    for number in numbers:
        prompts = work.prompts.part(number * sampling.file_texts, sampling.file_texts)
        encoded = prompts.encoded(work.tokenizer_of(some[0].arm))
        found = draw(programs, weights, keys, prompts.ids, encoded, sampling.lengths[-1], told)
        for one, drawn in zip(some, found, strict=True):
            processes.led(partial(_write, work, one, number, prompts, drawn, programs))


def scored(
    work: Workspace, ids: Mapping[Draw, np.ndarray], prompts: Prompts, arm: str, step: int, told: Told
) -> Iterator[np.ndarray]:
    """log p of each id of some texts of draws, as the sampler would record it, had it drawn them from another arm.

    Args:
      ids: of each draw its texts of the prompts, [N, W] with what ends a text behind their ends; W: the tokens that are drawn.

    Yields:
      Of one draw after another, in nats: float32 [N, W], zero behind a text's end.
    """
    weights, new_tokens, encoded = None, work.study.sampling.lengths[-1], prompts.encoded(work.tokenizer_of(arm))
    for one, ids_NW in ids.items():
        programs = _programs(work, arm, one)
        if weights is None:  # they lie the same for every strategy
            weights = programs.weights([partial(_weights, work, arm, step)])
        (found,) = draw(programs, weights, [_key(work, one)], prompts.ids, encoded, new_tokens, told, [ids_NW])
        yield found.log_p_NW


def _programs(work: Workspace, arm: str, one: Draw) -> Programs:
    """What draws from an arm, or scores under it, as a draw has it."""
    sampling, tokenizer = work.study.sampling, work.tokenizer_of(arm)
    model, strategy = work.arms[arm].experiment.model, strategy_of(sampling, one.drawn_at(sampling))
    sizes = tokenizer.size, tokenizer.padded_size, work.end_of(arm), _rows(work)
    return programs_of(model, strategy, *sizes, work.devices, sampling.cache)


def _key(work: Workspace, one: Draw) -> jax.Array:
    sampling = work.study.sampling
    strategy = strategy_of(sampling, one.drawn_at(sampling))
    return draw_key(sampling.seed, work.identities[one.arm].fingerprint, one.step, strategy, one.number)


def _weights(work: Workspace, arm: str, step: int) -> Params:
    return work.params_of(arm, step)


def _write(work: Workspace, one: Draw, number: int, prompts: Prompts, drawn: Drawn, programs: Programs) -> None:
    n = len(prompts)
    ids = texts.ragged(drawn.id_NW, drawn.length_N)
    columns = {
        "draw": [one.number] * n,
        "arm": [one.arm] * n,
        "checkpoint": [one.step] * n,
        "temperature": [one.drawn_at(work.study.sampling)] * n,
        "prompt_id": prompts.ids,
        "document_id": prompts.documents,
        "prompt": prompts.texts,
        "text": [
            text
            for first in range(0, n, _TOGETHER)
            for text in work.written(one.arm, prompts.part(first, _TOGETHER), ids[first : first + _TOGETHER].to_pylist())
        ],
        "ids": ids,
        "log_probabilities": texts.ragged(drawn.log_p_NW, drawn.length_N),
    }
    record = {
        "fingerprint": work.identities[one.arm].fingerprint,
        "inputs": work.draw_inputs(one),
        "settings": work.draw_settings(one),
        "texts": texts.digest(ids),
        "numerics": numerics(work.devices, rows=programs.rows),
    }
    texts.write(work.draw_paths(one)[number], columns, record)
