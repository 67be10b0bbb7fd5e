"""Texts from elsewhere: which of several sources wrote them, without a study or its models.

Owns the way from a file of labelled texts to results and to classifiers that can be stored. Must not know how texts are
matched, how a classifier works, or how results look.

Letters after an underscore name the axes: N texts, K classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natfp_jax import attribution, config, ladder, stats
from natfp_jax.calibration import Calibration, best_scale, log_odds, logs, rescaled
from natfp_jax.errors import UserError
from natfp_jax.labelled import Columns, Labelled, matched, read
from natfp_jax.ladder import Rung, Task
from natfp_jax.progress import Progress
from natfp_jax.stored import Stored, save
from natfp_jax.tokenizer import Tokenizer

__all__ = ["Found", "attribute", "calibrated"]

INNER = 0.2  # of the training documents, on which settings are chosen where the validation part is for the scale

_Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What is said of the texts of a file.

    Attributes:
      rows: of each classifier its result as JSON values, with `p_holm` over all of them.
      notes: what a reader must know of the texts.
    """

    rows: list[_Row]
    notes: list[str]


def attribute(
    path: Path,
    columns: Columns,
    settings: config.Attribution,
    progress: Progress,
    *,
    tokenizer: Path | None = None,
    others: str | None = None,
    folder: Path | None = None,
) -> Found:
    """Trains classifiers to name the labels of texts and judges them on held-out ones, as `attribution.attribute` does.

    Args:
      path: a file of texts and labels.
      tokenizer: a tokenizer.json; None: one is trained on the texts to learn from.
      others: a label whose texts are no class: they show a stored classifier what unknown sources look like.
      folder: where each classifier is stored, in a folder of its kind, just as it was judged. Its thresholds come from the test
        texts: no number of the result depends on them, and the weights have not seen these texts.

    Raises:
      UserError: the file or its texts cannot be used, or the folder has such a classifier.
    """
    if folder is not None and "encoder" in settings.classifiers:
        raise UserError(f"--save {folder}: an encoder is not stored; leave out --save or the classifier encoder")
    given = read(path, columns)
    apart = [n for n, label in enumerate(given.labels) if label == others]
    if others is not None and not apart:
        raise UserError(f"--others {others}: no text has this label, they have {', '.join(sorted(set(given.labels)))}")
    for kind in settings.classifiers:
        if folder is not None and (folder / kind).exists():
            raise UserError(f"--save {folder}: {folder / kind} is there already; give another folder, or remove it")
    known = given.part([n for n, label in enumerate(given.labels) if label != others])
    side = matched(known)
    texts = [known.texts[n] for n in side.index]
    comparison = attribution.Comparison(
        name="texts",
        rows=np.arange(len(texts)),
        labels=[known.labels[n] for n in side.index],
        prompts=side.prompts,
        documents=side.documents,
        whole=side.whole,
    )
    parts_N = _parts(comparison, settings)
    if tokenizer is not None:
        encoding = Tokenizer.load(tokenizer)
    else:  # sorted, so that equally frequent pairs merge in one order
        learnt = sorted(texts[n] for n in np.flatnonzero(parts_N == "training"))
        encoding = Tokenizer.train(iter(learnt), config.Corpus().vocabulary)
    strange = dict[str, list[str]]()
    if folder is not None and others is not None:
        fitted = known.part([side.index[n] for n in np.flatnonzero(parts_N != "test")])
        strange = {others: _unlike(given.part(apart), fitted)}
        if not strange[others]:
            raise UserError(f"--others {others}: all its texts are of prompts or documents to learn from: give some of others")
    record = {
        "texts": {"file": path.name, "sha256": known.sha256, "others": others},
        "columns": asdict(columns),
        "settings": config.to_json(settings),
    }
    found = list[_Row]()
    with progress.task("attribute", len(settings.classifiers), "classifiers") as advance:
        for kind in settings.classifiers:
            rung = ladder.prepare(kind, texts, encoding)
            verdict = attribution.attribute(rung, comparison, settings)
            found.append(asdict(verdict.result))
            if folder is not None:
                calibration = calibrated(rung, verdict.classifier, comparison, texts, settings, strange)
                made = {**record, "result": found[-1]}
                save(folder / kind, Stored(kind, comparison.classes, verdict.classifier, encoding, *calibration, made))
            advance(1)
    for row, p_holm in zip(found, stats.holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = float(p_holm)
    return Found(found, side.notes)


def _parts(comparison: attribution.Comparison, settings: config.Attribution) -> NDArray[np.str_]:
    try:
        return comparison.parts(settings)
    except UserError:
        count = len(set(comparison.documents))
        raise UserError(
            f"{len(comparison.labels)} texts to compare are of {count} documents that share nothing, too few to train on some "
            "and test on others: give more texts"
        ) from None


# --- what is stored ---------------------------------------------------------------------------------------------------


def calibrated(
    rung: Rung,
    classifier: Any,
    comparison: attribution.Comparison,
    texts: Sequence[str],
    settings: config.Attribution,
    others: Mapping[str, Sequence[str]],
) -> tuple[float, Calibration]:
    """The scale that puts a judged classifier's probabilities right, and what it says of texts that it was not fitted on.

    Without texts of others, and with three classes or more, each class in turn is a stranger to a classifier of the rest.

    Args:
      rung, comparison, settings: as it was judged with.
      classifier: that of the verdict.
      texts: those of the comparison.
      others: of each source that is no class some texts, no two of one document.

    Raises:
      UserError: there are too few texts.
    """
    task = attribution.task(comparison, settings)
    single_N = _singled(comparison, texts, task.test_N)
    scale = _scale(rung, classifier, task, comparison.documents, settings)

    def said(some: Sequence[str]) -> NDArray[np.float64]:
        return rescaled(classifier.predict_proba(some), scale)

    classes = range(len(comparison.classes))
    held = {k: [texts[int(n)] for n in np.flatnonzero(single_N & (task.labels_N == k))] for k in classes}
    found = Calibration([log_odds(said(held[k]))[:, k] for k in classes], {})
    strangers = {name: found.accusable(said(some)) for name, some in others.items()}
    if not others and len(classes) > 2:
        for k, name in enumerate(comparison.classes):
            strangers[name] = _left_out(rung, task, k, single_N, settings)
    return scale, replace(found, strangers=strangers)


def _left_out(rung: Rung, task: Task, k: int, single_N: NDArray[np.bool_], settings: config.Attribution) -> NDArray[np.float64]:
    """How typical held-out texts of class k look to a classifier of the others.

    It is measured by what the same classifier says of its own texts, so that it compares whatever the number of classes.
    """
    rest_N = task.labels_N != k
    without = replace(
        task,
        labels_N=np.where(task.labels_N > k, task.labels_N - 1, task.labels_N),
        training_N=task.training_N & rest_N,
        validation_N=task.validation_N & rest_N,
        test_N=single_N,
    )
    probability_NK, own_N = rung.judge(without, settings).probabilities_NK, rest_N[single_N]
    known_NK, label_N = log_odds(probability_NK[own_N]), without.labels_N[single_N][own_N]
    calibration = Calibration([known_NK[label_N == one, one] for one in range(known_NK.shape[1])], {})
    return calibration.accusable(probability_NK[~own_N])


def _scale(rung: Rung, classifier: Any, task: Task, documents: Sequence[str], settings: config.Attribution) -> float:
    """What puts the probabilities right, by validation texts that a classifier has not been fitted on.

    The judged classifier may have been fitted on them. So the rung is fitted once more, on training texts alone, its settings
    chosen among these.
    """
    if hasattr(classifier, "scale_"):  # it has a scale of its own, by the validation texts, and was not fitted on them
        return 1.0
    inner_N = stats.split(documents, settings.split_seed + 1, validation=INNER, test=0.0)
    training_N, validation_N = (task.training_N & (inner_N == part) for part in ("training", "validation"))
    if not training_N.any() or not validation_N.any():
        raise UserError("there are too few texts to calibrate a classifier: give more, or leave --save out")
    inner = replace(task, training_N=training_N, validation_N=validation_N, test_N=task.validation_N)
    probability_NK = rung.judge(inner, settings).probabilities_NK
    count, classes = probability_NK.shape
    # As if each class had come up once more at every text: Platt's targets (1999), for any number of classes.
    return best_scale(logs(probability_NK), task.labels_N[task.validation_N], doubt=classes / (count + classes))


def _singled(comparison: attribution.Comparison, texts: Sequence[str], test_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """One test text of each class and document, by a hash: texts of one document are alike, and count as one."""
    best: dict[tuple[str, str], tuple[str, int]] = {}
    for n in map(int, np.flatnonzero(test_N)):
        place = comparison.documents[n], comparison.labels[n]
        best[place] = min(best.get(place, ("~", n)), (_hash(texts[n]), n))
    single_N = np.zeros(len(texts), np.bool_)
    single_N[[n for _, n in best.values()]] = True
    return single_N


def _unlike(strange: Labelled, fitted: Labelled) -> list[str]:
    """Of texts that share neither prompt, document nor wording with those to fit on one of each document, by a hash."""

    def keys(some: Labelled) -> list[tuple[str | None, ...]]:
        columns = [some.prompts, some.documents, [text.strip() or None for text in some.texts]]
        return list(zip(*(column for column in columns if column is not None), strict=True))

    met = [set(column) - {None} for column in zip(*keys(fitted), strict=True)]
    best: dict[str | None, tuple[str, str]] = {}
    for text, own in zip(strange.texts, keys(strange), strict=True):
        if not any(key in some for key, some in zip(own, met, strict=True)):
            document = own[-2] if len(own) > 1 else own[-1]  # the document, or the prompt where there are none, or the text
            best[document] = min(best.get(document, ("~", "")), (_hash(text), text))
    return [text for _, text in best.values()]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
