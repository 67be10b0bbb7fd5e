"""Is the power that `natfp power` claims the power that the test has?

    python -m benchmarks.power_check --save

For each number of classes and each excess it takes the texts that the claim asks for, and that many independent predictions
with this accuracy, many times; each time the project's own permutation test says whether something was found. The bound is
that of 99.9 % of such simulations, were the claim right.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report

__all__ = ["main"]

CLASSES, EXCESSES = (2, 3, 9), (0.01, 0.02, 0.05, 0.1)
PERMUTATIONS, BOUND = 999, 0.999
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "attribution"


def found(classes: int, prompts: int, excess: float, random: np.random.Generator) -> bool:
    """Whether the permutation test of so many independent texts rejects at 5 %."""
    from natfp_jax.stats import permutation_p

    labels = np.tile(np.arange(classes), prompts)
    wrong = (labels + random.integers(1, classes, len(labels))) % classes
    predicted = np.where(random.random(len(labels)) < 1 / classes + excess, labels, wrong)
    return permutation_p(predicted, labels, np.repeat(np.arange(prompts), classes), random, PERMUTATIONS) < 0.05


def row_of(classes: int, excess: float, trials: int) -> dict[str, Any]:
    """The claim and the simulation at the texts that power 0.8 asks for."""
    from scipy.stats import binom

    from natfp_jax import rng
    from natfp_jax.power import Plan, power, prompts_needed

    plan = Plan(classes, permutations=PERMUTATIONS)
    prompts = prompts_needed(plan, excess)
    assert prompts is not None
    claimed = power(plan, prompts, excess)
    random = rng.generator(0, "power check", classes, str(excess))
    rejected = sum(found(classes, prompts, excess, random) for _ in range(trials))
    low, high = binom.interval(BOUND, trials, claimed) / np.float64(trials)
    return {
        "classes": classes,
        "excess": excess,
        "texts": classes * prompts,
        "claimed": claimed,
        "trials": trials,
        "simulated": rejected / trials,
        "low": float(low),
        "high": float(high),
    }


def shown(rows: list[dict[str, Any]]) -> str:
    """Prints the table; the same as text."""
    return report.show(
        f"texts for power 0.8 at 5 %, {PERMUTATIONS} permutations",
        ["classes", "excess", "texts", "trials", "claimed", "simulated", "bound of 99.9 %"],
        [
            (row["classes"], row["excess"], f"{row['texts']:,}", row["trials"], f"{row['claimed']:.3f}",
             f"{row['simulated']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000, help="simulations of each case")
    parser.add_argument("--save", action="store_true", help="write docs/results/attribution/power.json and power.txt")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    rows = []
    for classes in CLASSES:
        rows += [row_of(classes, excess, arguments.trials) for excess in EXCESSES]
        print(f"{len(rows)} of {len(CLASSES) * len(EXCESSES)} cases", file=sys.stderr, flush=True)
    table = shown(rows)
    print(f"{time.perf_counter() - begun:.0f} s")
    if arguments.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        versions = {name: importlib.metadata.version(name) for name in ("natfp-jax", "numpy", "scipy")}
        about = {"command": " ".join(["python -m benchmarks.power_check", *sys.argv[1:]])}
        about |= {"versions": {"python": platform.python_version(), **versions}, "permutations": PERMUTATIONS}
        (RESULTS / "power.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        (RESULTS / "power.txt").write_text(table)


if __name__ == "__main__":
    main()
