"""The studies of configs/paper: arms differ in the named factor alone, and what several studies need is trained once."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import CLAIMS, replaced, row_of, studies, table
from natfp_jax import config, files
from natfp_jax.findings import SIGNIFICANT
from natfp_jax.loading import load_study
from natfp_jax.study import arms, comparisons, labels
from tests.soak import meshes

PAPER = Path(__file__).parent.parent / "configs" / "paper"
SCALES = ("toy", "small", "paper")
STUDIES = [
    *((name, ()) for name in ("data", "size", "optimiser", "seeds", "early_weights", "long", "sft")),
    *(("seeds", ("part=twin",)), ("long", ("text=stories",)), ("sft", ("part=lora",)), ("sft", ("part=parents",))),
]


def loaded(name, settings, scale):
    return load_study(PAPER / f"{name}.py", [*settings, f"scale={scale}"])


def leaves(value, path=""):
    """Dotted path → value; what is nothing has no fields."""
    if not isinstance(value, dict):
        return {path: value}
    return {where: leaf for name, one in value.items() for where, leaf in leaves(one, f"{path}.{name}".lstrip(".")).items()}


def departures(base, other):
    """The dotted fields in which two experiments differ, found without the package."""
    a, b = leaves(config.to_json(base)), leaves(config.to_json(other))
    return {path for path in {**a, **b} if a.get(path) != b.get(path)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "settings"), STUDIES)
def test_arms_differ_from_the_base_in_the_named_factor_alone(name, settings, scale):
    study = loaded(name, settings, scale)
    base, *others = arms(study)
    for arm in others:
        found = departures(base.experiment, arm.experiment)
        assert found
        if arm.twin:
            assert {path.split(".")[0] for path in found} == {"perturb"}
            continue
        moved = [f.path for f, level, first in zip(study.factors, arm.levels, base.levels, strict=True) if level != first]
        assert all(any(f"{path}.".startswith(f"{one}.") for one in moved) for path in found), (arm.id, found)
        if study.design == "one_at_a_time":
            assert len(moved) == 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["size", "optimiser", "seeds", "early_weights"])
def test_windows_and_their_multiset_are_the_same_whatever_the_factor(name, scale):
    found = [arm.experiment for arm in arms(loaded(name, (), scale))]
    assert len({(one.corpus, dataclasses.replace(one.data, batch=1)) for one in found}) == 1
    assert {one.data.windows % one.data.batch for one in found} == {0}, "epochs are whole"


@pytest.mark.parametrize("scale", SCALES)
def test_disjoint_halves_are_disjoint(scale):
    found = {arm.id: arm.experiment.data for arm in arms(loaded("data", (), scale))}
    (half,) = (data for data in found.values() if data.first)
    assert half.first == found["base"].first + found["base"].windows
    assert half == dataclasses.replace(found["base"], first=half.first)


@pytest.mark.parametrize("scale", SCALES)
def test_what_several_studies_need_is_one_run(scale):
    """One base arm, and the same checkpoints of it: whoever comes second finds all that it wants."""
    some = [loaded(name, settings, scale) for name, settings in STUDIES if name not in ("long", "sft")]
    assert len({config.fingerprint(arms(study)[0].experiment) for study in some}) == 1
    assert len({tuple(arms(study)[0].experiment.kept_steps(study.kept_fractions)) for study in some}) == 1
    seeds, early, twin = (
        {config.fingerprint(arm.experiment) for arm in arms(loaded(*one, scale))}
        for one in (("seeds", ()), ("early_weights", ()), ("seeds", ("part=twin",)))
    )
    assert twin <= seeds
    base = arms(some[0])[0].experiment
    for settings in ((), ("part=lora",), ("part=parents",)):  # of which the others' base arm is the parent
        study = loaded("sft", settings, scale)
        first = arms(study)[0].experiment
        assert first.parent.experiment == base
        assert {first.parent.step} <= set(base.kept_steps(some[0].kept_fractions))
        assert first.model == base.model
    assert len(early - seeds) == (0 if scale == "toy" else 16 - 10)  # a larger grid has combinations of its own


@pytest.mark.parametrize("name", sorted({name for name, _ in STUDIES}))
def test_each_says_its_claim_command_cost_and_expectation(name):
    said = next(iter(re.findall(r'"""(.*?)"""', (PAPER / f"{name}.py").read_text(), re.DOTALL)))
    assert f"natfp run configs/paper/{name}.py" in said
    assert re.match(r"(Claim: |Open in the paper: ).*", said)
    assert re.search(r"Cost of the toy on two CPU cores: \d+ minutes", said)
    assert "Expected:" in said
    assert int(re.search(r"cores: (\d+) minutes", said)[1]) <= 20


def summary_of(study):
    """A summary's comparisons, as if every classifier had judged all; which is best goes from one to the next."""
    rows, kinds = [], study.attribution.classifiers
    for number, (one, kind) in enumerate(itertools.product(comparisons(study), kinds)):
        known = {
            "name": one.name,
            "factor": one.factor,
            "checkpoint": one.step,
            "classes": list(one.classes),
            "classifier": kind,
        }
        numbers = dict.fromkeys(("accuracy", "chance", "p_holm", "ceiling"), 0.5)
        bounds = {"ci95": [0.45, 0.51], "ceiling_ci95": [0.4, 0.6]}
        rows.append({**known, **numbers, **bounds, "validation_bits": float(number % 7)})
    return {"comparisons": rows}


