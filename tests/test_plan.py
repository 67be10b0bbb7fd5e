"""What a plan says, against the programs themselves; and the verb as its users meet it."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from natfp_jax import config, mesh, platforms
from natfp_jax.chips import CHIPS
from natfp_jax.config import Corpus, Data, Experiment, Factor, Model, Parent, Run, Sampling, Stories, Study
from natfp_jax.plan import alike, plan, remedy
from natfp_jax.plan_tables import notes, refused
from natfp_jax.program import program_for
from natfp_jax.remedies import nearest
from natfp_jax.study import arms, parents
from natfp_jax.training_cost import memory_of, training

STUDY = Study(
    name="tiny",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=2000), vocabulary=300),
        model=Model(width=64, layers=2, heads=4),
        data=Data(seq_len=32, windows=160, batch=16),
    ),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    sampling=Sampling(prompts=100, new_tokens=20, batch=8),
)
V5E = next(chip for chip in CHIPS if chip.name == "v5e")


def planned(study, chip=V5E, devices=1):
    laid = mesh.make(study.run.mesh, jax.devices()[:devices])
    said = []
    with platforms.planned(chip.platform):
        found = plan(study, "here", chip, laid, said.append)
    return found, laid, said


@pytest.fixture(scope="module")
def tiny():
    return planned(STUDY)


def test_a_plan_has_the_bytes_of_the_program_that_trains(tiny):
    found, laid, _ = tiny
    (trained,) = found.trainings
    with platforms.planned("tpu"):
        program = program_for(STUDY.experiment, 300, 384, laid, STUDY.run, 4)
        assert trained.memory.least == program.device_bytes
    analysis = program.compiled.memory_analysis()
    parameters = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(program.state.params))
    assert trained.memory.parameters == parameters
    assert parameters + trained.memory.state < analysis.argument_size_in_bytes < 1.01 * (parameters + trained.memory.state)
    assert trained.memory.fits
    assert found.fits


def test_a_plan_adds_up_all_arms_draws_and_checkpoints(tiny):
    found, _, said = tiny
    (trained,), (texts,) = found.trainings, found.texts
    assert trained.arms == ("init0-order0", "init0-order1", "init1-order0", "init1-order1")
    assert (trained.together, trained.cohorts, trained.steps, trained.execution) == (4, 1, 10, "fast")
    assert trained.tokens == 4 * 16 * 32
    assert trained.seconds == 10 * trained.time.seconds
    assert trained.time.seconds >= trained.executed / V5E.bf16, "no step is quicker than its operations"
    assert texts.draws == 5, "every arm, and one twice"
    assert texts.seconds >= 5 * math.ceil(100 / 8) * 20 * texts.memory.parameters / V5E.bandwidth
    assert found.hours == (trained.seconds + texts.seconds) / 3600
    one = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(trained_state()))
    assert found.disk == (4 * 2 + 4 * 2) * one, "start and end of each arm, two restart states of the cohort"
    assert any("4 arms" in line for line in said)
    assert any("lower bounds" in line for line in notes(found))


def trained_state():
    return program_for(STUDY.experiment, 300, 384, mesh.make(config.Mesh(), jax.devices()[:1]), STUDY.run).one


def trained_by(chip=V5E, experiment=STUDY.experiment, said=None, **settings):
    said = [] if said is None else said
    laid = mesh.make(config.Mesh(), jax.devices()[:1])
    with platforms.planned(chip.platform):
        return training(["a", "b", "c", "d"], experiment, (300, 384), Run(**settings), chip, laid, said.append)


@pytest.mark.slow
def test_a_cohort_is_as_large_as_training_would_make_it(tiny):
    asked = trained_by(cohort=3)
    assert (asked.together, asked.cohorts) == (2, 2), "as equal as can be"
    assert asked.seconds == 2 * 10 * asked.time.seconds
    said = []
    four = tiny[0].trainings[0].memory.least
    small = trained_by(replace(V5E, platform="gpu", memory=0.9 * four / 0.8), said=said)
    assert (small.together, small.cohorts) == (2, 2)
    assert any("fewer at a time" in line for line in said)


def test_a_parent_is_a_training_of_its_own():
    child = replace(STUDY.experiment, parent=Parent(STUDY.experiment))
    study = replace(STUDY, experiment=child, factors=(Factor("seeds.order", (0, 1)),))
    groups = alike([*parents(arms(study)), *arms(study)])
    assert [[arm.id for arm in group] for group in groups] == [["parent of order0"], ["order0", "order1"]]


def too_large(found, of="trainings"):
    """A plan whose training, or sampling, has no room."""
    return replace(found, **{of: tuple(replace(one, memory=replace(one.memory, usable=1)) for one in getattr(found, of))})


def test_what_does_not_fit_is_answered_with_settings_that_do(tiny):
    deep = replace(
        STUDY.experiment,
        model=replace(STUDY.experiment.model, layers=6),
        data=Data(seq_len=64, windows=64, batch=16),
    )
    devices = mesh.make(config.Mesh(), jax.devices()[:1])
    whole = trained_by(experiment=deep, cohort=1).memory
    small = int(0.8 * whole.least)
    with platforms.planned("tpu"):
        other = nearest([deep], (300, 384), Run(), small, devices, lambda line: None)
        assert other is not None
        assert other.memory.fits
        settings = replace(STUDY, run=Run())
        for override in other.overrides:
            settings = config.override(settings, override)
        again = memory_of(program_for(deep, 300, 384, devices, settings.run), small)
    assert again == other.memory, "what is printed can be pasted"
    assert again.fits
    assert " ".join(other.overrides) in refused(too_large(tiny[0]), other)


def test_where_sampling_alone_has_no_room_it_is_what_is_changed(tiny):
    found = too_large(tiny[0], "texts")
    assert not found.fits
    assert remedy(STUDY, found, mesh.make(config.Mesh(), jax.devices()[:1]), lambda line: None) is None
    assert "sampling.batch" in refused(found, None)


def test_where_nothing_fits_it_is_told(tiny):
    devices = mesh.make(config.Mesh(), jax.devices()[:1])
    with platforms.planned("tpu"):
        other = nearest([STUDY.experiment], (300, 384), Run(), 2**16, devices, lambda line: None)
    assert other is None, "not even weights and gradients"
    assert "does not fit" in refused(too_large(tiny[0]), other)


# --- the verb -----------------------------------------------------------------------------------------------------------

TINY = """
from natfp_jax.config import Corpus, Data, Experiment, Factor, Mesh, Model, Run, Sampling, Tfds, Study

