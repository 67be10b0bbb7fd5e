"""What `natfp plan` predicts against what is measured, on the devices at hand.

    python -m benchmarks.plan [--seconds 5] [--shapes 0 1] [--save]

Of every shape: bytes of a step as predicted, and at the peak by the device's own count where it has one (a CPU has none);
operations as counted, and by XLA, which counts the body of a loop once; the least seconds of a step, and of texts of full
length, against the median of what they take. A ratio above 1 is what a roofline leaves out.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.workloads import STEPS, Shape
from natfp_jax import mesh, optim, programs, rng
from natfp_jax.config import Mesh, Run, Sampling
from natfp_jax.params import init, table
from natfp_jax.program import Program, program_for
from natfp_jax.sample import programs_of
from natfp_jax.sampling_cost import texts_of
from natfp_jax.strategy import strategy_of
from natfp_jax.topology import Rented, rented
from natfp_jax.train import laid, quiet
from natfp_jax.training_cost import training
from natfp_jax.turns import draw

__all__ = ["main"]

SHAPES = (  # the quickstart's, a wider one, one in bfloat16
    Shape(128, 2, 64, 32, 2048, heads=4),
    Shape(512, 4, 128, 16, 8192, heads=8),
    Shape(256, 4, 128, 16, 4096, heads=4, dtype="bfloat16"),
)
PROMPTS, NEW = 256, 48


def train_measured(program: Program, shape: Shape, seconds: float) -> list[float]:
    """Seconds of single steps, the first, which warms up, left out."""
    devices = program.devices
    state = program.stack([partial(program.init, 0)])
    numbers = laid(program, [optim.hyperparameters(shape.experiment.optimiser, STEPS)])
    windows = mesh.lay(shape.windows(0)[:1], mesh.batch_sharding(devices))
    none, taken, until = quiet(devices), list[float](), time.monotonic() + seconds
    while len(taken) < 4 or time.monotonic() < until:
        begun = time.perf_counter()
        state, metrics = program.step(state, numbers, windows, none)
        jax.block_until_ready((state, metrics))
        taken.append(time.perf_counter() - begun)
    return taken[1:]


def draw_measured(shape: Shape, rows: int, devices: jax.sharding.Mesh, seconds: float) -> list[float]:
    """Seconds of drawing texts of full length; an id that never comes would end them."""
    sampling = Sampling(prompts=PROMPTS, new_tokens=NEW)
    model, size = shape.experiment.model, shape.vocabulary
    made = programs_of(model, strategy_of(sampling, 1.0), size, size + 128, size, rows, devices)
    weights = made.weights([lambda: init(table(model, size + 128), 0)])
    prompts = np.random.default_rng(0).integers(0, shape.vocabulary, (PROMPTS, 12)).tolist()
    taken, until = list[float](), time.monotonic() + seconds
    while len(taken) < 3 or time.monotonic() < until:
        begun = time.perf_counter()
        draw(made, weights, [rng.stream(len(taken), "sample")], range(PROMPTS), prompts, NEW)
        taken.append(time.perf_counter() - begun)
    return taken[1:]


def measured(shape: Shape, there: Rented, seconds: float) -> dict[str, Any]:
    """One row."""
    devices = mesh.make(Mesh(), there.devices)
    sizes = shape.vocabulary, shape.vocabulary
    settings = Run(remat=shape.remat)  # type: ignore[arg-type]
    quietly: Callable[[str], None] = lambda line: None  # noqa: E731
    predicted = training(["arm"], shape.experiment, sizes, settings, there.chip, devices, quietly)
    program = program_for(shape.experiment, *sizes, devices, settings)
    steps = train_measured(program, shape, seconds)
    stats = there.devices[0].memory_stats() or {}
    analysis = program.compiled.cost_analysis() or {}
    rows = min(PROMPTS, 128)
    sampling = Sampling(prompts=PROMPTS, new_tokens=NEW, batch=rows)
    texts = texts_of(shape.experiment.model, sampling, (sizes[0], sizes[1] + 128), 1, 16, rows, there.chip, devices, quietly)
    draws = draw_measured(shape, rows, devices, seconds)
    return {
        "shape": f"{shape}, {shape.dtype}",
        "bytes": {"predicted": predicted.memory.least, "peak": stats.get("peak_bytes_in_use")},
        "flops": {
            "formula": predicted.flops,
            "counted": predicted.executed,
            "xla": analysis.get("flops", 0.0) * devices.size,
        },
        "step": {"predicted": predicted.time.seconds, "bound": predicted.time.bound, **spread(steps)},
        "texts": {"predicted": texts.seconds, "bound": texts.time.bound, **spread(draws)},
    }


def spread(seconds: list[float]) -> dict[str, Any]:
    """The middle of what was measured, and how far apart its quartiles are as a part of it."""
    first, _, third = quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    middle = median(seconds)
    return {"measured": middle, "spread": (third - first) / middle, "count": len(seconds)}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement, about")
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes, by number; default all")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/plan[-gpu].*")
    arguments = parser.parse_args()
    programs.keep()
    there = rented(None)
    rows = [
        measured(shape, there, arguments.seconds)
        for shape in (SHAPES if arguments.shapes is None else [SHAPES[place] for place in arguments.shapes])
    ]
    columns = ["width x layers, batch x tokens, vocabulary", "bytes", "peak", "FLOP", "by XLA"]
    columns += ["step", "measured", "ratio", "spread", "texts", "measured", "ratio", "spread"]
    lines = [
        (
            row["shape"],
            f"{row['bytes']['predicted'] / 1e6:,.0f} MB",
            "" if row["bytes"]["peak"] is None else f"{row['bytes']['peak'] / 1e6:,.0f} MB",
            f"{row['flops']['counted']:.3g}",
            f"{row['flops']['xla']:.3g}",
            *(
                cell
                for name in ("step", "texts")
                for cell in (
                    f"{1e3 * row[name]['predicted']:,.1f} ms",
                    f"{1e3 * row[name]['measured']:,.1f} ms",
                    f"{row[name]['measured'] / row[name]['predicted']:.2f}",
                    f"{100 * row[name]['spread']:.0f} %",
                )
            ),
        )
        for row in rows
    ]
    table = report.show(f"predicted and measured on {there.name}", columns, lines, width=190)
    if arguments.save:
        found = {
            "command": f"python -m benchmarks.plan {' '.join(sys.argv[1:])}",
            "machine": {**report.machine(), "chip": there.chip.__dict__},
            "versions": report.versions(),
            "rows": rows,
        }
        report.save("plan" if there.devices[0].platform == "cpu" else f"plan-{there.devices[0].platform}", found, table)


if __name__ == "__main__":
    main()
