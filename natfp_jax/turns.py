"""Which texts are drawn together, and when.

Owns the queue of prompts and the turns: rows are drawn a stretch of tokens at a time, and between two stretches those that have
ended make room. Nothing here changes a text. Must not know how a token is drawn, files, arms or studies.

Rows of one batch are of one age, so that they share the slots that they write to; what is left of several batches waits at
each age until it fills one. Ages double, so that few programs serve all lengths and little waits.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from natfp_jax import processes
from natfp_jax.params import Params
from natfp_jax.sample import NEW_SLOTS, New, Programs, Rows, at_once, new_slots_for, pad_prompts, prompt_words, slots_for

__all__ = ["Drawn", "Stretch", "draw", "stretches"]

_FULL = 3 / 4  # of a batch: with fewer rows than that it waits for others, rather than be drawn half empty


class Drawn(NamedTuple):
    """The texts of one draw, in the order of its prompts: `id_NW`, of which the first `length_N` count.

    `log_p_NW`: the log-probability of each id under the strategy, in nats; zero behind a text's end.
    """

    id_NW: np.ndarray
    length_N: np.ndarray
    log_p_NW: np.ndarray


class Stretch(NamedTuple):
    """Tokens that are drawn in one turn."""

    until: int  # the age that rows have then
    slots: int  # of a text, for what is new
    width: int  # tokens of the program's output


@dataclass
class _Batch:
    """Rows under way, and whose they are."""

    rows: Rows | None  # None: their prompts have not been read
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
    given: Sequence[np.ndarray] | None = None,
) -> list[Drawn]:
    """One text of each prompt from each draw, up to and including EOS or `new_tokens`.

    Args:
      weights: of the draws' arms (`Programs.weights`), in the order of `keys`.
      keys: of the draws.
      ids: of the prompts, below 2^64 and all different: a text's noise is that of its draw and its prompt's id.
      prompts: their ids, at least one each.
      advance: told of texts that have ended and of tokens drawn.
      given: of each draw texts of its prompts, [N, `new_tokens`] with EOS behind their ends: they are scored, by the very
        programs that draw, and nothing is drawn.
    """
    count = len(prompts)
    given_NW = None if given is None else np.concatenate(given)
    queue = _Queue(programs, weights, programs.keys(keys), len(keys), prompt_words(ids), prompts, new_tokens, advance, given_NW)
    for slots in sorted({slots_for(len(prompt)) for prompt in prompts}):
        queue.drain(slots)
    length = _lengths(queue.id_NW, programs.eos)
    parts = [slice(number * count, (number + 1) * count) for number in range(len(keys))]
    return [Drawn(queue.id_NW[part], length[part], queue.log_p_NW[part]) for part in parts]


class _Queue:
    """Prompts that wait, batches that wait, and what has been drawn; worked off by one thread or several."""

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
        given_NW: np.ndarray | None,
    ) -> None:
        self.programs, self.weights, self.keys, self.draws = programs, weights, keys, draws
        self.words_N2, self.prompts, self.new_tokens, self.advance = words_N2, prompts, new_tokens, advance
        self.given_NW = given_NW
        self.id_NW = np.full((draws * len(prompts), new_tokens), programs.eos, np.int32)
        self.log_p_NW = np.zeros((draws * len(prompts), new_tokens), np.float32)
        self.stretches = stretches(new_tokens)
        # The draw that each device's rows are of.
        each = programs.ways // programs.devices.shape["replica"]
        self.draw_of = [device // each % draws for device in range(programs.ways)]
        self.changed, self.ended = threading.Condition(), False
        self.slots = 0  # of the prompts at hand
        self.waiting: list[np.ndarray] = []  # of each draw, the places of their texts
        self.lacking = 0  # texts that have not ended
        self.left: dict[int, _Batch] = {}  # by age
        self.under_way: list[int] = []  # their ages

    def drain(self, slots: int) -> None:
        """Draws the texts of all prompts that have so many slots."""
        here = np.array([place for place, prompt in enumerate(self.prompts) if slots_for(len(prompt)) == slots])
        self.slots, self.waiting = slots, [number * len(self.prompts) + here for number in range(self.draws)]
        self.lacking += sum(map(len, self.waiting))
        threads = at_once(self.programs.devices)
        if threads == 1:
            self._work()
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="natfp draws") as pool:
                try:
                    done, _ = wait([pool.submit(self._work) for _ in range(threads)], return_when=FIRST_EXCEPTION)
                    for one in done:
                        one.result()
                finally:  # after an error or a signal the others end with their turn
                    with self.changed:
                        self.ended = True
                        self.changed.notify_all()
            self.ended = False
        if self.lacking:
            raise RuntimeError(f"{self.lacking} texts were lost")

    def _work(self) -> None:
        """Takes one turn after another, until there is nothing left to do."""
        now: _Batch | None = None
        age = -1
        while True:
            with self.changed:
                if now is not None:
                    self.under_way.remove(age)
                now = self._next(now)
                self.changed.notify_all()
                if now is None:
                    return
                age = now.age
                self.under_way.append(age)
            self._turn(now)

    def _next(self, now: _Batch | None) -> _Batch | None:
        """What is to be drawn next: the rows that were, if they go on at once; new ones; or those that were left."""
        if now is not None:
            now = self._settle(now)
        while now is None and not self.ended:
            if any(map(len, self.waiting)):
                now = self._filled()
            elif self.left and all(age >= min(self.left) for age in self.under_way):  # else more may come to them
                now = self.left.pop(min(self.left))
            elif not self.under_way:
                return None
            else:
                self.changed.wait()
        return None if self.ended else now

    def _filled(self) -> _Batch:
        """The next prompts of every draw, as even over its devices as can be."""
        rows = self.programs.rows
        text_B = np.full(self.programs.ways * rows, -1)
        for number, texts in enumerate(self.waiting):
            mine = [device for device, of in enumerate(self.draw_of) if of == number]
            some = texts[: rows * len(mine)]
            for device, part in zip(mine, np.array_split(some, len(mine)), strict=True):
                text_B[device * rows : device * rows + len(part)] = part
            self.waiting[number] = texts[len(some) :]
        return _Batch(None, 0, text_B, NEW_SLOTS)

    def _turn(self, batch: _Batch) -> None:
        """Reads the prompts, or draws up to the next age."""
        if batch.rows is None:
            prompt_B = np.where(batch.text_B < 0, 0, batch.text_B % len(self.prompts))
            prompts = [self.prompts[place] if text >= 0 else () for text, place in zip(batch.text_B, prompt_B, strict=True)]
            tokens_BP, length_B = pad_prompts(prompts, self.programs.eos, self.slots)
            batch.rows, new = self.programs.begin(
                self.weights, self.keys, self.words_N2[prompt_B], tokens_BP, length_B, self._given(batch, 1, 1)
            )
            self._take(batch, new, 1)
            return
        until, slots, width = next(one for one in self.stretches if one.until > batch.age)
        if slots > batch.slots:
            batch.slots = slots
            batch.rows = self.programs.grow(batch.rows, self.slots + slots)
        given_BW = self._given(batch, until, width)
        batch.rows, new = self.programs.turn(self.weights, batch.rows, batch.age, until, self.slots, width, given_BW)
        self._take(batch, new, until)

    def _given(self, batch: _Batch, until: int, width: int) -> np.ndarray | None:
        """What is to be scored of a batch's texts next."""
        if self.given_NW is None:
            return None
        given_BW = np.full((len(batch.text_B), width), self.programs.eos, np.int32)
        there_B = batch.text_B >= 0
        given_BW[there_B, : until - batch.age] = self.given_NW[batch.text_B[there_B], batch.age : until]
        return given_BW

    def _take(self, batch: _Batch, new: New, until: int) -> None:
        """What was drawn, and which texts have ended."""
        assert batch.rows is not None  # they were drawn just now
        id_BW, log_p_BW, done_B = processes.gathered((new.id_BW, new.log_p_BW, batch.rows.done_B))
        there_B, width = batch.text_B >= 0, until - batch.age
        texts, id_XW = batch.text_B[there_B], id_BW[there_B, :width]
        self.id_NW[texts, batch.age : until] = id_XW
        self.log_p_NW[texts, batch.age : until] = log_p_BW[there_B, :width]
        ended_B = there_B & (done_B | (until == self.new_tokens))
        batch.text_B, batch.age = np.where(ended_B, -1, batch.text_B), until
        with self.changed:
            self.lacking -= int(ended_B.sum())
            self.advance(int(ended_B.sum()), int(_lengths(id_XW, self.programs.eos).sum()))

    def _settle(self, now: _Batch) -> _Batch | None:
        """What goes on at once: these rows, with those that waited at their age, if they fill a batch or nothing else comes."""
        if not (now.text_B >= 0).any():
            return None
        waited = self.left.pop(now.age, None)
        if waited is not None:
            now, rest = self._merged(waited, now)
            if rest is not None:  # a device is full, others may have no more to do
                self.left[now.age] = rest
                return now
        if (now.text_B >= 0).mean() >= _FULL:
            return now
        self.left[now.age] = now
        return None

    def _merged(self, one: _Batch, other: _Batch) -> tuple[_Batch, _Batch | None]:
        """The rows of two batches: a full one, and what is left of them, if any."""
        assert one.rows is not None  # both have been begun
        assert other.rows is not None
        rows, ways = self.programs.rows, self.programs.ways
        text_XB = np.concatenate([batch.text_B.reshape(ways, rows) for batch in (one, other)], axis=1)
        # Of each device, the rows that are there, in front of the others.
        order_XB = np.argsort(text_XB < 0, axis=1, kind="stable")
        text_XB = np.take_along_axis(text_XB, order_XB, axis=1)
        place_XB = np.where(text_XB < 0, -1, order_XB).astype(np.int32)
        found = []
        for part in (slice(rows), slice(rows, None)):
            text_B, place_B = text_XB[:, part].reshape(-1), place_XB[:, part].reshape(-1)
            if (text_B >= 0).any():
                brought = self.programs.arrange([one.rows, other.rows], place_B, self.slots + one.slots)
                found.append(_Batch(brought, one.age, text_B, one.slots))
        return found[0], found[1] if len(found) > 1 else None


def _lengths(id_NW: np.ndarray, eos: int) -> np.ndarray:
    """How many ids of each row count: up to and including the first EOS."""
    before_NW = np.cumsum(id_NW == eos, axis=1) == 0
    return np.minimum(before_NW.sum(axis=1) + 1, id_NW.shape[1])


def stretches(new_tokens: int) -> list[Stretch]:
    """The turns that draw so many tokens, behind the first, which is drawn where prompts are read."""
    ages = ((age, new_slots_for(age)) for age in _ages(new_tokens) if age > 1)
    return [Stretch(age, slots, max(NEW_SLOTS // 2, slots // 4)) for age, slots in ages]


def _ages(new_tokens: int) -> list[int]:
    """The ages between which rows are drawn: each power of two from NEW_SLOTS on, and the middle before it."""
    ages, slots = list[int](), NEW_SLOTS
    while slots // 2 < new_tokens:
        ages += [slots * 3 // 4, slots] if ages else [slots // 2, slots]
        slots *= 2
    return [*(age for age in ages if age < new_tokens), new_tokens]
