"""One training step against PyTorch, eager and compiled: the same architecture, optimiser, weights and batches.

    python -m benchmarks.train_step [--device cuda]

All sides have all cores, or the GPU, and are timed in turn. `of peak` is counted operations (`natfp_jax.flops`) over the best
that products of large matrices reach on the same machine in the same run.
"""

import argparse
import os
import sys
from typing import Any

from benchmarks import report
from benchmarks.sides import Side, agreed, in_turn, started
from benchmarks.workloads import SHAPES, Shape, build_natfp, build_torch
from natfp_jax import flops

__all__ = ["main"]


def sides_of(shape: Shape, device: str, cores: list[int]) -> list[Side]:
    """Ours and PyTorch's, one process each."""
    torch = {"shape": shape, "replicas": [0], "threads": len(cores), "device": device}
    return [
        Side("natfp", build_natfp, [{"shape": shape, "replicas": [0]}], [cores]),
        Side("eager", build_torch, [{**torch, "compiled": False}], [cores]),
        Side("compiled", build_torch, [{**torch, "compiled": True}], [cores]),
    ]


def measured(shape: Shape, device: str, rounds: int, seconds: float, peak: float) -> dict[str, Any]:
    """One row."""
    cores = sorted(os.sched_getaffinity(0))
    with started(sides_of(shape, device, cores)) as running:
        differ = agreed(running, shape.dtype)
        pace = {name: one.run(2)[0] / 2 for name, one in running.items()}
        steps = {name: max(2, round(seconds / each)) for name, each in pace.items()}
        timed = in_turn(running, steps, rounds)
    rate = {name: steps[name] * shape.tokens / timing.median for name, timing in timed.items()}
    counted = flops.per_token(shape.experiment.model, shape.vocabulary, shape.seq_len)
    return {
        "shape": str(shape),
        "tokens_per_s": {name: round(value, 1) for name, value in rate.items()},
        "ratio_eager": rate["natfp"] / rate["eager"],
        "ratio_compile": rate["natfp"] / rate["compiled"],
        "ratio_peak": {name: value * counted / peak for name, value in rate.items()},
        "spread": {name: timing.spread for name, timing in timed.items()},
        "peak_memory_bytes": {name: timing.peak_bytes for name, timing in timed.items()},
        "flops_per_token": counted,
        "losses_differ_by": differ,
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one side in one round, about")
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes, by number; default all")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train_step[-cuda].*")
    arguments = parser.parse_args()
    device, shapes = arguments.device, SHAPES[arguments.device]
    peaks = report.matrix_peak(device)
    rows = [
        measured(shapes[place], device, arguments.rounds, arguments.seconds, max(peaks.values()))
        for place in arguments.shapes or range(len(shapes))
    ]
    found = {
        "command": f"python -m benchmarks.train_step {' '.join(sys.argv[1:])}",
        "machine": {**report.machine(), "matrix_peak": peaks},
        "versions": report.versions(),
        "rows": rows,
    }
    columns = ["width x layers, batch x tokens, vocabulary", "side", "tokens/s", "spread", "of peak", "natfp is", "memory MB"]
    lines = [
        (
            row["shape"] if name == "natfp" else "",
            name,
            f"{row['tokens_per_s'][name]:,.0f}",
            f"{100 * row['spread'][name]:.1f} %",
            f"{100 * row['ratio_peak'][name]:.1f} %",
            "" if name == "natfp" else f"{row['tokens_per_s']['natfp'] / row['tokens_per_s'][name]:.2f} x",
            f"{row['peak_memory_bytes'][name] / 1e6:,.0f}",
        )
        for row in rows
        for name in row["tokens_per_s"]
    ]
    table = report.show(f"one training step, {max(peaks.values()) / 1e9:.0f} GFLOP/s at best", columns, lines)
    if arguments.save:
        report.save("train_step" if device == "cpu" else f"train_step-{device}", found, table)


if __name__ == "__main__":
    main()
