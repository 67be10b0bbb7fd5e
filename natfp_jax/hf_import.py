"""Published models as ours: from a folder in Hugging Face's layout to parameters and a tokenizer.

Owns the way of values from their tensors to our parameters, and what has to be changed of a tokenizer's file. Must not know
runs, arms or studies, and needs neither transformers nor PyTorch.

Weights are renamed, cut apart and transposed, and nothing else.
"""

import json
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from natfp_jax import families
from natfp_jax.config import Model, problem
from natfp_jax.errors import UserError
from natfp_jax.families import Description, Family, Lies
from natfp_jax.params import Params, Spec, dims, flatten, nest, table
from natfp_jax.published import Folder, read_json
from natfp_jax.tokenizer import EOS, Tokenizer

__all__ = ["Imported", "imported"]

_TOLD = 8  # names of tensors that are told of


@dataclass(frozen=True)
class Imported:
    """A published model whose folder has all that our decoder needs; no weights have been read."""

    folder: Folder
    family: Family
    described: Description

    @property
    def model(self) -> Model:
        """Its shape."""
        return self.described.model

    def params(self, padded: int, shardings: Params | None = None) -> Params:
        """Its parameters, float32, where they are to lie: a process reads no more of a file than its devices are given.

        Args:
          padded: rows of the embedding. Those that it has not are zero; those that it has beyond them are left out.

        Raises:
          UserError: a number is not finite.
        """
        wanted = {} if shardings is None else flatten(shardings)

        def leaf(path: str, spec: Spec) -> jax.Array:
            part = partial(self._part, path, spec)
            if shardings is None:
                return jnp.asarray(part(tuple(slice(0, length) for length in spec.shape)))
            return jax.make_array_from_callback(spec.shape, wanted[path], part)

        return nest({path: leaf(path, spec) for path, spec in table(self.model, padded).items()})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer as one of ours: the same ids, and what begins a text is called EOS.

        It puts nothing around a text and cuts none, and a special token in a text is text, as in ours. Its bytes are the same
        whatever version of its library has written the file.

        Raises:
          UserError: the file is none, what begins a text is no token of its own, or it has more ids than the embedding rows.
        """
        return _tokenizer(self.folder, self.described)

    @cached_property
    def _lies(self) -> dict[str, Lies]:
        return {path: self._called(lies) for path, lies in self.family.named(self.model).items()}

    def _called(self, lies: Lies) -> Lies:
        """As it is called in this folder: what was saved without its head has no prefix."""
        short = lies.name.removeprefix(self.family.prefix)
        bare = lies.name.format(0) not in self.folder.tensors and short.format(0) in self.folder.tensors
        return Lies(short, lies.axes, lies.part) if bare else lies

    @cached_property
    def _size(self) -> dict[str, int]:
        return dims(self.model, self.described.vocabulary)

    def _part(self, path: str, spec: Spec, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one of our parameters."""
        lies, ranges = self._lies[path], [range(*cut.indices(length)) for cut, length in zip(index, spec.shape, strict=True)]
        if not spec.dims.startswith("L"):
            return self._of(lies, lies.name, spec.dims, ranges)
        return np.stack([self._of(lies, lies.name.format(layer), spec.dims[1:], ranges[1:]) for layer in ranges[0]])

    def _of(self, lies: Lies, name: str, letters: str, ranges: list[range]) -> np.ndarray:
        """A part of one tensor, with our axes `letters`: of their rows and columns what it lies in, and of that what it is."""
        size = self._size
        # Rows of the embedding that it has not: they are padding, and zero.
        most = [size[letter] for letter in letters]
        there = [range(min(one.start, length), min(one.stop, length)) for one, length in zip(ranges, most, strict=True)]
        if not all(map(len, there)):
            return np.zeros([len(one) for one in ranges], np.float32)
        cuts = {letter: one for letter, one in zip(letters, there, strict=True) if len(one) < size[letter]}
        local, read, rest = dict(size), list[slice](), dict(cuts)
        for group, whole in zip(lies.axes.split(), lies.shape(size), strict=True):
            if [letter for letter in group if letter in cuts] == [group[0]]:  # the outermost alone: its rows lie together
                one, each = rest.pop(group[0]), whole // size[group[0]]
                read.append(slice(one.start * each, one.stop * each))
                local[group[0]] = len(one)
            else:
                read.append(slice(0, whole))
        value = lies.ours(self.folder.read(name, *read), letters, local)
        for axis, letter in enumerate(letters):
            if letter in rest:
                value = value.take(rest[letter], axis=axis)
        return np.pad(value, [(0, len(one) - len(has)) for one, has in zip(ranges, there, strict=True)])


