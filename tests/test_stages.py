"""A study's stages do what is missing and nothing else, refuse what does not belong, and do not mind being killed.

The stages run in this process on one device; `natfp run` itself runs, and is killed, in processes of its own.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from natfp_jax import config, drawing, files, lineage, lock, mesh, processes, scoring, stages, stats, texts
from natfp_jax.audit import audit
from natfp_jax.ceiling import log_likelihoods
from natfp_jax.config import Attribution, Corpus, Data, Experiment, Factor, Model, Perturb, Run, Sampling, Stories, Study
from natfp_jax.errors import Damaged, Stopped, UserError
from natfp_jax.findings import verdicts
from natfp_jax.params import flatten
from natfp_jax.progress import Progress
from natfp_jax.prompts import Prompts
from natfp_jax.report import report
from natfp_jax.scoring import likelihoods
from natfp_jax.stages import Work
from natfp_jax.stopping import STOPPED, Stop
from natfp_jax.study import Draw, draws
from natfp_jax.train import load_params
from tests.soak import meshes

STUDY = Study(
    name="tiny",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=700), vocabulary=300, validation_fraction=0.05, prompt_fraction=0.4, shards=2),
        model=Model(width=32, layers=1, heads=2),
        data=Data(seq_len=32, windows=128, epochs=1, batch=8),
    ),
    factors=(Factor("seeds.init", (0, 1)),),
    twin=Perturb(parameter="embedding", index=50, ulps=1),
    run=Run(log_every=4, validation_windows=16),
    sampling=Sampling(prompts=150, prompt_chars=20, new_tokens=8, batch=64, file_texts=60, checkpoints=(0.5, 1.0)),
    attribution=Attribution(classifiers=("subwords",)),
)


def work(out, study=STUDY):
    """The study's work on one device."""
    made = Work(study, out, Progress(quiet=True))
    made.devices = mesh.make(config.Mesh(), jax.devices()[:1])
    return made


def everything(out, study=STUDY, stop=None):
    """What `natfp run` does, up to the stage `stop`."""
    made = work(out, study)
    with made.claimed():
        for stage in ("corpus", "train", "sample", "attribute"):
            getattr(made, stage)()
            if stage == stop:
                return made
        processes.led(lambda: report(made))
    return made


