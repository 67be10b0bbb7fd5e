"""One trained model, by the folder of its checkpoint.

Owns what has to be found and checked to use it alone: its experiment, its weights, its tokenizer. Must not know what it is used
for.
"""

from dataclasses import dataclass
from pathlib import Path

import jax

from natfp_jax import checkpoint, config, files
from natfp_jax.adoption import adopted
from natfp_jax.chat import Chat
from natfp_jax.config import Experiment, Model
from natfp_jax.errors import UserError
from natfp_jax.families import Description
from natfp_jax.params import Params
from natfp_jax.runs import RunFolder
from natfp_jax.tokenizer import Tokenizer
from natfp_jax.train import load_weights

__all__ = ["Trained", "trained"]


@dataclass(frozen=True)
class Trained:
    """A model that can be drawn from."""

    experiment: Experiment
    fingerprint: str
    step: int
    params: Params
    tokenizer: Tokenizer
    described: Description | None = None  # of a published model

    @property
    def model(self) -> Model:
        """Its shape."""
        return self.experiment.model

    @property
    def chat(self) -> Chat | None:
        """How it was asked, if it was trained on conversations."""
        corpus = self.experiment.corpus
        return Chat(self.tokenizer, corpus.template) if corpus.conversations else None

    @property
    def end_id(self) -> int:
        """The id that ends a text."""
        if self.described is not None:
            return self.described.end
        return self.tokenizer.eos_id if self.chat is None else self.chat.end

    @property
    def context(self) -> int:
        """The tokens that it was trained on at a time."""
        return self.experiment.data.seq_len if self.described is None else self.described.context

    @property
    def limit(self) -> int | None:
        """The tokens that it can have at most; None: any number."""
        return self.model.context if self.described is None else self.described.limit


def trained(path: Path, devices: jax.sharding.Mesh, tokenizer: Path | None = None) -> Trained:
    """Opens OUT/runs/RUN/checkpoints/STEP, or the last checkpoint of OUT/runs/RUN.

    Args:
      tokenizer: its tokenizer.json; None: found by its hash below OUT/corpora.

    Raises:
      UserError: there is no such checkpoint, or its tokenizer is not found.
      Damaged: a file is not what was written.
    """
    run, step = _place(path.resolve())  # also "." is in a folder
    owner = files.read_json(run.folder / "experiment.json", f"move {run.folder} away")
    experiment = config.from_json(Experiment, owner["experiment"])
    ends = None
    if experiment.published is None:
        found = _tokenizer(run.folder.parent.parent, str(owner["inputs"]["tokenizer"]), tokenizer)
    elif tokenizer is not None:
        raise UserError(f"--tokenizer {tokenizer}: {run.folder} is of a published model, which has its own; leave it out")
    else:
        model = adopted(experiment)
        found, ends = model.tokenizer, model.source.described
        if found.sha256 != owner["inputs"]["tokenizer"]:
            raise UserError(f"{experiment.published.folder} has another tokenizer than it had for {run.folder}: put it back")
    params = load_weights(run, step, experiment, found.padded_size, devices)
    return Trained(experiment, str(owner["fingerprint"]), step, params, found, ends)


def _place(path: Path) -> tuple[RunFolder, int]:
    if (path / "experiment.json").exists():
        run = RunFolder(path)
        if not (steps := checkpoint.sealed(run.checkpoints)):
            raise UserError(f"{path} has no whole checkpoint yet: train it first")
        return run, steps[-1]
    run = RunFolder(path.parent.parent)
    if not (run.folder / "experiment.json").exists() or not path.name.isdecimal():
        raise UserError(f"{path} is no checkpoint: give OUT/runs/RUN/checkpoints/STEP, or OUT/runs/RUN for its last one")
    step = int(path.name)
    if step not in (steps := checkpoint.sealed(run.checkpoints)):
        raise UserError(f"{run.folder} has no whole checkpoint at step {step}, it has {steps}")
    return run, step


def _tokenizer(out: Path, sha256: str, given: Path | None) -> Tokenizer:
    if given is not None:
        found = Tokenizer.load(given)
        if found.sha256 != sha256:
            raise UserError(f"{given} has sha256 {found.sha256}, the model was trained with {sha256}: give that one")
        return found
    for path in sorted((out / "corpora").glob("*/tokenizer.json")):
        if files.hash_file(path) == sha256:
            return Tokenizer.load(path)
    raise UserError(f"no corpus below {out / 'corpora'} has the tokenizer {sha256[:16]}: give its tokenizer.json (--tokenizer)")
