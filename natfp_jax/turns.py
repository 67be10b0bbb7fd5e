"""Which texts are drawn together, and when.

Owns the queue of prompts and the turns: rows are drawn a stretch of tokens at a time, and between two stretches those that have
ended make room. Nothing here changes a text. Must not know how a token is drawn, files, arms or studies.

Rows of one batch are of one age, so that they share the slots that they write to; what is left of several batches waits at
each age until it fills one. Ages double, so that few programs serve all lengths and little waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from natfp_jax import processes
from natfp_jax.params import Params
from natfp_jax.sample import LEAST_SLOTS, New, Programs, Rows, pad_prompts, prompt_words, slots_for

__all__ = ["Drawn", "draw"]

_FULL = 3 / 4  # of a batch: with fewer rows than that it waits for others, rather than be drawn half empty


class Drawn(NamedTuple):
    """The texts of one draw, in the order of its prompts: `id_NW`, of which the first `length_N` count.

    `log_p_NW`: the log-probability of each id under the strategy, in nats; zero behind a text's end.
    """

    id_NW: np.ndarray
    length_N: np.ndarray
    log_p_NW: np.ndarray


@dataclass
class _Batch:
    """Rows under way, and whose they are."""

    rows: Rows
    age: int  # tokens drawn
    text_B: np.ndarray  # the place of each text among all of all draws; -1: none
    slots: int  # for what is new


def draw(
    programs: Programs,
    weights: Params,
    keys: Sequence[jax.Array],
    ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    advance: Callable[[int, int], None] = lambda texts, tokens: None,
) -> list[Drawn]:
    """One text of each prompt from each draw, up to and including EOS or `new_tokens`.

    Args:
      weights: of the draws' arms (`Programs.weights`), in the order of `keys`.
      keys: of the draws.
      ids: of the prompts, below 2^64 and all different: a text's noise is that of its draw and its prompt's id.
      prompts: their ids, at least one each.
      advance: told of texts that have ended and of tokens drawn.
    """
    count = len(prompts)
    queue = _Queue(programs, weights, programs.keys(keys), len(keys), prompt_words(ids), prompts, new_tokens, advance)
    for slots in sorted({slots_for(len(prompt)) for prompt in prompts}):
        queue.drain(slots)
    length = _lengths(queue.id_NW, programs.eos)
    parts = [slice(number * count, (number + 1) * count) for number in range(len(keys))]
    return [Drawn(queue.id_NW[part], length[part], queue.log_p_NW[part]) for part in parts]


class _Queue:
    """Prompts that wait, batches that wait, and what has been drawn."""

    def __init__(
        self,
        programs: Programs,
        weights: Params,
        keys: jax.Array,
        draws: int,
        words_N2: np.ndarray,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        advance: Callable[[int, int], None],
    ) -> None:
        self.programs, self.weights, self.keys, self.draws = programs, weights, keys, draws
        self.words_N2, self.prompts, self.new_tokens, self.advance = words_N2, prompts, new_tokens, advance
        self.id_NW = np.full((draws * len(prompts), new_tokens), programs.eos, np.int32)
        self.log_p_NW = np.zeros((draws * len(prompts), new_tokens), np.float32)
        self.ages = _ages(new_tokens)
        # The draw that each device's rows are of.
        each = programs.ways // programs.devices.shape["replica"]
        self.draw_of = [device // each % draws for device in range(programs.ways)]

    def drain(self, slots: int) -> None:
        """Draws the texts of all prompts that have so many slots."""
        here = np.array([place for place, prompt in enumerate(self.prompts) if slots_for(len(prompt)) == slots])
        waiting = [number * len(self.prompts) + here for number in range(self.draws)]
        left: dict[int, _Batch] = {}  # by age
        now: _Batch | None = None
        while True:
            if now is None and any(map(len, waiting)):
                now = self._begin(waiting, slots)
            elif now is None and left:
                now = left.pop(min(left))
            elif now is None:
                return
            else:
                now = self._turn(now, slots)
            if now is not None:
                now = self._settle(now, left, slots, last=not any(map(len, waiting)))

    def _begin(self, waiting: list[np.ndarray], slots: int) -> _Batch:
        """The next prompts of every draw, as even over its devices as can be."""
        rows = self.programs.rows
        text_B = np.full(self.programs.ways * rows, -1)
        for number, texts in enumerate(waiting):
            mine = [device for device, of in enumerate(self.draw_of) if of == number]
            some = texts[: rows * len(mine)]
            for device, part in zip(mine, np.array_split(some, len(mine)), strict=True):
                text_B[device * rows : device * rows + len(part)] = part
            waiting[number] = texts[len(some) :]
        prompt_B = np.where(text_B < 0, 0, text_B % len(self.prompts))
        tokens_BP, length_B = pad_prompts([self.prompts[place] for place in prompt_B], self.programs.eos, slots)
        length_B[text_B < 0] = 0
        begun, new = self.programs.begin(self.weights, self.keys, self.words_N2[prompt_B], tokens_BP, length_B)
        batch = _Batch(begun, 0, text_B, LEAST_SLOTS)
        self._take(batch, new, 1)
        return batch

    def _turn(self, batch: _Batch, slots: int) -> _Batch:
        until = next(age for age in self.ages if age > batch.age)
        if slots_for(until) > batch.slots:
            batch = self._arranged([batch], np.arange(len(batch.text_B)) % self.programs.rows, batch.text_B, slots, until)
        width = max(LEAST_SLOTS // 2, batch.slots // 4)
        batch.rows, new = self.programs.turn(self.weights, batch.rows, batch.age, until, slots, width)
        self._take(batch, new, until)
        return batch

    def _take(self, batch: _Batch, new: New, until: int) -> None:
        """What was drawn, and which texts have ended."""
        id_BW, log_p_BW, done_B = processes.gathered((new.id_BW, new.log_p_BW, batch.rows.done_B))
        there_B, width = batch.text_B >= 0, until - batch.age
        texts, id_XW = batch.text_B[there_B], id_BW[there_B, :width]
        self.id_NW[texts, batch.age : until] = id_XW
        self.log_p_NW[texts, batch.age : until] = log_p_BW[there_B, :width]
        ended_B = there_B & (done_B | (until == self.new_tokens))
        batch.text_B, batch.age = np.where(ended_B, -1, batch.text_B), until
        self.advance(int(ended_B.sum()), int(_lengths(id_XW, self.programs.eos).sum()))

    def _settle(self, now: _Batch, left: dict[int, _Batch], slots: int, last: bool) -> _Batch | None:
        """What goes on at once: these rows, with those that waited at their age, if they fill a batch or nothing else comes."""
        alive = int((now.text_B >= 0).sum())
        if not alive:
            return None
        waited = left.pop(now.age, None)
        if waited is not None:
            now, rest = self._merged(waited, now, slots)
            if rest is not None:
                left[now.age] = rest
            alive = int((now.text_B >= 0).sum())
        if alive >= _FULL * len(now.text_B) or (last and all(age >= now.age for age in left)):
            return now
        left[now.age] = now
        return None

    def _merged(self, one: _Batch, other: _Batch, slots: int) -> tuple[_Batch, _Batch | None]:
        """The rows of two batches: a full one, and what is left of them, if any."""
        rows, ways = self.programs.rows, self.programs.ways
        text_XB = np.concatenate([batch.text_B.reshape(ways, rows) for batch in (one, other)], axis=1)
        # Of each device, the rows that are there, in front of the others.
        order_XB = np.argsort(text_XB < 0, axis=1, kind="stable")
        place_XB = np.where(np.take_along_axis(text_XB, order_XB, axis=1) < 0, -1, order_XB)
        text_XB = np.take_along_axis(text_XB, order_XB, axis=1)
        full, rest = (
            self._arranged([one, other], place_XB[:, part].reshape(-1), text_XB[:, part].reshape(-1), slots, one.age)
            if (text_XB[:, part] >= 0).any()
            else None
            for part in (slice(rows), slice(rows, None))
        )
        assert full is not None  # both had rows
        return full, rest

    def _arranged(self, sources: list[_Batch], place_B: np.ndarray, text_B: np.ndarray, slots: int, tokens: int) -> _Batch:
        new = max(sources[0].slots, slots_for(tokens))
        rows = self.programs.arrange([batch.rows for batch in sources], place_B.astype(np.int32), slots + new)
        return _Batch(rows, sources[0].age, text_B, new)


def _lengths(id_NW: np.ndarray, eos: int) -> np.ndarray:
    """How many ids of each row count: up to and including the first EOS."""
    before_NW = np.cumsum(id_NW == eos, axis=1) == 0
    return np.minimum(before_NW.sum(axis=1) + 1, id_NW.shape[1])


def _ages(new_tokens: int) -> list[int]:
    """The ages between which rows are drawn: each power of two from LEAST_SLOTS on, and the middle before it."""
    ages, slots = list[int](), LEAST_SLOTS
    while slots // 2 < new_tokens:
        ages += [slots * 3 // 4, slots] if ages else [slots // 2, slots]
        slots *= 2
    return [*(age for age in ages if age < new_tokens), new_tokens]
