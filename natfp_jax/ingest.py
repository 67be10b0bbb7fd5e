"""Documents into files of tokens, in one streaming pass.

Owns deduplication, the split by document, the shards, and the pass itself: memory is bounded, and a pass killed at any moment
goes on from its last commit and ends with the same bytes. Must not know where documents come from, nor windows.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import numpy as np

from natfp_jax.config import Corpus
from natfp_jax.errors import Damaged
from natfp_jax.files import hash_json
from natfp_jax.progress import Progress
from natfp_jax.tokenizer import Tokenizer

__all__ = [
    "PROMPTS",
    "VALIDATION",
    "Document",
    "Form",
    "Part",
    "Plain",
    "Texts",
    "forget",
    "ingest",
    "shard_names",
    "token_dtype",
    "training_sample",
]

Part = Literal["train", "validation", "prompt"]

VALIDATION, PROMPTS = "validation.bin", "prompts.jsonl"
_STATE = "progress.sqlite"
_BATCH_DOCUMENTS, _BATCH_BYTES = 1024, 8 << 20  # between two commits, at most


class Texts(Protocol):
    """Stripped texts with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


class Document(NamedTuple):
    """A document and what follows from its text alone."""

    text: str
    digest: bytes  # 128 bits of the sha256 of its UTF-8
    side: bytes  # 128 bits that decide its side of the split

    @classmethod
    def of(cls, text: str) -> "Document":
        """The document with this text."""
        digest = hashlib.sha256(text.encode()).digest()[:16]
        return cls(text, digest, digest)

    @property
    def id(self) -> str:
        """What documents that must not be separated have in common, in hexadecimal."""
        return self.side.hex()

    def part(self, corpus: Corpus) -> Part:
        """Its side of the split. Hashed once more, so that it is independent of the shard."""
        draw = int.from_bytes(hashlib.sha256(b"part" + self.side).digest()[:8], "big") / 2**64
        if draw < corpus.validation_fraction:
            return "validation"
        return "prompt" if draw < corpus.validation_fraction + corpus.prompt_fraction else "train"

    def shard(self, shards: int) -> int:
        """The shard that holds it if it is for training."""
        return int.from_bytes(self.digest, "big") % shards


