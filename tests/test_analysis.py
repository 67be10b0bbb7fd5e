"""What attribution.json says of a whole study, beside what each number is tested for on its own."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from natfp_jax import attribution, config, files, mesh, stages
from natfp_jax.config import Attribution, Corpus, Data, Experiment, Factor, Model, Sampling, Stories, Study
from natfp_jax.errors import UserError
from natfp_jax.progress import Progress
from natfp_jax.report import report
from natfp_jax.stages import Work
from natfp_jax.study import comparisons

STUDY = Study(
    name="levels",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=600), vocabulary=300, validation_fraction=0.05, prompt_fraction=0.4, shards=2),
        model=Model(width=32, layers=1, heads=2),
        data=Data(seq_len=32, windows=64, epochs=1, batch=8),
    ),
    factors=(Factor("seeds.init", (0, 1, 2, 3, 4)),),
    sampling=Sampling(prompts=150, prompt_chars=20, new_tokens=8, batch=64, checkpoints=(0.0, 1.0)),
    attribution=Attribution(classifiers=("subwords", "ngrams", "transformer"), learning_curve=(0.25,), bootstraps=999),
)
ALL = STUDY.attribution.classifiers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study, done, and what its report says."""
    made = Work(STUDY, tmp_path_factory.mktemp("analysis"), Progress(quiet=True))
    made.devices = mesh.make(config.Mesh(), jax.devices()[:1])
    with made.claimed():
        for stage in ("corpus", "train", "sample", "attribute"):
            getattr(made, stage)()
        return made, report(made)


def test_levels_in_general_are_of_all_pairs_from_five_levels_on(finished):
    _, summary = finished
    assert {(row["checkpoint"], row["classifier"]) for row in summary["levels"]} == {
        (step, kind) for step in (0, 8) for kind in ("subwords", "ngrams")
    }
    for row in summary["levels"]:
        pairs = [
            one
            for one in summary["comparisons"]
            if one["factor"] == "init" and len(one["classes"]) == 2
            if (one["checkpoint"], one["classifier"]) == (row["checkpoint"], row["classifier"])
        ]
        assert (row["levels"], row["pairs"]) == (5, len(pairs)) == (5, 10)
        for name, bounds in (("accuracy", "ci95"), ("ceiling", "ceiling_ci95")):
            assert row[name] == pytest.approx(np.mean([one[name] for one in pairs]))
            assert row[bounds][0] <= row[name] <= row[bounds][1]


def test_networks_judge_what_the_answer_rests_on_and_the_others_judge_everything(finished):
    _, summary = finished
    of = {
        kind: {(row["name"], row["checkpoint"]) for row in summary["comparisons"] if row["classifier"] == kind} for kind in ALL
    }
    assert of["subwords"] == of["ngrams"] == {(one.name, one.step) for one in comparisons(STUDY)}
    assert of["transformer"] == {(name, step) for name in ("init (pooled)", "null of init0") for step in (0, 8)}
    assert all(row["telling"] == {} for row in summary["comparisons"] if row["classifier"] == "transformer")


def test_a_learning_curve_ends_in_the_comparison_itself(finished):
    _, summary = finished
    curves = {}
    for row in summary["curves"]:
        curves.setdefault((row["name"], row["checkpoint"], row["classifier"]), []).append(row)
    assert {(name, step) for name, step, _ in curves} == {("init (pooled)", 8)}
    for (name, step, kind), points in curves.items():
        (whole,) = (
            row for row in summary["comparisons"] if (row["name"], row["checkpoint"], row["classifier"]) == (name, step, kind)
        )
        few, all_ = sorted(points, key=lambda row: row["training_texts"])
        assert few["training_texts"] < 0.5 * all_["training_texts"]
        assert few["test_texts"] == whole["test_texts"]
        assert {name: whole[name] for name in all_} == all_


def test_what_each_classifier_cost_is_told(finished):
    _, summary = finished
    for kind in STUDY.attribution.classifiers:
        cost = summary["stages"][f"attribute by {kind}"]
        assert cost["seconds"] > 0
        rows = [row for row in [*summary["comparisons"], *summary["curves"]] if row["classifier"] == kind]
        curve = sum(row["training_texts"] + row["test_texts"] for row in rows if "p_value" not in row)
        whole = sum(row["training_texts"] + row["test_texts"] for row in rows if "p_value" in row)
        last = sum(
            row["training_texts"] + row["test_texts"]
            for row in rows
            if "p_value" in row and row["checkpoint"] == 8 and row["name"] == "init (pooled)"
        )
        assert cost["texts"] == whole + curve - last  # the last point of a curve is the comparison itself


def test_what_is_analysed_is_not_analysed_again(finished, monkeypatch):
    made, _ = finished
    path = made.folder / "attribution.json"
    before = path.stat().st_mtime_ns
    made.attribute()
    assert path.stat().st_mtime_ns == before
    # Another version of the analysis makes it anew.
    monkeypatch.setattr(stages, "_RECIPE", 0)
    monkeypatch.setattr(stages.Analysis, "made", lambda self, *_: {"comparisons": []})
    whole = path.read_bytes()
    made.attribute()
    assert files.read_json(path)["comparisons"] == []
    path.write_bytes(whole)


def test_other_settings_are_another_study(finished):
    made, _ = finished
    other = Work(replace(STUDY, attribution=replace(STUDY.attribution, learning_curve=())), made.out, Progress(quiet=True))
    other.devices = made.devices
    with pytest.raises(UserError, match=r"attribution\.learning_curve"), other.claimed():
        pass


def test_a_part_to_learn_from_that_is_too_small_is_a_clear_mistake():
    few = replace(STUDY.attribution, learning_curve=(0.001,))
    comparison = attribution.Comparison("few", np.arange(300), ["a", "b"] * 150, *[[str(n // 2) for n in range(300)]] * 2)
    with pytest.raises(UserError, match=r"of 0\.001 of the documents .*attribution\.learning_curve"):
        attribution.task(comparison, few, 0.001)
