"""Published decoders by their own definitions, in float64: from the folder alone, by its names and conventions.

`llama`, `neox` and `gpt2` give the logits [T, V] of one text, of which every tensor of the folder is a part. `write` makes such
folders.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from natfp_jax.model import head, hidden, logits
from natfp_jax.sample import draw_key, programs_of
from natfp_jax.strategy import Greedy
from natfp_jax.turns import draw

WIDTH, LAYERS, HEADS, INNER, VOCABULARY, CONTEXT = 48, 2, 6, 80, 300, 64


class _Tensors:
    """Each is taken once, so that none may be left over."""

    def __init__(self, folder, prefix=""):
        self.config, self._left = json.loads((folder / "config.json").read_text()), {}
        for path in sorted(folder.glob("*.safetensors")):
            self._left |= load_file(path)
        self._prefix = prefix if any(name.startswith(prefix) for name in self._left) else ""

    def __call__(self, name, prefixed=True):
        return self._left.pop((self._prefix if prefixed else "") + name).astype(np.float64)

    def get(self, name):
        return self(name) if self._prefix + name in self._left else None

    def linear(self, x, name, prefixed=True):
        y, bias = x @ self(f"{name}.weight", prefixed).T, self.get(f"{name}.bias")
        return y if bias is None else y + bias

    def conv(self, x, name):  # GPT-2's, [in, out]
        return x @ self(f"{name}.weight") + self(f"{name}.bias")

    def layer_norm(self, x, name, epsilon):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * self(f"{name}.weight") + self(f"{name}.bias")

    def none_left(self):
        assert not self._left, sorted(self._left)


def _rotated(x, inverse_H):
    """The first dimensions of each head [T, N, H], in pairs of the first and second half of them (Su et al., 2021)."""
    angle = np.arange(len(x))[:, None] * inverse_H
    cos, sin = (np.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))
    width = 2 * len(inverse_H)
    turned, rest = x[..., :width], x[..., width:]
    half = np.concatenate([-turned[..., width // 2 :], turned[..., : width // 2]], axis=-1)
    return np.concatenate([turned * cos + half * sin, rest], axis=-1)


def _attended(q, k, v):
    """Causal attention of heads [T, N, H], groups [T, K, H]."""
    count, heads, width = q.shape
    out = []
    for number in range(heads):
        group = number // (heads // k.shape[1])
        score = q[:, number] @ k[:, group].T / np.sqrt(width)
        score[np.triu_indices(count, 1)] = -np.inf
        part = np.exp(score - score.max(-1, keepdims=True))
        out.append(part / part.sum(-1, keepdims=True) @ v[:, group])
    return np.concatenate(out, axis=-1)


def _activated(x, name):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    assert name == "gelu_new"
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def _llama_3(inverse, scaling):
    """Of Llama 3.1: a wave longer than the old context over `low_freq_factor` is stretched, a short one is not."""
    wave, old = 2 * np.pi / inverse, scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (old / wave - low) / (high - low)
    between = (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
    return np.where(wave > old / low, inverse / scaling["factor"], np.where(wave < old / high, inverse, between))


def llama(folder, ids):
    """Llama (https://arxiv.org/abs/2302.13971) and its kin: with biases, head norms and stretched positions where they are."""
    tensors = _Tensors(folder, "model.")
    config, count = tensors.config, len(ids)
    assert config["hidden_act"] == "silu"
    width = config["head_dim"]
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = scaling.get("rope_theta") or config["rope_theta"]
    inverse = 1 / theta ** (np.arange(0, width, 2) / width)
    if scaling.get("rope_type", "default") != "default":
        assert scaling["rope_type"] == "llama3"
        inverse = _llama_3(inverse, scaling)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * scale

    table = tensors("embed_tokens.weight")
    assert table.shape == (config["vocab_size"], config["hidden_size"])
    x = table[ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        inner = norm(x, tensors(f"{at}.input_layernorm.weight"))
        q, k, v = (tensors.linear(inner, f"{at}.self_attn.{name}_proj").reshape(count, -1, width) for name in "qkv")
        assert (q.shape[1], k.shape[1]) == (config["num_attention_heads"], config["num_key_value_heads"])
        for name in "qk":
            if (scale := tensors.get(f"{at}.self_attn.{name}_norm.weight")) is not None:
                q, k = (norm(q, scale), k) if name == "q" else (q, norm(k, scale))
        x = x + tensors.linear(_attended(_rotated(q, inverse), _rotated(k, inverse), v), f"{at}.self_attn.o_proj")
        inner = norm(x, tensors(f"{at}.post_attention_layernorm.weight"))
        gate = _activated(tensors.linear(inner, f"{at}.mlp.gate_proj"), "silu")
        assert gate.shape[1] == config["intermediate_size"]
        x = x + tensors.linear(gate * tensors.linear(inner, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    x = norm(x, tensors("norm.weight"))
    found = x @ table.T if config["tie_word_embeddings"] else x @ tensors("lm_head.weight", prefixed=False).T
    tensors.none_left()
    return found


def neox(folder, ids):
    """GPT-NeoX (https://arxiv.org/abs/2204.06745), of which Pythia is: queries, keys and values lie head by head."""
    tensors = _Tensors(folder, "gpt_neox.")
    config, count = tensors.config, len(ids)
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    width = config["hidden_size"] // heads
    turned = int(width * config["rotary_pct"])
    inverse = 1 / config["rotary_emb_base"] ** (np.arange(0, turned, 2) / turned)
    x = tensors("embed_in.weight")[ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        fused = tensors.linear(tensors.layer_norm(x, f"{at}.input_layernorm", epsilon), f"{at}.attention.query_key_value")
        q, k, v = np.split(fused.reshape(count, heads, 3 * width), 3, axis=-1)
        attended = tensors.linear(_attended(_rotated(q, inverse), _rotated(k, inverse), v), f"{at}.attention.dense")
        read = x if config["use_parallel_residual"] else x + attended
        inner = tensors.linear(tensors.layer_norm(read, f"{at}.post_attention_layernorm", epsilon), f"{at}.mlp.dense_h_to_4h")
        x = x + attended + tensors.linear(_activated(inner, config["hidden_act"]), f"{at}.mlp.dense_4h_to_h")
    found = tensors.layer_norm(x, "final_layer_norm", epsilon) @ tensors("embed_out.weight", prefixed=False).T
    tensors.none_left()
    return found


def gpt2(folder, ids):
    """GPT-2: learned positions, matrices that are [in, out], a head that is the embedding."""
    tensors = _Tensors(folder, "transformer.")
    config, count = tensors.config, len(ids)
    epsilon = config["layer_norm_epsilon"]
    table = tensors("wte.weight")
    x = table[ids] + tensors("wpe.weight")[:count]
    for layer in range(config["n_layer"]):
        at = f"h.{layer}"
        fused = tensors.conv(tensors.layer_norm(x, f"{at}.ln_1", epsilon), f"{at}.attn.c_attn")
        q, k, v = (part.reshape(count, config["n_head"], -1) for part in np.split(fused, 3, axis=-1))
        x = x + tensors.conv(_attended(q, k, v), f"{at}.attn.c_proj")
        inner = _activated(tensors.conv(tensors.layer_norm(x, f"{at}.ln_2", epsilon), f"{at}.mlp.c_fc"), "gelu_new")
        x = x + tensors.conv(inner, f"{at}.mlp.c_proj")
    found = tensors.layer_norm(x, "ln_f", epsilon) @ table.T
    tensors.none_left()
    return found


# --- folders of them --------------------------------------------------------------------------------------------------

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "gelu",
    "rotary_pct": 0.5,
    "rotary_emb_base": 300.0,
    "max_position_embeddings": CONTEXT,
    "layer_norm_eps": 1e-3,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Every number differs from what the family has by default, so that one which is not read is found.
CONFIGS = {
    "llama": {**_LLAMA, "model_type": "llama", "rope_theta": 300.0},
    "llama 3, tied": {**_LLAMA, "model_type": "llama", "rope_parameters": _STRETCHED, "tie_word_embeddings": True},
    "llama with biases": {**_LLAMA, "model_type": "llama", "rope_theta": 300.0, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA, "model_type": "mistral", "rope_theta": 300.0, "head_dim": 12, "sliding_window": 50},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "rope_theta": 300.0, "sliding_window": 8, "use_sliding_window": False},
    "qwen3": {
        **_LLAMA,
        "model_type": "qwen3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "head_dim": 16,
    },
    "neox": {**_NEOX, "model_type": "gpt_neox"},
    "neox, one behind the other": {**_NEOX, "model_type": "gpt_neox", "use_parallel_residual": False, "hidden_act": "gelu_new"},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": CONTEXT,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def definition(config):
    """What computes it."""
    return {"gpt_neox": neox, "gpt2": gpt2}.get(config["model_type"], llama)


def shapes(config):
    """Name → shape of every tensor, as transformers write them."""
    if config["model_type"] == "gpt2":
        found = {"transformer.wte.weight": (VOCABULARY, WIDTH), "transformer.wpe.weight": (CONTEXT, WIDTH)}
        for at in ("ln_f", *(f"h.{layer}.ln_{number}" for layer in range(LAYERS) for number in (1, 2))):
            found |= {f"transformer.{at}.{name}": (WIDTH,) for name in ("weight", "bias")}
        sides = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
        sides |= {"mlp.c_fc": (WIDTH, 4 * WIDTH), "mlp.c_proj": (4 * WIDTH, WIDTH)}
        for layer in range(LAYERS):
            for name, (inputs, outputs) in sides.items():
                at = f"transformer.h.{layer}.{name}"
                found |= {f"{at}.weight": (inputs, outputs), f"{at}.bias": (outputs,)}
        return found
    if config["model_type"] == "gpt_neox":
        found = {"gpt_neox.embed_in.weight": (VOCABULARY, WIDTH), "embed_out.weight": (VOCABULARY, WIDTH)}
        norms = [f"layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in ("input", "post_attention")]
        for at in ("final_layer_norm", *norms):
            found |= {f"gpt_neox.{at}.{name}": (WIDTH,) for name in ("weight", "bias")}
        sides = {"attention.query_key_value": (3 * WIDTH, WIDTH), "attention.dense": (WIDTH, WIDTH)}
        sides |= {"mlp.dense_h_to_4h": (INNER, WIDTH), "mlp.dense_4h_to_h": (WIDTH, INNER)}
        for layer in range(LAYERS):
            for name, (outputs, inputs) in sides.items():
                at = f"gpt_neox.layers.{layer}.{name}"
                found |= {f"{at}.weight": (outputs, inputs), f"{at}.bias": (outputs,)}
        return found
    kind, head = config["model_type"], config["head_dim"]
    found = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCABULARY, WIDTH)
    many, few = HEADS * head, config["num_key_value_heads"] * head
    sides = {"q": (many, WIDTH), "k": (few, WIDTH), "v": (few, WIDTH), "o": (WIDTH, many)}
    wide = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    biased = "qkvo" if config.get("attention_bias") else "qkv" if kind == "qwen2" else ""
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        found |= {f"{at}.self_attn.{name}_proj.weight": shape for name, shape in sides.items()}
        found |= {f"{at}.self_attn.{name}_proj.bias": sides[name][:1] for name in biased}
        found |= {f"{at}.mlp.{name}_proj.weight": shape for name, shape in wide.items()}
        if config.get("mlp_bias"):
            found |= {f"{at}.mlp.{name}_proj.bias": shape[:1] for name, shape in wide.items()}
        if kind == "qwen3":
            found |= {f"{at}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
    return found


def tensors(config, seed=0):
    """Values far from where training begins, so that every one of them matters."""
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=shape) * 0.3 + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)
        for name, shape in shapes(config).items()
    }


def write(folder, config, values=None):
    """A folder of one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if values is None else values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- ours beside them -------------------------------------------------------------------------------------------------


def ours(model, tree, ids, vocabulary):
    """The logits [T, V] of one text."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(hidden(model, tree, jnp.asarray([ids])), head(tree), vocabulary))[0]


def greedy(model, tree, tokenizer, prompts, new, devices):
    """The most likely continuation of each prompt, by our sampler."""
    programs = programs_of(model, (Greedy(),), tokenizer.size, tokenizer.padded_size, tokenizer.eos_id, 16, devices)
    key = draw_key(0, "a", 0, (Greedy(),), 0)
    (found,) = draw(programs, programs.weights([lambda: tree]), [key], range(len(prompts)), prompts, new)
    return [ids_W[:length].tolist() for ids_W, length in zip(found.id_NW, found.length_N, strict=True)]
