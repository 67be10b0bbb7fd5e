"""The `natfp` verbs.

Owns the command line and exit codes: 0; 1 where an audit finds something false; 2 with one line for a user's mistake; 75 with
one line where the work was stopped, by a signal or with another process, and the same command goes on. Thin: heavy imports
happen inside the verbs, and nothing is computed here.
"""

import contextlib
import errno
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import tyro
from rich.console import Console

from natfp_jax.config import Attribution, Study, replace
from natfp_jax.errors import Damaged, Stopped, UserError
from natfp_jax.files import set_aside, write_json
from natfp_jax.launcher import detect
from natfp_jax.loading import load_study
from natfp_jax.places import check, place
from natfp_jax.progress import Progress
from natfp_jax.stopping import STOPPED, Stop

__all__ = ["main"]

_STUDY = tyro.conf.arg(metavar="STUDY", help="a study, such as configs/quickstart.py")
StudyFile = Annotated[tyro.conf.Positional[Path], _STUDY]
Overrides = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(
        metavar="PATH=VALUE",
        help="set any field of the study by its path, such as experiment.model.width=256 or sampling.checkpoints=[0.1,1]; or a "
        "setting of the study's file, such as scale=small",
    ),
]
_OUT = Path("out")
_REPLAYED = 8  # steps that an audit trains again
Place = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="DIR",
        instance_from_str=lambda given: place(given[0]),
        is_instance=lambda given: hasattr(given, "parts"),
        str_from_instance=lambda given: [str(given)],
    ),
]
_OF_A_STUDY = ("run", "train", "sample", "attribute", "report", "plan")  # the verbs that take overrides
_OF_A_PATH = ("--out", "--texts", "--save", "--json", "--tokenizer", "--others")  # their values may have the sign in them
FALSE = 1  # exit code: an audit found something that is not so, or a plan does not fit
_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    # no folder of one's own
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
}


