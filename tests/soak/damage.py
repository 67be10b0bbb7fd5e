"""Flipped bits and truncations in every kind of file: each is refused, or told of and made again; none is taken for the truth.

    python -m tests.soak.damage --damages 330 --out docs/results/reliability

A finished or interrupted study is copied, one file of it damaged, what would be made from that file taken away so that it is
read, and the same command run again. What it does not read at all, `natfp audit` has to find.
"""

import argparse
import collections
import contextlib
import io
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from natfp_jax import cli, config
from natfp_jax.audit import audit
from natfp_jax.config import Study
from natfp_jax.errors import UserError
from natfp_jax.loading import load_study
from natfp_jax.progress import Progress
from natfp_jax.stopping import Stop
from tests.soak.kills import begun
from tests.soak.studies import Command, machine, merged, results, without_signals, written

STAGES = ("train", "sample", "attribute")


def nothing(out: Path) -> None:
    """The file is read, or not, by a finished study."""


def undrawn(out: Path) -> None:
    """All checkpoints are loaded again."""
    shutil.rmtree(out / "studies" / "soak" / "draws")
    unattributed(out)


def unattributed(out: Path) -> None:
    """All texts are read again."""
    (out / "studies" / "soak" / "attribution.json").unlink()


def untokenised(out: Path) -> None:
    """The prepared data set is read again."""
    shutil.rmtree(out / "corpora")


@dataclass(frozen=True)
class Kind:
    """A kind of file: where such files lie in a study, in which state of it, and what is taken away so that they are read."""

    name: str
    pattern: str
    state: str = "finished"
    prepare: Callable[[Path], None] = nothing


KINDS = (
    Kind("token store: shards", "corpora/*/train-*.bin"),
    Kind("token store: validation", "corpora/*/validation.bin"),
    Kind("token store: prompts", "corpora/*/prompts.jsonl"),
    Kind("token store: tokenizer", "corpora/*/tokenizer.json"),
    Kind("token store: meta.json", "corpora/*/meta.json"),
    Kind("half a token store", "corpora/*/*[!k]", state="in its corpus"),
    Kind("prepared data: documents", "data/**/*array_record*", prepare=untokenised),
    Kind("prepared data: descriptions", "data/**/*.json", prepare=untokenised),
    Kind("checkpoint: params", "runs/*/checkpoints/*/params/**/*", prepare=undrawn),
    Kind("checkpoint: optimiser", "runs/*/checkpoints/*/optimiser/**/*"),
    Kind("checkpoint: manifest", "runs/*/checkpoints/*/manifest.json"),
    Kind("checkpoint: Orbax's own", "runs/*/checkpoints/*/_*"),
    Kind("restart state", "restart/[!.]*/[0-9]*/*/**/*", state="in its training"),
    Kind("restart state: manifest", "restart/[!.]*/[0-9]*/manifest.json", state="in its training"),
    Kind("checkpoint to go on from", "runs/*/checkpoints/*/*/**/*", state="in its first training"),
    Kind("experiment.json", "runs/*/experiment.json"),
    Kind("lineage.json", "runs/*/lineage.json"),
    Kind("metrics.jsonl", "runs/*/metrics.jsonl"),
    Kind("study.json", "studies/*/study.json"),
    Kind("arms.json", "studies/*/arms.json"),
    Kind("timings.json", "studies/*/timings.json"),
    Kind("texts", "studies/*/draws/*.parquet", prepare=unattributed),
    Kind("texts: manifest", "studies/*/draws/*.manifest.json"),
    Kind("attribution.json", "studies/*/attribution.json"),
    Kind("summary.json", "studies/*/report/summary.json"),
    Kind("report.md and figures", "studies/*/report/*[dg]"),
)


@dataclass(frozen=True)
class Damage:
    """One damage, and what became of it."""

    kind: str
    file: str
    how: str
    outcome: str  # "refused", "made again", "found by the audit" or "accepted silently"
    said: str


def small(study: Study) -> Study:
    """The soak's study with two arms, for one process that does it hundreds of times."""
    data = replace(study.experiment.data, windows=160)
    corpus = config.replace(study.experiment.corpus, "source.count", 1500)
    experiment = replace(study.experiment, data=data, corpus=replace(corpus, prompt_fraction=0.15, validation_fraction=0.1))
    sampling, often = replace(study.sampling, prompts=120), replace(study.run, save_minutes=0.001)
    return replace(study, experiment=experiment, factors=study.factors[:1], sampling=sampling, run=often)


