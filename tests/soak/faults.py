"""Faults of lineage, planted in a healthy study, and what `natfp audit` says of each.

    python -m tests.soak.faults --out docs/results/reliability

Every fault is careful: manifests, hashes and names are made to fit wherever whoever planted it could have made them fit.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from natfp_jax import checkpoint, config, files, mesh, params
from natfp_jax.audit import audit
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.claims import Claim, table
from natfp_jax.config import Experiment, Study
from natfp_jax.corpus import opened
from natfp_jax.lineage import weight_hash
from natfp_jax.loading import load_study
from natfp_jax.progress import Progress
from natfp_jax.runs import RunFolder
from tests.soak.damage import carried_out
from tests.soak.studies import machine, written


@dataclass(frozen=True)
class Place:
    """A study in which a fault is planted."""

    out: Path

    def arm(self, name: str) -> RunFolder:
        """The run of an arm."""
        listed = files.read_json(self.out / "studies" / "soak" / "arms.json")
        return RunFolder(self.out / "runs" / listed[name]["fingerprint"][:16])

    def fingerprint(self, name: str) -> str:
        found: str = files.read_json(self.arm(name).folder / "experiment.json")["fingerprint"]
        return found

    def steps(self, name: str) -> list[int]:
        return checkpoint.steps(self.arm(name).checkpoints)

    def rewrite(self, name: str, step: int, **changes: Any) -> None:
        """Changes the record of a checkpoint, and seals it again."""
        place = self.arm(name).checkpoints / str(step)
        record = {**files.read_json(place / files.MANIFEST)["record"], **changes}
        files.write_json(place / files.MANIFEST, {"record": record, "files": files.manifest(place)})

    def gather(self, name: str) -> None:
        """Makes lineage.json say what the checkpoints say."""
        run = self.arm(name)
        old = files.read_json(run.folder / "lineage.json")
        files.write_json(run.folder / "lineage.json", {**old, "checkpoints": run.records()})

    def weights(self, name: str, step: int) -> dict[str, Any]:
        """The parameters of a checkpoint, path by path."""
        run = self.arm(name)
        experiment = config.from_json(Experiment, files.read_json(run.folder / "experiment.json")["experiment"])
        store = opened(next(path for path in (self.out / "corpora").iterdir() if not path.suffix))
        specs = params.table(experiment.model, store.tokenizer.padded_size)
        shardings = mesh.param_shardings(mesh.make(config.Mesh(), jax.devices()[:1]), specs)
        tree, _ = checkpoint.restore(run.checkpoints, step, checkpoint.with_shardings(params.abstract(specs), shardings))
        return {path: np.array(leaf) for path, leaf in params.flatten(tree).items()}

    def replace_weights(self, name: str, step: int, flat: dict[str, Any]) -> str:
        """Puts other parameters into a checkpoint, sealed, its record as it was; their hash."""
        place, other = self.arm(name).checkpoints / str(step), self.out / "other"
        tree = jax.tree.map(jax.numpy.asarray, params.nest(flat))
        with Checkpoints(other) as writer:
            writer.save(step, tree, {"unused": jax.numpy.zeros(1)}, {"step": step})
        shutil.rmtree(place / "params")
        (other / str(step) / "params").rename(place / "params")
        shutil.rmtree(other)
        self.rewrite(name, step)
        return weight_hash(tree)


A, B, C = "init0-order0", "init1-order0", "init0-order1"


def another_arm(place: Place) -> None:
    """The last checkpoint of arm A is put under arm B's name, as it is."""
    last = place.steps(A)[-1]
    target = place.arm(B).checkpoints / str(last)
    shutil.rmtree(target)
    shutil.copytree(place.arm(A).checkpoints / str(last), target)


def another_arm_relabelled(place: Place) -> None:
    """The same, its record made out to arm B and made to descend from B's checkpoint before it."""
    another_arm(place)
    before, last = place.steps(B)[-2:]
    parent = {"step": before, "weights": place.arm(B).record(before)["weights"]}
    init = place.arm(B).record(0)["weights"]
    place.rewrite(B, last, fingerprint=place.fingerprint(B), parent=parent, init_hash=init)
    place.gather(B)


def another_step_0(place: Place) -> None:
    """Arm B shows a step 0 of arm A's seed, everything relabelled: its own training did not start there."""
    target = place.arm(B).checkpoints / "0"
    shutil.rmtree(target)
    shutil.copytree(place.arm(A).checkpoints / "0", target)
    init = checkpoint.record(target.parent, 0)["weights"]
    place.rewrite(B, 0, fingerprint=place.fingerprint(B))
    for step in place.steps(B)[1:]:
        record = place.arm(B).record(step)
        parent = record["parent"] if record["parent"]["step"] else {"step": 0, "weights": init}
        place.rewrite(B, step, init_hash=init, parent=parent)
    place.gather(B)


