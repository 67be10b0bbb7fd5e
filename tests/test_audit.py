"""`natfp audit`: what is healthy is proven, planted faults are found and named, what cannot be recomputed is not proven."""

import shutil
import sys

import pytest

from natfp_jax import cli, files, lineage
from natfp_jax.audit import audit
from natfp_jax.progress import Progress
from tests.soak import faults

QUIET = Progress(quiet=True)

NAMED = {  # fault → what the audit must say of it
    faults.another_arm: "it is a checkpoint of arm init0-order0, under the name of arm init1-order0",
    faults.another_arm_relabelled: "arms init0-order0 and init1-order0 have the same weights at step 40",
    faults.another_step_0: "that is init seed 0 of arm init0-order",
    faults.right_step_0_of_another_training: "step 1 gives",
    faults.order_swapped: "that is order seed 1 of arm init",
    faults.one_bit_of_the_last: "step 40: its weights have sha256",
    faults.one_bit_recorded: "checkpoint 40 descends from",
    faults.one_bit_of_step_0: "the seed gives",
    faults.one_bit_on_disk: "is damaged: params/",
    faults.text_of_another_arm: "its column arm is not init1-order0 everywhere",
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return faults.healthy(tmp_path_factory.mktemp("audited"))


def verdicts(claims):
    return {(claim.subject, claim.claim): claim.verdict for claim in claims}


def test_a_healthy_study_is_proven_whole(healthy):
    claims = audit(healthy, QUIET)
    assert {claim.verdict for claim in claims} == {"proven"}
    said = " ".join(claim.claim for claim in claims)
    for part in (
        "init seed 1",
        "order of the seed",
        "steps 1, 2, 4, 8 follow from the seeds",
        "back to step 0",
        "texts are what was",
    ):
        assert part in said


def test_arms_that_were_stopped_before_their_first_checkpoint_share_an_order_that_nothing_was_fed_in_yet(healthy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(healthy, out)
    for run in (out / "runs").iterdir():
        (run / "lineage.json").unlink()
        for step in (12, 40):
            shutil.rmtree(run / "checkpoints" / str(step))
    for name in ("draws", "report"):
        shutil.rmtree(out / "studies" / "soak" / name)
    (out / "studies" / "soak" / "attribution.json").unlink()
    assert {claim.verdict for claim in audit(out, QUIET)} == {"proven", "recorded"}


@pytest.mark.slow
def test_every_step_can_be_trained_again(healthy):
    claims = [claim.claim for claim in audit(healthy, QUIET, replayed=40) if "follow from the seeds" in claim.claim]
    assert claims == ["the weights of steps 1, 2, 4, 8, 12, 40 follow from the seeds"] * 4


def test_every_planted_fault_has_its_name_here():
    assert set(NAMED) == set(faults.FAULTS)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_and_named(fault, healthy):
    claims = faults.planted(healthy, fault)
    assert NAMED[fault] in " ".join(claim.detail for claim in claims if claim.verdict == "false")
    assert any(claim.verdict == "proven" for claim in claims)


def test_what_another_machine_trained_is_recorded_and_not_proven(healthy, monkeypatch):
    here = lineage.numerics

    def elsewhere(*args, **shapes):
        return {**here(*args, **shapes), "cpu_threads": 96}

    monkeypatch.setattr("natfp_jax.train.numerics", elsewhere)
    claims = [claim for claim in audit(healthy, QUIET) if claim.verdict != "proven"]
    assert {claim.verdict for claim in claims} == {"recorded"}
    assert [claim.detail for claim in claims] == ["this machine differs in cpu_threads"] * 4


def test_without_its_corpus_a_run_is_recorded_and_not_proven(healthy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(healthy, out)
    shutil.rmtree(out / "corpora")
    recorded = [claim for claim in audit(out, QUIET) if claim.verdict != "proven"]
    assert [(claim.claim, claim.verdict) for claim in recorded] == [("corpus, init and order", "recorded")] * 4


def test_the_command_ends_with_1_where_something_is_false(healthy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(healthy, out)

    def ended(*more):
        monkeypatch.setattr(sys, "argv", ["natfp", "audit", str(out), "--replay", "0", *more])
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    assert ended("--json", str(tmp_path / "claims.json")) == 0
    assert "false" not in capsys.readouterr().out.replace("0 false", "")
    claims = files.read_json(tmp_path / "claims.json")["claims"]
    assert claims
    assert {claim["verdict"] for claim in claims} <= {"proven", "recorded"}
    faults.one_bit_on_disk(faults.Place(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ended() == 1
    said = capsys.readouterr()
    assert "false" in said.out
    assert "Remove what is false and run its study again" in said.out + said.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before  # an audit writes nothing
    monkeypatch.setattr(sys, "argv", ["natfp", "audit", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "has no runs" in capsys.readouterr().err
