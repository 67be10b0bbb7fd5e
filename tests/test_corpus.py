import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from hypothesis import given, settings
from hypothesis import strategies as st

from natfp_jax import chat, files, ingest
from natfp_jax.config import Conversations, Corpus, Data, Stories, Template, TextFolder, Tfds
from natfp_jax.corpus import prepare
from natfp_jax.errors import Damaged, UserError
from natfp_jax.files import canonical_json
from natfp_jax.packing import BEGINS, IDS, LEARNT
from natfp_jax.progress import Progress
from natfp_jax.tokenizer import EOS, Tokenizer
from natfp_jax.windows import Windows
from tests.soak import meshes

CORPUS = Corpus(source=Stories(count=1000), vocabulary=400, shards=3)


def prepared(corpus, root):
    return prepare(corpus, root, Progress(quiet=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepared(CORPUS, tmp_path_factory.mktemp("root"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def training_ids(store):
    return np.concatenate([np.fromfile(path, store.meta["dtype"]) for path in sorted(store.folder.glob("train-*.bin"))])


def split_at_eos(ids, eos):
    ends = np.flatnonzero(ids == eos)
    assert ends[-1] == len(ids) - 1
    return [part[:-1] for part in np.split(ids, ends + 1)[:-1]]


def prompt_documents(folder):
    lines = (folder / "prompts.jsonl").read_bytes().splitlines()
    return {line["id"]: line["text"] for line in map(json.loads, lines)}


def text_folder(root, texts):
    folder = root / "texts"
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextFolder(str(folder))


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the store --------------------------------------------------------------------------------------------------------


def test_no_document_is_lost_or_on_two_sides(store):
    train = {store.tokenizer.decode(ids) for ids in split_at_eos(training_ids(store), store.tokenizer.eos_id)}
    validation = np.fromfile(store.folder / "validation.bin", store.meta["dtype"])
    validation = {store.tokenizer.decode(ids) for ids in split_at_eos(validation, store.tokenizer.eos_id)}
    documents = prompt_documents(store.folder)
    prompts = set(documents.values())
    assert (len(train), len(validation), len(prompts)) == tuple(
        store.meta["documents"][part] for part in ("train", "validation", "prompt")
    )
    assert len(train | validation | prompts) == len(train) + len(validation) + len(prompts) == 1000
    for name, text in documents.items():
        assert name == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_the_hash_is_that_of_the_ids_in_store_order(store):
    ids = training_ids(store)
    assert store.sha256 == hashlib.sha256(ids.tobytes()).hexdigest()
    assert store.tokens == len(ids) == sum(store.meta["shard_tokens"])
    assert store.meta["dtype"] == "<u2"
    assert ids.max() < store.tokenizer.size <= store.meta["padded_vocabulary"]


def test_a_finished_store_is_opened_not_made(store):
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    again = prepared(CORPUS, store.folder.parent.parent)
    assert again.meta == store.meta
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_the_store_depends_on_neither_folder_nor_commits(store, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH_DOCUMENTS", 7)
    assert contents(prepared(CORPUS, tmp_path / "a").folder) == contents(store.folder)
    monkeypatch.setattr(ingest, "_BATCH_DOCUMENTS", 10**9)
    monkeypatch.setattr(ingest, "_BATCH_BYTES", 5000)
    assert contents(prepared(CORPUS, tmp_path / "b").folder) == contents(store.folder)


def test_ids_beyond_16_bits_are_kept_in_32(tmp_path, store):
    settings = json.loads(store.tokenizer.file)
    vocabulary = settings["model"]["vocab"]
    vocabulary.update({f"never{i}": i for i in range(len(vocabulary), 1 << 16)})
    for size, dtype in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        vocabulary[f"never{size - 1}"] = size - 1
        Tokenizer(json.dumps(settings).encode()).save(tmp_path / "tokenizer.json")
        wide = prepared(dataclasses.replace(CORPUS, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path)
        assert wide.meta["dtype"] == dtype
        assert wide.meta["padded_vocabulary"] >= size
        np.testing.assert_array_equal(training_ids(wide), training_ids(store))


@settings(max_examples=15)
@given(
    texts=st.lists(st.text(alphabet="ab \n\u00e9\U0001f600", max_size=6), min_size=30, max_size=60),
    fractions=st.tuples(st.floats(0.01, 0.4), st.floats(0.01, 0.4)),
    shards=st.integers(1, 5),
)
def test_documents_are_deduplicated_and_split_by_their_text_alone(texts, fractions, shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("property")
    tokenizer = Tokenizer.train(iter(["a b"]), 257)
    corpus = Corpus(validation_fraction=fractions[0], prompt_fraction=fractions[1], shards=shards)
    parts = []
    for number, order in enumerate((texts, texts[::-1] + texts)):
        folder = root / str(number)
        folder.mkdir()
        counts = ingest.ingest([text.strip() for text in order], ingest.Plain(tokenizer), corpus, folder, Progress(quiet=True))
        part = {"prompt": list(prompt_documents(folder).values())}
        for name in (*ingest.shard_names(shards), "validation.bin"):
            ids = np.fromfile(folder / name, "<u2")
            part[name] = [tokenizer.decode(piece) for piece in split_at_eos(ids, 0)] if len(ids) else []
        together = [text for side in part.values() for text in side]
        assert sorted(together) == sorted({text.strip() for text in texts} - {""})
        assert counts["read"] == len(order) == sum(counts[name] for name in counts if name != "read")
        parts.append({name: set(side) for name, side in part.items()})
    assert parts[0] == parts[1]


def test_the_text_of_the_special_token_ends_no_document(tmp_path):
    texts = [f"number {i} {EOS} goes on" for i in range(60)]
    store = prepared(Corpus(source=text_folder(tmp_path, texts), vocabulary=300, shards=2), tmp_path)
    documents = split_at_eos(training_ids(store), store.tokenizer.eos_id)
    assert len(documents) == store.meta["documents"]["train"] > 20
    assert {store.tokenizer.decode(ids) for ids in documents} <= set(texts)


def test_jax_is_not_needed(store):
    code = "import sys, natfp_jax.corpus; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from natfp_jax import files, ingest
from natfp_jax.config import from_json, Corpus
from natfp_jax.corpus import prepare
from natfp_jax.progress import Progress
import json
ingest._BATCH_DOCUMENTS = 16
root, corpus, fsyncs = Path(sys.argv[1]), from_json(Corpus, json.loads(sys.argv[2])), int(sys.argv[3])
fsync, done = os.fsync, 0
def counted(number):
    global done
    done += 1
    if done == fsyncs:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(number)
os.fsync = counted
print("ready", flush=True)
prepare(corpus, root, Progress(quiet=True))
"""


def killable(root, fsyncs=0):
    from natfp_jax.config import to_json

    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root), json.dumps(to_json(CORPUS)), str(fsyncs)], stdout=subprocess.PIPE
    )


def test_killed_between_any_two_writes_the_store_is_the_same(store, tmp_path):
    kills = 0
    for fsyncs in (1, 2, 5, 9, 33, 150):
        with killable(tmp_path, fsyncs) as process:
            process.communicate(timeout=meshes.STUCK)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 6
    assert contents(prepared(CORPUS, tmp_path).folder) == contents(store.folder)


def test_killed_at_random_moments_the_store_is_the_same(store, tmp_path):
    generator, kills = random.Random(time.time_ns()), 0
    for _ in range(6):
        with killable(tmp_path) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0.02, 0.25))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    assert contents(prepared(CORPUS, tmp_path).folder) == contents(store.folder)


def test_two_processes_at_once_make_one_store(store, tmp_path):
    processes = [killable(tmp_path) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=meshes.STUCK)
    assert [process.returncode for process in processes] == [0, 0]
    assert contents(prepared(CORPUS, tmp_path).folder) == contents(store.folder)


# --- windows ----------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    seq_len=st.integers(1, 20),
    data=st.data(),
)
def test_windows_are_those_of_the_concatenation(lengths, seq_len, data):
    ids = np.arange(sum(lengths), dtype="<u2") * 7
    shards = np.split(ids, np.cumsum(lengths)[:-1])
    available = len(ids) // (seq_len + 1)
    first = data.draw(st.integers(0, available))
    count = data.draw(st.integers(0, available - first))
    windows = Windows(shards, seq_len, count, first)
    plain = ids[first * (seq_len + 1) : (first + count) * (seq_len + 1)].reshape(count, seq_len + 1)
    indices = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=8)) if count else [], np.int64)
    rows = windows.rows(indices)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, plain[indices])
    assert windows.sha256() == hashlib.sha256(plain.tobytes()).hexdigest()
    for outside in (-1, count):
        with pytest.raises(IndexError):
            windows.rows(np.array([outside]))


def test_windows_of_a_store(store):
    ids = training_ids(store)
    available = store.tokens // 65
    windows = store.windows(64, available)
    np.testing.assert_array_equal(windows.rows(np.arange(available)), ids[: available * 65].reshape(available, 65))
    assert store.windows(64, 10).sha256() == hashlib.sha256(ids[:650].tobytes()).hexdigest()
    with pytest.raises(
        UserError, match=rf"{available + 1} windows of 64 \+ 1 tokens were asked for, it has {available}"
    ) as caught:
        store.windows(64, available + 1)
    one_line(caught)
    halves = [store.pool(Data(seq_len=64, windows=available // 2, first=first)) for first in (0, available // 2)]
    rows = np.concatenate([half.rows(np.arange(half.count)) for half in halves])
    np.testing.assert_array_equal(rows, windows.rows(np.arange(len(rows))))  # together the whole, and nothing twice
    with pytest.raises(UserError, match=rf"{available} windows of 64 \+ 1 tokens from window 1 on were asked for") as caught:
        store.windows(64, available, 1)
    one_line(caught)


def test_validation_windows(store):
    ids = np.fromfile(store.folder / "validation.bin", "<u2")
    rows = store.validation_windows(64, 5)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, ids[: 5 * 65].reshape(5, 65))
    assert len(store.validation_windows(64, 10**9)) == len(ids) // 65
    with pytest.raises(UserError, match="its validation part has"):
        store.validation_windows(len(ids), 5)


# --- conversations ----------------------------------------------------------------------------------------------------


def said_in(corpus):
    """The texts of a file of conversations."""
    return [canonical_json(json.loads(line)["messages"]) for line in Path(corpus.source.path).read_bytes().splitlines()]


def examples(ids):
    """The marked ids of each example, as bytes."""
    return [one.tobytes() for one in np.split(ids, np.flatnonzero(ids & BEGINS)[1:])]


def windows_by_hand(ids, seq_len, padding):
    """Whole examples, until the next does not fit."""
    windows = []
    for one in (np.frombuffer(data, "<u4").tolist() for data in examples(ids)):
        if len(one) > seq_len + 1:
            continue
        if not windows or len(windows[-1]) + len(one) > seq_len + 1:
            windows.append([])
        windows[-1] += one
    return np.array([[*window, *[padding | BEGINS] * (seq_len + 1 - len(window))] for window in windows], np.int32)


def test_every_conversation_is_in_one_part_with_those_that_begin_alike(talk_store, talk_corpus):
    texts = said_in(talk_corpus)
    ids = {"train": training_ids(talk_store), "validation": np.fromfile(talk_store.folder / "validation.bin", "<u4")}
    whose = {one.tobytes(): text for one, text in zip(talk_store.chat.encode(texts), texts, strict=True)}
    parts = {part: [whose.pop(one) for one in examples(some)] for part, some in ids.items()}
    parts["prompt"] = sorted(whose.values())
    lines = [json.loads(line) for line in (talk_store.folder / "prompts.jsonl").read_bytes().splitlines()]
    assert sorted(line["text"] for line in lines) == parts["prompt"]
    assert {line["id"] for line in lines} == {chat.document(text).id for text in parts["prompt"]}
    assert {part: len(some) for part, some in parts.items()} == {part: talk_store.meta["documents"][part] for part in parts}
    assert min(map(len, parts.values())) > 20
    asked = {part: {message["content"] for text in some for message in json.loads(text)[:2]} for part, some in parts.items()}
    asked = {part: {text for text in some if text.startswith("Which")} for part, some in asked.items()}
    assert len(set.union(*asked.values())) == sum(map(len, asked.values()))  # none in two parts
    assert len(set.union(*asked.values())) < len(texts)


def test_the_tokenizer_of_conversations_is_trained_on_what_is_said(talk_store, talk_corpus):
    train = [text for text in said_in(talk_corpus) if chat.document(text).part(talk_corpus) == "train"]
    said = ["\n".join(message["content"] for message in json.loads(text)) for text in train]
    assert Tokenizer.train(iter(said), talk_corpus.vocabulary) == talk_store.tokenizer
    assert Tokenizer.train(iter(train), talk_corpus.vocabulary) != talk_store.tokenizer
    assert talk_store.tokenizer.specials == [EOS]


def test_windows_of_conversations_are_packed(talk_store):
    ids = training_ids(talk_store)
    assert talk_store.meta["dtype"] == "<u4"
    assert talk_store.sha256 == hashlib.sha256(ids.tobytes()).hexdigest() == talk_store.recomputed()
    assert (ids & IDS).max() < talk_store.tokenizer.size
    expected = windows_by_hand(ids, 64, talk_store.tokenizer.eos_id)
    windows = talk_store.pool(Data(seq_len=64, windows=len(expected)))
    np.testing.assert_array_equal(windows.rows(np.arange(len(expected))), expected)
    assert 0 < windows.left_out < 12
    assert windows.examples + windows.left_out == talk_store.meta["documents"]["train"]
    second = talk_store.pool(Data(seq_len=64, windows=2, first=3))
    np.testing.assert_array_equal(second.rows(np.arange(2)), expected[3:5])
    for count, first, said in ((len(expected) + 1, 0, ""), (len(expected), 1, " from window 1 on")):
        with pytest.raises(UserError, match=rf"{count} windows of 64 \+ 1 tokens{said} were asked for") as caught:
            talk_store.windows(64, count, first)
        assert f"it has {len(expected)}" in one_line(caught)
        said = f"{windows.left_out} conversations are longer than a window); ask for fewer or shorter windows"
        assert said in str(caught.value)
    with pytest.raises(UserError, match=r"it has 0 .* are longer than a window\); ask for fewer or longer windows"):
        talk_store.windows(8, 1)
    with pytest.raises(UserError, match=r"it has \d+ \(\d+ tokens\); ask for fewer or shorter windows"):
        talk_store.windows(1000, 10**6)


def test_validation_windows_of_conversations_are_packed(talk_store):
    ids = np.fromfile(talk_store.folder / "validation.bin", "<u4")
    expected = windows_by_hand(ids, 64, talk_store.tokenizer.eos_id)
    for limit in (3, 10**9):
        rows = talk_store.validation_windows(64, limit)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, expected[:limit])
    assert ((expected & LEARNT) != 0).any(axis=1).all()  # no window from which nothing is learnt
    with pytest.raises(
        UserError, match=r"\d+ tokens, \d+ conversations are longer than a window, .* take longer windows"
    ) as caught:
        talk_store.validation_windows(4, 5)
    one_line(caught)


def test_a_store_of_conversations_is_opened_as_it_was_written(talk_store, talk_corpus, tmp_path):
    again = prepared(talk_corpus, talk_store.folder.parent.parent)
    assert again == talk_store
    assert (again.chat, again.end_id) == (talk_store.chat, talk_store.tokenizer.eos_id)
    assert again.questions(20) == talk_store.questions(20)
    assert contents(prepared(talk_corpus, tmp_path).folder) == contents(talk_store.folder)


def test_a_store_of_conversations_depends_on_no_commits(talk_store, talk_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH_DOCUMENTS", 7)
    assert contents(prepared(talk_corpus, tmp_path).folder) == contents(talk_store.folder)


def test_another_template_makes_another_store(talk_store, talk_corpus, tmp_path):
    root = talk_store.folder.parent.parent
    for change in ({"system": "{content}"}, {"user": "Q: {content}\n"}, {"assistant": "A: {content}"}):
        other = prepared(dataclasses.replace(talk_corpus, template=Template(**change)), root)
        assert other.folder != talk_store.folder
        assert other.sha256 != talk_store.sha256
        assert other.tokenizer == talk_store.tokenizer  # which knows nothing of the template
        assert other.meta["documents"] == talk_store.meta["documents"]


def test_a_template_that_the_tokenizer_cannot_write_leaves_nothing_behind(talk_corpus, tmp_path):
    wrong = dataclasses.replace(talk_corpus, template=Template(end_of_turn="<|im_end|>"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"template\.end_of_turn '<\|im_end\|>' is no special token") as caught:
            prepared(wrong, tmp_path)
        one_line(caught)
    assert not [path for path in (tmp_path / "corpora").rglob("*") if path.is_file() and path.name != ".lock"]


def test_conversations_that_are_all_for_testing_give_one_line(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}))
    corpus = Corpus(source=Conversations(str(path)), vocabulary=257, validation_fraction=0.5, prompt_fraction=0.4999)
    with pytest.raises(UserError, match="none of its 1 documents is for training") as caught:
        prepared(corpus, tmp_path)
    one_line(caught)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_begin_documents_of_the_prompt_part(store):
    documents = prompt_documents(store.folder)
    prompts = store.prompts(100, 50, 1)
    assert len({prompt.text for prompt in prompts}) == len({prompt.id for prompt in prompts}) == 100
    assert [prompt.document for prompt in prompts] == sorted(prompt.document for prompt in prompts)
    for prompt in prompts:
        assert len(prompt.text) == 50
        assert documents[prompt.document].startswith(prompt.text)
        assert 0 <= prompt.id < 2**64


@pytest.mark.parametrize("offsets", [1, 3])
def test_more_prompts_begin_with_the_same(store, offsets):
    assert store.prompts(150, 50, offsets)[:40] == store.prompts(40, 50, offsets)


def test_offsets_do_not_overlap_and_the_first_stays(store):
    documents = prompt_documents(store.folder)
    prompts = store.prompts(300, 40, 4)
    firsts = {prompt.document: prompt for prompt in store.prompts(60, 40, 1)}
    by_document = {}
    for prompt in prompts:
        by_document.setdefault(prompt.document, []).append(prompt)
    assert {prompt.id for prompt in firsts.values()} <= {prompt.id for prompt in prompts}
    for document, pieces in by_document.items():
        place = 0
        for piece in pieces:
            assert piece.text in documents[document][place:-1]
            place = documents[document].index(piece.text, place) + len(piece.text)
    assert max(map(len, by_document.values())) == 4


def test_equal_beginnings_are_one_prompt(tmp_path):
    texts = [f"{'same' * 5}{i}" for i in range(100)] + [f"{i:020d} other" for i in range(100)] + ["short"]
    store = prepared(Corpus(source=text_folder(tmp_path, texts), vocabulary=300, shards=1), tmp_path)
    with pytest.raises(UserError, match=r"the corpus has (\d+) prompts of 20 characters, 1000 were asked for") as caught:
        store.prompts(1000, 20, 1)
    number = int(re.search(r"has (\d+)", one_line(caught))[1])
    prompts = store.prompts(number, 20, 1)
    assert sum(prompt.text == "same" * 5 for prompt in prompts) == 1
    with pytest.raises(UserError, match="the corpus has 0 prompts of 100 characters"):
        store.prompts(1, 100, 1)


# --- other TFDS data sets ---------------------------------------------------------------------------------------------


class ForeignNews(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.1.0")

    def _info(self):
        features = {"body": tfds.features.Text(), "label": np.int64, "title": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200), "test": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {"body": f"News number {i} of {count}: nothing happened. é", "label": i, "title": b"\xff" if i == 7 else "t"},
            )


class Offline(ForeignNews):
    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to host\nand more lines")


FOREIGN = Tfds(name="foreign_news", text_key="body")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    prepared(Corpus(source=dataclasses.replace(FOREIGN, data_dir=str(data_dir)), vocabulary=300), data_dir)  # it is preparable
    return str(data_dir)


@pytest.mark.parametrize(("split", "count"), [("train", 200), ("test", 20), ("train[:50%]", 100)])
def test_any_tfds_data_set_is_a_corpus(foreign, tmp_path, split, count, capsys):
    source = dataclasses.replace(FOREIGN, split=split, data_dir=foreign)
    store = prepared(Corpus(source=source, vocabulary=300, shards=2), tmp_path)
    assert store.meta["documents"]["read"] == count
    assert "foreign_news/2.1.0" in store.meta["provenance"]["source"]
    assert "nothing happened. é" in store.tokenizer.decode(training_ids(store)[:200])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "no_such_data"}, "TFDS knows no data set 'no_such_data', and none is prepared in .*: look the name up"),
        ({"name": "../x"}, r"TFDS cannot open '\.\./x'"),
        ({"name": "wiki40b/xx"}, r"TFDS cannot open 'wiki40b/xx' \(.*BuilderConfig xx not found.*\): check its config"),
        ({"name": "foreign_news:9.9.9"}, "TFDS cannot open 'foreign_news:9.9.9'"),
        ({"text_key": "text"}, "no text in 'text': its texts are body, title; set the source's text_key"),
        ({"text_key": "label"}, "no text in 'label': its texts are body, title"),
        ({"split": "dev"}, "has no split 'dev': its splits are test, train"),
        ({"split": "train[x]"}, r"has no split 'train\[x\]'"),
        ({"text_key": "title"}, r"document \d+ in .*foreign_news/2.1.0 is not UTF-8"),
        (
            {"name": "offline", "data_dir": None},
            r"'offline' is not prepared in .* and cannot be here \(ConnectionError: no route to host\): where there is a net"
            r"work.* run python -c \"import tensorflow_datasets as tfds, .*; tfds.builder\('offline', data_dir='.*'\)\.down",
        ),
    ],
)
def test_a_wrong_tfds_source_gives_one_line(foreign, tmp_path, change, message):
    change = {name: str(tmp_path) if value is None else value for name, value in change.items()}
    source = dataclasses.replace(FOREIGN, **{"data_dir": foreign, **change})
    with pytest.raises(UserError, match=message) as caught:
        prepared(Corpus(source=source, vocabulary=300), tmp_path)
    one_line(caught)


def as_tfrecord(data_dir):
    """Rewrites prepared array_record files as TFRecord: length, checksum, record, checksum (zero here: not read)."""
    for path in list(Path(data_dir).rglob("*.array_record-*")):
        source = ArrayRecordDataSource([str(path)])
        records = [source[i] for i in range(len(source))]
        data = b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records)
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(data)
        path.unlink()
    (info,) = Path(data_dir).rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.mark.parametrize("split", ["train", "train[25%:75%]"])
def test_data_prepared_as_tfrecord_gives_the_same_corpus(foreign, tmp_path, split):
    shutil.copytree(foreign, tmp_path / "tfds")
    as_tfrecord(tmp_path / "tfds")
    stores = [
        prepared(
            Corpus(source=dataclasses.replace(FOREIGN, split=split, data_dir=str(data_dir)), vocabulary=300), tmp_path / name
        )
        for name, data_dir in (("a", foreign), ("b", tmp_path / "tfds"))
    ]
    assert stores[0].sha256 == stores[1].sha256
    assert stores[0].meta["documents"] == stores[1].meta["documents"]


def test_a_truncated_tfrecord_gives_one_line(foreign, tmp_path):
    shutil.copytree(foreign, tmp_path / "tfds")
    as_tfrecord(tmp_path / "tfds")
    (records,) = (tmp_path / "tfds").rglob("*train.tfrecord*")
    os.truncate(records, 5000)
    with pytest.raises(UserError, match="remove that folder") as caught:
        prepared(Corpus(source=dataclasses.replace(FOREIGN, data_dir=str(tmp_path / "tfds")), vocabulary=300), tmp_path)
    one_line(caught)


def test_data_in_another_format_gives_one_line(foreign, tmp_path):
    shutil.copytree(foreign, tmp_path / "tfds")
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "riegeli"))
    with pytest.raises(UserError, match="is kept as riegeli, expected array_record or tfrecord") as caught:
        prepared(Corpus(source=dataclasses.replace(FOREIGN, data_dir=str(tmp_path / "tfds")), vocabulary=300), tmp_path)
    one_line(caught)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 5000)])
def test_damaged_tfds_data_gives_one_line(foreign, tmp_path, damage):
    shutil.copytree(foreign, tmp_path / "tfds")
    (records,) = (tmp_path / "tfds").rglob("*train.array_record*")
    damage(records)
    with pytest.raises(UserError, match="remove that folder") as caught:
        prepared(Corpus(source=dataclasses.replace(FOREIGN, data_dir=str(tmp_path / "tfds")), vocabulary=300), tmp_path)
    one_line(caught)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_a_folder_of_another_corpus_is_refused(store, tmp_path):
    other = prepared(dataclasses.replace(CORPUS, shards=2), tmp_path)
    mine = tmp_path / "corpora" / store.folder.name
    shutil.move(other.folder, mine)
    with pytest.raises(UserError, match=rf'holds corpus {other.folder.name} of .*"shards":2.*expected {store.folder.name} of'):
        prepared(CORPUS, tmp_path)


def damaged(corpus, root):
    with pytest.raises(Damaged) as caught:
        prepared(corpus, root)
    one_line(caught)
    return caught.value


@pytest.fixture
def copy(store, tmp_path):
    """The folder of a copy of the store, below tmp_path."""
    folder = tmp_path / "corpora" / store.folder.name
    shutil.copytree(store.folder, folder)
    return folder


NAMES = ["train-00001-of-00003.bin", "validation.bin", "prompts.jsonl", "tokenizer.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_store_is_not_opened_and_made_again_once_it_is_set_aside(store, copy, tmp_path, name):
    size = (copy / name).stat().st_size
    os.truncate(copy / name, 10)
    damage = damaged(CORPUS, tmp_path)
    assert damage.path == copy
    assert damage.why == f"is damaged: {name} has 10 bytes, expected {size} bytes"
    (copy / name).unlink()
    assert damaged(CORPUS, tmp_path).why == f"is damaged: {name} is missing, expected {size} bytes"
    aside = files.set_aside(copy)
    assert aside == copy.with_name(f"{copy.name}.damaged")
    assert contents(prepared(CORPUS, tmp_path).folder) == contents(store.folder)
    assert (aside / "meta.json").read_bytes() == (store.folder / "meta.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_bit_in_the_store_is_found(store, copy, tmp_path, name):
    whole = (copy / name).read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        (copy / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        damage = damaged(CORPUS, tmp_path)
        assert damage.path == copy
        assert re.fullmatch(f"is damaged: {name} has sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}", damage.why)
    (copy / name).write_bytes(whole)
    assert prepared(CORPUS, tmp_path).meta == store.meta


def test_one_wrong_bit_in_the_description_of_the_store_is_found(store, copy, tmp_path):
    whole = (copy / "meta.json").read_bytes()
    for place in range(0, len(whole), 29):
        (copy / "meta.json").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        damage = damaged(CORPUS, tmp_path)
        assert damage.path == copy
        assert damage.why.startswith("is damaged: its meta.json is ")


def test_another_tokenizer_in_the_store_is_found(store, copy, tmp_path):
    """Of the same size, and one that loads."""
    Tokenizer(store.tokenizer.file.replace(b'"ignore_merges":false', b'"ignore_merges":true ')).save(copy / "tokenizer.json")
    assert damaged(CORPUS, tmp_path).why.startswith("is damaged: tokenizer.json has sha256 ")


def test_the_hash_is_recomputed_from_the_files(store, copy):
    assert store.recomputed() == store.sha256
    again = dataclasses.replace(store, folder=copy)
    data = bytearray((copy / "train-00002-of-00003.bin").read_bytes())
    data[-1] ^= 1
    (copy / "train-00002-of-00003.bin").write_bytes(data)
    assert again.recomputed() != again.sha256 == store.sha256


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What a pass leaves that is killed in its middle: a root, and the store's folder in it."""
    root = tmp_path_factory.mktemp("begun")
    fsyncs = 0
    while not (found := list(root.rglob("progress.sqlite"))) or not list(root.rglob("train-*.bin")) or fsyncs < 150:
        fsyncs += 50
        with killable(root, fsyncs) as process:
            process.communicate(timeout=meshes.STUCK)
        assert process.returncode == -signal.SIGKILL
    return root, found[0].parent


@pytest.mark.parametrize("name", ["train-00000-of-00003.bin", "validation.bin", "prompts.jsonl"])
@pytest.mark.parametrize("cut", [False, True])
def test_what_a_killed_pass_left_is_checked_before_it_goes_on(store, begun, tmp_path, name, cut):
    shutil.copytree(begun[0], tmp_path / "root")
    folder = tmp_path / "root" / begun[1].relative_to(begun[0])
    whole = (folder / name).read_bytes()
    assert len(whole) > 100
    (folder / name).write_bytes(whole[:5] if cut else whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    damage = damaged(CORPUS, tmp_path / "root")
    assert damage.path == folder
    assert damage.why == f"is damaged: {name} is not what an earlier pass left"
    files.set_aside(folder)
    assert contents(prepared(CORPUS, tmp_path / "root").folder) == contents(store.folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("UPDATE counts SET value = value + 1 WHERE name = 'read'", "counts"),
        ("UPDATE counts SET value = value - 2 WHERE name = 'validation.bin'", "validation.bin"),
        ("DELETE FROM seen WHERE digest = (SELECT max(digest) FROM seen)", "seen"),
        ("INSERT INTO seen VALUES (x'00')", "seen"),
        ("UPDATE seals SET value = '0' WHERE name = 'seen'", "seen"),
        ("DELETE FROM seals WHERE name = 'train-00002-of-00003.bin'", "train-00002-of-00003.bin"),
    ],
)
def test_what_a_killed_pass_noted_is_checked_before_it_goes_on(begun, tmp_path, change, what):
    shutil.copytree(begun[0], tmp_path / "root")
    folder = tmp_path / "root" / begun[1].relative_to(begun[0])
    with contextlib.closing(sqlite3.connect(folder / "progress.sqlite")) as database:
        assert database.execute(change).rowcount == 1
        database.commit()
    damage = damaged(CORPUS, tmp_path / "root")
    assert damage.path == folder
    assert damage.why == f"is damaged: {what} is not what an earlier pass left"


def test_a_spoilt_database_of_a_killed_pass_is_damage(store, begun, tmp_path):
    shutil.copytree(begun[0], tmp_path / "root")
    folder = tmp_path / "root" / begun[1].relative_to(begun[0])
    (folder / "progress.sqlite").write_bytes(b"no database" * 999)
    damage = damaged(CORPUS, tmp_path / "root")
    assert damage.path == folder
    assert damage.why.startswith("is damaged: progress.sqlite cannot be read (")
    files.set_aside(folder)
    assert contents(prepared(CORPUS, tmp_path / "root").folder) == contents(store.folder)


def test_a_given_tokenizer_makes_its_own_store(store, tmp_path):
    path = tmp_path / "given.json"
    Tokenizer.train(iter(["some other text"]), 300).save(path)
    given = dataclasses.replace(CORPUS, tokenizer=str(path))
    one = prepared(given, tmp_path)
    assert one.tokenizer == Tokenizer.load(path)
    Tokenizer.train(iter(["again some other text"]), 310).save(path)
    assert prepared(given, tmp_path).folder != one.folder
    with pytest.raises(UserError, match="cannot be read"):
        prepared(dataclasses.replace(CORPUS, tokenizer=str(tmp_path / "nowhere.json")), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 100}, "vocabulary 100 is too small"),
        ({"validation_fraction": 0.5, "prompt_fraction": 0.5}, "leave nothing to train on: their sum must be below 1"),
        ({"validation_fraction": 0.001, "prompt_fraction": 0.99899}, "none of its 1000 documents is for training"),
    ],
)
def test_a_corpus_without_training_text_gives_one_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        prepared(dataclasses.replace(CORPUS, **change), tmp_path)
    one_line(caught)
