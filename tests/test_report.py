"""The report's promises on a summary made by hand, and the status on a tree made by hand."""

import io
import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from natfp_jax import courses as curves
from natfp_jax import figures, files, findings, report, tables, texts
from natfp_jax.config import Attribution, Data, Experiment, Factor, Perturb, Run, Sampling, Study, to_json
from natfp_jax.errors import Damaged, UserError
from natfp_jax.lock import alone
from natfp_jax.page import markdown
from natfp_jax.runs import MetricsLog
from natfp_jax.status import status
from natfp_jax.study import arms, comparisons, decisive, draws, lacking

SMALL = Study(
    name="small",
    experiment=Experiment(data=Data(windows=6400, batch=32)),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    twin=Perturb(),
    sampling=Sampling(checkpoints=(0.1, 1.0)),
)
LARGE = replace(SMALL, factors=tuple(Factor(f"seeds.{name}", tuple(range(4))) for name in ("init", "order")))


def row(classes, accuracy=0.5, p_value=0.5, p_holm=1.0, ceiling=0.95, **fields):
    k = len(classes)
    half = math.sqrt(0.25 / 800) * 1.96
    counts = np.full((k, k), round(800 * (1 - accuracy) / max(k - 1, 1)))
    np.fill_diagonal(counts, round(800 * accuracy))
    return {
        "name": "init 0 vs 1",
        "factor": "init",
        "checkpoint": 200,
        "temperature": 1.0,
        "new_tokens": 48,
        "setting": "",
        "draws": ["a.step200.draw0", "b.step200.draw0"],
        "classifier": "subwords",
        "classes": list(classes),
        "accuracy": accuracy,
        "chance": 1 / k,
        "ci95": [accuracy - half, accuracy + half],
        "p_value": p_value,
        "p_holm": p_holm,
        "auc": accuracy,
        "bits_per_text": -0.01,
        "validation_bits": -0.02,
        "test_texts": 800 * k,
        "test_prompts": 800,
        "chosen": {"C": 0.1},
        "sign_p": p_value,
        "auc_ci95": [accuracy - half, accuracy + half],
        "share": (accuracy - 1 / k) / (ceiling - 1 / k) if ceiling > 0.5 else None,
        "share_ci95": [-0.1, 0.5] if ceiling > 0.5 else None,
        "training_texts": 1200 * k,
        "pooled": [{"texts": 4, "decisions": 200 * k, "accuracy": accuracy, "ci95": [accuracy - half, accuracy + half]}],
        "ceiling_pooled": [{"texts": 4, "decisions": 200 * k, "accuracy": ceiling, "ci95": [ceiling, ceiling]}],
        "confusion": counts.tolist(),
        "telling": {name: [" the", "|", "`", "\n"] for name in classes},
        "ceiling": ceiling,
        "ceiling_ci95": [ceiling - 0.01, ceiling + 0.01] if ceiling != 0.5 else [0.5, 0.5],
        **fields,
    }


def worded(one, classifier):
    """What is told of the wording of one comparison, one piece a class."""
    around = {"before": "…` a | b", "piece": " the", "after": "\n"}
    words = [
        {
            "piece": " the",
            "source": source,
            "used": "more",
            "log_odds": 0.5,
            "ci95": [0.25, 0.75],
            "z": 4.5,
            "stability": 0.97,
            "held_out_z": -1.25,
            "documents": 321,
            "per_10000": 12.5,
            "per_10000_elsewhere": 7.6,
            "examples": [around] * 3 if source == next(iter(one.classes)) else [],
        }
        for source in one.classes
    ]
    named = {"name": one.name, "factor": one.factor, "checkpoint": one.step, "setting": one.setting}
    found = {"tested": 1234, "stable": 17, "by_chance": 0.4, "held": 16}
    return {**named, "classifier": classifier, **found, "words": words}


