"""Kills at random moments: after each the same command is run again, and the end is bitwise that of an untouched run.

    python -m tests.soak.kills --kills 64 --out docs/results/reliability

A moment is a stage (corpus, train, save, sample, attribute), chosen in turn and recognised by the files that are there, and a
random time after its start. With two processes one of them is hit, the other has to end by itself.
"""

import argparse
import collections
import random
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.soak.studies import LOST, STOPPED, Command, finish, machine, merged, results, without_signals, written

STAGES = ("corpus", "train", "save", "sample", "attribute")
LONGEST = {"corpus": 1.5, "train": 1.5, "save": 0.03, "sample": 1.0, "attribute": 2.0}  # seconds after its start
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}


@dataclass(frozen=True)
class Kill:
    """One signal that hit a process at work, and how all of them ended."""

    stage: str
    signal: str
    processes: int
    hit: int
    codes: list[int]


def begun(out: Path, stage: str, since: float) -> bool:
    """Whether a stage is at work: what comes before it is done, it is not; a save, if it began after `since`."""
    study = out / "studies" / "soak"
    arms, runs = (study / "arms.json").exists(), out / "runs"
    if stage == "corpus":
        return (out / "data").exists() and not arms
    if stage == "save":  # Orbax at work, or the manifest
        places = [*runs.glob("*/checkpoints/*"), *out.glob("restart/*/[!w]*")]
        steps = [path for path in places if path.is_dir()]
        return any(_unsealed(path) and _changed(path) > since for path in steps)
    trained = len(list(runs.glob("*/lineage.json"))) == 4
    if stage == "train":
        return arms and runs.exists() and not trained
    drawn = len(list((study / "draws").glob("*.manifest.json"))) == 10 * 3
    if stage == "sample":
        return trained and not drawn
    return drawn and not (study / "attribution.json").exists()


def _unsealed(step: Path) -> bool:
    return step.name[0] != "." and (not step.name.isdecimal() or not (step / "manifest.json").exists())


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed since
        return 0


def kill(command: Command, out: Path, stage: str, kind: str, moments: random.Random) -> Kill | None:
    """Sends one signal in a stage; None if the command got past it first."""
    since = time.time()
    while command.running() and not begun(out, stage, since):
        time.sleep(0.002)
    time.sleep(moments.uniform(0, LONGEST[stage]))
    hit = moments.randrange(len(command.processes))
    if not command.running():
        return None
    command.processes[hit].send_signal(SIGNALS[kind])
    ends = command.ended(120)
    codes = [code for code, _ in ends]
    if codes[hit] not in (-SIGNALS[kind], STOPPED):  # it was past its work
        assert codes[hit] == 0, ends
        return None
    for place, (code, said) in enumerate(ends):
        if place != hit:
            assert code in LOST or code == -signal.SIGABRT or code == 0, said
        assert "Traceback" not in said or code == -signal.SIGABRT, said
    return Kill(stage, kind, len(codes), hit, codes)


def soak(kills: int, folder: Path, seed: int, processes: tuple[int, ...] = (1, 2), each: int = 8) -> tuple[list[Kill], int]:
    """Kills until there were so many, in studies that are finished afterwards; the kills, and how many of them came right.

    Raises:
      AssertionError: a study did not end, or ended otherwise than the untouched one.
    """
    moments, study, cache = random.Random(seed), written(folder), folder / "compiled"
    untouched = {}
    for number in processes:
        finish(study, folder / f"untouched{number}", number, cache)
        untouched[number] = results(folder / f"untouched{number}")
    done: list[Kill] = []
    right, turn = 0, 0
    plan = [(stage, kind) for kind in SIGNALS for stage in STAGES]
    while len(done) < kills:
        number = processes[turn % len(processes)]
        out = folder / f"killed{turn}"
        here: list[Kill] = []
        # In the order of the stages: a study that is past its training cannot be killed in it any more.
        picked = sorted(moments.choices(plan, k=min(each, kills - len(done))), key=lambda one: STAGES.index(one[0]))
        for stage, kind in picked:
            with Command(study, out, number, cache) as command:
                if (hit := kill(command, out, stage, kind, moments)) is not None:
                    here.append(hit)
        finish(study, out, number, cache)
        found = results(out)
        assert found == untouched[number], f"{out} differs after {here}"
        right += len(here)
        done += here
        turn += 1
        shutil.rmtree(out)
    return done, right


def table(done: list[Kill]) -> Table:
    """Kills by stage, signal and number of processes."""
    shown = Table("stage", "signal", "processes", "kills", "exit codes")
    groups: dict[tuple[str, str, int], list[Kill]] = {}
    for one in done:
        groups.setdefault((one.stage, one.signal, one.processes), []).append(one)
    for stage in STAGES:
        for (name, kind, number), some in sorted(groups.items()):
            if name == stage:
                codes = collections.Counter(tuple(one.codes) for one in some)
                said = ", ".join(f"{' '.join(map(str, code))} x {count}" for code, count in codes.most_common())
                shown.add_row(stage, kind, str(number), str(len(some)), said)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/reliability"))
    given = parser.parse_args()
    started = time.monotonic()
    with without_signals(), tempfile.TemporaryDirectory() as folder:
        done, right = soak(given.kills, Path(folder), given.seed)
    command = f"python -m tests.soak.kills --kills {given.kills} --seed {given.seed} --out {given.out}"
    merged(
        given.out / "soak.json",
        kills=len(done),
        kills_recovered_bitwise=right,
        kills_command=command,
        kills_seconds=round(time.monotonic() - started),
        kills_machine=machine(),
        kill_list=[asdict(one) for one in done],
    )
    with open(given.out / "kills.txt", "w") as file:
        Console(file=file, width=120).print(f"{command}\n\n{len(done)} kills, {right} recovered bitwise", table(done))


if __name__ == "__main__":
    main()
