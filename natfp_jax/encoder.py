"""A classifier that reads texts with a pretrained encoder of Hugging Face's, from a folder on this machine.

Owns how such a folder becomes a classifier: what must be in it, how its weights are trained further, and that nothing of it is
run or unpickled. Must not know models of a study, draws or prompts. The only module that needs PyTorch and transformers, which
are imported when a classifier is fitted.

The rows are put in the order of their texts before anything is drawn, and a row has a fixed number of ids: on the processors of
one machine a fit has the same bits whatever the order in which texts are given.

Letters after an underscore name the axes: N texts, K classes, T ids of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from natfp_jax import rng
from natfp_jax.calibration import best_scale, log_loss
from natfp_jax.errors import UserError
from natfp_jax.files import manifest
from natfp_jax.reading import early_stopped, parted

__all__ = ["Encoder", "check", "identity"]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in one file, or in several
_WARMUP, _WEIGHT_DECAY = 0.1, 0.01  # as these encoders are usually trained further
_CHECKS = 4  # times an epoch that the validation part is asked


def check(folder: str | Path) -> None:
    """Whether a classifier can be made of this folder, as far as that is seen without reading the weights.

    Raises:
      UserError: PyTorch or transformers are not installed, or the folder lacks a file.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"an encoder needs PyTorch and transformers ({error}): pip install 'natfp-jax[hf]'") from None
    path = Path(folder)
    lacking = [
        what
        for what, names in (
            ("config.json", ["config.json"]),
            (_WEIGHTS[0], _WEIGHTS),
            ("a tokenizer", ["tokenizer.json", "tokenizer_config.json"]),
        )
        if not any((path / name).is_file() for name in names)
    ]
    if lacking:
        raise UserError(
            f"{path} has no {' and no '.join(lacking)}: give a local folder of an encoder in Hugging Face's layout "
            "with safetensors weights (nothing is downloaded)"
        )


def identity(folder: Path) -> dict[str, str]:
    """File → sha256 of all that an encoder's folder has at its top.

    Raises:
      UserError: as `check`.
    """
    check(folder)
    listed = manifest(folder, [path.name for path in folder.iterdir() if path.is_file()])
    return {name: entry["sha256"] for name, entry in listed.items()}