def summary_of(study=SMALL, change=None, **fields):
    """A summary as `summarise` makes it, of made-up results; `change` may alter each row."""
    rows = []
    for one in comparisons(study):
        names = [draw.name for draw in one.draws]
        known = {"name": one.name, "factor": one.factor, "checkpoint": one.step, "draws": names, "setting": one.setting}
        known |= {"new_tokens": one.length, "temperature": one.draws[0].drawn_at(study.sampling)}
        found = {"ceiling": 0.5} if one.factor == "null" else {}
        if one.factor == "order":
            found = {"accuracy": 0.581, "p_value": 0.0001, "p_holm": 0.002}
        elif one.factor == "all":
            found = {"accuracy": 0.3, "p_value": 0.0001, "p_holm": 0.002}
        for classifier in study.attribution.classifiers:
            rows.append(row(one.classes, **{**known, "classifier": classifier, **found}))
    every_arm = [
        {
            "id": arm.id,
            "fingerprint": files.hash_json(arm.id),
            "differs": {f"seeds.{name}": [0, seed] for name, seed in to_json(arm.experiment.seeds).items() if seed},
            "pool": "a" * 64,
            "windows": 6400,
            "epochs": 1,
            "parameters": 700_000,
            "seeds": to_json(arm.experiment.seeds),
            "init_hash": files.hash_json([arm.experiment.seeds.init, arm.twin]),
            "order_hash": files.hash_json(arm.experiment.seeds.order),
            "final_hash": files.hash_json(arm.id),
            "val_loss": 4.25,
            "steps": 200,
            "tokens": 409_600,
            "skipped": [],
        }
        for arm in arms(study)
    ]
    made = {
        "study": study.name,
        "fingerprint": "f" * 64,
        "corpus": {"name": "docs", "sha256": "c" * 64, "tokens": 3_500_000},
        "comparisons": [(change or (lambda row: row))(row) for row in rows],
        "noise": [],
        "curves": [],
        "levels": [],
        "apart": [],
        "components": [],
        "wording": [
            worded(one, classifier) for one in decisive(comparisons(study)) for classifier in study.attribution.classifiers
        ],
        "arms": every_arm,
        "stages": {"train": {"seconds": 100.0, "tokens": 1_638_400}, "attribute": {"seconds": 5.0}},
        "numerics": {"differ": [], "train": [], "sample": []},
        "settings": {"sampling": to_json(study.sampling), "attribution": to_json(study.attribution)},
        "lacking": lacking(study),
        "inputs": {"attribution": "a", "summary": "b"},
    }
    return {**made, **fields}


NUMBER, TEXT = (int, float), str
FIELDS = {
    "study": TEXT,
    "fingerprint": TEXT,
    "corpus": dict,
    "comparisons": list,
    "noise": list,
    "curves": list,
    "levels": list,
    "apart": list,
    "components": list,
    "wording": list,
    "arms": list,
    "stages": dict,
    "numerics": dict,
}
CORPUS = {"name": TEXT, "sha256": TEXT, "tokens": int}
HASHES = dict.fromkeys(("fingerprint", "init_hash", "order_hash", "final_hash"), TEXT)
COUNTS = dict.fromkeys(("steps", "tokens", "windows", "epochs", "parameters"), int)
ARM = {"id": TEXT, "seeds": dict, "differs": dict, "pool": TEXT, "val_loss": NUMBER, "skipped": list, **COUNTS, **HASHES}
ROW = {
    **dict.fromkeys(("name", "factor", "classifier", "setting"), TEXT),
    **dict.fromkeys(("draws", "classes", "ci95"), list),
    **dict.fromkeys(("checkpoint", "test_texts", "test_prompts"), int),
    **dict.fromkeys(("accuracy", "chance", "p_value", "p_holm", "auc", "bits_per_text", "validation_bits", "ceiling"), NUMBER),
}


def check_summary(summary):
    """Every field that summary.json promises, of its type and within its range."""

    def has(value, fields):
        for name, kind in fields.items():
            assert isinstance(value[name], kind), (name, value[name])

    has(summary, FIELDS)
    has(summary["corpus"], CORPUS)
    assert summary["arms"]
    assert summary["comparisons"]
    for arm in summary["arms"]:
        has(arm, ARM)
        assert {"init", "order"} <= set(arm["seeds"])
        assert all(re.fullmatch("[0-9a-f]{64}", arm[name]) for name in HASHES)
    for one in summary["comparisons"]:
        has(one, ROW)
        assert len(one["ci95"]) == 2
        assert all(0 <= value <= 1 for value in (*one["ci95"], *(one[name] for name in ("accuracy", "ceiling", "p_holm"))))
        assert 0 < one["p_value"] <= one["p_holm"]
        assert len(one["draws"]) >= len(one["classes"]) >= 2
        assert one["chance"] == pytest.approx(1 / len(one["classes"]))
    for stage in summary["stages"].values():
        assert stage["seconds"] >= 0
    json.dumps(summary, allow_nan=False)


