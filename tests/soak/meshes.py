"""One arm, trained by real processes over every kind of mesh: what a mesh may change, and what it must not.

Owns the runs and their comparison: `python -m tests.soak.meshes [--out DIR]` writes DIR/meshes.json and DIR/meshes.txt. Every
run is the command line of `natfp train`; with `--fed FILE`, as a program, this file is that command line, and notes which rows
its process handed to its own devices.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = [
    "STUCK",
    "STUDY",
    "Case",
    "cleared",
    "command",
    "environment",
    "finished",
    "free_port",
    "latest",
    "trained",
    "weights_of",
]

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
from natfp_jax.config import Corpus, Data, Experiment, Factor, Model, Run, Sampling, Stories, Study

study = Study(
    name="soak",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=400), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.2, shards=2),
        model=Model(width=32, layers=2, heads=4),
        data=Data(seq_len=32, windows=64, epochs=2, batch=16),
    ),
    factors=(Factor("seeds.init", (0, 1)),),
    run=Run(log_every=2, validation_windows=32),
    sampling=Sampling(prompts=40, prompt_chars=20, new_tokens=8, batch=16),
)
"""
ARM = "init0"  # a study has two; the other one is trained beside it
DEVICES = 8
STUCK = 300  # seconds after which a process will never end: several share the cores, and no test promises how fast they are
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "replica 2 x data 2 x fsdp 2": {"replica": 2, "data": 2, "fsdp": 2},
}
VARIANTS = ("run.microbatches=2", "run.remat=full", "run.remat=dots", "experiment.model.dtype=bfloat16")
ROWS = ("init_hash", "order_hash", "fed_hash")  # what no mesh may change


@dataclass(frozen=True)
class Case:
    """A mesh, the processes that share its devices, and what else is set."""

    mesh: str
    processes: int
    devices: int  # of one process
    override: str = ""

    @property
    def overrides(self) -> list[str]:
        """As the command line takes them."""
        axes = MESHES.get(self.mesh, {})
        return [f"run.mesh.{axis}={size}" for axis, size in axes.items()] + ([self.override] if self.override else [])


# --- one command, by real processes -----------------------------------------------------------------------------------


def environment(devices: int, **more: str) -> dict[str, str]:
    """That of a process which stands for so many devices; what it compiles is kept beside other runs."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    kept.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "natfp-soak-compiled"))
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return {**kept, **cache, **flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def command(coordinator: str, processes: int, process: int) -> list[str]:
    """The arguments by which processes meet; none for one alone."""
    if processes == 1:
        return []
    return ["--coordinator", coordinator, "--processes", str(processes), "--process", str(process)]


def finished(started: list[subprocess.Popen], timeout: float) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; those that are late are killed, and nothing is left behind."""
    ended = []
    until = time.monotonic() + timeout
    try:
        for process in started:
            output, errors = process.communicate(timeout=max(0.1, until - time.monotonic()))
            ended.append((process.returncode, output, errors))
    finally:
        cleared(started)
    return ended


def cleared(started: list[subprocess.Popen]) -> None:
    """Kills those that are still there."""
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def latest(out: Path, name: str = "soak") -> dict[str, dict[str, object]]:
    """Arm → the record of its last checkpoint; all arms of the study are finished."""
    arms = json.loads((out / "studies" / name / "arms.json").read_text())
    arms.pop("sha256", None)  # of the file itself
    lineages = {arm: out / "runs" / entry["fingerprint"][:16] / "lineage.json" for arm, entry in arms.items()}
    return {arm: json.loads(path.read_text())["checkpoints"][-1] for arm, path in lineages.items()}


