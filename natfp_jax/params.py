"""The parameter table: the one truth of shapes.

Owns path → dimensions, initial distribution, sharding and weight decay, and the keyed init that follows from it. Must not
know the forward pass. Letters: V vocabulary, D width, L layers, N query heads, K key-value heads, H head width, F MLP width.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from natfp_jax import rng
from natfp_jax.config import Model, Perturb
from natfp_jax.errors import UserError

__all__ = ["Params", "Spec", "abstract", "count", "dims", "flatten", "init", "nest", "perturbed", "table"]

Params = dict[str, Any]

_AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}  # the mesh axis of a dimension


@dataclass(frozen=True)
class Spec:
    """One parameter. Stacked parameters have `L` first, and a layer's values depend on its index alone."""

    dims: str
    shape: tuple[int, ...]
    scale: float | None  # standard deviation of the initial normal; None: ones
    decay: bool

    @property
    def partition(self) -> PartitionSpec:
        """The mesh axis of each dimension."""
        return PartitionSpec(*(_AXES.get(letter) for letter in self.dims))


def dims(model: Model, vocabulary: int) -> dict[str, int]:
    """The size of each letter.

    Raises:
      UserError: widths and heads do not fit.
    """
    heads, kv_heads = model.heads, model.kv_heads or model.heads
    if model.width % heads or model.width // heads % 2:
        raise UserError(
            f"model.width {model.width} over model.heads {heads} is no even whole number: rotary needs head widths of 2, 4, ..."
        )
    if heads % kv_heads:
        raise UserError(f"model.heads {heads} is no multiple of model.kv_heads {kv_heads}")
    factor = 8 / 3 if model.mlp == "swiglu" else 4
    mlp_width = model.mlp_width or math.ceil(factor * model.width / 32) * 32
    return {
        "V": vocabulary,
        "D": model.width,
        "L": model.layers,
        "N": heads,
        "K": kv_heads,
        "H": model.width // heads,
        "F": mlp_width,
    }


def table(model: Model, vocabulary: int) -> dict[str, Spec]:
    """Path → specification, in the order of the forward pass. `vocabulary` is the padded size."""
    size = dims(model, vocabulary)

    def spec(letters: str, fan_in: str = "", scale: float | None = None) -> Spec:
        if fan_in:  # matrices keep the variance of their input, whatever the depth: a deeper model shares its shallow layers
            scale = math.prod(size[letter] for letter in fan_in) ** -0.5
        return Spec(letters, tuple(size[letter] for letter in letters), scale, decay=bool(fan_in) or letters in ("VD", "DV"))

    gate = {"layers/mlp/gate": spec("LDF", "D")} if model.mlp == "swiglu" else {}
    head = {} if model.tied else {"head": spec("DV", "D")}
    return {
        "embedding": spec("VD", scale=model.init_scale),
        "layers/attention/norm": spec("LD"),
        "layers/attention/q": spec("LDNH", "D"),
        "layers/attention/k": spec("LDKH", "D"),
        "layers/attention/v": spec("LDKH", "D"),
        "layers/attention/o": spec("LNHD", "NH"),
        "layers/mlp/norm": spec("LD"),
        **gate,
        "layers/mlp/up": spec("LDF", "D"),
        "layers/mlp/down": spec("LFD", "F"),
        "norm": spec("D"),
        **head,
    }


def nest(flat: dict[str, Any]) -> Params:
    """Path → leaf, as nested dictionaries."""
    tree: Params = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def flatten(tree: Params) -> dict[str, Any]:
    """The inverse of `nest`, sorted by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return dict(sorted(("/".join(entry.key for entry in path), leaf) for path, leaf in leaves))


def abstract(specs: dict[str, Spec]) -> Params:
    """Shapes and dtypes of the parameters, without values."""
    return nest({path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in specs.items()})


def count(specs: dict[str, Spec]) -> int:
    """The number of parameters."""
    return sum(math.prod(spec.shape) for spec in specs.values())


def init(specs: dict[str, Spec], seed: int | jax.Array) -> Params:
    """All parameters, float32, each from the key of its own path (and layer): none depends on what else the model has."""
    root = rng.stream(seed, "init")

    def leaf(path: str, spec: Spec) -> jax.Array:
        if spec.scale is None:
            return jnp.ones(spec.shape, jnp.float32)
        key, scale = rng.fold(root, path), spec.scale
        if not spec.dims.startswith("L"):
            return scale * jax.random.normal(key, spec.shape, jnp.float32)
        keys_L = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(spec.shape[0], dtype=jnp.uint32))
        return scale * jax.vmap(lambda k: jax.random.normal(k, spec.shape[1:], jnp.float32))(keys_L)

    return nest({path: leaf(path, spec) for path, spec in specs.items()})


def perturbed(params: Params, perturb: Perturb) -> Params:
    """The twin: one weight moved by `ulps` units in the last place.

    Raises:
      UserError: there is no such parameter or index.
    """
    flat = flatten(params)
    if perturb.parameter not in flat:
        raise UserError(f"perturb.parameter {perturb.parameter!r} is none of {', '.join(flat)}")
    old = flat[perturb.parameter]
    if perturb.index >= old.size:
        raise UserError(f"perturb.index {perturb.index} is outside {perturb.parameter}, which has {old.size} values")
    host = np.array(old, np.float32)
    weight = host.reshape(-1)[perturb.index]
    for _ in range(abs(perturb.ulps)):
        weight = np.nextafter(weight, np.float32(math.copysign(math.inf, perturb.ulps)))
    host.reshape(-1)[perturb.index] = weight
    return nest({**flat, perturb.parameter: jax.device_put(host, old.sharding)})