def rendered(table, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


# --- the summary ------------------------------------------------------------------------------------------------------


class _Run:
    def __init__(self, folder, known):
        self.metrics = folder / "metrics.jsonl"
        self.known = known  # step → record
        self.damage = None
        log = MetricsLog(self.metrics, after=-1, until=0, tensorboard=False)
        log.write(0, val_loss=7.6)
        for i in range(1, 11):
            log.write(20 * i, loss=7 - i / 5)
        log.write(200, val_loss=5)

    def records(self):
        return [self.known[step] for step in sorted(self.known)]

    def damaged_metrics(self):
        return self.damage


class _Said:
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


class _Named:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """What `report` reads of a complete study: the files are real, checkpoints and samples are stood in for."""
    made = summary_of()
    folder = tmp_path / "studies" / "small"
    files.write_json(folder / "study.json", {"fingerprint": made["fingerprint"], "study": to_json(SMALL)})
    files.write_json(folder / "timings.json", made["stages"])
    files.write_json(folder / "attribution.json", {"inputs": "1", **{name: made[name] for name in report.ANALYSES}})
    runs = {}
    for arm in made["arms"]:
        known = {
            "init_hash": arm["init_hash"],
            "order_hash": arm["order_hash"],
            "numerics": {"cpu_threads": 2},
            "before": [],
            "val_loss": 4.25,
            "skipped": [],
        }
        runs[arm["id"]] = _Run(
            tmp_path / "runs" / arm["id"],
            {step: {**known, "weights": arm["final_hash"], "step": step, "tokens": step * 2048} for step in (0, 20, 200)},
        )
    monkeypatch.setattr(report.texts, "read_record", lambda path: {"numerics": {"batch": 512}})
    return _Named(
        study=SMALL,
        folder=folder,
        arms={arm.id: arm for arm in arms(SMALL)},
        comparisons=comparisons(SMALL),
        store=_Named(meta={"name": "docs"}, sha256="c" * 64, tokens=3_500_000),
        store_of=lambda arm: _Named(pool=lambda data: None),
        tokenizer_of=lambda arm: _Named(padded_size=2048),
        published={},
        reencoded=False,
        parents={},
        parent_of=lambda arm: None,
        identities={arm["id"]: _Named(fingerprint=arm["fingerprint"], inputs={"pool": arm["pool"]}) for arm in made["arms"]},
        check_trained=lambda: None,
        progress=_Said(),
        run_of=runs.__getitem__,
        draw_paths=lambda one: [folder / "draws" / name for name in one.files(2000, 8192)],
    )


def test_the_report_is_written_once_and_again_only_if_something_changed(work):
    made = report.report(work)
    check_summary(made)
    check_summary(summary_of())  # so that the other tests test what `summarise` makes
    folder = work.folder / "report"
    names = sorted(path.name for path in folder.iterdir() if path.name != "summary.json")
    assert files.read_json(folder / "summary.json") == {**made, "files": files.manifest(folder, names)}
    page = (folder / "report.md").read_text()
    images = re.findall(r"!\[.*\]\((.*)\)", page)
    assert sorted(images) == sorted(path.name for path in folder.glob("*.png"))
    assert {"accuracies.png", "courses.png", "losses.png", "confusion-subwords.png", "confusion-words.png"} == set(images)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert report.report(work) == made
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    files.write_json(work.folder / "timings.json", {"train": {"seconds": 123.0}})
    report.report(work)
    assert "123.0" in (folder / "report.md").read_text()
    assert work.progress.lines == []


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("losses.png", True),
        ("report.md", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("confusion-words.png", False), ("report.md", True))),
    ],
)
def test_a_damaged_page_or_figure_is_told_of_and_made_anew(work, name, lost):
    report.report(work)
    folder = work.folder / "report"
    whole = (folder / name).read_bytes()
    page = (folder / "report.md").read_bytes()
    if lost:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    report.report(work)
    (told,) = work.progress.lines
    assert told.startswith(f"{folder} is damaged: {name} ")
    assert told.endswith(": the report is made anew")
    assert (folder / "report.md").read_bytes() == page
    files.verify(folder, files.read_json(folder / "summary.json")["files"])
    assert (folder / name).stat().st_size == pytest.approx(len(whole), rel=0.2)
    report.report(work)
    assert len(work.progress.lines) == 1


@pytest.mark.parametrize("name", ["attribution.json", "timings.json", "report/summary.json"])
def test_a_damaged_result_is_not_reported(work, name):
    report.report(work)
    path = work.folder / name
    path.write_bytes(path.read_bytes()[:-2] + b" \n")
    with pytest.raises(Damaged) as caught:
        report.report(work)
    assert caught.value.path == path


def test_a_damaged_log_is_told_of_and_what_is_whole_of_it_is_shown(work):
    whole = report._curves(work, report.report(work))
    run = work.run_of("init1-order0")
    run.damage = "metrics.jsonl has 11 whole lines and 1 damaged ones, expected 12 whole ones"
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join([*lines[:3], lines[3].replace(b"6", b"7", 1), *lines[4:]]))
    made = report.report(work)
    assert work.progress.lines == [f"{run.damage}: the curves show what is whole"]
    curves = report._curves(work, made)
    assert curves.pop("init1-order0") == [point for i, point in enumerate(whole.pop("init1-order0")) if i != 3]
    assert curves == whole


def test_without_an_attribution_the_user_is_told_what_to_run(work):
    (work.folder / "attribution.json").unlink()
    with pytest.raises(UserError, match="natfp attribute"):
        report.report(work)
    assert not (work.folder / "report").exists()


