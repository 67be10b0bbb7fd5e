"""A published folder becomes our decoder with its numbers, or one line that says what is wrong with it."""

import json
import math
import pickle
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from natfp_jax import config as configs
from natfp_jax import mesh, params
from natfp_jax.errors import UserError
from natfp_jax.hf_import import imported
from natfp_jax.published import _WANTED, Folder, located, opened
from natfp_jax.tokenizer import Tokenizer
from tests.references import CONFIGS, CONTEXT, VOCABULARY, definition, greedy, ours, shapes, tensors, write

PADDED = 384
NEOX, GPT_2, LLAMA = CONFIGS["neox"], CONFIGS["gpt2"], CONFIGS["llama"]


def ids_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def leaves(folder, padded=PADDED, shardings=None):
    found = imported(opened(folder))
    return found.model, {path: np.asarray(leaf) for path, leaf in params.flatten(found.params(padded, shardings)).items()}


def assert_same(one, other):
    assert list(one) == list(other)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf.view(np.uint32), other[path].view(np.uint32), err_msg=path)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_are_those_of_the_definition(config, tmp_path):
    found = imported(opened(write(tmp_path, config)))
    ids = ids_of(40)
    expected = definition(config)(tmp_path, ids)
    got = ours(found.model, found.params(PADDED), ids, VOCABULARY)
    assert expected.std() > 1
    np.testing.assert_allclose(got[:, :VOCABULARY], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert (got[:, VOCABULARY:] == -np.inf).all()


@pytest.fixture(scope="module")
def tokenizer():
    """300 ids, 384 with padding, as the folders have."""
    found = Tokenizer.train(iter(["the quick brown fox", "jumps over it, doesn't it?"] * 20), VOCABULARY)
    full = Tokenizer.train(iter([f"{n} {n * 7919 % 1000}" for n in range(4000)]), VOCABULARY)
    found = found if found.size == VOCABULARY else full
    assert (found.size, found.padded_size) == (VOCABULARY, PADDED)
    return found


@pytest.mark.parametrize("name", ["qwen3", "neox", "gpt2"])
def test_greedy_texts_by_the_sampler_are_those_of_the_definition(name, tokenizer, one_device, tmp_path):
    """With a cache, from ragged prompts."""
    config = CONFIGS[name]
    found = imported(opened(write(tmp_path, config)))
    prompts = [ids_of(length, seed=length) for length in (1, 4, 9)]
    for prompt, text in zip(prompts, greedy(found.model, found.params(PADDED), tokenizer, prompts, 6, one_device), strict=True):
        whole = list(prompt)
        for _ in text:
            whole.append(int(definition(config)(tmp_path, whole)[-1].argmax()))
        assert whole[len(prompt) :] == text
        assert len(text) == 6 or text[-1] == tokenizer.eos_id


@pytest.mark.parametrize("name", ["llama with biases", "qwen3", "neox", "gpt2"])
def test_every_tensor_counts(name, tmp_path):
    """None is read in the place of another: one that is moved moves our parameters, and only those that are made of it."""
    config, values = CONFIGS[name], tensors(CONFIGS[name])
    _, before = leaves(write(tmp_path / "before", config, values))
    for number, moved in enumerate(shapes(config)):
        _, after = leaves(write(tmp_path / str(number), config, {**values, moved: values[moved] + 1}))
        changed = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
        fused = 3 if "query_key_value" in moved or "c_attn" in moved else 1
        assert len(changed) == fused, moved
        layers = {path: (after[path] != before[path]).reshape(len(after[path]), -1).any(1) for path in changed}
        assert all(path.startswith("layers/") is False or hit.sum() == 1 for path, hit in layers.items()), moved


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_read_exactly(kind, tmp_path):
    rounded = {name: value.astype(kind) for name, value in tensors(LLAMA).items()}
    _, got = leaves(write(tmp_path / "theirs", LLAMA, rounded))
    _, expected = leaves(write(tmp_path / "wide", LLAMA, {name: value.astype(np.float32) for name, value in rounded.items()}))
    assert_same(got, expected)


@pytest.mark.parametrize("rows", [384, 256])
def test_rows_that_no_id_has_are_zero_or_left_out(rows, tmp_path):
    _, got = leaves(write(tmp_path, LLAMA), padded=rows)
    theirs = tensors(LLAMA)
    there = min(rows, VOCABULARY)
    np.testing.assert_array_equal(got["embedding"][:there], theirs["model.embed_tokens.weight"][:there])
    np.testing.assert_array_equal(got["head"][:, :there], theirs["lm_head.weight"][:there].T)
    assert got["embedding"].shape == (rows, 48)
    assert not got["embedding"][there:].any()
    assert not got["head"][:, there:].any()


# --- where it lies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama with biases", "qwen3", "neox", "gpt2"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (1, 1, 4, 2), (2, 1, 1, 2)])
def test_a_model_that_is_laid_over_devices_is_the_same(shape, name, tmp_path):
    write(tmp_path, CONFIGS[name])
    model, whole = leaves(tmp_path)
    devices = mesh.make(configs.Mesh(*shape), jax.devices()[: math.prod(shape)])
    shardings = mesh.param_shardings(devices, params.table(model, PADDED))
    _, laid = leaves(tmp_path, shardings=shardings)
    assert_same(laid, whole)


@pytest.mark.parametrize(("name", "most"), [("llama", 0.3), ("neox", 0.4)])
def test_a_device_is_given_its_part_and_no_more_is_read_for_it(name, most, tmp_path, monkeypatch):
    """So that a process of many can take its part of a model that it could not hold."""
    found = imported(opened(write(tmp_path, CONFIGS[name])))
    read, before = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: read.append(before(*args)) or read[-1])
    devices = mesh.make(configs.Mesh(1, 1, 4, 2), jax.devices())
    laid = mesh.param_shardings(devices, params.table(found.model, PADDED))
    for path, spec in params.table(found.model, PADDED).items():
        index = params.flatten(laid)[path].devices_indices_map(spec.shape)[jax.devices()[3]]
        found._part(path, spec, index)
    everything = sum(math.prod(shape) for shape in shapes(CONFIGS[name]).values())
    assert sum(value.size for value in read) < most * everything


