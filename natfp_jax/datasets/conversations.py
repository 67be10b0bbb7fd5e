"""Conversations of a user's own, from .jsonl files (also as .gz and .zst), a conversation a line.

Owns the two forms of a line, and which messages make a conversation.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from natfp_jax.datasets.builder import ConversationBuilder
from natfp_jax.datasets.listing import below, digest
from natfp_jax.errors import UserError
from natfp_jax.records import got, jsonl, text_of

__all__ = ["Conversations"]

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_FORMS = "'messages', or 'prompt' and 'response'"
_NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}  # role → roles


class Conversations(ConversationBuilder):
    """The .jsonl file `path`, or every one below that folder. The data is named after names, sizes and times of change.

    A line has `messages`, a list of {"role", "content"}, or else `prompt` and `response`. A conversation has at most one
    message of `system`, which comes first, and then those of `user` and `assistant` in turn, up to one of `assistant`.

    Raises:
      UserError: there is no such file; on preparing: one is broken, or a line is no conversation.
    """

    def __init__(self, *, data_dir: str | Path, path: str | Path) -> None:
        self._path = Path(path)
        if path and self._path.is_dir():
            self._files = below(self._path, _SUFFIXES)
        elif self._path.is_file():
            self._files = {self._path.name: self._path} if self._path.name.endswith(_SUFFIXES) else {}
        else:
            raise UserError(f"there is no file or folder {str(path)!r}: set the source's path to one with conversations")
        if not self._files:
            raise UserError(f"{path} neither is nor holds a file that ends in {', '.join(_SUFFIXES)}: put conversations there")
        super().__init__(
            data_dir=data_dir, inputs=digest(self._files), description=f"Conversations of {len(self._files)} files in {path}"
        )

    def conversations(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields (file:line, [(role, content), ...]), the contents stripped of white space around them."""
        empty = True
        for name, file in self._files.items():
            for number, record in jsonl(file):
                empty = False
                where = f"{file}, line {number}"
                messages = _messages(record, where)
                _check(messages, where)
                yield f"{name}:{number}", messages
        if empty:
            raise UserError(f"{self._path} has no conversation in it: put one on each line of a .jsonl file")


def _messages(record: Any, where: str) -> list[tuple[str, str]]:
    """The (role, content) of a line in either form."""
    if isinstance(record, dict) and "messages" in record:
        if not isinstance(record["messages"], list):
            kind = type(record["messages"]).__name__
            raise UserError(f"{where}: 'messages' is {kind}, expected a list of objects with role and content: mend the line")
        messages = []
        for number, message in enumerate(record["messages"], 1):
            role, content = (text_of(message, key, f"{where}, message {number}", "it") for key in ("role", "content"))
            messages.append((role, content.strip()))
        return messages
    if isinstance(record, dict) and {"prompt", "response"} <= record.keys():
        given = [("user", "prompt"), ("assistant", "response")]
        return [(role, text_of(record, key, where, _FORMS).strip()) for role, key in given]
    raise UserError(f"{where}: neither {_FORMS} (got {got(record)}): name its fields so")


def _check(messages: list[tuple[str, str]], where: str) -> None:
    """Refuses what is no conversation."""
    before = None
    for number, (role, content) in enumerate(messages, 1):
        place = f"{where}, message {number}"
        if role not in _NEXT[before]:
            raise UserError(
                f"{place}: role {json.dumps(role)[:40]}, expected {' or '.join(_NEXT[before])}: give at most one message of "
                f"system, then user and assistant in turn"
            )
        if not content:
            raise UserError(f"{place}: the content is empty: mend or remove the line")
        before = role
    if before != "assistant":
        last = f"the last message is of {before}" if before else "there is no message"
        raise UserError(f"{where}: {last}, expected one of assistant at the end: mend or remove the line")
