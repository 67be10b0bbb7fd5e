"""Our decoder as Hugging Face's transformers know it: a folder of a Llama model.

Owns how our parameters and our tokenizer are called there, how they lie, and what the folder says of them. Must not know runs,
arms or studies, and needs neither transformers nor PyTorch.

Weights are renamed and transposed, and nothing else.
"""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from natfp_jax import files
from natfp_jax.config import Llama3Rope, Model
from natfp_jax.errors import UserError
from natfp_jax.families import LLAMA
from natfp_jax.params import Params, dims, flatten, table
from natfp_jax.tokenizer import EOS, Tokenizer

__all__ = ["export"]

# What a Llama can have besides our default; sizes and numbers are its own.
_LLAMAS = {"biases": ((), ("qkv", "o"), ("mlp",), ("qkv", "o", "mlp"))}
_SIZES = {"width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "tied", "context"}
_NUMBERS = {"rope_theta", "rope_scaling", "norm_epsilon", "init_scale", "dtype"}


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
    if strange := _not_llama(model):
        raise UserError(f"{strange} is not known to transformers' Llama: export another model")
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
            "tokenizer_config.json": _tokenizer_config(tokenizer, context, end),
        }.items():
            with files.whole_file(hidden / name, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        # transformers 4 read no file that does not name a framework, and know no name for NumPy.
        save_file(_tensors(params, model, tokenizer.size), weights, metadata={"format": "pt"})
        shutil.copymode(hidden / "config.json", weights)  # safetensors lets nobody but the owner read it
        with open(weights, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(hidden, folder)
        files.sync(folder.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _tensors(params: Params, model: Model, vocabulary: int) -> dict[str, np.ndarray]:
    """Their name → array."""
    found = dict[str, np.ndarray]()
    for path, spec in table(model, vocabulary).items():
        lies, value = LLAMA.parameters[path], np.asarray(flatten(params)[path], np.float32)
        if "V" in spec.dims:
            value = value.take(range(vocabulary), axis=spec.dims.index("V"))
        layers = value if spec.dims.startswith("L") else [value]
        found |= {lies.name.format(layer): lies.theirs(one, spec.dims.removeprefix("L")) for layer, one in enumerate(layers)}
    return found


def _not_llama(model: Model) -> str | None:
    """A setting that Llama does not have."""
    for one in fields(Model):
        got = getattr(model, one.name)
        if one.name not in _SIZES | _NUMBERS and got not in _LLAMAS.get(one.name, (one.default,)):
            return f"model.{one.name} {got!r}"
    return None


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
        "attention_bias": "qkv" in model.biases,
        "mlp_bias": "mlp" in model.biases,
        **({} if model.rope_scaling is None else {"rope_scaling": _scaling(model.rope_scaling)}),
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": end,
        "torch_dtype": "float32",  # the name that every version reads
    }


def _scaling(given: Llama3Rope) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": given.factor,
        "low_freq_factor": given.low,
        "high_freq_factor": given.high,
        "original_max_position_embeddings": given.context,
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


def _tokenizer_config(tokenizer: Tokenizer, context: int, end: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": next((token for token in tokenizer.specials if tokenizer.special(token) == end), EOS),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,  # else decoded text is not what was encoded
        "split_special_tokens": True,  # else "<|eos|>" in a text would end it
    }