@dataclass(frozen=True)
class How:
    """Where a study is carried out, and by which processes."""

    out: Place = _OUT
    """Where everything is written and found again: a folder, or one of an object store, such as gs://bucket/folder."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Refuse damaged files instead of setting them aside and making them again."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """The first of many processes. SLURM, Open MPI, Kubernetes, TPU slices and SkyPilot need none of these three."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many processes there are; 1: this one works alone, whatever the environment says."""
    process: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Which one this is, from 0."""
    task: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Do a share of the study alone, such as a task of a job array does: which one, from 0."""
    tasks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many tasks share the study; the last to end attributes and reports."""


Options = Annotated[How, tyro.conf.arg(name="")]


def _on_tpu_vm() -> bool:
    """Whether this is a host of a TPU slice: JAX then asks the cloud how many there are."""
    devices = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return devices and importlib.util.find_spec("libtpu") is not None


def _perform(study: Path, overrides: tuple[str, ...], how: How, *stages: str) -> None:
    configured = load_study(study, overrides)
    if (how.task, how.tasks) != (None, None) and not {"train", "sample"} & {*stages}:
        raise UserError("--task and --tasks share training and sampling: leave them out, attribution is done once for all")
    launch = detect(os.environ, how.coordinator, how.processes, how.process, tpu_vm=_on_tpu_vm())
    stop = Stop()
    with stop.installed():
        from natfp_jax import processes, programs

        programs.keep()
        processes.start(launch, configured.run.heartbeat_seconds)
        with _together(configured.run.heartbeat_seconds) as printed:
            summary = _stages(configured, how, stages, stop)
            if summary is not None and processes.first():
                _show(summary, how.out / "studies" / configured.name / "report" / "report.md", printed)


def _stages(study: Study, how: How, stages: tuple[str, ...], stop: Stop) -> dict[str, Any] | None:
    """Does the stages; a damaged file is told of, set aside and made again, unless the user is strict."""
    from natfp_jax import processes
    from natfp_jax.report import report
    from natfp_jax.share import share
    from natfp_jax.stages import Work

    mine = share(how.task, how.tasks)
    check(how.out)
    with Progress(quiet=not processes.first()) as progress:
        while True:
            work, summaries = Work(study, how.out, progress, stop, mine), list[dict[str, Any]]()
            try:
                if "attribute" in stages:
                    _ = work.encoder_files  # what is lacking is known before anything is written
                with work.begun():
                    if "attribute" in stages:
                        _ = work.test_rows  # too few documents are known before hours of training
                    for stage in (one for one in stages if one != "attribute"):
                        getattr(work, stage)()
                    if stages and "attribute" not in stages:
                        return None
                    if left := processes.led(work.left):
                        named = f"{', '.join(left[:4])}{f' and {len(left) - 4} more' if len(left) > 4 else ''}"
                        progress.say(f"task {mine} is done; {named} are left to other tasks, the last of which attributes")
                        return None
                    # Of tasks that share the study every one that finds all there comes here, one after another.
                    with contextlib.nullcontext() if mine is None else work.claimed():
                        if stages:
                            work.attribute()
                        processes.led(lambda work=work, found=summaries: found.append(report(work)))  # type: ignore[misc]
                return summaries[0] if summaries else None
            except Damaged as damage:
                if how.strict:
                    raise UserError(f"{damage}: remove it, or run the same command without --strict") from None
                if processes.many() and not damage.agreed:  # the others may not know of it
                    raise UserError(f"{damage}: remove it and run the same command again") from None
                aside = processes.led(lambda damage=damage: str(set_aside(damage.path)))  # type: ignore[misc]
                progress.say(f"{damage}: set aside as {aside}, going on from what is whole")


@contextlib.contextmanager
def _together(heartbeat_seconds: int) -> Iterator[IO[str]]:
    """Watches the other processes, if any; yields what to print results to.

    Libraries print to standard output while processes meet, in the middle of lines: it leads to standard error meanwhile.
    """
    from natfp_jax import processes

    if not processes.many():
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as printed:
        os.dup2(2, 1)
        try:
            with processes.watched(heartbeat_seconds):
                yield printed
            os.dup2(printed.fileno(), 1)
        except BaseException as error:
            said = " ".join(str(error).split())
            if processes.is_loss(error):
                processes.lost(said[:200])
            together = processes.together(error)
            processes.leave(_told(error, quiet=together and not processes.first()), together or isinstance(error, UserError))


def _show(summary: dict[str, Any], page: Path, printed: IO[str]) -> None:
    from natfp_jax.findings import verdicts
    from natfp_jax.tables import table

    console = _console(printed)
    console.print(table(summary))
    for line in verdicts(summary):
        console.print(f"- {line}", highlight=False)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _console(file: IO[str] | None = None) -> Console:
    """Standard output; 100 columns, which the tables need, where it is no terminal."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=100)


def run(study: StudyFile, overrides: Overrides = (), /, how: Options = How()) -> None:
    """Does every stage of a study that is not done yet, and prints its table.

    The stages are corpus, train, sample, attribute and report. A study that was stopped at any moment goes on with the same
    command; one that is complete prints its table within seconds.

    Example: natfp run configs/quickstart.py --out out name=wider experiment.model.width=256
    """
    _perform(study, overrides, how, "train", "sample", "attribute")


def train(study: StudyFile, overrides: Overrides = (), /, how: Options = How()) -> None:
    """Prepares the corpus and trains the arms that lack a checkpoint."""
    _perform(study, overrides, how, "train")


def sample(study: StudyFile, overrides: Overrides = (), /, how: Options = How()) -> None:
    """Draws the texts that are missing from the trained arms."""
    _perform(study, overrides, how, "sample")


@dataclass(frozen=True)
class Texts:
    """Texts from elsewhere, in place of a study."""

    texts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """In place of STUDY: a .parquet, .jsonl or .csv file of texts and their labels, whatever models they are of."""
    save: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where each classifier is stored for `natfp predict`, in a folder of its name."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where the results are written too."""
    classifiers: tuple[str, ...] = Attribution().classifiers
    """Rungs of the ladder."""
    encoder: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A local folder of Hugging Face's layout, for the classifier `encoder`."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A tokenizer.json; left out: one is trained on the texts to learn from."""
    split_seed: int = 0
    """Decides which documents are for training, validation and test."""
    others: Annotated[str | None, tyro.conf.arg(metavar="LABEL")] = None
    """Texts with this label are no class: a stored classifier learns from them when to say "none of these"."""
    text_key: str = "text"
    """The column of the texts."""
    label_key: str = "label"
    """The column of the labels."""
    prompt_key: str = "prompt"
    """The column of what each text continues, if there is one; '' for none."""
    document_key: str = "document_id"
    """The column of the document that a prompt or text is of, if there is one; '' for none."""


