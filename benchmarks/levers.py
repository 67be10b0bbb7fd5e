"""What each thing that makes a step fast on a CPU gives: the step as it is, and without one of them.

    python -m benchmarks.levers

`cost` is how much longer a step takes without it; `memory` the peak of the process.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import report
from benchmarks.sides import Side, agreed, in_turn, started
from benchmarks.workloads import SHAPES, Shape, build_natfp

__all__ = ["LEVERS", "main"]


def _unrolled() -> None:
    from natfp_jax import model

    model._UNROLLED = 1


def _rows() -> None:
    from natfp_jax import attention, model

    model.causal = lambda q, k, v, rotary, devices, begin: attention.causal(q, k, v, rotary, None, begin)


def _gated() -> None:
    import flax.linen as nn

    from natfp_jax import model

    model._gated = lambda gate, up, w: (nn.silu(gate) * up) @ w  # type: ignore[assignment]


def _block_rows() -> None:
    from natfp_jax import blocks

    blocks.BLOCK_ROWS = 1 << 30


LEVERS: dict[str, Callable[[], None]] = {
    "layers are unrolled": _unrolled,
    "attention some rows at a time": _rows,
    "the MLP keeps its arguments alone": _gated,
    "loss and attention in blocks": _block_rows,
}


def build(shape: Shape, without: str | None = None) -> Callable[[int], Any]:
    """Ours, without one lever."""
    if without is not None:
        LEVERS[without]()
    return build_natfp(shape, [0])


def measured(shape: Shape, rounds: int, seconds: float) -> dict[str, Any]:
    """One row."""
    found = {"shape": str(shape), "rounds": rounds, "without": {name: _pair(shape, name, rounds, seconds) for name in LEVERS}}
    return found


def _pair(shape: Shape, lever: str, rounds: int, seconds: float) -> dict[str, Any]:
    """With and without one lever: two sides at a time, which memory holds."""
    cores = sorted(os.sched_getaffinity(0))
    sides = [
        Side("with", build, [{"shape": shape}], [cores]),
        Side("without", build, [{"shape": shape, "without": lever}], [cores]),
    ]
    with started(sides) as running:
        agreed(running, shape.dtype)
        steps = max(2, round(2 * seconds / running["with"].run(2)[0]))
        timed = in_turn(running, dict.fromkeys(running, steps), rounds)
    return {
        "ms_a_step": {name: 1000 * timing.median / steps for name, timing in timed.items()},
        "cost": timed["without"].median / timed["with"].median - 1,
        "spread": {name: timing.spread for name, timing in timed.items()},
        "peak_memory_bytes": {name: timing.peak_bytes for name, timing in timed.items()},
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levers", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one side in one round, about")
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes, by number; default all")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/levers.*")
    arguments = parser.parse_args()
    shapes = SHAPES["cpu"]
    rows = [measured(shapes[place], arguments.rounds, arguments.seconds) for place in arguments.shapes or range(len(shapes))]
    found = {
        "command": f"python -m benchmarks.levers {' '.join(sys.argv[1:])}",
        "machine": report.machine(),
        "versions": report.versions(),
        "rows": rows,
    }
    columns = ["width x layers, batch x tokens, vocabulary"]
    columns += ["without", "ms a step", "spread", "with", "spread", "cost", "memory"]
    lines = [
        (
            row["shape"] if number == 0 else "",
            name,
            f"{pair['ms_a_step']['without']:,.1f}",
            f"{100 * pair['spread']['without']:.1f} %",
            f"{pair['ms_a_step']['with']:,.1f}",
            f"{100 * pair['spread']['with']:.1f} %",
            f"{100 * pair['cost']:+.1f} %",
            f"{(pair['peak_memory_bytes']['without'] - pair['peak_memory_bytes']['with']) / 1e6:+,.0f} MB",
        )
        for row in rows
        for number, (name, pair) in enumerate(row["without"].items())
    ]
    table = report.show("one training step, without one thing", columns, lines)
    if arguments.save:
        report.save("levers", found, table)


if __name__ == "__main__":
    main()
