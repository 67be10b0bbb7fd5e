"""The sample store: one Parquet file a part of a draw, and its manifest.

Owns the columns, and the record of what a file was made from. Must not know how texts are drawn or classified.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from natfp_jax import files
from natfp_jax.errors import Damaged

__all__ = ["SCHEMA", "dense", "digest", "exists", "ragged", "read", "read_all", "read_record", "sealed", "verify", "write"]

SCHEMA = pa.schema(
    {
        "draw": pa.int32(),
        "arm": pa.string(),
        "checkpoint": pa.int64(),  # step
        "temperature": pa.float64(),
        "prompt_id": pa.uint64(),
        "document_id": pa.string(),
        "prompt": pa.string(),
        "text": pa.string(),  # the continuation alone
        "ids": pa.list_(pa.int32()),  # of the continuation, EOS included if it was drawn
        "log_probabilities": pa.list_(pa.float32()),  # of each id under the distribution that was drawn from, in nats
    }
)
_KEY = b"natfp"


def ragged(values_NW: np.ndarray, length_N: np.ndarray) -> pa.ListArray:
    """The first so many values of each row, as a column."""
    kept_NW = np.arange(values_NW.shape[1]) < length_N[:, None]
    offsets = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_NW[kept_NW]))


def dense(column: pa.ListArray | pa.ChunkedArray, width: int, fill: int = 0) -> np.ndarray:
    """The inverse of `ragged`: [N, width], `fill` behind a row's end."""
    length_N = pc.list_value_length(column).to_numpy()
    values = pc.list_flatten(column).to_numpy()
    out_NW = np.full((len(length_N), width), fill, values.dtype)
    out_NW[np.arange(width) < length_N[:, None]] = values
    return out_NW


def digest(ids: pa.ListArray | pa.ChunkedArray) -> str:
    """sha256, in hexadecimal, over the lengths and ids of a column."""
    found = hashlib.sha256()
    for part in (pc.list_value_length(ids), pc.list_flatten(ids)):
        found.update(part.to_numpy().astype("<i4", copy=False).tobytes())
    return found.hexdigest()


def sealed(path: Path) -> Path:
    """The manifest of a sample file: it is done once that is there."""
    return path.with_suffix(".manifest.json")


def write(path: Path, columns: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes one file, whole or not at all; `record` is kept in its manifest, and as JSON in the file's own metadata."""
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata({_KEY: json.dumps(record, sort_keys=True)})
    with files.whole_file(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    files.write_json(sealed(path), {"record": record, "files": files.manifest(path.parent, [path.name])})


def exists(path: Path) -> bool:
    """Whether a file is done."""
    return path.exists() and sealed(path).exists()


def read_record(path: Path) -> dict[str, Any]:
    """The record of a file.

    Raises:
      UserError: there is no such file.
      Damaged: its manifest is not what was written.
    """
    record: dict[str, Any] = files.read_remade(sealed(path))["record"]
    return record


def verify(path: Path) -> None:
    """Checks a sample file against its manifest.

    Raises:
      UserError: there is no such file.
      Damaged: it is not what was written.
    """
    try:
        files.verify(path.parent, files.read_remade(sealed(path))["files"])
    except Damaged as damage:
        if damage.path == sealed(path):
            raise
        raise Damaged(path, damage.why) from None


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of a file, in the order of the prompts.

    Raises:
      UserError: there is no such file.
      Damaged: it is not what was written.
    """
    verify(path)
    try:
        with path.open("rb") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(path, f"cannot be read ({' '.join(str(error).split())})") from None


def read_all(some: Sequence[Path], columns: list[str] | None = None) -> pa.Table:
    """The rows of a draw's files, one after another."""
    return pa.concat_tables([read(path, columns) for path in some])
