"""Where weights begin, and what adapters make of them.

Owns step 0 (all from the init seed, or a parent's weights and what adapts them), and how adapters become one with what they
adapt. Must not know where a parent lies, or how training goes on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from natfp_jax import lora, params, processes
from natfp_jax.config import Lora, Perturb
from natfp_jax.params import Params, Spec, flatten, nest

__all__ = ["begun", "merged"]


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
    wanted = {} if shardings is None else flatten(shardings)
    laid = None if shardings is None else nest({path: wanted[path] for path in own})
    moved = perturb if perturb is not None and perturb.parameter in own else None
    leaves = {**there, **(flatten(params.init(own, seed, laid, moved)) if own else {})}
    if perturb is not None and moved is None:
        leaf = leaves[perturb.parameter]
        host = params.perturbed(processes.gathered(leaf), perturb)
        leaves[perturb.parameter] = params.laid(host, leaf.sharding)
    return nest({path: leaves[path] for path in specs})


@jax.jit
def _sum(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    low_LIR, low_LRO = a.reshape(*a.shape[:1], -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)
    product = jnp.einsum("lir,lro->lio", low_LIR, low_LRO, precision=jax.lax.Precision.HIGHEST)
    return w + scale * product.reshape(w.shape)


def merged(tree: Params, adapters: Lora | None, shardings: Params | None = None) -> Params:
    """The decoder that computes the same without adapters: `params.table`'s parameters, float32.

    Every matrix is made whole, on one device, and laid over the mesh after that, for the reason that `params.init` has.
    """
    if adapters is None:
        return tree
    leaves = flatten(tree)
    found = {path: leaf for path, leaf in leaves.items() if not path.endswith((lora.A, lora.B))}
    laid = {} if shardings is None else flatten(shardings)
    for path in lora.adapted(adapters):
        whole = processes.gathered([leaves[path], leaves[path + lora.A], leaves[path + lora.B]])
        host = np.asarray(_sum(*whole, np.float32(adapters.alpha / adapters.rank)))
        found[path] = jnp.asarray(host) if shardings is None else params.laid(host, laid[path])
    return nest(found)
