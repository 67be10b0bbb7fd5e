"""Children begin with their parent's weights, bit for bit, prove it, and keep every promise that other arms keep.

Conversations are of stories: who lost what. The parents of the first part are checkpoints of the tiny experiment.
"""

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

from natfp_jax import checkpoint, config, files, lora, mesh, params, processes, texts
from natfp_jax.audit import audit
from natfp_jax.chat import Chat
from natfp_jax.config import (
    Attribution,
    Conversations,
    Corpus,
    Data,
    Experiment,
    Factor,
    Lora,
    Model,
    Optimiser,
    Parent,
    Perturb,
    Run,
    Sampling,
    Seeds,
    Stories,
    Study,
    Template,
)
from natfp_jax.corpus import prepare
from natfp_jax.datasets.stories import story
from natfp_jax.errors import Stopped, UserError
from natfp_jax.lineage import identity, weight_hash
from natfp_jax.member import Member, Origin
from natfp_jax.params import flatten
from natfp_jax.progress import Progress
from natfp_jax.report import report, summarise
from natfp_jax.runs import RunFolder
from natfp_jax.stages import Work
from natfp_jax.stopping import Stop
from natfp_jax.study import arms, parents
from natfp_jax.train import load_params, train
from tests.soak import meshes

ADAPTED = Lora(rank=2, targets=("q", "v", "o", "down"))
STEPS = (0, 4, 8)


def conversations(path, count):
    """Questions about the first stories, and their answers."""
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            lost = re.search(r"(\w+ \w+ \w+) the (\w+) lost a (\w+ \w+)", story(0, index))
            asked = f"{index}: what did the {lost[2]} lose?"
            file.write(json.dumps({"prompt": asked, "response": f"A {lost[3]}."}) + "\n")
    return path


@pytest.fixture(scope="module")
def asked_store(tiny_store, tmp_path_factory):
    """500 conversations under the tokenizer of the tiny store."""
    folder = tmp_path_factory.mktemp("asked")
    corpus = Corpus(
        source=Conversations(str(conversations(folder / "asked.jsonl", 500))),
        template=Template(user="Q: {content}\n", assistant="A: {content}"),
        tokenizer=str(tiny_store.folder / "tokenizer.json"),
        validation_fraction=0.1,
        prompt_fraction=0.1,
        shards=2,
    )
    return prepare(corpus, folder, Progress(quiet=True))


@pytest.fixture(scope="module")
def child(tiny, asked_store):
    """An experiment of 8 steps, two epochs of four, that begins with the end of the tiny one."""
    return Experiment(
        corpus=Corpus(source=Conversations()),  # what it was made from does not matter any more
        model=tiny.model,
        data=Data(seq_len=64, windows=32, epochs=2, batch=8),
        dropout=0.2,
        parent=Parent(tiny),
    )


def member(experiment, store, folder, parent_run, name="child"):
    pool, parent = store.pool(experiment.data).sha256(), experiment.parent
    who = identity(experiment, store.sha256, store.tokenizer.sha256, pool, parent_run.owner())
    return Member(name, experiment, who, store, RunFolder(folder), Origin(parent.experiment, parent_run, parent.step))


@pytest.fixture(scope="module")
def trained(asked_store, tiny_run, one_device):
    """Trains children in a folder and returns their runs."""

    def made(experiments, folder, *, devices=one_device, stop=None, advance=lambda steps: None, **settings):
        cohort = [
            member(one, asked_store, folder / str(place), tiny_run, f"child{place}") for place, one in enumerate(experiments)
        ]
        chosen = Run(**{"log_every": 2, "validation_windows": 16, "checkpoints": (0.5,), **settings})
        train(cohort, folder / "restart", chosen, devices, advance, stop)
        return [one.run for one in cohort]

    return made


@pytest.fixture(scope="module")
def full(child, trained, tmp_path_factory):
    """A child all of whose weights are trained; read it only."""
    return trained([child], tmp_path_factory.mktemp("full"))[0]


@pytest.fixture(scope="module")
def adapted(child, trained, tmp_path_factory):
    """A child of which adapters alone are trained; read it only."""
    return trained([replace(child, lora=ADAPTED)], tmp_path_factory.mktemp("adapted"))[0]


def weights(run, step, experiment, one_device, padded=384):
    """Path → array of a checkpoint, adapters beside what they adapt."""
    specs = lora.table(experiment.model, padded, experiment.lora)
    like = checkpoint.with_shardings(params.abstract(specs), mesh.param_shardings(one_device, specs))
    return {path: np.asarray(leaf) for path, leaf in flatten(checkpoint.restore(run.checkpoints, step, like)[0]).items()}


