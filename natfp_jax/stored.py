"""Classifiers in folders: JSON and plain arrays, never pickled.

Owns the form of such a folder, and what is refused of one that is damaged or was made by someone else. Must not know how a
classifier is fitted or what is asked of it.

    DIR/classifier.json    the kind, its settings, the classes, what it was made from; sealed, with the sha256 of the others
    DIR/arrays.npz         weights and calibration
    DIR/tokenizer.json     where the kind reads subwords

Letters after an underscore name the axes: N texts, K classes, V pieces or columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_selection import SelectKBest, chi2
from sklearn.pipeline import Pipeline

from natfp_jax import classify, files
from natfp_jax.calibration import Calibration, rescaled
from natfp_jax.errors import Damaged, UserError
from natfp_jax.tokenizer import Tokenizer

__all__ = ["Stored", "load", "save"]

VERSION = 1
_RECORD, _ARRAYS, _TOKENIZER = "classifier.json", "arrays.npz", "tokenizer.json"
_COUNTED = ("subwords", "words", "ngrams")
_NEURAL = ("lm", "transformer")
_REMEDY = "give another, or make it anew with `natfp attribute --texts FILE --save DIR`"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Stored:
    """A classifier as it is used.

    Attributes:
      kind: which rung of the ladder.
      classes: the sources; column k of all probabilities is the k-th of them.
      classifier: fitted, from texts to numbers of classes.
      tokenizer: None where the kind reads words.
      scale: of its log-odds, which puts its probabilities right.
      calibration: for verdicts at a chosen rate of false accusations.
      record: what it was made from, and what it reached; JSON values.
    """

    kind: str
    classes: tuple[str, ...]
    classifier: Any
    tokenizer: Tokenizer | None
    scale: float
    calibration: Calibration
    record: dict[str, Any]

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The calibrated probability of each class: [N, K]."""
        if not len(texts):
            return np.empty((0, len(self.classes)))
        return rescaled(self.classifier.predict_proba(texts), self.scale)


def save(folder: Path, stored: Stored) -> None:
    """Writes a classifier into a new folder; its record comes last, so that it is there or not.

    Raises:
      UserError: the folder has a classifier.
    """
    if (folder / _RECORD).exists():
        raise UserError(f"{folder} has a classifier: give another folder, or remove it")
    settings, arrays = _neural_state(stored.classifier) if stored.kind in _NEURAL else _counted_state(stored.classifier)
    for k, held in enumerate(stored.calibration.own):
        arrays[f"own/{k}"] = held
    strangers = sorted(stored.calibration.strangers)
    for number, name in enumerate(strangers):
        arrays[f"strangers/{number}"] = stored.calibration.strangers[name]
    names = [_ARRAYS]
    with files.whole_file(folder / _ARRAYS) as file:
        np.savez(file, allow_pickle=False, **arrays)
    if stored.kind != "words" and stored.tokenizer is not None:
        stored.tokenizer.save(folder / _TOKENIZER)
        names.append(_TOKENIZER)
    record = {
        **{"version": VERSION, "kind": stored.kind, "classes": list(stored.classes), "settings": settings},
        **{"scale": stored.scale, "strangers": strangers, "record": stored.record, "files": files.manifest(folder, names)},
    }
    files.write_json(folder / _RECORD, record)


def load(folder: Path) -> Stored:
    """Reads what `save` has written; its probabilities are bitwise the same on the same machine.

    Raises:
      UserError: it is no such folder, it is damaged, or its parts do not fit together.
    """
    if not (folder / _RECORD).is_file():
        raise UserError(f"{folder} has no {_RECORD}: {_REMEDY}")
    try:
        record = files.read_remade(folder / _RECORD)
        if record.get("version") != VERSION:
            raise ValueError(f"version {record.get('version')!r}, expected {VERSION}")
        listed = record["files"]
        if not set(listed) <= {_ARRAYS, _TOKENIZER} or _ARRAYS not in listed:
            raise ValueError(f"files {sorted(listed)}")
        files.verify(folder, listed)
        with np.load(folder / _ARRAYS, allow_pickle=False) as read:
            arrays = {name: read[name] for name in read.files}
        return _built(record, arrays, Tokenizer.load(folder / _TOKENIZER) if _TOKENIZER in listed else None)
    except Damaged as damage:
        raise UserError(f"{damage}: {_REMEDY}") from None
    except UserError:
        raise
    except Exception as error:  # whatever a foreign file makes of NumPy, zipfile and constructors
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise UserError(f"{folder} is no classifier of this program ({said}): {_REMEDY}") from None


