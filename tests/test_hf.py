"""An exported folder is read by Hugging Face's names and conventions alone, and gives the numbers that we have."""

import dataclasses
import json
import stat
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from natfp_jax import files, params
from natfp_jax.config import Model
from natfp_jax.errors import UserError
from natfp_jax.hf import export
from natfp_jax.model import head, hidden, logits
from natfp_jax.sample import draw_key, programs_of
from natfp_jax.strategy import Greedy
from natfp_jax.tokenizer import EOS, Tokenizer
from natfp_jax.turns import draw

# Every number differs from what Llama's configuration has by default, so that one left out is found.
GROUPED = Model(width=48, layers=3, heads=6, kv_heads=2, mlp_width=80, tied=False, rope_theta=300.0, norm_epsilon=1e-3)
TIED = Model(width=32, layers=2, heads=2, tied=True, rope_theta=50.0, norm_epsilon=1e-2)
MODELS = {"untied, grouped heads": GROUPED, "tied": TIED}
CONTEXT = 64
TEXTS = [
    "the quick brown fox , isn 't it ?",
    "né le 3 août — 日本",
    "a <|eos|> b",
    EOS,
    f" {EOS}{EOS}",
    "",
    "\n\t two  spaces ",
]


@pytest.fixture(scope="module")
def tokenizer():
    """300 ids, 384 with padding."""
    found = Tokenizer.train(iter(["the quick brown fox", "jumps over it, doesn't it?"] * 20 + TEXTS * 9), 300)
    assert (found.size, found.padded_size) == (300, 384)
    return found


def weights(model, tokenizer, seed=0):
    """Parameters far from their start, the norms among them, so that every one of them matters."""
    random = np.random.default_rng(seed)
    specs = params.table(model, tokenizer.padded_size)
    return params.nest(
        {
            path: jnp.asarray((spec.scale is None) + 0.3 * random.normal(size=spec.shape), jnp.float32)
            for path, spec in specs.items()
        }
    )


def llama(folder, ids):
    """The logits [T, V] of one text, in float64, by what Llama is: https://arxiv.org/abs/2302.13971 and its config.json."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert (config["model_type"], config["architectures"], config["hidden_act"]) == ("llama", ["LlamaForCausalLM"], "silu")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, count = config["head_dim"], len(ids)

    def weight(name):
        return tensors.pop(name).astype(np.float64)  # once each, so that none may be left over

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight(name)

    def linear(x, name):
        return x @ weight(f"{name}.weight").T

    angle = np.arange(count)[:, None] / config["rope_theta"] ** (np.arange(0, width, 2) / width)
    cos, sin = (np.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))

    def rotated(x):
        half = np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1)
        return x * cos + half * sin

    table = weight("model.embed_tokens.weight")
    assert table.shape == (config["vocab_size"], config["hidden_size"])
    x = table[ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        inner = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (linear(inner, f"{at}.self_attn.{name}_proj").reshape(count, -1, width) for name in "qkv")
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, groups, groups)
        q, k = rotated(q), rotated(k)
        out = []
        for number in range(heads):
            group = number // (heads // groups)
            score = q[:, number] @ k[:, group].T / np.sqrt(width)
            score[np.triu_indices(count, 1)] = -np.inf
            part = np.exp(score - score.max(-1, keepdims=True))
            out.append(part / part.sum(-1, keepdims=True) @ v[:, group])
        x = x + linear(np.concatenate(out, axis=-1), f"{at}.self_attn.o_proj")
        inner = norm(x, f"{at}.post_attention_layernorm.weight")
        gate = linear(inner, f"{at}.mlp.gate_proj")
        assert gate.shape[1] == config["intermediate_size"]
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(inner, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    x = norm(x, "model.norm.weight")
    found = x @ table.T if config["tie_word_embeddings"] else linear(x, "lm_head")
    assert not tensors
    return found


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


def ids_of(count, vocabulary, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_llama_of_the_folder_has_our_logits(model, tokenizer, tmp_path):
    tree = weights(model, tokenizer)
    export(tree, model, tokenizer, CONTEXT, tmp_path / "out")
    ids = ids_of(40, tokenizer.size)
    expected = llama(tmp_path / "out", ids)
    found = ours(model, tree, ids, tokenizer.size)[:, : tokenizer.size]
    assert expected.std() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("path", params.table(GROUPED, 384))
def test_every_parameter_counts(path, tokenizer, tmp_path):
    """A parameter that is moved is moved in the folder, so that none of the comparison's numbers comes from elsewhere."""
    tree, ids = weights(GROUPED, tokenizer), ids_of(12, tokenizer.size)
    export(tree, GROUPED, tokenizer, CONTEXT, tmp_path / "one")
    flat = params.flatten(tree)
    export(params.nest({**flat, path: flat[path] * 1.5}), GROUPED, tokenizer, CONTEXT, tmp_path / "other")
    assert np.abs(llama(tmp_path / "one", ids) - llama(tmp_path / "other", ids)).max() > 1e-2


def test_greedy_texts_are_the_llamas(tokenizer, one_device, tmp_path):
    tree, prompts = weights(GROUPED, tokenizer), [[tokenizer.eos_id, *ids_of(n, tokenizer.size, seed=n)] for n in range(5)]
    export(tree, GROUPED, tokenizer, CONTEXT, tmp_path / "out")
    for prompt, text in zip(prompts, greedy(GROUPED, tree, tokenizer, prompts, 8, one_device), strict=True):
        whole = list(prompt)
        for _ in text:
            whole.append(int(llama(tmp_path / "out", whole)[-1].argmax()))
        assert whole[len(prompt) :] == text
        assert len(text) == 8 or text[-1] == tokenizer.eos_id


