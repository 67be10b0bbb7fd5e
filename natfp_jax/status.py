"""What is done of the studies in an output folder.

Owns how progress is read from the names of files alone, so that it is known at once and beside a running process. Must not
import anything that computes.
"""

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax import files, lock
from natfp_jax.config import Study, from_json
from natfp_jax.errors import UserError
from natfp_jax.study import arms, draws, kept_fractions, parents

__all__ = ["status"]


def status(out: Path) -> list[Table]:
    """A table for each study below `out`: a row for each arm, then the stages that are of the whole study.

    Raises:
      UserError: there are no studies, or one cannot be read.
    """
    found = sorted((out / "studies").glob("*/study.json"))
    if not found:
        raise UserError(
            f"{out} has no studies, expected {out / 'studies' / 'NAME' / 'study.json'}: give the --out of `natfp run`"
        )
    return [_table(out, path) for path in found]


def _table(out: Path, path: Path) -> Table:
    folder, written = path.parent, files.read_json(path)
    try:
        study = from_json(Study, written["study"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no study of this version ({error}): move {folder} away") from None
    arms_path = folder / "arms.json"
    listed = files.read_json(arms_path) if arms_path.exists() else {}
    # Stages come one after the other, so the first that is not done is the one at work.
    at_work = lock.held(folder) or any(lock.held(task) for task in (folder / "tasks").glob("*-of-*"))
    draw_files: dict[str, list[Path]] = {}
    for one in draws(study):
        names = one.files(study.sampling.prompts, study.sampling.file_texts)
        draw_files.setdefault(one.arm, []).extend(folder / "draws" / name for name in names)

    runs = {name: out / "runs" / entry["fingerprint"][:16] for name, entry in listed.items()}
    trained, drawn = {}, {}  # arm → how many of how many
    every = arms(study)
    for arm in (*parents(every), *every):
        steps = set(arm.experiment.kept_steps(kept_fractions(study, every, arm.experiment)))
        trained[arm.id] = len(steps & _finished(runs[arm.id])) if arm.id in runs else 0, len(steps)
        drawn[arm.id] = (
            sum(map(_drawn, draw_files.get(arm.id, ()))),
            len(draw_files.get(arm.id, ())),
        )
    all_trained, all_drawn = (all(done == of for done, of in counts.values()) for counts in (trained, drawn))

    table = Table(title=Text(study.name), title_justify="left", caption_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("arm", "corpus", "train", "sample"):
        table.add_column(column)
    for name, counts in trained.items():
        corpus = _state(name in listed, at_work)
        train = _counted(*counts, "checkpoints", name in runs and lock.held(runs[name]))
        sample = _counted(*drawn[name], "files", at_work and all_trained) if name in draw_files else Text("")
        table.add_row(Text(name), corpus, train, sample)

    attribution, summary = folder / "attribution.json", folder / "report" / "summary.json"
    attributed = attribution.exists()
    reported = _state(summary.exists(), at_work and attributed)
    if (
        summary.exists()
        and attributed
        and files.read_json(summary)["inputs"]["attribution"] != files.read_json(attribution)["inputs"]
    ):
        reported = Text("out of date", style="yellow")
    stages = ("attribute ", _state(attributed, at_work and all_drawn), "\nreport    ", reported)
    table.caption = Text.assemble(*stages, style="not italic")
    return table


def _finished(run: Path) -> set[int]:
    """The steps of whole checkpoints: those with a manifest."""
    return {int(path.parent.name) for path in (run / "checkpoints").glob("*/manifest.json") if path.parent.name.isdecimal()}


def _drawn(file: Path) -> bool:
    return file.exists() and file.with_suffix(".manifest.json").exists()


def _state(done: bool, running: bool) -> Text:
    if done:
        return Text("done", style="green")
    return Text("running", style="yellow") if running else Text("missing", style="red")


def _counted(done: int, of: int, unit: str, running: bool) -> Text:
    state = _state(done == of, running)
    return state if done == of else state.append(f", {done} of {of} {unit}")
