"""Checkpoints: Orbax behind one small face.

Owns how a training state and its record lie on disk, and that a checkpoint is whole or absent. Must not know what is in a
state, nor when one is taken.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from natfp_jax.errors import UserError

__all__ = ["Checkpoints", "with_shardings"]

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every step of a save as news


class Checkpoints:
    """The kept checkpoints of one run, by step. A context manager.

    Each holds `params`, `optimiser` (what a restart needs besides) and `record`, a JSON object that commits together with
    the weights that it describes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
            item_names=("params", "optimiser", "record"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that are whole, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, optimiser: Any, record: dict[str, Any]) -> None:
        """Saves one step; returns when it is committed."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimiser=ocp.args.StandardSave(optimiser),
            record=ocp.args.JsonSave(record),
        )
        self._manager.save(step, args=args, force=True)  # forced: a later study may ask for an earlier step

    def record(self, step: int) -> dict[str, Any]:
        """The record of a step."""
        restored = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        record: dict[str, Any] = restored["record"]
        return record

    def restore(self, step: int, params: Any, optimiser: Any = None) -> tuple[Any, Any]:
        """The parameters, and the optimiser state if asked for, of the given shapes and shardings.

        Raises:
          UserError: there is no such step.
        """
        if step not in self.steps():
            raise UserError(f"{self.folder} has no checkpoint at step {step}, only {self.steps()}: train it first")
        args: dict[str, Any] = {"params": ocp.args.StandardRestore(params)}
        if optimiser is not None:
            args["optimiser"] = ocp.args.StandardRestore(optimiser)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises whatever it likes over a damaged file
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"{self.folder} step {step} cannot be restored ({why}): remove the run's folder and run the same command again"
            ) from error
        return restored["params"], restored.get("optimiser") if optimiser is not None else None


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes together with where each array is to lie."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
