"""The report stage: summary.json, report.md and its figures.

Owns which files there are, what goes into the summary, and when they are made anew. Must not know how results are put into
words or drawn.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from natfp_jax import __version__, config, files, lora, params, texts
from natfp_jax.contrast import differences
from natfp_jax.courses import courses, trajectories
from natfp_jax.errors import Damaged, UserError
from natfp_jax.findings import Row, Summary, confused
from natfp_jax.packing import Packed
from natfp_jax.page import markdown, trained
from natfp_jax.runs import metrics
from natfp_jax.study import Arm, lacking
from natfp_jax.tables import lines
from natfp_jax.workspace import Workspace

__all__ = ["report", "summarise"]

_OF_THE_BATCH = ("batch", "loss_block")  # of a numerics record of training
# Of attribution.json, as they stand there.
ANALYSES = ("comparisons", "wording", "curves", "levels", "noise", "apart", "components")


def summarise(work: Workspace) -> Summary:
    """Everything that the report says, as JSON values.

    Raises:
      UserError: the study is not attributed, or by another version.
      Damaged: a file that it is made from is not what was written.
    """
    path = work.folder / "attribution.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: run `natfp attribute` first")
    work.check_trained()
    attributed = files.read_remade(path)
    missing = [name for name in ANALYSES if name not in attributed]
    if any("validation_bits" not in row for row in attributed.get("comparisons", ())):
        missing.append("validation_bits")
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, as another version wrote it: run `natfp attribute` again")
    records = {arm: _records(work, arm) for arm in (*work.parents, *work.arms)}
    learnt = _learnt(work)
    summary = {
        "study": work.study.name,
        "fingerprint": files.read_json(work.folder / "study.json")["fingerprint"],
        "corpus": {"name": work.store.meta["name"], "sha256": work.store.sha256, "tokens": work.store.tokens},
        **{name: attributed[name] for name in ANALYSES},
        # A share of what is no bound would mean nothing.
        **({"comparisons": [{**row, "share": None} for row in attributed["comparisons"]]} if work.reencoded else {}),
        "arms": [_arm(work, arm, records[arm][work.arms[arm].experiment.steps], learnt) for arm in work.arms],
        "stages": _timings(work.folder / "timings.json"),
        "numerics": _numerics(work, records),
        "settings": {name: config.to_json(getattr(work.study, name)) for name in ("sampling", "attribution")},
        "reencoded": work.reencoded,
        "lacking": [*lacking(work.study), *_notes(work)],
    }
    shown = files.hash_json({"version": __version__, **summary})
    return {**summary, "inputs": {"attribution": attributed["inputs"], "summary": shown}}


def _notes(work: Workspace) -> list[str]:
    """What a reader must know of each published model."""
    said, seen = list[str](), dict[str, str]()
    for name, model in work.published.items():
        said += [f"Arm {name} {note}." for note in model.source.described.notes]
        weights = work.run_of(name).record(0)["weights"]
        if (other := seen.setdefault(weights, name)) != name:
            said.append(f"Arms {other} and {name} have the same weights, bit for bit: they are one model.")
    return said


def _timings(path: Path) -> dict[str, Any]:
    """Seconds and amounts by stage; of a lost file, none: they are nowhere else."""
    return files.read_remade(path) if path.exists() else {}


def _records(work: Workspace, arm: str) -> dict[int, dict[str, Any]]:
    """Step → the record of each checkpoint of an arm."""
    return {record["step"]: record for record in work.run_of(arm).records()}


def _arm(work: Workspace, arm: str, last: dict[str, Any], learnt: dict[str, dict[str, int]]) -> dict[str, Any]:
    experiment, base = work.arms[arm].experiment, next(iter(work.arms.values())).experiment
    identity = work.identities[arm]
    if arm in work.published:
        begun = {"published": last["published"], "pool": None, "windows": 0, "epochs": 0}
    else:
        pool = identity.inputs["pool"]
        begun = {"pool": pool, "windows": experiment.data.windows, "epochs": experiment.data.epochs, **learnt[pool]}
    return {
        "id": arm,
        "fingerprint": identity.fingerprint,
        "differs": {path: list(both) for path, both in differences(*map(config.to_json, (base, experiment))).items()},
        **begun,
        "parameters": params.count(lora.table(experiment.model, work.tokenizer_of(arm).padded_size, experiment.lora)),
        **({"origin": last["origin"]} if "origin" in last else {}),
        "seeds": {name: getattr(experiment.seeds, name) for name in experiment.deciding},
        "init_hash": last["init_hash"],
        "order_hash": last["order_hash"],
        "final_hash": last["weights"],
        "val_loss": last["val_loss"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "skipped": last["skipped"],
    }


def _learnt(work: Workspace) -> dict[str, dict[str, int]]:
    """The hash of each pool → of conversations, how many it holds, and how many ids of them are learnt."""
    found = dict[str, dict[str, int]]()
    for name, arm in work.arms.items():
        if name in work.published:
            continue
        sha256 = work.identities[name].inputs["pool"]
        if sha256 not in found:  # it is read whole
            pool = work.store_of(arm).pool(arm.experiment.data)
            found[sha256] = {"examples": pool.examples, "learnt": pool.learnt} if isinstance(pool, Packed) else {}
    return found


def _numerics(work: Workspace, records: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Every numerics record with those it is of, and where the sources of one comparison do not share one."""
    drawn = {
        one: [texts.read_record(path)["numerics"] for path in work.draw_paths(one)]
        for one in dict.fromkeys(one for comparison in work.comparisons for one in comparison.draws)
    }
    differ = []
    for comparison in work.comparisons:
        # Bits depend on every stretch of training up to the draw: a resumed arm may have more than one record.
        trained: dict[int, list[dict[str, Any]]] = {}  # by generation: a child is not trained as its parent was
        for one in comparison.draws:
            for generation, record in _behind(work, records, work.arms[one.arm], one.step):
                stretches = (record["numerics"], *(earlier["numerics"] for earlier in record["before"]))
                trained.setdefault(generation, []).extend(stretches)
        sampled = [record for one in comparison.draws for record in drawn[one]]
        lines = [work.arms[one.arm].experiment for one in comparison.draws]
        generations = zip_longest(*((line, *reversed(line.ancestors)) for line in lines))
        batches = [{one.data.batch for one in some if one is not None} for some in generations]
        follow = _OF_THE_BATCH if any(len(some) > 1 for some in batches) else ()  # from what was meant to differ
        for stage, found in (*(("train", some) for some in trained.values()), ("sample", sampled)):
            names = dict.fromkeys(name for record in found for name in record if stage == "sample" or name not in follow)
            if fields := [name for name in names if any(record.get(name) != found[0].get(name) for record in found)]:
                place = {"comparison": comparison.title, "checkpoint": comparison.step}
                differ.append({**place, "stage": stage, "fields": fields})
    every_training = [
        (f"{arm} @ {step}", record["numerics"]) for arm, steps in records.items() for step, record in steps.items()
    ]
    every_draw = [(one.name, record) for one, found in drawn.items() for record in found]
    return {"differ": differ, "train": _distinct(every_training), "sample": _distinct(every_draw)}


