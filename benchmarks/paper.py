"""Which claims of "Natural Fingerprints of Large Language Models" hold here? One table of the studies of configs/paper.

    python -m benchmarks.paper --scale toy --out out --save

Does what is missing of each study with `natfp run`, a process each, and reads its summary. A row is a claim: what a bag of
subwords reads of it, what the rung of the ladder reads that is best on the validation texts, the likelihood ceiling, the null
by that rung at the same checkpoint, and the verdict, which is of that rung. With `--save` the table replaces the one of that
scale in docs/results/paper/README.md, and the figures of studies over training are copied there.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natfp_jax.findings import best, decision, interval, p_text, percent, pooled
from natfp_jax.loading import load_study
from natfp_jax.page import grid

__all__ = ["CLAIMS", "Claim", "main", "row_of", "studies"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "paper"
# Figure, as it is called there and in a study's report → the study.
DRAWN = {
    ("twin", "courses"): ("seeds.py", "part=twin"),
    ("early", "courses"): ("early_weights.py",),
    ("early", "components"): ("early_weights.py",),
    ("long", "courses"): ("long.py",),
    ("sft-parents", "courses"): ("sft.py", "part=parents"),
    ("sft-parents", "components"): ("sft.py", "part=parents"),
}

Summary = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim, and the comparison that tests it.

    Attributes:
      said: what is claimed.
      study: the file in configs/paper, and settings of its own.
      factor: of the comparison.
      classes: how many sources are told apart; None: all levels of the factor.
      checkpoint: which of those that are drawn from.
    """

    said: str
    study: tuple[str, ...]
    factor: str
    classes: int | None = None
    checkpoint: int = -1


def _seeds(said: str, factor: str) -> list[Claim]:
    return [Claim(f"{said}, m = {m}", ("seeds.py",), factor, m) for m in (2, 3, 4)]


def _over(said: str, file: str, factor: str, checkpoints: dict[int, str]) -> list[Claim]:
    return [Claim(f"{said}, {when}", (file,), factor, checkpoint=place) for place, when in checkpoints.items()]


EPOCHS = {0: "after 1 epoch", 1: "after 2 epochs", 2: "after 4 epochs", 3: "after 8 epochs"}
CLAIMS = [
    Claim("other windows of one corpus", ("data.py",), "first"),
    Claim("another corpus", ("data.py",), "source"),
    Claim("size: width", ("size.py",), "width"),
    Claim("size: depth", ("size.py",), "layers"),
    Claim("size: width and depth", ("size.py",), "model"),
    Claim("optimiser: learning rate", ("optimiser.py",), "learning_rate"),
    Claim("optimiser: schedule", ("optimiser.py",), "schedule"),
    Claim("optimiser: batch size", ("optimiser.py",), "batch"),
    Claim("optimiser: weight decay", ("optimiser.py",), "weight_decay"),
    Claim("optimiser: warm-up", ("optimiser.py",), "warmup"),
    Claim("optimiser: first beta", ("optimiser.py",), "beta1"),
    Claim("optimiser: second beta", ("optimiser.py",), "beta2"),
    Claim("optimiser: AdamW, Lion, Muon", ("optimiser.py",), "optimiser"),
    *_seeds("seeds: init", "init"),
    *_seeds("seeds: order", "order"),
    *_seeds("seeds: both", "seeds"),
    Claim("chaos: the twin, in the end", ("seeds.py",), "twin"),
    *_over("early weights: init", "early_weights.py", "init", {0: "at step 0", 1: "at 3 %", 2: "at 10 %", 4: "in the end"}),
    *_over("early weights: order", "early_weights.py", "order", {2: "at 10 %", 4: "in the end"}),
    *_over("long training: init", "long.py", "init", EPOCHS),
    *_over("long training: order", "long.py", "order", EPOCHS),
    *_over("long training: the twin", "long.py", "twin", EPOCHS),
    Claim("fine-tuning: order", ("sft.py",), "order"),
    Claim("fine-tuning: dropout", ("sft.py",), "dropout"),
    Claim("fine-tuning: learning rate", ("sft.py",), "learning_rate"),
    Claim("fine-tuning: other conversations", ("sft.py",), "first"),
    Claim("fine-tuning: the twin", ("sft.py",), "twin"),
    Claim("adapters: their init", ("sft.py", "part=lora"), "init"),
    Claim("adapters: order", ("sft.py", "part=lora"), "order"),
    Claim("adapters: init and order", ("sft.py", "part=lora"), "seeds"),
    Claim("adapters: the twin", ("sft.py", "part=lora"), "twin"),
    *(
        Claim(f"the parent's init, {when}", ("sft.py", "part=parents"), "parent_init", checkpoint=place)
        for place, when in {0: "before fine-tuning", 1: "at 10 %", 2: "at 30 %", 3: "in the end"}.items()
    ),
    *(
        Claim(f"beside another parent: order, {when}", ("sft.py", "part=parents"), "order", checkpoint=place)
        for place, when in {2: "at 30 %", 3: "in the end"}.items()
    ),
]