class Encoder(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A pretrained encoder with a new head, trained further as Suzuki, Ri and Takase (arXiv 2504.14871) did with DeBERTaV3.

    AdamW, a rate that rises over the first tenth of the steps and then falls to zero, the validation texts asked four times
    an epoch: the weights with the least loss are kept, and their scores are scaled (`calibration.best_scale`).

    Attributes:
      classes_: the labels, sorted.
      losses_: of the validation texts, each time that they were asked.
      scale_: of the scores.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokens: int = 128,
        batch: int = 64,
        learning_rate: float = 2e-5,
        epochs: int = 1,
        patience: int = 3,
        seed: int = 0,
    ) -> None:
        """Stores what it is given.

        Args:
          folder: with config.json, model.safetensors and the tokenizer.
          tokens: how many ids of a text are read, with those that the encoder puts around it; at most what it is made for.
          batch: texts a step.
          learning_rate: the highest.
          epochs: at most.
          patience: how many times on end the validation texts may show nothing better.
          seed: of the head's first weights, the orders, the dropout, and the part held back for validation where none is given.
        """
        self.folder = folder
        self.tokens = tokens
        self.batch = batch
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.patience = patience
        self.seed = seed

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags

    def fit(
        self, texts: Sequence[str], labels: Sequence[Any], validation: tuple[Sequence[str], Sequence[Any]] | None = None
    ) -> Self:
        """Learns to tell the classes apart.

        Args:
          texts: to train on.
          labels: the class of each.
          validation: texts and labels by which weights and scale are chosen, and nothing else; None: about a seventh of
            `texts`, by a hash of the text and the seed.

        Raises:
          UserError: as `check` and `reading.parted`; the folder cannot be read as an encoder; a loss is not finite.
        """
        check(self.folder)
        self.classes_, (known, label_N), (others, held_label_N) = parted(texts, labels, validation, self.seed)
        with _randomness(self.seed):
            self.tokenizer_, self.model_ = _loaded(self.folder, len(self.classes_))
            most = getattr(self.model_.config, "max_position_embeddings", self.tokens)
            self.tokens_ = min(self.tokens, self.tokenizer_.model_max_length, most)
            longest = max(map(len, self.tokenizer_(known, truncation=True, max_length=self.tokens_)["input_ids"]))
            self.tokens_ = min(self.tokens_, longest)
            held = self._rows(others)

            def judge(state: dict[str, Any]) -> float:
                self.model_.load_state_dict(state)
                score_NK = self._scores(held)
                if not np.isfinite(score_NK).all():
                    return float("nan")
                return log_loss(best_scale(score_NK, held_label_N) * score_NK, held_label_N)

            states = self._trained(self._rows(known), label_N)
            best, self.losses_ = early_stopped(states, judge, self.patience, f"learning_rate {self.learning_rate}", "check")
            self.model_.load_state_dict(best)
            self.scale_ = best_scale(self._scores(held), held_label_N)
        return self

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The probability of each class, a row a text, in the order of `classes_`."""
        check_is_fitted(self, "scale_")
        if not len(texts):
            return np.empty((0, len(self.classes_)))
        return softmax(self.scale_ * self._scores(self._rows(list(texts))), axis=1)

    def predict(self, texts: Sequence[str]) -> NDArray[Any]:
        """The most probable class of each text."""
        probability_NK = self.predict_proba(texts)
        return self.classes_[probability_NK.argmax(axis=1)]

    def _rows(self, texts: list[str]) -> dict[str, Any]:
        """The arguments of the model, [N, T] each; all rows of one length, so that none depends on its neighbours."""
        padded = self.tokenizer_(texts, truncation=True, max_length=self.tokens_, padding="max_length", return_tensors="pt")
        return {name: padded[name] for name in self.tokenizer_.model_input_names if name in padded}

    def _of(self, rows: dict[str, Any], index: NDArray[np.integer]) -> Any:
        """The model's scores of some rows."""
        return self.model_(**{name: row_NT[index].to(self.model_.device) for name, row_NT in rows.items()}).logits

    def _scores(self, rows: dict[str, Any]) -> NDArray[np.float64]:
        import torch

        self.model_.eval()
        count = len(next(iter(rows.values())))
        with torch.inference_mode():
            found = [
                self._of(rows, np.arange(first, min(first + self.batch, count))).float().cpu().numpy()
                for first in range(0, count, self.batch)
            ]
        return np.concatenate(found).astype(np.float64)

    def _trained(self, rows: dict[str, Any], label_N: NDArray[np.integer]) -> Iterator[dict[str, Any]]:
        """The weights each time that they are to be judged."""
        import torch
        from transformers import get_linear_schedule_with_warmup

        steps = -(-len(label_N) // self.batch)
        optimiser = torch.optim.AdamW(self.model_.parameters(), lr=self.learning_rate, weight_decay=_WEIGHT_DECAY)
        total = steps * self.epochs
        schedule = get_linear_schedule_with_warmup(optimiser, round(_WARMUP * total), total)
        for epoch in range(self.epochs):
            order = rng.generator(self.seed, "classifier", "encoder", epoch).permutation(len(label_N))
            batches = np.array_split(order, steps)
            for part in np.array_split(np.arange(steps), min(_CHECKS, steps)):
                self.model_.train()
                for number in part:
                    index = batches[number]
                    wanted = torch.as_tensor(label_N[index], device=self.model_.device)
                    torch.nn.functional.cross_entropy(self._of(rows, index), wanted).backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    schedule.step()
                yield {name: value.detach().clone() for name, value in self.model_.state_dict().items()}


@contextmanager
def _randomness(seed: int) -> Iterator[None]:
    """What transformers draw themselves, the head's first weights and the dropout, comes from the classifier's own stream.

    They draw from PyTorch's global generators and take no other: these are set aside, fed a number of the stream, and put
    back as they were, so that nothing of a fit is seen outside of it.
    """
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    number = int(rng.generator(seed, "classifier", "encoder").integers(2**63))
    with torch.random.fork_rng(devices):
        # One by one: torch.manual_seed would reach devices that are not put back.
        torch.default_generator.manual_seed(number)
        if devices:
            torch.cuda.manual_seed(number)
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps transformers from telling that the head is new, which it is meant to be."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _loaded(folder: str | Path, classes: int) -> tuple[Any, Any]:
    """The tokenizer, and the encoder with a new head, in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Neither the network nor code in the folder is used, and no pickle is read.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    load: Callable[..., Any] = AutoModelForSequenceClassification.from_pretrained
    try:
        with _silence():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
            model = load(str(folder), num_labels=classes, use_safetensors=True, dtype=torch.float32, **local)
    except Exception as error:  # of many kinds, as the folder's files are
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be read as an encoder ({reason}): give one that transformers load") from None
    if tokenizer.pad_token is None or model.config.pad_token_id is None:
        raise UserError(f"{folder} pads no rows, as decoders do not: give an encoder, such as DeBERTaV3's")
    return tokenizer, model.to(device)