def test_weights_are_float32_whatever_the_computation_is(tokenizer, tmp_path):
    tree = weights(TIED, tokenizer)
    export(tree, dataclasses.replace(TIED, dtype="bfloat16"), tokenizer, CONTEXT, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_folder_says_what_the_model_is(tokenizer, tmp_path):
    tree = params.nest({path: np.asarray(leaf) for path, leaf in params.flatten(weights(TIED, tokenizer)).items()})
    export(tree, TIED, tokenizer, CONTEXT, tmp_path / "out")
    read = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(read) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config, generation, of_tokenizer = (
        json.loads(read[name].read_text()) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert (config["vocab_size"], config["max_position_embeddings"]) == (tokenizer.size, CONTEXT)
    assert {config[name] for name in ("bos_token_id", "eos_token_id")} == {tokenizer.eos_id}
    assert generation["eos_token_id"] == tokenizer.eos_id
    assert (generation["do_sample"], generation["temperature"], generation["top_k"], generation["top_p"]) == (True, 1, 0, 1)
    assert of_tokenizer["split_special_tokens"]
    with safe_open(read["model.safetensors"], "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in read.values()}) == 1  # readable by the same people


def test_what_ends_a_turn_ends_a_text(tokenizer, tmp_path):
    export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, tmp_path / "out", end=7)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "out" / name).read_text())
        assert (said["eos_token_id"], said["bos_token_id"]) == (7, tokenizer.eos_id)


def test_what_a_tokenizer_file_adds_to_texts_is_left_out(tokenizer, tmp_path):
    """Our ids are without it: a user's file may cut texts, fill them up, or put ids in front."""
    import tokenizers
    from tokenizers import processors

    changed = tokenizers.Tokenizer.from_str(tokenizer.file.decode())
    changed.enable_truncation(3)
    changed.enable_padding(length=9, pad_token=EOS)
    changed.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos_id)])
    user = Tokenizer(changed.to_str().encode())
    export(weights(TIED, tokenizer), TIED, user, CONTEXT, tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs.encode_special_tokens = True  # what `split_special_tokens` sets
    assert [theirs.encode(text).ids for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


# --- what is refused, and what is left behind -------------------------------------------------------------------------


def test_gelu_is_refused(tokenizer, tmp_path):
    model = dataclasses.replace(TIED, mlp="gelu")
    with pytest.raises(UserError, match="'gelu' is not known"):
        export(weights(model, tokenizer), model, tokenizer, CONTEXT, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_not_written_over(kind, tokenizer, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    kept = out / "mine" if kind == "folder" else out
    kept.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, out)
    assert kept.read_text() == "mine"
    assert list(tmp_path.rglob("*")) == ([out, kept] if kind == "folder" else [out])


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
def test_an_empty_folder_is_filled(linked, tokenizer, tmp_path):
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, link if linked else empty)
    assert (empty / "config.json").exists()
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == {empty, link}


def test_folders_above_are_made(tokenizer, tmp_path):
    export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.parametrize("number", range(5))
def test_a_failure_leaves_nothing(number, tokenizer, tmp_path, monkeypatch):
    """Whichever of the five files it hits."""
    before = files.os.fsync
    calls = []

    def fails(descriptor):
        if stat.S_ISREG(files.os.fstat(descriptor).st_mode):
            calls.append(descriptor)
            if len(calls) == number + 1:
                raise OSError(28, "No space left on device")
        return before(descriptor)

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_written_over(tokenizer, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model.safetensors").write_text("half")
    export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_without_safetensors_the_extra_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(UserError, match=r"pip install 'natfp-jax\[hf\]'"):
        export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_an_error(tokenizer, tmp_path):
    tree = weights(TIED, tokenizer)
    with pytest.raises(ValueError, match="256 rows, the tokenizer 384"):
        export({**tree, "embedding": tree["embedding"][:256]}, TIED, tokenizer, CONTEXT, tmp_path / "out")


# --- transformers themselves, where they are installed ----------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_transformers_have_our_logits_and_greedy_texts(model, tokenizer, transformers, one_device, tmp_path):
    import torch

    tree = weights(model, tokenizer)
    export(tree, model, tokenizer, CONTEXT, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == torch.float32
    ids = ids_of(40, tokenizer.size)
    with torch.inference_mode():
        z_TV = theirs(torch.tensor([ids])).logits[0].numpy()
    mine = ours(model, tree, ids, tokenizer.size)[:, : tokenizer.size]
    np.testing.assert_allclose(z_TV, mine, rtol=0, atol=1e-4 * np.abs(mine).max())

    prompts = [[tokenizer.eos_id, *ids_of(length, tokenizer.size, seed=length)] for length in range(10)]
    for prompt, text in zip(prompts, greedy(model, tree, tokenizer, prompts, 24, one_device), strict=True):
        with torch.inference_mode():
            whole = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=24
            )
        assert whole[0, len(prompt) :].tolist() == text


def test_their_tokenizer_has_our_ids(tokenizer, transformers, tmp_path):
    export(weights(TIED, tokenizer), TIED, tokenizer, CONTEXT, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.size, tokenizer.eos_id, tokenizer.eos_id)
    assert theirs.model_max_length == CONTEXT
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert theirs(text)["input_ids"] == theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs(TEXTS)["input_ids"] == tokenizer.encode_batch(TEXTS)
    # What the setting is for: without it the text would end.
    assert tokenizer.eos_id in theirs(TEXTS[2], split_special_tokens=False)["input_ids"]