@pytest.mark.parametrize("scale", SCALES)
def test_a_test_of_each_study_can_be_significant(scale):
    for name, settings in STUDIES:
        study = loaded(name, settings, scale)
        tests = len(comparisons(study)) * len(study.attribution.classifiers)
        assert tests / (1 + study.attribution.permutations) < SIGNIFICANT, name


def test_a_table_goes_between_its_marks_and_nowhere_else():
    page = "before\n<!-- toy -->\nold\n<!-- end of toy -->\nafter\n"
    assert replaced(page, "toy", "new\nrows") == "before\n<!-- toy -->\nnew\nrows\n<!-- end of toy -->\nafter\n"
    assert replaced(replaced(page, "toy", ""), "toy", "old") == page
    with pytest.raises(SystemExit, match="lacks the marks <!-- small -->"):
        replaced(page, "small", "new")


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_of_the_table_has_its_comparison(scale):
    of = {claim.study: loaded(claim.study[0].removesuffix(".py"), claim.study[1:], scale) for claim in CLAIMS}
    for claim in CLAIMS:
        study = of[claim.study]
        summary = summary_of(study)
        row = row_of(claim, summary)
        fractions = sorted(set(study.sampling.checkpoints))
        step = round(fractions[claim.checkpoint] * study.experiment.steps)
        levels = {factor.name: labels(factor) for factor in study.factors}.get(claim.factor, ["", ""])
        for told in (row["subwords"], row["best"]):
            assert (told["factor"], told["checkpoint"]) == (claim.factor, step), claim.said
            assert len(told["classes"]) == (claim.classes or len(levels)), claim.said
            pooled = claim.classes is None and any(one["name"] == f"{claim.factor} (pooled)" for one in summary["comparisons"])
            assert pooled == (told["name"] == f"{claim.factor} (pooled)") or claim.classes == len(levels), claim.said
        assert row["subwords"]["classifier"] == "subwords"
        assert (row["null"]["factor"], row["null"]["checkpoint"]) == ("null", step)
        assert row["null"]["classifier"] == row["best"]["classifier"]
        assert claim.said in table([(claim, row)])
    assert {study for study in studies() if study not in of} <= {("seeds.py", "part=twin")}
    assert len({claim.said for claim in CLAIMS}) == len(CLAIMS)
    assert {name for name, _ in STUDIES} == {study[0].removesuffix(".py") for study in studies()}


@pytest.mark.slow
def test_a_study_of_other_data_tells_what_differs(tmp_path):
    """The whole way, from the file to the page: three arms that are fed otherwise, of which two share a corpus."""
    command = [Path(sys.executable).with_name("natfp"), "run", PAPER / "data.py", "--out", tmp_path]
    small = [
        'experiment.corpus={"source": {"kind": "stories", "count": 600}, "vocabulary": 300, "prompt_fraction": 0.2}',
        'experiment.model={"width": 32, "layers": 1}',
        'experiment.data={"seq_len": 32, "windows": 64, "batch": 16}',
        'factors=[{"path": "data.first", "levels": [0, 64]}, {"path": "corpus.source.seed", "levels": [0, 1]}]',
        *(
            "sampling.prompts=60",
            "sampling.prompt_chars=20",
            "sampling.new_tokens=8",
            'attribution.classifiers=["subwords"]',
            "scale=toy",
        ),
    ]
    ended = subprocess.run([*command, *small], capture_output=True, text=True, env=meshes.environment(1), check=False)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "studies" / "paper-data-toy" / "report"
    summary, page = files.read_json(folder / "summary.json"), (folder / "report.md").read_text()
    differs = {arm["id"]: arm["differs"] for arm in summary["arms"]}
    assert differs == {"base": {}, "first64": {"data.first": [0, 64]}, "seed1": {"corpus.source.seed": [0, 1]}}
    assert len({arm["pool"] for arm in summary["arms"]}) == 3
    assert len({arm["init_hash"] for arm in summary["arms"]}) == 1
    assert "| first64 | `data.first` | `0` | `64` |" in page
    assert "Not held fixed: the windows. base was fed 64 windows" in page
    assert "Held fixed: how often each window is seen, steps, training tokens, parameters." in page
    audited = subprocess.run(
        [command[0], "audit", tmp_path, "--replay", "1"], capture_output=True, text=True, env=meshes.environment(1), check=False
    )
    assert audited.returncode == 0, audited.stdout
    # another study of the same arms has nothing to train
    assert "train 3 arms" in ended.stderr
    again = subprocess.run(
        [*command, *small, "name=again"], capture_output=True, text=True, env=meshes.environment(1), check=False
    )
    assert again.returncode == 0, again.stderr
    assert "train" not in again.stderr
