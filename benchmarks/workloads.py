"""The work that is timed: shapes, the same windows and initial weights for every side, and the functions that train.

Owns what both sides are given. A `build_*` function imports its framework inside, so that a process holds one of them alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from natfp_jax.config import Data, Experiment, Model, Optimiser, Run

__all__ = ["COHORT_SHAPES", "SHAPES", "Shape", "build_natfp", "build_natfp_one_by_one", "build_torch"]

_PROGRAMS: dict[Any, Any] = {}  # of this process
STEPS = 10_000  # of the schedule, which no benchmark reaches


@dataclass(frozen=True)
class Shape:
    """What a model and its batch are."""

    width: int
    layers: int
    seq_len: int
    batch: int
    vocabulary: int
    heads: int
    dtype: str = "float32"
    remat: str = "none"

    @property
    def experiment(self) -> Experiment:
        """The experiment of this shape; replicas differ in the seed of their initialisation."""
        model = Model(width=self.width, layers=self.layers, heads=self.heads, dtype=self.dtype)  # type: ignore[arg-type]
        data = Data(seq_len=self.seq_len, windows=self.batch * STEPS, batch=self.batch)
        return Experiment(model=model, data=data, optimiser=Optimiser(learning_rate=1e-3))

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.seq_len

    def windows(self, replica: int, count: int = 8) -> np.ndarray:
        """Windows of `count` batches, uniform ids: [count, batch, seq_len + 1]."""
        random = np.random.default_rng(replica)
        return random.integers(0, self.vocabulary, (count, self.batch, self.seq_len + 1), np.int32)

    def __str__(self) -> str:
        return f"{self.width} x {self.layers}, {self.batch} x {self.seq_len}, {self.vocabulary}"


SHAPES = {
    "cpu": (
        Shape(128, 2, 128, 32, 2048, heads=4),
        Shape(256, 4, 128, 32, 4096, heads=4),
        Shape(512, 8, 256, 16, 8192, heads=8),
    ),
    "cuda": (  # 160M and 1.3B parameters; of the larger one all sides together take more than 80 GB
        Shape(768, 12, 1024, 64, 32768, heads=12, dtype="bfloat16"),
        Shape(2048, 24, 2048, 8, 32768, heads=16, dtype="bfloat16", remat="dots"),
    ),
}
COHORT_SHAPES = {"cpu": SHAPES["cpu"], "cuda": (Shape(256, 8, 512, 8, 8192, heads=4, dtype="bfloat16"),)}  # 10M parameters


def build_natfp(shape: Shape, replicas: list[int], run: Run | None = None) -> Callable[[int], Any]:
    """Trains the replicas as one cohort, as `natfp_jax.train` does: batches from the host, metrics a step late."""
    import jax

    from natfp_jax import mesh, optim
    from natfp_jax.program import Program, execution_of
    from natfp_jax.train import laid, quiet

    run = run or Run(remat=shape.remat)  # type: ignore[arg-type]
    laid_over = mesh.make(run.mesh)
    experiment, K = shape.experiment, len(replicas)
    execution = execution_of(run, laid_over)
    sizes = shape.vocabulary, shape.vocabulary, K, laid_over, run.microbatches, run.remat, execution
    program = _PROGRAMS.setdefault((shape, *sizes), Program(experiment, *sizes))
    numbers = laid(program, [optim.hyperparameters(experiment.optimiser, STEPS)] * K)
    windows = np.stack([shape.windows(replica) for replica in replicas], axis=1)
    rows, none = mesh.batch_sharding(laid_over), quiet(laid_over)
    state = program.stack([lambda replica=replica: program.init(replica) for replica in replicas])  # type: ignore[misc]
    done = 0

    def steps(count: int) -> list[list[float]]:
        nonlocal state, done
        late, losses = None, []
        for _ in range(count):
            state, metrics = program.step(state, numbers, mesh.lay(windows[done % len(windows)], rows), none)
            if late is not None:
                losses.append(np.asarray(late["loss"]).tolist())
            late, done = metrics, done + 1
        losses.append(np.asarray(late["loss"]).tolist())  # type: ignore[index]
        jax.block_until_ready(state)
        return losses

    steps(1)  # compiles
    state = None  # else both would be held at once
    state, done = program.stack([lambda replica=replica: program.init(replica) for replica in replicas]), 0  # type: ignore[misc]
    return steps


def build_natfp_one_by_one(shape: Shape, replicas: list[int]) -> Callable[[int], Any]:
    """Trains the replicas one after another, each for all the steps that are asked for; they share one compiled program."""
    runs = [build_natfp(shape, [replica]) for replica in replicas]
    return lambda count: [[loss for (loss,) in each] for each in zip(*(run(count) for run in runs), strict=True)]


def build_torch(shape: Shape, replicas: list[int], compiled: bool, threads: int, device: str = "cpu") -> Callable[[int], Any]:
    """Trains the replicas one after another, each for all the steps that are asked for."""
    import torch

    from benchmarks.torch_peer import Trainer
    from natfp_jax import optim, params

    torch.set_num_threads(threads)
    experiment = shape.experiment
    specs = params.table(experiment.model, shape.vocabulary)
    numbers = optim.hyperparameters(experiment.optimiser, STEPS)
    schedule = optim.schedule(numbers, experiment.optimiser.schedule, STEPS)
    rates = [float(rate) for rate in schedule(np.arange(4096))]

    def trainer(replica: int) -> Any:
        weights = {path: np.asarray(value) for path, value in params.flatten(params.init(specs, replica)).items()}
        return Trainer(
            experiment.model,
            experiment.optimiser,
            weights,
            shape.vocabulary,
            shape.seq_len,
            rates.__getitem__,
            compiled=compiled,
            device=device,
        )

    windows = [torch.from_numpy(shape.windows(replica)).long().to(device) for replica in replicas]
    warm = trainer(replicas[0])
    for number in range(3):
        warm.step(windows[0][number])
    del warm
    trainers = [trainer(replica) for replica in replicas]

    def steps(count: int) -> list[list[float]]:
        found = []
        for one, windows_NBT in zip(trainers, windows, strict=True):
            losses = [one.step(windows_NBT[one.done % len(windows_NBT)]) for _ in range(count)]
            found.append([float(loss) for loss in losses])  # waits for the device
        return [list(of_step) for of_step in zip(*found, strict=True)]

    return steps
