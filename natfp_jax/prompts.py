"""What every draw of a study begins with.

Owns the prompts of a study: pieces of held-out documents, or what a file of the user's holds; as columns, which take a tenth of
what objects would. Must not know models or how text is drawn.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from natfp_jax.config import Sampling
from natfp_jax.corpus import Store
from natfp_jax.errors import UserError
from natfp_jax.records import TOGETHER, lines, rows, text_of, whole
from natfp_jax.tokenizer import Tokenizer

__all__ = ["Prompts", "prompts_of"]

_SCHEMA = pa.schema({"id": pa.uint64(), "document": pa.string(), "text": pa.string()})
_ASKED = _SCHEMA.append(pa.field("ids", pa.list_(pa.int32())))  # of questions, whose form a text does not say
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Prompts:
    """Prompts with their ids, below 2^64 and all different, and the documents that they are of; their texts are distinct."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def part(self, first: int, count: int) -> "Prompts":
        """Some of them, in their order."""
        return Prompts(self.table.slice(first, count))

    @property
    def ids(self) -> list[int]:
        """What their noise is keyed by."""
        return list(self.table["id"].to_pylist())

    @property
    def documents(self) -> list[str]:
        """The cluster of each."""
        return list(self.table["document"].to_pylist())

    @property
    def texts(self) -> list[str]:
        """The prompts themselves."""
        return list(self.table["text"].to_pylist())

    def encoded(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of each, EOS first."""
        if "ids" in self.table.column_names:
            return list(self.table["ids"].to_pylist())
        return [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch(self.texts)]

    @cached_property
    def sha256(self) -> str:
        """Over id, document and text of all, and the ids of questions, in order."""
        digest = hashlib.sha256()
        for batch in self.table.to_batches(max_chunksize=TOGETHER):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(repr(row).encode())
        return digest.hexdigest()

    def check(self, tokenizer: Tokenizer, context: int, source: str) -> int:
        """The tokens of the longest, EOS with it.

        Raises:
          UserError: one is longer than what the model has been trained on.
        """
        longest = 0
        for first in range(0, len(self), TOGETHER):
            some = self.part(first, TOGETHER)
            for place, ids in enumerate(some.encoded(tokenizer)):
                if len(ids) > context:
                    text = some.texts[place]
                    said = repr(text if len(text) <= 40 else f"{text[:40]}...")
                    raise UserError(
                        f"prompt {first + place + 1} of {source}, {said}, has {len(ids)} tokens with EOS, the models' context "
                        f"has {context}: shorten it, set a smaller sampling.prompt_chars or train longer windows (data.seq_len)"
                    )
                longest = max(longest, len(ids))
        return longest


def prompts_of(store: Store, sampling: Sampling, context: int | None = None) -> Prompts:
    """The prompts that a study asks for: of a file, or of the held-out documents of its corpus.

    Of a corpus of conversations they are questions, in its template; of a file each is the question of a user.

    Args:
      context: the most ids that a held-out question may have; None: any number.

    Raises:
      UserError: there are fewer, or the file cannot be read.
    """
    if sampling.prompt_file is None and store.chat is not None:
        asked = store.questions(sampling.prompts, context)
        return Prompts(pa.Table.from_pylist([asdict(prompt) for prompt in asked], schema=_ASKED))
    if sampling.prompt_file is None:
        found = store.prompts(sampling.prompts, sampling.prompt_chars, sampling.offsets_per_document)
        columns = [[prompt.id for prompt in found], [prompt.document for prompt in found], [prompt.text for prompt in found]]
        return Prompts(pa.table(columns, schema=_SCHEMA))
    path = Path(sampling.prompt_file)
    distinct: dict[str, str] = {}
    for text, document in _read(path, sampling.prompt_key):
        text = text if store.chat is None else text.strip()  # as in training
        distinct.setdefault(text, document or _hash(text)[:16])
        if len(distinct) == sampling.prompts:
            break
    else:
        raise UserError(
            f"{path} has {len(distinct)} different prompts, {sampling.prompts} were asked for: set sampling.prompts="
            f"{len(distinct)} or fewer, or give a longer file"
            if distinct
            else f"{path} has no prompt: put texts there"
        )
    ids = [int(_hash(text)[:16], 16) for text in distinct]
    columns = [ids, list(distinct.values()), list(distinct)]
    if store.chat is None:
        return Prompts(pa.table(columns, schema=_SCHEMA))
    questions = [[{"role": "user", "content": text}] for text in distinct]
    columns[2] = [store.chat.text(question) for question in questions]
    return Prompts(pa.table([*columns, store.chat.asked(questions)], schema=_ASKED))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, key: str) -> Iterator[tuple[str, str | None]]:
    """Each prompt of a file, and the document that it says it is of, if it says so in a field `document_id`."""
    if not path.is_file():
        raise UserError(f"sampling.prompt_file {path} is no file: give one that ends in {', '.join(_SUFFIXES)}")
    match path.suffix:
        case ".txt":
            for text in lines(path):
                if text.strip():  # an empty line stands between prompts
                    yield text.rstrip("\r\n"), None
        case ".jsonl" | ".parquet":
            for where, record in rows(path, {key: "sampling.prompt_key"}, ["document_id"]):
                yield _prompt(record, key, where)
        case _:
            raise UserError(f"sampling.prompt_file {path} ends in none of {', '.join(_SUFFIXES)}: rename or convert it")


def _prompt(record: Any, key: str, where: str) -> tuple[str, str | None]:
    text = text_of(record, key, where, "sampling.prompt_key")
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty: remove it")
    document = record.get("document_id")
    return text, None if document is None else whole(str(document), where)
