"""What becomes of a study under a real SLURM.

Owns three ways of `launch/slurm.sbatch`: two tasks of a node that are told to stop; a task on each of two hosts, one of which
loses its network in the middle of training; an array of jobs. `python -m tests.soak.slurm [--out DIR]` writes DIR/slurm.json
and DIR/slurm.txt. Needs what `cluster` needs, and says so where it is missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.soak import hosts, meshes, studies
from tests.soak.cluster import LATE, NAMES, Cluster, Job, cluster, missing

__all__ = ["FILE", "PAIR", "STUDY", "Outcome", "arrayed", "cut_off", "local", "two_tasks", "written"]

FILE = meshes.ROOT / "launch" / "slurm.sbatch"
LOCAL = meshes.ROOT / "launch" / "local.sh"
SAID = ("natfp", "srun: error", "train ", "sample ", "task ", "report: ")  # lines worth keeping
PAIR = ("run.mesh.fsdp=2",)  # what two processes do together
OFTEN = ("run.save_minutes=0.002",)  # restart states: there is time to pull a cable
STUDY = """
from natfp_jax.config import *

study = Study(
    name="soak",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.3, shards=2),
        model=Model(width=32, layers=1, heads=4),
        data=Data(seq_len=32, windows=96, epochs=2, batch=8),
    ),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    run=Run(cohort=2, log_every=4, validation_windows=16, heartbeat_seconds=5),
    sampling=Sampling(prompts=60, prompt_chars=20, new_tokens=8, batch=32),
    attribution=Attribution(classifiers=("subwords",), bootstraps=999),
)
"""


def written(folder: Path) -> Path:
    """The study's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak.py"
    path.write_text(STUDY)
    return path


# --- a study under it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What was submitted, how the jobs of it ended, what natfp said in them, and where the study lies."""

    command: list[str]
    jobs: list[Job]
    said: list[str]
    out: Path
    seconds: float


def local(study: Path, out: Path, processes: int, *overrides: str) -> Path:
    """The same study by `launch/local.sh`, undisturbed; where it lies.

    Raises:
      RuntimeError: it did not end well.
    """
    command = [str(LOCAL), str(processes), str(study), "--out", str(out), *overrides]
    environment = meshes.environment(1, NATFP=str(Path(sys.executable).with_name("natfp")))
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            _, said = started.communicate(timeout=LATE)
        finally:
            if started.poll() is None:  # it stops its processes
                started.terminate()
    if started.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {started.returncode}: {said[-2000:]}")
    return out


def _outcome(on: Cluster, submitted: tuple[object, ...], ids: list[str], out: Path, begun: float) -> Outcome:
    jobs = [on.ended(job) for job in ids]
    said = [f"{job}: {line}" for job in ids for line in on.log(job).splitlines() if line.startswith(SAID)]
    return Outcome(["sbatch", *map(str, submitted)], jobs, said, out, round(time.monotonic() - begun, 1))


def _saved(out: Path) -> bool:
    return any(out.glob("restart/*/*/manifest.json"))


def two_tasks(on: Cluster, study: Path) -> Outcome:
    """Two tasks of one node, which SLURM tells to stop in the middle of training, as before the end of their time."""
    out, begun = on.folder / "two-tasks", time.monotonic()
    submitted = ("--nodes=1", "--ntasks-per-node=2", FILE, study, "--out", out, *PAIR, *OFTEN)
    job = on.submitted(*submitted)
    on.until(lambda: _saved(out), "a restart state is saved")
    on.asked("scancel", "--signal=TERM", job)  # what --signal=TERM@120 has SLURM do
    on.ended(job)
    return _outcome(on, submitted, [job], out, begun)


