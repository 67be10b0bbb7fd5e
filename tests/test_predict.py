"""Verdicts on single texts: what is promised of them holds for sources whose truth is known."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.random import default_rng
from scipy.special import log_softmax
from scipy.stats import binom

from natfp_jax import attribution, cli, config, elsewhere, files, ladder
from natfp_jax.calibration import ABSTAINS, NONE, Calibration, best_scale, conformal_p, log_loss, log_odds, rescaled
from natfp_jax.errors import UserError

SETTINGS = config.Attribution(regularisation=(0.1,))


def most(count, rate):
    """More hits have a probability below one in a thousand where each has at most `rate`."""
    return binom.ppf(0.999, count, rate)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_the_best_scale_undoes_a_known_one():
    random = default_rng(0)
    score_NK = 2 * random.normal(size=(20_000, 3))
    label_N = np.array([random.choice(3, p=row) for row in np.exp(log_softmax(score_NK, axis=1))])
    assert best_scale(3 * score_NK, label_N) == pytest.approx(1 / 3, rel=0.05)
    assert log_loss(best_scale(3 * score_NK, label_N) * 3 * score_NK, label_N) <= log_loss(score_NK, label_N)
    sure = np.eye(3)[label_N]
    assert best_scale(sure, label_N) > 20, "nothing tells against it"
    assert best_scale(sure, label_N, doubt=0.03) < 10


def test_log_odds_stay_apart_where_probabilities_are_all_but_one():
    probability_NK = np.array([[1.0, 1e-20], [1.0, 1e-30], [0.25, 0.75], [1.0, 0.0]])
    odds_NK = log_odds(probability_NK)
    assert odds_NK[1, 0] > odds_NK[0, 0] + 20
    assert odds_NK[2].tolist() == pytest.approx([-np.log(3), np.log(3)])
    assert np.isfinite(odds_NK).all()
    assert (rescaled(probability_NK, 1) == probability_NK).all()


def test_p_values_of_exchangeable_scores_are_not_too_small_for_any_distribution():
    random = default_rng(0)
    for draw in (
        random.normal,
        lambda size: np.round(random.gamma(0.3, size=size), 1),
        lambda size: random.integers(2, size=size),
    ):
        p = np.array([conformal_p(scores[:1], scores[1:])[0] for scores in (draw(size=20) for _ in range(2000))])
        for rate in (0.05, 0.1, 0.5):
            assert (p <= rate).sum() <= most(2000, rate)
    assert conformal_p([0.0, 1.0, 9.0], [1.0, 2.0, 3.0]).tolist() == [0.25, 0.5, 1.0]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judge(odds):
    """Calibrated probabilities of two classes with the log-odds of the first."""
    p = 1 / (1 + np.exp(-np.asarray(odds, dtype=float)))
    return np.column_stack([p, 1 - p])


def test_a_verdict_is_a_class_none_or_no_opinion():
    own = [np.linspace(1, 5, 99), np.linspace(1, 5, 99)]
    texts = judge([4, -4, 0, 6])
    stranger = {"o": np.linspace(0, 0.3, 99)}
    assert Calibration(own, {}).verdicts(texts, 0.05).tolist() == [0, 1, ABSTAINS, 0], "without strangers never none"
    assert Calibration(own, stranger).verdicts(texts, 0.05).tolist() == [0, 1, NONE, NONE], "too typical by far"
    assert Calibration(own, {"o": np.linspace(0, 1, 99)}).verdicts(texts, 0.05).tolist() == [ABSTAINS, ABSTAINS, NONE, NONE]
    near = [np.linspace(-5, 5, 99)] * 2
    assert Calibration(near, stranger).verdicts(judge([0, 1]), 0.05).tolist() == [ABSTAINS] * 2, "both classes are plausible"


def test_how_typical_a_text_is_has_the_size_that_it_claims():
    random = default_rng(0)
    for _ in range(3):
        odds = random.normal(size=(2000, 40))
        p = np.array([Calibration([row[1:], row[1:]], {}).typical(judge(row[:1]))[0, 0] for row in odds])
        for rate in (0.05, 0.2, 0.5):
            assert (p <= rate).sum() <= most(2000, rate)
    assert Calibration([np.arange(9.0)] * 2, {}).typical(judge([-1, 4, 9]))[:, 0].tolist() == pytest.approx([0.2, 1.0, 0.2])


def test_a_rate_that_cannot_be_promised_says_how_many_texts_would_do():
    few = Calibration([np.zeros(99), np.zeros(60)], {})
    with pytest.raises(UserError, match=r"0\.01 needs 99 held-out texts of each source.* with 60"):
        few.verdicts(judge([0]), 0.01)
    Calibration([np.zeros(99)] * 2, {}).verdicts(judge([0]), 0.01)
    with pytest.raises(UserError, match=r"of each source.* with 19"):
        Calibration([np.zeros(99)] * 2, {"o": np.zeros(19)}).verdicts(judge([0]), 0.01)
    for rate in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="above 0 and below 1"):
            few.verdicts(judge([0]), rate)


# --- from texts to verdicts -------------------------------------------------------------------------------------------

NAMES = np.array([f"w{i}" for i in range(60)])


def chances(random, sources, strength):
    found = np.exp(strength * random.normal(size=(sources, 60))) / np.arange(1, 61)
    return found / found.sum(axis=1, keepdims=True)


def apart(sources):
    """Sources of which each prefers words of its own."""
    found = np.where(np.arange(60) % sources == np.arange(sources)[:, None], 6, 1) / np.arange(3, 63)
    return found / found.sum(axis=1, keepdims=True)


def texts_of(random, p, count, length=30):
    return [" ".join(row) for row in random.choice(NAMES, (count, length), p=p)]


def made(random, chance_KV, each, others=()):
    """A classifier of words of paired texts of all sources, and its calibration."""
    classes = len(chance_KV)
    texts = [text for p in chance_KV for text in texts_of(random, p, each)]
    documents = [str(n) for _ in range(classes) for n in range(each)]
    labels = np.repeat(list("abcdef"[:classes]), each).tolist()
    comparison = attribution.Comparison("t", np.arange(len(texts)), labels, documents, documents)
    rung = ladder.prepare("words", texts, None)
    judged = rung.judge(attribution.task(comparison, SETTINGS), SETTINGS)
    strangers = {f"o{n}": texts_of(random, p, 200) for n, p in enumerate(others)}
    scale, calibration = elsewhere.calibrated(rung, judged.classifier, comparison, texts, SETTINGS, strangers)
    return (lambda some: rescaled(judged.classifier.predict_proba(some), scale)), judged.classifier, calibration


def test_the_rate_of_false_accusations_is_kept_for_known_sources_and_for_a_stranger_set_aside():
    """Fresh texts, new sources each time; each repetition is one draw of the rate, so it is bounded as a mean of draws."""
    rate, known, unknown, none, right = 0.1, [], [], [], []
    for seed in range(40):
        random = default_rng(seed)
        chance_KV = chances(random, 3, 0.6)
        said, _, calibration = made(random, chance_KV[:2], 200, others=chance_KV[2:])
        for k in range(2):
            verdict_N = calibration.verdicts(said(texts_of(random, chance_KV[k], 100)), rate)
            known.append(np.mean((verdict_N >= 0) & (verdict_N != k)))
            none.append(np.mean(verdict_N == NONE))
            right.append(np.mean(verdict_N == k))
        unknown.append(np.mean(calibration.verdicts(said(texts_of(random, chance_KV[2], 100)), rate) >= 0))
    for found in (known, unknown, none):
        assert np.mean(found) <= rate + 3.1 * np.std(found) / np.sqrt(len(found))
    assert np.mean(unknown) > rate / 4, "the rate is used, and not undercut by far"
    assert np.mean(right) > 0.1


def test_clearly_different_sources_are_named_rightly():
    random = default_rng(0)
    chance_KV = chances(random, 2, 1.2)
    said, _, calibration = made(random, chance_KV, 500)
    for k in range(2):
        verdict_N = calibration.verdicts(said(texts_of(random, chance_KV[k], 300)), 0.02)
        assert np.mean(verdict_N == k) > 0.9
        assert (verdict_N != NONE).all()


def test_of_three_sources_each_is_a_stranger_to_a_classifier_of_the_others():
    """So that a source that nobody has seen is accused far more rarely than without, and clear ones are still named."""
    shut, opened = [], []
    for seed in range(16):
        random = default_rng(seed)
        chance_KV = chances(random, 4, 1.0)
        said, _, calibration = made(random, chance_KV[:3], 300)
        assert list(calibration.strangers) == list("abc")
        fresh = said(texts_of(random, chance_KV[3], 100))
        opened.append(np.mean(calibration.verdicts(fresh, 0.05) >= 0))
        shut.append(np.mean(Calibration(calibration.own, {}).verdicts(fresh, 0.05) >= 0))
    assert np.mean(opened) < np.mean(shut) / 3
    random = default_rng(0)
    said, _, calibration = made(random, apart(5)[:4], 300)
    verdict_N = calibration.verdicts(said(texts_of(random, apart(5)[0], 300)), 0.05)
    assert np.mean(verdict_N == 0) > 0.5
    verdict_N = calibration.verdicts(said(texts_of(random, apart(5)[4], 300)), 0.05)
    assert (verdict_N >= 0).sum() <= most(300, 0.05)
    assert np.mean(verdict_N == NONE) > 0.5


def test_probabilities_are_as_often_right_as_they_say_and_no_worse_than_before():
    random = default_rng(1)
    chance_KV = chances(random, 3, 0.3)
    said, classifier, _ = made(random, chance_KV, 600)
    texts, label_N = [text for p in chance_KV for text in texts_of(random, p, 1000)], np.repeat(np.arange(3), 1000)
    probability_NK = said(texts)
    top_N, right_N = probability_NK.max(axis=1), probability_NK.argmax(axis=1) == label_N
    for some in np.array_split(np.argsort(top_N), 6):
        expected, count = top_N[some].mean(), len(some)
        # The fit itself is a sample of 360 texts a class, which moves probabilities by some hundredths.
        assert abs(right_N[some].mean() - expected) < 0.05 + 3 * np.sqrt(expected * (1 - expected) / count)
    loss_2N = [-np.log(p[np.arange(3000), label_N]) for p in (probability_NK, classifier.predict_proba(texts))]
    worse_N = loss_2N[0] - loss_2N[1]
    assert worse_N.mean() < 3 * worse_N.std() / np.sqrt(3000)


# --- the command line -------------------------------------------------------------------------------------------------


def natfp(*args, code="from natfp_jax.cli import main; main()"):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=kept, check=False)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command in this process, which must end with 2, and returns its one line on standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["natfp", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert (ended.value.code, captured.out) == (2, "")
        said = [line for line in captured.err.splitlines() if line.startswith("natfp: ")]
        assert len(said) == 1
        assert "Traceback" not in captured.err
        return said[0]

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of three sources in a file, and what `natfp attribute` made of them."""
    path = tmp_path_factory.mktemp("texts")
    random = default_rng(0)
    rows = [{"text": text, "model": name} for p, name in zip(apart(3), "abo", strict=True) for text in texts_of(random, p, 250)]
    (path / "t=1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh = [row["text"] for row in rows[:30]]
    (path / "fresh.txt").write_text("\n\n".join(fresh) + "\n")
    options = ("--label-key", "model", "--others", "o", "--save", path / "saved", "--json", path / "result.json")
    done = natfp("attribute", "--texts", path / "t=1.jsonl", *options)
    assert done.returncode == 0, done.stderr
    (path / "printed").write_text(done.stdout + done.stderr)
    return path


def test_attribute_says_how_well_labelled_texts_are_told_apart(folder):
    printed = (folder / "printed").read_text()
    for word in ("a vs b", "subwords", "words", "p Holm", "not available", "warning: no prompt column"):
        assert word in printed
    result = files.read_json(folder / "result.json")
    for row in result["results"]:
        assert row["classes"] == ["a", "b"]
        assert row["accuracy"] > 0.9
        assert row["p_holm"] >= row["p_value"]
    stored = files.read_json(folder / "saved" / "words" / "classifier.json")["record"]
    assert stored["texts"] == {"file": "t=1.jsonl", "sha256": files.hash_file(folder / "t=1.jsonl"), "others": "o"}
    assert stored["result"]["accuracy"] == result["results"][1]["accuracy"]


def test_predict_names_sources_without_jax(folder):
    code = "import sys\nfrom natfp_jax.cli import main\nmain()\nassert 'jax' not in sys.modules"
    given = ("predict", folder / "saved" / "subwords", folder / "fresh.txt", "--false-accusations", "0.05")
    done = natfp(*given, "--json", folder / "said.json", "--out", folder / "said.parquet", code=code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a stranger was set aside, so there is nothing to warn of"
    said, table = files.read_json(folder / "said.json"), pq.read_table(folder / "said.parquet").to_pylist()
    assert [row["text"] for row in table] == (folder / "fresh.txt").read_text().strip().split("\n\n")
    assert [row["class"] for row in said["texts"]] == [row["class"] for row in table]
    assert sum(row["class"] == "a" for row in table) > 15
    assert all(sum(dict(row["probabilities"]).values()) == pytest.approx(1) for row in table)
    assert all((row["class"] is None) == (row["verdict"] != "accused") for row in table)


def test_what_predict_and_attribute_refuse_is_one_line(refused, folder, tmp_path):
    texts, words = folder / "t=1.jsonl", folder / "saved" / "words"
    assert "got neither, expected one" in refused("attribute")
    assert "expected one" in refused("attribute", "study.py", "--texts", texts)
    assert "give --texts FILE in its place" in refused("attribute", "study.py", "--save", tmp_path)
    assert "options of a STUDY" in refused("attribute", "--texts", texts, "--out", tmp_path)
    assert "set --label-key" in refused("attribute", "--texts", texts)
    assert "classifiers: got ('trees',)" in refused("attribute", "--texts", texts, "--classifiers", "trees")
    assert "is there already" in refused("attribute", "--texts", texts, "--label-key", "model", "--save", folder / "saved")
    assert "no text has this label" in refused("attribute", "--texts", texts, "--label-key", "model", "--others", "zebra")
    assert "needs 9999 held-out texts" in refused("predict", words, folder / "fresh.txt", "--false-accusations", "0.0001")
    assert "has no classifier.json" in refused("predict", tmp_path, folder / "fresh.txt")
    assert "is no file: give" in refused("predict", words, tmp_path / "none.txt")
    assert "does not end in .parquet" in refused(
        "predict", words, folder / "fresh.txt", "--out", tmp_path / "a.csv", "--false-accusations", "0.1"
    )