def hashes(run, steps=STEPS):
    return [run.record(step)["weights"] for step in steps]


# --- where a child begins ---------------------------------------------------------------------------------------------


def test_a_child_begins_with_the_bits_of_its_parent_and_says_so(full, tiny_run):
    assert full.record(0)["weights"] == tiny_run.record(16)["weights"]
    origin = {"fingerprint": tiny_run.owner(), "step": 16, "weights": tiny_run.record(16)["weights"]}
    assert [full.record(step)["origin"] for step in STEPS] == [origin] * 3
    assert [full.record(step)["init_hash"] for step in STEPS] == [origin["weights"]] * 3
    assert [full.record(step)["parent"] for step in (0, 4)] == [None, {"step": 0, "weights": origin["weights"]}]
    assert len(set(hashes(full))) == 3
    assert "origin" not in tiny_run.record(16)


def test_an_earlier_checkpoint_of_the_parent_is_another_parent(child, trained, tiny, tiny_run, tmp_path):
    early = replace(child, parent=Parent(tiny, fraction=0.25))
    (run,) = trained([early], tmp_path)
    assert run.record(0)["weights"] == tiny_run.record(4)["weights"]
    assert config.fingerprint(early) != config.fingerprint(child)


def test_a_child_has_an_optimiser_of_its_own(full, child, asked_store, one_device):
    like = member(child, asked_store, full.folder, full)  # any program of this shape
    from natfp_jax.program import program_of

    one = program_of(like.experiment, asked_store, one_device, Run()).one
    _, state = checkpoint.restore(full.checkpoints, 0, one.params, one.optimiser)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))


def test_nothing_but_adapters_is_trained_and_they_start_at_the_parent(adapted, child, tiny, tiny_run, one_device):
    child = replace(child, lora=ADAPTED)
    parent = weights(tiny_run, 16, tiny, one_device)
    first, last = (weights(adapted, step, child, one_device) for step in (0, 8))
    paths = {
        f"layers/{path}{part}"
        for path in ("attention/q", "attention/v", "attention/o", "mlp/down")
        for part in (lora.A, lora.B)
    }
    assert set(first) == set(parent) | paths
    for path, value in parent.items():
        np.testing.assert_array_equal(first[path], value)
        np.testing.assert_array_equal(last[path], value)
    for path in paths:
        assert (last[path] != first[path]).any()
        assert path.endswith(lora.A) == first[path].any()


def test_the_seeds_decide_what_they_should_and_nothing_else(child, adapted, trained, tmp_path, one_device):
    base = replace(child, lora=ADAPTED)
    changed = [replace(base, seeds=Seeds(**{name: 1})) for name in ("init", "order", "dropout")]
    init, order, dropout = (trained([one], tmp_path / str(place))[0] for place, one in enumerate(changed))
    old, new = weights(adapted, 0, base, one_device), weights(init, 0, base, one_device)
    assert {path for path in old if (old[path] != new[path]).any()} == {path for path in old if path.endswith(lora.A)}
    assert init.record(8)["order_hash"] == adapted.record(8)["order_hash"] == dropout.record(8)["order_hash"]
    assert order.record(8)["order_hash"] != adapted.record(8)["order_hash"]
    assert hashes(order)[0] == hashes(dropout)[0] == hashes(adapted)[0]
    ends = {run.record(8)["weights"] for run in (adapted, init, order, dropout)}
    assert len(ends) == 4


@pytest.mark.parametrize("path", ["layers/attention/q", "layers/attention/q_lora_a"])
def test_a_twin_of_a_child_is_one_unit_in_one_weight_away(path, child, adapted, trained, tmp_path, one_device):
    base = replace(child, lora=ADAPTED)
    (run,) = trained([replace(base, perturb=Perturb(path, 7, 3))], tmp_path)
    old, new = weights(adapted, 0, base, one_device), weights(run, 0, base, one_device)
    differ = {name: np.flatnonzero(old[name] != new[name]).tolist() for name in old if (old[name] != new[name]).any()}
    assert differ == {path: [7]}
    bits = [array[path].reshape(-1)[7:8].view(np.int32)[0] for array in (old, new)]
    assert abs(int(bits[1]) - int(bits[0])) == 3
    assert hashes(run)[2] != hashes(adapted)[2]


