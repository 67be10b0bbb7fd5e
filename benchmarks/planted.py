"""What `natfp audit --suite` says of a suite that is as claimed, and of the same one with the defects of published suites.

    python -m benchmarks.planted

Three initialisations x two data orders are trained, small, and each kept checkpoint is written as `natfp export` does. The list
of the planted suite then claims of some folders what they are not: a branch goes on from another branch's step 0, two branches
have the same weights at step 1, a branch has its final weights for an early step, and one checkpoint is another order's.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import jax
from rich.console import Console

from benchmarks import report
from natfp_jax import config, mesh, suite_audit
from natfp_jax.claims import Claim, table
from natfp_jax.config import Corpus, Data, Experiment, Factor, Model, Run, Sampling, Stories, Study
from natfp_jax.hf_export import export
from natfp_jax.progress import Progress
from natfp_jax.stages import Work
from natfp_jax.trained import trained

__all__ = ["main"]

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "elsewhere"
TOTAL, STEPS = 64, (0, 1, 2, 4, 8, 16, 32, 64)
STUDY = Study(
    name="planted",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=2000), vocabulary=512),
        model=Model(width=64, layers=4, heads=4),
        data=Data(seq_len=32, windows=8 * TOTAL, batch=8),
    ),
    factors=(Factor("seeds.init", (1, 2, 3)), Factor("seeds.order", (1, 2))),
    run=Run(checkpoints=tuple(step / TOTAL for step in STEPS)),
    sampling=Sampling(prompts=100, new_tokens=8),
)
Place = tuple[int, int, int]  # init, order, step
# What is listed as the one is the other.
PLANTED: dict[Place, Place] = {
    **{(3, 1, step): (1, 1, step) for step in STEPS if step},  # another init's training, with the same order
    (2, 2, 1): (2, 1, 1),
    (1, 2, 4): (1, 2, 64),
    (2, 1, 16): (2, 2, 16),
}


def written(folder: Path, devices: jax.sharding.Mesh) -> None:
    """A folder in Hugging Face's layout of every checkpoint of every arm."""
    work = Work(STUDY, folder / "out", Progress(quiet=True))
    work.devices = devices
    with work.claimed():
        work.corpus()
        work.train()
    for arm in work.arms.values():
        seeds = arm.experiment.seeds
        for step in STEPS:
            found = trained(work.run_of(arm.id).checkpoints / str(step), devices)
            export(found.params, found.model, found.tokenizer, found.context, folder / f"{seeds.init}-{seeds.order}-{step}")


def listed(path: Path, served: dict[Place, Place]) -> list[Claim]:
    """The claims of a list in which some folders stand in the place of others."""
    lines = []
    for init in (1, 2, 3):
        for order in (1, 2):
            for step in STEPS:
                one = served.get((init, order, step), (init, order, step))
                lines += ["[[checkpoint]]", f'branch = "init{init}-order{order}"', f'path = "{"-".join(map(str, one))}"']
                lines += [f"init = {init}", f"order = {order}", f"step = {step}", ""]
    path.write_text("\n".join(lines))
    return suite_audit.audit(path, Progress(quiet=True)).claims


def main() -> None:
    """The program."""
    argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__.partition("\n")[0]).parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        written(folder, mesh.make(config.Mesh(), jax.devices()[:1]))
        for name, served in (("healthy", {}), ("planted", PLANTED)):
            claims = listed(folder / f"{name}.toml", served)
            console = Console(width=150, record=True)
            console.print(table(claims))
            (RESULTS / f"{name}.txt").write_text("\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n")
            kept[name] = [asdict(claim) for claim in claims]
    result = {"versions": report.versions(), "machine": report.machine(), **kept}
    (RESULTS / "audit.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