def test_an_attribution_of_another_version_is_a_clear_mistake(work):
    files.write_json(work.folder / "attribution.json", {"inputs": "1", "comparisons": summary_of()["comparisons"]})
    with pytest.raises(UserError, match="another version wrote it: run `natfp attribute` again"):
        report.report(work)
    rows = [{k: v for k, v in one.items() if k != "validation_bits"} for one in summary_of()["comparisons"]]
    whole = {name: summary_of()[name] for name in report.ANALYSES}
    files.write_json(work.folder / "attribution.json", {"inputs": "1", **whole, "comparisons": rows})
    with pytest.raises(UserError, match=r"lacks validation_bits, as another version wrote it"):
        report.report(work)


def test_what_follows_from_a_batch_that_was_meant_to_differ_is_no_warning(work):
    arms_of, known = work.arms, {"cpu_threads": 2, "batch": 32, "loss_block": 64}
    for name, arm in arms_of.items():
        if "init1" in name:
            data = replace(arm.experiment.data, batch=64, windows=2 * arm.experiment.data.windows)
            arms_of[name] = replace(arm, experiment=replace(arm.experiment, data=data))
        for step in (0, 20, 200):
            batch = {"batch": 64, "loss_block": 128} if "init1" in name else {}
            work.run_of(name).known[step]["numerics"] = {**known, **batch}
    assert report.summarise(work)["numerics"]["differ"] == []
    work.run_of("init0-order0").known[200]["numerics"] = {**known, "batch": 64}  # of one batch, it does not follow
    differ = report.summarise(work)["numerics"]["differ"]
    assert {"order 0 vs 1 (init 0)", "null of init0-order0"} & {one["comparison"] for one in differ}
    assert all(one["fields"] == ["batch"] for one in differ)


def test_arms_that_do_not_share_the_numerics_record_are_on_the_first_line(work):
    assert findings.headline(report.summarise(work)) == "small"
    work.run_of("init1-order0").known[200]["numerics"] = {"cpu_threads": 1}
    made = report.summarise(work)
    touched = {(one.name, one.step) for one in work.comparisons if any(d[:2] == ("init1-order0", 200) for d in one.draws)}
    assert {(one["comparison"], one["checkpoint"]) for one in made["numerics"]["differ"]} == touched
    assert {one["stage"] for one in made["numerics"]["differ"]} == {"train"}
    total = len(work.comparisons)
    for first in (markdown(made).splitlines()[0], " ".join(rendered(tables.table(made)).split())):
        assert f"small: WARNING, in {len(touched)} of {total} comparisons" in first
        assert "cpu_threads (train)" in first


def test_an_earlier_stretch_on_another_machine_counts(work):
    work.run_of("init0-order0").known[20]["numerics"] = {"cpu_threads": 2, "device": "gpu"}
    differ = report.summarise(work)["numerics"]["differ"]
    assert all(one["fields"] == ["device"] for one in differ)
    assert {one["checkpoint"] for one in differ} == {20, 200}
    assert "null of init0-order0" in {one["comparison"] for one in differ}


def test_so_does_one_before_a_stop_between_two_checkpoints(work):
    stretch = {"until": 100, "numerics": {"cpu_threads": 2, "device": "gpu"}}
    work.run_of("init0-order0").known[200]["before"] = [stretch]
    differ = report.summarise(work)["numerics"]["differ"]
    assert all(one["fields"] == ["device"] for one in differ)
    assert {one["checkpoint"] for one in differ} == {200}
    assert differ


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [SMALL, LARGE])
def test_the_page_lists_every_comparison_and_what_the_study_lacks(study):
    made = summary_of(study)
    page = markdown(made)
    assert page.splitlines()[0] == "# small"
    lines = page.splitlines()
    for one in made["comparisons"]:
        assert any(line.startswith(f"| {one['name']} | {one['classifier']} | {one['checkpoint']} |") for line in lines)
    assert lacking(study)
    for sentence in lacking(study):
        assert f"- {sentence}" in lines
    for verdict in findings.verdicts(made):
        assert f"- {verdict}" in lines
    for arm in made["arms"]:
        assert f"| {arm['id']} | `{arm['fingerprint'][:12]}`" in page
    assert "do not cover the training of the" in page


def test_the_tables_of_the_page_are_whole_whatever_the_pieces():
    page = markdown(summary_of())
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "`␣the` `\\|` `` ` `` `\\n`" in page


