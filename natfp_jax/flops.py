"""Counted operations and what a chip could do of them: model FLOPs utilisation (Chowdhery et al., 2022, appendix B).

Owns the formula. Must not know how anything is computed: what is computed twice counts once.
"""

import jax

from natfp_jax import chips, lora, params
from natfp_jax.config import Lora, Model

__all__ = ["peak", "per_token", "said"]


def per_token(model: Model, vocabulary: int, seq_len: int, adapters: Lora | None = None) -> int:
    """Operations of one training step for one token: 6 N + 6 L H T; where adapters alone are trained 4 N + 6 A + 6 L H T.

    N: parameters in products of matrices, the head among them; not embedding and positions (which are looked up), biases and
    norms. Each is multiplied and added once forward and twice backward, but where it is not trained only once. A: those of the
    adapters.
    L H T: layers, width of all heads, tokens of a window; the products of attention are 12 L H T, of which the causal half
    counts, also where a window has several examples.
    """
    specs = params.table(model, vocabulary)
    size = params.dims(model, vocabulary)
    looked_up = {"positions"} if model.tied else {"embedding", "positions"}
    products = {path: spec for path, spec in specs.items() if spec.decay and path not in looked_up}
    attention = 6 * size["L"] * size["N"] * size["H"] * seq_len
    if adapters is None:
        return 6 * params.count(products) + attention
    return 4 * params.count(products) + 6 * params.count(lora.adapters(model, vocabulary, adapters)) + attention


def peak(device: jax.Device) -> float | None:
    """FLOP/s of a device at its best, in bfloat16; None: it stands in no data sheet that is known here."""
    chip = chips.of_kind(device.device_kind)
    return None if chip is None else chip.bf16


def said(flops_per_second: float, devices: jax.sharding.Mesh) -> str:
    """What was reached, in words: of all devices, and as a part of their peak where that is known."""
    best = peak(devices.devices.flat[0])
    reached = f"{flops_per_second / 1e12:.3g} TFLOP/s"
    return reached if best is None else f"{reached}, MFU {100 * flops_per_second / best / devices.size:.1f} %"
