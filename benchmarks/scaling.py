"""What a step costs by model size, sequence length, batch, replicas and devices.

    python -m benchmarks.scaling

One number of the base shape is changed at a time; a process of its own for each, one after another.
"""

import argparse
import dataclasses
import os
import sys
from typing import Any

from benchmarks import report
from benchmarks.sides import Side, in_turn, started
from benchmarks.workloads import SHAPES, Shape, build_natfp
from natfp_jax import flops
from natfp_jax.config import Mesh, Run

__all__ = ["main"]

BASE = SHAPES["cpu"][0]


def cases(cores: int) -> list[tuple[str, Shape, int, int]]:
    """What is changed, the shape, replicas, devices."""
    found = [("base", BASE, 1, 1)]
    for field, values in (
        ("width", (64, 256, 512)),
        ("layers", (1, 4, 8)),
        ("seq_len", (32, 64, 256, 512)),
        ("batch", (8, 16, 64)),
    ):
        for value in values:
            heads = max(1, value // 32) if field == "width" else BASE.heads
            found.append((f"{field} {value}", dataclasses.replace(BASE, **{field: value, "heads": heads}), 1, 1))
    found += [(f"replicas {count}", BASE, count, 1) for count in (2, 4, 8, 16)]
    found += [(f"replicas {count}, devices {count}", BASE, count, count) for count in (2, 4) if count <= 2 * cores]
    return found


def measured(name: str, shape: Shape, replicas: int, devices: int, rounds: int, seconds: float, peak: float) -> dict[str, Any]:
    """One row."""
    cores = sorted(os.sched_getaffinity(0))
    forced = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    arguments = {"shape": shape, "replicas": list(range(replicas)), "run": Run(mesh=Mesh(replica=devices))}
    with started([Side(name, build_natfp, [arguments], [cores], forced)]) as running:
        steps = {name: max(2, round(2 * seconds / running[name].run(2)[0]))}
        timing = in_turn(running, steps, rounds)[name]
    rate = steps[name] * replicas * shape.tokens / timing.median
    counted = flops.per_token(shape.experiment.model, shape.vocabulary, shape.seq_len)
    return {
        "changed": name,
        "shape": str(shape),
        "replicas": replicas,
        "devices": devices,
        "ms_a_step": 1000 * timing.median / steps[name],
        "tokens_per_s": round(rate, 1),
        "ratio_peak": rate * counted / peak,
        "spread": timing.spread,
        "peak_memory_bytes": timing.peak_bytes,
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one case in one round, about")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scaling.*")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    peaks = report.matrix_peak("cpu")
    rows = [measured(*case, arguments.rounds, arguments.seconds, max(peaks.values())) for case in cases(cores)]
    found = {
        "command": f"python -m benchmarks.scaling {' '.join(sys.argv[1:])}",
        "machine": {**report.machine(), "matrix_peak": peaks},
        "versions": report.versions(),
        "rows": rows,
    }
    columns = [
        "changed",
        "width x layers, batch x tokens, vocabulary",
        "ms a step",
        "tokens/s",
        "of peak",
        "spread",
        "memory MB",
    ]
    lines = [
        (
            row["changed"],
            row["shape"],
            f"{row['ms_a_step']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{100 * row['ratio_peak']:.1f} %",
            f"{100 * row['spread']:.1f} %",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        )
        for row in rows
    ]
    table = report.show(f"one step, {max(peaks.values()) / 1e9:.0f} GFLOP/s at best", columns, lines)
    if arguments.save:
        report.save("scaling", found, table)


if __name__ == "__main__":
    main()
