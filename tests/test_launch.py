"""What `launch/` starts: scripts beside stand-ins for what they talk to, files against their schemas, `local.sh` for real."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from natfp_jax import cli
from tests.soak import meshes, slurm, studies

LAUNCH = meshes.ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
NATFP = Path(sys.executable).with_name("natfp")
ARGUMENTS = ["configs/quickstart.py", "--out", "there", "name=a name"]


def put(path, script):
    """Makes a program of a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def noting(tmp_path):
    """A stand-in for natfp, and the command lines that it was given so far."""
    notes = tmp_path / "notes"
    program = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\" >>{notes}"

    def lines():
        return [json.loads(line) for line in notes.read_text().splitlines()]

    return put(tmp_path / "natfp", program), lines


@pytest.fixture
def parsed(monkeypatch):
    """What the real command line makes of arguments: the study, its overrides and how it is carried out."""

    def parse(arguments):
        found = []
        monkeypatch.setattr(cli, "_perform", lambda *given: found.append(given))
        monkeypatch.setattr(sys, "argv", ["natfp", *arguments])
        cli.main()
        ((study, overrides, how, *stages),) = found
        assert stages == ["train", "sample", "attribute"]
        assert (meshes.ROOT / study).exists()
        return overrides, how

    return parse


# --- all of them --------------------------------------------------------------------------------------------------------


