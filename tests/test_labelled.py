"""Labelled texts from elsewhere: one reading of every format, and comparisons in which chance is known."""

import csv
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from natfp_jax import attribution, stats
from natfp_jax.errors import UserError
from natfp_jax.labelled import Columns, Labelled, matched, read

RECORDS = [
    {"text": 'He said "no",\nand left; ünï', "label": "007", "prompt": "He", "document_id": "a"},
    {"text": "", "label": "8", "prompt": "He", "document_id": "a"},
    {"text": "NA", "label": "007", "prompt": "She, too", "document_id": "b"},
    {"text": " spaces ", "label": "8", "prompt": "She, too", "document_id": "b"},
]


def written(path, records):
    match path.suffix:
        case ".csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, records[0])
                writer.writeheader()
                writer.writerows(records)
        case ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_is_read_alike(tmp_path, kind):
    found = read(written(tmp_path / f"texts.{kind}", RECORDS), Columns())
    assert found.texts == [record["text"] for record in RECORDS]
    assert found.labels == ["007", "8", "007", "8"]
    assert found.prompts == [record["prompt"] for record in RECORDS]
    assert found.documents == ["a", "a", "b", "b"]
    only = [{"said": record["text"], "who": record["label"]} for record in RECORDS]
    found = read(written(tmp_path / f"fewer.{kind}", only), Columns(text="said", label="who"))
    assert (found.texts, found.prompts, found.documents) == ([record["text"] for record in RECORDS], None, None)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("column", "option"), [("text", "--text-key"), ("label", "--label-key")])
def test_a_missing_column_is_named_with_the_option_that_sets_it(tmp_path, kind, column, option):
    path = written(tmp_path / f"texts.{kind}", [{k: v for k, v in one.items() if k != column} for one in RECORDS])
    with pytest.raises(UserError, match=rf"{column}.*{option}"):
        read(path, Columns())