def tree(folder):
    """File → contents and time of change, the locks aside."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def contents(folder, *parts):
    return {name: hashed for name, (hashed, _) in tree(folder).items() if name.split("/")[0] in parts}


def results(out, name="tiny"):
    """What a study comes to, without anything that tells times."""
    folder = out / "studies" / name
    paths = sorted((folder / "draws").glob("*.parquet"))
    drawn = {path.name: texts.read(path).to_pydict() for path in paths}
    records = {path.name: texts.read_record(path) for path in paths}
    trained = {path.parent.name: files.read_json(path) for path in sorted((out / "runs").glob("*/lineage.json"))}
    metrics = {path.parent.name: path.read_text() for path in sorted((out / "runs").glob("*/metrics.jsonl"))}
    attribution = files.read_json(folder / "attribution.json")
    summary = files.read_json(folder / "report" / "summary.json")
    files.verify(folder / "report", summary["files"])
    kept = {field: summary[field] for field in summary if field not in ("stages", "inputs", "files")}
    return {"draws": drawn, "records": records, "runs": trained, "metrics": metrics, "rows": attribution, "summary": kept}


def mended(out, study=STUDY):
    """What `natfp run` does about damage: sets it aside and goes on; the names of what was set aside."""
    aside = []
    while len(aside) < 9:
        try:
            everything(out, study)
        except Damaged as damage:
            assert damage.agreed  # noqa: PT017
            files.set_aside(damage.path)
            aside.append(damage.path.relative_to(out).as_posix())
        else:
            break
    return aside


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished study; read it only."""
    out = tmp_path_factory.mktemp("finished")
    everything(out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A finished study to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


# --- what is there ----------------------------------------------------------------------------------------------------


def test_every_draw_is_of_its_prompts_and_its_weights(finished):
    made = work(finished)
    tokenizer = made.store.tokenizer
    wanted = draws(STUDY)
    assert len(wanted) == 2 * 4
    for one in wanted:
        table = texts.read_all(made.draw_paths(one)).to_pydict()
        assert table["arm"] == [one.arm] * 150
        assert table["checkpoint"] == [one.step] * 150
        assert table["draw"] == [one.number] * 150
        assert table["temperature"] == [1.0] * 150
        assert table["prompt"] == made.prompts.texts
        assert table["prompt_id"] == made.prompts.ids
        assert table["document_id"] == made.prompts.documents
        assert table["text"] == [tokenizer.decode(ids) for ids in table["ids"]]
        assert [len(log_p) for log_p in table["log_probabilities"]] == [len(ids) for ids in table["ids"]]
        assert all(np.isfinite(log_p).all() and max(log_p) <= 0 for log_p in table["log_probabilities"])
        assert all(1 <= len(ids) <= 8 and max(ids) < tokenizer.size for ids in table["ids"])
        paths = made.draw_paths(one)
        assert [texts.read(path).num_rows for path in paths] == [60, 60, 30]
        for record in map(texts.read_record, paths):
            assert record["inputs"]["weights"] == made.run_of(one.arm).record(one.step)["weights"]
            assert record["fingerprint"] == made.identities[one.arm].fingerprint
            drawn_by = {"new_tokens": 8, "temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "greedy": False}
            assert record["settings"] == {**drawn_by, "repetition_penalty": 1.0, "cache": None, "seed": 0}
    tables = [texts.read_all(made.draw_paths(one))["ids"].to_pylist() for one in wanted]
    for i, one in enumerate(tables):  # the twin's weights are nearly the base arm's, and the null's are them; noise is not
        for other in tables[:i]:
            assert np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.1


def test_every_result_has_its_numerics_record(finished):
    made = work(finished)
    expected = lineage.numerics(made.devices)
    assert expected["mesh"] == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    for one in draws(STUDY):
        for path in made.draw_paths(one):
            assert texts.read_record(path)["numerics"] == {**expected, "rows": 64}
    for arm in made.arms:
        assert [made.run_of(arm).record(step)["numerics"]["batch"] for step in (0, 8, 16)] == [8] * 3
        assert made.run_of(arm).record(16)["numerics"].items() >= expected.items()
    summary = files.read_json(finished / "studies" / "tiny" / "report" / "summary.json")
    assert summary["numerics"]["differ"] == []


def test_the_twin_starts_one_unit_in_the_last_place_away(finished):
    made = work(finished)
    base, twin = (
        flatten(load_params(made.run_of(name), 0, arm.experiment, made.store_of(arm), made.devices))
        for name, arm in made.arms.items()
        if name in ("init0", "init0-twin")
    )
    for path, leaf in base.items():
        different = np.flatnonzero(np.asarray(leaf) != np.asarray(twin[path]))
        assert different.tolist() == ([50] if path == "embedding" else [])
    a, b = (np.asarray(params["embedding"]).reshape(-1)[50] for params in (base, twin))
    assert b == np.nextafter(a, np.float32(np.inf))


def test_the_ceiling_is_the_accuracy_of_the_likelihood_on_the_test_texts(finished):
    """Computed again from the files, without the stage."""
    made = work(finished)
    rows = files.read_json(finished / "studies" / "tiny" / "attribution.json")["comparisons"]
    assert len(rows) == 2 * 3
    parts = stats.split(made.prompts.documents, 0, validation=0.1, test=0.4)
    test = np.flatnonzero(parts == "test")
    encoded = made.prompts.encoded(made.store.tokenizer)
    prompts = [encoded[i] for i in test]

    def likelihood(arm, step, table):
        experiment = made.arms[arm].experiment
        params = load_params(made.run_of(arm), step, experiment, made.store, made.devices)
        ids = table["ids"].to_pylist()
        continuations, size = [ids[i] for i in test], made.store.tokenizer.size
        return log_likelihoods(params, prompts, continuations, experiment.model, (), size, 64, made.devices).sum(axis=1)

    for row in rows:
        if row["factor"] == "null":
            assert row["ceiling"] == 0.5
            assert row["ceiling_ci95"] == [0.5, 0.5]
        if row["factor"] != "init":
            continue
        right = list[float]()
        for own, other in (("init0", "init1"), ("init1", "init0")):
            table = texts.read_all(made.draw_paths(Draw(own, row["checkpoint"])))
            each = table["log_probabilities"].to_pylist()
            recorded = np.array([math.fsum(each[i]) for i in test])
            mine, others = (likelihood(arm, row["checkpoint"], table) for arm in (own, other))
            np.testing.assert_allclose(recorded, mine, atol=1e-3)
            right += ((mine > others) + (mine == others) / 2).tolist()
        assert row["test_texts"] == 2 * len(test)
        assert row["ceiling"] == pytest.approx(np.mean(right), abs=1e-9)


def test_no_classifier_beats_the_ceiling_of_a_study(finished):
    for row in files.read_json(finished / "studies" / "tiny" / "attribution.json")["comparisons"]:
        error = np.sqrt(0.25 / row["test_texts"]) + np.sqrt(row["ceiling"] * (1 - row["ceiling"]) / row["test_texts"])
        assert row["accuracy"] <= row["ceiling"] + 3.3 * error


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_finished_study_is_left_as_it_is(copy, monkeypatch):
    before = tree(copy)
    for module, name in ((stages, "train"), (drawing, "draw"), (scoring, "log_likelihoods")):  # nor is anything computed
        monkeypatch.setattr(module, name, None)
    everything(copy)
    assert tree(copy) == before


def test_a_study_that_is_stopped_after_each_stage_goes_on_from_there(copy, finished):
    shutil.rmtree(copy / "studies")
    for stop in ("corpus", "train", "sample", "attribute", None):
        before = tree(copy)
        everything(copy, stop=stop)
        after = tree(copy)
        kept = [name for name in before if not name.endswith("timings.json")]
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        there = {path.name for path in (copy / "studies" / "tiny").iterdir()}
        assert ("draws" in there, "attribution.json" in there, "report" in there) == {
            "corpus": (False, False, False),
            "train": (False, False, False),
            "sample": (True, False, False),
            "attribute": (True, True, False),
            None: (True, True, True),
        }[stop]
    assert results(copy) == results(finished)


SWEEP = replace(
    STUDY,
    name="sweep",
    sampling=replace(STUDY.sampling, temperature=(1.0, 0.5), new_tokens=(8, 3), checkpoints=(1.0,), prompts=90, file_texts=50),
)


def test_several_temperatures_and_lengths_are_drawn_and_attributed(copy):
    made = everything(copy, SWEEP)
    rows = files.read_json(made.folder / "attribution.json")["comparisons"]
    assert len(rows) == 4 * 3
    assert {(row["temperature"], row["new_tokens"]) for row in rows} == {(t, n) for t in (1.0, 0.5) for n in (3, 8)}
    for row in rows:
        assert row["setting"] == f"temperature {row['temperature']}, {row['new_tokens']} tokens"
        assert all(f".t{row['temperature']}." in name for name in row["draws"])
    drawn = {one: texts.read_all(made.draw_paths(one)).to_pydict() for one in draws(SWEEP)}
    assert len(drawn) == 2 * 4
    for one, table in drawn.items():
        assert max(map(len, table["ids"])) == 8
        assert table["temperature"] == [one.temperature] * 90
    # A cooler draw is more likely under its own distribution, and has noise of its own.
    warm, cool = (drawn[Draw("init0", 16, 0, temperature)] for temperature in (1.0, 0.5))
    mean = [np.mean([log_p for each in table["log_probabilities"] for log_p in each]) for table in (warm, cool)]
    assert mean[0] < mean[1] - 0.1
    assert np.mean([a == b for a, b in zip(warm["ids"], cool["ids"], strict=True)]) < 0.1
    for null in [row for row in rows if row["factor"] == "null"]:
        assert null["ceiling"] == 0.5
    page = (made.folder / "report" / "report.md").read_text()
    assert "null of init0, temperature 0.5, 3 tokens" in page
    before = tree(copy)
    everything(copy, SWEEP)
    assert tree(copy) == before


@pytest.mark.slow
def test_the_ceiling_of_a_length_is_that_of_the_beginnings(copy):
    """Of three tokens: what a study that draws three alone finds."""
    short = replace(SWEEP, name="short", sampling=replace(SWEEP.sampling, new_tokens=3))
    both = [everything(copy, study).folder for study in (SWEEP, short)]
    many, few = (files.read_json(path / "attribution.json")["comparisons"] for path in both)
    some = [row for row in many if row["new_tokens"] == 3]
    assert len(some) == len(few) == 6
    for one, other in zip(some, few, strict=True):
        named = {"draws", "setting", "p_value", "p_holm", "pooled", "ceiling_pooled"}  # streams have the name in them
        named |= {name for name in one if name.endswith("ci95")}
        assert {k: v for k, v in one.items() if k not in named} == {k: v for k, v in other.items() if k not in named}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{"greedy": True}, {"top_p": 0.6}], ids=["greedy", "top_p"])