def test_the_page_tells_which_words_and_how_far_to_trust_them():
    page = markdown(summary_of())
    section = page[page.index("## Which words") : page.index("## Training")]
    told = decisive(comparisons(SMALL))
    assert {one.factor for one in told} == {"init", "order", "twin", "null"}
    for one in told:
        for classifier in ("subwords", "words"):
            assert f"**{one.title}, step {one.step}, {classifier}**: 17 of 1,234 are stable, about 0.4 would be" in section
    numbers = r"+0.50 [+0.25, +0.75] | 97 | -1.2 | 12.5 | 7.6 |"
    assert f"| `␣the` | draw 0 | more | `` …` a \\| b⟦ the⟧\\n `` | {numbers}" in section
    assert f"| `␣the` | draw 1 | more |  | {numbers}" in section


# --- the terminal -----------------------------------------------------------------------------------------------------


RATES = Factor("optimiser.learning_rate", (0.001, 0.003))


@pytest.mark.parametrize("study", [SMALL, LARGE, replace(SMALL, factors=(RATES, *SMALL.factors[:1]))])
def test_the_table_fits_100_columns_and_shows_every_comparison(study):
    made = summary_of(study)
    text = rendered(tables.table(made))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert len(text.splitlines()) < 70
    folded = "init: 24 pairs" in text
    assert folded == (study is LARGE)
    for one in made["comparisons"]:
        if not folded or " vs " not in one["name"]:
            assert all(word in text for word in one["name"].split())


def test_a_line_of_many_pairs_counts_the_significant_ones():
    places = iter(range(10**6))

    def change(one):
        if (one["factor"], one["classifier"], one["checkpoint"]) == ("init", "words", 200) and "pooled" not in one["name"]:
            place = next(places)
            return {**one, "accuracy": 0.5 + place / 1000, "p_holm": 0.01 if place >= 21 else 1.0}
        return one

    text = rendered(tables.table(summary_of(LARGE, change)))
    assert re.search(r"words +51\.[12] \(50\.0–52\.3\) .* 3 of 24 ", text)


def test_names_with_brackets_are_shown_as_they_are():
    made = summary_of(change=lambda one: {**one, "name": one["name"].replace("null", "[bold]")})
    assert "[bold] of init0-order0" in rendered(tables.table(made))


def test_the_best_rung_of_each_answer_is_chosen_on_the_validation_part():
    """Whatever the test part says of it."""

    def change(one):
        worse = {"validation_bits": 0.125, "accuracy": 0.5} if one["classifier"] == "words" else {"accuracy": 0.9}
        return {**one, **worse}

    made = summary_of(change=change)
    found = findings.best_rungs(made)
    assert {one["classifier"] for one in found} == {"words"}
    assert len(found) * len(Attribution().classifiers) == len(findings.decisive(made))
    section = markdown(made).partition("## Which rung is best")[2].partition("\n## ")[0]
    for one in found:
        start = (
            f"| {one['name']} | words | {findings.decision(one)} | {one['checkpoint']} | +0.125 | {findings.interval(one)} |"
        )
        assert sum(line.startswith(start) for line in section.splitlines()) == 1
    assert any("best is chosen by its bits per text on the validation part" in said for said in findings.coverage(made))
    first, second = row("ab"), row("ab", classifier="words")
    assert findings.best([first, second]) is first


@pytest.mark.parametrize(
    ("p_holm", "high", "expected"),
    [
        (0.049, 0.51, "seen"),
        (0.05, 0.519, "not seen"),
        (1.0, 0.521, "not decided at this power"),
        (0.05, 0.6, "not decided at this power"),
    ],
)
def test_a_row_is_decided_by_its_p_value_or_by_the_end_of_its_interval(p_holm, high, expected):
    assert findings.decision(row("ab", p_holm=p_holm, ci95=[0.4, high])) == expected


# --- the verdicts -----------------------------------------------------------------------------------------------------


def verdict(said, start):
    (found,) = [sentence for sentence in said if sentence.startswith(start)]
    return found


def test_there_is_a_verdict_on_each_factor_at_each_checkpoint_from_the_pooled_test():
    said = findings.verdicts(summary_of())
    names = ("init (pooled)", "order (pooled)", "all arms", "twin of init0-order0")
    for name in names:
        for step in (20, 200):
            verdict(said, f"{name} at step {step}: ")
    assert len(said) == 2 * len(names) + 1
    order = verdict(said, "order (pooled) at step 200")
    assert "recognisable by subwords, 58.1 [54.6, 61.6] %, p = 0.0001, Holm 0.0020" in order
    assert "chance 50.0 %, ceiling 95.0 [94.0, 96.0] %: the models differ." in order


def test_what_is_not_shown_is_put_so_with_the_most_that_it_can_be():
    init = verdict(findings.verdicts(summary_of()), "init (pooled) at step 20:")
    assert "not shown at this power by words, 50.0 %, at most 53.5 %" in init
    assert "recognisable by" not in init