def imported(folder: Folder) -> Imported:
    """Checks a folder: that it is of a family that our decoder can be, and has every tensor, each of its shape, and no other.

    Raises:
      UserError: it is not so.
    """
    try:
        family, described = families.described(folder.config)
    except UserError as error:
        raise UserError(f"{folder.path / 'config.json'}: {error}") from None
    found = Imported(folder, family, described)
    size, known = dims(described.model, described.vocabulary), set[str]()
    for path, spec in table(described.model, described.vocabulary).items():
        lies = found._lies[path]
        for layer in range(described.model.layers if spec.dims.startswith("L") else 1):
            name = lies.name.format(layer)
            tensor = folder.tensor(name)
            known.add(name)
            if tensor.shape != lies.shape(size):
                raise UserError(
                    f"{tensor.file}: {name} has the shape {list(tensor.shape)}, expected {list(lies.shape(size))} by its "
                    "config.json: get both again"
                )
    # Tied, it is the embedding again.
    idle = {"lm_head.weight", family.parameters["head"].name} if described.model.tied else set()
    others = [name for name in sorted(folder.tensors) if name not in known | idle and not family.idle.fullmatch(name)]
    if others:
        more = f" and {len(others) - _TOLD} more" if len(others) > _TOLD else ""
        raise UserError(
            f"{folder.path} has tensors that a {folder.config['model_type']} of its config.json has not: "
            f"{', '.join(others[:_TOLD])}{more}: the model is another one, and would be computed wrongly"
        )
    return found


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _tokenizer(folder: Folder, described: Description) -> Tokenizer:
    path = folder.tokenizer
    try:
        file = _TokenizerFile.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        raise UserError(f"{path} is no tokenizer ({problem(error)}): get it again") from None
    added = {token.id: token for token in file.added_tokens}
    if described.begin not in added:
        raise UserError(f"{path}: the id {described.begin}, which begins a text, is no added token: give another folder")
    name = added[described.begin].content
    if name != EOS and any(token.content == EOS for token in added.values()):
        raise UserError(f"{path}: {EOS} is not what begins a text there: rename it")
    added[described.begin].content = EOS
    for one in {described.begin, described.end} & added.keys():
        added[one].special = True  # else they would stand in texts
    model = file.model
    if isinstance(model.vocab, dict):
        model.vocab = {EOS if entry == name else entry: number for entry, number in model.vocab.items()}
    else:
        model.vocab = [(EOS if entry == name else entry, score) for entry, score in model.vocab]
    if model.merges is not None:  # older versions wrote pairs as one text
        model.merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.merges]
    plain = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    try:
        written = json.dumps({**file.model_dump(), **plain}, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} is no tokenizer ({error}): get it again") from None
    found = Tokenizer.read(written, path)
    if found.size > described.vocabulary:
        raise UserError(
            f"{path} has ids up to {found.size - 1}, its embedding {described.vocabulary} rows: the two are not of one model"
        )
    if found.eos_id != described.begin:
        raise UserError(f"{path}: what begins a text has the id {found.eos_id} there, {described.begin} by its config.json")
    return found


class _Added(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    id: int
    content: str
    special: bool = False


class _TokenizerModel(pydantic.BaseModel):
    """With what some versions leave out where it is so, since other versions write it."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    vocab: dict[str, int] | list[tuple[str, float]]
    merges: list[str | list[str]] | None = None
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _TokenizerFile(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    added_tokens: list[_Added]
    model: _TokenizerModel