def carried_out(study: Study, out: Path) -> tuple[str, bool]:
    """Runs the study as the command line does; what it said, and whether it came to the end."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cli._stages(study, cli.How(out=out), STAGES, Stop())
        except UserError as error:
            return f"{said.getvalue()}natfp: {error}", False
    return said.getvalue(), True


def damaged(path: Path, moments: random.Random) -> str:
    """Flips one bit of a file, or cuts it short; says which."""
    data = bytearray(path.read_bytes())
    if moments.random() < 0.7:
        place, bit = moments.randrange(len(data)), moments.randrange(8)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        return f"bit {bit} of byte {place} of {len(data)}"
    length = moments.randrange(len(data))
    path.write_bytes(data[:length])
    return f"cut to {length} of {len(data)} bytes"


def states(study: Study, folder: Path) -> Iterator[tuple[str, Path]]:
    """A finished study, and studies that were killed in their corpus and in their training."""
    file = written(folder)
    file.write_text(f"from natfp_jax.config import *\n\nstudy = from_json(Study, {config.to_json(study)!r})\n")
    finished = folder / "finished"
    said, whole = carried_out(study, finished)
    assert whole, said
    yield "finished", finished

    def killed(name: str, ready: Callable[[Path], bool]) -> Path:
        for attempt in range(20):
            out = folder / f"{name}{attempt}"
            with Command(file, out, 1, folder / "compiled") as command:
                while command.running() and not ready(out):
                    time.sleep(0.001)
                if command.running():
                    command.processes[0].send_signal(signal.SIGKILL)
                    command.ended()
                    if ready(out):
                        return out
        raise AssertionError(f"no kill came in time: {name}")

    def tokenising(out: Path) -> bool:
        return begun(out, "corpus", 0) and any(path.stat().st_size for path in out.glob("corpora/*/train-*.bin"))

    def restartable(out: Path) -> bool:
        saved = list(out.glob("restart/[!.]*/[0-9]*"))
        if len(saved) < 2 or not all((step / "manifest.json").exists() for step in saved):
            return False
        kept = [int(step.name.split(".")[0]) for step in out.glob("runs/*/checkpoints/[0-9]*")]
        return max(kept) < max(int(step.name) for step in saved)  # what comes before a kept checkpoint is read no more

    def first(out: Path) -> bool:
        return bool(list(out.glob("runs/*/checkpoints/0/manifest.json"))) and not list(out.glob("runs/*/lineage.json"))

    yield "in its corpus", killed("corpus", tokenising)
    yield "in its training", killed("training", restartable)
    yield "in its first training", killed("first", first)


def judged(kind: Kind, study: Study, source: Path, out: Path, untouched: dict[str, Any], moments: random.Random) -> Damage:
    """Damages one file of a copy and runs the command again."""
    shutil.copytree(source, out)
    kind.prepare(out)
    candidates = [path for path in sorted(out.glob(kind.pattern)) if path.is_file() and path.stat().st_size]
    if kind.state == "in its training":  # of the run under way, the last one alone is read
        newest = max(int(path.relative_to(out).parts[2]) for path in candidates)
        candidates = [path for path in candidates if int(path.relative_to(out).parts[2]) == newest]
    path = moments.choice(candidates)
    how = damaged(path, moments)
    said, whole = carried_out(study, out)
    name = path.relative_to(out)
    named = any(str(place) in said for place in (path, *path.parents) if out in place.parents and place.parent != out)
    if not whole:
        outcome = "refused"
    elif results(out) != untouched:
        outcome = "accepted silently"  # even if something was said: what came out is not what it should be
    elif named:
        outcome = "made again"
    elif any(claim.verdict == "false" for claim in audit(out, Progress(quiet=True), replayed=0)):
        outcome = "found by the audit"
    else:
        outcome = "accepted silently"
    shutil.rmtree(out)
    return Damage(kind.name, str(name), how, outcome, " ".join(said.split("\n")[-2:]).strip()[-300:])


def soak(damages: int, folder: Path, seed: int) -> list[Damage]:
    """So many damages, the kinds in turn."""
    study, moments = small(load_study(written(folder))), random.Random(seed)
    sources = dict(states(study, folder))
    untouched = results(sources["finished"])
    return [
        judged(kind, study, sources[kind.state], folder / "damaged", untouched, moments)
        for kind in (KINDS[place % len(KINDS)] for place in range(damages))
    ]


def table(done: list[Damage]) -> Table:
    """Outcomes by kind of file."""
    outcomes = ("refused", "made again", "found by the audit", "accepted silently")
    shown = Table("kind of file", "damages", *outcomes)
    for kind in KINDS:
        some = collections.Counter(one.outcome for one in done if one.kind == kind.name)
        shown.add_row(kind.name, str(some.total()), *(str(some[outcome]) for outcome in outcomes))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=13 * len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/reliability"))
    given = parser.parse_args()
    started = time.monotonic()
    with without_signals(), tempfile.TemporaryDirectory() as folder:
        done = soak(given.damages, Path(folder), given.seed)
    command = f"python -m tests.soak.damage --damages {given.damages} --seed {given.seed} --out {given.out}"
    silent = sum(one.outcome == "accepted silently" for one in done)
    merged(
        given.out / "soak.json",
        damages=len(done),
        damages_accepted_silently=silent,
        damages_command=command,
        damages_seconds=round(time.monotonic() - started),
        damages_machine=machine(),
        damage_list=[{**asdict(one), "said": one.said.replace(str(folder), "OUT")} for one in done],
    )
    with open(given.out / "damage.txt", "w") as file:
        Console(file=file, width=120).print(f"{command}\n\n{len(done)} damages, {silent} accepted silently", table(done))


if __name__ == "__main__":
    main()