def cut_off(on: Cluster, study: Path) -> Outcome:
    """A task on each of two hosts; the second one's cable is pulled while they train, and put back once the job has ended.

    The node comes into service again only when it is done with the old job: the end of that would be taken for the new one's.
    """
    out, begun = on.folder / "cut-off", time.monotonic()
    submitted = ("--nodes=2", FILE, study, "--out", out, *PAIR, *OFTEN)
    job = on.submitted(*submitted)
    on.until(lambda: _saved(out), "a restart state is saved")
    hosts.cut(NAMES[1])
    try:
        on.until(lambda: on.job(job).restarts > 0, "SLURM misses a node, and queues the job again")
    finally:
        hosts.mend(NAMES[1])
    on.until(lambda: f"[{job}.0] done with job" in on.daemon_log(NAMES[1]), "the lost node is done with the old job")
    on.resumed(NAMES[1])
    on.ended(job)
    return _outcome(on, submitted, [job], out, begun)


def arrayed(on: Cluster, study: Path) -> Outcome:
    """An array of two jobs, one on each host."""
    out, begun = on.folder / "array", time.monotonic()
    submitted = ("--nodes=1", "--exclusive", "--array=0-1", FILE, study, "--out", out)
    array = on.submitted(*submitted)
    on.until(lambda: "ArrayTaskId=0-" not in on.asked("scontrol", "show", "job", array), "the array is started")
    on.until(lambda: len(on.members(array)) == 2, "all jobs of the array are started")
    ids = on.members(array)
    for job in ids:
        on.ended(job)
    return _outcome(on, submitted, ids, out, begun)


# --- all of them ------------------------------------------------------------------------------------------------------


def _described(outcome: Outcome, undisturbed: Path, work: Path) -> dict[str, object]:
    """An outcome beside the same study undisturbed, without the names of this machine's folders."""
    found, expected = (studies.results(out) for out in (outcome.out, undisturbed))

    def anonymous(text: str) -> str:
        for folder in (outcome.out.parent, work, meshes.ROOT):
            text = text.replace(f"{folder}/", "")
        return text.replace(NAMES[0], "node1").replace(NAMES[1], "node2")

    return {
        "command": anonymous(" ".join(outcome.command)),
        "jobs": [asdict(job) for job in outcome.jobs],
        "seconds": outcome.seconds,
        "said": [anonymous(line) for line in outcome.said],
        "weights": {arm: record["weights"] for arm, record in meshes.latest(outcome.out).items()},
        "undisturbed": {arm: record["weights"] for arm, record in meshes.latest(undisturbed).items()},
        "equal": {name: found[name] == expected[name] for name in found},
    }


def _text(found: dict[str, object]) -> str:
    lines = [f"{found['command']}: SLURM {found['slurm']}, two hosts of one machine ({json.dumps(found['machine'])})"]
    for name, one in found["ways"].items():
        lines += ["", f"{name}: {one['command']}", f"  {json.dumps(one['jobs'])} after {one['seconds']} s"]
        lines += [f"  | {line}" for line in one["said"]]
        lines += [f"  {arm}: weights {one['weights'][arm]}" for arm in one["weights"]]
        lines += [f"  {arm}: locally {one['undisturbed'][arm]}" for arm in one["undisturbed"]]
        lines += [f"  bitwise as by launch/local.sh: {json.dumps(one['equal'])}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.slurm", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=meshes.ROOT / "docs" / "results" / "plan")
    out = parser.parse_args().out
    if (why := missing()) is not None:
        print(f"skipped: {why}")
        return
    with studies.without_signals(), tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        study = written(work)
        pair, alone = local(study, work / "pair", 2, *PAIR), local(study, work / "alone", 1)
        with cluster(work / "slurm") as on:
            version = on.asked("sinfo", "--version").removeprefix("slurm").strip()
            ways = {
                "two tasks of a node, told to stop": _described(two_tasks(on, study), pair, work),
                "two hosts, one of which loses its network": _described(cut_off(on, study), pair, work),
                "an array": _described(arrayed(on, study), alone, work),
            }
    found = {"command": "python -m tests.soak.slurm", "slurm": version, "machine": studies.machine(), "ways": ways}
    out.mkdir(parents=True, exist_ok=True)
    (out / "slurm.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "slurm.txt").write_text(_text(found))
    print(_text(found))


if __name__ == "__main__":
    main()
