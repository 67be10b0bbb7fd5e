"""Labelled texts from elsewhere, and how they are put side by side.

Owns which columns of a file are read, and which texts are compared with which: at one prompt where prompts are known, else
document by document. Must not know classifiers, tokenizers or p-values; no result depends on the order of the texts.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from natfp_jax.errors import UserError
from natfp_jax.files import hash_file
from natfp_jax.records import rows, text_of, whole

__all__ = ["SUFFIXES", "Columns", "Labelled", "Matched", "matched", "read"]

SUFFIXES = (".parquet", ".jsonl", ".csv")
MOST = 100  # texts of a class at one prompt: the exact law of many more takes long, and what counts is prompts


@dataclass(frozen=True)
class Columns:
    """The names of the columns; prompts and documents may be missing."""

    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    document: str = "document_id"


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts and what is known of each.

    Attributes:
      texts: not empty as a list; a text may be.
      labels: the source of each.
      prompts: what each continues; None: not known.
      documents: what the prompt of each is a piece of, or what each is a part of; None: not known.
      sha256: of the file.
    """

    texts: list[str]
    labels: list[str]
    prompts: list[str] | None
    documents: list[str] | None
    sha256: str

    def part(self, index: Sequence[int]) -> "Labelled":
        """Some of them."""

        def some(column: list[str] | None) -> list[str] | None:
            return None if column is None else [column[n] for n in index]

        texts, labels = [self.texts[n] for n in index], [self.labels[n] for n in index]
        return Labelled(texts, labels, some(self.prompts), some(self.documents), self.sha256)


def read(path: Path, columns: Columns) -> Labelled:
    """The texts of a .parquet, .jsonl or .csv file, such as a draw of ours with `label="arm"`.

    Raises:
      UserError: it has no such columns, no texts, or a text lacks what others have.
    """
    if not path.is_file() or path.suffix not in SUFFIXES:
        got = "is no file" if not path.is_file() else f"ends in none of {', '.join(SUFFIXES)}"
        raise UserError(f"--texts {path} {got}: give a file of texts and labels")
    texts, labels = list[str](), list[str]()
    more: dict[str, list[str]] = {name: [] for name in dict.fromkeys((columns.prompt, columns.document)) if name}
    for where, record in rows(path, {columns.text: "--text-key", columns.label: "--label-key"}, list(more)):
        texts.append(text_of(record, columns.text, where, "--text-key"))
        labels.append(_name(record, columns.label, where))
        for name, values in more.items():
            if name in record:
                values.append(_name(record, name, where))
            if len(values) not in (0, len(texts)):
                raise UserError(
                    f"{where}: other texts have a field {name!r} and this one has not, or the reverse: mend the file"
                )
    if not texts:
        raise UserError(f"{path} has no texts: put some there")
    usual = Columns()
    for name, key, option in (
        (columns.prompt, usual.prompt, "--prompt-key"),
        (columns.document, usual.document, "--document-key"),
    ):
        if name not in ("", key) and not more[name]:  # it was asked for
            raise UserError(f"{path} has no column {name!r}: set {option}, or leave it out where there is none")
    return Labelled(texts, labels, more.get(columns.prompt) or None, more.get(columns.document) or None, hash_file(path))


def _name(record: dict[str, Any], key: str, where: str) -> str:
    """A label, a prompt or a document: text, or a number that stands for it."""
    if key not in record:
        raise UserError(f"{where}: no field {key!r} (got fields {', '.join(map(repr, record))}): set --label-key")
    value = record[key]
    if not isinstance(value, str | int):
        raise UserError(f"{where}: field {key!r} is {value!r}, expected a text or a whole number: mend or remove it")
    return whole(str(value), where)


@dataclass(frozen=True, eq=False)
class Matched:
    """The texts that are compared: at every prompt each class has equally many.

    Attributes:
      index: which of the labelled texts they are.
      prompts: of each, the prompt that it continues, or the match that stands for one.
      documents: of each, the cluster that lies in one part of the split: texts of two clusters share neither prompt,
        document nor wording.
      whole: texts of one class at a prompt are of one document, or may be: their labels go together.
      notes: what a reader must know of it.
    """

    index: list[int]
    prompts: list[str]
    documents: list[str]
    whole: bool
    notes: list[str]


