"""A corpus: the token store of a source of documents, and what is read from it.

Owns the store's folder, its description `meta.json`, its identity (sha256 over the training ids), the pool of windows and the
prompts. Must not know models, orders of windows, or how text is drawn.
"""

import hashlib
import heapq
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax import chat, config, documents, places
from natfp_jax.chat import Chat
from natfp_jax.errors import Damaged, UserError
from natfp_jax.files import canonical_json, carried, fetched, manifest, read_remade, verify, write_json
from natfp_jax.ingest import PROMPTS, VALIDATION, Document, Plain, forget, ingest, shard_names, training_sample
from natfp_jax.lock import alone
from natfp_jax.packing import Packed
from natfp_jax.progress import Progress
from natfp_jax.tokenizer import Tokenizer
from natfp_jax.windows import Windows, open_ids

__all__ = ["Prompt", "Store", "Windows", "opened", "prepare"]

_SCHEMA = 2  # of the folder; a change makes new folders
_META, _TOKENIZER, _SEAL = "meta.json", "tokenizer.json", "tokenizer.manifest.json"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning, or another piece, of a prompt document; or the question of a conversation."""

    # 64 bits of the sha256 of (document id, offset number), or of a question: never a position, so that noise keyed by it stays
    id: int
    document: str  # the document's id
    text: str
    ids: tuple[int, ...] | None = None  # of a question: what a text does not say of its form


@dataclass(frozen=True)
class Store:
    """A finished token store."""

    folder: Path  # on this machine: of one in an object store a copy
    meta: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def sha256(self) -> str:
        """The corpus's identity: sha256 over all training ids in store order."""
        return str(self.meta["ids_sha256"])

    def recomputed(self) -> str:
        """The same, from the files."""
        return _sha256(self.folder / name for name in shard_names(self.meta["corpus"]["shards"]))

    @property
    def tokens(self) -> int:
        """The number of training ids."""
        return int(self.meta["tokens"]["train"])

    @cached_property
    def chat(self) -> Chat | None:
        """How its conversations are written, if it is of such."""
        corpus = config.from_json(config.Corpus, self.meta["corpus"])
        return Chat(self.tokenizer, corpus.template) if corpus.conversations else None

    @property
    def end_id(self) -> int:
        """The id that ends a text of a model that is trained on it."""
        return self.tokenizer.eos_id if self.chat is None else self.chat.end

    def pool(self, data: config.Data) -> Windows | Packed:
        """The windows that are trained on.

        Raises:
          UserError: the corpus is too small.
        """
        return self.windows(data.seq_len, data.windows, data.first)

    def windows(self, seq_len: int, count: int, first: int = 0) -> Windows | Packed:
        """`count` windows of `seq_len` + 1 ids in store order, from the window `first` on.

        Raises:
          UserError: the corpus is too small.
        """
        packed = self._packed(seq_len)
        available = self.tokens // (seq_len + 1) if packed is None else packed.available
        if first + count > available:
            begun, whole = (f" from window {first} on", " in all") if first else ("", "")
            had, other = _too_long(packed)
            raise UserError(
                f"the corpus is too small: {count} windows of {seq_len} + 1 tokens{begun} were asked for, it has "
                f"{available}{whole} ({self.tokens} tokens{had}); ask for fewer or {other} windows, or take a larger corpus"
            )
        if packed is not None:
            return packed.part(count, first)
        return Windows(self._shards(), seq_len, count, first)

    def _shards(self) -> list[np.ndarray]:
        return [open_ids(self.folder / name, self.meta["dtype"]) for name in shard_names(self.meta["corpus"]["shards"])]

    def left_out(self, seq_len: int) -> int:
        """How many conversations are longer than such a window; of text, none."""
        packed = self._packed(seq_len)
        return 0 if packed is None else packed.left_out

    def _packed(self, seq_len: int) -> Packed | None:
        """All windows of conversations; looked through once, whoever asks."""
        if self.chat is None:
            return None
        if seq_len not in self._packings:
            self._packings[seq_len] = Packed(self._shards(), seq_len, self.tokenizer.eos_id)
        return self._packings[seq_len]

    @cached_property
    def _packings(self) -> dict[int, Packed]:
        return {}

    def validation_windows(self, seq_len: int, limit: int) -> np.ndarray:
        """The first windows, at most `limit`, of the validation documents: int32 [n, seq_len + 1], n ≥ 1.

        Raises:
          UserError: there is not one.
        """
        ids = open_ids(self.folder / VALIDATION, self.meta["dtype"])
        packed = None if self.chat is None else Packed([ids], seq_len, self.tokenizer.eos_id)
        count = min(limit, len(ids) // (seq_len + 1) if packed is None else packed.available)
        if count < 1:
            had, other = _too_long(packed)
            raise UserError(
                f"the corpus is too small: its validation part has {len(ids)} tokens{had}, one window needs {seq_len} + 1; "
                f"take {other} windows, a larger corpus, or a larger validation_fraction"
            )
        if packed is not None:
            return packed.rows(np.arange(count))
        return ids[: count * (seq_len + 1)].reshape(count, seq_len + 1).astype(np.int32)

    def prompts(self, count: int, chars: int, offsets_per_document: int) -> tuple[Prompt, ...]:
        """The first `count` prompts of `chars` characters, documents in order of their id; their texts are distinct.

        A document longer than a prompt gives its beginning, and up to `offsets_per_document` pieces, evenly spaced, that do
        not overlap. More prompts begin with the same ones. Memory is bounded by `count`, not by the corpus.

        Raises:
          UserError: there are fewer.
        """
        kept = count  # documents; more where some have nothing new to say
        while True:
            with open(self.folder / PROMPTS, "rb") as lines:
                pieces = (_pieces(json.loads(line), chars, offsets_per_document) for line in lines)
                first = heapq.nsmallest(kept, filter(None, pieces), key=lambda prompts: prompts[0].document)
            distinct: dict[str, Prompt] = {}
            for prompts in first:
                for prompt in prompts:
                    distinct.setdefault(prompt.text, prompt)
            if len(distinct) >= count:
                return tuple(distinct.values())[:count]
            if len(first) < kept:
                raise UserError(_too_few(f"{len(distinct)} prompts of {chars} characters", count))
            kept *= 2

    def questions(self, count: int, context: int | None = None) -> tuple[Prompt, ...]:
        """The first `count` questions of held-out conversations, by their documents, of those that have at most `context` ids.

        Raises:
          UserError: there are fewer.
        """
        written = self.chat
        assert written is not None  # it is a store of conversations
        kept = count  # conversations; more where some ask the same, or too much
        while True:
            with open(self.folder / PROMPTS, "rb") as lines:
                first = heapq.nsmallest(kept, map(json.loads, lines), key=lambda document: str(document["id"]))
            asked = [chat.question(json.loads(document["text"])) for document in first]
            distinct: dict[str, Prompt] = {}
            for document, messages, ids in zip(first, asked, written.asked(asked), strict=True):
                if context is None or len(ids) <= context:
                    text = written.text(messages)
                    distinct.setdefault(text, Prompt(_number(text), document["id"], text, tuple(ids)))
            if len(distinct) >= count:
                return tuple(distinct.values())[:count]
            if len(first) < kept:
                said = "" if context is None else f" of at most {context} tokens"
                raise UserError(_too_few(f"{len(distinct)} prompts{said}", count))
            kept *= 2


def _too_few(there: str, asked: int) -> str:
    return (
        f"the corpus has {there}, {asked} were asked for: ask for fewer or shorter prompts, or take a larger corpus or a "
        "larger prompt_fraction"
    )


def _pieces(document: dict[str, str], chars: int, most: int) -> list[Prompt]:
    """The prompts of one document; each is followed by at least one character of the document."""
    text, prompts = document["text"], []
    number = min(most, (len(text) - 1) // chars)
    for offset in range(number):
        start = offset * (len(text) // number)
        prompts.append(Prompt(_number(f"{document['id']} {offset}"), document["id"], text[start : start + chars]))
    return prompts


def _too_long(packed: Packed | None) -> tuple[str, str]:
    """What has no place in windows, as it is said to the user, and which other windows would hold more."""
    if packed is None or not packed.left_out:
        return "", "shorter"
    return f", {packed.left_out} conversations are longer than a window", "shorter" if packed.available else "longer"


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def prepare(corpus: config.Corpus, root: Path, progress: Progress) -> Store:
    """Opens the store of `corpus` below `root`, after writing it or what is missing of it.

    Raises:
      UserError: the source or the tokenizer is broken, or the store contradicts the configuration.
      Damaged: a file of the store is not what was written.
    """
    if corpus.validation_fraction + corpus.prompt_fraction >= 1:
        raise UserError(
            f"validation_fraction {corpus.validation_fraction} and prompt_fraction {corpus.prompt_fraction} leave nothing to "
            f"train on: their sum must be below 1"
        )
    source = documents.find(corpus.source, places.here(root) / "data", progress)
    inputs = {"schema": str(_SCHEMA), "source": source.identity}
    given = None
    if corpus.tokenizer is not None:
        given = Tokenizer.load(Path(corpus.tokenizer))
        inputs["tokenizer"] = given.sha256
    # A given tokenizer is known by its hash, not by where it lies.
    fingerprint = config.fingerprint(replace(corpus, tokenizer=None), inputs)
    folder = root / "corpora" / fingerprint[:16]
    if not (folder / _META).exists():
        with alone(folder, progress, wait=True):
            if not (folder / _META).exists():
                _prepared(corpus, source, given, fingerprint, folder, progress)
    return _open(corpus, fingerprint, folder)


def _prepared(
    corpus: config.Corpus, source: documents.Source, given: Tokenizer | None, fingerprint: str, folder: Path, progress: Progress
) -> None:
    """Writes the store; one in an object store is made on this machine, where a pass that was cut off goes on."""
    own = places.here(folder)
    if own == folder or not (own / _META).exists():
        _write(corpus, source, given, fingerprint, own, progress)
    if own != folder:
        carried(own, folder, (*opened(own).meta["store"], _META))


def _write(
    corpus: config.Corpus, source: documents.Source, given: Tokenizer | None, fingerprint: str, folder: Path, progress: Progress
) -> None:
    for remains in folder.glob(".*.tmp"):  # of a killed process
        remains.unlink()
    texts = source.documents(progress)
    path, seal = folder / _TOKENIZER, folder / _SEAL
    if seal.exists():  # of a pass that was cut off
        try:
            verify(folder, read_remade(seal))
        except Damaged as damage:
            raise Damaged(folder, damage.why) from None
        tokenizer = Tokenizer.load(path)
    else:
        language = (chat.document, chat.contents) if corpus.conversations else (Document.of, str)
        tokenizer = given or Tokenizer.train(training_sample(texts, corpus, progress, *language), corpus.vocabulary)
    form = Chat(tokenizer, corpus.template) if corpus.conversations else Plain(tokenizer)
    if isinstance(form, Chat):
        _ = form.end  # what is wrong with the template is known before anything is written
    if not seal.exists():
        tokenizer.save(path)
        write_json(seal, manifest(folder, [_TOKENIZER]))
    counts = ingest(texts, form, corpus, folder, progress)
    if not counts["train"]:
        raise UserError(f"the corpus is too small: none of its {counts['read']} documents is for training; add documents")
    shards = shard_names(corpus.shards)
    dtype = form.dtype
    store = manifest(folder, (*shards, VALIDATION, PROMPTS, _TOKENIZER))
    tokens = {name: store[name]["bytes"] // np.dtype(dtype).itemsize for name in (*shards, VALIDATION)}
    meta = {
        "schema": _SCHEMA,
        "name": source.builder.name,
        "fingerprint": fingerprint,
        "corpus": config.to_json(corpus),
        "documents": counts,
        "tokens": {"train": sum(tokens[name] for name in shards), "validation": tokens[VALIDATION]},
        "shard_tokens": [tokens[name] for name in shards],
        "dtype": dtype,
        "vocabulary": tokenizer.size,
        "padded_vocabulary": tokenizer.padded_size,
        "tokenizer_sha256": tokenizer.sha256,
        "ids_sha256": _sha256(folder / name for name in shards),
        "provenance": {
            "source": source.identity,
            "description": source.description,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("tensorflow-datasets", "tokenizers")},
        },
        "store": store,  # the manifest of the other files
    }
    write_json(folder / _META, meta)
    _forget(folder)


def _forget(folder: Path) -> None:
    """Removes what only a resumed pass needs."""
    forget(folder)
    (folder / _SEAL).unlink(missing_ok=True)


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def opened(folder: Path) -> Store:
    """The finished token store in a folder.

    Raises:
      Damaged: a file is not what was written.
    """
    try:
        meta = read_remade(folder / _META)
    except Damaged as damage:
        raise Damaged(folder, f"is damaged: its {_META} {damage.why}") from None
    own = fetched(folder, meta["store"])
    return Store(own, meta, Tokenizer.load(own / _TOKENIZER))


def _open(corpus: config.Corpus, fingerprint: str, folder: Path) -> Store:
    store = opened(folder)
    meta = store.meta
    if meta["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} holds corpus {meta['fingerprint'][:16]} of {canonical_json(meta['corpus'])}, expected "
            f"{fingerprint[:16]} of {canonical_json(config.to_json(corpus))}: move it away and run the same command again"
        )
    _forget(store.folder)  # what a process that was killed after the last write left
    return store
