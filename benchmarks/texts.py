"""How sampling grows: `natfp sample` of 1,000 to 300,000 texts, time and memory of the whole command.

    python -m benchmarks.texts

The quickstart's model, trained for a few steps (how long a text is does not matter here: none ends before its last token but by
chance), two arms and the null, on prompts from a file. Each number of texts is a study of its own below one folder, so that the
arms are trained once, and each command a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from natfp_jax.datasets import stories

__all__ = ["main"]

STUDY = """
from dataclasses import replace
from pathlib import Path

from natfp_jax.loading import load_study

quick = load_study(Path({quickstart!r}))
data = replace(quick.experiment.data, windows=320)
study = replace(
    quick,
    name="texts{count}",
    experiment=replace(quick.experiment, data=data),
    factors=quick.factors[:1],
    sampling=replace(quick.sampling, prompts={prompts}, prompt_file={file!r}, checkpoints=(1.0,)),
)
"""
DRAWS = 3  # of two arms, and the second of the null
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"


def natfp(verb: str, study: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak memory, in bytes, of one command."""
    command = [sys.executable, "-c", "from natfp_jax.cli import main; main()", verb, str(study), "--out", str(out)]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - begun, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(counts: list[int]) -> list[dict[str, Any]]:
    """A row for each number of texts."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file, out = folder / "prompts.txt", folder / "out"
        most = -(-max(counts) // DRAWS)
        beginnings = dict.fromkeys(stories.story(1, index)[:50] for index in range(most * 3))
        file.write_text("\n".join(list(beginnings)[:most]) + "\n")
        for count in counts:
            study = folder / f"texts{count}.py"
            prompts = -(-count // DRAWS)
            study.write_text(STUDY.format(quickstart=str(QUICKSTART), count=count, prompts=prompts, file=str(file)))
            natfp("train", study, out)
            seconds, peak = natfp("sample", study, out)
            timing = json.loads((out / "studies" / f"texts{count}" / "timings.json").read_text())["sample"]
            written = sum(path.stat().st_size for path in (out / "studies" / f"texts{count}" / "draws").iterdir())
            rows.append(
                {
                    "texts": timing["texts"],
                    "tokens": timing["tokens"],
                    "command_seconds": seconds,
                    "stage_seconds": timing["seconds"],
                    "texts_per_s": timing["texts"] / timing["seconds"],
                    "tokens_per_s": timing["tokens"] / timing["seconds"],
                    "peak_memory_bytes": peak,
                    "file_bytes": written,
                }
            )
    return rows


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.texts", description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, nargs="*", default=[1_000, 10_000, 100_000, 300_000])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/texts.*")
    arguments = parser.parse_args()
    rows = measured(arguments.texts)
    found = {
        "command": f"python -m benchmarks.texts {' '.join(sys.argv[1:])}",
        "machine": report.machine(),
        "versions": report.versions(),
        "rows": rows,
    }
    lines = [
        (
            f"{row['texts']:,}",
            f"{row['tokens']:,}",
            f"{row['command_seconds']:.1f}",
            f"{row['stage_seconds']:.1f}",
            f"{row['texts_per_s']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
            f"{row['file_bytes'] / 1e6:,.1f}",
        )
        for row in rows
    ]
    columns = ["texts", "tokens", "command s", "stage s", "texts/s", "tokens/s", "peak memory MB", "files MB"]
    table = report.show("natfp sample, a model of the quickstart's size after 10 steps", columns, lines)
    if arguments.save:
        report.save("texts", found, table)


if __name__ == "__main__":
    main()