def test_in_low_precision_the_ceiling_is_by_the_sampler(copy, monkeypatch, sampling):
    """By a forward pass some texts could not have been drawn by their own model, nor by one that is the same function."""
    monkeypatch.setattr(scoring, "log_likelihoods", None)
    changed = replace(STUDY.sampling, cache="bfloat16", checkpoints=(1.0,), **sampling)
    made = everything(copy, replace(STUDY, name="half", sampling=changed))
    rows = files.read_json(made.folder / "attribution.json")["comparisons"]
    assert [row["ceiling"] for row in rows if row["factor"] == "null"] == [0.5]
    assert next(row for row in rows if row["factor"] == "init")["ceiling"] > 0.7
    test = made.test_rows
    for one in draws(made.study):
        table = texts.read_all(made.draw_paths(one)).take(test)
        prompts = Prompts(made.prompts.table.take(test))
        ids_NW = texts.dense(table["ids"], 8, made.store.tokenizer.eos_id)
        (found,) = drawing.scored(made, {one: ids_NW}, prompts, one.arm, one.step, lambda ended, tokens: None)
        np.testing.assert_array_equal(found, texts.dense(table["log_probabilities"], 8))


@pytest.mark.slow
def test_the_own_text_of_a_truncated_distribution_is_never_impossible(copy, monkeypatch):
    """Where the edge of the truncation has moved by a rounding, the generating arm has what its sampler recorded."""

    def moved(*args):
        log_p_NW = log_likelihoods(*args)
        log_p_NW[::3, 1] = -np.inf
        return log_p_NW

    changed = replace(STUDY.sampling, prompts=60, checkpoints=(1.0,), top_k=20)
    made = everything(copy, replace(STUDY, name="cut", sampling=changed), stop="sample")
    drawn = {each: texts.read_all(made.draw_paths(each)) for each in draws(made.study)}
    whole = likelihoods(made, drawn, made.test_rows)
    weights = {arm: made.run_of(arm).record(16)["weights"] for arm in made.arms}
    monkeypatch.setattr(scoring, "log_likelihoods", moved)
    found, others, impossible = likelihoods(made, drawn, made.test_rows), set(), 0
    for (one, arm, step), log_p_NL in found.items():
        if weights[one.arm] == weights[arm]:
            recorded = texts.dense(drawn[one]["log_probabilities"].take(made.test_rows), 8).sum(axis=1)
            np.testing.assert_allclose(log_p_NL[:, 0], recorded, atol=1e-3)
            np.testing.assert_array_equal(log_p_NL[1::3], whole[one, arm, step][1::3])
        else:
            # What the generating arm has lost counts for nobody; what only another arm lacks stays impossible under it.
            assert not np.isneginf(log_p_NL[np.isfinite(whole[one, arm, step])]).any()
            impossible += np.isneginf(log_p_NL).sum()
            others.add((one.arm, arm))
    assert impossible > 0
    assert {("init0", "init1"), ("init1", "init0")} <= others


def test_arms_are_treated_alike_and_equal_ones_share_one_likelihood(copy, monkeypatch):
    """The forward pass is asked once for each draw and model, the generating one too."""
    asked = []

    def counted(params, prompts, continuations, *rest):
        asked.append((lineage.weight_hash(params), tuple(map(tuple, continuations))))
        return log_likelihoods(params, prompts, continuations, *rest)

    monkeypatch.setattr(scoring, "log_likelihoods", counted)
    orders = Factor("seeds.order", (0, 1))
    sampling = replace(STUDY.sampling, prompts=60, checkpoints=(0.0,))
    made = everything(copy, replace(STUDY, name="alike", factors=(*STUDY.factors, orders), sampling=sampling), stop="sample")
    drawn = {each: texts.read_all(made.draw_paths(each)) for each in draws(made.study)}
    found = likelihoods(made, drawn, made.test_rows)
    weights = {arm: made.run_of(arm).record(0)["weights"] for arm in made.arms}
    assert len(set(weights.values())) == 3  # two inits and the twin
    assert len(asked) == len(set(asked)) == len({(one, weights[arm]) for one, arm, _ in found})
    for (one, arm, step), log_p_NL in found.items():
        if "twin" not in one.arm + arm:  # a unit in the last place may change no sum
            assert (log_p_NL == found[one, one.arm, step]).all() == (weights[arm] == weights[one.arm])