class Form(Protocol):
    """How documents are written as ids."""

    @property
    def dtype(self) -> Literal["<u2", "<u4"]:
        """The type of the ids on disk."""

    def document(self, text: str, /) -> Document:
        """The document with this text."""

    def encode(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """What stands in the store of each: ids on disk, with what ends a document."""


@dataclass(frozen=True)
class Plain:
    """Text as it is, and EOS behind it."""

    tokenizer: Tokenizer

    @property
    def dtype(self) -> Literal["<u2", "<u4"]:
        """The smallest that holds every id."""
        return token_dtype(self.tokenizer.size)

    def document(self, text: str) -> Document:
        """The document with this text."""
        return Document.of(text)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        eos, dtype = self.tokenizer.eos_id, self.dtype
        return [np.array([*ids, eos], dtype) for ids in self.tokenizer.encode_batch(texts)]


def shard_names(shards: int) -> list[str]:
    """The files of training ids, in store order."""
    return [f"train-{shard:05d}-of-{shards:05d}.bin" for shard in range(shards)]


def token_dtype(vocabulary: int) -> Literal["<u2", "<u4"]:
    """The type of the ids on disk."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


def training_sample(
    documents: Texts,
    corpus: Corpus,
    progress: Progress,
    read: Callable[[str], Document] = Document.of,
    said: Callable[[str], str] = str,
) -> Iterator[str]:
    """The training documents from the start of the source on, without repetition, up to `tokenizer_bytes` of UTF-8.

    Args:
      read: the document with a text.
      said: what of a text is language.
    """
    seen: set[bytes] = set()
    size = 0
    with progress.task("training the tokenizer", None, "documents") as advance:
        for index in range(len(documents)):
            text = documents[index]
            if text and (document := read(text)).digest not in seen and document.part(corpus) == "train":
                seen.add(document.digest)
                language = said(text)
                size += len(language.encode())
                if size > corpus.tokenizer_bytes and len(seen) > 1:
                    return
                yield language
                advance(1)


def ingest(documents: Texts, form: Form, corpus: Corpus, folder: Path, progress: Progress) -> dict[str, int]:
    """Writes the shards, `VALIDATION` and `PROMPTS` into `folder`, from where an earlier pass stopped.

    Returns the number of documents `read`, `empty`, `duplicate`, `train`, `validation` and `prompt`. `forget` ends it.

    Raises:
      Damaged: a file is not what an earlier pass left.
    """
    names = [*shard_names(corpus.shards), VALIDATION, PROMPTS]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_readable(folder))
        database = stack.enter_context(contextlib.closing(sqlite3.connect(folder / _STATE, isolation_level=None)))
        database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        database.execute("CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, value INTEGER)")
        database.execute("CREATE TABLE IF NOT EXISTS seals (name TEXT PRIMARY KEY, value TEXT)")
        counts, seals = _resumable(folder, names, database)
        files = {name: stack.enter_context(_resumed(folder / name, counts[name])) for name in names}
        with progress.task("tokenising", len(documents), "documents") as advance:
            advance(counts["read"])
            for batch in _batches(documents, form, counts["read"]):
                database.execute("BEGIN IMMEDIATE")
                for name, data in _encoded(batch, form, corpus, database, counts, seals):
                    counts[name] += files[name].write(data)
                    seals.files[name].update(data)
                for file in files.values():  # before the commit: it must not count what a power cut takes away
                    file.flush()
                    os.fsync(file.fileno())
                database.executemany("REPLACE INTO counts VALUES (?, ?)", counts.items())
                database.executemany("REPLACE INTO seals VALUES (?, ?)", seals.say(counts).items())
                database.execute("COMMIT")
                advance(len(batch))
    return {name: counts[name] for name in ("read", "empty", "duplicate", "train", "validation", "prompt")}


def forget(folder: Path) -> None:
    """Removes what only a resumed pass needs."""
    for name in (_STATE, f"{_STATE}-journal"):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # no room, no permission
            raise
        raise Damaged(folder, f"is damaged: {_STATE} cannot be read ({error})") from None


@dataclass
class _Seals:
    """What an earlier pass left can be checked by: running hashes of the files, and the sum of all digests."""

    files: dict[str, Any]  # name → hash object
    digests: int = 0

    def add(self, digest: bytes) -> None:
        """Counts one more row of `seen`; the order of rows is no matter."""
        self.digests ^= int.from_bytes(hashlib.sha256(digest).digest(), "big")

    def say(self, counts: Counter[str]) -> dict[str, str]:
        """The seals as texts."""
        said = {name: digest.hexdigest() for name, digest in self.files.items()}
        return {**said, "seen": f"{self.digests:x}", "counts": hash_json(dict(sorted(counts.items())))}


def _resumable(folder: Path, names: list[str], database: sqlite3.Connection) -> tuple[Counter[str], _Seals]:
    """The counts and seals of an earlier pass, or of none, after a check of everything that it left."""
    counts = Counter[str](dict(database.execute("SELECT name, value FROM counts")))
    seals = _Seals({name: hashlib.sha256() for name in names})
    expected = dict(database.execute("SELECT name, value FROM seals"))
    for (digest,) in database.execute("SELECT digest FROM seen"):
        seals.add(digest)
    for name in names:
        path, left = folder / name, counts[name]
        with contextlib.nullcontext() if not left else open(path, "rb") as file:
            while file is not None and left and (block := file.read(min(left, 1 << 22))):
                seals.files[name].update(block)
                left -= len(block)
    if counts and (other := [name for name, value in seals.say(counts).items() if expected.get(name) != value]):
        raise Damaged(folder, f"is damaged: {other[0]} is not what an earlier pass left")
    return counts, seals


def _resumed(path: Path, committed: int) -> IO[bytes]:
    file = open(path, "ab")  # noqa: SIM115  # the caller closes it
    file.truncate(committed)
    return file


def _batches(documents: Texts, form: Form, start: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for index in range(start, len(documents)):
        batch.append(form.document(documents[index]))
        size += len(batch[-1].text)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batch: list[Document],
    form: Form,
    corpus: Corpus,
    database: sqlite3.Connection,
    counts: Counter[str],
    seals: _Seals,
) -> Iterator[tuple[str, bytes]]:
    """The (file, bytes) to append for a batch; counts its documents."""
    names = shard_names(corpus.shards)
    texts: list[tuple[str, str]] = []
    counts["read"] += len(batch)
    for document in batch:
        if not document.text:
            counts["empty"] += 1
            continue
        if not database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (document.digest,)).rowcount:
            counts["duplicate"] += 1
            continue
        seals.add(document.digest)
        part = document.part(corpus)
        counts[part] += 1
        if part == "prompt":
            line = json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False)
            yield PROMPTS, line.encode() + b"\n"
        else:
            texts.append((VALIDATION if part == "validation" else names[document.shard(corpus.shards)], document.text))
    for (name, _), ids in zip(texts, form.encode([text for _, text in texts]), strict=True):
        yield name, ids.tobytes()
