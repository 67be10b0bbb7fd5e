import gzip
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
from collections import Counter

import numpy as np
import pyarrow
import pytest

from natfp_jax.config import Stories, TextFolder
from natfp_jax.datasets import stories
from natfp_jax.datasets.grammar import Grammar
from natfp_jax.datasets.machine import Machine
from natfp_jax.datasets.machine_docs import MachineDocs
from natfp_jax.documents import find
from natfp_jax.errors import UserError
from natfp_jax.progress import Progress


def read(source, data_dir):
    found = find(source, data_dir, Progress(quiet=True))
    documents = found.documents(Progress(quiet=True))
    return [documents[index] for index in range(len(documents))]


# --- stories ----------------------------------------------------------------------------------------------------------


def test_a_story_is_fixed():
    assert stories.story(0, 0) == (
        "One sunny evening Vera the cat lost a red basket. "
        '"Will you help me to find it?" she asked Otto the bear. "With pleasure," said Otto. '
        "They looked behind the barn, but the basket was not there. "
        "At last Otto saw something red near the mill: it was the basket! "
        "Vera was tired and said thank you. It never got lost again."
    )
    # One evenly drawn choice has the logarithm of its options, one of halving weights that of its weight.
    choices = [8, 4, 32, 16, 2, 32, 32, 16, 4, 8 / 3, 16, 2, 4, 16, 8, 2, 8]
    assert stories.log_probability(stories.story(0, 0)) == pytest.approx(-sum(map(math.log, choices)), abs=1e-9)
    assert stories.story(0, 1) != stories.story(1, 0) != stories.story(0, 0)


def test_the_entropy_is_the_mean_of_minus_log_probability():
    bits = [-stories.log_probability(stories.story(5, index)) / math.log(2) for index in range(4000)]
    assert abs(np.mean(bits) - stories.entropy() / math.log(2)) < 4 * np.std(bits) / math.sqrt(len(bits))
    assert 50 < stories.entropy() / math.log(2) < 60


@pytest.mark.parametrize(
    "spoil", [lambda t: t[:-1], lambda t: t + " ", lambda t: "", lambda t: t.replace("it?", "us?"), str.upper]
)
def test_what_is_no_story_has_probability_zero(spoil):
    assert stories.log_probability(spoil(stories.story(0, 3))) == -math.inf


def test_a_slot_must_keep_its_name():
    text = stories.story(0, 0)
    assert stories.log_probability(text.replace("said Otto", "said Hugo")) == -math.inf
    assert stories.log_probability(text.replace("Otto", "Hugo")) == stories.log_probability(text)


SMALL = {
    "start": {"[name as who] has a [thing], says {who}. [end]": 3, "Nobody is there. [end]": 1},
    "name": {"Ann": 1, "Bob": 1, "Cid": 2},
    "thing": {"red [animal]": 1, "blue [animal]": 3},
    "animal": {"cat": 1, "dog": 1},
    "end": {"Bye.": 1, "So long.": 1},
}


def test_probabilities_of_a_finite_grammar_sum_to_one_and_give_its_entropy():
    grammar = Grammar(SMALL, "start")
    generator = random.Random(0)
    drawn = Counter(grammar.draw(lambda n: generator.getrandbits(n) if n else 0) for _ in range(20_000))
    assert len(drawn) == 3 * 4 * 2 + 2
    log_p = {text: grammar.log_probability(text) for text in drawn}
    assert math.fsum(map(math.exp, log_p.values())) == pytest.approx(1, abs=1e-12)
    assert -math.fsum(math.exp(value) * value for value in log_p.values()) == pytest.approx(grammar.entropy(), abs=1e-12)
    for text, count in drawn.items():
        p = math.exp(log_p[text])
        assert abs(count / 20_000 - p) < 5 * math.sqrt(p / 20_000)


def test_a_recursive_grammar_has_the_entropy_of_its_series():
    grammar = Grammar({"a": {"x[a]": 3, "y": 1}}, "a")
    assert grammar.log_probability("x" * 5000 + "y") == pytest.approx(5000 * math.log(3 / 4) + math.log(1 / 4))
    p = [3**n / 4 ** (n + 1) for n in range(400)]
    assert grammar.entropy() == pytest.approx(-math.fsum(q * math.log(q) for q in p))


def test_an_ambiguous_grammar_is_refused():
    for options in itertools.permutations(["a", "ab"]):
        with pytest.raises(ValueError, match="begin alike"):
            Grammar({"s": dict.fromkeys(options, 1)}, "s")
    with pytest.raises(ValueError, match="begin alike"):
        Grammar({"s": {"[t]c": 1, "ab": 1}, "t": {"a": 1, "b": 1}}, "s")
    with pytest.raises(ValueError, match="no power of two"):
        Grammar({"s": {"a": 1, "b": 2}}, "s")