@pytest.mark.slow
def test_equal_weights_that_are_computed_otherwise_have_likelihoods_of_their_own(copy):
    """At step 0 the arms of one init seed have the same weights."""
    dtypes = Factor("model.dtype", ("float32", "bfloat16"))
    sampling = replace(STUDY.sampling, checkpoints=(0.0,), prompts=60)
    made = everything(copy, replace(STUDY, name="dtypes", factors=(dtypes,), twin=None, sampling=sampling), stop="sample")
    one, other = (next(each for each in draws(made.study) if each.arm == arm) for arm in made.arms)
    assert made.run_of(one.arm).record(0)["weights"] == made.run_of(other.arm).record(0)["weights"]
    found = likelihoods(made, {each: texts.read_all(made.draw_paths(each)) for each in draws(made.study)}, made.test_rows)
    for mine, theirs in ((one, other), (other, one)):
        own, others = found[mine, mine.arm, 0], found[mine, theirs.arm, 0]
        assert (own != others).mean() > 0.9
        np.testing.assert_allclose(own, others, atol=0.1)


@pytest.mark.slow
def test_what_was_drawn_with_so_many_rows_goes_on_with_as_many(copy, monkeypatch):
    study = replace(STUDY, name="rows", sampling=replace(STUDY.sampling, batch=None, checkpoints=(1.0,)))
    made = everything(copy, study, stop="sample")
    first, last = (made.draw_paths(draws(study)[place])[0] for place in (0, -1))
    rows = texts.read_record(first)["numerics"]["rows"]
    before = last.read_bytes()
    last.unlink()
    monkeypatch.setattr(mesh, "device_memory", lambda devices: 1)
    everything(copy, study)
    assert texts.read_record(last)["numerics"]["rows"] == rows > 1
    assert last.read_bytes() == before


def test_processes_agree_on_the_prompts(copy, tmp_path, monkeypatch):
    """Each reads the file itself, which may be another one on another host."""
    agreed, path = {}, tmp_path / "prompts.txt"
    path.write_text("".join(f"Number {number} of them\n" for number in range(150)))
    monkeypatch.setattr(stages.processes, "agree", agreed.update)
    study = replace(STUDY, name="given", sampling=replace(STUDY.sampling, prompt_file=str(path)))
    made = everything(copy, study, stop="corpus")
    assert agreed["prompts"] == made.prompts.sha256