def test_shards_are_one_model(tmp_path):
    values, folder = tensors(NEOX), tmp_path / "shards"
    names = list(values)
    parts = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NEOX))
    for file, some in parts.items():
        save_file({name: values[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(leaves(folder)[1], leaves(write(tmp_path / "one", NEOX, values))[1])
    assert set(opened(folder).identity) == {"config.json", *parts}


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("neox", "gpt_neox."), ("llama", "model.")])
def test_what_was_saved_without_its_head_has_other_names(name, prefix, tmp_path):
    values = {name.removeprefix(prefix): value for name, value in tensors(CONFIGS[name]).items()}
    write(tmp_path / "bare", CONFIGS[name], values)
    assert_same(leaves(tmp_path / "bare")[1], leaves(write(tmp_path / "whole", CONFIGS[name]))[1])


def test_what_older_versions_saved_beside_the_parameters_is_no_matter(tmp_path):
    beside = {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.bool_),
        "gpt_neox.layers.1.attention.masked_bias": np.float32(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    write(tmp_path / "old", NEOX, {**tensors(NEOX), **{name: np.asarray(value) for name, value in beside.items()}})
    assert_same(leaves(tmp_path / "old")[1], leaves(write(tmp_path / "new", NEOX))[1])


def test_a_window_bounds_the_context(tmp_path):
    found = imported(opened(write(tmp_path, CONFIGS["mistral"]))).described
    assert found.context == 50
    assert "the last 50 tokens" in found.notes[0]
    whole = imported(opened(write(tmp_path / "qwen", CONFIGS["qwen2"]))).described
    assert (whole.context, whole.notes) == (CONTEXT, ())


# --- what is wrong with a folder --------------------------------------------------------------------------------------


def refused(folder):
    """The line that is said of a folder."""
    with pytest.raises(UserError) as caught:
        imported(opened(folder)).params(PADDED)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(values, name):
    return {other: value for other, value in values.items() if other != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, ["model_type 'bert' is not known", "gpt_neox"]),
        ({"model_type": ["llama"]}, ["is not known"]),
        ({"model_type": None}, ["None is not known"]),
        ({"hidden_size": 50}, ["50"]),
        ({"hidden_size": -48}, ["hidden_size: input should be greater than 0"]),
        ({"hidden_size": "48"}, ["hidden_size: input should be a valid integer"]),
        ({"hidden_size": 10**30}, ["hidden_size: "]),
        ({"num_hidden_layers": 10**9}, ["has no tensor 'model.layers.2."]),
        ({"num_hidden_layers": 1}, ["has tensors that a llama", "model.layers.1."]),
        ({"vocab_size": 301}, ["model.embed_tokens.weight has the shape [300, 48], expected [301, 48]"]),
        ({"num_key_value_heads": 3}, ["k_proj.weight has the shape [16, 48], expected [24, 48]"]),
        ({"num_key_value_heads": 5}, ["model.heads 6 is no multiple of model.kv_heads 5"]),
        ({"head_dim": 7}, ["needs an even width"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings: input should be a valid boolean"]),
        ({"hidden_act": "relu"}, ['hidden_act "relu" is not known']),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps: "]),
        ({"rope_theta": -1}, ["rope_theta: "]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ['rope_type "yarn" is not known']),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ['rope_type "llama3" is not known here, with what goes']),
        ({"attention_bias": True}, ["has no tensor 'model.layers.0.self_attn.q_proj.bias'"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings: "]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_description_that_is_wrong_is_one_line(change, said, tmp_path):
    write(tmp_path, {**LLAMA, **change}, tensors(LLAMA))
    found = refused(tmp_path)
    assert all(part in found for part in [str(tmp_path), *said]), found


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("neox", {"rotary_pct": 1.5}, "rotary_pct 1.5 is no part of a head"),
        ("neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type "linear" is not known'),
        ("neox", {"hidden_act": "swish"}, 'hidden_act "swish" is not known here, expected one of gelu'),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"n_positions": 65}, "transformer.wpe.weight has the shape [64, 48], expected [65, 48]"),
        ("gpt2", {"n_head": 5}, "no multiple"),
    ],
)
def test_so_is_one_of_another_family(name, change, said, tmp_path):
    write(tmp_path, {**CONFIGS[name], **change}, tensors(CONFIGS[name]))
    assert said in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ('"llama"', "holds a str"),
        ("\xff\xfe", "is no JSON"),
        ("{}", "model_type None"),
        ('{"model_type": "llama"}', "field required"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_json_is_one_line(text, said, tmp_path):
    write(tmp_path, LLAMA)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert said in refused(tmp_path)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5), st.data())
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(value, data):
    from natfp_jax.families import described

    name = data.draw(st.sampled_from(list(CONFIGS)))
    field = data.draw(st.sampled_from(list(CONFIGS[name])))
    said = ""
    try:
        described({**CONFIGS[name], field: value})
    except UserError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: without(v, "model.layers.1.mlp.up_proj.weight"), "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (
            lambda v: {**v, "model.layers.0.mlp.up_proj.bias": v["model.norm.weight"]},
            "model.layers.0.mlp.up_proj.bias: the model",
        ),
        (
            lambda v: {**v, "model.norm.weight": np.full(48, np.nan, np.float32)},
            "model.norm.weight holds 48 numbers that are not",
        ),
        (lambda v: {**v, "lm_head.weight": v["lm_head.weight"] * np.float32(np.inf)}, "lm_head.weight holds"),
        (lambda v: {**v, "model.norm.weight": np.ones((48, 1), np.float32)}, "has the shape [48, 1], expected [48]"),
        (lambda v: {**v, "model.norm.weight": np.ones(48, np.int32)}, "model.norm.weight is of I32, expected one of"),
        (lambda v: {**v, "model.norm.weight": np.ones((), np.float32)}, "has the shape [], expected [48]"),
    ],
)
def test_tensors_that_are_wrong_are_one_line(change, said, tmp_path):
    write(tmp_path, LLAMA, change(tensors(LLAMA)))
    assert said in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_off_is_one_line(keep, tmp_path):
    path = write(tmp_path, LLAMA) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is no whole safetensors file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"model.norm.weight": 3}}, "has no weight_map"),
        ({"weight_map": {"model.norm.weight": "gone.safetensors"}}, "lacks the file gone.safetensors"),
        (
            {"weight_map": {"model.norm.weight": "../secret.safetensors"}},
            "'../secret.safetensors', expected one of the same folder",
        ),
        ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "'/etc/passwd', expected one of the same folder"),
        ({"weight_map": {"model.norm.weight": "..\\secret.safetensors"}}, "expected one of the same folder"),
        ({"weight_map": {"model.norm.weight": "weights.bin"}}, "that ends in .safetensors"),
        ({"weight_map": {"nothing": "part.safetensors"}}, "has no tensor 'nothing'"),
    ],
)
def test_an_index_that_is_wrong_is_one_line(index, said, tmp_path):
    write(tmp_path / "secret", LLAMA)
    (tmp_path / "secret" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    folder = write(tmp_path / "model", LLAMA)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in refused(folder)


class Runs:
    """What a pickle can do to who opens it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_a_pickle_is_never_opened(tmp_path):
    folder = write(tmp_path, LLAMA)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    expected = leaves(folder)[1]
    assert expected  # beside safetensors it is no matter
    (folder / "model.safetensors").unlink()
    assert "only pytorch_model.bin, which is not opened" in refused(folder)


def test_what_is_no_folder_is_one_line(tmp_path):
    assert "is no folder" in refused(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(LLAMA))
    assert "has no model.safetensors" in refused(tmp_path / "empty")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path, LLAMA)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install 'natfp-jax[hf]'" in refused(tmp_path)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf://", "hf://alone", "hf://a/b/c", "hf://../b", "hf://a/..", "hf://a/b@", "hf://a b/c"])
def test_a_name_that_the_hub_cannot_have_is_one_line(name):
    with pytest.raises(UserError, match="is no name of the hub: give hf://OWNER/NAME"):
        located(name)


def test_the_hub_is_asked_for_no_pickle_and_its_errors_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        if revision is None:
            raise OSError("no network\nat all")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert located("hf://EleutherAI/pythia-160m@step1000") == tmp_path
    assert asked == [("EleutherAI/pythia-160m", "step1000", _WANTED)]
    with pytest.raises(UserError, match=r"hf://a/b could not be brought here \(OSError: no network at all\)"):
        located("hf://a/b")
    assert located("a/b").parts == ("a", "b")


# --- transformers themselves, where they are installed ----------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_transformers_wrote_has_their_logits_and_greedy_texts(name, transformers, tokenizer, one_device, tmp_path):
    import torch

    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[CONFIGS[name]["model_type"]]
    fields = {field: value for field, value in CONFIGS[name].items() if field != "model_type"}
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    found = imported(opened(tmp_path))
    tree, ids = found.params(PADDED), ids_of(40)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    got = ours(found.model, tree, ids, VOCABULARY)[:, :VOCABULARY]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert set(load_file(tmp_path / "model.safetensors")) == set(opened(tmp_path).tensors)
    prompts = [ids_of(length, seed=length) for length in range(1, 8)]
    for prompt, text in zip(prompts, greedy(found.model, tree, tokenizer, prompts, 24, one_device), strict=True):
        with torch.inference_mode():
            whole = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=0,
            )
        assert whole[0, len(prompt) :].tolist() == text