def test_one_pair_is_its_own_verdict():
    study = replace(SMALL, factors=SMALL.factors[:1], twin=None)
    made = summary_of(study)
    assert verdict(findings.verdicts(made), "init 0 vs 1 at step 200: not shown")
    assert "confusion-words.png" in markdown(made)


def test_models_of_equal_weights_are_not_said_to_differ():
    said = findings.verdicts(summary_of(change=lambda one: {**one, "ceiling": 0.5, "ceiling_ci95": [0.5, 0.5]}))
    assert "that the models differ is not shown" in verdict(said, "init (pooled) at step 20:")


def test_the_null_is_put_as_the_largest_leak_that_it_leaves_room_for():
    places = iter((0.52, 0.53, 0.541, 0.51))
    made = summary_of(change=lambda one: {**one, "ci95": [0.47, next(places)]} if one["factor"] == "null" else one)
    assert "Null: no leak above 4.1 points, at any checkpoint, by any classifier." in findings.verdicts(made)


def test_the_page_shows_the_share_of_the_ceiling_and_several_texts_in_one_decision():
    page = markdown(summary_of())
    (line,) = (line for line in page.splitlines() if line.startswith("| order (pooled) | subwords | 200 | 58.1 ["))
    assert "18.0 [-10.0, 50.0]" in line  # (.581 - .5) / (.95 - .5)
    (null,) = (line for line in page.splitlines() if line.startswith("| null") and "| subwords | 200 | 50.0 [" in line)
    assert "| – |" in null
    section = page.partition("## Several texts")[2].partition("\n## ")[0]
    assert "| order (pooled) | subwords | 200 | 4 | 400 | 58.1 [54.6, 61.6] | 50.0 | 95.0 [95.0, 95.0] |" in section
    assert "(order 0)" not in section  # of a factor the pooled test alone


def point(fraction, accuracy):
    found = row(("21", "22"), accuracy, name="order (pooled)", factor="order", classifier="words")
    return {**found, "training_texts": round(2400 * fraction)}


def test_courses_go_with_steps_with_texts_to_learn_from_with_length_and_with_number():
    learnt = summary_of(curves=[point(0.1, 0.52), point(1.0, 0.56)])
    courses = curves.courses(learnt)
    assert set(courses) == {"init (pooled)", "order (pooled)", "all arms", "null of init0-order0", "twin of init0-order0"}
    steps = courses["order (pooled)"]["training step"]["subwords"]
    assert (steps.x, steps.y) == ([20, 200], [0.581, 0.581])
    assert steps.low[0] < 0.581 < steps.high[0]
    found = courses["order (pooled)"]["texts to learn from"]
    assert set(found) == {"words", "ceiling"}
    assert (found["words"].x, found["words"].y) == ([240, 2400], [0.52, 0.56])
    together = courses["all arms"]["texts in one decision"]
    assert together["ceiling"].x == [1, 4]
    assert all("tokens of a text" not in panels for panels in courses.values())  # there is one length
    swept = curves.courses(summary_of(replace(SMALL, sampling=Sampling(new_tokens=(12, 48), temperature=(0.7, 1.0)))))
    assert swept["order (pooled)"]["tokens of a text"]["words"].x == [12, 48]
    assert "training step" not in swept["order (pooled)"]


def test_a_learning_curve_stands_on_the_page():
    page = markdown(summary_of(curves=[point(0.1, 0.52), point(1.0, 0.56)]))
    assert "| order (pooled) | words | 200 | 240 | 52.0 [48.5, 55.5] | 50.0 | -0.010 |" in page
    assert "texts to learn from | accuracy" not in markdown(summary_of())


def test_levels_in_general_are_told_with_their_interval():
    levels = {
        "factor": "init",
        "checkpoint": 200,
        "setting": "",
        "classifier": "words",
        "levels": 6,
        "pairs": 15,
        "chance": 0.5,
    }
    levels |= {"accuracy": 0.55, "ci95": [0.51, 0.59], "ceiling": 0.96, "ceiling_ci95": [0.94, 0.97]}
    said = findings.verdicts(summary_of(levels=[levels]))
    assert (
        "Two levels of init in general (15 pairs of 6) at step 200: 55.0 [51.0, 59.0] % by words, ceiling 96.0 [94.0, 97.0] %; "
        "levels and documents resampled."
    ) in said


def test_shared_noise_is_shouted():
    noise = {"draws": ["a.draw0", "a.draw1"], "checkpoint": 200, "prompts": 500, "agreements": 80, "expected": 61.25}
    quiet = summary_of(noise=[{**noise, "p_value": 0.02}])
    assert not any("share noise" in said for said in findings.verdicts(quiet))
    (said,) = (said for said in findings.verdicts(summary_of(noise=[{**noise, "p_value": 1e-9}])) if "share noise" in said)
    assert said.startswith(
        "LEAK: a.draw0 and a.draw1 begin with the same token at 80 of 500 prompts, expected 61.2 (p < 0.0001)"
    )