def _built(record: Mapping[str, Any], arrays: Arrays, tokenizer: Tokenizer | None) -> Stored:
    kind, classes, scale, strangers = record["kind"], record["classes"], record["scale"], record["strangers"]
    if (
        not all(isinstance(name, str) for name in [*classes, *strangers])
        or len(set(classes)) != len(classes)
        or len(classes) < 2
    ):
        raise ValueError(f"classes {classes}, strangers {strangers}")
    if not isinstance(scale, float) or not 0 < scale < np.inf:
        raise ValueError(f"scale {scale!r}")
    if kind not in (*_COUNTED, *_NEURAL) or (kind != "words") != (tokenizer is not None):
        raise ValueError(f"kind {kind!r} with{'out' if tokenizer is None else ''} {_TOKENIZER}")
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(f"{name} has {array.dtype} or numbers that are not finite")
    own = [_take(arrays, f"own/{k}", "f", (None,)) for k in range(len(classes))]
    held = {name: _take(arrays, f"strangers/{number}", "f", (None,)) for number, name in enumerate(strangers)}
    made: Callable[..., Any] = _neural if kind in _NEURAL else _counted
    classifier = made(kind, record["settings"], arrays, tokenizer, len(classes))
    return Stored(kind, tuple(classes), classifier, tokenizer, scale, Calibration(own, held), record["record"])


def _take(arrays: Arrays, name: str, kinds: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """An array of some shape; None: any length above zero."""
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        got == length or (length is None and got) for got, length in zip(array.shape, shape, strict=True)
    )
    if array.dtype.kind not in kinds or not fits:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {kinds} {list(shape)}")
    return array


# --- counts under a logistic regression -------------------------------------------------------------------------------


def _counted_state(fitted: Pipeline) -> tuple[dict[str, Any], Arrays]:
    linear = fitted["linear"]
    arrays: Arrays = {"coef": linear.coef_, "intercept": linear.intercept_}
    if "select" in fitted.named_steps:
        arrays["columns"] = fitted["select"].get_support(indices=True)
    elif isinstance(fitted["counts"], classify.Subwords):
        arrays["ids"] = fitted["counts"].vocabulary_
    else:  # words have no white space; one text, and not a text array as wide as the longest
        arrays["words"] = np.frombuffer("\n".join(fitted["counts"].vocabulary).encode(), np.uint8)
    return {"C": float(linear.C)}, arrays


def _counted(kind: Any, settings: dict[str, Any], arrays: Arrays, tokenizer: Any, classes: int) -> Pipeline:
    steps: list[tuple[str, Any]] = []
    if kind == "words":
        pieces: Any = _take(arrays, "words", "u", (None,)).astype(np.uint8).tobytes().decode().split("\n")
        count, rising = len(pieces), len(set(pieces)) == len(pieces)
        counter = classify.counting(kind, tokenizer, pieces)
    else:
        pieces = _take(arrays, "columns" if kind == "ngrams" else "ids", "iu", (None,)).astype(np.int64)
        count, rising = len(pieces), pieces[0] >= 0 and bool((np.diff(pieces) > 0).all())
        counter = classify.counting(kind, tokenizer, pieces)
        limit = classify.COLUMNS if kind == "ngrams" else tokenizer.size
        rising = rising and pieces[-1] < limit
    if not rising:
        raise ValueError(f"{kind} occur twice, are in no order or out of range")
    if kind == "ngrams":
        select = SelectKBest(chi2, k=count)
        select.scores_, select.n_features_in_ = (
            np.bincount(pieces, minlength=classify.COLUMNS).astype(np.float64),
            classify.COLUMNS,
        )
        steps.append(("select", select))
    linear = classify.linear(float(settings["C"]))
    rows = 1 if classes == 2 else classes
    linear.coef_ = _take(arrays, "coef", "f", (rows, count))
    linear.intercept_ = _take(arrays, "intercept", "f", (rows,))
    linear.classes_, linear.n_features_in_ = np.arange(classes), count
    return Pipeline([("counts", counter), *steps, ("linear", linear)])


# --- networks ---------------------------------------------------------------------------------------------------------


def _network(kind: str) -> Any:
    """The class of an estimator; only here JAX is needed."""
    if kind == "lm":
        from natfp_jax.language_models import LanguageModels

        return LanguageModels
    from natfp_jax.reader import Reader

    return Reader


def _neural_state(fitted: Any) -> tuple[dict[str, Any], Arrays]:
    settings = {name: value for name, value in fitted.get_params(deep=False).items() if name != "tokenizer"}
    return settings, {f"state/{name}": array for name, array in fitted.state().items()}


def _neural(kind: str, settings: dict[str, Any], arrays: Arrays, tokenizer: Tokenizer, classes: int) -> Any:
    own = {name.removeprefix("state/"): array for name, array in arrays.items() if name.startswith("state/")}
    if own["classes"].tolist() != list(range(classes)) or int(own["tokens"]) < 1:
        raise ValueError(f"its state is of the classes {own['classes'].tolist()}")
    if any(value < (name != "seed") for name, value in settings.items() if isinstance(value, int)):
        raise ValueError(f"settings {settings}")
    return _network(kind).from_state(own, tokenizer=tokenizer, **settings)
