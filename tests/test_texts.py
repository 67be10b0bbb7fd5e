"""The sample store: whole or absent, exact in its types, and readable by others."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from natfp_jax import files, texts
from natfp_jax.errors import Damaged, UserError

COLUMNS = {
    "draw": [1, 1, 1],
    "arm": ["init0"] * 3,
    "checkpoint": [16] * 3,
    "temperature": [0.8] * 3,
    "prompt_id": [0, 2**63, 2**64 - 1],
    "document_id": ["a1", "a1", "ff"],
    "prompt": ["One upon a", "", "ünï\ncode \N{GRINNING FACE}\0"],
    "text": [" time\N{REPLACEMENT CHARACTER}", "", "x" * 5000],
    "ids": [[5, 0], [0], list(range(3000))],
    "log_probabilities": [[-1.5, -0.25], [-1e4], [-0.5] * 3000],
}
RECORD = {"inputs": {"weights": "abc", "settings": "def"}, "settings": {"top_k": None}, "numerics": {"mesh": {"data": 8}}}
TYPES = {
    "draw": "int32",
    "arm": "string",
    "checkpoint": "int64",
    "temperature": "double",
    "prompt_id": "uint64",
    "document_id": "string",
    "prompt": "string",
    "text": "string",
    "ids": "list<element: int32>",
    "log_probabilities": "list<element: float>",
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "draws" / "init0.step16.draw1-00000-of-00001.parquet"
    texts.write(path, COLUMNS, RECORD)
    return path


def test_what_is_written_is_read(path):
    assert texts.read(path).to_pydict() == COLUMNS
    assert texts.read_record(path) == RECORD
    assert texts.read(path, ["ids", "arm"]).column_names == ["ids", "arm"]
    assert texts.sealed(path) == path.parent / "init0.step16.draw1-00000-of-00001.manifest.json"
    assert sorted(path.parent.iterdir()) == [texts.sealed(path), path]
    texts.verify(path)


def test_the_types_on_disk_are_exact(path):
    """Read without this package's schema."""
    found = pq.ParquetFile(path)
    assert {field.name: str(field.type) for field in found.schema_arrow} == TYPES
    assert found.metadata.row_group(0).column(5).compression == "ZSTD"
    assert json.loads(found.schema_arrow.metadata[b"natfp"]) == RECORD


def test_equal_draws_are_equal_files(path, tmp_path):
    texts.write(tmp_path / "again.parquet", COLUMNS, dict(reversed(RECORD.items())))
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()
    assert texts.read_record(tmp_path / "again.parquet") == RECORD


@pytest.mark.parametrize(
    "change", [{"ids": [[2**31], [0], [0]]}, {"draw": ["one"] * 3}, {"prompt_id": [-1, 0, 1]}, {"text": [b"\xff"] * 3}]
)
def test_what_does_not_fit_the_types_is_not_written(path, change):
    before = path.read_bytes(), texts.sealed(path).read_bytes()
    with pytest.raises((pa.ArrowException, OverflowError, TypeError)):
        texts.write(path, {**COLUMNS, **change}, RECORD)
    assert (path.read_bytes(), texts.sealed(path).read_bytes()) == before


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
    assert sorted(tmp_path.iterdir()) == [texts.sealed(path), path] * there
    assert texts.exists(path) == there
    if there:
        assert texts.read(path).to_pydict() == COLUMNS


@pytest.mark.parametrize("there", [False, True])
def test_a_file_without_its_own_manifest_is_not_done_or_damaged(tmp_path, monkeypatch, there):
    """Killed between the two: a new draw has none, and one that is written over has that of the old file."""
    path = tmp_path / "draw.parquet"
    if there:
        texts.write(path, COLUMNS, RECORD)

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", killed)
        with pytest.raises(Killed):
            texts.write(path, {**COLUMNS, "draw": [2, 2, 2]}, RECORD)
    assert path.exists()
    assert texts.exists(path) == there
    with pytest.raises(Damaged if there else UserError):
        texts.read(path)
    texts.write(path, COLUMNS, RECORD)
    assert texts.exists(path)
    assert texts.read(path).to_pydict() == COLUMNS


KILLED = """
import os, signal, sys
from pathlib import Path
from natfp_jax import files, texts
moment, number, done = sys.argv[2], int(sys.argv[3]), 0
original = getattr(os, moment)
def kill(*args):
    global done
    done += 1
    if done == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
setattr(os, moment, kill)
texts.write(Path(sys.argv[1]), {name: [] for name in texts.SCHEMA.names}, {})
"""