def matched(found: Labelled) -> Matched:
    """Puts the texts of the classes side by side, equally many of each, so that chance is 1/K whatever is guessed.

    With prompts: at each prompt every class keeps as many texts as the class with fewest has there. Without prompts, where
    documents have texts of several classes, these take the place of prompts if
    that keeps more texts.

    Else texts are not paired, and whole documents are: every class keeps as many documents as the class with fewest, and
    they are matched at random, one of each class, with equally many texts. If labels mean nothing, contents are exchangeable
    between documents whatever the match, so labels permuted within a match give an exact test. A text without a document
    is one, together with equal texts of its class.

    All choices and matches are by hashes of texts and documents: no content of a text speaks in them.

    Raises:
      UserError: there are fewer than two classes, or nothing can be compared.
    """
    classes = sorted(set(found.labels))
    if len(classes) < 2:
        raise UserError(f"the texts have the labels {classes}, expected two or more: give texts of another source too")
    notes = []
    if found.prompts is None:
        notes.append("no prompt column: if labels differ in prompts, the prompt may be what is recognised")
    if found.documents is None:
        of = "text" if found.prompts is None else "prompt"
        notes.append(f"no document column: every {of} counts as a document of its own")
    stripped = [text.strip() for text in found.texts]
    named = stripped if found.documents is None else found.documents
    if found.prompts is not None:
        kept = _equal(_nested(found.prompts, found.labels), classes, found.texts)
    else:
        each, places = _nested(found.labels, named), dict[str, dict[str, list[int]]]()
        for match in zip(*(sorted(each[label], key=_hash) for label in classes), strict=False):
            rows_of = {label: each[label][one] for label, one in zip(classes, match, strict=True)}
            places[_hash("\0".join(match))[:16]] = rows_of
        kept = _equal(places, classes, found.texts)
        if found.documents is not None:
            within = _equal(_nested(found.documents, found.labels), classes, found.texts)
            kept = max(within, kept, key=len)
    if not kept:
        raise UserError(
            "no prompt has texts of every label, so that the prompt may be what is recognised: give texts of all labels at the "
            "same prompts, or --prompt-key '' --document-key '' to compare them in spite of it"
        )
    index, prompts = [n for n, _ in kept], [place for _, place in kept]
    if left := len(found.texts) - len(kept):
        notes.append(f"{left} of {len(found.texts)} texts are left out, so that every label has equally many to compare")
    keys: list[Sequence[Hashable]] = [prompts]
    if found.documents is not None:
        keys.append([found.documents[n] for n in index])
    apart = len(set(_clusters(keys)))
    # A text without words tells nothing that could be remembered.
    documents = _clusters([*keys, [stripped[n] or n for n in index]])
    if merged := apart - len(set(documents)):
        notes.append(
            f"equal texts stand in several documents: {merged} of {apart} are counted with another, on one side of the split"
        )
    several = len(prompts) > len(classes) * len(set(prompts))
    # Several texts of one label at a prompt are draws of their own, unless they are what one document has of it. A document
    # with texts of other labels is what the prompt is from.
    labels_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for n, prompt in zip(index, prompts, strict=True):
        labels_of[prompt, named[n]].add(found.labels[n])
    own = found.documents is not None and any(len(some) == 1 for some in labels_of.values())
    alike = found.prompts is None or own
    return Matched(index, prompts, documents, several and alike, notes)


def _equal(places: dict[str, dict[str, list[int]]], classes: list[str], texts: list[str]) -> list[tuple[int, str]]:
    """Rows with their prompts, at each prompt equally many of every class: those that come first by a hash of their text."""

    def order(n: int) -> str:
        return _hash(texts[n])

    kept = list[tuple[int, str]]()
    for name, some in places.items():
        fewest = min(MOST, *(len(some.get(label, ())) for label in classes))
        kept += [(n, name) for label in classes for n in sorted(some.get(label, ()), key=order)[:fewest]]
    return sorted(kept)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _nested(outer: Sequence[str], inner: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, (one, other) in enumerate(zip(outer, inner, strict=True)):
        found[one][other].append(n)
    return found


def _clusters(keys: Sequence[Sequence[Hashable]]) -> list[str]:
    """What texts share a key with, directly or by others in between; named by the first of its names in `keys[0]`."""
    count, numbers = len(keys[0]), dict[tuple[int, Hashable], int]()
    columns = [numbers.setdefault((kind, key), len(numbers)) for kind, values in enumerate(keys) for key in values]
    rows_ = np.tile(np.arange(count), len(keys))
    size = count + len(numbers)
    graph = sparse.coo_array((np.ones(len(rows_)), (rows_, count + np.array(columns))), shape=(size, size))
    _, label_N = connected_components(graph, directed=False)
    first = dict[int, str]()
    for label, name in zip(label_N[:count].tolist(), map(str, keys[0]), strict=True):
        first[label] = min(first.get(label, name), name)
    return [first[label] for label in label_N[:count].tolist()]
