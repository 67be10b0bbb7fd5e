"""Files: whole or absent, and what was written or refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natfp_jax import files
from natfp_jax.errors import Damaged, UserError

VALUE = {"name": "ñ", "number": 0.1 + 0.2, "list": [1, None, {"deep": True}], "empty": {}}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "value.json"
    files.write_json(path, VALUE)
    return path


def test_what_is_written_is_read_and_other_programs_can_read_it(sealed):
    assert files.read_json(sealed) == VALUE
    others = json.loads(sealed.read_text(encoding="utf-8"))
    assert others.pop("sha256") == files.hash_json(VALUE)
    assert others == VALUE


@settings(max_examples=300)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(sealed, place, bit):
    data = bytearray(sealed.read_bytes())
    data[place % len(data)] ^= 1 << bit
    other = sealed.with_name("flipped.json")
    other.write_bytes(data)
    with pytest.raises(Damaged) as caught:
        files.read_remade(other)
    assert caught.value.path == other
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="remove it and run the same command again"):
        files.read_json(other)


def test_any_truncation_and_any_longer_file_is_found(sealed):
    data, other = sealed.read_bytes(), sealed.with_name("cut.json")
    for length in range(len(data)):
        other.write_bytes(data[:length])
        with pytest.raises(Damaged):
            files.read_remade(other)
    other.write_bytes(data + b"\n")
    with pytest.raises(Damaged):
        files.read_remade(other)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"a": 1}', '{"a": 1, "sha256": "00"}'])
def test_json_of_others_is_not_taken(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(Damaged):
        files.read_remade(tmp_path / "other.json")


def test_a_missing_file_is_no_damage(tmp_path):
    with pytest.raises(UserError) as caught:
        files.read_remade(tmp_path / "none.json")
    assert not isinstance(caught.value, Damaged)


def test_the_name_of_the_seal_is_its_own(tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        files.write_json(tmp_path / "a.json", {"sha256": 1})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    for name, data in (("a", b"1234"), ("deep/b", b"5" * 5000), ("deep/er/c", b"")):
        (tmp_path / "held" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "held" / name).write_bytes(data)
    return tmp_path / "held"


def test_a_manifest_lists_every_file(folder):
    listed = files.manifest(folder)
    assert list(listed) == ["a", "deep/b", "deep/er/c"]
    assert [entry["bytes"] for entry in listed.values()] == [4, 5000, 0]
    assert listed["a"]["sha256"] == files.hash_file(folder / "a")
    (folder / files.MANIFEST).write_text("not listed in itself")
    assert files.manifest(folder) == listed
    files.verify(folder, listed, whole=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "a").write_bytes(b"1235"), "a has sha256"),
        (lambda folder: (folder / "a").write_bytes(b"123"), "a has 3 bytes, expected 4"),
        (lambda folder: (folder / "a").write_bytes(b"12345"), "a has 5 bytes, expected 4"),
        (lambda folder: (folder / "deep" / "er" / "c").unlink(), "deep/er/c is missing"),
        (lambda folder: (folder / "deep" / "new").write_bytes(b""), "deep/new is not in its manifest"),
    ],
)
def test_what_is_not_as_listed_is_named(folder, change, named):
    listed = files.manifest(folder)
    change(folder)
    with pytest.raises(Damaged, match=named) as caught:
        files.verify(folder, listed, whole=True)
    assert caught.value.path == folder


def test_what_is_set_aside_is_kept_whole_under_another_name(folder):
    asides = []
    for number in range(3):
        (folder / "a").write_bytes(bytes([number]))
        asides.append(files.set_aside(folder / "a"))
    assert not (folder / "a").exists()
    assert [aside.read_bytes() for aside in asides] == [b"\0", b"\1", b"\2"]
    assert files.set_aside(folder).joinpath("deep", "b").read_bytes() == b"5" * 5000
