"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685): a matrix W of a parent becomes W + alpha / rank · A B.

Owns which parameters an experiment has and which of them it trains, and how adapters are called. Must not know the forward
pass, or values.
"""

import math

from natfp_jax import params
from natfp_jax.config import Lora, Model
from natfp_jax.errors import UserError
from natfp_jax.params import Params, Spec, flatten, nest

__all__ = ["A", "B", "adapted", "adapters", "joined", "split", "table"]

A, B = "_lora_a", "_lora_b"  # behind the path of the matrix that they adapt


def adapted(lora: Lora) -> dict[str, str]:
    """Path of each adapted matrix → the letters of its input, behind those of the layer."""
    where = {"q": "attention", "k": "attention", "v": "attention", "o": "attention"}
    inputs = {"o": "NH", "down": "F"}
    return {
        f"layers/{where.get(name, 'mlp')}/{name}": inputs.get(name, "D")
        for name in ("q", "k", "v", "o", "gate", "up", "down")
        if name in lora.targets
    }


def adapters(model: Model, vocabulary: int, lora: Lora) -> dict[str, Spec]:
    """Path → specification of the adapters: A is normal with the variance that keeps its input's, B zero.

    Raises:
      UserError: the model has no such matrix.
    """
    specs, size = params.table(model, vocabulary), {**params.dims(model, vocabulary), "R": lora.rank}

    def spec(letters: str, scale: float) -> Spec:
        return Spec(letters, tuple(size[letter] for letter in letters), scale, decay=True)

    found = {}
    for path, inputs in adapted(lora).items():
        if path not in specs:
            raise UserError(f'lora.targets names "{path.rpartition("/")[2]}", which a model with mlp="{model.mlp}" lacks')
        outputs = specs[path].dims.removeprefix("L" + inputs)
        found[path + A] = spec(f"L{inputs}R", math.prod(size[letter] for letter in inputs) ** -0.5)
        found[path + B] = spec(f"LR{outputs}", 0.0)
    return found


def table(model: Model, vocabulary: int, lora: Lora | None) -> dict[str, Spec]:
    """All parameters of an experiment: the decoder's, and the adapters where there are any."""
    return {**params.table(model, vocabulary), **(adapters(model, vocabulary, lora) if lora else {})}


def split(tree: Params, lora: Lora | None) -> tuple[Params, Params]:
    """What is trained, and what stays as it is."""
    if lora is None:
        return tree, {}
    leaves = flatten(tree)
    trained = {path: leaf for path, leaf in leaves.items() if path.endswith((A, B))}
    return nest(trained), nest({path: leaf for path, leaf in leaves.items() if path not in trained})


def joined(trained: Params, still: Params) -> Params:
    """The inverse of `split`."""
    return nest({**flatten(trained), **flatten(still)}) if still else trained
