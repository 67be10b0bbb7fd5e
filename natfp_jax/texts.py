"""The sample store: one Parquet file a draw.

Owns the columns, and the record of what a draw was made from. Must not know how texts are drawn or classified.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from natfp_jax import files
from natfp_jax.errors import UserError

__all__ = ["SCHEMA", "read", "read_record", "write"]

SCHEMA = pa.schema(
    {
        "draw": pa.int32(),
        "arm": pa.string(),
        "checkpoint": pa.int64(),  # step
        "prompt_id": pa.uint64(),
        "document_id": pa.string(),
        "prompt": pa.string(),
        "text": pa.string(),  # the continuation alone
        "ids": pa.list_(pa.int32()),  # of the continuation, EOS included if it was drawn
        "log_probability": pa.float32(),  # of the ids under the distribution that was drawn from, in nats
    }
)
_KEY = b"natfp"


def write(path: Path, columns: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes one draw, whole or not at all; `record` is kept as JSON in the file's metadata."""
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata({_KEY: json.dumps(record, sort_keys=True)})
    with files.whole_file(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a draw.

    Raises:
      UserError: the file is no sample file.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        record: dict[str, Any] = json.loads(metadata[_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} is no sample file of natfp ({why}): remove it and run the same command again") from None
    return record


def read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of a draw, in the order of its prompts.

    Raises:
      UserError: the file is no sample file.
    """
    read_record(path)
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())  # Arrow writes several lines
        raise UserError(f"{path} cannot be read ({why}): remove it and run the same command again") from None