def weights_of(out: Path, record: dict[str, object]) -> dict[str, object]:
    """The weights that a record is of, on the host: path → value."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # one item of a checkpoint has no metadata of its own, as it should be
    place = (out / "runs" / str(record["fingerprint"])[:16] / "checkpoints" / str(record["step"]) / "params").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(place).item_metadata.tree)
        return dict(_leaves(reader.restore(place, restore_args=whole)))


def _leaves(tree: dict, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name in sorted(tree) for leaf in _leaves(tree[name], f"{path}/{name}".lstrip("/"))]


# --- one case ---------------------------------------------------------------------------------------------------------


def trained(case: Case, folder: Path, timeout: float = STUCK) -> dict[str, object]:
    """Trains the arm below `folder`/out; what is recorded of it, and the hash of the rows that all devices were fed."""
    study = folder / "study.py"
    folder.mkdir(parents=True, exist_ok=True)
    study.write_text(STUDY)
    coordinator = f"localhost:{free_port()}"
    program, arguments = [sys.executable, __file__, "--fed"], ["train", study, *case.overrides, "--out", folder / "out"]
    begun = time.monotonic()
    started = [
        subprocess.Popen(
            [*program, folder / f"fed{process}.jsonl", *arguments, *command(coordinator, case.processes, process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(case.devices),
        )
        for process in range(case.processes)
    ]
    for process, (code, _, errors) in enumerate(finished(started, timeout)):
        if code:
            raise RuntimeError(f"{case}, process {process}: exit code {code}: {errors[-2000:]}")
    record = latest(folder / "out")[ARM]
    return {
        **asdict(case),
        "seconds": round(time.monotonic() - begun, 1),
        "init_hash": record["init_hash"],
        "order_hash": record["order_hash"],
        "fed_hash": put_together([folder / f"fed{process}.jsonl" for process in range(case.processes)]),
        "weights": record["weights"],
        "val_loss": record["val_loss"],
        "collectives": record["numerics"]["collectives"],
        "step": record["step"],
    }


def put_together(notes: list[Path]) -> str:
    """sha256 over all rows of all batches, each row from the devices that hold it.

    Raises:
      RuntimeError: devices differ in a row, or nobody holds it, or the processes were not fed equally often.
    """
    batches = [[json.loads(line) for line in path.read_text().splitlines()] for path in notes]
    digest = hashlib.sha256()
    for number, parts in enumerate(zip(*batches, strict=True)):
        rows: dict[int, str] = {}
        for held in (held for part in parts for held in part["rows"]):
            for row, sha256 in held.items():
                if rows.setdefault(int(row), sha256) != sha256:
                    raise RuntimeError(f"devices differ in row {row} of batch {number}")
        if sorted(rows) != list(range(parts[0]["size"])):
            raise RuntimeError(f"batch {number} has the rows {sorted(rows)}, expected {parts[0]['size']}")
        digest.update("".join(rows[row] for row in sorted(rows)).encode())
    if not batches[0]:
        raise RuntimeError("no batch was fed")
    return digest.hexdigest()


def _noting(path: Path) -> None:
    """Lets `mesh.lay` note what it has laid on this process's own devices, read back from them."""
    import numpy as np

    from natfp_jax import mesh

    lay = mesh.lay

    def noted(tree: object, sharding: object) -> object:
        laid = lay(tree, sharding)
        if getattr(laid, "ndim", 0) != 3:  # no batch of windows, [replica, row, token]
            return laid
        held = []
        for shard in laid.addressable_shards:
            replica, first = (axis.start or 0 for axis in shard.index[:2])
            places = ((replica + k) * laid.shape[1] + first + row for k, row in np.ndindex(*shard.data.shape[:2]))
            windows = np.asarray(shard.data).reshape(-1, laid.shape[2])
            hashes = (hashlib.sha256(row.tobytes()).hexdigest() for row in windows)
            held.append(dict(zip(map(str, places), hashes, strict=True)))
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"size": laid.shape[0] * laid.shape[1], "rows": held}) + "\n")
        return laid

    path.unlink(missing_ok=True)
    mesh.lay = noted


# --- all of them ------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """One device; every mesh by one, two and four processes; every variant on the first mesh."""
    meshes = [Case(mesh, processes, DEVICES // processes) for mesh in MESHES for processes in (1, 2, 4)]
    return [Case("one device", 1, 1), *meshes, *(Case("data 8", 1, DEVICES, override) for override in VARIANTS)]


def compared(rows: list[dict[str, object]]) -> dict[str, object]:
    """What the runs say together."""
    plain = [row for row in rows if not row["override"]]
    return {
        "bitwise_equal_over_processes": {
            mesh: len({row["weights"] for row in plain if row["mesh"] == mesh}) == 1 for mesh in MESHES
        },
        **{f"{name.split('_')[0]}_equal_everywhere": len({row[name] for row in rows}) == 1 for name in ROWS},
        "largest_difference_to_one_device": max(row["difference"] for row in plain),
    }


def _table(found: dict[str, object], width: int = 160) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(found["command"]))
    for name in ("mesh", "processes", "set besides", "init", "order", "fed", "weights", "val_loss", "largest difference"):
        table.add_column(name, overflow="fold")
    for row in found["rows"]:
        hashes = [str(row[name])[:8] for name in (*ROWS, "weights")]
        alone = f"{row['processes']} x {row['devices']}"
        table.add_row(row["mesh"], alone, row["override"], *hashes, f"{row['val_loss']:.7f}", f"{row['difference']:.1e}")
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    for name, value in found.items():
        if name not in ("command", "rows"):
            console.print(f"{name}: {json.dumps(value)}", highlight=False)
    return console.export_text()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.meshes", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "reliability")
    out = parser.parse_args().out
    import numpy as np

    rows, one = [], {}
    with tempfile.TemporaryDirectory() as work:
        for number, case in enumerate(cases()):
            row = trained(case, Path(work) / str(number))
            made = Path(work) / str(number) / "out"
            weights = weights_of(made, latest(made)[ARM])
            one = one or weights
            row["difference"] = max(float(np.abs(np.asarray(weights[path]) - np.asarray(one[path])).max()) for path in one)
            rows.append(row)
            print(f"{case.mesh}, {case.processes} x {case.devices} {case.override}: {row['weights'][:8]}", file=sys.stderr)
            shutil.rmtree(Path(work) / str(number))
    found = {"command": "python -m tests.soak.meshes", "rows": rows, **compared(rows)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "meshes.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "meshes.txt").write_text(_table(found))
    print(_table(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fed"]:
        sys.argv[1:3], notes = [], Path(sys.argv[2])
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        _noting(notes)
        from natfp_jax.cli import main as natfp

        natfp()
    else:
        main()
