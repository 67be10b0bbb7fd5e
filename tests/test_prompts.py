"""Prompts of a file or of held-out documents: distinct, in order, known by their text; a broken file gives one line."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from natfp_jax.config import Sampling
from natfp_jax.errors import UserError
from natfp_jax.packing import BEGINS, IDS
from natfp_jax.prompts import Prompts, prompts_of
from natfp_jax.tokenizer import EOS

TEXTS = ["One upon a time", "  two\tspaces ", "ünï \N{GRINNING FACE} code", "no <|eos|> here", "One upon a time", "last\\n"]
DISTINCT = list(dict.fromkeys(TEXTS))


def written(folder, kind, texts=TEXTS, key="text", **columns):
    path = folder / f"prompts.{kind}"
    records = [{key: text, **{name: column[i] for name, column in columns.items()}} for i, text in enumerate(texts)]
    match kind:
        case "txt":
            path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        case "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        case "parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    return path


def read(store, path, count=5, **settings):
    return prompts_of(store, Sampling(prompts=count, prompt_file=str(path), **settings))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_gives_its_different_prompts_in_its_order(tiny_store, tmp_path, kind):
    found = read(tiny_store, written(tmp_path, kind))
    assert found.texts == DISTINCT
    assert len(set(found.ids)) == len(set(found.documents)) == len(found) == 5
    assert all(0 <= number < 2**64 for number in found.ids)
    assert read(tiny_store, written(tmp_path, kind), 3).ids == found.ids[:3]
    assert [part.texts for part in (found.part(0, 2), found.part(4, 2))] == [DISTINCT[:2], DISTINCT[4:]]


def test_a_prompt_is_known_by_its_text_whatever_file_it_is_of(tiny_store, tmp_path):
    """So that its noise is the same."""
    kinds = [read(tiny_store, written(tmp_path, kind)) for kind in ("txt", "jsonl", "parquet")]
    turned = read(tiny_store, written(tmp_path, "txt", TEXTS[::-1]))
    assert kinds[0].ids == kinds[1].ids == kinds[2].ids
    assert dict(zip(turned.texts, turned.ids, strict=True)) == dict(zip(kinds[0].texts, kinds[0].ids, strict=True))
    assert kinds[0].sha256 == kinds[1].sha256 != turned.sha256


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_may_name_fields_and_documents(tiny_store, tmp_path, kind):
    path = written(tmp_path, kind, DISTINCT, "prompt", document_id=["a", "a", "b", "c", "c"])
    found = read(tiny_store, path, prompt_key="prompt")
    assert found.documents == ["a", "a", "b", "c", "c"]
    with pytest.raises(UserError, match=r"'text'.*set sampling\.prompt_key"):
        read(tiny_store, path)


def test_held_out_documents_are_those_of_the_corpus(tiny_store):
    found = prompts_of(tiny_store, Sampling(prompts=20, prompt_chars=15))
    expected = tiny_store.prompts(20, 15, 1)
    assert found.texts == [prompt.text for prompt in expected]
    assert found.documents == [prompt.document for prompt in expected]
    assert found.ids == [prompt.id for prompt in expected]
    assert found.sha256 == prompts_of(tiny_store, Sampling(prompts=20, prompt_chars=15)).sha256
    assert found.sha256 != found.part(0, 19).sha256


def test_text_never_becomes_a_special_token(tiny_store, tmp_path):
    tokenizer = tiny_store.tokenizer
    encoded = read(tiny_store, written(tmp_path, "txt")).encoded(tokenizer)
    assert [ids.count(tokenizer.eos_id) for ids in encoded] == [1] * 5
    assert [ids[0] for ids in encoded] == [tokenizer.eos_id] * 5
    assert [tokenizer.decode(ids) for ids in encoded] == DISTINCT
    assert EOS in DISTINCT[3]


def test_a_prompt_longer_than_the_context_is_named(tiny_store, tmp_path):
    found = read(tiny_store, written(tmp_path, "txt", [*"abc", "word " * 100]), 4)
    length = 1 + len(tiny_store.tokenizer.encode("word " * 100))
    assert found.check(tiny_store.tokenizer, length, "FILE") == length
    with pytest.raises(UserError) as caught:
        found.check(tiny_store.tokenizer, length - 1, "FILE")
    said = f"has {length} tokens with EOS, the models' context has {length - 1}: shorten it"
    assert f"prompt 4 of FILE, '{'word ' * 8}...', {said}" in str(caught.value)


# --- of conversations -------------------------------------------------------------------------------------------------


def begun_in(store, name):
    """The ids of the examples of a part, as tuples."""
    ids = np.concatenate([np.fromfile(path, "<u4") for path in sorted(store.folder.glob(name))])
    return [tuple((one & IDS).tolist()) for one in np.split(ids, np.flatnonzero(ids & BEGINS)[1:])]


def test_prompts_of_conversations_are_their_held_out_questions(talk_store):
    held = [json.loads(line) for line in (talk_store.folder / "prompts.jsonl").read_bytes().splitlines()]
    questions = {}  # text → document, in the order of documents
    for line in sorted(held, key=lambda line: line["id"]):
        system = "".join(f"{message['content']}\n" for message in json.loads(line["text"]) if message["role"] == "system")
        asked = next(message["content"] for message in json.loads(line["text"]) if message["role"] == "user")
        questions.setdefault(f"{system}Question:\n{asked}\nAnswer:\n", line["id"])
    found = prompts_of(talk_store, Sampling(prompts=len(questions)))
    assert sorted(zip(found.texts, found.documents, strict=True)) == sorted(questions.items())
    assert found.documents == sorted(found.documents)
    assert len(set(found.documents)) < len(set(found.ids)) == len(questions) < len(held)
    tokenizer = talk_store.tokenizer
    encoded = found.encoded(tokenizer)
    assert [tokenizer.decode(ids) for ids in encoded] == found.texts
    assert [(ids[0], ids.count(tokenizer.eos_id)) for ids in encoded] == [(tokenizer.eos_id, 1)] * len(encoded)
    seen = [*begun_in(talk_store, "train-*.bin"), *begun_in(talk_store, "validation.bin")]
    assert not [ids for ids in encoded if any(one[: len(ids)] == tuple(ids) for one in seen)]
    with pytest.raises(UserError, match=f"the corpus has {len(questions)} prompts, 9999 were asked for") as caught:
        prompts_of(talk_store, Sampling(prompts=9999))
    assert "\n" not in str(caught.value)


def test_more_questions_begin_with_the_same(talk_store):
    many, few = (prompts_of(talk_store, Sampling(prompts=count)) for count in (40, 10))
    assert many.part(0, 10).table.equals(few.table)
    assert many.part(0, 10).sha256 == few.sha256 != many.sha256
    assert many.part(3, 5).encoded(talk_store.tokenizer) == many.encoded(talk_store.tokenizer)[3:8]


def test_questions_that_the_context_has_no_room_for_are_left_out(talk_store):
    tokenizer, everything = talk_store.tokenizer, talk_store.questions(50)
    context = sorted(len(prompt.ids) for prompt in everything)[25]
    fitting = [prompt for prompt in everything if len(prompt.ids) <= context]
    found = prompts_of(talk_store, Sampling(prompts=len(fitting)), context)
    assert found.ids == [prompt.id for prompt in fitting]
    assert found.check(tokenizer, context, "the corpus") == context
    with pytest.raises(UserError, match="the corpus has 0 prompts of at most 3 tokens, 1 were asked for"):
        prompts_of(talk_store, Sampling(prompts=1), 3)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_asks_a_model_of_conversations_in_its_template(talk_store, tmp_path, kind):
    path = written(tmp_path, kind, [*TEXTS, f"{TEXTS[0]} ", "Question:\\n"])
    found = read(talk_store, path, 6)
    stripped = [*dict.fromkeys(text.strip() for text in TEXTS), "Question:\\n"]
    assert found.texts == [f"Question:\n{text}\nAnswer:\n" for text in stripped]
    assert len(set(found.ids)) == len(set(found.documents)) == 6
    asked = talk_store.chat.asked([[{"role": "user", "content": text}] for text in stripped])
    assert found.encoded(talk_store.tokenizer) == asked
    with pytest.raises(UserError, match="has 6 different prompts, 7 were asked for"):
        read(talk_store, path, 7)


def test_a_file_that_asks_what_a_conversation_asks_has_its_ids(talk_store, tmp_path):
    held = next(prompt for prompt in talk_store.questions(40) if prompt.text.startswith("Question:\n"))
    text = held.text.removeprefix("Question:\n").removesuffix("\nAnswer:\n")
    (ids,) = read(talk_store, written(tmp_path, "txt", [text]), 1).encoded(talk_store.tokenizer)
    assert tuple(ids) == held.ids


def test_equal_texts_of_other_ids_are_other_prompts(talk_store, tmp_path):
    """What a text does not say of its form is in the hash."""
    one = read(talk_store, written(tmp_path, "txt"))
    other = pa.array([ids[1:] for ids in one.encoded(talk_store.tokenizer)], one.table["ids"].type)
    assert one.sha256 != Prompts(one.table.set_column(3, "ids", other)).sha256


# --- what does not do -------------------------------------------------------------------------------------------------


def no_utf8():
    """A Parquet file with a text that is none."""
    file, bytes_ = io.BytesIO(), pa.array([b"a", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, bytes_.buffers())}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("p.txt", b"", "has no prompt: put texts there"),
        ("p.txt", b"\n \n\n", "has no prompt: put texts there"),
        ("p.txt", b"a\nb\n", "has 2 different prompts, 5 were asked for: set sampling.prompts=2 or fewer"),
        ("p.txt", b"a\n\xff\n", "line 2 is not UTF-8"),
        ("p.csv", b"text\na\n", "ends in none of .txt, .jsonl, .parquet: rename or convert it"),
        ("p.jsonl", b'{"text": "a"}\n{"text": ""}\n', "line 2: the prompt is empty: remove it"),
        ("p.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: no text in field 'text' (got 3): mend or remove it"),
        ("p.jsonl", b'{"text": null}\n', "line 1: no text in field 'text' (got null): mend or remove it"),
        ("p.jsonl", b'{"text": "a"\n', "line 1 is not JSON"),
        ("p.jsonl", b"[]\n", "line 1: no text in field 'text' (got list)"),
        ("p.jsonl", b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("p.jsonl", b'{"\\ud800": "a"}\n', "line 1: no text in field 'text' (got fields \ufffd)"),
        ("p.jsonl", b'{"text": "a", "document_id": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("p.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "line 1 is not JSON (Exceeds the limit"),
        ("p.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON (maximum recursion depth"),
        ("p.parquet", no_utf8(), "cannot be read"),
        ("p.parquet", b"text\na\n", "cannot be read"),
        ("p.parquet", b"", "cannot be read"),
    ],
)
def test_a_file_that_does_not_do_gives_one_line(tiny_store, tmp_path, name, contents, said):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(UserError) as caught:
        read(tiny_store, path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_has_to_be_a_file(tiny_store, tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=r"is no file: give one that ends in \.txt, \.jsonl, \.parquet"):
            read(tiny_store, path)
