"""Texts that show how a piece is used.

Owns which texts of a class are shown for a piece, and how much of them. Nothing is drawn: which texts these are depends on the
texts alone, not on their order. Must not know why a piece is shown.

Letters after an underscore name the axes: N texts.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from natfp_jax import classify
from natfp_jax.classify import Features

__all__ = ["Example", "Examples"]

SHOWN = 3  # texts for each piece
AROUND = 30  # characters of a text on each side of the piece


@dataclass(frozen=True)
class Example:
    """A piece in a text, and what stands next to it."""

    before: str
    piece: str
    after: str


class Examples:
    """Texts with their classes, to take examples from.

    Args:
      features: the counts of the study's texts.
      rows_N: which of these texts examples are taken from.
      prompts_N: the prompt of each of those.
      labels_N: the class of each.
    """

    def __init__(
        self,
        features: Features,
        rows_N: NDArray[np.integer],
        prompts_N: NDArray[np.str_],
        labels_N: NDArray[np.str_],
    ) -> None:
        self.features, self.labels_N = features, labels_N
        self.texts = [features.texts[row] for row in rows_N]
        self.columns = features.counts_NV[rows_N].tocsc()
        # Places on a circle, by what a text is.
        named = zip(prompts_N.tolist(), self.texts, strict=True)
        self.places_N = np.array([_place(f"{prompt}/{text}") for prompt, text in named], dtype=np.uint64)

    def of(self, piece: int, label: str) -> list[Example]:
        """Some texts of a class that have a piece, a column of the features; none where no text has it."""
        having = self.columns.indices[slice(*self.columns.indptr[piece : piece + 2])]
        having = having[self.labels_N[having] == label]
        (name,) = self.features.names(np.array([piece]))
        # From the piece's own place on, or frequent pieces would all show the same texts.
        order = np.argsort(self.places_N[having] - np.uint64(_place(name)), kind="stable")[:SHOWN]
        return [self._shortened(self.texts[n], name) for n in having[order]]

    def _shortened(self, text: str, piece: str) -> Example:
        if self.features.kind == "words":
            start, end = next(found.span() for found in re.finditer(classify.WORD, text) if found.group() == piece)
            before, after = text[:start], text[end:]
        else:
            tokenizer = self.features.tokenizer
            ids = list(tokenizer.encode_batch([text])[0])
            place = next(i for i, one in enumerate(ids) if classify.shown([one], tokenizer) == piece)
            before, after = tokenizer.decode(ids[:place]), tokenizer.decode(ids[place + 1 :])
        return Example(
            before if len(before) <= AROUND else "…" + before[-AROUND:],
            piece,
            after if len(after) <= AROUND else after[:AROUND] + "…",
        )


def _place(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
