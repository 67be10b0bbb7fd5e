"""Drawing texts against Hugging Face's `generate`: the same weights, prompts and temperature.

    python -m benchmarks.sampling [--device cuda]

Both sides have all cores, or the GPU, and are timed in turn; reading the prompts is part of it, and no text ends early. `of
floor` is the least time that the counted operations and bytes could take, at the best rates of the same machine in the same
run, over the time that was taken.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks import report
from benchmarks.sides import Side, in_turn, started
from benchmarks.workloads import TEXT_SHAPES, TextShape, build_hf_texts, build_natfp_texts
from natfp_jax import params
from natfp_jax.hf_export import export
from natfp_jax.tokenizer import EOS, Tokenizer

__all__ = ["main"]

AGREE = 0.99  # of the greedy texts: where two ids are as good as tied, a last bit decides, and the texts go apart
CHECKED = 128, 64  # texts that are compared, and the most tokens of each


def sides_of(shape: TextShape, folder: Path, device: str, cores: list[int], greedy: bool = False) -> list[Side]:
    """Ours and Hugging Face's, one process each."""
    theirs = {"shape": shape, "folder": folder, "threads": len(cores), "device": device, "greedy": greedy}
    return [
        Side("natfp", build_natfp_texts, [{"shape": shape, "greedy": greedy}], [cores]),
        Side("hf", build_hf_texts, [theirs], [cores]),
    ]


def exported(shape: TextShape, folder: Path) -> None:
    """Writes the weights for the other side. The tokenizer is only there to say how many ids there are."""
    entries = [EOS, *map(str, range(1, shape.vocabulary))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({entry: id_ for id_, entry in enumerate(entries)}, unk_token="1"))
    model.add_special_tokens([EOS])
    tokenizer = Tokenizer(model.to_str().encode())
    export(params.nest(shape.weights()), shape.model, tokenizer, shape.prompt + shape.new, folder)


def agreed(shape: TextShape, folder: Path, device: str, cores: list[int]) -> float:
    """The share of greedy texts, in float32, that are the same on both sides.

    Raises:
      RuntimeError: it is too small, so that the work is not the same.
    """
    texts, new = CHECKED
    small = dataclasses.replace(shape, dtype="float32", batch=texts, new=min(shape.new, new))
    with started(sides_of(small, folder, device, cores, greedy=True)) as running:
        (mine,), (theirs,) = (running[name].run(1)[1][0] for name in ("natfp", "hf"))
    share = sum(one == other for one, other in zip(mine, theirs, strict=True)) / texts
    if share < AGREE:
        raise RuntimeError(f"{share:.3f} of {texts} greedy texts are the same, expected {AGREE}: the work is not the same")
    return share


def floor_of(shape: TextShape, peak: float, bandwidth: float) -> dict[str, float]:
    """What one batch cannot be drawn without: operations and bytes, and seconds of each at the machine's best.

    Operations: 2 for each weight in a product, of the layers for every id that is read (the last one is not), of the head for
    every id that is drawn; 4 S D a layer for an id that attends to S. Bytes: the weights once for every id of a text, keys and
    values once for every id but the first, logits written and read in float32. Embeddings and norms are left out.
    """
    size, width = params.dims(shape.model, shape.vocabulary), {"float32": 4, "bfloat16": 2}[shape.dtype]
    specs = params.table(shape.model, shape.vocabulary)
    layers = params.count({path: spec for path, spec in specs.items() if path.startswith("layers/") and spec.decay})
    head, read, heads = size["D"] * size["V"], shape.prompt + shape.new - 1, size["N"] * size["H"]
    attended = sum(range(1, read + 1))
    operations = shape.batch * (2 * layers * read + 2 * head * shape.new + 4 * heads * size["L"] * attended)
    kept = sum(range(shape.prompt + 1, read + 1)) * 2 * size["L"] * size["K"] * size["H"] * width
    moved = shape.new * (layers + head) * width + shape.batch * (kept + 2 * 4 * size["V"] * shape.new)
    return {"flops": operations, "bytes": moved, "flops_seconds": operations / peak, "bytes_seconds": moved / bandwidth}


def measured(shape: TextShape, device: str, rounds: int, seconds: float, peak: float, bandwidth: float) -> dict[str, Any]:
    """One row."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        exported(shape, folder)
        share = agreed(shape, folder, device, cores)
        with started(sides_of(shape, folder, device, cores)) as running:
            for one in running.values():  # which waits until it is built
                one.run(1)
            steps = {name: max(1, round(seconds / one.run(1)[0])) for name, one in running.items()}
            timed = in_turn(running, steps, rounds)
    each = {name: timing.median / steps[name] for name, timing in timed.items()}  # seconds of a batch
    floor = floor_of(shape, peak, bandwidth)
    least = floor["flops_seconds"] + floor["bytes_seconds"]
    return {
        "shape": str(shape),
        "batch": shape.batch,
        "new_tokens": shape.new,
        "dtype": shape.dtype,
        "tokens_per_s": round(shape.batch * shape.new / each["natfp"], 1),
        "ratio_hf": each["hf"] / each["natfp"],
        "ratio_floor": least / each["natfp"],
        "floor": {**floor, "tokens_per_s": round(shape.batch * shape.new / least, 1)},
        "batch_seconds": each,
        "spread": {name: timing.spread for name, timing in timed.items()},
        "peak_memory_bytes": {name: timing.peak_bytes for name, timing in timed.items()},
        "greedy_texts_same": share,
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one side in one round, about")
    parser.add_argument("--device", choices=list(TEXT_SHAPES), default="cpu")
    parser.add_argument("--shapes", type=int, nargs="*", help="which of the shapes, by number; default all")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sampling[-cuda].*")
    arguments = parser.parse_args()
    device, shapes = arguments.device, TEXT_SHAPES[arguments.device]
    peaks, bandwidths = report.matrix_peak(device), report.memory_bandwidth(device)
    best = max(peaks.values()), max(bandwidths.values())
    rows = [
        measured(shapes[place], device, arguments.rounds, arguments.seconds, *best)
        for place in arguments.shapes or range(len(shapes))
    ]
    found = {
        "command": f"python -m benchmarks.sampling {' '.join(sys.argv[1:])}",
        "machine": {**report.machine(), "matrix_peak": peaks, "memory_bandwidth": bandwidths},
        "versions": report.versions(),
        "rows": rows,
    }
    columns = [
        "width x layers, texts x (prompt + new), vocabulary",
        "side",
        "new tokens/s",
        "texts/s",
        "spread",
        "of floor",
        "natfp is",
        "memory MB",
    ]
    lines = [
        (
            row["shape"] if name == "natfp" else "",
            name,
            f"{row['batch'] * row['new_tokens'] / row['batch_seconds'][name]:,.0f}",
            f"{row['batch'] / row['batch_seconds'][name]:,.1f}",
            f"{100 * row['spread'][name]:.1f} %",
            f"{100 * row['new_tokens'] * row['batch'] / row['floor']['tokens_per_s'] / row['batch_seconds'][name]:.1f} %",
            "" if name == "natfp" else f"{row['ratio_hf']:.2f} x",
            f"{row['peak_memory_bytes'][name] / 1e6:,.0f}",
        )
        for row in rows
        for name in row["batch_seconds"]
    ]
    title = f"drawing texts, at best {best[0] / 1e9:,.0f} GFLOP/s and {best[1] / 1e9:,.0f} GB/s"
    table = report.show(title, columns, lines)
    if arguments.save:
        report.save("sampling" if device == "cpu" else f"sampling-{device}", found, table)


if __name__ == "__main__":
    main()
