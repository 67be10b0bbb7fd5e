"""The study that the soak tests put through everything, and how the command line is run on it.

Owns processes: their start, their signals and their end. Must not know what is done to them.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tests.soak.meshes import environment, free_port

STUDY = """
from natfp_jax.config import *

study = Study(
    name="soak",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=3000), vocabulary=300, validation_fraction=0.05, prompt_fraction=0.1, shards=2),
        model=Model(width=32, layers=2, heads=4),
        data=Data(seq_len=32, windows=320, epochs=2, batch=8),
    ),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    run=Run(log_every=5, validation_windows=16, save_minutes=0.003, heartbeat_seconds=5),
    sampling=Sampling(prompts=160, prompt_chars=20, new_tokens=16, batch=64, file_texts=60, checkpoints=(0.3, 1.0)),
    attribution=Attribution(bootstraps=999),
)
"""

STOPPED, LOST = 75, (75, 134)  # 134: where the coordinator's process is killed, the runtime ends the others in its own way


def written(folder: Path) -> Path:
    """The study's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak.py"
    path.write_text(STUDY)
    return path


def command(study: Path, out: Path, processes: int, process: int, port: int, *more: str, verb: str = "run") -> list[str]:
    """`natfp run` for one process."""
    natfp = [sys.executable, "-c", "from natfp_jax.cli import main; main()", verb, str(study), "--out", str(out), *more]
    if processes == 1:
        return natfp
    return [*natfp, "--coordinator", f"localhost:{port}", "--processes", str(processes), "--process", str(process)]


class Command:
    """One command carried out by one or more processes. A context manager that leaves none behind."""

    def __init__(self, study: Path, out: Path, processes: int, cache: Path, *more: str, verb: str = "run") -> None:
        port, devices = free_port(), 2 if processes > 1 else 1
        self.processes = [
            subprocess.Popen(
                command(study, out, processes, process, port, *more, verb=verb),
                env=environment(devices, JAX_COMPILATION_CACHE_DIR=str(cache)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(processes)
        ]

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.communicate()

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def ended(self, seconds: float = 300) -> list[tuple[int, str]]:
        """Exit code and standard error of each process, once all have ended."""
        deadline = time.monotonic() + seconds
        said = [process.communicate(timeout=deadline - time.monotonic())[1] for process in self.processes]
        return [(process.returncode, line) for process, line in zip(self.processes, said, strict=True)]


def finish(study: Path, out: Path, processes: int, cache: Path, *more: str) -> str:
    """Runs the command to its end, which must be a good one; what it said."""
    with Command(study, out, processes, cache, *more) as command:
        ends = command.ended()
    if any(code for code, _ in ends):
        raise AssertionError(f"{out}: {[code for code, _ in ends]}\n" + "\n".join(said for _, said in ends))
    return ends[0][1]


def results(out: Path) -> dict[str, Any]:
    """All that must be bitwise the same however a study came about: weights, texts, and the summary, times aside."""
    from natfp_jax import files, texts

    study = out / "studies" / "soak"
    weights = {}
    for path in sorted((out / "runs").glob("*/lineage.json")):
        lineage = files.read_json(path)
        weights[lineage["fingerprint"]] = [
            {name: value for name, value in record.items() if name != "numerics"} for record in lineage["checkpoints"]
        ]
        weights[f"{lineage['fingerprint']} log"] = lineage["metrics"]
    drawn = {path.name: files.hash_file(path) for path in sorted((study / "draws").glob("*.parquet"))}
    assert all(texts.exists(path) for path in (study / "draws").glob("*.parquet"))
    summary = files.read_json(study / "report" / "summary.json")
    inputs = summary.pop("inputs")
    for timed in ("stages", "files"):
        summary.pop(timed)
    return {"weights": weights, "texts": drawn, "summary": summary, "attribution": inputs["attribution"]}


def machine() -> dict[str, Any]:
    """Where figures come from."""
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def merged(path: Path, **fields: Any) -> None:
    """Adds fields to a JSON file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **fields}, indent=1) + "\n")


@contextlib.contextmanager
def without_signals() -> Iterator[None]:
    """A soak itself ends at Ctrl-C, its processes with it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
