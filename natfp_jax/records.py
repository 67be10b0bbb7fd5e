"""Texts and records of files: .txt, .jsonl, .csv and .parquet, the first two also as .gz and .zst.

Owns the reading of such files and the one-line message for each way in which they can be broken. Must not know what the
records are for.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from natfp_jax.errors import UserError

__all__ = ["TOGETHER", "got", "jsonl", "lines", "rows", "text_of", "whole"]

TOGETHER = 10_000  # rows that are read at once
_SURROGATE = re.compile("[\ud800-\udfff]")  # which UTF-8 cannot hold
_BUFFER = 1 << 20


def rows(path: Path, required: Mapping[str, str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Each record of a .jsonl, .csv or .parquet file, and the place that a message calls it by.

    Args:
      path: of a file with one of these endings.
      required: the name of each column that a table must have → what sets that name.
      optional: further columns to read where there are any. A line of .jsonl is given whole, and whether it has its
        fields is for the caller to see.

    Raises:
      UserError: a column is missing, or the file cannot be read to its end.
    """
    if path.suffix == ".jsonl":
        for number, record in jsonl(path):
            yield f"{path}, line {number}", record
        return
    number = 0
    try:
        for batch in _batches(path, required, optional):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "CSV file in UTF-8" if path.suffix == ".csv" else "Parquet file"
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): give a whole {kind}") from None


def _batches(path: Path, required: Mapping[str, str], optional: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    wanted = list(dict.fromkeys([*required, *optional]))
    if path.suffix == ".csv":
        # A first reading for the names alone: what a column is read as must be said before the second.
        with pyarrow.csv.open_csv(path) as file:
            columns = _chosen(path, file.schema.names, wanted, required)
        types = dict.fromkeys(columns, pyarrow.string())  # "007" is a label, and no number
        conversion = pyarrow.csv.ConvertOptions(column_types=types, include_columns=columns, strings_can_be_null=False)
        parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
        with pyarrow.csv.open_csv(path, parse_options=parsing, convert_options=conversion) as file:
            yield from file
    else:
        table = pyarrow.parquet.ParquetFile(path)
        yield from table.iter_batches(TOGETHER, columns=_chosen(path, table.schema_arrow.names, wanted, required))


def _chosen(path: Path, names: Sequence[str], wanted: Sequence[str], required: Mapping[str, str]) -> list[str]:
    for name, setting in required.items():
        if name not in names:
            raise UserError(
                f"{path} has no column {name!r}, its columns are {', '.join(map(_printable, names))}: set {setting}"
            )
    return [name for name in wanted if name in names]


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
        raise UserError(f"{where}: no text in field {key!r} (got {got(record)}): set {setting}")
    return whole(record[key], where)


def got(record: Any) -> str:
    """What a record is instead of what was expected, on one line: its fields, or its type where it has none."""
    return f"fields {', '.join(map(_printable, record)) or 'none'}" if isinstance(record, dict) else type(record).__name__


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
