"""A folder of a published model, in Hugging Face's layout, read without trust in it.

Owns where such a folder is had from, what has to be in it, and that nothing of it is run or unpickled, and no name in it leads
out of it (links do: the hub's cache is made of them). Must not know what a tensor is for.

    config.json                                  what the model is
    model.safetensors                            its tensors, or
    model.safetensors.index.json and its shards  which shard has which
    tokenizer.json                               where texts are to be read or written
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax.errors import UserError
from natfp_jax.files import hash_file

__all__ = ["HUB", "Folder", "Tensor", "located", "opened", "read_json"]

HUB = "hf://"  # before OWNER/NAME, or OWNER/NAME@REVISION
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = [CONFIG, TOKENIZER, "model*.safetensors", _INDEX]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_MOST = 1 << 28  # bytes of a JSON file
_NUMBERS = {"F64", "F32", "F16", "BF16"}
_ON_THE_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def located(place: str) -> Path:
    """The folder of a model: one of this machine, or of the hub, brought here if it is not yet.

    Raises:
      UserError: the name is none, or the hub does not give it.
    """
    if not place.startswith(HUB):
        return Path(place)
    named = _ON_THE_HUB.fullmatch(place.removeprefix(HUB))
    if named is None:
        raise UserError(f"{place} is no name of the hub: give {HUB}OWNER/NAME, with @REVISION for a branch, tag or commit")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{place}: the hub needs an extra: pip install 'natfp-jax[hf]'") from None
    try:
        return Path(snapshot_download(named[1], revision=named[2], allow_patterns=_WANTED))
    except Exception as error:  # of its own, of its transport, of the network
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"{place} could not be brought here ({type(error).__name__}: {said}): give a local folder, or try again"
        ) from None


@dataclass(frozen=True)
class Tensor:
    """One tensor as its file announces it."""

    file: Path
    shape: tuple[int, ...]
    kind: str  # as safetensors call it, such as "BF16"


@dataclass(frozen=True)
class Folder:
    """A folder that has been looked through; no tensor has been read."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A tensor, or of its first dimensions these parts, as float32; no other part of the file is read.

        Raises:
          UserError: it is not there, is of no floating point numbers, or holds one that is not finite.
        """
        tensor = self.tensor(name)
        if tensor.kind not in _NUMBERS:
            raise UserError(f"{tensor.file}: {name} is of {tensor.kind}, expected one of {', '.join(sorted(_NUMBERS))}")
        with _open(tensor.file) as file:
            whole = index + (slice(None),) * (len(tensor.shape) - len(index))
            found = file.get_slice(name)[whole] if tensor.shape else file.get_tensor(name)
        value = np.asarray(found).astype(np.float32)
        if not np.isfinite(value).all():
            count = int(np.size(value) - np.isfinite(value).sum())
            raise UserError(
                f"{tensor.file}: {name} holds {count} numbers that are not finite: the file is damaged, get it again"
            )
        return value

    def tensor(self, name: str) -> Tensor:
        """What is announced of one.

        Raises:
          UserError: it is not there.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {name!r}: it is not whole, or another model than its {CONFIG} says")
        return self.tensors[name]

    @property
    def tokenizer(self) -> Path:
        """The path of its tokenizer.

        Raises:
          UserError: it has none.
        """
        path = self.path / TOKENIZER
        if not path.is_file():
            raise UserError(f"{self.path} has no {TOKENIZER}: save its tokenizer as a fast one there (save_pretrained)")
        return path

    @cached_property
    def identity(self) -> dict[str, str]:
        """File → sha256 of what it is read from: its description, its weights, its tokenizer."""
        paths = {self.path / CONFIG, *(tensor.file for tensor in self.tensors.values())}
        paths |= {path for path in (self.path / TOKENIZER,) if path.is_file()}
        return {path.name: hash_file(path) for path in sorted(paths)}


def opened(folder: Path) -> Folder:
    """Looks through a folder.

    Raises:
      UserError: it is none, lacks a file, or one of its files is not what it has to be.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one in Hugging Face's layout, or {HUB}OWNER/NAME")
    return Folder(folder, read_json(folder / CONFIG), _tensors(folder))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of such a folder.

    Raises:
      UserError: the file is missing, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: give a folder in Hugging Face's layout")
    if (size := path.stat().st_size) > _MOST:
        raise UserError(f"{path} has {size} bytes, expected at most {_MOST}: it is no description of a model")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({' '.join(str(error).split())[:120]}): get it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, expected a JSON object: get it again")
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / _WEIGHTS).is_file():
        return _announced(folder / _WEIGHTS)
    if not (folder / _INDEX).is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        instead = f", only {pickled[0]}, which is not opened, since it could run anything" if pickled else ""
        raise UserError(f"{folder} has no {_WEIGHTS}{instead}: give a folder with safetensors weights")
    named = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{folder / _INDEX} has no weight_map of names and files: get it again")
    shards = dict[str, dict[str, Tensor]]()
    for name in sorted(set(named.values())):
        # A name that leads elsewhere could have any file of this machine read and published in a result.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{folder / _INDEX} names the file {name!r}, expected one of the same folder that ends in .safetensors"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks the file {name} that its {_INDEX} names: get it, or the whole folder again")
        shards[name] = _announced(folder / name)
    found = {}
    for tensor, name in named.items():
        if tensor not in shards[name]:
            raise UserError(f"{folder / name} has no tensor {tensor!r}, which {_INDEX} says it has: get both again")
        found[tensor] = shards[name][tensor]
    return found


def _announced(path: Path) -> dict[str, Tensor]:
    with _open(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Tensor(path, tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}


def _open(path: Path) -> Any:
    """safetensors' own reader, which checks that the header is one and that the file is as long as it says."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("published models need an extra: pip install 'natfp-jax[hf]'") from None
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no whole safetensors file ({said}): get it again") from None
