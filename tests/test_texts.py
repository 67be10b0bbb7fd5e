"""The sample store: whole or absent, exact in its types, and readable by others."""

import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from natfp_jax import texts
from natfp_jax.errors import UserError

COLUMNS = {
    "draw": [1, 1, 1],
    "arm": ["init0"] * 3,
    "checkpoint": [16] * 3,
    "prompt_id": [0, 2**63, 2**64 - 1],
    "document_id": ["a1", "a1", "ff"],
    "prompt": ["One upon a", "", "ünï\ncode \N{GRINNING FACE}\0"],
    "text": [" time\N{REPLACEMENT CHARACTER}", "", "x" * 5000],
    "ids": [[5, 0], [0], list(range(3000))],
    "log_probability": [-1.5, -0.25, -1e4],
}
RECORD = {"inputs": {"weights": "abc", "settings": "def"}, "settings": {"top_k": None}, "numerics": {"mesh": {"data": 8}}}
TYPES = {
    "draw": "int32",
    "arm": "string",
    "checkpoint": "int64",
    "prompt_id": "uint64",
    "document_id": "string",
    "prompt": "string",
    "text": "string",
    "ids": "list<element: int32>",
    "log_probability": "float",
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "draws" / "init0.step16.draw1.parquet"
    texts.write(path, COLUMNS, RECORD)
    return path


def test_what_is_written_is_read(path):
    assert texts.read(path).to_pydict() == COLUMNS
    assert texts.read_record(path) == RECORD
    assert texts.read(path, ["ids", "arm"]).column_names == ["ids", "arm"]
    assert list(path.parent.iterdir()) == [path]


def test_the_types_on_disk_are_exact(path):
    """Read without this package's schema."""
    found = pq.ParquetFile(path)
    assert {field.name: str(field.type) for field in found.schema_arrow} == TYPES
    assert found.metadata.row_group(0).column(5).compression == "ZSTD"
    assert json.loads(found.schema_arrow.metadata[b"natfp"]) == RECORD


def test_equal_draws_are_equal_files(path, tmp_path):
    texts.write(tmp_path / "again.parquet", COLUMNS, dict(reversed(RECORD.items())))
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change", [{"ids": [[2**31], [0], [0]]}, {"draw": ["one"] * 3}, {"prompt_id": [-1, 0, 1]}, {"text": [b"\xff"] * 3}]
)
def test_what_does_not_fit_the_types_is_not_written(path, change):
    before = path.read_bytes()
    with pytest.raises((pa.ArrowException, OverflowError, TypeError)):
        texts.write(path, {**COLUMNS, **change}, RECORD)
    assert path.read_bytes() == before


class Killed(BaseException):
    """Passes every handler, as a kill would."""


@pytest.mark.parametrize("there", [False, True])
def test_a_file_is_whole_or_absent(tmp_path, monkeypatch, there):
    path = tmp_path / "draw.parquet"
    if there:
        texts.write(path, COLUMNS, RECORD)
    before = path.read_bytes() if there else None
    write_table = pq.write_table

    def half(table, file, **settings):
        write_table(table.slice(0, 1), file, **settings)
        file.flush()
        raise Killed

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(Killed):
        texts.write(path, {**COLUMNS, "draw": [2, 2, 2]}, RECORD)
    assert (path.read_bytes() if path.exists() else None) == before
    assert list(tmp_path.iterdir()) == [path] * there


KILLED = """
import os, signal, sys
from pathlib import Path
from natfp_jax import files, texts
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], kill)
texts.write(Path(sys.argv[1]), {name: [] for name in texts.SCHEMA.names}, {})
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_real_kill_leaves_no_half_file_under_its_name(tmp_path, moment):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "draw.parquet"), moment], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "draw.parquet").exists()
    texts.write(tmp_path / "draw.parquet", COLUMNS, RECORD)
    assert texts.read(tmp_path / "draw.parquet").to_pydict() == COLUMNS


def test_hugging_face_datasets_loads_equal_values(path, tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded.to_dict() == COLUMNS
    kinds = {name: str(feature.dtype) for name, feature in loaded.features.items() if name != "ids"}
    assert kinds == {name: kind.replace("float", "float32") for name, kind in TYPES.items() if name != "ids"}
    assert loaded.features["ids"].feature.dtype == "int32"


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "head alone", "no parquet", "folder", "missing", "foreign", "foreign record"],
)
@pytest.mark.parametrize("read", [texts.read, texts.read_record])
def test_what_is_no_sample_file_gives_one_line(path, damage, read):
    whole = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "head alone":
            path.write_bytes(whole[:4])
        case "no parquet":
            path.write_bytes(b"draw,arm\n1,init0\n" * 99)
        case "folder":
            path.unlink()
            path.mkdir()
        case "missing":
            path.unlink()
        case "foreign":
            pq.write_table(pa.table({"text": ["a"]}), path)
        case "foreign record":
            pq.write_table(pa.table({"text": ["a"]}).replace_schema_metadata({"natfp": "no JSON"}), path)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "remove it and run the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_one_wrong_bit_is_never_read_as_other_values(path):
    """Parquet has checksums of its pages, and nothing else would notice."""
    whole, refused = path.read_bytes(), 0
    for place in range(4, len(whole) // 2, 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = texts.read(path).to_pydict()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert found == COLUMNS
    assert refused > 10