@pytest.mark.parametrize(("moment", "number"), [("fsync", 1), ("replace", 1), ("fsync", 2), ("fsync", 3), ("replace", 2)])
def test_a_real_kill_leaves_no_half_file_under_its_name(tmp_path, moment, number):
    path = tmp_path / "draw.parquet"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment, str(number)], check=False)
    assert done.returncode == -9
    assert path.exists() == ((moment, number) not in [("fsync", 1), ("replace", 1)])
    assert not texts.sealed(path).exists()
    assert not texts.exists(path)
    texts.write(path, COLUMNS, RECORD)
    assert texts.read(path).to_pydict() == COLUMNS


def test_hugging_face_datasets_loads_equal_values(path, tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert loaded.to_dict() == COLUMNS
    lists = {"ids": "int32", "log_probabilities": "float32"}
    kinds = {name: str(feature.dtype) for name, feature in loaded.features.items() if name not in lists}
    assert kinds == {name: kind.replace("double", "float64") for name, kind in TYPES.items() if name not in lists}
    assert {name: loaded.features[name].feature.dtype for name in lists} == lists


def refused(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "head alone", "no parquet", "folder", "missing", "foreign", "foreign record"],
)
@pytest.mark.parametrize("read", [texts.read, texts.verify])
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
    error = refused(read, path)
    assert isinstance(error, Damaged)
    assert error.path == path
    got = "is missing" if damage in ("folder", "missing") else f"has {path.stat().st_size} bytes"
    assert str(error) == f"{path} is damaged: {path.name} {got}, expected {len(whole)} bytes"


@pytest.mark.parametrize("read", [texts.read, texts.verify, texts.read_record])
def test_a_draw_without_a_manifest_is_none(path, read):
    texts.sealed(path).unlink()
    error = refused(read, path)
    assert not isinstance(error, Damaged)
    assert str(error) == f"{texts.sealed(path)} does not exist"


def test_a_file_that_is_what_was_written_but_no_table_is_damaged(path):
    """A manifest of something else: of a defect, not of a disk."""
    path.write_bytes(b"draw,arm\n1,init0\n" * 99)
    files.write_json(texts.sealed(path), {"record": RECORD, "files": files.manifest(path.parent, [path.name])})
    error = refused(texts.read, path)
    assert isinstance(error, Damaged)
    assert error.path == path
    assert error.why.startswith("cannot be read (")


def test_a_file_with_one_wrong_bit_is_never_read(path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        error = refused(texts.read, path)
        assert isinstance(error, Damaged)
        assert error.path == path
        assert error.why.startswith(f"is damaged: {path.name} has sha256 ")
    path.write_bytes(whole)
    assert texts.read(path).to_pydict() == COLUMNS


def test_a_manifest_with_one_wrong_bit_is_never_read(path):
    whole = texts.sealed(path).read_bytes()
    for place in range(len(whole)):
        texts.sealed(path).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for call in (texts.read, texts.read_record, texts.verify):
            error = refused(call, path)
            assert isinstance(error, Damaged)
            assert error.path == texts.sealed(path)


def test_ragged_columns_hold_the_beginnings_of_rows():
    random = np.random.default_rng(0)
    values_NW, length_N = random.integers(0, 999, (20, 7)).astype(np.int32), random.integers(0, 8, 20)
    found = texts.ragged(values_NW, length_N)
    assert found.to_pylist() == [row[:length].tolist() for row, length in zip(values_NW, length_N, strict=True)]
    np.testing.assert_array_equal(texts.dense(found, 9)[:, :7], np.where(np.arange(7) < length_N[:, None], values_NW, 0))
    assert found.type == texts.SCHEMA.field("ids").type
    assert texts.ragged(values_NW.astype(np.float32), length_N).type == texts.SCHEMA.field("log_probabilities").type


def test_the_digest_is_of_ids_and_where_texts_end(tmp_path):
    def of(rows):
        return texts.digest(pa.array(rows, pa.list_(pa.int32())))

    found = [of(rows) for rows in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]], [[1, 2], [3], []], [])]
    assert len(set(found)) == len(found)
    texts.write(tmp_path / "a.parquet", COLUMNS, RECORD)
    read = texts.read(tmp_path / "a.parquet")["ids"]
    assert texts.digest(read) == of(COLUMNS["ids"])
    assert texts.digest(pa.chunked_array([read.chunk(0).slice(0, 1), read.chunk(0).slice(1)])) == of(COLUMNS["ids"])
