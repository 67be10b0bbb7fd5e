"""The same decoder, loss and optimiser in plain PyTorch: what a user would write instead.

Owns an implementation that shares nothing with natfp_jax but the initial weights, given as path → array. Must not know jax.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from natfp_jax.config import Model, Optimiser

__all__ = ["Trainer"]


def _rotate(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    first, second = x_BNTH.chunk(2, dim=-1)
    return torch.cat([first * cos_TH - second * sin_TH, second * cos_TH + first * sin_TH], dim=-1)


class _Block(nn.Module):
    def __init__(self, model: Model, mlp_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = model.heads, model.kv_heads or model.heads
        width, head = model.width, model.width // model.heads
        self.attention_norm = nn.RMSNorm(width, eps=model.norm_epsilon)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * head, bias=False)
        self.o = nn.Linear(self.heads * head, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=model.norm_epsilon)
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BTD.shape
        head = width // self.heads
        qkv = self.qkv(self.attention_norm(x_BTD)).view(batch, length, -1, head).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = _rotate(q, cos_TH, sin_TH), _rotate(k, cos_TH, sin_TH)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x_BTD = x_BTD + self.o(out.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(F.silu(gate) * up)


class _Decoder(nn.Module):
    def __init__(self, model: Model, padded: int, mlp_width: int, vocabulary: int) -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary
        self.embedding = nn.Embedding(padded, model.width)
        self.blocks = nn.ModuleList(_Block(model, mlp_width) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)

    def forward(self, windows_BT: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embedding(windows_BT[:, :-1])
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TH, sin_TH)
        # ids from `vocabulary` on are padding: no row of the head stands for them
        logits = self.norm(x_BTD) @ self.embedding.weight[: self.vocabulary].T
        return F.cross_entropy(logits.float().flatten(0, 1), windows_BT[:, 1:].flatten())


class Trainer:
    """One model under training; `step` takes int64 windows [batch, seq_len + 1] and returns the loss before the update."""

    def __init__(
        self,
        model: Model,
        optimiser: Optimiser,
        weights: dict[str, np.ndarray],
        vocabulary: int,
        seq_len: int,
        rate: Callable[[int], float],
        *,
        compiled: bool,
        device: str = "cpu",
    ) -> None:
        if not model.tied or model.mlp != "swiglu":
            raise ValueError("the peer has a tied head and a SwiGLU MLP only")
        mlp_width = weights["layers/mlp/down"].shape[1]
        self.device, self.rate, self.optimiser, self.done = device, rate, optimiser, 0
        decoder = _Decoder(model, weights["embedding"].shape[0], mlp_width, vocabulary).to(device)
        _load(decoder, weights)
        self.parameters = list(decoder.parameters())
        decays = [parameter for parameter in self.parameters if parameter.ndim > 1]
        rest = [parameter for parameter in self.parameters if parameter.ndim == 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decays, "weight_decay": optimiser.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=1.0,
            betas=(optimiser.beta1, optimiser.beta2),
            eps=optimiser.epsilon,
            fused=True,
        )
        half = model.width // model.heads // 2
        angle = torch.arange(seq_len)[:, None] * model.rope_theta ** (-torch.arange(half) / half)
        self.rotation = angle.cos().to(device), angle.sin().to(device)
        self.forward = torch.compile(decoder) if compiled else decoder
        self.bfloat16 = model.dtype == "bfloat16"

    def step(self, windows_BT: torch.Tensor) -> torch.Tensor:
        """One update; nothing waits for the device."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.forward(windows_BT, *self.rotation)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optimiser.clip, foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(self.done)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()


def _load(decoder: _Decoder, weights: dict[str, np.ndarray]) -> None:
    def copy(target: torch.Tensor, *sources: np.ndarray) -> None:
        # natfp_jax has [in, ..., out], PyTorch [out, in]
        value = np.concatenate([source.reshape(source.shape[0], -1) for source in sources], axis=1).T
        target.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    with torch.no_grad():
        decoder.embedding.weight.copy_(torch.from_numpy(weights["embedding"].copy()))
        decoder.norm.weight.copy_(torch.from_numpy(weights["norm"].copy()))
        for layer, block in enumerate(decoder.blocks):
            at = {path.removeprefix("layers/"): value[layer] for path, value in weights.items() if path.startswith("layers/")}
            block.attention_norm.weight.copy_(torch.from_numpy(at["attention/norm"]))
            block.mlp_norm.weight.copy_(torch.from_numpy(at["mlp/norm"]))
            copy(block.qkv.weight, at["attention/q"], at["attention/k"], at["attention/v"])
            copy(block.o.weight, at["attention/o"].reshape(-1, at["attention/o"].shape[-1]))
            copy(block.gate_up.weight, at["mlp/gate"], at["mlp/up"])
            copy(block.down.weight, at["mlp/down"])
