"""What a benchmark leaves: a table on the screen and a JSON file that says on what it was measured.

Owns both, the versions, and what the machine can do at its best. Must not know what was measured.
"""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

__all__ = ["RESULTS", "joined", "machine", "matrix_peak", "memory_bandwidth", "save", "show", "versions"]

RESULTS = Path(__file__).parent / "results"


def versions(*others: str) -> dict[str, str]:
    """Of all that was timed and of `others`; torch and transformers where they are installed, which some programs need."""
    names = ["natfp-jax", "jax", "jaxlib", "flax", "optax", "numpy", *others]
    names += [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is not None]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def machine() -> dict[str, Any]:
    """The processor and how much of it there is, and the GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = {}
    if importlib.util.find_spec("torch") is not None:  # without it nothing here could use a GPU
        import torch

        gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0)), **gpu}


def matrix_peak(device: str, seconds: float = 3.0) -> dict[str, float]:
    """Products of large matrices, FLOP/s, the middle of what so many seconds give.

    On a CPU in float32 by PyTorch and by NumPy, on a GPU in bfloat16 by PyTorch.
    """
    import torch

    if device == "cuda":
        size = 8192
        b = torch.randn(size, size, device=device, dtype=torch.bfloat16)

        def on_gpu() -> None:
            b @ b
            torch.cuda.synchronize()

        return {"torch": _rate(on_gpu, 2 * size**3, seconds)}
    size = 2048
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    t = torch.from_numpy(a)
    return {"torch": _rate(lambda: t @ t, 2 * size**3, seconds), "numpy": _rate(lambda: a @ a, 2 * size**3, seconds)}


def memory_bandwidth(device: str, seconds: float = 3.0) -> dict[str, float]:
    """Copies that no cache holds, bytes/s, the middle of what so many seconds give; a byte, read and written, counts twice.

    On a CPU by PyTorch, with as many threads as cores, and by NumPy, with one; on a GPU by PyTorch.
    """
    # In a process of its own: what is held here is lost to the sides (memory of a GPU too), and each process that is started
    # counts the peak of this one as its own.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_copies, device, seconds).result()


def _copies(device: str, seconds: float) -> dict[str, float]:
    import torch

    if device == "cuda":
        size = 4 << 30
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def on_gpu() -> None:
            target.copy_(source)
            torch.cuda.synchronize()

        return {"torch": _rate(on_gpu, 2 * size, seconds)}
    size = 512 << 20
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    a, b = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    t, u = torch.from_numpy(a), torch.from_numpy(b)
    return {
        "torch": _rate(lambda: u.copy_(t), 2 * size, seconds),
        "numpy": _rate(lambda: np.copyto(b, a), 2 * size, seconds),
    }


def _rate(work: Callable[[], object], amount: int, seconds: float) -> float:
    work()
    rates, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - begun))
    return statistics.median(rates)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], width: int = 160) -> str:
    """Prints a table; the same as text."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:1] else "right")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(width=width, record=True)
    console.print(table)
    return console.export_text()


def joined(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """`found`, and the rows of other shapes that results/NAME.json has of the same machine and versions."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {**found, "rows": []}

    def on(file: dict[str, Any]) -> dict[str, Any]:
        return {**file["versions"], **{key: value for key, value in file["machine"].items() if key != "matrix_peak"}}

    rows: dict[Any, dict[str, Any]] = {}
    mine, theirs = on(found), on(before)  # what only one of them names was not there when the other was measured
    for file in (before, found) if all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys()) else (found,):
        of_all = {"command": file["command"], "matrix_peak": file["machine"]["matrix_peak"]}
        rows |= {(row["shape"], row["replicas"]): {**of_all, **row} for row in file["rows"]}
    return {**found, "rows": list(rows.values())}


def save(name: str, found: dict[str, Any], table: str) -> None:
    """Writes results/NAME.json and results/NAME.txt."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{name}.txt").write_text(table)
