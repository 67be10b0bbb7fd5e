"""The parameter table: the one truth of shapes.

Owns path → dimensions, initial distribution, sharding and weight decay, and the keyed init that follows from it. Must not
know the forward pass.

Letters: V vocabulary, P positions, D width, L layers, N query heads, K key-value heads, H head width, F MLP width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from natfp_jax import rng
from natfp_jax.config import Model, Perturb
from natfp_jax.errors import UserError

__all__ = [
    "Params",
    "Spec",
    "abstract",
    "check_perturb",
    "count",
    "dims",
    "flatten",
    "init",
    "laid",
    "nest",
    "perturbed",
    "rotated",
    "table",
]

Params = dict[str, Any]

_AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}  # the mesh axis of a dimension


@dataclass(frozen=True)
class Spec:
    """One parameter. Stacked parameters have `L` first, and a layer's values depend on its index alone."""

    dims: str
    shape: tuple[int, ...]
    scale: float | None  # standard deviation of the initial normal; 0: zeros; None: ones
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
    if model.head_width is None and model.width % heads:
        raise UserError(
            f"model.width {model.width} is no multiple of model.heads {heads}: change one, or give model.head_width"
        )
    head_width = model.head_width or model.width // heads
    if model.positions == "rotary" and (head_width % 2 or rotated(model, head_width) < 2):
        raise UserError(
            f"heads are {head_width} wide (model.head_width, or else model.width / model.heads), of which a part of "
            f"{model.rope_fraction} is rotated (model.rope_fraction): rotary needs an even width, and two dimensions to turn"
        )
    if model.rope_scaling is not None and model.rope_scaling.low >= model.rope_scaling.high:
        raise UserError(f"model.rope_scaling.low {model.rope_scaling.low} is not below its high {model.rope_scaling.high}")
    if model.positions == "learned" and model.context is None:
        raise UserError("model.positions are learned: give model.context, how many there are")
    if heads % kv_heads:
        raise UserError(f"model.heads {heads} is no multiple of model.kv_heads {kv_heads}")
    factor = 8 / 3 if model.mlp == "swiglu" else 4
    mlp_width = model.mlp_width or math.ceil(factor * model.width / 32) * 32
    return {
        "V": vocabulary,
        "P": model.context or 0,
        "D": model.width,
        "L": model.layers,
        "N": heads,
        "K": kv_heads,
        "H": head_width,
        "F": mlp_width,
    }


def rotated(model: Model, head_width: int) -> int:
    """How many dimensions of a head are rotated: an even number."""
    return int(model.rope_fraction * head_width) // 2 * 2


def table(model: Model, vocabulary: int) -> dict[str, Spec]:
    """Path → specification, in the order of the forward pass. `vocabulary` is the padded size."""
    size = dims(model, vocabulary)

    def spec(letters: str, scale: float | None, decay: bool = True) -> Spec:
        return Spec(letters, tuple(size[letter] for letter in letters), scale, decay)

    # Matrices keep the variance of their input, and what a block adds starts at zero: a stable start that does not depend on
    # the depth, so that a deeper model shares its shallow layers. (Starting what a block adds at the variance of its input
    # ended 0.7 nats a token higher after the quickstart's training.)
    narrow = size["D"] ** -0.5

    def bias(path: str, letters: str, there: bool) -> dict[str, Spec]:
        return {f"{path}_bias": spec(letters, 0.0, decay=False)} if there else {}

    def norm(path: str, letters: str) -> dict[str, Spec]:
        return {path: spec(letters, None, decay=False), **bias(path, letters, model.norm == "layer")}

    qkv, o, mlp = (name in model.biases for name in ("qkv", "o", "mlp"))
    head_norms = {f"layers/attention/{name}_norm": spec("LH", None, decay=False) for name in "qk"} if model.qk_norm else {}
    gate = {"layers/mlp/gate": spec("LDF", narrow), **bias("layers/mlp/gate", "LF", mlp)} if model.mlp == "swiglu" else {}
    return {
        "embedding": spec("VD", model.init_scale),
        **({"positions": spec("PD", model.init_scale)} if model.positions == "learned" else {}),
        **norm("layers/attention/norm", "LD"),
        "layers/attention/q": spec("LDNH", narrow),
        **bias("layers/attention/q", "LNH", qkv),
        "layers/attention/k": spec("LDKH", narrow),
        **bias("layers/attention/k", "LKH", qkv),
        "layers/attention/v": spec("LDKH", narrow),
        **bias("layers/attention/v", "LKH", qkv),
        **head_norms,
        "layers/attention/o": spec("LNHD", 0.0),
        **bias("layers/attention/o", "LD", o),
        **norm("layers/mlp/norm", "LD"),
        **gate,
        "layers/mlp/up": spec("LDF", narrow),
        **bias("layers/mlp/up", "LF", mlp),
        "layers/mlp/down": spec("LFD", 0.0),
        **bias("layers/mlp/down", "LD", mlp),
        **norm("norm", "D"),
        **({} if model.tied else {"head": spec("DV", narrow)}),
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


@partial(jax.jit, static_argnames="shape")
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


def init(specs: dict[str, Spec], seed: int, shardings: Params | None = None, perturb: Perturb | None = None) -> Params:
    """All parameters, float32, each from the key of its own path (and layer): none depends on what else the model has.

    A twin has `perturb`: one weight moved by so many units in the last place.

    Every layer of every parameter is drawn whole, on one device, by a program of its own, and laid over the mesh after that.
    The parts that a mesh makes of it would have other last bits: compilers vectorise other shapes in other ways (XLA of JAX
    0.12 on CPU: rows of 4 values, 4 % of them, up to 4 units in the last place).
    """
    root = rng.stream(seed, "init")
    if perturb is not None:
        check_perturb({path: spec.shape for path, spec in specs.items()}, perturb)

    def leaf(path: str, spec: Spec) -> np.ndarray:
        if not spec.scale:
            return np.full(spec.shape, 1 if spec.scale is None else 0, np.float32)
        key, scale = rng.fold(root, path), np.float32(spec.scale)
        if not spec.dims.startswith("L"):
            return scale * np.asarray(_normal(key, spec.shape))
        layers = range(spec.shape[0])
        return np.stack([scale * np.asarray(_normal(jax.random.fold_in(key, layer), spec.shape[1:])) for layer in layers])

    def whole(path: str, spec: Spec) -> jax.Array:
        host = leaf(path, spec)
        if perturb is not None and perturb.parameter == path:
            host = perturbed(host, perturb)
        if shardings is None:
            return jnp.asarray(host)
        return laid(host, flatten(shardings)[path])

    return nest({path: whole(path, spec) for path, spec in specs.items()})


def laid(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, laid over a mesh."""
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def check_perturb(shapes: dict[str, tuple[int, ...]], perturb: Perturb) -> None:
    """Raises a UserError if there is no such parameter or index."""
    if perturb.parameter not in shapes:
        raise UserError(f"perturb.parameter {perturb.parameter!r} is none of {', '.join(shapes)}")
    size = math.prod(shapes[perturb.parameter])
    if perturb.index >= size:
        raise UserError(f"perturb.index {perturb.index} is outside {perturb.parameter}, which has {size} values")


def perturbed(host: np.ndarray, perturb: Perturb) -> np.ndarray:
    """The parameter that `perturb` names, with one value moved by so many units in the last place."""
    host = host.copy()
    weight = host.reshape(-1)[perturb.index]
    for _ in range(abs(perturb.ulps)):
        weight = np.nextafter(weight, np.float32(math.copysign(math.inf, perturb.ulps)))
    host.reshape(-1)[perturb.index] = weight
    return host