def test_prompts_of_too_few_documents_can_be_drawn_but_not_attributed(copy, tmp_path):
    path = tmp_path / "prompts.jsonl"
    records = [{"text": f"Number {number}", "document_id": str(number % 3)} for number in range(150)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    study = replace(STUDY, name="few", sampling=replace(STUDY.sampling, prompt_file=str(path)))
    made = everything(copy, study, stop="sample")  # they can be drawn from all the same
    with pytest.raises(UserError, match="of 3 prompt documents, each part needs"):
        _ = made.test_rows


def test_prompts_of_a_file(copy, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Number {number} of them\n" for number in range(80)))
    sampling = replace(STUDY.sampling, prompts=70, prompt_file=str(path), checkpoints=(1.0,))
    made = everything(copy, replace(STUDY, name="given", sampling=sampling))
    table = texts.read_all(made.draw_paths(Draw("init0", 16))).to_pydict()
    assert table["prompt"] == [f"Number {number} of them" for number in range(70)]
    with open(path, "a") as file:
        file.write("another\n")
    everything(copy, replace(STUDY, name="given", sampling=sampling))  # what is not asked for does not matter
    path.write_text(path.read_text().replace("Number 5 ", "Number five "))
    refused(copy, "was drawn from prompts", study=replace(STUDY, name="given", sampling=sampling))


@pytest.mark.parametrize("lost", ["parquet", "manifest.json"])
def test_a_lost_draw_is_drawn_again(copy, finished, lost):
    path = copy / "studies" / "tiny" / "draws" / f"init0.step8.draw1-00001-of-00003.{lost}"
    path.unlink()
    with pytest.raises(UserError, match="natfp sample"):
        work(copy).attribute()
    before = tree(copy)
    everything(copy)
    changed = {name for name, state in tree(copy).items() if before.get(name) != state}
    assert path.relative_to(copy).as_posix() in changed
    assert not any(name.startswith(("runs/", "corpora/", "data/")) or "attribution.json" in name for name in changed)
    assert results(copy) == results(finished)


def test_a_lost_run_is_trained_again(copy, finished):
    run = work(copy).run_of("init1").folder
    shutil.rmtree(run)
    with pytest.raises(UserError, match=r"arm init1 lacks the checkpoints at steps \[0, 8, 16\]: run `natfp train` first"):
        work(copy).sample()
    before = tree(copy)
    everything(copy)
    changed = {name for name, state in tree(copy).items() if before.get(name) != state}
    assert all(name.startswith((f"runs/{run.name}/", "studies/tiny/report/", "studies/tiny/timings")) for name in changed)
    assert results(copy) == results(finished)


@pytest.mark.parametrize("settings", [{"cohort": 1}, pytest.param({"cohort": 2}, marks=pytest.mark.slow)])
def test_a_study_comes_to_the_same_however_its_arms_are_grouped(settings, tmp_path, finished):
    everything(tmp_path, replace(STUDY, run=replace(STUDY.run, **settings)))
    assert results(tmp_path) == results(finished)


def told(made, monkeypatch, stop_at):
    """What the stage `train` of this work says of its steps; it is asked to stop at so many."""
    done, task = [], made.progress.task

    @contextlib.contextmanager
    def counting(*arguments):
        with task(*arguments) as advance:

            def counted(steps):
                done.append(steps)
                made.stop.requested = sum(done) >= stop_at
                advance(steps)

            yield counted

    made.stop = Stop()
    with made.claimed():
        made.corpus()
        monkeypatch.setattr(made.progress, "task", counting)
        made.train()
    return done


@pytest.mark.slow
def test_a_cohort_that_was_stopped_finds_itself_again_when_others_are_finished(tmp_path, finished, monkeypatch):
    """The arms are cut into [the first] and [the second, the twin], of which the latter is stopped."""
    study = replace(STUDY, run=replace(STUDY.run, cohort=2))
    with pytest.raises(Stopped, match=r"arms .* are saved at step 1\d; "):
        told(work(tmp_path, study), monkeypatch, 16 + 2 * 10)
    (restart,) = tmp_path.glob("restart/*")
    (saved,) = [int(path.name) for path in restart.iterdir() if path.name.isdecimal()]
    assert told(work(tmp_path, study), monkeypatch, 1000)[0] == saved * 2
    everything(tmp_path, study)
    assert results(tmp_path) == results(finished)


def test_a_study_is_done_while_another_one_asks_its_runs_for_more(copy, finished, monkeypatch):
    """Stopped on its way to a checkpoint in the middle, the other one goes on from there whatever is done meanwhile."""
    more = replace(STUDY, name="more", run=replace(STUDY.run, checkpoints=(0.75,)))
    with pytest.raises(Stopped):
        told(work(copy, more), monkeypatch, 3 * 8)
    monkeypatch.undo()
    (state,) = copy.glob("restart/*/[0-9]*")
    before = tree(copy)
    everything(copy)
    assert tree(copy) == before
    claims = [claim for claim in audit(copy, Progress(quiet=True)) if claim.subject.startswith("arm")]
    assert claims
    assert not [claim for claim in claims if claim.verdict == "false"]
    assert "it is not finished" in {claim.detail for claim in claims}
    assert told(work(copy, more), monkeypatch, 1000)[0] == int(state.name) * 3
    assert not list((copy / "restart").iterdir())
    assert all(work(copy).run_of(name).finished for name in work(copy).arms)


def test_what_another_process_is_saving_is_no_damage(copy):
    """A run of this study, locked, has a checkpoint that is not sealed yet."""
    made = work(copy)
    made.corpus()
    run = made.run_of("init1")
    (run.checkpoints / "8" / files.MANIFEST).unlink()
    before = tree(copy)
    with lock.alone(run.folder, Progress(quiet=True)):
        with pytest.raises(UserError, match="is in use by another process"):
            made.train()
        with pytest.raises(UserError, match=r"arm init1 lacks the checkpoints at steps \[8\]"):
            made.sample()
    assert tree(copy) == before
    assert mended(copy) == [f"runs/{run.folder.name}/checkpoints/8"]


def test_arms_behind_one_that_fails_are_trained(tmp_path, monkeypatch):
    rates = Factor("optimiser.learning_rate", (1e30, 1e-3))
    study = replace(STUDY, factors=(rates,), twin=None, run=replace(STUDY.run, cohort=1))
    for _ in range(2):
        with pytest.raises(UserError, match=r"gradient norm nan at step 2"):
            told(work(tmp_path, study), monkeypatch, 1000)
        assert len(list(tmp_path.glob("runs/*/lineage.json"))) == 1


def test_a_lost_attribution_is_made_again(copy, finished):
    (copy / "studies" / "tiny" / "attribution.json").unlink()
    everything(copy)
    assert results(copy) == results(finished)


def test_texts_are_attributed_anew_with_other_settings_and_only_then(copy):
    path = copy / "studies" / "tiny" / "attribution.json"
    before = path.read_bytes()
    work(copy).attribute()
    assert path.read_bytes() == before
    other = replace(STUDY, attribution=Attribution(classifiers=("words",), split_seed=5))
    work(copy, other).attribute()
    again = files.read_json(path)
    assert {row["classifier"] for row in again["comparisons"]} == {"words"}
    assert again["inputs"] != json.loads(before)["inputs"]


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_two_studies_below_one_folder_share_runs(copy):
    other = replace(STUDY, name="other", factors=(Factor("seeds.order", (0, 1)),), twin=None)
    before = tree(copy)
    made = everything(copy, other)
    after = tree(copy)
    assert {name: after[name] for name in before} == before
    assert made.run_of("order0").folder == work(copy).run_of("init0").folder
    assert len(list((copy / "runs").iterdir())) == 3 + 1
    # the same weights, prompts, settings and draw number: the same texts
    one, same = (
        texts.read_all(sorted((copy / "studies" / name / "draws").glob(f"{arm}.step16.draw1-*.parquet"))).drop_columns(["arm"])
        for name, arm in (("tiny", "init0"), ("other", "order0"))
    )
    assert one.equals(same)


# --- what does not belong ---------------------------------------------------------------------------------------------


def refused(copy, *parts, study=STUDY):
    before = tree(copy)
    with pytest.raises(UserError) as caught:
        everything(copy, study)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert tree(copy) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"twin": None}, "twin"),
        ({"sampling": replace(STUDY.sampling, temperature=0.5)}, "sampling.temperature"),
        ({"experiment": replace(STUDY.experiment, model=replace(STUDY.experiment.model, layers=2))}, "experiment.model.layers"),
    ],
)
def test_another_study_of_the_same_name_is_refused(copy, change, field):
    other = replace(STUDY, **change)
    mine, its = (config.fingerprint(replace(study, run=Run())) for study in (other, STUDY))
    refused(copy, its[:16], mine[:16], f"(they differ in {field})", "give another --out", study=other)


def test_where_a_study_runs_is_no_part_of_it(copy):
    everything(copy, replace(STUDY, run=replace(STUDY.run, log_every=7)))


def test_a_draw_of_other_weights_is_refused(copy):
    folder = copy / "studies" / "tiny" / "draws"
    for name in ("parquet", "manifest.json"):
        shutil.copy(folder / f"init1.step16.draw0-00000-of-00003.{name}", folder / f"init0.step16.draw0-00000-of-00003.{name}")
    made = work(copy)
    its, mine = (made.run_of(arm).record(16)["weights"] for arm in ("init1", "init0"))
    refused(copy, str(folder / "init0.step16.draw0-00000-of-00003.parquet"), f"was drawn from weights {its}, expected {mine}")


