"""Classifiers in folders: the same probabilities when read again, and one line for whatever else such a folder holds."""

import json
import pickle

import numpy as np
import pytest
from numpy.random import default_rng

from natfp_jax import classify, config, files, ladder
from natfp_jax.calibration import Calibration
from natfp_jax.errors import UserError
from natfp_jax.language_models import LanguageModels
from natfp_jax.reader import Reader
from natfp_jax.stored import Stored, load, save
from natfp_jax.tokenizer import Tokenizer

SETTINGS = config.Attribution(regularisation=(0.01, 0.1))
COUNTED = ("subwords", "words", "ngrams")
NEURAL = (("lm", 3), ("transformer", 3))


def sources(classes, texts, seed=0, strength=0.8):
    random = default_rng(seed)
    chances = np.exp(strength * random.normal(size=(classes, 40))) / np.arange(1, 41)
    names = np.array([f"w{i}é" for i in range(40)])
    drawn = [" ".join(names[random.choice(40, 20, p=row / row.sum())]) for row in chances for _ in range(texts)]
    return drawn, np.repeat(np.arange(classes), texts)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(sources(3, 50)[0]), 300)


@pytest.fixture(scope="module")
def fitted(tokenizer):
    """kind, classes → a classifier, and what it said of new texts when it was judged."""
    made = {}

    def one(kind, classes=3):
        if (kind, classes) in made:
            return made[kind, classes]
        texts, labels = sources(classes, 60)
        part = np.tile(np.repeat(["training", "validation", "test"], (30, 10, 20)), classes)
        if kind in COUNTED:
            masks = [part == name for name in ("training", "validation", "test")]
            task = ladder.Task("t", np.arange(len(texts)), labels, *masks, tried_N=np.ones(len(texts), bool))
            judged = ladder.prepare(kind, texts, tokenizer).judge(task, SETTINGS)
            classifier, said = judged.classifier, judged.probabilities_NK
        else:
            # Weights as if they had been learnt: what is stored does not depend on how.
            small = {"width": 16, "heads": 2, "layers": 1, "tokens": 8, "epochs": 1, "batch": 64}
            estimator = (LanguageModels if kind == "lm" else Reader)(tokenizer, **small)
            estimator.classes_, random = np.arange(classes), default_rng(0)
            weights = {path: random.normal(size=spec.shape).astype(np.float32) for path, spec in estimator._specs().items()}
            state = {"classes": np.arange(classes), "scale": np.float64(0.3), "tokens": np.int64(8)}
            state |= {f"params/{path}": leaf for path, leaf in weights.items()}
            classifier = type(estimator).from_state(state, tokenizer=tokenizer, **small)
            said = classifier.predict_proba([texts[n] for n in np.flatnonzero(part == "test")])
        made[kind, classes] = classifier, [texts[n] for n in np.flatnonzero(part == "test")], said
        return made[kind, classes]

    return one


@pytest.fixture
def stored(fitted, tokenizer):
    def one(kind, classes=3, scale=1.0):
        calibration = Calibration([np.arange(5.0) - k for k in range(classes)], {"others/ü": np.array([0.5, -1e-3])})
        names = ("zebra", "ü b", "[bold]")[:classes]
        return Stored(kind, names, fitted(kind, classes)[0], tokenizer, scale, calibration, {"from": "ü"})

    return one


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("classes", [2, 3])
def test_what_was_judged_is_a_classifier_from_texts_with_the_same_probabilities(fitted, kind, classes):
    classifier, texts, said = fitted(kind, classes)
    assert (classifier.predict_proba(texts) == said).all()
    assert classifier.predict_proba(["", "never seen"]).shape == (2, classes)


@pytest.mark.parametrize(("kind", "classes"), [*((kind, classes) for kind in COUNTED for classes in (2, 3)), *NEURAL])
def test_what_is_read_again_is_bitwise_the_same(stored, fitted, tmp_path, kind, classes):
    one, texts = stored(kind, classes, scale=0.7), [*fitted(kind, classes)[1], "", "never seen \N{GRINNING FACE}"]
    save(tmp_path / "c", one)
    again = load(tmp_path / "c")
    assert (again.predict_proba(texts) == one.predict_proba(texts)).all()
    assert (again.kind, again.classes, again.scale, again.record) == (one.kind, one.classes, one.scale, one.record)
    assert all((a == b).all() for a, b in zip(again.calibration.own, one.calibration.own, strict=True))
    assert list(again.calibration.strangers) == ["others/ü"]
    assert (again.calibration.strangers["others/ü"] == [0.5, -1e-3]).all()
    assert again.predict_proba([]).shape == (0, classes)
    with pytest.raises(UserError, match="has a classifier"):
        save(tmp_path / "c", one)
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".json", ".npz"}