def attribute(
    study: Annotated[tyro.conf.Positional[Path | None], _STUDY] = None,
    overrides: Overrides = (),
    /,
    how: Options = How(),
    outside: Annotated[Texts, tyro.conf.arg(name="")] = Texts(),
) -> None:
    """Trains classifiers to name the source of each text: of a study, beside the likelihood ceiling, or of a file.

    Example: natfp attribute --texts answers.csv --label-key model --save classifiers
    """
    if (study is None) == (outside.texts is None):
        got = "neither" if study is None else f"STUDY {study} and --texts {outside.texts}"
        raise UserError(f"got {got}, expected one: give a study, such as configs/quickstart.py, or --texts FILE")
    if study is not None:
        if outside != Texts():
            raise UserError("options of --texts were given with a STUDY: give --texts FILE in its place, or leave them out")
        _perform(study, overrides, how, "attribute")
        return
    if how != How():
        raise UserError("options of a STUDY were given with --texts: leave them out")
    _elsewhere(outside)


def _elsewhere(outside: Texts) -> None:
    settings = Attribution()
    for name, value in {name: getattr(outside, name) for name in ("classifiers", "encoder", "split_seed")}.items():
        settings = replace(settings, name, value)
    assert outside.texts is not None
    from natfp_jax.elsewhere import attribute as attributed
    from natfp_jax.labelled import Columns
    from natfp_jax.tables import outside as shown

    columns = Columns(outside.text_key, outside.label_key, outside.prompt_key, outside.document_key)
    with Progress() as progress:
        found = attributed(
            outside.texts,
            columns,
            settings,
            progress,
            tokenizer=outside.tokenizer,
            others=outside.others,
            folder=outside.save,
        )
    for note in found.notes:
        print(f"natfp: warning: {note}", file=sys.stderr, flush=True)
    console = _console()
    console.print(shown(outside.texts.name, found.rows))
    if outside.json is not None:
        write_json(outside.json, {"texts": str(outside.texts), "notes": found.notes, "results": found.rows})
    if outside.save is not None:
        console.print(f"classifiers: {outside.save}", highlight=False, soft_wrap=True)


def predict(
    classifier: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="CLASSIFIER", help="a folder below --save of natfp attribute --texts")
    ],
    texts: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEXTS", help="a .txt (a text a line), .jsonl, .csv or .parquet file")
    ],
    /,
    false_accusations: float = 0.01,
    text_key: str = "text",
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.parquet")] = None,
) -> None:
    """Names the source of each text, or abstains, or says that it is of none of the sources.

    Example: natfp predict classifiers/subwords texts.txt --false-accusations 0.05

    Args:
      false_accusations: at most this part of the texts of a source is given to another.
      text_key: the column of the texts.
      json: where the answers are written too.
      out: where the answers are written too, as a table.
    """
    from natfp_jax import predict as judging
    from natfp_jax.stored import load

    stored = load(classifier)
    answers = judging.predict(stored, judging.read_texts(texts, text_key), false_accusations)
    if out is not None:
        judging.write(out, answers)
    if json is not None:
        write_json(json, answers.json())
    console = _console()
    console.print(judging.table(answers))
    if warning := judging.warning(stored):
        print(f"natfp: warning: {warning}", file=sys.stderr, flush=True)


def report(study: StudyFile, overrides: Overrides = (), /, how: Options = How()) -> None:
    """Writes report/summary.json, report/report.md and its figures, and prints the table."""
    _perform(study, overrides, how)