def test_each_file_is_short_and_explained():
    page = (LAUNCH / "README.md").read_text()
    assert [path.name for path in SCRIPTS] == ["local.sh", "slurm.sbatch", "tpu_vm.sh"]
    assert [path.name for path in MANIFESTS] == ["gke_jobset.yaml", "skypilot.yaml"]
    for path in (*SCRIPTS, *MANIFESTS):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert page.count(f"`{path.name}`") >= 3, path.name  # what it is for, what to know, how it was checked
    assert {path.name for path in LAUNCH.iterdir()} == {path.name for path in (*SCRIPTS, *MANIFESTS)} | {"README.md"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: pip install -e '.[test]'")
def test_scripts_pass_shellcheck():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_scripts_say_how_they_are_used():
    done = subprocess.run([LAUNCH / "local.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: launch/local.sh PROCESSES STUDY [options of natfp run]\n")
    done = subprocess.run([LAUNCH / "tpu_vm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SHARE=HOST:/PATH or gs://BUCKET/FOLDER is missing" in done.stderr


# --- local.sh -----------------------------------------------------------------------------------------------------------


def test_local_processes_know_one_another(noting, parsed):
    natfp, lines = noting
    done = subprocess.run(
        [LAUNCH / "local.sh", "3", *ARGUMENTS], env={**os.environ, "NATFP": natfp, "PORT": "4711"}, check=False
    )
    assert done.returncode == 0
    found = [parsed(line) for line in lines()]
    assert all(overrides == ("name=a name",) and how.out == Path("there") for overrides, how in found)
    assert sorted((how.coordinator, how.processes, how.process) for _, how in found) == [
        ("localhost:4711", 3, i) for i in range(3)
    ]


def test_each_local_process_has_one_of_the_gpus_that_are_given(tmp_path):
    natfp = put(tmp_path / "natfp", f'echo "$CUDA_VISIBLE_DEVICES" >>{tmp_path}/seen')
    for given, expected in (("4,6", ["4", "6"]), ("", ["0", "1"])):
        environment = {**os.environ, "NATFP": natfp, "CUDA_VISIBLE_DEVICES": given}
        subprocess.run([LAUNCH / "local.sh", "2", *ARGUMENTS], env=environment, check=True)
        assert sorted((tmp_path / "seen").read_text().split()) == expected
        (tmp_path / "seen").unlink()


@pytest.mark.parametrize(("first", "then", "tries", "end"), [(75, 0, 2, 0), (134, 0, 2, 0), (2, 0, 1, 2), (75, 75, 4, 75)])
def test_local_processes_are_started_again_where_that_helps(first, then, tries, end, tmp_path):
    script = f'echo >>{tmp_path}/tries; [ "$(wc -l <{tmp_path}/tries)" -gt 1 ] && exit {then}; exit {first}'
    environment = {**os.environ, "NATFP": put(tmp_path / "natfp", script), "RESTARTS": "3"}
    done = subprocess.run([LAUNCH / "local.sh", "1", *ARGUMENTS], env=environment, check=False, capture_output=True)
    assert done.returncode == end
    assert len((tmp_path / "tries").read_text()) == tries


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_processes_hear_a_signal_and_stay_stopped(number, tmp_path):
    """All of them save in their own time, and the worst of their codes is told."""
    script = f'trap "sleep 0.3; exit 75" TERM; echo >>{tmp_path}/ready; while :; do sleep 0.05; done'
    environment = {**os.environ, "NATFP": put(tmp_path / "natfp", script)}
    # What starts the tests in the background may have made them deaf to Ctrl-C, and deafness is inherited; a handler is not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen([LAUNCH / "local.sh", "2", *ARGUMENTS], env=environment, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    late = time.monotonic() + 60
    while not (tmp_path / "ready").exists() or len((tmp_path / "ready").read_text()) < 2:
        assert time.monotonic() < late
        time.sleep(0.05)
    started.send_signal(number)
    assert started.wait(60) == 75
    assert len((tmp_path / "ready").read_text()) == 2


@pytest.mark.slow
def test_local_processes_make_the_weights_of_one_that_has_all_their_devices(tmp_path):
    study = tmp_path / "study.py"
    study.write_text(meshes.STUDY)
    command = ["study.py", "run.mesh.fsdp=2", "run.cohort=1", "experiment.model.layers=1", "--out"]
    # all that `natfp run` does, but for the time that attribution takes
    train = put(tmp_path / "natfp", f'shift; exec {NATFP} train "$@"')
    environment = meshes.environment(1, NATFP=str(train))
    one = subprocess.Popen([NATFP, "train", *command, "one"], env=meshes.environment(2), cwd=tmp_path)
    two = subprocess.run([LAUNCH / "local.sh", "2", *command, "two"], env=environment, cwd=tmp_path, check=False)
    assert (one.wait(meshes.STUCK), two.returncode) == (0, 0)
    records = [meshes.latest(tmp_path / name) for name in ("one", "two")]
    assert records[0] == records[1]
    assert len({record["weights"] for record in records[0].values()}) == 2


# --- slurm.sbatch (under a real SLURM: test_slurm.py) ---------------------------------------------------------------------


ARRAY = {"SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("task", "expected"),
    [({}, (None, None)), ({**ARRAY, "SLURM_ARRAY_TASK_ID": "1"}, (1, 4))],
)
def test_tasks_of_slurm_get_their_share(task, expected, noting, parsed, tmp_path):
    natfp, lines = noting
    put(tmp_path / "bin" / "srun", 'while [[ $1 = -* ]]; do shift; done; exec "$@"')
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NATFP": natfp, "SLURM_JOB_ID": "7", **task}
    subprocess.run(["bash", slurm.FILE, *ARGUMENTS], env=environment, check=True)
    ((overrides, how),) = [parsed(line) for line in lines()]
    assert overrides == ("name=a name",)
    assert (how.task, how.tasks) == expected
    assert (how.coordinator, how.processes, how.process) == (None, None, None)  # SLURM says


def test_a_part_of_an_array_is_not_taken_for_the_whole(noting):
    natfp, _ = noting
    environment = {**os.environ, **ARRAY, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1", "NATFP": natfp}
    done = subprocess.run(["bash", slurm.FILE, *ARGUMENTS], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--array=0-3" in done.stderr
    assert not natfp.with_name("notes").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [(75, "0", True), (134, "2", True), (75, "3", False), (2, "0", False), (137, "0", False)]
)
def test_a_job_of_slurm_is_queued_again_where_that_helps(code, restarts, again, tmp_path):
    put(tmp_path / "bin" / "srun", f"exit {code}")
    put(tmp_path / "bin" / "scontrol", f'echo "$@" >{tmp_path}/asked')
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environment = {**os.environ, **path, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts, "RESTARTS": "3"}
    done = subprocess.run(["bash", slurm.FILE, *ARGUMENTS], env=environment, check=False)
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 7\n" if again else None)
    assert done.returncode == (0 if again else code)


# --- tpu_vm.sh ----------------------------------------------------------------------------------------------------------

GCLOUD = r"""
{ printf '%s\0' gcloud "$@"; printf '\1'; } >>"$WORK/calls"
case "$*" in
    *queued-resources\ describe*)
        [ -z "${OFFLINE:-}" ] || [ -e "$WORK/asked" ] || { echo >"$WORK/asked"; echo "no network" >&2; exit 1; }
        cat "$WORK/state" 2>/dev/null || { echo "NOT_FOUND: there is none" >&2; exit 1; } ;;
    *queued-resources\ create*) echo "${CREATED:-ACTIVE}" >"$WORK/state"; exit "${REFUSED:-0}" ;;
    *queued-resources\ delete*) rm "$WORK/state" ;;
    *tpu-vm\ scp*) cp "$5" "$WORK/sent.tgz" ;;
    *natfp\ run*)
        echo >>"$WORK/runs"
        [ "$(wc -l <"$WORK/runs")" -gt 1 ] || { echo SUSPENDED >"$WORK/state"; exit 255; }
        exit "${ENDS:-0}" ;;
    *uv\ pip*) exit "${SETUP:-0}" ;;
    *storage\ rsync*) cp -r "$WORK/there/studies" out ;;
    *tar\ -cz*) tar -cz -C "$WORK/there" studies ;;
esac
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """Runs the script in a checkout of its own, with a slice that is taken away in the first run; what it asked for."""
    put(tmp_path / "bin" / "gcloud", GCLOUD)
    checkout = tmp_path / "checkout"
    (checkout / "configs").mkdir(parents=True)
    (checkout / "configs" / "mine.py").write_text("mine")
    (checkout / ".gitignore").write_text("out\n")
    (checkout / "out").mkdir()
    (checkout / "out" / "large").write_text("large")
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    report = tmp_path / "there" / "studies" / "quickstart" / "report" / "report.md"
    report.parent.mkdir(parents=True)
    report.write_text("found")

    def run(**more):
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "WORK": tmp_path, "SHARE": "10.0.0.2:/natfp", "PAUSE": "0.01", **more}
        arguments = ["configs/quickstart.py", "name=a name"]
        done = subprocess.run([LAUNCH / "tpu_vm.sh", *arguments], cwd=checkout, env=environment, check=False, timeout=60)
        calls = (tmp_path / "calls").read_text().split("\0\1")[:-1]
        return done.returncode, [call.split("\0") for call in calls]

    return run


def verbs(calls):
    """What was asked for, without the questions to the queue."""
    told = [next(word for word in ("create", "describe", "delete", "scp", "ssh") if word in call) for call in calls]
    return [word for word in told if word != "describe"]


def test_a_tpu_slice_that_is_taken_away_is_asked_for_again_and_deleted_in_the_end(tpu_vm, parsed, tmp_path):
    code, calls = tpu_vm()
    assert code == 0
    once = ["create", "scp", "ssh", "ssh"]  # copied, installed, run
    assert verbs(calls) == [*once, "delete", *once, "ssh", "delete"]
    runs = [call[call.index("--command") + 1] for call in calls if "natfp run" in call[-1]]
    assert runs[0] == runs[1]
    arguments = shlex.split(runs[0].partition("cd natfp && ")[2])
    assert arguments[0] == ".venv/bin/natfp"
    overrides, how = parsed(arguments[1:])
    assert (overrides, how.out) == (("name=a name",), Path("/mnt/natfp/out"))
    listed = subprocess.run(["tar", "-tzf", tmp_path / "sent.tgz"], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == [".gitignore", "configs/mine.py"]
    assert (tmp_path / "checkout" / "out" / "studies" / "quickstart" / "report" / "report.md").read_text() == "found"
    assert not (tmp_path / "state").exists()


def test_a_tpu_slice_whose_study_fails_is_left_for_a_look(tpu_vm, tmp_path):
    code, calls = tpu_vm(ENDS="2")
    assert code == 2
    assert verbs(calls)[-1] == "ssh"
    assert (tmp_path / "state").exists()


def test_a_setup_that_fails_is_not_tried_again_at_the_users_expense(tpu_vm, tmp_path):
    code, calls = tpu_vm(SETUP="1")
    assert code == 1
    assert verbs(calls) == ["create", "scp", "ssh"]
    assert (tmp_path / "state").exists()


def test_a_slice_that_cannot_be_asked_about_is_not_taken_for_none(tpu_vm, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    code, calls = tpu_vm(OFFLINE="1")
    assert code == 0
    assert verbs(calls)[:3] == ["scp", "ssh", "ssh"]


def test_a_study_on_tpus_may_be_kept_in_a_bucket(tpu_vm, parsed, tmp_path):
    code, calls = tpu_vm(SHARE="gs://bucket/folder")
    assert code == 0
    assert not any("mount" in word for call in calls for word in call)
    run = next(call[-1] for call in calls if "natfp run" in call[-1])
    _, how = parsed(shlex.split(run.partition("cd natfp && ")[2])[1:])
    assert str(how.out) == "gs://bucket/folder/out"
    assert (tmp_path / "checkout" / "out" / "studies" / "quickstart" / "report" / "report.md").read_text() == "found"


def test_a_tpu_slice_that_is_refused_is_not_asked_for_again(tpu_vm):
    code, calls = tpu_vm(REFUSED="1")
    assert code == 1
    assert verbs(calls) == ["create"]


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_the_real_gcloud_understands_what_it_is_asked(tpu_vm, tmp_path):
    _, calls = tpu_vm()
    asked = {tuple(call[1:6]): [*call[:-1], "true"] if "ssh" in call else call for call in calls}
    assert len(asked) >= 5
    for call in asked.values():
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={shlex.join(call)}"]
        done = subprocess.run(lint, capture_output=True, text=True, check=False, timeout=120)
        (found,) = json.loads(done.stdout)
        assert found["success"], (call, found["error_message"])


# --- manifests ----------------------------------------------------------------------------------------------------------


def test_the_jobs_of_the_jobset_are_those_of_kubernetes(parsed):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "natfp"}, **replicated["template"]}
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0] == "natfp"
    _, how = parsed(container["command"][1:])
    assert str(how.out) == container["volumeMounts"][0]["mountPath"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    chips = container["resources"]["limits"]["google.com/tpu"] * job["spec"]["parallelism"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert chips == x * y
    on_code, on_loss = job["spec"]["podFailurePolicy"]["rules"]
    assert on_code["onExitCodes"]["values"] == [studies.STOPPED, 134]
    assert on_code["onExitCodes"]["containerName"] == container["name"]
    assert on_loss["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    job["spec"]["paralelism"] = 4
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def test_a_node_of_skypilot_runs_a_command_that_there_is(noting, parsed, tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [studies.STOPPED, 134]
    natfp, lines = noting
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(natfp, tmp_path / ".venv" / "bin" / "natfp")
    subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env={**os.environ, **task["envs"]}, check=True)
    ((overrides, how),) = [parsed(line) for line in lines()]
    assert overrides == ()
    assert f'sudo mount -t nfs "$SHARE" {how.out.parent}' in task["setup"]
    assert re.search(r"port (\d+)", (LAUNCH / "skypilot.yaml").read_text())[1] == "8476"
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)


def test_skypilot_takes_its_task(tmp_path):
    """SkyPilot is large: it is no part of the `test` extra."""
    pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    program = f"import sky; task = sky.Task.from_yaml({str(LAUNCH / 'skypilot.yaml')!r}); print(task.num_nodes)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines()[-1:] == ["2"], done.stderr
