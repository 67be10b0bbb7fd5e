"""Conversations: what a model reads of one, and what of it it learns to write.

Owns the way from messages to ids through a template, with what is learnt, and the question that a conversation begins with.
Must not know where conversations come from, nor windows.

Every piece has its ids by itself, so that a question has the same ones whatever answer follows: what is asked in sampling is
what was read in training.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from natfp_jax.config import Template
from natfp_jax.errors import UserError
from natfp_jax.ingest import Document
from natfp_jax.packing import written
from natfp_jax.tokenizer import Tokenizer

__all__ = ["Chat", "contents", "document", "question"]

Messages = list[dict[str, str]]  # of "role" and "content", as in the canonical JSON that is a conversation's text


def question(messages: Messages) -> Messages:
    """What is said before the first answer."""
    return messages[: next(place for place, message in enumerate(messages) if message["role"] == "assistant")]


def document(text: str) -> Document:
    """The conversation with this text. Those in which a user begins with the same words are on one side of every split."""
    asked = next(message["content"] for message in json.loads(text) if message["role"] == "user")
    return Document(text, *(hashlib.sha256(one.encode()).digest()[:16] for one in (text, asked)))


def contents(text: str) -> str:
    """What is said in a conversation, without its form: what a tokenizer learns from."""
    return "\n".join(message["content"] for message in json.loads(text))


@dataclass(frozen=True)
class Chat:
    """A template under a tokenizer."""

    tokenizer: Tokenizer
    template: Template

    @cached_property
    def end(self) -> int:
        """The id that ends an answer.

        Raises:
          UserError: it is no special token of the tokenizer.
        """
        found = self.tokenizer.special(self.template.end_of_turn)
        if found is None:
            raise UserError(
                f"template.end_of_turn {self.template.end_of_turn!r} is no special token of the tokenizer: its special tokens "
                f"are {', '.join(map(repr, self.tokenizer.specials))}; take one of them, or give "
                "a tokenizer that has it to the corpus of the oldest parent"
            )
        return found

    @cached_property
    def _around(self) -> dict[str, tuple[list[int], list[int]]]:
        """Role → the ids in front of its content, and behind it."""
        forms = {role: getattr(self.template, role).split("{content}") for role in ("system", "user", "assistant")}
        return {role: (self._form(before), self._form(after)) for role, (before, after) in forms.items()}

    def _form(self, text: str) -> list[int]:
        return self.tokenizer.encode_form(text) if text else []

    @property
    def dtype(self) -> Literal["<u4"]:
        """What holds the marks of an id too."""
        return "<u4"

    def document(self, text: str) -> Document:
        """The conversation with this text."""
        return document(text)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The marked ids of conversations: EOS, then their messages; answers and what ends them are learnt."""
        several: list[Messages] = [json.loads(text) for text in texts]
        said = iter(self.tokenizer.encode_batch([message["content"] for messages in several for message in messages]))
        found = []
        for messages in several:
            ids, learnt = [self.tokenizer.eos_id], [False]
            for message in messages:
                before, after = self._around[message["role"]]
                content, answers = next(said), message["role"] == "assistant"
                tail = [*after, self.end] if answers else after
                ids += [*before, *content, *tail]
                learnt += [False] * len(before) + [answers] * (len(content) + len(tail))
            found.append(written(ids, learnt))
        return found

    def asked(self, questions: Sequence[Messages]) -> list[list[int]]:
        """The ids of questions, up to where an answer begins."""
        said = iter(self.tokenizer.encode_batch([message["content"] for messages in questions for message in messages]))
        found = []
        for messages in questions:
            ids = [self.tokenizer.eos_id]
            for message in messages:
                before, after = self._around[message["role"]]
                ids += [*before, *next(said), *after]
            found.append([*ids, *self._around["assistant"][0]])
        return found

    def text(self, messages: Messages) -> str:
        """A question as it is written, up to where an answer begins."""
        forms = [getattr(self.template, message["role"]).replace("{content}", message["content"]) for message in messages]
        return "".join([*forms, self.template.assistant.split("{content}")[0]])
