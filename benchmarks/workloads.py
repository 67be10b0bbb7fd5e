"""The work that is timed: shapes, the same windows, prompts and weights for every side, and the functions that train and draw.

Owns what both sides are given. A `build_*` function imports its framework inside, so that a process holds one of them alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax.config import Data, Experiment, Model, Optimiser, Run

__all__ = [
    "COHORT_SHAPES",
    "SHAPES",
    "TEXT_SHAPES",
    "Shape",
    "TextShape",
    "build_hf_texts",
    "build_natfp",
    "build_natfp_one_by_one",
    "build_natfp_texts",
    "build_torch",
]

_PROGRAMS: dict[Any, Any] = {}  # of this process
STEPS = 10_000  # of the schedule, which no benchmark reaches
PROMPTS = 8  # batches of prompts, which are taken in turn


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


@dataclass(frozen=True)
class TextShape:
    """What a model and a batch of texts are that it draws."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    prompt: int  # ids, of every text
    new: int
    dtype: str = "float32"

    @property
    def model(self) -> Model:
        """The model of this shape."""
        return Model(width=self.width, layers=self.layers, heads=self.heads, dtype=self.dtype)  # type: ignore[arg-type]

    def weights(self) -> dict[str, np.ndarray]:
        """Path → float32. Nothing is zero, as it would be before training: else attention and MLP would add nothing."""
        from natfp_jax import params

        random, found = np.random.default_rng(0), {}
        for path, spec in params.table(self.model, self.vocabulary).items():
            normal = random.standard_normal(spec.shape, np.float32)
            normal *= np.float32(0.1 if spec.scale is None else self.width**-0.5)
            found[path] = normal + np.float32(1) if spec.scale is None else normal
        return found

    def prompts(self, number: int) -> np.ndarray:
        """A batch of prompts, uniform ids: [batch, prompt]."""
        random = np.random.default_rng(number % PROMPTS)
        return random.integers(0, self.vocabulary, (self.batch, self.prompt), np.int64)

    def __str__(self) -> str:
        return f"{self.width} x {self.layers}, {self.batch} x ({self.prompt} + {self.new}), {self.vocabulary}"


TEXT_SHAPES = {
    "cpu": (
        TextShape(128, 2, heads=4, vocabulary=2048, batch=512, prompt=12, new=64),
        TextShape(512, 8, heads=8, vocabulary=2048, batch=64, prompt=12, new=64),
    ),
    "cuda": (  # 1.3B and 10M parameters
        TextShape(2048, 24, heads=16, vocabulary=32768, batch=64, prompt=12, new=256, dtype="bfloat16"),
        TextShape(256, 8, heads=4, vocabulary=8192, batch=4096, prompt=12, new=64, dtype="bfloat16"),
    ),
}


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
    state = program.stack([lambda replica=replica: program.init(replica) for replica in replicas])
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
    state, done = program.stack([lambda replica=replica: program.init(replica) for replica in replicas]), 0
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


def build_natfp_texts(shape: TextShape, greedy: bool = False) -> Callable[[int], Any]:
    """Draws so many batches of texts, as `natfp_jax.turns` draws them; greedy ones are given back."""
    import jax

    from natfp_jax import config, mesh, params
    from natfp_jax.sample import Programs, draw_key, new_slots_for, rows_for, slots_for
    from natfp_jax.strategy import Greedy
    from natfp_jax.turns import draw

    if greedy:  # to be compared: nothing is rounded that the other side does not round
        jax.config.update("jax_default_matmul_precision", "highest")
    strategy = (Greedy(),) if greedy else ()
    devices = mesh.make(config.Mesh(), jax.devices()[:1])
    # No id ends a text. As an index, which it is where a prompt is filled up, -1 is the last one.
    slots, memory = slots_for(shape.prompt) + new_slots_for(shape.new), mesh.device_memory(devices)
    rows = rows_for(shape.model, shape.vocabulary, slots, shape.batch, devices, memory)
    programs = Programs(shape.model, strategy, shape.vocabulary, shape.vocabulary, -1, rows, devices)
    weights = programs.weights([lambda: params.nest(shape.weights())])
    done = 0

    def texts(count: int) -> list[Any]:
        nonlocal done
        found = []
        for _ in range(count):
            key = draw_key(0, "benchmark", 0, strategy, done)
            (drawn,) = draw(programs, weights, [key], range(shape.batch), shape.prompts(done).tolist(), shape.new)
            _whole(shape, drawn.id_NW, drawn.length_N.sum())
            found.append(drawn.id_NW.tolist() if greedy else drawn.id_NW.size)
            done += 1
        return found

    texts(1)  # compiles
    done = 0
    return texts


def build_hf_texts(
    shape: TextShape, folder: Path, threads: int, device: str = "cpu", greedy: bool = False
) -> Callable[[int], Any]:
    """Draws so many batches of texts by `generate` of transformers, of the model in `folder`; greedy ones are given back."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa")
    model = model.to(device).eval()
    drawing = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # A configuration of its own: where a call gives no EOS, the folder's would hold.
    model.generation_config = GenerationConfig(max_new_tokens=shape.new, eos_token_id=None, pad_token_id=0, **drawing)
    torch.manual_seed(0)
    done = 0

    def texts(count: int) -> list[Any]:
        nonlocal done
        found = []
        for _ in range(count):
            prompts_BP = torch.from_numpy(shape.prompts(done)).to(device)
            with torch.inference_mode():
                whole_BT = model.generate(prompts_BP, attention_mask=torch.ones_like(prompts_BP))
            id_NW = whole_BT[:, shape.prompt :].cpu().numpy()  # waits for the device
            _whole(shape, id_NW, id_NW.size)
            found.append(id_NW.tolist() if greedy else id_NW.size)
            done += 1
        return found

    texts(1)
    done = 0
    return texts


def _whole(shape: TextShape, id_NW: np.ndarray, tokens: int) -> None:
    """Raises a RuntimeError if a text has ended early: the work would not be the same."""
    if id_NW.shape != (shape.batch, shape.new) or tokens != id_NW.size:
        raise RuntimeError(f"drew {tokens} tokens as {id_NW.shape}, expected {(shape.batch, shape.new)}")
