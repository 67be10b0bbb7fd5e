"""The decoder as Hugging Face's transformers know it: a folder of a Llama model.

Owns how our parameters and our tokenizer are called there, how they lie, and what the folder says of them. Must not know runs,
arms or studies, and needs neither transformers nor PyTorch.

The architecture is Llama's, with its pairs of rotary dimensions, so that weights are renamed and transposed and nothing else.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax import files
from natfp_jax.config import Model
from natfp_jax.errors import UserError
from natfp_jax.params import Params, dims, flatten
from natfp_jax.tokenizer import EOS, Tokenizer

__all__ = ["export"]

_LAYER = {  # of a layer: our path → their name
    "attention/norm": "input_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def export(params: Params, model: Model, tokenizer: Tokenizer, context: int, folder: Path, end: int | None = None) -> None:
    """Writes `folder`, whole or not at all: AutoModelForCausalLM and AutoTokenizer of transformers load it.

    Their tokenizer gives our ids, and text never becomes EOS. As ours, it puts nothing in front: for what begins a text,
    `bos_token_id` (EOS) comes before its ids. `generate` draws from the model's own probabilities, as we do by default.

    Args:
      params: of `params.table`, whole on this process; written as float32.
      tokenizer: of the ids that the parameters have rows for; padding ids are left out.
      context: the most tokens that the model is for, prompt and all.
      end: the id at which `generate` stops; None: EOS. A chat template is not written: theirs has other ids at the seams.
      folder: does not exist yet, or is empty.

    Raises:
      UserError: transformers have no such architecture, the folder is not empty, or safetensors is not installed.
      ValueError: the tokenizer is not the one of these parameters.
    """
    if model.mlp != "swiglu":
        raise UserError(
            f'model.mlp {model.mlp!r} is not known to transformers\' Llama, which has "swiglu": export another model'
        )
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError("the export needs an extra: pip install 'natfp-jax[hf]'") from None
    end = tokenizer.eos_id if end is None else end
    if (rows := params["embedding"].shape[0]) != tokenizer.padded_size:
        raise ValueError(f"the embedding has {rows} rows, the tokenizer {tokenizer.padded_size} ids with padding")
    folder = folder.resolve()  # a link may lead to an empty folder, but no folder takes a link's place
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: remove it, or give the name of a folder that does not exist or is empty")

    hidden = folder.with_name(f".{folder.name}.tmp")
    weights = hidden / "model.safetensors"
    shutil.rmtree(hidden, ignore_errors=True)  # what an export that was killed has left
    try:
        hidden.mkdir(parents=True)
        for name, value in {
            "config.json": _config(model, tokenizer, context, end),
            "generation_config.json": _generation_config(tokenizer, end),
            "tokenizer.json": _tokenizer_file(tokenizer),
            "tokenizer_config.json": _tokenizer_config(context),
        }.items():
            with files.whole_file(hidden / name, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        # transformers 4 read no file that does not name a framework, and know no name for NumPy.
        save_file(_tensors(params, tokenizer.size), weights, metadata={"format": "pt"})
        shutil.copymode(hidden / "config.json", weights)  # safetensors lets nobody but the owner read it
        with open(weights, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(hidden, folder)
        files.sync(folder.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _tensors(params: Params, vocabulary: int) -> dict[str, np.ndarray]:
    """Their name → array; a matrix is [out, in]. Contiguous, since safetensors writes memory as it lies."""
    ours = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    found = {"model.embed_tokens.weight": ours["embedding"][:vocabulary], "model.norm.weight": ours["norm"]}
    if "head" in ours:
        found["lm_head.weight"] = ours["head"][:, :vocabulary].T
    for path, name in _LAYER.items():
        for layer, value in enumerate(ours[f"layers/{path}"]):
            if path == "attention/o":  # [N, H, D]
                value = value.reshape(-1, value.shape[-1])
            if value.ndim > 1:  # all others have what goes in first
                value = value.reshape(len(value), -1).T
            found[f"model.layers.{layer}.{name}.weight"] = value
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def _config(model: Model, tokenizer: Tokenizer, context: int, end: int) -> dict[str, Any]:
    size = dims(model, tokenizer.size)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size["V"],
        "hidden_size": size["D"],
        "intermediate_size": size["F"],
        "num_hidden_layers": size["L"],
        "num_attention_heads": size["N"],
        "num_key_value_heads": size["K"],
        "head_dim": size["H"],
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": end,
        "torch_dtype": "float32",  # the name that every version reads
    }


def _generation_config(tokenizer: Tokenizer, end: int) -> dict[str, Any]:
    eos = tokenizer.eos_id
    # Without `top_k` they would take the 50 most likely ids alone.
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {"bos_token_id": eos, "eos_token_id": end, "pad_token_id": eos, **drawn}


def _tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's own file without what we do not do: cut texts, fill them up, or add ids to them."""
    file: dict[str, Any] = json.loads(tokenizer.file)
    return {**file, "truncation": None, "padding": None, "post_processor": None}


def _tokenizer_config(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,  # else decoded text is not what was encoded
        "split_special_tokens": True,  # else "<|eos|>" in a text would end it
    }