def test_a_leak_is_shouted():
    def change(one):
        leak = one["factor"] == "null" and one["classifier"] == "words" and one["checkpoint"] == 200
        return {**one, "accuracy": 0.56, "p_value": 0.0001, "p_holm": 0.004} if leak else one

    said = findings.verdicts(summary_of(change=change))
    assert verdict(said, "LEAK: null of init0-order0 at step 200 is recognisable by words, 56.0")
    assert not any("no leak" in sentence for sentence in said)


def test_a_classifier_beyond_the_ceiling_is_shouted_but_not_for_noise():
    def at(accuracy):
        return summary_of(change=lambda one: row(one["classes"], accuracy, ceiling=0.55) if one["factor"] == "init" else one)

    assert any(sentence.startswith("IMPOSSIBLE") for sentence in findings.verdicts(at(0.7)))
    assert not any(sentence.startswith("IMPOSSIBLE") for sentence in findings.verdicts(at(0.57)))


def test_a_study_of_too_many_tests_for_its_permutations_says_so():
    made = summary_of()
    made["comparisons"] = made["comparisons"] * 25
    assert len(made["comparisons"]) / 10_000 >= 0.05
    assert any("Raise attribution.permutations" in sentence for sentence in findings.verdicts(made))
    assert not any("attribution.permutations" in sentence for sentence in findings.verdicts(summary_of()))


# --- figures ----------------------------------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("arms_shown", [2, 16])
def test_figures_are_pngs_of_a_readable_size_with_something_on_them(tmp_path, arms_shown):
    classes = [f"arm{i}" for i in range(arms_shown)]
    pairs = [row(["0", "1"], 0.5 + i / 100, ceiling=0.9) for i in range(arms_shown)]
    curves = {name: [(0, 7.6, True), (1e5, 6.5, False), (2e5, 6.0 + i / 9, False)] for i, name in enumerate(classes)}
    made = {
        "accuracies": figures.accuracies({20: [("one", pairs[:1]), ("many", pairs)], 200: [("one", pairs[-1:])]}),
        "losses": figures.losses(curves),
        "confusion": figures.confusion(row(classes, 0.6)),
    }
    for name, figure in made.items():
        figures.save(figure, tmp_path / f"{name}.png")
        width, height = png_size(tmp_path / f"{name}.png")
        assert 400 <= width <= 1400
        assert 300 <= height <= 1400
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title(loc="left")


def test_figures_show_their_numbers():
    pairs = [row(["0", "1"], accuracy, ceiling=0.9) for accuracy in (0.52, 0.61)]
    (axes,) = figures.accuracies({1: [("one", pairs[:1]), ("many", pairs)]}).axes
    at = {(round(float(x), 6), float(y)) for line in axes.lines for x, y in line.get_xydata()}
    assert {(52, 0), (90, 0), (90, 1)} <= at
    dots = [tuple(dot) for kind in axes.collections for dot in np.round(kind.get_offsets(), 6)]
    assert {(52, 1), (61, 1)} <= set(dots)
    (axes,) = figures.losses({"a": [(0, 7.6, True), (10, 6.5, False), (20, 6.0, False)]}).axes
    assert [line.get_xydata().tolist() for line in axes.lines][:2] == [[[10, 6.5], [20, 6.0]], [[0, 7.6]]]
    figure = figures.confusion(row(["a", "b", "c"], 0.6))
    counts = {text.get_text() for text in figure.axes[0].texts}
    assert counts == {"480", "160"}


def test_the_library_leaves_no_global_figure_behind():
    code = "import sys, natfp_jax.figures; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# --- status -----------------------------------------------------------------------------------------------------------


STATUS = replace(
    SMALL,
    twin=None,
    run=Run(checkpoints=(0.5,)),
    sampling=replace(SMALL.sampling, file_texts=1500),
    attribution=Attribution(),
)


@pytest.fixture
def tree(tmp_path):
    """A study that was only just begun."""
    files.write_json(tmp_path / "studies" / "small" / "study.json", {"fingerprint": "f", "study": to_json(STATUS)})
    return tmp_path


def shown(out):
    (table,) = status(out)
    return rendered(table)


def prepare(tree):
    names = [arm.id for arm in arms(STATUS)]
    listed = {name: {"fingerprint": files.hash_json(name), "inputs": {}} for name in names}
    files.write_json(tree / "studies" / "small" / "arms.json", listed)
    return {name: tree / "runs" / entry["fingerprint"][:16] for name, entry in listed.items()}