study = Study(
    name="tiny",
    experiment=Experiment(
        corpus=Corpus(source=Tfds("no/such"), vocabulary=300),
        model=Model(width=32, layers=1, heads=2),
        data=Data(seq_len=32, windows=160, batch=16),
    ),
    factors=(Factor("seeds.init", (0, 1)),),
    sampling=Sampling(prompts=100, new_tokens=8),
    run=Run(mesh=Mesh(fsdp=2)),
)
"""


def natfp(*args, folder):
    """A real process with the machine's own devices."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    study = folder / "tiny.py"
    study.write_text(TINY)
    command = [sys.executable, "-c", "from natfp_jax.cli import main; main()", "plan", str(study), *args]
    return subprocess.run(command, capture_output=True, text=True, env=kept, check=False, cwd=folder)


def test_the_verb_plans_for_devices_that_are_not_at_hand_and_reads_no_corpus(tmp_path):
    done = natfp("--topology", "cpu:4", "run.remat=full", "--json", "plan.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("bytes of one device", "4 devices", "all-reduce", "fsdp", "chip-hours", "lower bounds", "Measured just now"):
        assert word in done.stdout, done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["fits"], found["estimated"]) == (4, True, False)
    assert found["trainings"][0]["sent"]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.py", "plan.json"}, "nothing else is written"


def test_a_plan_for_gpus_says_that_it_is_an_estimate_and_one_that_does_not_fit_ends_with_1(tmp_path):
    texts = str(2**27)
    done = natfp("--topology", "h200:2", f"sampling.batch={texts}", f"sampling.prompts={texts}", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "give a smaller sampling.batch" in " ".join(done.stdout.split())
    assert "An estimate" in done.stdout
    assert "112 GB usable" in done.stdout, "JAX takes three quarters of 139 GiB"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology", "v9:4x4"), "no chip is called 'v9'"),
        (("--topology", "cpu:3"), "does not multiply to the 3 devices"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, args, message):
    done = natfp(*args, folder=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("natfp: ")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the `tpu` extra is installed")
def test_without_the_compiler_of_tpus_the_extra_is_named(tmp_path):
    done = natfp("--topology", "v5e:2x2", folder=tmp_path)
    assert done.returncode == 2
    assert "natfp-jax[tpu]" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the `tpu` extra")
def test_a_tpu_slice_is_planned_by_its_own_compiler(tmp_path):
    done = natfp("--topology", "v5e:2x2", "--json", "plan.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "An estimate" not in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["chip"]["name"], found["fits"]) == (4, "v5e", True)
    assert {tuple(sent["axes"]) for sent in found["trainings"][0]["sent"]} <= {("data",), ("fsdp",), ("data", "fsdp")}