# --- invariants 2, 4, 5 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [None, ADAPTED])
def test_a_child_that_is_stopped_at_any_step_ends_as_an_untouched_one(adapters, child, trained, full, adapted, tmp_path):
    stop, stops = Stop(), 0

    def advance(steps):
        stop.requested = True

    for _ in range(20):
        stop.requested = False
        try:
            (run,) = trained([replace(child, lora=adapters)], tmp_path, stop=stop, advance=advance)
        except Stopped:
            stops += 1
        else:
            break
    assert stops >= 4
    untouched = adapted if adapters else full
    assert [run.record(step) for step in STEPS] == [untouched.record(step) for step in STEPS]


def test_a_cohort_of_children_gives_each_the_bits_that_it_has_alone(child, tiny, trained, full, tmp_path):
    """They differ in parent, order, dropout and rate."""
    others = [
        replace(child, parent=Parent(tiny, fraction=0.5), seeds=Seeds(order=1)),
        replace(child, seeds=Seeds(dropout=5)),
        replace(child, optimiser=Optimiser(learning_rate=1e-3)),
    ]
    together = trained([child, *others], tmp_path / "together", execution="strict")
    assert hashes(together[0]) == hashes(full)
    for place, one in enumerate(others, 1):
        (alone,) = trained([one], tmp_path / f"alone{place}", execution="strict")
        assert hashes(together[place]) == hashes(alone)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "data": 2, "fsdp": 2}])
def test_a_mesh_changes_last_bits_of_training_and_none_of_the_start(shape, child, trained, adapted, tmp_path, one_device):
    base = replace(child, lora=ADAPTED)
    (run,) = trained([base], tmp_path, devices=mesh.make(config.Mesh(**shape)), microbatches=2)
    assert hashes(run)[0] == hashes(adapted)[0]
    assert run.record(8)["order_hash"] == adapted.record(8)["order_hash"]
    here, there = (weights(one, 8, base, one_device) for one in (run, adapted))
    moved = weights(adapted, 0, base, one_device)
    for path in here:
        far = np.abs(there[path] - moved[path]).max()
        assert np.abs(here[path] - there[path]).max() <= 0.02 * far, path
    assert run.record(8)["val_loss"] == pytest.approx(adapted.record(8)["val_loss"], abs=1e-3)


def test_what_is_read_of_a_child_with_adapters_is_the_merged_decoder(adapted, child, asked_store, one_device):
    base = replace(child, lora=ADAPTED)
    merged = flatten(load_params(adapted, 8, base, asked_store, one_device))
    raw = weights(adapted, 8, base, one_device)
    assert set(merged) == {path for path in raw if "_lora_" not in path}
    for path, value in merged.items():
        expected = raw[path].astype(np.float64)
        if path + lora.A in raw:
            a, b = (raw[path + part].astype(np.float64) for part in (lora.A, lora.B))
            product = np.stack([x.reshape(-1, 2) @ y.reshape(2, -1) for x, y in zip(a, b, strict=True)])
            expected = expected + 16 / 2 * product.reshape(expected.shape)
        np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5, atol=1e-7)
        assert (path + lora.A in raw) == (np.asarray(value) != raw[path]).any()


# --- studies ----------------------------------------------------------------------------------------------------------

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
    file = "from pathlib import Path\n\nfrom tests.test_descent import study as made\n\n"
    (out / "children.py").write_text(f"{file}study = made(Path({str(out)!r}))\n")
    ended = commanded("run", out / "children.py", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "train 2 parents (16 steps)" in ended.stderr
    return out


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


def test_adapters_are_merged_into_the_same_bits_on_every_mesh(adapted, child, asked_store, one_device):
    base = replace(child, lora=ADAPTED)
    expected = flatten(load_params(adapted, 8, base, asked_store, one_device))
    for shape in ({"tensor": 4, "data": 2}, {"fsdp": 4, "tensor": 2}):
        found = flatten(load_params(adapted, 8, base, asked_store, mesh.make(config.Mesh(**shape))))
        for path, value in expected.items():
            np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=path)


def test_a_form_is_the_same_in_training_and_in_asking(asked_store):
    chat = asked_store.chat
    assert isinstance(chat, Chat)
    rows = asked_store.windows(64, 4).rows(np.arange(4)) & ((1 << 29) - 1)
    asked = chat.asked([[{"role": "user", "content": "what did the fox lose?"}]])[0]
    begins = asked[: 1 + len(chat.tokenizer.encode_form("Q: "))]
    assert all(row[: len(begins)].tolist() == begins for row in rows)