def test_a_draw_of_other_settings_is_refused(copy):
    path = copy / "studies" / "tiny" / "draws" / "init0.step16.draw0-00000-of-00003.parquet"
    record = texts.read_record(path)
    changed = {**record, "inputs": {**record["inputs"], "settings": "f" * 64}}
    texts.write(path, texts.read(path).to_pydict(), changed)
    refused(copy, f"was drawn from settings {'f' * 64}, expected {record['inputs']['settings']}")


@pytest.mark.parametrize("name", ["parquet", "manifest.json"])
def test_a_damaged_draw_is_not_attributed_and_is_drawn_again_once_it_is_set_aside(copy, finished, name):
    (copy / "studies" / "tiny" / "attribution.json").unlink()
    path = copy / "studies" / "tiny" / "draws" / f"init0.step16.draw0-00000-of-00003.{name}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(Damaged) as caught:
        everything(copy)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert mended(copy) == [f"studies/tiny/draws/{path.name}"]
    assert path.with_name(f"{path.name}.damaged").read_bytes() == whole[:-100]
    assert path.read_bytes() == whole
    assert results(copy) == results(finished)


def test_a_draw_is_not_added_to_where_another_of_its_files_is_damaged(copy):
    """Nobody reads them until they are attributed; a draw that goes on looks at them all the same."""
    damaged, missing = (
        copy / "studies" / "tiny" / "draws" / f"init0.step16.draw0-0000{number}-of-00003.parquet" for number in (0, 2)
    )
    wholes = damaged.read_bytes(), missing.read_bytes()
    damaged.write_bytes(wholes[0][:-4] + b"1234")
    missing.unlink()
    with pytest.raises(Damaged) as caught:
        everything(copy, stop="sample")
    assert caught.value.path == damaged
    damaged.rename(damaged.with_name("aside"))
    everything(copy, stop="sample")
    assert (damaged.read_bytes(), missing.read_bytes()) == wholes


