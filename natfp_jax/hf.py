"""Our decoder as Hugging Face's transformers know it: published models become ours, and ours a folder of a Llama model.

Owns the way of values between the two, and what an exported folder says of itself. Must not know runs, arms or studies, and
needs neither transformers nor PyTorch.

Weights are renamed, cut apart and transposed, and nothing else.
"""

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from natfp_jax import config, families, files
from natfp_jax.config import Model
from natfp_jax.errors import UserError
from natfp_jax.families import LLAMA, Decoder, Family, Lies
from natfp_jax.params import Params, Spec, dims, flatten, nest, table
from natfp_jax.published import Folder, read_json
from natfp_jax.tokenizer import EOS, Tokenizer

__all__ = ["Imported", "export", "imported", "tokenizer"]

_TOLD = 8  # names of tensors that are told of


# --- import -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """A published model whose folder has all that our decoder needs; no weights have been read."""

    source: Folder
    family: Family
    decoder: Decoder

    @property
    def model(self) -> Model:
        """Its shape."""
        return self.decoder.model

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
    def _lies(self) -> dict[str, Lies]:
        return {path: self._called(lies) for path, lies in self.family.named(self.model).items()}

    def _called(self, lies: Lies) -> Lies:
        """As it is called in this folder: what was saved without its head has no prefix."""
        short = lies.name.removeprefix(self.family.prefix)
        bare = lies.name.format(0) not in self.source.tensors and short.format(0) in self.source.tensors
        return Lies(short, lies.axes, lies.part) if bare else lies

    @cached_property
    def _size(self) -> dict[str, int]:
        return dims(self.model, self.decoder.vocabulary)

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
        value = lies.ours(self.source.read(name, *read), letters, local)
        for axis, letter in enumerate(letters):
            if letter in rest:
                value = value.take(rest[letter], axis=axis)
        return np.pad(value, [(0, len(one) - len(has)) for one, has in zip(ranges, there, strict=True)])


def imported(source: Folder) -> Imported:
    """Checks a folder: that it is of a family that our decoder can be, and has every tensor, each of its shape, and no other.

    Raises:
      UserError: it is not so.
    """
    try:
        family, decoder = families.decoder(source.config)
    except UserError as error:
        raise UserError(f"{source.folder / 'config.json'}: {error}") from None
    found = Imported(source, family, decoder)
    size, known = dims(decoder.model, decoder.vocabulary), set[str]()
    for path, spec in table(decoder.model, decoder.vocabulary).items():
        lies = found._lies[path]
        for layer in range(decoder.model.layers if spec.dims.startswith("L") else 1):
            name = lies.name.format(layer)
            tensor = source.tensor(name)
            known.add(name)
            if tensor.shape != lies.shape(size):
                raise UserError(
                    f"{tensor.file}: {name} has the shape {list(tensor.shape)}, expected {list(lies.shape(size))} by its "
                    "config.json: get both again"
                )
    # Tied, it is the embedding again.
    idle = {"lm_head.weight", family.parameters["head"].name} if decoder.model.tied else set()
    others = [name for name in sorted(source.tensors) if name not in known | idle and not family.idle.fullmatch(name)]
    if others:
        more = f" and {len(others) - _TOLD} more" if len(others) > _TOLD else ""
        raise UserError(
            f"{source.folder} has tensors that a {source.config['model_type']} of its config.json has not: "
            f"{', '.join(others[:_TOLD])}{more}: the model is another one, and would be computed wrongly"
        )
    return found


def tokenizer(source: Folder, decoder: Decoder) -> Tokenizer:
    """The tokenizer of a folder as one of ours: the same ids, and what begins a text is called EOS.

    It puts nothing around a text and cuts none, and a special token in a text is text, as in ours. Its bytes are the same
    whatever version of its library has written the file.

    Raises:
      UserError: the file is none, what begins a text is no token of its own, or it has more ids than the embedding rows.
    """
    path = source.tokenizer
    try:
        file = _TokenizerFile.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path} is no tokenizer ({place}: {problem['msg']}): get it again") from None
    added = {token.id: token for token in file.added_tokens}
    if decoder.begin not in added:
        raise UserError(f"{path}: the id {decoder.begin}, which begins a text, is no added token: give another folder")
    name = added[decoder.begin].content
    if name != EOS and any(token.content == EOS for token in added.values()):
        raise UserError(f"{path}: {EOS} is not what begins a text there: rename it")
    added[decoder.begin].content = EOS
    for one in {decoder.begin, decoder.end} & added.keys():
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
    if found.size > decoder.vocabulary:
        raise UserError(
            f"{path} has ids up to {found.size - 1}, its embedding {decoder.vocabulary} rows: the two are not of one model"
        )
    if found.eos_id != decoder.begin:
        raise UserError(f"{path}: what begins a text has the id {found.eos_id} there, {decoder.begin} by its config.json")
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


# --- export -----------------------------------------------------------------------------------------------------------