def test_equal_classifiers_are_equal_files(stored, tmp_path):
    for name in "ab":
        save(tmp_path / name, stored("subwords"))
    assert files.manifest(tmp_path / "a") == files.manifest(tmp_path / "b")


# --- what is refused --------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def resealed(folder, arrays=None, **fields):
    """What someone who knows the format can make of it."""
    record = files.read_json(folder / "classifier.json")
    if arrays is not None:
        with np.load(folder / "arrays.npz") as read:
            held = dict(read)
        np.savez(folder / "arrays.npz", **{k: v for k, v in {**held, **arrays}.items() if v is not None})
    record = {**record, **fields, "files": {**files.manifest(folder, record["files"]), **fields.get("files", {})}}
    files.write_json(folder / "classifier.json", record)


def refused(folder):
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["classifier.json", "arrays.npz", "tokenizer.json"])
def test_a_missing_or_changed_file_is_one_line(stored, tmp_path, name):
    for kind in ("missing", "flipped", "empty"):
        folder = tmp_path / kind
        save(folder, stored("subwords"))
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if kind != "missing":
            (folder / name).write_bytes(b"" if kind == "empty" else data[:60] + bytes([data[60] ^ 1]) + data[61:])
        assert "give another" in refused(folder)


@pytest.mark.parametrize(
    ("kind", "arrays"),
    [
        ("subwords", {"coef": np.full((3, 40), np.nan)}),
        ("subwords", {"coef": np.zeros((3, 7))}),
        ("subwords", {"intercept": np.zeros(2)}),
        ("subwords", {"ids": None}),
        ("subwords", {"ids": np.array([3, 3])}),
        ("subwords", {"ids": np.array([], np.int64)}),
        ("subwords", {"ids": np.array([10**9])}),
        ("subwords", {"own/0": np.array([np.inf])}),
        ("subwords", {"own/2": None}),
        ("subwords", {"strangers/0": np.zeros((2, 2))}),
        ("subwords", {"coef": np.zeros((3, 1), complex)}),
        ("words", {"words": np.frombuffer(b"\xff\xfe", np.uint8)}),
        ("words", {"words": np.array([300], np.uint16)}),
        ("ngrams", {"columns": np.array([classify.COLUMNS])}),
        ("ngrams", {"columns": np.array([-1, 2])}),
        ("lm", {"state/params/0/embedding": np.zeros((2, 2), np.float32)}),
        ("lm", {"state/classes": np.array([0, 1])}),
        ("transformer", {"state/params/class": None}),
        ("transformer", {"state/tokens": np.int64(0)}),
    ],
)
def test_weights_that_do_not_fit_together_are_one_line(stored, tmp_path, kind, arrays):
    save(tmp_path / "c", stored(kind))
    resealed(tmp_path / "c", arrays)
    assert "no classifier of this program" in refused(tmp_path / "c")


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"kind": "forest"},
        {"kind": ["subwords"]},
        {"kind": "words"},
        {"classes": ["a", "b"]},
        {"classes": ["a", "a", "b"]},
        {"classes": [1, 2, 3]},
        {"classes": None},
        {"scale": -1.0},
        {"scale": "1"},
        {"settings": {}},
        {"settings": {"C": "much"}},
        {"strangers": ["a", "b"]},
        {"files": {"../../secret": {"bytes": 1, "sha256": ""}}},
    ],
)
def test_a_record_that_makes_no_sense_is_one_line(stored, tmp_path, fields):
    save(tmp_path / "c", stored("subwords"))
    resealed(tmp_path / "c", **fields)
    assert "no classifier of this program" in refused(tmp_path / "c")


@pytest.mark.parametrize("settings", [{"width": 10**9}, {"heads": 0}, {"batch": 0}, {"no_such": 1}, {"layers": "two"}])
def test_settings_of_a_network_that_make_no_sense_are_one_line(stored, tmp_path, settings):
    save(tmp_path / "c", stored("transformer"))
    record = files.read_json(tmp_path / "c" / "classifier.json")
    resealed(tmp_path / "c", settings={**record["settings"], **settings})
    refused(tmp_path / "c")


def test_nothing_is_unpickled(stored, tmp_path):
    """Neither an array of objects nor a pickle in place of the arrays."""
    trap = tmp_path / "sprung"
    save(tmp_path / "a", stored("subwords"))
    resealed(tmp_path / "a", {"coef": np.array([Evil(trap)], dtype=object)})
    refused(tmp_path / "a")
    save(tmp_path / "b", stored("subwords"))
    (tmp_path / "b" / "arrays.npz").write_bytes(pickle.dumps(Evil(trap)))
    resealed(tmp_path / "b")
    refused(tmp_path / "b")
    assert not trap.exists()


def test_another_program_s_folder_is_one_line(tmp_path):
    assert "has no classifier.json" in refused(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps({"model": "mine"}))
    assert "seal" in refused(tmp_path)