def test_stories_are_a_tfds_data_set(tmp_path, capsys):
    texts = read(Stories(count=50, seed=7), tmp_path)
    assert sorted(texts) == sorted(stories.story(7, index) for index in range(50))
    assert read(Stories(count=50, seed=7), tmp_path) == texts
    assert sorted(read(Stories(count=60, seed=7), tmp_path))[:1] == sorted(stories.story(7, i) for i in range(60))[:1]
    assert capsys.readouterr().out == ""


def test_remains_of_a_killed_preparation_are_removed(tmp_path):
    remains = tmp_path / "stories" / "seed0-count10" / "incomplete.ABCDEF_1.0.0"
    remains.mkdir(parents=True)
    (remains / "stories-train.array_record-00000-of-00001").write_bytes(b"half")
    assert len(read(Stories(count=10), tmp_path)) == 10
    assert not remains.exists()


# --- text folders -----------------------------------------------------------------------------------------------------


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def jsonl(texts, key="text"):
    return b"".join(json.dumps({key: text, "other": 1}).encode() + b"\n" for text in texts)


def test_every_form_of_text_is_read(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffone\r\nline é\n".encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    (folder / "deep" / "c.txt.zst").write_bytes(zstd(b"three"))
    (folder / "deep" / "d.jsonl").write_bytes(jsonl(["four", "fi\nve"]) + b"\n")
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(jsonl(["six"])) + gzip.compress(jsonl(["seven"])))
    (folder / "f.jsonl.zst").write_bytes(zstd(jsonl(["eight"])) + zstd(jsonl(["nine", "  "])))
    (folder / "h.jsonl.txt").write_bytes(b"ten")
    (folder / "g.md").write_bytes(b"\xff not text for us")
    expected = ["one\r\nline é", "two", "three", "four", "fi\nve", "six", "seven", "eight", "nine", "ten"]
    assert sorted(read(TextFolder(str(folder)), tmp_path / "data")) == sorted(expected)


def test_data_of_a_changed_folder_is_not_reused(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    source = TextFolder(str(folder))
    assert read(source, tmp_path / "data") == ["one"]
    (folder / "a.txt").write_text("two")  # the same name and size
    status = (folder / "a.txt").stat()
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert read(source, tmp_path / "data") == ["two"]
    (folder / "b.txt").write_text("three")
    assert sorted(read(source, tmp_path / "data")) == ["three", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nb\xffd", r"a\.txt, line 2 is not UTF-8 \(byte 0xff\): convert"),
        ("a.txt", b" \n", "has files but no text"),
        ("a.jsonl", jsonl(["good"]) + b'{"text": "b\xe9d"}\n', r"a\.jsonl, line 2 is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", jsonl(["good"]) + b'\n{"text": ', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", jsonl(["x"], key="body"), r"a\.jsonl, line 1: no text in field 'text' \(got fields body, other\): set"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: no text in field 'text' \(got list\)"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: no text in field 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: half of a surrogate pair"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read to its end"),
        ("a.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:-2000], r"a\.txt\.gz cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(jsonl(["x"] * 9999))[:-30], r"a\.jsonl\.gz cannot be read to its end.*replace it"),
        ("a.jsonl.zst", zstd(jsonl(["x"] * 9999))[:-9], r"a\.jsonl\.zst cannot be read to its end"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be read to its end"),
        ("a.md", b"text", r"has no file that ends in \.txt"),
    ],
)
def test_each_broken_file_gives_one_line(tmp_path, name, content, message):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(TextFolder(str(folder)), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("text_folder/*/1.0.0"))  # nothing half done is taken for the data


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_a_missing_folder_gives_one_line(tmp_path, path):
    with pytest.raises(UserError, match=f"text folder '{path}' is no folder: set the source's path"):
        read(TextFolder(path), tmp_path)


# --- machine docs -----------------------------------------------------------------------------------------------------


def test_machine_docs_are_docstrings_of_the_standard_library(tmp_path, monkeypatch):
    builder = MachineDocs(data_dir=tmp_path)
    assert re.fullmatch(r"machine_docs/python3\.[\d.]+-[0-9a-f]{16}/1\.0\.0", builder.info.full_name)
    files = itertools.takewhile(lambda item: item[0] < "python:c", Machine({}).files())
    monkeypatch.setattr(Machine, "files", lambda self: files)
    documents = dict(builder.documents())
    argparse = next(text for key, text in documents.items() if key.startswith("python:argparse.py:1"))
    assert argparse.startswith("Command-line parsing library\n\nThis module is an optparse-inspired")
    assert len(documents) > 200
    assert all(len(text) >= 100 and text == text.strip() for text in documents.values())


def test_machine_docs_are_named_after_their_packages(tmp_path, monkeypatch):
    name = MachineDocs(data_dir=tmp_path).info.full_name
    assert MachineDocs(data_dir=tmp_path).info.full_name == name
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version(package) + ("1" if package == "numpy" else ""))
    assert MachineDocs(data_dir=tmp_path).info.full_name != name