def states(out, arm):
    (line,) = [line for line in shown(out).splitlines() if line.strip().startswith(f"{arm} ")]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_status_follows_a_study_from_its_first_file_to_its_report(tree):
    folder, name = tree / "studies" / "small", "init0-order0"
    assert states(tree, name) == ["missing", "missing, 0 of 4 checkpoints", "missing, 0 of 8 files"]
    with alone(folder):
        assert states(tree, name)[0] == "running"
        runs = prepare(tree)
        for step in ("0", "20", "100", "100.orbax-checkpoint-tmp-17", "200.damaged"):  # one is not sealed
            (runs[name] / "checkpoints" / step).mkdir(parents=True)
        for step in ("0", "20", "200.damaged"):
            (runs[name] / "checkpoints" / step / "manifest.json").touch()
        with alone(runs[name]):
            assert states(tree, name)[:2] == ["done", "running, 2 of 4 checkpoints"]
            assert states(tree, "init1-order0")[1:] == ["missing, 0 of 4 checkpoints", "missing, 0 of 4 files"]
        assert states(tree, name)[1] == "missing, 2 of 4 checkpoints"
        for run in runs.values():
            for step in ("0", "20", "100", "200"):
                (run / "checkpoints" / step).mkdir(parents=True, exist_ok=True)
                (run / "checkpoints" / step / "manifest.json").touch()
        assert states(tree, name)[1] == "done"
        assert "running, 0 of" in states(tree, name)[2]
        for one in draws(STATUS):
            for path in [folder / "draws" / name for name in one.files(2000, 1500)]:
                path.parent.mkdir(exist_ok=True)
                path.touch()
                assert states(tree, one.arm)[2].startswith("running, ")
                texts.sealed(path).touch()
        assert states(tree, name) == ["done", "done", "done"]
        assert "attribute running\nreport    missing" in re.sub(" +\n *", "\n", shown(tree))
    assert "attribute missing" in shown(tree)
    files.write_json(folder / "attribution.json", {"inputs": "1", "comparisons": [], "noise": []})
    files.write_json(folder / "report" / "summary.json", {"inputs": {"attribution": "1"}})
    assert "attribute done\nreport    done" in re.sub(" +\n *", "\n", shown(tree))
    files.write_json(folder / "attribution.json", {"inputs": "2", "comparisons": [], "noise": []})
    assert "report    out of date" in shown(tree)


def test_status_says_what_it_expected(tree, tmp_path):
    with pytest.raises(UserError, match="has no studies, expected"):
        status(tmp_path / "elsewhere")
    path = tree / "studies" / "small" / "study.json"
    files.write_json(path, {"fingerprint": "f", "study": {"name": "small", "colour": "red"}})
    with pytest.raises(UserError, match=re.escape(str(path))):
        status(tree)


def test_status_does_not_wait_for_jax():
    code = "import sys, natfp_jax.status; assert not {'jax', 'numpy', 'orbax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the factors apart ------------------------------------------------------------------------------------------------


def test_with_runs_enough_the_verdict_is_over_runs_and_their_test_is_not_called_powerless():
    known = {"factor": "init", "checkpoint": 200, "setting": "", "classifier": "subwords", "levels": 4, "strata": 4}
    shown = {"accuracy": 0.4, "ci95": [0.38, 0.42], "one_accuracy": 0.35, "one_ci95": [0.33, 0.37], "chance": 0.25}
    within = {"within_accuracy": 0.5, "within_ci95": [0.48, 0.52], "training_texts": 9600, "test_texts": 12_800}
    test = {"p_value": 1 / 13_824, "least_p": 1 / 13_824, "p_holm": 0.0004, "relabellings": 13_824, "exact": True}
    part = {"checkpoint": 200, "setting": "", "distance": "words", "bits": 0.0123, "ci95": [-0.001, 0.02]}
    parts = [
        {**part, "component": "init", "share": 0.5, "share_ci95": [0.25, 0.75]},
        {**part, "component": "all", "share": 1.0, "share_ci95": [1.0, 1.0]},
        {**part, "component": "null", "bits": -1e-12, "share": None, "share_ci95": None},
    ]
    made = summary_of(LARGE, apart=[{**known, **shown, **within, **test}], components=parts)
    (said,) = (line for line in findings.verdicts(made) if "apart from" in line)
    assert "40.0 [38.0, 42.0] % by subwords in runs held out" in said
    assert "p = 0.0001, Holm 0.0004" in said
    assert "nothing is shown" not in said
    (said,) = (line for line in findings.verdicts(made) if "Distance by words" in line)
    assert said.endswith("12.3 [-1, 20] millibits, of which init 50.0 [25.0, 75.0] %.")
    page = markdown(made)
    assert "| init | subwords | 200 | 4 x 4 | 40.0 [38.0, 42.0] |" in page
    assert "| words | null | 200 | 0 [-1, 20] | – |" in page
    assert "components.png" not in page  # at one checkpoint there is nothing to draw
