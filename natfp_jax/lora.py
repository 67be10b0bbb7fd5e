"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685): a matrix W of a parent becomes W + alpha / rank · A B.

Owns which parameters an experiment has and which of them it trains, how adapters are called and begin, and how they become one
with what they adapt. Must not know the forward pass, or where a parent comes from.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from natfp_jax import params, processes
from natfp_jax.config import Lora, Model, Perturb
from natfp_jax.errors import UserError
from natfp_jax.params import Params, Spec, flatten, nest

__all__ = ["A", "B", "adapters", "begun", "joined", "merged", "split", "table"]

A, B = "_lora_a", "_lora_b"  # behind the path of the matrix that they adapt


def _adapted(lora: Lora) -> dict[str, str]:
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
    for path, inputs in _adapted(lora).items():
        if path not in specs:
            raise UserError(f'lora.targets names "{path.rpartition("/")[2]}", which a model with mlp="{model.mlp}" lacks')
        outputs = specs[path].dims.removeprefix("L" + inputs)
        found[path + A] = spec(f"L{inputs}R", math.prod(size[letter] for letter in inputs) ** -0.5)
        found[path + B] = spec(f"LR{outputs}", 0.0)
    return found


def table(model: Model, vocabulary: int, lora: Lora | None) -> dict[str, Spec]:
    """All parameters of an experiment: the decoder's, and the adapters where there are any."""
    return {**params.table(model, vocabulary), **(adapters(model, vocabulary, lora) if lora else {})}


def begun(
    specs: dict[str, Spec], seed: int, shardings: Params | None, perturb: Perturb | None, parent: Params | None
) -> Params:
    """The parameters of step 0: all from the init seed, or those of a parent as they are and the adapters from the seed.

    A twin has `perturb`: one of them moved by so many units in the last place.
    """
    if parent is None:
        return params.init(specs, seed, shardings, perturb)
    there = flatten(parent)
    if perturb is not None:
        params.check_perturb({path: spec.shape for path, spec in specs.items()}, perturb)
    own = {path: spec for path, spec in specs.items() if path not in there}
    laid = None if shardings is None else nest({path: flatten(shardings)[path] for path in own})
    moved = perturb if perturb is not None and perturb.parameter in own else None
    leaves = {**there, **(flatten(params.init(own, seed, laid, moved)) if own else {})}
    if perturb is not None and moved is None:
        leaf = leaves[perturb.parameter]
        host = params.perturbed(processes.gathered(leaf), perturb)
        leaves[perturb.parameter] = params.laid(host, leaf.sharding)
    return nest({path: leaves[path] for path in specs})


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


@jax.jit
def _sum(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    low_LIR, low_LRO = a.reshape(*a.shape[:1], -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)
    product = jnp.einsum("lir,lro->lio", low_LIR, low_LRO, precision=jax.lax.Precision.HIGHEST)
    return w + scale * product.reshape(w.shape)


def merged(tree: Params, lora: Lora | None, shardings: Params | None = None) -> Params:
    """The decoder that computes the same without adapters: `params.table`'s parameters, float32.

    Every matrix is made whole, on one device, and laid over the mesh after that, for the reason that `params.init` has.
    """
    if lora is None:
        return tree
    leaves = flatten(tree)
    found = {path: leaf for path, leaf in leaves.items() if not path.endswith((A, B))}
    laid = {} if shardings is None else flatten(shardings)
    for path in _adapted(lora):
        whole = processes.gathered([leaves[path], leaves[path + A], leaves[path + B]])
        host = np.asarray(_sum(*whole, np.float32(lora.alpha / lora.rank)))
        found[path] = jnp.asarray(host) if shardings is None else params.laid(host, laid[path])
    return nest(found)
