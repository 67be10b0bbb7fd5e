"""K replicas together against one by one, ours and PyTorch's; one process with all cores, or one process a core.

    python -m benchmarks.cohort [--replicas 8] [--device cuda] [--pairs [SIDE ...]]

Tokens/s are those of all replicas together. With `--pairs` memory holds two sides at once, the cohort and each other one: whose
tokens/s are then the cohort's of the first pair, times the ratio of its own pair.
"""

import argparse
import os
import sys
from typing import Any

from benchmarks import report
from benchmarks.sides import Side, Timing, agreed, in_turn, started
from benchmarks.workloads import COHORT_SHAPES, Shape, build_natfp, build_natfp_one_by_one, build_torch
from natfp_jax import flops
from natfp_jax.config import Mesh, Run

__all__ = ["main"]


def sides_of(shape: Shape, replicas: int, device: str, cores: list[int]) -> list[Side]:
    """Every way to train the replicas. Those of one process a core share them out."""
    every, count = list(range(replicas)), len(cores)
    spread = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    shared = [every[place * replicas // count : (place + 1) * replicas // count] for place in range(count)]
    ours = {"shape": shape, "replicas": every}
    one = [[core] for core in cores]
    sides = [
        Side("natfp cohort", build_natfp, [ours], [cores]),
        Side("natfp one by one", build_natfp_one_by_one, [ours], [cores]),
    ]
    if device == "cpu":
        split = {**ours, "run": Run(mesh=Mesh(replica=count))}
        sides.append(Side("natfp cohort, a device a core", build_natfp, [split], [cores], spread))
        sides.append(Side("natfp, a process a core", build_natfp, [{**ours, "replicas": some} for some in shared], one))
    for name, compiled in (("eager", False), ("compiled", True)):
        torch = {"shape": shape, "compiled": compiled, "device": device}
        alone = [{**torch, "replicas": every, "threads": count}]
        sides.append(Side(f"{name} one by one", build_torch, alone, [cores]))
        if device == "cpu":
            each = [{**torch, "replicas": some, "threads": 1} for some in shared]
            sides.append(Side(f"{name}, a process a core", build_torch, each, one))
    return sides


def measured(
    shape: Shape, replicas: int, device: str, rounds: int, seconds: float, pairs: list[str] | None, peak: float
) -> dict[str, Any]:
    """One row."""
    sides = sides_of(shape, replicas, device, sorted(os.sched_getaffinity(0)))
    first, *others = (side for place, side in enumerate(sides) if place == 0 or not pairs or side.name in pairs)
    rate, steps, timed, differ = dict[str, float](), dict[str, int](), dict[str, Timing](), 0.0
    for some in [sides] if pairs is None else [[first, other] for other in others]:
        with started(some) as running:
            differ = max(differ, agreed(running, shape.dtype))
            pace = {name: one.run(1)[0] for name, one in running.items()}
            of_pair = {name: max(1, round(seconds / each)) for name, each in pace.items()}
            found = in_turn(running, of_pair, rounds)
        rates = {name: of_pair[name] * replicas * shape.tokens / timing.median for name, timing in found.items()}
        scale = rate.get(first.name, rates[first.name]) / rates[first.name]
        rate |= {name: scale * value for name, value in rates.items()}
        timed, steps = {**found, **timed}, {**of_pair, **steps}
    counted = flops.per_token(shape.experiment.model, shape.vocabulary, shape.seq_len)
    ours, theirs = (max(value for name, value in rate.items() if name.startswith("natfp") == mine) for mine in (True, False))
    together = max(value for name, value in rate.items() if name.startswith("natfp cohort"))
    best = {kind: max(value for name, value in rate.items() if name.startswith(kind)) for kind in ("eager", "compiled")}
    return {
        "shape": str(shape),
        "replicas": replicas,
        "tokens_per_s": {name: round(value, 1) for name, value in rate.items()},
        "ratio_eager": together / best["eager"],
        "ratio_compile": together / best["compiled"],
        "ratio_best": ours / theirs,
        "ratio_solo": rate["natfp cohort"] / rate["natfp one by one"],
        "ratio_peak": {name: value * counted / peak for name, value in rate.items()},
        "spread": {name: timing.spread for name, timing in timed.items()},
        "peak_memory_bytes": {name: timing.peak_bytes for name, timing in timed.items()},
        "losses_differ_by": differ,
        "rounds": rounds,
        "steps": steps,
        "in_pairs": pairs is not None,
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohort", description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one side in one round, about")
    parser.add_argument("--device", choices=list(COHORT_SHAPES), default="cpu")
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes, by number; default all")
    parser.add_argument(
        "--pairs", nargs="*", metavar="SIDE", help="hold two sides at once: the cohort and each of these, or of all"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cohort[-cuda].*")
    arguments = parser.parse_args()
    device, shapes = arguments.device, COHORT_SHAPES[arguments.device]
    peaks = report.matrix_peak(device)
    rows = [
        measured(
            shapes[place],
            arguments.replicas,
            device,
            arguments.rounds,
            arguments.seconds,
            arguments.pairs,
            max(peaks.values()),
        )
        for place in arguments.shapes or range(len(shapes))
    ]
    name = "cohort" if device == "cpu" else f"cohort-{device}"
    found = {
        "command": f"python -m benchmarks.cohort {' '.join(sys.argv[1:])}",
        "machine": {**report.machine(), "matrix_peak": peaks},
        "versions": report.versions(),
        "rows": rows,
    }
    if arguments.save:
        found = report.joined(name, found)
    columns = ["width x layers, batch x tokens, vocabulary", "side", "tokens/s", "spread", "of peak", "memory MB"]
    lines = [
        (
            f"{row['replicas']} of {row['shape']}" if name == "natfp cohort" else "",
            name,
            f"{rate:,.0f}",
            f"{100 * row['spread'][name]:.1f} %",
            f"{100 * row['ratio_peak'][name]:.1f} %",
            f"{row['peak_memory_bytes'][name] / 1e6:,.0f}",
        )
        for row in found["rows"]
        for name, rate in row["tokens_per_s"].items()
    ]
    title = f"replicas, {max(peaks.values()) / 1e9:.0f} GFLOP/s at best"
    table = report.show(title, columns, lines)
    if arguments.save:
        report.save(name, found, table)


if __name__ == "__main__":
    main()