def test_a_damaged_checkpoint_is_not_sampled_from_and_is_trained_again_once_it_is_set_aside(copy, finished):
    """The whole run: damaged weights are found when they are loaded, the step is trained again, the draw drawn again."""
    made = work(copy)
    step = made.run_of("init1").checkpoints / "16"
    arrays = max((step / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    for path in (*made.draw_paths(Draw("init1", 16)), copy / "studies" / "tiny" / "attribution.json"):
        path.unlink()
    before = tree(copy)
    with pytest.raises(Damaged) as caught:
        work(copy).sample()
    assert caught.value.path == step
    assert {name: state for name, state in tree(copy).items() if not name.endswith("timings.json")} == {
        name: state for name, state in before.items() if not name.endswith("timings.json")
    }
    assert mended(copy) == [step.relative_to(copy).as_posix()]
    assert results(copy) == results(finished)


@pytest.mark.parametrize("name", [pytest.param("manifest.json", marks=pytest.mark.slow), "params", "optimiser"])
def test_a_checkpoint_that_lost_a_part_is_damaged(copy, finished, name):
    step = work(copy).run_of("init1").checkpoints / "16"
    shutil.rmtree(step / name) if (step / name).is_dir() else (step / name).unlink()
    (copy / "studies" / "tiny" / "attribution.json").unlink()
    work(copy).draw_paths(Draw("init1", 16))[2].unlink()
    # Nothing asks for the optimiser's state of a run that is done.
    assert mended(copy) == ([] if name == "optimiser" else [step.relative_to(copy).as_posix()])
    assert results(copy) == results(finished)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_lineage_is_gathered_again(copy, finished, text):
    path = work(copy).run_of("init1").folder / "lineage.json"
    whole = path.read_bytes()
    path.write_text(text)
    assert mended(copy) == [path.relative_to(copy).as_posix()]
    assert path.read_bytes() == whole
    assert results(copy) == results(finished)


def test_the_run_of_another_experiment_is_refused(copy):
    made = work(copy)
    mine, its = (made.identities[arm].fingerprint for arm in ("init0", "init1"))
    folder = made.run_of("init0").folder
    shutil.rmtree(folder)
    shutil.copytree(made.run_of("init1").folder, folder)
    shutil.rmtree(folder / "checkpoints" / "16")
    refused(copy, str(folder), f"holds the run {its}, expected {mine}")


@pytest.mark.parametrize("name", ["attribution.json", "timings.json", "report/summary.json"])
@pytest.mark.parametrize("text", [pytest.param("{", marks=pytest.mark.slow), "{}"])
def test_a_damaged_result_of_a_study_is_made_again_once_it_is_set_aside(copy, finished, name, text):
    path = copy / "studies" / "tiny" / name
    path.write_text(text)
    before = tree(copy)
    with pytest.raises(Damaged) as caught:
        everything(copy)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert tree(copy) == before
    assert mended(copy) == [f"studies/tiny/{name}"]
    assert path.with_name(f"{path.name}.damaged").read_text() == text
    assert results(copy) == results(finished)
    assert mended(copy) == []


@pytest.mark.parametrize("name", ["study.json", "arms.json"])
@pytest.mark.parametrize("text", [pytest.param("{", marks=pytest.mark.slow), "{}"])
def test_a_damaged_owner_of_a_study_is_refused_until_it_is_removed(copy, finished, name, text):
    """Whose folder it is can not be guessed: these are not set aside, the user is asked."""
    path = copy / "studies" / "tiny" / name
    whole = path.read_bytes()
    path.write_text(text)
    refused(copy, str(path), "remove it and run the same command again")
    path.unlink()
    everything(copy)  # as the message says
    assert path.read_bytes() == whole
    assert results(copy) == results(finished)


def test_an_arm_that_is_another_experiment_than_before_is_refused(copy):
    """As after a change of the program, or of what a corpus is made from."""
    path = copy / "studies" / "tiny" / "arms.json"
    listed = files.read_json(path)
    mine, its = listed["init1"]["fingerprint"], "f" * 64
    inputs = {**listed["init1"]["inputs"], "pool": "0" * 64}
    files.write_json(path, {**listed, "init1": {"fingerprint": its, "inputs": inputs}})
    said = f"arm init1 of {path.parent} is the experiment {its[:16]}, expected {mine[:16]} (another pool): give another --out"
    refused(copy, said)
    files.write_json(path, {**listed, "init9": listed["init1"]})
    refused(copy, f"arm init9 of {path.parent} is the experiment {mine[:16]}, expected none")


def test_prompts_too_few_are_known_before_training(tmp_path, finished):
    shutil.copytree(finished / "corpora", tmp_path / "corpora")
    shutil.copytree(finished / "data", tmp_path / "data")
    study = replace(STUDY, sampling=replace(STUDY.sampling, prompts=100_000))
    with pytest.raises(UserError, match="100000 were asked for"):
        everything(tmp_path, study)
    assert not (tmp_path / "runs").exists()


def test_the_study_of_a_running_process_is_refused(copy):
    made, other = work(copy), work(copy)
    before = tree(copy)
    with made.claimed(), pytest.raises(UserError, match=f"in use by another process \\(pid {os.getpid()} on "), other.claimed():
        pass
    assert tree(copy) == before


# --- factors on disk --------------------------------------------------------------------------------------------------

GRID = replace(
    STUDY,
    name="grid",
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    twin=None,
    sampling=replace(STUDY.sampling, prompts=100, checkpoints=(0.0, 1.0)),
    attribution=Attribution(classifiers=("subwords",), regularisation=(0.1,), bootstraps=999),
)


@pytest.fixture(scope="module")
def grid(finished, tmp_path_factory):
    """Two initial weights by two orders, done beside the finished study; read it only."""
    return everything(Path(shutil.copytree(finished, tmp_path_factory.mktemp("grid") / "out")), GRID)


@pytest.mark.slow
def test_orders_share_their_start_and_inits_their_order(grid):
    first, last = ({arm: grid.run_of(arm).record(step) for arm in grid.arms} for step in (0, 16))
    for i in "01":
        orders, inits = [f"init{i}-order{o}" for o in "01"], [f"init{o}-order{i}" for o in "01"]
        assert len({first[arm]["weights"] for arm in orders}) == 1
        assert {last[arm]["init_hash"] for arm in orders} == {first[orders[0]]["weights"]}
        assert len({last[arm]["order_hash"] for arm in orders}) == 2
        assert len({last[arm]["order_hash"] for arm in inits}) == 1
        assert len({last[arm]["init_hash"] for arm in inits}) == 2
    assert len({record["weights"] for record in last.values()}) == 4, "every arm ends elsewhere"


def test_the_ceiling_of_orders_is_exactly_half_before_the_first_step(grid):
    rows = files.read_json(grid.folder / "attribution.json")["comparisons"]
    bound = {(row["name"], row["checkpoint"]): row["ceiling"] for row in rows}
    for name in ("order 0 vs 1 (init 0)", "order 0 vs 1 (init 1)", "order (pooled)"):
        assert bound[name, 0] == 0.5
    assert any(bound[name, 16] != 0.5 for name in ("order 0 vs 1 (init 0)", "order 0 vs 1 (init 1)"))
    assert bound["init (pooled)", 0] > 0.5
    for step in (0, 16):
        assert bound["null of init0-order0", step] == 0.5


def test_draws_of_equal_weights_share_no_noise(grid):
    """At step 0 the orders differ in nothing but whose draws they are."""
    drawn = {one: texts.read_all(grid.draw_paths(one))["ids"].to_pylist() for one in draws(GRID)}
    assert len(drawn) == 2 * 5
    for one, its in drawn.items():
        for other, theirs in drawn.items():
            if one != other:
                assert np.mean([a == b for a, b in zip(its, theirs, strict=True)]) < 0.1, (one, other)


def test_lineage_is_a_chain_of_weights(grid):
    for arm, identity in grid.identities.items():
        run = grid.run_of(arm)
        told = files.read_json(run.folder / "lineage.json")
        assert (told["fingerprint"], told["inputs"]) == (identity.fingerprint, identity.inputs)
        chain = told["checkpoints"]
        assert chain == [run.record(record["step"]) for record in chain]
        assert (chain[0]["step"], chain[0]["parent"]) == (0, None)
        assert chain[-1]["step"] == 16
        for before, after in itertools.pairwise(chain):
            assert after["parent"] == {"step": before["step"], "weights": before["weights"]}
            assert after["init_hash"] == chain[0]["weights"]
        experiment = grid.arms[arm].experiment
        for record in (chain[0], chain[-1]):
            params = load_params(run, record["step"], experiment, grid.store, grid.devices)
            assert lineage.weight_hash(params) == record["weights"]


def test_the_summary_names_hashes_amounts_and_every_comparison(grid):
    summary = files.read_json(grid.folder / "report" / "summary.json")
    assert [arm["id"] for arm in summary["arms"]] == list(grid.arms)
    for arm in summary["arms"]:
        run = grid.run_of(arm["id"])
        assert arm["fingerprint"] == grid.identities[arm["id"]].fingerprint
        assert (arm["init_hash"], arm["final_hash"]) == (run.record(0)["weights"], run.record(16)["weights"])
        assert arm["order_hash"] == run.record(16)["order_hash"]
        assert (arm["steps"], arm["tokens"], arm["val_loss"]) == (16, 16 * 8 * 32, run.record(16)["val_loss"])
    assert [arm["seeds"] for arm in summary["arms"]] == [{"init": i, "order": o} for i in (0, 1) for o in (0, 1)]
    assert summary["corpus"]["sha256"] == grid.store.sha256
    assert summary["stages"]["train"]["tokens"] == 2 * 16 * 8 * 32, "two of the four arms were there"
    assert summary["stages"]["sample"]["texts"] == 10 * 100
    assert [row["name"] for row in summary["comparisons"]] == [comparison.name for comparison in grid.comparisons]
    assert len(summary["comparisons"]) == 2 * 8
    for row in summary["comparisons"]:
        assert row["p_holm"] >= row["p_value"] >= 1e-4
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]


def test_swapped_draws_are_refused(copy):
    made = work(copy)
    paths = [made.draw_paths(Draw(arm, 16))[1] for arm in ("init0", "init1")]
    for one, other in (paths, map(texts.sealed, paths)):
        between = one.with_name("between")
        for old, new in ((one, between), (other, one), (between, other)):
            old.rename(new)
    hashes = [made.run_of(arm).record(16)["weights"] for arm in ("init0", "init1")]
    for stage in (made.sample, made.attribute):
        before = tree(copy)
        with pytest.raises(UserError, match="was drawn from weights") as caught:
            stage()
        assert all(one_hash in str(caught.value) for one_hash in hashes)
        assert tree(copy) == before


def test_a_whole_run_under_the_name_of_another_is_refused(copy):
    made = work(copy)
    mine, its = (made.run_of(arm).folder for arm in ("init0", "init1"))
    shutil.rmtree(mine)
    shutil.copytree(its, mine)
    for stage in (made.train, made.sample, made.attribute):
        before = tree(copy)
        with pytest.raises(UserError) as caught:
            stage()
        for arm in ("init0", "init1"):
            assert made.identities[arm].fingerprint in str(caught.value)
        assert tree(copy) == before


def test_stages_without_the_runs_say_what_comes_first(copy):
    shutil.rmtree(copy / "runs")
    made = work(copy)
    for stage in (made.sample, made.attribute):
        with pytest.raises(UserError, match="run `natfp train` first"):
            stage()


def test_a_mistake_is_corrected_under_the_same_name(copy):
    right = replace(STUDY, name="hasty")
    wrong = replace(right, sampling=replace(STUDY.sampling, prompts=100_000))
    with pytest.raises(UserError, match="100000 were asked for"):
        everything(copy, wrong)
    made = everything(copy, right, stop="train")
    assert files.read_json(made.folder / "study.json")["study"] == config.to_json(right)
    refused(copy, "sampling.prompts", study=wrong)  # now it has begun


# --- real processes, killed -------------------------------------------------------------------------------------------

FILE = """
from natfp_jax.config import *

study = from_json(Study, {!r})
"""
# A shell may start its background jobs, and so this test, deaf to Ctrl-C; the console script of a user is not.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from natfp_jax.cli import main
main()
"""
MOMENTS = ["training the tokenizer", "train 3 arms", "sample (", "attribute ("]  # as progress is told


@pytest.fixture
def natfp(tmp_path):
    """Starts `natfp run` on the study."""
    (tmp_path / "study.py").write_text(FILE.format(config.to_json(STUDY)))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def start(out):
        command = [sys.executable, "-c", PROGRAM, "run", tmp_path / "study.py", "--out", out]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start


def stopped(process, moment, seconds, number):
    """Sends the signal some time after the process has said that it is at `moment`; gives all that it said."""
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(moment):
            time.sleep(seconds)
            process.send_signal(number)
            break
    out, errors = process.communicate(timeout=meshes.STUCK)
    return out, "".join(said) + errors


@pytest.mark.slow
def test_killed_again_and_again_a_study_comes_to_the_same(natfp, tmp_path):
    untouched = natfp(tmp_path / "untouched")
    _, errors = untouched.communicate(timeout=meshes.STUCK)
    assert untouched.returncode == 0, errors

    moments, ends = random.Random(0), []
    out = tmp_path / "killed"
    for moment, number in zip(MOMENTS, [signal.SIGKILL, signal.SIGINT, *[signal.SIGKILL] * 2], strict=True):
        process = natfp(out)
        said, errors = stopped(process, moment, moments.uniform(0, 0.4), number)
        ends.append(process.returncode)
        if number == signal.SIGINT:  # a user's Ctrl-C
            assert process.returncode == STOPPED == 75
            assert said == ""
            told = r"natfp: (stopped|arm init\S+ is saved at step \d+); the same command goes on from here"
            assert re.fullmatch(told, errors.splitlines()[-1])
            assert "Traceback" not in errors
    assert ends.count(-signal.SIGKILL) >= 2  # one may have ended first
    last = natfp(out)
    said, errors = last.communicate(timeout=meshes.STUCK)
    assert last.returncode == 0, errors
    assert "init 0 vs 1" in said
    assert results(out) == results(tmp_path / "untouched")
    assert contents(out, "corpora", "data") == contents(tmp_path / "untouched", "corpora", "data")
    remains = [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert remains == []
    assert files.read_json(out / "studies" / "tiny" / "study.json")["study"] == config.to_json(STUDY)


def test_draws_that_share_noise_are_found_out(copy):
    """The second draw of the null is written over with the first's ids, as if both had drawn from one stream."""
    made = work(copy)
    first, again = (made.draw_paths(Draw("init0", 16, number)) for number in (0, 1))
    for one, other in zip(first, again, strict=True):
        columns = {**texts.read(other).to_pydict(), "ids": texts.read(one)["ids"].to_pylist()}
        texts.write(other, columns, {**texts.read_record(other), "texts": "others"})
    with made.claimed():
        made.attribute()
        summary = report(made)
    honest, shared = (next(row for row in summary["noise"] if row["checkpoint"] == step) for step in (8, 16))
    assert honest["p_value"] > 1e-6
    assert (shared["agreements"], shared["prompts"]) == (150, 150)
    assert shared["p_value"] < 1e-6
    assert any("init0.step16.draw0 and init0.step16.draw1" in said for said in verdicts(summary))