def status(out: tyro.conf.Positional[Place] = _OUT, /) -> None:
    """Says which arms and stages of the studies in an output folder are done, running or missing."""
    from natfp_jax.status import status as tables

    check(out)
    console = _console()
    for one in tables(out):
        console.print(one)


def power(
    classes: Annotated[int | None, tyro.conf.arg(metavar="M")] = None,
    excess: Annotated[float | None, tyro.conf.arg(metavar="E")] = None,
    texts: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    power: Annotated[float, tyro.conf.arg(metavar="P")] = 0.8,
    alpha: float = 0.05,
    tests: Annotated[int | None, tyro.conf.arg(metavar="T")] = None,
    design_effect: Annotated[float | None, tyro.conf.arg(metavar="D")] = None,
    permutations: Annotated[int | None, tyro.conf.arg(metavar="B")] = None,
    test_fraction: Annotated[float | None, tyro.conf.arg(metavar="F")] = None,
    pilot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Says how many held-out texts detect an excess of accuracy over chance, and what so many texts can detect.

    With --excess: the texts that it takes; with --texts: the least excess that they detect; with both: how surely they do;
    with neither: a few excesses. With --pilot: the same of every result that a pilot study rests on.

    Example: natfp power --classes 2 --excess 0.02 --tests 32

    Args:
      classes: the sources to be told apart; 2, if left out.
      excess: accuracy less chance, as 0.02.
      texts: of the test part, of all classes together.
      power: the probability that is wanted of finding what is there.
      alpha: the error of the whole family of tests, each one-sided.
      tests: how many the family has, by Holm; left out: 1, or those of the pilot.
      design_effect: how many times the variance of the accuracy is that of as many independent texts; 1, if left out.
      permutations: attribution.permutations; left out: 9999.
      test_fraction: attribution.test_fraction; left out: 0.4.
      pilot: report/summary.json of a study, which says all of this but power and alpha, and tests where they are left out.
    """
    from natfp_jax import planning
    from natfp_jax.config import Attribution
    from natfp_jax.power import Plan

    console = _console()
    own = {
        "classes": classes,
        "excess": excess,
        "texts": texts,
        "design_effect": design_effect,
        "permutations": permutations,
        "test_fraction": test_fraction,
    }
    if pilot is not None:
        if given := [f"--{name}" for name, value in own.items() if value is not None]:
            raise UserError(f"--pilot has its own numbers: leave out {', '.join(given)}")
        console.print(planning.of_pilot(pilot, alpha, power, tests))
        return
    usual = Attribution()
    plan = Plan(
        classes=2 if classes is None else classes,
        alpha=alpha,
        tests=1 if tests is None else tests,
        permutations=usual.permutations if permutations is None else permutations,
        design_effect=1.0 if design_effect is None else design_effect,
    )
    fraction = usual.test_fraction if test_fraction is None else test_fraction
    if texts is not None:
        console.print(planning.measured(plan, texts, excess, power, fraction))
        return
    excesses = [some for some in planning.EXCESSES if some <= plan.most] if excess is None else [excess]
    console.print(planning.needed(plan, excesses, power, fraction))


def plan(
    study: StudyFile,
    overrides: Overrides = (),
    /,
    topology: Annotated[str | None, tyro.conf.arg(metavar="CHIP:SHAPE")] = None,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Says what a study costs on a slice, before it is rented: memory, operations, what is sent, and the least time.

    Compiles the training step and the sampler themselves, without a corpus and without the devices. For TPUs it needs the
    `tpu` extra; for GPUs it is an estimate. Ends with 1 if it does not fit.

    Example: natfp plan configs/quickstart.py --topology v5e:4x4 run.mesh.fsdp=4

    Args:
      topology: such as v5e:4x4, v5p:2x2x2, h200:8 or cpu:8; left out: the devices at hand.
      json: where the numbers are written too.
    """
    configured = load_study(study, overrides)
    from natfp_jax import chips, mesh, platforms, programs
    from natfp_jax import topology as topologies
    from natfp_jax.plan import plan as planned
    from natfp_jax.plan import remedy
    from natfp_jax.plan_tables import notes, refused, tables

    wanted = None if topology is None else chips.parse(topology)
    if wanted is not None:
        topologies.prepare(wanted)
    programs.keep()
    rented = topologies.rented(wanted)
    devices = mesh.make(configured.run.mesh, rented.devices)
    with Progress() as progress, platforms.planned(rented.chip.platform):
        found = planned(configured, rented.name, rented.chip, devices, progress.say, rented.stand_in)
        other = None if found.fits else remedy(configured, found, devices, progress.say)
    console = _console()
    for table in tables(found):
        console.print(table)
    for line in [*notes(found), *([] if found.fits else [refused(found, other)])]:
        console.print(f"- {line}", highlight=False)
    if json is not None:
        write_json(json, {**found.json(), "remedy": None if other is None else asdict(other)})
    if not found.fits:
        sys.exit(FALSE)


def audit(
    out: tyro.conf.Positional[Place] = _OUT,
    /,
    replay: Annotated[int, tyro.conf.arg(metavar="K")] = _REPLAYED,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    suite: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None,
) -> None:
    """Recomputes what the runs and studies in an output folder claim: proven, only recorded, or false.

    Init hashes from the seeds, the order of windows, the first steps of training where this machine is the one that trained,
    the descent of every checkpoint from step 0, and every file's own hash. Ends with 1 if a claim is false.

    With --suite: what published checkpoints claim of their descent, judged by their weights alone.

    Args:
      replay: how many first steps are trained again; as many as a run has prove all of it.
      json: where the claims are written too.
      suite: in place of an output folder: [[checkpoint]] tables, each with branch, path, init, order and step as claimed.
    """
    if suite is not None:
        if given := [name for name, value in ((str(out), out != _OUT), ("--replay", replay != _REPLAYED)) if value]:
            raise UserError(f"--suite has its own checkpoints, and nothing is trained again: leave out {' and '.join(given)}")
        _of_published(suite, json)
        return
    if replay < 0:
        raise UserError(f"--replay {replay}: give a number of steps, 0 or more")

    from natfp_jax import processes
    from natfp_jax.audit import audit as claims_of
    from natfp_jax.claims import table

    check(out)
    processes.start(None, Study(name="audit").run.heartbeat_seconds)
    with Progress() as progress:
        claims = claims_of(out, progress, replay)
    console = _console()
    console.print(table(claims))
    if json is not None:
        write_json(json, {"folder": str(out), "replay": replay, "claims": [asdict(claim) for claim in claims]})
    if any(claim.verdict == "false" for claim in claims):
        console.print("Remove what is false and run its study again: that is made anew from what is whole.", highlight=False)
        sys.exit(FALSE)


def _of_published(suite: Path, json: Path | None) -> None:
    from natfp_jax import suite_audit
    from natfp_jax.claims import table

    with Progress() as progress:
        audited = suite_audit.audit(suite, progress)
    console = _console()
    console.print(table(audited.claims))
    console.print(suite_audit.BEYOND_WEIGHTS, highlight=False)
    if json is not None:
        claims = [asdict(claim) for claim in audited.claims]
        write_json(json, {"suite": str(suite), "claims": claims, "checkpoints": audited.measured})
    if any(claim.verdict == "false" for claim in audited.claims):
        sys.exit(FALSE)


Checkpoint = Annotated[
    tyro.conf.Positional[Place],
    tyro.conf.arg(metavar="CHECKPOINT", help="OUT/runs/RUN/checkpoints/STEP, or OUT/runs/RUN for its last"),
]
TokenizerFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


def _trained(checkpoint: Path, tokenizer: Path | None) -> tuple[Any, Any]:
    """The model, and the mesh of one device that it lies on."""
    import jax

    from natfp_jax import config, mesh, programs
    from natfp_jax.trained import trained

    check(checkpoint)
    programs.keep()
    devices = mesh.make(config.Mesh(), jax.devices()[:1])
    try:
        return trained(checkpoint, devices, tokenizer), devices
    except Damaged as damage:
        raise UserError(f"{damage}: run its study again, which makes it anew, or give another checkpoint") from None


def generate(
    checkpoint: Checkpoint,
    /,
    prompt: str = "",
    texts: int = 1,
    new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    greedy: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
    tokenizer: TokenizerFile = None,
) -> None:
    """Continues a prompt, or answers it after a training on conversations, to look at what a checkpoint has learnt.

    Example: natfp generate out/runs/0123456789abcdef --prompt "Return the" --texts 3 --temperature 0.8

    Args:
      prompt: what the texts begin with, or what is asked; left out: they begin as a document does.
      texts: how many.
      new_tokens: at most, of each.
      repetition_penalty: above 1, ids that prompt or text have already become less likely.
      greedy: the most likely id, always.
      seed: of the noise; each text has its own.
      tokenizer: a tokenizer.json; left out: the one below OUT that the model was trained with.
    """
    from natfp_jax.config import Sampling, replace

    given = {
        "new_tokens": new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "greedy": greedy,
        "seed": seed,
    }
    sampling = Sampling()
    for name, value in given.items():
        sampling = replace(sampling, name, value)
    if texts < 1:
        raise UserError(f"--texts {texts}: give a number of texts, 1 or more")
    from natfp_jax.generate import continuations

    model, devices = _trained(checkpoint, tokenizer)
    console = _console()
    for number, text in enumerate(continuations(model, prompt, texts, sampling, devices)):
        if number:
            console.rule()
        between = "" if model.chat is None else "\n"  # a text goes on, an answer begins
        print(f"{prompt}{between}{text}", file=console.file)  # as it is: the console would take some of it for its own


def export(
    checkpoint: Checkpoint,
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    /,
    tokenizer: TokenizerFile = None,
) -> None:
    """Writes a checkpoint as a Llama-shaped folder that Hugging Face transformers, vLLM and others load.

    Args:
      folder: a new one.
      tokenizer: a tokenizer.json; left out: the one below OUT that the model was trained with.
    """
    from natfp_jax.hf_export import export as write

    model, _ = _trained(checkpoint, tokenizer)
    try:
        write(model.params, model.model, model.tokenizer, model.context, folder, model.end_id)
    except OSError as error:
        if (said := _unwritable(error)) is None:
            raise
        raise UserError(f"{said}: make room or give another folder") from None
    _console().print(f"exported: {folder}", highlight=False, soft_wrap=True)


def _overrides_last(args: list[str]) -> list[str]:
    """Lets `PATH=VALUE` stand before and after options: the parser wants all positional arguments in one place."""

    def given(place: int) -> bool:
        return "=" in args[place] and not args[place].startswith("-") and args[place - 1] not in _OF_A_PATH

    if not args or args[0] not in _OF_A_STUDY:  # elsewhere a value may well have the sign in it
        return args
    places = range(len(args))
    return [*(args[place] for place in places if not given(place)), *(args[place] for place in places if given(place))]


def _unwritable(error: BaseException) -> str | None:
    """What the system says of a disk that is full or not to be written to; libraries put that into errors of their own."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) or "disk is full" in str(error) else None


def _told(error: BaseException, quiet: bool = False) -> int:
    """Says what ended the command, in one line where it is no defect of the program; its exit code."""
    if isinstance(error, UserError | Stopped):
        line = str(error)
    elif (said := _unwritable(error)) is not None:
        line = f"{said}: make room or give another --out, then run the same command again"
    else:
        traceback.print_exception(error)
        return 1
    if not quiet:
        print(f"natfp: {line}", file=sys.stderr, flush=True)
    return STOPPED if isinstance(error, Stopped) else 2


def main() -> None:
    """The console script."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    every = (run, train, sample, attribute, predict, report, status, power, plan, audit, generate, export)
    verbs = {verb.__name__: verb for verb in every}
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs,
            prog="natfp",
            args=_overrides_last(sys.argv[1:]),
            description="natfp: what makes a language model recognisable by its text when nothing but X changed?",
            use_underscores=True,
        )
    except (UserError, Stopped) as error:
        sys.exit(_told(error))
    except KeyboardInterrupt:  # in a verb that has nothing to save
        print("natfp: stopped; the same command begins anew", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except Exception as error:
        if _unwritable(error) is None:
            raise
        sys.exit(_told(error))