def right_step_0_of_another_training(place: Place) -> None:
    """As in a published suite: arm B's step 0 is that of its seed, the checkpoints after it are arm A's, all relabelled."""
    init = place.arm(B).record(0)["weights"]
    for step in place.steps(B)[1:]:
        target = place.arm(B).checkpoints / str(step)
        shutil.rmtree(target)
        shutil.copytree(place.arm(A).checkpoints / str(step), target)
        parent = checkpoint.record(target.parent, step)["parent"]
        parent = parent if parent["step"] else {"step": 0, "weights": init}
        place.rewrite(B, step, fingerprint=place.fingerprint(B), init_hash=init, parent=parent)
    place.gather(B)


def order_swapped(place: Place) -> None:
    """The checkpoints of order seeds 0 and 1, which start alike, change places, all relabelled."""
    here, there = place.arm(A).checkpoints, place.arm(C).checkpoints
    here.rename(place.out / "swap")
    there.rename(here)
    (place.out / "swap").rename(there)
    for name in (A, C):
        for step in place.steps(name):
            place.rewrite(name, step, fingerprint=place.fingerprint(name))
        place.gather(name)


def _one_bit(place: Place, step: int) -> str:
    flat = place.weights(A, step)
    flat["layers/mlp/up"].reshape(-1).view(np.uint32)[5] ^= np.uint32(1)
    return place.replace_weights(A, step, flat)


def one_bit_of_the_last(place: Place) -> None:
    """The lowest bit of one weight of the last checkpoint; its record is as it was."""
    _one_bit(place, place.steps(A)[-1])


def one_bit_recorded(place: Place) -> None:
    """The lowest bit of one weight of a checkpoint on the way, whose record is made to fit."""
    step = place.steps(A)[1]
    place.rewrite(A, step, weights=_one_bit(place, step))
    place.gather(A)


def one_bit_of_step_0(place: Place) -> None:
    """The lowest bit of one weight of step 0; every record is made to fit."""
    init = _one_bit(place, 0)
    place.rewrite(A, 0, weights=init, init_hash=init)
    for step in place.steps(A)[1:]:
        record = place.arm(A).record(step)
        parent = record["parent"] if record["parent"]["step"] else {"step": 0, "weights": init}
        place.rewrite(A, step, init_hash=init, parent=parent)
    place.gather(A)


def one_bit_on_disk(place: Place) -> None:
    """One bit of a file of weights, and nothing else."""
    path = max((place.arm(A).checkpoints / "0" / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def text_of_another_arm(place: Place) -> None:
    """A draw of arm A under arm B's name, sealed again."""
    draws = place.out / "studies" / "soak" / "draws"
    step = place.steps(A)[-1]
    name = f"{B}.step{step}.draw0-00000-of-00003.parquet"
    shutil.copy(draws / f"{A}.step{step}.draw0-00000-of-00003.parquet", draws / name)
    record = files.read_json((draws / name).with_suffix(".manifest.json"))["record"]
    files.write_json((draws / name).with_suffix(".manifest.json"), {"record": record, "files": files.manifest(draws, [name])})


FAULTS: tuple[Callable[[Place], None], ...] = (
    another_arm,
    another_arm_relabelled,
    another_step_0,
    right_step_0_of_another_training,
    order_swapped,
    one_bit_of_the_last,
    one_bit_recorded,
    one_bit_of_step_0,
    one_bit_on_disk,
    text_of_another_arm,
)


def study() -> Study:
    """Two inits and two orders, small."""
    given = load_study(written(Path(tempfile.mkdtemp())))
    data = dataclasses.replace(given.experiment.data, windows=160)
    return dataclasses.replace(given, experiment=dataclasses.replace(given.experiment, data=data))


def healthy(folder: Path) -> Path:
    """A finished study without a fault."""
    said, whole = carried_out(study(), folder / "healthy")
    assert whole, said
    return folder / "healthy"


def planted(source: Path, fault: Callable[[Place], None]) -> list[Claim]:
    """The claims of a copy with a fault."""
    out = source.with_name(fault.__name__)
    shutil.copytree(source, out)
    fault(Place(out))
    claims = audit(out, Progress(quiet=True))
    shutil.rmtree(out)
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/reliability"))
    given = parser.parse_args()
    command = f"python -m tests.soak.faults --out {given.out}"
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, open(given.out / "audit.txt", "w") as file:
        console = Console(file=file, width=160)
        source = healthy(Path(folder))
        claims = audit(source, Progress(quiet=True))
        console.print(f"{command}\n\n# A healthy study", table(claims), highlight=False)
        for fault in FAULTS:
            judged = planted(source, fault)
            wrong = [claim for claim in judged if claim.verdict != "proven"]
            found[fault.__name__] = {"planted": fault.__doc__, "false": [asdict(c) for c in wrong if c.verdict == "false"]}
            shown = table(wrong)
            shown.caption = f"{len(wrong)} false, the other {len(judged) - len(wrong)} claims proven"
            console.print(f"# {fault.__name__}: {fault.__doc__}", shown, highlight=False)
    result = {"command": command, "machine": machine(), "healthy": [asdict(claim) for claim in claims], "faults": found}
    result["faults_found"] = sum(bool(one["false"]) for one in found.values())
    page = given.out / "audit.txt"
    page.write_text(page.read_text().replace(folder, "OUT"))
    (given.out / "audit.json").write_text(json.dumps(result, indent=1).replace(folder, "OUT") + "\n")


if __name__ == "__main__":
    main()
