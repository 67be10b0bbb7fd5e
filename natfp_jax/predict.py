"""What a stored classifier says of texts.

Owns the reading of texts to be judged, the form of the answer, and its table. Must not know how a classifier was made.

Letters after an underscore name the axes: N texts, K classes.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax.calibration import ABSTAINS, NONE
from natfp_jax.errors import UserError
from natfp_jax.files import whole_file
from natfp_jax.records import lines, rows, text_of
from natfp_jax.stored import Stored

__all__ = ["Answers", "predict", "read_texts", "table", "warning", "write"]

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
SHOWN = 20  # texts in the terminal
_WIDE = 40  # characters of them
_SAID = {ABSTAINS: "abstains", NONE: "none of these"}


@dataclass(frozen=True, eq=False)
class Answers:
    """The verdict on each text, at a rate of false accusations."""

    classes: tuple[str, ...]
    rate: float
    texts: list[str]
    probabilities_NK: NDArray[np.float64]  # calibrated
    verdict_N: NDArray[np.int64]  # the number of a class, ABSTAINS or NONE

    @property
    def verdicts(self) -> list[str | None]:
        """The class of each text that is given to one."""
        return [self.classes[code] if code >= 0 else None for code in self.verdict_N.tolist()]

    @property
    def said(self) -> list[str]:
        """ "accused", "abstains" or "none of these"."""
        return [_SAID.get(code, "accused") for code in self.verdict_N.tolist()]

    def json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        each = zip(self.texts, self.said, self.verdicts, self.probabilities_NK.tolist(), strict=True)
        return {
            "false_accusations": self.rate,
            "classes": list(self.classes),
            "texts": [
                {"text": text, "verdict": said, "class": name, "probabilities": probabilities}
                for text, said, name, probabilities in each
            ],
        }


def read_texts(path: Path, key: str) -> list[str]:
    """The texts of a file: of a .txt each line that is not empty, else the column `key`.

    Raises:
      UserError: it is no such file, or has no texts.
    """
    if not path.is_file() or path.suffix not in SUFFIXES:
        got = "is no file" if not path.is_file() else f"ends in none of {', '.join(SUFFIXES)}"
        raise UserError(f"{path} {got}: give a file of texts")
    if path.suffix == ".txt":
        texts = [line.rstrip("\r\n") for line in lines(path) if line.strip()]
    else:
        texts = [text_of(record, key, where, "--text-key") for where, record in rows(path, {key: "--text-key"})]
    if not texts:
        raise UserError(f"{path} has no texts: put some there")
    return texts


def predict(stored: Stored, texts: list[str], rate: float) -> Answers:
    """Judges texts; what a verdict promises stands at `calibration.Calibration.verdicts`.

    Raises:
      UserError: there is no such rate, or the classifier was calibrated with too few texts for it.
    """
    probability_NK = stored.predict_proba(texts)
    return Answers(stored.classes, rate, texts, probability_NK, stored.calibration.verdicts(probability_NK, rate))


def warning(stored: Stored) -> str | None:
    """What the promise does not cover, where no source was set aside to stand for unknown ones."""
    if not stored.calibration.strangers:
        return (
            "unknown sources were not calibrated for: a text of one may be given to a class, and none is said to be of none; "
            "make the classifier from texts of three labels or more, or with --others LABEL"
        )
    if set(stored.calibration.strangers) == set(stored.classes):
        return (
            f"each of the {len(stored.classes)} sources in turn stood for an unknown one: texts of a source that is unlike "
            "them may be accused more often; make the classifier with --others LABEL for texts of such"
        )
    return None


def write(path: Path, answers: Answers) -> None:
    """Writes a Parquet file with a row a text, in their order; `class` is null where a text is given to none.

    Raises:
      UserError: the file's name ends otherwise.
    """
    if path.suffix != ".parquet":
        raise UserError(f"--out {path} does not end in .parquet: rename it")
    named = pa.table({"text": answers.texts, "verdict": answers.said, "class": pa.array(answers.verdicts, pa.string())})
    kinds = pa.map_(pa.string(), pa.float64())
    each = [list(zip(answers.classes, row, strict=True)) for row in answers.probabilities_NK.tolist()]
    with whole_file(path) as file:
        pq.write_table(named.append_column("probabilities", pa.array(each, kinds)), file)


def table(answers: Answers) -> Table:
    """The first texts with their probabilities and verdicts, and how many got which."""
    counts = Counter(name or said for name, said in zip(answers.verdicts, answers.said, strict=True))
    order = [*answers.classes, *_SAID.values()]
    told = ", ".join(f"{name} {counts[name]}" for name in order if counts[name])
    more = f" The first {SHOWN} of {len(answers.texts)} are shown." if len(answers.texts) > SHOWN else ""
    shown = Table(
        title=Text(f"{len(answers.texts)} texts: {told}"),
        caption=Text(f"At most {100 * answers.rate:g} % of the texts of a source are given to another.{more}"),
        box=box.SIMPLE,
        padding=0,
    )
    for column in ("text", "most probable", "probability", "verdict"):
        shown.add_column(column, justify="right" if column == "probability" else "left")
    some = zip(answers.texts, answers.probabilities_NK, answers.verdicts, answers.said, strict=True)
    for text, probability_K, name, said in itertools.islice(some, SHOWN):
        line = " ".join(text.split())
        cut = line if len(line) <= _WIDE else f"{line[: _WIDE - 1]}…"
        best = int(probability_K.argmax())
        verdict = Text(name or said, style="bold" if name else "")
        shown.add_row(Text(cut), Text(answers.classes[best]), f"{probability_K[best]:.3f}", verdict)
    return shown
