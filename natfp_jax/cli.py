"""The `natfp` verbs.

Owns the command line and exit codes: 0, or 2 with one line for a user's mistake. Thin: heavy imports happen inside the
verbs, and nothing is computed here.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from natfp_jax.config import Study, load_study, override
from natfp_jax.errors import UserError
from natfp_jax.progress import Progress

__all__ = ["main"]

StudyFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY", help="a study, such as configs/quickstart.py")]
Overrides = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(
        metavar="PATH=VALUE",
        help="set any field of the study by its path, such as experiment.model.width=256 or sampling.checkpoints=[0.1,1]",
    ),
]
Out = Annotated[Path, tyro.conf.arg(metavar="DIR", help="where everything is written and found again")]
_OUT = Path("out")
_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),  # no folder of one's own
}
_STOPPED = "natfp: stopped; the same command goes on from here"


def _perform(study: Path, overrides: tuple[str, ...], out: Path, *stages: str) -> None:
    configured: Study = load_study(study)
    for assignment in overrides:
        configured = override(configured, assignment)

    from natfp_jax.findings import table, verdicts
    from natfp_jax.report import report
    from natfp_jax.stages import Work

    with Progress() as progress:
        work = Work(configured, out, progress)
        with work.claimed():
            work.corpus()
            for stage in stages:
                getattr(work, stage)()
            summary = report(work) if "attribute" in stages or not stages else None
    if summary is not None:
        console = _console()
        console.print(table(summary))
        for line in verdicts(summary):
            console.print(f"- {line}", highlight=False)
        console.print(f"report: {work.folder / 'report' / 'report.md'}", highlight=False, soft_wrap=True)


def _console() -> Console:
    """Standard output; 100 columns, which the tables need, where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def run(study: StudyFile, overrides: Overrides = (), /, out: Out = _OUT) -> None:
    """Does every stage of a study that is not done yet, and prints its table.

    The stages are corpus, train, sample, attribute and report. A study that was stopped at any moment goes on with the same
    command; one that is complete prints its table within seconds.

    Example: natfp run configs/quickstart.py --out out name=wider experiment.model.width=256
    """
    _perform(study, overrides, out, "train", "sample", "attribute")


def train(study: StudyFile, overrides: Overrides = (), /, out: Out = _OUT) -> None:
    """Prepares the corpus and trains the arms that lack a checkpoint."""
    _perform(study, overrides, out, "train")


def sample(study: StudyFile, overrides: Overrides = (), /, out: Out = _OUT) -> None:
    """Draws the texts that are missing from the trained arms."""
    _perform(study, overrides, out, "sample")


def attribute(study: StudyFile, overrides: Overrides = (), /, out: Out = _OUT) -> None:
    """Trains classifiers to name the source of each text, beside the likelihood ceiling."""
    _perform(study, overrides, out, "attribute")


def report(study: StudyFile, overrides: Overrides = (), /, out: Out = _OUT) -> None:
    """Writes report/summary.json, report/report.md and its figures, and prints the table."""
    _perform(study, overrides, out)


def status(out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")] = _OUT, /) -> None:
    """Says which arms and stages of the studies in an output folder are done, running or missing."""
    from natfp_jax.status import status as tables

    console = _console()
    for one in tables(out):
        console.print(one)


def _overrides_last(args: list[str]) -> list[str]:
    """Lets `PATH=VALUE` stand before and after options: the parser wants all positional arguments in one place."""

    def given(place: int) -> bool:
        return "=" in args[place] and not args[place].startswith("-") and args[place - 1] != "--out"

    places = range(len(args))
    return [*(args[place] for place in places if not given(place)), *(args[place] for place in places if given(place))]


@contextlib.contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Ends the process at Ctrl-C, at once: every file is whole or absent at any moment.

    The usual exception is lost where it is raised inside a callback of JAX, and becomes a traceback in threads of Orbax.
    """

    def end(*_: object) -> None:
        cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a bar of progress hides it
        os.write(2, f"{cursor}{_STOPPED}\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else the caller has its own way with it
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _unwritable(error: Exception) -> str | None:
    """What the system says of a disk that is full or not to be written to; libraries put that into errors of their own."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) or "disk is full" in str(error) else None


def main() -> None:
    """The console script."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    verbs = {verb.__name__: verb for verb in (run, train, sample, attribute, report, status)}
    try:
        with _ended_by_interrupt():
            tyro.extras.subcommand_cli_from_dict(
                verbs,
                prog="natfp",
                args=_overrides_last(sys.argv[1:]),
                description="natfp: what makes a language model recognisable by its text when nothing but X changed?",
                use_underscores=True,
            )
    except UserError as error:
        print(f"natfp: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (said := _unwritable(error)) is None:
            raise
        print(f"natfp: {said}: make room or give another --out, then run the same command again", file=sys.stderr)
        sys.exit(2)