def studies() -> list[tuple[str, ...]]:
    """The file and settings of every study that a claim or a figure needs, in the order in which they are done."""
    return list(dict.fromkeys([*(claim.study for claim in CLAIMS), *DRAWN.values()]))


def row_of(claim: Claim, summary: Summary) -> dict[str, Any]:
    """What a study found of a claim: rows of its summary, by the role that they have."""
    steps = sorted({row["checkpoint"] for row in summary["comparisons"]})
    here = [row for row in summary["comparisons"] if row["checkpoint"] == steps[claim.checkpoint]]
    of = [row for row in here if row["factor"] == claim.factor]
    if claim.classes is not None:
        of = [row for row in of if len(row["classes"]) == claim.classes]
    of = [row for row in of if pooled(row)] or of
    told = [row for row in of if row["name"] == of[0]["name"]]  # of several pairs, the first
    (subwords,) = (row for row in told if row["classifier"] == "subwords")
    chosen = best(told)
    (null,) = (row for row in here if row["factor"] == "null" and row["classifier"] == chosen["classifier"])
    return {"subwords": subwords, "best": chosen, "null": null, "decision": decision(chosen)}


def table(found: list[tuple[Claim, dict[str, Any]]]) -> str:
    """The claims in Markdown."""
    header = ["claim", "config", "sources", "best", "verdict", "chance %", "subwords % [95 %]", "best % [95 %]", "p Holm"]
    rows = [
        [
            *(claim.said, f"`{' '.join(claim.study)}`", " / ".join(row["best"]["classes"]), row["best"]["classifier"]),
            *(row["decision"], percent(row["best"]["chance"]), interval(row["subwords"]), interval(row["best"])),
            *(p_text(row["best"]["p_holm"]), interval(row["best"], "ceiling", "ceiling_ci95"), interval(row["null"])),
        ]
        for claim, row in found
    ]
    return grid([*header, "ceiling % [95 %]", "null % [95 %]"], rows, words=5)


def done(study: tuple[str, ...], scale: str, out: Path) -> tuple[Path, Summary]:
    """The report's folder of a study, and its summary; what is missing of it is done."""
    file, *assignments = (*study, f"scale={scale}")
    path = ROOT / "configs" / "paper" / file
    natfp = Path(sys.executable).with_name("natfp")
    subprocess.run([natfp, "run", path, *assignments, "--out", out], check=True, stdout=subprocess.DEVNULL)
    folder = out / "studies" / load_study(path, assignments).name / "report"
    return folder, json.loads((folder / "summary.json").read_text())


def replaced(page: str, scale: str, text: str) -> str:
    """A page with the table of a scale between its marks."""
    begin, end = f"<!-- {scale} -->\n", f"\n<!-- end of {scale} -->"
    before, found, rest = page.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise SystemExit(f"{RESULTS / 'README.md'} lacks the marks {begin.strip()} and {end.strip()}: put them where it goes")
    return before + begin + text + end + after


def main() -> None:
    """Runs what is missing, prints the table, and saves it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="toy", choices=("toy", "small", "paper"))
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the studies are, or come to be")
    parser.add_argument("--save", action="store_true", help="write the table and the figures below docs/results/paper")
    given = parser.parse_args()
    page = RESULTS / "README.md"
    if given.save:
        replaced(page.read_text(), given.scale, "")  # what is wrong with it is known before hours of work
    found = {study: done(study, given.scale, given.out) for study in studies()}
    shown = table([(claim, row_of(claim, found[claim.study][1])) for claim in CLAIMS])
    print(shown)
    if given.save:
        page.write_text(replaced(page.read_text(), given.scale, shown))
        for (name, figure), study in DRAWN.items():
            shutil.copyfile(found[study][0] / f"{figure}.png", RESULTS / f"{name}-{figure}-{given.scale}.png")


if __name__ == "__main__":
    main()
