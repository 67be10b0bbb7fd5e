"""Documents from a folder: .txt (a document a file) and .jsonl (a document a line), each also as .gz and .zst.

Owns the reading of such files and the one-line message for each way in which they can be broken.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from natfp_jax.datasets.builder import TextBuilder
from natfp_jax.errors import UserError

__all__ = ["TextFolder", "jsonl", "lines", "text_of", "whole"]

_SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".zst"))
_SURROGATE = re.compile("[\ud800-\udfff]")  # which UTF-8 cannot hold
_BUFFER = 1 << 20


class TextFolder(TextBuilder):
    """Every .txt and .jsonl file below `path`. The data is named after the files' names, sizes and times of change.

    Raises:
      UserError: there is no such folder, or it holds no such file; on preparing: a file is broken.
    """

    def __init__(self, *, data_dir: str | Path, path: str | Path, text_key: str = "text") -> None:
        self._path, self._text_key = Path(path), text_key
        if not path or not self._path.is_dir():
            raise UserError(f"text folder {str(path)!r} is no folder: set the source's path to one with .txt or .jsonl files")
        self._files = sorted(file for file in self._path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
        if not self._files:
            raise UserError(f"text folder {path} has no file that ends in {', '.join(_SUFFIXES)}: put texts there")
        listing = [text_key]
        for file in self._files:
            status = file.stat()
            listing.append(f"{file.relative_to(self._path).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}")
        digest = hashlib.sha256("\n".join(listing).encode(errors="surrogateescape")).hexdigest()[:32]
        super().__init__(data_dir=data_dir, inputs=digest, description=f"{len(self._files)} text files below {path}")

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields (file or file:line, text)."""
        empty = True
        for file in self._files:
            name = file.relative_to(self._path).as_posix()
            is_jsonl = name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
            for key, text in self._jsonl(name, file) if is_jsonl else [(name, _txt(file))]:
                if text.strip():
                    empty = False
                    yield key, text
        if empty:
            raise UserError(f"text folder {self._path} has files but no text in them: put texts there")

    def _jsonl(self, name: str, file: Path) -> Iterator[tuple[str, str]]:
        for number, record in jsonl(file):
            yield f"{name}:{number}", text_of(record, self._text_key, f"{file}, line {number}", "the source's text_key")


def lines(file: Path) -> Iterator[str]:
    """The lines of a text file, also as .gz and .zst.

    Raises:
      UserError: it cannot be read to its end, or is not UTF-8.
    """
    for number, line in enumerate(_lines(file), 1):
        yield _decoded(line, f"{file}, line {number}")


def jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not empty, and its value.

    Raises:
      UserError: one is not JSON, or the file cannot be read to its end.
    """
    for number, text in enumerate(lines(file), 1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting of thousands of levels
                said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"{file}, line {number} is not JSON ({said}): each line must be one JSON object") from None


def text_of(record: Any, key: str, where: str, setting: str) -> str:
    """The text in a field of a record.

    Args:
      setting: what says which field it is.

    Raises:
      UserError: there is none, or it is no whole text.
    """
    if isinstance(record, dict) and key in record and not isinstance(record[key], str):
        raise UserError(
            f"{where}: no text in field {key!r} (got {json.dumps(record[key], default=str)[:40]}): mend or remove it"
        )
    if not isinstance(record, dict) or key not in record:
        got = f"fields {', '.join(map(_printable, record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no text in field {key!r} (got {got}): set {setting}")
    return whole(record[key], where)


def whole(text: str, where: str) -> str:
    """The text itself.

    Raises:
      UserError: UTF-8 cannot hold it.
    """
    if _SURROGATE.search(text):
        raise UserError(f"{where}: half of a surrogate pair, which UTF-8 cannot hold: mend or remove the line")
    return text


def _printable(text: str) -> str:
    """The text, on one line, as any terminal can show it."""
    return _SURROGATE.sub("\ufffd", " ".join(text.split()))


def _txt(file: Path) -> str:
    return "".join(lines(file))


def _opened(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), _BUFFER)
    return open(file, "rb")


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with _opened(file) as stream:
            yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read to its end ({error}): if it is cut off or damaged, replace it") from None


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte 0x{line[error.start]:02x}): convert the file to UTF-8") from None