def test_a_column_that_was_asked_for_and_is_not_there_is_a_mistake(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,question\none,x,q\ntwo,y,q\n")
    assert read(path, Columns(prompt="question")).prompts == ["q", "q"]
    assert read(path, Columns()).prompts is None
    with pytest.raises(UserError, match="no column 'qestion': set --prompt-key"):
        read(path, Columns(prompt="qestion"))
    with pytest.raises(UserError, match="no column 'essay': set --document-key"):
        read(path, Columns(document="essay"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"text", "ends in none of .parquet, .jsonl, .csv"),
        ("a.csv", b"", "cannot be read"),
        ("a.csv", b"text,label\n", "no texts"),
        ("a.csv", b"text,label\na,b\nonly one\n", "cannot be read"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", "UTF-8"),
        ("a.parquet", b"PAR1 not at all", "give a whole Parquet file"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a", "label": null}\n', "line 1: field 'label' is None"),
        ("a.jsonl", b'{"text": "a", "label": "b", "prompt": "p"}\n{"text": "a", "label": "b"}\n', "line 2: other texts have"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": "a", "label": "b", "prompt": "p"}\n', "line 2: other texts have"),
        ("a.jsonl", b"[1]\n", "line 1: no text in field 'text'"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        read(tmp_path / name, Columns())
    assert "\n" not in str(refused.value)


# --- side by side -----------------------------------------------------------------------------------------------------


def labelled(rows, prompts=True, documents=True):
    """Rows of (text, label, prompt, document)."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Labelled(columns[0], columns[1], columns[2] if prompts else None, columns[3] if documents else None, "")


def comparison(found, side):
    labels = [found.labels[n] for n in side.index]
    return attribution.Comparison("t", np.array(side.index), labels, side.prompts, side.documents, whole=side.whole)


SHORT = st.text(alphabet="ab ", max_size=3)
ROWS = st.lists(
    st.tuples(SHORT, st.sampled_from("xyz"), st.sampled_from("pqrst"), st.sampled_from("1234")), min_size=1, max_size=40
)


@given(ROWS, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_chance_is_one_in_k_and_no_wording_is_on_two_sides_whatever_the_texts(rows, prompts, documents, random):
    found = labelled(rows, prompts, documents)
    try:
        side = matched(found)
    except UserError:
        return
    comparison(found, side)  # which refuses classes that have not equally many texts at every prompt
    for column in (
        [found.texts[n].strip() or n for n in side.index],
        found.documents and [found.documents[n] for n in side.index],
    ):
        for one, other in itertools.combinations(range(len(side.index)), 2):
            if column and column[one] == column[other]:
                assert side.documents[one] == side.documents[other]
    order = list(range(len(rows)))
    random.shuffle(order)
    turned = matched(found.part(order))
    seen, again = (
        sorted((one.texts[n], one.labels[n], prompt, document) for n, prompt, document in zip(*of, strict=True))
        for one, of in (
            (found, (side.index, side.prompts, side.documents)),
            (found.part(order), (turned.index, turned.prompts, turned.documents)),
        )
    )
    assert seen == again


def test_at_each_prompt_every_class_keeps_as_many_as_the_fewest_have():
    rows = [(f"{label}{n}", label, "full", "1") for label, count in (("x", 3), ("y", 2)) for n in range(count)]
    side = matched(labelled([*rows, ("alone", "x", "half", "2")]))
    assert sorted(rows[n][1] for n in side.index) == ["x", "x", "y", "y"]
    assert side.notes == ["2 of 6 texts are left out, so that every label has equally many to compare"]
    assert not side.whole


def test_prompts_of_one_label_alone_are_refused_and_nothing_to_compare_too():
    with pytest.raises(UserError, match="no prompt has texts of every label"):
        matched(labelled([("a", "x", "p", "1"), ("b", "y", "q", "2")]))
    with pytest.raises(UserError, match="two or more"):
        matched(labelled([("a", "x", "p", "1"), ("b", "x", "q", "2")]))


def test_what_is_not_known_is_warned_of():
    rows = [(f"{label}{n}", label, "", "") for label in "xy" for n in range(3)]
    said = " / ".join(matched(labelled(rows, False, False)).notes)
    assert "the prompt may be what is recognised" in said
    assert "every text counts as a document" in said


def test_documents_of_one_label_are_matched_whole_and_of_several_take_the_place_of_prompts():
    rows = [
        (f"{label}{d}{n}", label, "", f"{label}{d}")
        for label, sizes in (("x", (3, 2, 4)), ("y", (1, 5)))
        for d in range(len(sizes))
        for n in range(sizes[d])
    ]
    found = labelled(rows, prompts=False)
    side = matched(found)
    assert len(set(side.prompts)) == 2
    for prompt in set(side.prompts):
        at = [side.index[n] for n in range(len(side.index)) if side.prompts[n] == prompt]
        assert {rows[n][1] for n in at} == {"x", "y"}
        assert len({rows[n][3] for n in at}) == 2, "one document of each class"
    assert side.whole
    shared = labelled([(text, label, "", document[1]) for text, label, _, document in rows], prompts=False)
    side = matched(shared)
    assert side.whole, "texts of one document are alike"
    assert side.prompts == [shared.documents[n] for n in side.index]


def test_paragraphs_of_one_essay_go_together_and_answers_to_one_question_do_not():
    rows = [(f"{label}{d}{n}", label, f"q{d}", f"{label}{d}") for label in "xy" for d in range(5) for n in range(3)]
    assert matched(labelled(rows)).whole
    assert not matched(labelled(rows, documents=False)).whole
    assert not matched(labelled(rows[::3])).whole, "one text of each"


def test_a_stray_document_that_two_labels_share_costs_no_other():
    rows = [(f"text {n}", "xy"[n % 2], "", str(n)) for n in range(40)]
    side = matched(labelled([*rows, ("another", "y", "", "0")], prompts=False))
    assert len(side.index) >= 40


def test_of_very_many_texts_at_a_prompt_some_are_kept():
    rows = [(f"{label} {n}", label, f"q{d}", "") for label in "xy" for d in range(2) for n in range(150)]
    side = matched(labelled(rows, documents=False))
    assert len(side.index) == 2 * 2 * 100
    assert "200 of 600 texts are left out" in " / ".join(side.notes)


def test_equal_texts_of_two_documents_are_told_of_and_stay_on_one_side():
    rows = [(f"{label} writes {n}", label, f"p{n}", f"{n}") for label in "xy" for n in range(6)]
    rows[1] = (" x writes 0\n", *rows[1][1:])
    rows[2] = ("", *rows[2][1:])
    rows[3] = (" ", *rows[3][1:])
    side = matched(labelled(rows))
    assert side.notes == ["equal texts stand in several documents: 1 of 6 are counted with another, on one side of the split"]
    assert len(set(side.documents)) == 5
    document = dict(zip(side.prompts, side.documents, strict=True))
    assert document["p0"] == document["p1"]


# --- the test of whole documents --------------------------------------------------------------------------------------


def test_labels_of_whole_documents_are_permuted_as_enumeration_says():
    random = default_rng(0)
    labels, prompts = np.tile(np.repeat([0, 1, 2], 2), 3), np.repeat([0, 1, 2], 6)
    predicted = np.where(random.random(18) < 0.6, labels, random.integers(3, size=18))
    hits = []
    for perms in itertools.product(itertools.permutations(range(3)), repeat=3):
        hits.append(sum(predicted[n] == perms[prompts[n]][labels[n]] for n in range(18)))
    expected = np.mean(np.array(hits) >= np.sum(predicted == labels))
    found = stats.whole_permutation_p(predicted, labels, prompts, default_rng(1), 9_999)
    assert found == pytest.approx(expected, abs=5 * np.sqrt(expected / 9_999))


def test_texts_alike_within_a_document_are_no_fingerprint():
    """Ten texts of a document get one class, at random: text by text that looks like evidence, and is none."""
    labels, prompts = np.tile(np.repeat([0, 1], 10), 30), np.repeat(np.arange(30), 20)
    whole, single = [], []
    for seed in range(200):
        random = default_rng(seed)
        predicted = np.repeat(random.integers(2, size=60), 10)
        whole.append(stats.whole_permutation_p(predicted, labels, prompts, random, 199))
        single.append(stats.permutation_p(predicted, labels, prompts, random, 199))
    assert np.mean(np.array(single) <= 0.05) > 0.15
    assert np.mean(np.array(whole) <= 0.05) < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / 200)
