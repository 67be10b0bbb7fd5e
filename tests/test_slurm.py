"""`launch/slurm.sbatch` under a real SLURM of two hosts: what is stopped, cut off or dealt ends with a local run's bits."""

import pytest

from tests.soak import cluster, slurm, studies

pytestmark = pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """The cluster."""
    with cluster.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as made:
        yield made


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return slurm.written(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def pair(study, tmp_path_factory):
    """What two undisturbed processes make of it."""
    return studies.results(slurm.local(study, tmp_path_factory.mktemp("pair") / "out", 2, *slurm.PAIR))


# --- the script, with a command of a moment in natfp's place ------------------------------------------------------------


@pytest.fixture
def natfp(on, tmp_path):
    """Puts a shell script in natfp's place; it may write to $NOTES."""

    def put(script):
        path = tmp_path / "natfp"
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return [f"--export=ALL,NATFP={path},NOTES={tmp_path / 'notes'}", "--nodes=1"]

    return put


def test_what_stops_for_a_while_is_queued_again(on, natfp, tmp_path):
    options = natfp('echo "$@" >>"$NOTES"; [ "$(wc -l <"$NOTES")" -gt 1 ] || exit 75')
    job = on.submitted(*options, slurm.FILE, "a study.py", "--out", "there")
    assert on.ended(job) == cluster.Job("COMPLETED", 0, 1)
    assert (tmp_path / "notes").read_text() == "run a study.py --out there\n" * 2


def test_a_mistake_is_not_tried_again(on, natfp):
    job = on.submitted(*natfp("exit 2"), slurm.FILE, "study.py")
    assert on.ended(job) == cluster.Job("FAILED", 2, 0)


def test_what_the_user_cancels_stays_cancelled(on, natfp, tmp_path):
    job = on.submitted(*natfp('trap "exit 75" TERM; echo "$@" >"$NOTES"; sleep 60 & wait'), slurm.FILE, "study.py")
    on.until((tmp_path / "notes").exists, "it runs")
    on.asked("scancel", job)
    assert on.ended(job).state == "CANCELLED"


# --- a study ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_tasks_of_a_node_that_are_told_to_stop_go_on_to_the_bits_of_an_undisturbed_run(on, study, pair):
    outcome = slurm.two_tasks(on, study)
    assert outcome.jobs == [cluster.Job("COMPLETED", 0, 1)]
    assert any(" are saved at step " in line for line in outcome.said), outcome.said
    assert any(line.endswith("is queued again") for line in outcome.said), outcome.said
    assert studies.results(outcome.out) == pair


@pytest.mark.slow
def test_a_host_that_loses_its_network_ends_the_job_which_goes_on_to_the_bits_of_an_undisturbed_run(on, study, pair):
    outcome = slurm.cut_off(on, study)
    assert [job.state for job in outcome.jobs] == ["COMPLETED"]
    assert outcome.jobs[0].restarts > 0
    assert any(" has lost another process (" in line for line in outcome.said), outcome.said
    assert studies.results(outcome.out) == pair


@pytest.mark.slow
def test_an_array_deals_the_arms_and_reports_once_with_the_bits_of_an_undisturbed_run(on, study, tmp_path):
    outcome = slurm.arrayed(on, study)
    assert outcome.jobs == [cluster.Job("COMPLETED", 0, 0)] * 2
    assert [line.partition(": ")[2][:12] for line in outcome.said if ": train " in line] == ["train 2 arms"] * 2
    assert studies.results(outcome.out) == studies.results(slurm.local(study, tmp_path / "out", 1))
