"""How near published models are, once imported: logits, greedy texts and ids beside Hugging Face transformers'.

    python -m benchmarks.elsewhere

Random small models of every family, written by transformers themselves, every parameter moved away from where it began; their
tokenizers are trained here and saved by them. What is compared is float32 on this machine's processor.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers

from benchmarks import report
from natfp_jax import config, mesh
from natfp_jax.datasets.machine import Machine
from natfp_jax.hf_import import Imported, imported
from natfp_jax.model import head, hidden, logits
from natfp_jax.params import Params
from natfp_jax.published import opened
from natfp_jax.sample import draw_key, programs_of
from natfp_jax.strategy import Greedy
from natfp_jax.turns import draw

__all__ = ["main"]

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "elsewhere"
VOCABULARY, PROMPTS, NEW, TOKENS = 1000, 16, 32, 96
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", GROUPED),
    "Llama 3.1, tied": ("llama", {**GROUPED, "rope_parameters": STRETCHED, "tie_word_embeddings": True}),
    "Mistral, heads of their own width": ("mistral", {**GROUPED, "head_dim": 24, "sliding_window": None}),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen3": ("qwen3", {**GROUPED, "head_dim": 32}),
    "GPT-NeoX (Pythia)": ("gpt_neox", {**SIZES, "rotary_pct": 0.25}),
    "GPT-NeoX, one behind the other": ("gpt_neox", {**SIZES, "use_parallel_residual": False}),
    "GPT-2": ("gpt2", {"n_embd": 96, "n_layer": 4, "n_head": 6, "n_positions": 128}),
}


def trained(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE as GPT-2's, Pythia's, Qwen's and Llama 3's."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return found


def written(folder: Path, kind: str, fields: dict[str, Any], bpe: tokenizers.Tokenizer, seed: int) -> Any:
    """A folder of one model and its tokenizer; their model."""
    torch.manual_seed(seed)
    described = transformers.CONFIG_MAPPING[kind](**fields, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_config(described).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named).save_pretrained(folder)
    return theirs


def greedy(found: Imported, params: Params, prompts: list[list[int]], devices: jax.sharding.Mesh) -> list[list[int]]:
    """The most likely continuation of each prompt by our sampler, with a cache."""
    strategy = (Greedy(),)
    programs = programs_of(found.model, strategy, VOCABULARY, len(params["embedding"]), 0, PROMPTS, devices)
    keys = [draw_key(0, "parity", 0, strategy, 0)]
    (drawn,) = draw(programs, programs.weights([lambda: params]), keys, range(len(prompts)), prompts, NEW)
    return [ids_W[:length].tolist() for ids_W, length in zip(drawn.id_NW, drawn.length_N, strict=True)]


def compared(kind: str, fields: dict[str, Any], texts: Sequence[str], seed: int) -> dict[str, float]:
    """One model: the largest difference of logits, as a part of the largest; greedy texts and ids that agree, as parts."""
    devices = mesh.make(config.Mesh(), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        theirs = written(folder, kind, fields, trained(texts), seed)
        found = imported(opened(folder))
        ours = found.tokenizer
        params = found.params(ours.padded_size)
        # By the class that wrote it: that of a family would put its own way to cut texts in the place of the file's.
        their_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (4, TOKENS))
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        got = np.asarray(logits(hidden(found.model, params, jnp.asarray(ids)), head(params), VOCABULARY))[..., :VOCABULARY]
    prompts = [[0, *ids[0, :length].tolist()] for length in range(PROMPTS)]
    same = 0
    for prompt, text in zip(prompts, greedy(found, params, prompts, devices), strict=True):
        with torch.inference_mode():
            whole = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=NEW
            )
        same += whole[0, len(prompt) :].tolist() == text
    their_ids = [their_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    agree = sum(one == other for one, other in zip(their_ids, ours.encode_batch(texts), strict=True))
    largest = float(np.abs(got - expected).max() / np.abs(expected).max())
    return {"logits": largest, "greedy": same / len(prompts), "ids": agree / len(texts)}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elsewhere", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=3, help="of each family")
    parser.add_argument("--texts", type=int, default=1000, help="documents of this machine that are encoded")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    texts = [one.text for _, one in zip(range(arguments.texts), Machine.here().docstrings(), strict=False)]
    rows, kept = [], []
    for name, (kind, fields) in FAMILIES.items():
        found = [compared(kind, fields, texts, seed) for seed in range(arguments.models)]
        worst = max(one["logits"] for one in found)
        parts = [min(one[field] for one in found) for field in ("greedy", "ids")]
        rows.append([name, len(found), f"{worst:.1e}", *(f"{100 * part:.1f} %" for part in parts)])
        kept.append({"family": name, "kind": kind, "fields": fields, "models": found})
    title = f"imported models beside transformers {transformers.__version__}, float32; of each column the worst model"
    columns = ["family", "models", "logits, relative", f"greedy texts of {NEW} tokens", f"ids of {len(texts)} documents"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "parity.txt").write_text(report.show(title, columns, rows, width=140))
    result = {"versions": report.versions(), "machine": report.machine(), "families": kept}
    (RESULTS / "parity.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