def _behind(
    work: Workspace, records: dict[str, dict[int, dict[str, Any]]], arm: Arm, until: int, generation: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of all checkpoints that a checkpoint descends from, and its own; its parent's are of generation 1.

    How a published model was trained is not on record.
    """
    if arm.id in work.published:
        return
    yield from ((generation, record) for step, record in records[arm.id].items() if step <= until)
    parent, named = work.parent_of(arm), arm.experiment.parent
    if parent is not None and named is not None:
        yield from _behind(work, records, parent, named.step, generation + 1)


def _distinct(records: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, record in records:
        of = found.setdefault(files.canonical_json(record), {"of": [], "record": record})["of"]
        if name not in of:  # of a draw's files
            of.append(name)
    return list(found.values())


def report(work: Workspace) -> Summary:
    """Writes the report's files below `report/`, unless they show the same already; returns the summary.

    Raises:
      UserError: the study is not attributed.
      Damaged: a file of the report, or one that it is made from, is not what was written.
    """
    summary = summarise(work)
    for arm in work.arms:
        if damage := work.run_of(arm).damaged_metrics():
            work.progress.say(f"{damage}: the curves show what is whole")
    folder = work.folder / "report"
    rows = confused(summary)
    losses = ["losses.png"] if trained(summary) else []
    names = ["accuracies.png", "courses.png", *losses, *(f"confusion-{row['classifier']}.png" for row in rows)]
    trends = trajectories(summary)
    names += ["components.png"] if trends else []
    names.append("report.md")
    path = folder / "summary.json"
    if path.exists() and (written := files.read_remade(path)).get("inputs") == summary["inputs"]:
        try:
            files.verify(folder, written["files"])
            return summary
        except Damaged as damage:  # made anew below
            work.progress.say(f"{damage}: the report is made anew")

    from natfp_jax import figures  # a complete study never waits for matplotlib

    panels: dict[int, list[tuple[str, list[Row]]]] = {}
    for line in lines(summary):
        panels.setdefault(line.checkpoint, []).append((line.name, line.rows))
    drawings = [
        figures.accuracies(panels),
        figures.courses(courses(summary)),
        *([figures.losses(_curves(work, summary))] if losses else []),
        *map(figures.confusion, rows),
        *([figures.components(trends)] if trends else []),
    ]
    for name, figure in zip(names[:-1], drawings, strict=True):
        figures.save(figure, folder / name)
    with files.whole_file(folder / "report.md", "w", encoding="utf-8") as file:
        file.write(markdown(summary))
    files.write_json(path, {**summary, "files": files.manifest(folder, names)})  # last: it says that the rest is there
    return summary


def _curves(work: Workspace, summary: Summary) -> dict[str, list[tuple[float, float, bool]]]:
    """Arm → (tokens, loss, whether of the validation part)."""
    curves = {}
    for arm in (arm for arm in summary["arms"] if arm["steps"]):
        each = arm["tokens"] / arm["steps"]
        lines, _ = metrics(work.run_of(arm["id"]).metrics)
        curves[arm["id"]] = [
            (each * line["step"], line[name], name == "val_loss")
            for line in lines
            for name in ("loss", "val_loss")
            if name in line
        ]
    return curves
