"""What the studies of configs/scale cost on every hardware that they have settings for: docs/results/plan.

    python -m benchmarks.plan_all [--sizes 70m 160m] [--hardware v5e-16] [--jobs 1]

Each is planned by `natfp plan` in a process of its own, since JAX is told once for how many devices it is to compile. TPUs need
the `tpu` extra. What is there already is not planned again, whatever has changed since: remove it first. The table is of all
that is there.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import report
from natfp_jax.cli import FALSE

__all__ = ["main"]

ROOT = Path(__file__).parent.parent
STUDY, RESULTS = ROOT / "configs" / "scale" / "seeds.py", ROOT / "docs" / "results" / "plan"
TOPOLOGIES = {"h200x1": "h200:1", "h200x8": "h200:8", "v5e-16": "v5e:4x4", "v5e-256": "v5e:16x16", "v5p-64": "v5p:2x4x4"}
SIZES = ("70m", "160m", "410m", "1.4b", "7b")


def planned(size: str, hardware: str) -> dict[str, Any]:
    """The plan of one, made if it is not there."""
    path = RESULTS / f"{size}-{hardware}.json"
    if not path.exists():
        command = [sys.executable, "-c", "from natfp_jax.cli import main; main()", "plan", str(STUDY)]
        command += [f"size={size}", f"hardware={hardware}", "--topology", TOPOLOGIES[hardware], "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode > FALSE:
            raise SystemExit(f"{size} on {hardware}: {done.stderr.strip().splitlines()[-1]}")
        path.with_suffix(".txt").write_text(done.stdout)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def line(size: str, hardware: str, plan: dict[str, Any]) -> tuple[object, ...]:
    """One row of the table."""
    (trained,), (texts,) = plan["trainings"], plan["texts"]
    usable = trained["memory"]["usable"]
    return (
        size,
        f"{TOPOLOGIES[hardware]}{' (estimate)' if plan['estimated'] else ''}",
        "yes" if plan["fits"] else "NO",
        *(f"{memory['least'] / 1e9:.1f} of {usable / 1e9:.1f} GB" for memory in (trained["memory"], texts["memory"])),
        f"{trained['flops']:.3g}",
        f"{trained['time']['seconds']:.3f} s",
        trained["time"]["bound"],
        f"{100 * trained['utilisation']:.0f} %",
        f"{plan['hours']:,.1f}",
        f"{plan['chip_hours']:,.0f}",
    )


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_all", description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="*", default=SIZES, choices=SIZES)
    parser.add_argument("--hardware", nargs="*", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
    parser.add_argument("--jobs", type=int, default=1, help="plans that are made side by side")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    every = [(size, hardware) for size in arguments.sizes for hardware in arguments.hardware]
    wanted = [pair for pair in every if pair != ("7b", "h200x1")]  # one GPU has no room for its state
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda pair: planned(*pair), wanted))
    there = [(size, hardware) for size in SIZES for hardware in TOPOLOGIES if (RESULTS / f"{size}-{hardware}.json").exists()]
    columns = ["size", "slice", "fits", "training", "sampling", "FLOP a step", "step", "bound by", "MFU", "hours", "chip-hours"]
    rows = [line(*pair, planned(*pair)) for pair in there]
    (RESULTS / "table.txt").write_text(report.show("four arms and their draws; times are lower bounds", columns, rows))
    if not all(plan["fits"] for plan in found):
        raise SystemExit(FALSE)


if __name__ == "__main__":
    main()