def export(params: Params, model: Model, tokenizer: Tokenizer, context: int, folder: Path, end: int | None = None) -> None:
    """Writes `folder`, whole or not at all: AutoModelForCausalLM and AutoTokenizer of transformers load it.

    Their tokenizer gives our ids, and text never becomes EOS. As ours, it puts nothing in front: for what begins a text,
    `bos_token_id` (EOS) comes before its ids. `generate` draws from the model's own probabilities, as we do by default.

    Args:
      params: of `params.table`, whole on this process; written as float32.
      tokenizer: of the ids that the parameters have rows for; padding ids are left out.
      context: the most tokens that the model is for, prompt and all.
      end: the id at which `generate` stops; None: EOS. A chat template is not written: theirs has other ids at the seams.
      folder: does not exist yet, or is empty.

    Raises:
      UserError: transformers have no such architecture, the folder is not empty, or safetensors is not installed.
      ValueError: the tokenizer is not the one of these parameters.
    """
    if strange := _not_llama(model):
        raise UserError(f"{strange} is not known to transformers' Llama: export another model")
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError("the export needs an extra: pip install 'natfp-jax[hf]'") from None
    end = tokenizer.eos_id if end is None else end
    if (rows := params["embedding"].shape[0]) != tokenizer.padded_size:
        raise ValueError(f"the embedding has {rows} rows, the tokenizer {tokenizer.padded_size} ids with padding")
    folder = folder.resolve()  # a link may lead to an empty folder, but no folder takes a link's place
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: remove it, or give the name of a folder that does not exist or is empty")

    hidden = folder.with_name(f".{folder.name}.tmp")
    weights = hidden / "model.safetensors"
    shutil.rmtree(hidden, ignore_errors=True)  # what an export that was killed has left
    try:
        hidden.mkdir(parents=True)
        for name, value in {
            "config.json": _config(model, tokenizer, context, end),
            "generation_config.json": _generation_config(tokenizer, end),
            "tokenizer.json": _tokenizer_file(tokenizer),
            "tokenizer_config.json": _tokenizer_config(tokenizer, context, end),
        }.items():
            with files.whole_file(hidden / name, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        # transformers 4 read no file that does not name a framework, and know no name for NumPy.
        save_file(_tensors(params, model, tokenizer.size), weights, metadata={"format": "pt"})
        shutil.copymode(hidden / "config.json", weights)  # safetensors lets nobody but the owner read it
        with open(weights, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(hidden, folder)
        files.sync(folder.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _tensors(params: Params, model: Model, vocabulary: int) -> dict[str, np.ndarray]:
    """Their name → array."""
    found = dict[str, np.ndarray]()
    for path, spec in table(model, vocabulary).items():
        lies, value = LLAMA.parameters[path], np.asarray(flatten(params)[path], np.float32)
        if "V" in spec.dims:
            value = value.take(range(vocabulary), axis=spec.dims.index("V"))
        layers = value if spec.dims.startswith("L") else [value]
        found |= {lies.name.format(layer): lies.theirs(one, spec.dims.removeprefix("L")) for layer, one in enumerate(layers)}
    return found


def _not_llama(model: Model) -> str | None:
    """A setting that Llama does not have."""
    shape = {"width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "tied", "context"}
    numbers = {"rope_theta", "rope_scaling", "norm_epsilon", "init_scale", "dtype"}
    biases = Model(biases=model.biases) if model.biases in _BIASES else Model()
    for name, value in vars(model).items():
        if name not in shape | numbers and value != getattr(biases, name):
            return f"model.{name} {value!r}"
    return None


_BIASES = ((), ("qkv", "o"), ("mlp",), ("qkv", "o", "mlp"))  # that it can have


def _config(model: Model, tokenizer: Tokenizer, context: int, end: int) -> dict[str, Any]:
    size = dims(model, tokenizer.size)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size["V"],
        "hidden_size": size["D"],
        "intermediate_size": size["F"],
        "num_hidden_layers": size["L"],
        "num_attention_heads": size["N"],
        "num_key_value_heads": size["K"],
        "head_dim": size["H"],
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        "attention_bias": "qkv" in model.biases,
        "mlp_bias": "mlp" in model.biases,
        **({} if model.rope_scaling is None else {"rope_scaling": _scaling(model.rope_scaling)}),
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": end,
        "torch_dtype": "float32",  # the name that every version reads
    }


def _scaling(given: config.Llama3Rope) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": given.factor,
        "low_freq_factor": given.low,
        "high_freq_factor": given.high,
        "original_max_position_embeddings": given.context,
    }


def _generation_config(tokenizer: Tokenizer, end: int) -> dict[str, Any]:
    eos = tokenizer.eos_id
    # Without `top_k` they would take the 50 most likely ids alone.
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {"bos_token_id": eos, "eos_token_id": end, "pad_token_id": eos, **drawn}


def _tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's own file without what we do not do: cut texts, fill them up, or add ids to them."""
    file: dict[str, Any] = json.loads(tokenizer.file)
    return {**file, "truncation": None, "padding": None, "post_processor": None}


def _tokenizer_config(tokenizer: Tokenizer, context: int, end: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": next((token for token in tokenizer.specials if tokenizer.special(token) == end), EOS),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,  # else decoded text is not what was encoded
        "split_special_tokens": True,  # else "<|eos|>" in a text would end it
    }
