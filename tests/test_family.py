"""Studies of children: parents first and once, what the files prove of two generations, and what is refused."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from natfp_jax import checkpoint, config, files, params, processes, texts
from natfp_jax.audit import audit
from natfp_jax.config import (
    Attribution,
    Conversations,
    Corpus,
    Data,
    Experiment,
    Factor,
    Model,
    Parent,
    Run,
    Sampling,
    Seeds,
    Stories,
    Study,
    Template,
)
from natfp_jax.errors import UserError
from natfp_jax.lineage import weight_hash
from natfp_jax.progress import Progress
from natfp_jax.report import report, summarise
from natfp_jax.runs import RunFolder
from natfp_jax.stages import Work
from natfp_jax.status import status
from natfp_jax.study import arms, parents
from tests.soak import meshes
from tests.test_descent import ADAPTED, conversations, weights

PARENT = Experiment(
    corpus=Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.1, shards=2),
    model=Model(width=32, layers=1, heads=2),
    data=Data(seq_len=32, windows=64, epochs=1, batch=8),
)


def study(folder, **changes):
    source = Conversations(str(folder / "asked.jsonl"))
    base = Study(
        name="children",
        experiment=Experiment(
            corpus=Corpus(source=source, validation_fraction=0.1, prompt_fraction=0.4, shards=2),
            model=PARENT.model,
            data=Data(seq_len=64, windows=32, epochs=1, batch=8),
            dropout=0.1,
            parent=Parent(PARENT),
        ),
        factors=(Factor("parent.experiment.seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
        run=Run(log_every=4, validation_windows=8),
        sampling=Sampling(prompts=80, new_tokens=12, batch=64, checkpoints=(0.0, 1.0)),
        attribution=Attribution(classifiers=("subwords",)),
    )
    return replace(base, **changes)


def worked(out, given, devices, last="attribute"):
    made = Work(given, out, Progress(quiet=True))
    made.devices = devices
    with made.claimed():
        for stage in ("corpus", "train", "sample", "attribute"):
            getattr(made, stage)()
            if stage == last:
                break
        else:
            return made
    if last == "attribute":
        processes.led(lambda: report(made))
    return made


def commanded(verb, *arguments):
    """`natfp` in a process of one device, on which an audit trains the first steps again."""
    natfp, root = Path(sys.executable).with_name("natfp"), str(Path(__file__).parents[1])
    environment = {**meshes.environment(1), "PYTHONPATH": root}
    return subprocess.run([natfp, verb, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Two parents, two children of each, down to the report."""
    out = tmp_path_factory.mktemp("family")
    conversations(out / "asked.jsonl", 400)
    file = "from pathlib import Path\n\nfrom tests.test_family import study as made\n\n"
    (out / "children.py").write_text(f"{file}study = made(Path({str(out)!r}))\n")
    ended = commanded("run", out / "children.py", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "train 2 parents (16 steps)" in ended.stderr
    return out


def started(*arguments):
    natfp, root = Path(sys.executable).with_name("natfp"), str(Path(__file__).parents[1])
    environment = {**meshes.environment(1), "PYTHONPATH": root}
    return subprocess.Popen(
        [natfp, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_tasks_that_share_a_study_do_together_what_one_command_does_and_nothing_twice(family, tmp_path):
    """Four children for three tasks, which have parents in common; all at once."""
    command = "run", family / "children.py", "--out", tmp_path
    tasks = [started(*command, "--task", task, "--tasks", 3) for task in range(3)]
    ended = [(*task.communicate(timeout=meshes.STUCK), task.returncode) for task in tasks]
    assert [code for *_, code in ended] == [0, 0, 0], ended
    reported = [printed for printed, _, _ in ended if "null of" in printed]
    assert reported, "the last task to end attributes"
    assert all("are left to other tasks" in said for printed, said, _ in ended if printed not in reported)

    there = {path.relative_to(family) for path in (family / "runs").glob("*/checkpoints/*")}
    assert {path.relative_to(tmp_path) for path in (tmp_path / "runs").glob("*/checkpoints/*")} == there
    for path in there:
        run, step = path.parts[1], int(path.name)
        one, other = (RunFolder(out / "runs" / run).record(step) for out in (family, tmp_path))
        assert one["weights"] == other["weights"]
    summaries = [files.read_json(out / "studies" / "children" / "report" / "summary.json") for out in (family, tmp_path)]
    assert summaries[0]["comparisons"] == summaries[1]["comparisons"]

    spent = [files.read_json(out / "studies" / "children" / "timings.json") for out in (family, tmp_path)]
    for stage, amount in (("train", "tokens"), ("sample", "texts"), ("attribute by subwords", "texts")):
        assert spent[0][stage][amount] == spent[1][stage][amount], "what is done twice counts twice"
    again = commanded(*map(str, command), "--task", "1", "--tasks", "3")
    assert (again.returncode, again.stdout) == (0, reported[0]), "a task that is started again finds all done"


def claimed(out):
    """(subject, claim) → the claim, of what can be recomputed on eight devices: nothing is trained again."""
    return {(claim.subject, claim.claim): claim for claim in audit(out, Progress(quiet=True), replayed=0)}


def test_parents_are_trained_first_and_once_and_audit_proves_both_generations(family):
    ended = commanded("audit", family)
    assert ended.returncode == 0, ended.stdout
    assert ", 0 recorded but not proven here, 0 false" in ended.stdout
    begins = "the weights of step 0 are those of step 8 of the parent of parent_init"
    for init, order in itertools.product((0, 1), (0, 1)):
        assert (f"arm parent_init{init}-order{order}", f"{begins}{init}-order0") in claimed(family)
    assert len(list((family / "runs").iterdir())) == 6


def test_the_report_says_what_arms_began_with(family):
    page = (family / "studies" / "children" / "report" / "report.md").read_text()
    assert "Not held fixed: what the arms began with. parent_init0-order0, parent_init0-order1: step 8 of run" in page
    assert "`parent.experiment.seeds.init` | `0` | `1`" in page
    summary = files.read_json(family / "studies" / "children" / "report" / "summary.json")
    assert [arm["seeds"] for arm in summary["arms"]] == [{"order": order, "dropout": 0} for order in (0, 1, 0, 1)]


def test_the_status_has_a_row_for_each_parent_and_nothing_to_sample_of_it(family):
    (table,) = status(family)
    arm, corpus, train, sample = ([str(cell) for cell in column.cells] for column in table.columns)
    assert arm[:2] == ["parent of parent_init0-order0", "parent of parent_init1-order0"]
    assert len(arm) == 6
    assert (set(corpus), set(train), sample) == ({"done"}, {"done"}, ["", "", "done", "done", "done", "done"])


def test_a_study_that_has_become_impossible_does_not_end_the_audit_of_the_others(family, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(family, out)
    path = out / "studies" / "children" / "study.json"
    written = {name: value for name, value in files.read_json(path).items() if name != "sha256"}
    written["study"]["factors"] = [{"path": "seeds.init", "levels": [0, 1]}]
    files.write_json(path, written)
    claims = claimed(out)
    assert claims["study children", "every arm is the experiment that the study says"].verdict == "false"
    assert claims["arm parent_init0-order0", "each checkpoint names the parent's that it begins with"].verdict == "proven"


def test_texts_answer_held_out_questions_and_end_with_the_turn(family):
    work = Work(study(family), family, Progress(quiet=True))
    with open(work.store.folder / "prompts.jsonl", encoding="utf-8") as lines:
        asked = {message["content"] for line in lines for message in json.loads(json.loads(line)["text"])[:1]}
    for path in (family / "studies" / "children" / "draws").glob("*.parquet"):
        table = texts.read(path)
        for prompt, ids in zip(table["prompt"].to_pylist(), table["ids"].to_pylist(), strict=True):
            found = re.fullmatch(r"Question:\n(.*)\nAnswer:\n", prompt)
            assert found[1] in asked
            assert work.store.end_id not in ids[:-1]
            assert len(ids) == 12 or ids[-1] == work.store.end_id


def test_a_second_study_of_the_same_children_trains_nothing(family, one_device):
    before = {path: path.stat().st_mtime_ns for path in (family / "runs").rglob("*") if path.name != ".lock"}
    worked(family, study(family, name="again"), one_device, last="train")
    after = {path: path.stat().st_mtime_ns for path in (family / "runs").rglob("*") if path.name != ".lock"}
    shutil.rmtree(family / "studies" / "again")
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_a_parent_that_is_lost_is_made_again_with_the_same_bits_once_a_child_needs_it(family, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(family, out)
    work = Work(study(family), out, Progress(quiet=True))
    lost = work.run_of("parent of parent_init0-order0")
    shutil.rmtree(lost.folder)
    begun = "the weights of step 0 are those of step 8 of "
    claim = claimed(out)["arm parent_init0-order0", f"{begun}run {lost.folder.name}"]
    assert (claim.verdict, claim.detail) == ("recorded", "its parent is not here")
    assert "train" not in commanded("train", family / "children.py", "--out", out).stderr
    assert not lost.folder.exists()  # what is finished stands
    child = work.run_of("parent_init0-order1")
    shutil.rmtree(child.folder)
    assert commanded("train", family / "children.py", "--out", out).returncode == 0
    for run in (lost, child):
        assert run.records() == RunFolder(family / "runs" / run.folder.name).records()
    assert "false" not in {claim.verdict for claim in claimed(out).values()}
    assert claimed(out)["arm parent_init0-order0", f"{begun}the parent of parent_init0-order0"].verdict == "proven"


def rewritten(run, step, **changes):
    """Changes the record of a checkpoint, and seals it again."""
    place = run.checkpoints / str(step)
    record = {**files.read_json(place / files.MANIFEST)["record"], **changes}
    files.write_json(place / files.MANIFEST, {"record": record, "files": files.manifest(place)})


def test_a_parent_that_is_no_longer_what_a_child_began_with_is_refused(family, one_device, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(family, out)
    work = Work(study(family), out, Progress(quiet=True))
    parent = work.run_of("parent of parent_init0-order0")
    rewritten(parent, 8, weights="0" * 64)
    with pytest.raises(UserError, match=r"began with the weights \w{16} of .*, which now are 0{16}: move") as refusal:
        worked(out, study(family), one_device)
    assert "\n" not in str(refusal.value)
    false = {name: claim.detail for name, claim in claimed(out).items() if claim.verdict == "false"}
    assert ("arm parent_init0-order0", "each checkpoint names the parent's that it begins with") in false


def test_where_parents_were_trained_counts_in_what_children_are_compared_by(family, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(family, out)
    work = Work(study(family), out, Progress(quiet=True))
    assert not summarise(work)["numerics"]["differ"]
    parent = work.run_of("parent of parent_init1-order0")
    rewritten(parent, 8, numerics={**parent.record(8)["numerics"], "backend": "tpu"})
    differ = summarise(Work(study(family), out, Progress(quiet=True)))["numerics"]["differ"]
    assert {(one["stage"], *one["fields"]) for one in differ} == {("train", "backend")}
    assert not any(one["comparison"].startswith(("order 0 vs 1 (parent_init 0)", "null")) for one in differ)


def test_a_copy_that_is_none_is_no_matter_of_the_machine(family, tmp_path):
    """Step 0 of a child all of whose weights are its parent's is a copy on any machine."""
    out = tmp_path / "out"
    shutil.copytree(family, out)
    run = Work(study(family), out, Progress(quiet=True)).run_of("parent_init0-order0")
    shutil.rmtree(Work(study(family), out, Progress(quiet=True)).run_of("parent of parent_init0-order0").folder)
    elsewhere = {**run.record(0)["numerics"], "backend": "tpu"}
    rewritten(run, 0, weights="1" * 64, init_hash="1" * 64, numerics=elsewhere)
    claim = claimed(out)["arm parent_init0-order0", "each checkpoint names the parent's that it begins with"]
    assert (claim.verdict, claim.detail[:34]) == ("false", "checkpoint 0 is 1111111111111111, ")


def test_a_child_that_began_elsewhere_is_found_by_audit(family, tmp_path):
    """Children of two parents change places, all records relabelled and made to fit."""
    out = tmp_path / "out"
    shutil.copytree(family, out)
    work = Work(study(family), out, Progress(quiet=True))
    one, other = work.run_of("parent_init0-order0"), work.run_of("parent_init1-order0")
    one.checkpoints.rename(out / "swap")
    other.checkpoints.rename(one.checkpoints)
    (out / "swap").rename(other.checkpoints)
    for run in (one, other):
        arm = next(arm for arm in work.arms.values() if work.run_of(arm.id) == run)
        for step in (0, 4):
            rewritten(run, step, fingerprint=run.owner(), origin=work.origin_of(arm).record())
        old = files.read_json(run.folder / "lineage.json")
        files.write_json(run.folder / "lineage.json", {**old, "checkpoints": run.records()})
    false = {name: claim.detail for name, claim in claimed(out).items() if claim.verdict == "false"}
    detail = false["arm parent_init0-order0", "the weights of step 0 are those of step 8 of the parent of parent_init0-order0"]
    assert "that is step 8 of the parent of parent_init1-order0" in detail


@pytest.mark.slow
def test_a_base_that_was_trained_beside_its_adapters_is_found_by_audit(family, one_device, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    conversations(out / "asked.jsonl", 400)
    experiment = replace(study(out).experiment, lora=ADAPTED, dropout=0.0)
    factors = Factor("seeds.init", (0, 1)), Factor("lora.alpha", (16.0, 32.0))  # the other stands in no weight
    given = study(out, name="adapted", experiment=experiment, factors=factors, design="one_at_a_time")
    work = worked(out, given, one_device, last="train")
    claims = claimed(out)
    assert "false" not in {claim.verdict for claim in claims.values()}
    assert claims["arm base", "nothing but the adapters was trained"].verdict == "proven"
    assert (
        "arm init1",
        "the weights of step 0 are those of step 8 of the parent of base, and adapters of init seed 1",
    ) in claims
    run = work.run_of("base")
    flat = weights(run, 4, experiment, one_device)
    flat["norm"] = np.nextafter(flat["norm"], np.float32(2))
    moved = jax.tree.map(jax.numpy.asarray, params.nest(flat))
    with checkpoint.Checkpoints(out / "other") as writer:
        writer.save(4, moved, {"unused": jax.numpy.zeros(1)}, {"step": 4})
    shutil.rmtree(run.checkpoints / "4" / "params")
    (out / "other" / "4" / "params").rename(run.checkpoints / "4" / "params")
    rewritten(run, 4, weights=weight_hash(moved))
    claims = claimed(out)
    assert "step 4: all other weights have sha256" in claims["arm base", "nothing but the adapters was trained"].detail


def test_a_grandparent_comes_before_a_parent(tmp_path):
    middle = replace(study(tmp_path).experiment, parent=Parent(PARENT, fraction=0.5))
    base = replace(middle, parent=Parent(middle))
    given = study(tmp_path, experiment=base, factors=(Factor("seeds.order", (0, 1)),))
    found = parents(arms(given))
    assert [(one.id, one.experiment) for one in found] == [("parent of parent of order0", PARENT), ("parent of order0", middle)]


CHILD = Experiment(model=PARENT.model, data=Data(seq_len=32, windows=64, batch=8), parent=Parent(PARENT))


@pytest.mark.parametrize(
    ("changes", "factor", "part"),
    [
        ({"parent": Parent(CHILD)}, Factor("parent.experiment.seeds.init", (0, 1)), "seeds.init decides nothing"),
        ({"parent": Parent(CHILD)}, Factor("parent.experiment.seeds.dropout", (0, 1)), "nor seeds.dropout"),
        ({}, Factor("parent.fraction", (1.0, 0.9999)), "are the same experiment"),
        (
            {"parent": Parent(replace(CHILD, parent=Parent(replace(PARENT, model=Model(width=16, layers=1, heads=2)))))},
            Factor("seeds.order", (0, 1)),
            "the parent of arm order0 has model.width 32, its parent 16",
        ),
        (
            {"parent": Parent(replace(PARENT, lora=ADAPTED))},
            Factor("seeds.order", (0, 1)),
            "the parent of arm order0 has lora but no parent",
        ),
        ({}, Factor("parent.experiment.corpus.vocabulary", (300, 400)), "all arms of a study share the tokenizer"),
        ({"lora": ADAPTED, "parent": None}, Factor("seeds.order", (0, 1)), "has lora but no parent"),
        ({"model": Model(width=32, layers=2, heads=2)}, Factor("seeds.order", (0, 1)), "has model.layers 2, its parent 1"),
        ({}, Factor("seeds.init", (0, 1)), "seeds.init decides nothing of a child whose weights are all its parent's"),
        ({"dropout": 0.0}, Factor("seeds.dropout", (0, 1)), "nor seeds.dropout without dropout"),
        (
            {"parent": Parent(replace(PARENT, data=Data(windows=63, batch=8)))},
            Factor("seeds.order", (0, 1)),
            "steps are not whole",
        ),
    ],
)
def test_what_cannot_descend_is_told_in_one_line(changes, factor, part, tmp_path):
    given = study(tmp_path, factors=(factor,))
    with pytest.raises(UserError, match=re.escape(part)) as refusal:
        arms(replace(given, experiment=replace(given.experiment, **changes)))
    assert "\n" not in str(refusal.value)


def test_a_field_that_a_level_did_not_know_yet_makes_no_other_study(tmp_path):
    """As where an earlier version has written it: seeds had no `dropout` then."""
    given = Study(name="older", experiment=PARENT, factors=(Factor("seeds", (Seeds(), Seeds(init=1, order=1))),))
    given = config.from_json(Study, config.to_json(given))  # as from a file
    written = config.to_json(given)
    for level in written["factors"][0]["levels"]:
        del level["dropout"]
    folder = tmp_path / "studies" / "older"
    older = config.from_json(Study, written)
    files.write_json(folder / "study.json", {"fingerprint": config.fingerprint(older), "study": written})
    files.write_json(folder / "arms.json", {})
    assert config.fingerprint(older) != config.fingerprint(given)
    assert [arm.experiment for arm in arms(older)] == [arm.experiment for arm in arms(given)]
    with Work(given, tmp_path, Progress(quiet=True)).claimed():
        pass
    other = config.override(given, 'factors=[{"path": "seeds", "levels": [{"init": 0}, {"init": 2}]}]')
    with pytest.raises(UserError, match="they differ in factors"), Work(other, tmp_path, Progress(quiet=True)).claimed():
        pass


def test_a_template_that_does_not_fit_the_tokenizer_is_told_before_anything_is_trained(tmp_path, one_device):
    conversations(tmp_path / "asked.jsonl", 50)
    given = study(tmp_path)
    wrong = replace(given.experiment.corpus, template=Template(end_of_turn="<|im_end|>"))
    with pytest.raises(UserError, match=r"template.end_of_turn '<\|im_end\|>' is no special token .* are '<\|eos\|>'"):
        worked(tmp_path, replace(given, experiment=replace(given.experiment, corpus=wrong)), one_device, last="train")
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_of_a_child_is_refused(tmp_path, one_device):
    conversations(tmp_path / "asked.jsonl", 50)
    given = study(tmp_path)
    other = replace(given.experiment.corpus, tokenizer="another.json")
    with pytest.raises(UserError, match=r"gives the tokenizer another.json, but all arms share that of the corpus"):
        worked(tmp_path, replace(given, experiment=replace(given.experiment, corpus=other)), one_device, last="train")
