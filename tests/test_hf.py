"""An exported folder is read by Hugging Face's names and conventions alone, and gives the numbers that we have."""

import dataclasses
import json
import stat
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from natfp_jax import files, params
from natfp_jax.config import Llama3Rope, Model
from natfp_jax.errors import UserError
from natfp_jax.hf_export import export
from natfp_jax.hf_import import imported
from natfp_jax.published import opened
from natfp_jax.tokenizer import EOS, Tokenizer
from tests.references import greedy, llama, ours

# Every number differs from what Llama's configuration has by default, so that one left out is found.
GROUPED = Model(width=48, layers=3, heads=6, kv_heads=2, mlp_width=80, tied=False, rope_theta=300.0, norm_epsilon=1e-3)
TIED = Model(width=32, layers=2, heads=2, tied=True, rope_theta=50.0, norm_epsilon=1e-2)
STRETCHED = Model(
    width=32, layers=2, heads=2, head_width=12, biases=("qkv", "o", "mlp"), rope_scaling=Llama3Rope(4.0, 1.0, 3.0, 24)
)
MODELS = {"untied, grouped heads": GROUPED, "tied": TIED, "stretched, with biases and a head width": STRETCHED}
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


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_what_is_exported_is_imported_bit_for_bit(model, tokenizer, tmp_path):
    tree = weights(model, tokenizer)
    export(tree, model, tokenizer, CONTEXT, tmp_path / "out")
    found = imported(opened(tmp_path / "out"))
    filled = dataclasses.replace(model, kv_heads=found.model.kv_heads, head_width=found.model.head_width)
    assert found.model == dataclasses.replace(filled, mlp_width=found.model.mlp_width)
    assert params.dims(found.model, 1) == params.dims(model, 1)
    assert (found.described.vocabulary, found.described.context) == (tokenizer.size, CONTEXT)
    ours, theirs = (params.flatten(some) for some in (tree, found.params(tokenizer.padded_size)))
    assert list(ours) == list(theirs)
    for path, axis in {path: spec.dims.find("V") for path, spec in params.table(model, 384).items()}.items():
        kept = ours[path] if axis < 0 else ours[path].take(np.arange(tokenizer.size), axis=axis)
        there = theirs[path] if axis < 0 else theirs[path].take(np.arange(tokenizer.size), axis=axis)
        np.testing.assert_array_equal(np.asarray(there).view(np.uint32), np.asarray(kept).view(np.uint32), err_msg=path)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "gelu"},
        {"norm": "layer"},
        {"qk_norm": True},
        {"biases": ("qkv",)},
        {"parallel": True},
        {"positions": "learned", "context": 64},
        {"rope_fraction": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_llama_has_not_is_refused(changes, tokenizer, tmp_path):
    model, name = dataclasses.replace(TIED, **changes), next(iter(changes))
    with pytest.raises(UserError, match=rf"model.{name} .* is not known to transformers' Llama"):
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
