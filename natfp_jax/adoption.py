"""Published models as arms: taken over as they are, and written by their own tokenizers.

Owns what an arm of a published model is once its folder is known, and its run: one checkpoint, at step 0, of the folder's
weights. Must not know how a folder is read, or how texts are drawn.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from natfp_jax import checkpoint, config, mesh, processes
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.config import Experiment
from natfp_jax.errors import UserError
from natfp_jax.files import hash_json
from natfp_jax.hf_import import Imported, imported
from natfp_jax.lineage import RECIPE, Identity, code, numerics, weight_hash
from natfp_jax.params import table
from natfp_jax.published import located, opened
from natfp_jax.runs import RunFolder
from natfp_jax.study import Arm
from natfp_jax.tokenizer import Tokenizer

__all__ = ["Adopted", "adopted", "adoptions"]


@dataclass(frozen=True)
class Adopted:
    """A published model whose folder is known."""

    experiment: Experiment  # with the folder's model
    source: Imported

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its own, what begins a text called EOS."""
        return self.source.tokenizer

    @cached_property
    def files(self) -> dict[str, str]:
        """File of its folder → sha256; read by one process."""
        return processes.led(lambda: self.source.folder.identity)

    @cached_property
    def identity(self) -> Identity:
        """What it is, whatever its folder is called."""
        inputs = {"published": hash_json(self.files), "tokenizer": self.tokenizer.sha256, "recipe": str(RECIPE)}
        return Identity(config.fingerprint(self.experiment, inputs), inputs)

    def check(self, devices: jax.sharding.Mesh) -> None:
        """Raises a UserError if it cannot be laid over these devices, or has no tokenizer that can be used."""
        mesh.check_params(table(self.experiment.model, self.tokenizer.padded_size), devices)

    def save(self, run: RunFolder, devices: jax.sharding.Mesh) -> None:
        """Writes its run, or what is missing of it.

        Raises:
          UserError: a number is not finite, the folder of the run is another's, or there is no room.
        """
        # Each process reads its own part, perhaps of a copy on a disk of its own.
        processes.agree({f"files of {self.source.folder.path}": hash_json(self.source.folder.identity)})
        processes.led(lambda: run.claim(self.experiment, self.identity))
        processes.led(lambda: self._clear(run))
        if processes.led(lambda: bool(run.missing([0]))):
            specs = table(self.experiment.model, self.tokenizer.padded_size)
            tree = self.source.params(self.tokenizer.padded_size, mesh.param_shardings(devices, specs))
            with Checkpoints(run.checkpoints) as checkpoints:
                checkpoints.save(0, tree, None, self._record(weight_hash(tree), devices))
        processes.led(lambda: run.finish(self.identity))

    @staticmethod
    def _clear(run: RunFolder) -> None:
        """Removes what was saved but not sealed before a kill."""
        if run.missing([0]) and (run.checkpoints / "0").exists():
            checkpoint.remove(run.checkpoints, 0)

    def _record(self, weights: str, devices: jax.sharding.Mesh) -> dict[str, Any]:
        """As of a trained arm, with what is not known of it left open."""
        return {
            "fingerprint": self.identity.fingerprint,
            "step": 0,
            "tokens": 0,
            "init_hash": weights,
            "order_hash": None,
            "early": {},
            "skipped": [],
            "parent": None,
            "published": self.files,
            "numerics": numerics(devices),
            "before": [],
            "code": code(),
            "weights": weights,
            "val_loss": None,
        }


def adopted(experiment: Experiment) -> Adopted:
    """Looks through the folder of a published model, brought here from the hub if need be.

    Raises:
      UserError: it cannot be had or used.
    """
    assert experiment.published is not None
    source = imported(opened(located(experiment.published.folder)))  # hosts need not share a disk: each has its own copy
    return Adopted(replace(experiment, model=replace(source.model, dtype=experiment.model.dtype)), source)


def adoptions(every: Iterable[Arm]) -> tuple[dict[str, Arm], dict[str, Adopted]]:
    """The arms by their names, those of published models with the shapes that their folders say; and these models.

    Raises:
      UserError: a folder cannot be had or used.
    """
    arms, models = dict[str, Arm](), dict[str, Adopted]()
    for arm in every:
        arms[arm.id] = arm
        if arm.experiment.published is None:
            continue
        try:
            models[arm.id] = adopted(arm.experiment)
        except UserError as error:
            raise UserError(f"arm {arm.id}: {error}") from None
        arms[arm.id] = replace(arm, experiment=models[arm.id].experiment)
    return arms, models
