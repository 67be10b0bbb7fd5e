"""Text to ids and back.

Owns the byte-level BPE: its training, its file, the end-of-document token, and the promise that text of a document never
becomes a special token; what a template writes may. Must not know where text comes from or what a model does with ids.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from natfp_jax.errors import UserError
from natfp_jax.files import whole_file

__all__ = ["EOS", "Tokenizer", "padded"]

EOS = "<|eos|>"  # ends every document, comes before every prompt

_SMALLEST = 257  # one entry for each byte, and EOS

# Unset, the library warns on stderr at every later fork, also at those that never encode.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def padded(size: int) -> int:
    """So many ids rounded up to a multiple of 128."""
    return -(-size // 128) * 128


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer in the form of its file, so that its hash depends neither on the library's version nor on the machine."""

    file: bytes = field(repr=False)  # the contents of tokenizer.json

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        model = self._loaded()
        model.encode_special_tokens = True  # not saved in the file: without it, "<|eos|>" in a document would end it
        return model

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        return self._loaded()

    def _loaded(self) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self.file.decode())
        model.no_truncation()
        model.no_padding()
        return model

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.file,)  # pickling the model would lose what its file does not hold

    @functools.cached_property
    def eos_id(self) -> int:
        """The id of `EOS`."""
        return self._model.get_vocab(with_added_tokens=True)[EOS]

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._model.get_vocab(with_added_tokens=True).values())

    @property
    def padded_size(self) -> int:
        """`size` rounded up to a multiple of 128; ids from `size` on are padding and never occur."""
        return padded(self.size)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the file's bytes."""
        return hashlib.sha256(self.file).hexdigest()

    @property
    def specials(self) -> list[str]:
        """Its special tokens, by their ids."""
        added = self._model.get_added_tokens_decoder()
        return [added[one].content for one in sorted(added) if added[one].special]

    def special(self, token: str) -> int | None:
        """The id of a special token; None: it is none."""
        return self._model.token_to_id(token) if token in self.specials else None

    def encode_form(self, text: str) -> list[int]:
        """The ids of a text of the program's own, in which special tokens are what they are; never for a document."""
        return list(self._with_specials.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of `texts`, without EOS, on all cores."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD, special and padding ids contribute nothing."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def continued(self, prompts: Sequence[Sequence[int]], several: Sequence[Sequence[int]]) -> list[str]:
        """The text that each of `several` adds to its prompt: alone some tokenizers would leave out the space it begins with.

        Where the end of the prompt reads otherwise with what follows, as of broken UTF-8 it may, it is the text alone.
        """
        before, alone = self.decode_batch(prompts), self.decode_batch(several)
        whole = self.decode_batch([[*prompt, *ids] for prompt, ids in zip(prompts, several, strict=True)])
        found = zip(before, whole, alone, strict=True)
        return [text[len(begun) :] if text.startswith(begun) else own for begun, text, own in found]

    def decode_batch(self, several: Sequence[Sequence[int]]) -> list[str]:
        """The text of each of `several`, on all cores."""
        return list(self._model.decode_batch(list(several), skip_special_tokens=True))

    @classmethod
    def train(cls, texts: Iterator[str], size: int) -> "Tokenizer":
        """A byte-level BPE of at most `size` entries (fewer where `texts` has too few pairs to merge); EOS has id 0.

        Raises:
          UserError: `size` has no room for the bytes.
        """
        if size < _SMALLEST:
            raise UserError(f"vocabulary {size} is too small: a byte-level BPE needs at least {_SMALLEST} entries")
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer=trainer)
        return cls(model.to_str().encode())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
          UserError: there is no such file, it is no tokenizer, or EOS is not among its special tokens.
        """
        try:
            return cls.read(path.read_bytes(), path)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): give the path of a tokenizer.json") from None

    @classmethod
    def read(cls, file: bytes, path: Path) -> "Tokenizer":
        """The tokenizer of a file's contents.

        Args:
          path: where they are from.

        Raises:
          UserError: they are no tokenizer, or EOS is not among its special tokens.
        """
        tokenizer = cls(file)
        try:
            model = tokenizer._model
        except BaseException as error:  # the library raises bare Exceptions, and panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is no tokenizer ({reason}): give a tokenizer.json of Hugging Face tokenizers") from None
        if not any(token.special and token.content == EOS for token in model.get_added_tokens_decoder().values()):
            raise UserError(f"{path} has no special token {EOS!r}: add it with tokenizers' add_special_tokens and save again")
        return tokenizer

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json, whole or not at all."""
        with whole_file(path) as file:
            file.write(self.file)
