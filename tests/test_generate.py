"""One model by the folder of its checkpoint: the right weights and tokenizer, and texts to look at."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from natfp_jax import cli, generate
from natfp_jax.config import Conversations, Corpus, Data, Experiment, Model, Optimiser, Sampling, Template
from natfp_jax.corpus import prepare
from natfp_jax.errors import Damaged, UserError
from natfp_jax.generate import continuations
from natfp_jax.lineage import weight_hash
from natfp_jax.progress import Progress
from natfp_jax.tokenizer import EOS, Tokenizer
from natfp_jax.trained import trained
from natfp_jax.turns import draw


@pytest.fixture(scope="module")
def out(tiny_run, tiny_store, tmp_path_factory):
    """An output folder with one run and its corpus."""
    folder = tmp_path_factory.mktemp("out")
    shutil.copytree(tiny_run.folder, folder / "runs" / "0123")
    shutil.copytree(tiny_store.folder, folder / "corpora" / "abc")
    return folder


@pytest.fixture
def copy(out, tmp_path):
    return SimpleNamespace(run=shutil.copytree(out, tmp_path / "out") / "runs" / "0123", out=tmp_path / "out")


def test_a_checkpoint_is_opened_by_its_folder_and_a_run_at_its_last(out, tiny, tiny_run, tiny_store, one_device):
    for path, step in ((out / "runs" / "0123" / "checkpoints" / "4", 4), (out / "runs" / "0123", 16)):
        found = trained(path, one_device)
        assert (found.step, found.experiment.model, found.context) == (step, tiny.model, 32)
        assert weight_hash(found.params) == tiny_run.record(step)["weights"]
        assert found.tokenizer.sha256 == tiny_store.tokenizer.sha256
        assert found.fingerprint == tiny_run.owner()


def test_a_folder_may_be_given_from_within_it(out, one_device, monkeypatch):
    monkeypatch.chdir(out / "runs" / "0123")
    assert trained(Path(), one_device).step == 16


def test_texts_begin_with_nothing_but_the_prompt_and_have_noise_of_their_own(out, one_device):
    model = trained(out / "runs" / "0123", one_device)
    texts = continuations(model, "One day", 5, Sampling(new_tokens=20), one_device)
    assert len(set(texts)) == 5
    assert texts == continuations(model, "One day", 5, Sampling(new_tokens=20), one_device)
    assert texts[:3] == continuations(model, "One day", 3, Sampling(new_tokens=20), one_device)
    assert texts == continuations(model, "One day", 11, Sampling(new_tokens=20), one_device)[:5]
    assert texts[:2] != continuations(model, "One day", 5, Sampling(new_tokens=20, seed=1), one_device)[:2]
    greedy = continuations(model, "One day", 2, Sampling(new_tokens=20, greedy=True), one_device)
    assert greedy[0] == greedy[1]
    assert any(continuations(model, "", 3, Sampling(new_tokens=20), one_device))


def test_a_prompt_must_fit_and_its_text_is_no_special_token(out, one_device):
    model = trained(out / "runs" / "0123", one_device)
    assert model.tokenizer.encode(EOS).count(model.tokenizer.eos_id) == 0
    with pytest.raises(
        UserError, match=r"the prompt has \d+ tokens with EOS, the model was trained on 32 at a time: shorten it"
    ):
        continuations(model, EOS * 20, 1, Sampling(), one_device)
    with pytest.raises(UserError, match=r"the prompt is not UTF-8 \(character 2\): give it as UTF-8"):
        continuations(model, "a\udcff", 1, Sampling(), one_device)


def test_what_is_no_checkpoint_gives_one_line(copy, one_device, tmp_path):
    run = copy.run
    for path, said in (
        (run / "checkpoints", "is no checkpoint: give OUT/runs/RUN/checkpoints/STEP"),
        (run / "checkpoints" / "5", "has no whole checkpoint at step 5, it has [0, 4, 8, 16]"),
        (tmp_path / "nowhere", "is no checkpoint: give OUT/runs/RUN/checkpoints/STEP"),
    ):
        with pytest.raises(UserError) as caught:
            trained(path, one_device)
        assert said in str(caught.value)
    for step in (0, 4, 8, 16):
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no whole checkpoint yet: train it first"):
        trained(run, one_device)


def test_the_tokenizer_is_the_one_that_the_model_was_trained_with(copy, out, one_device, tmp_path):
    shutil.rmtree(copy.out / "corpora")
    with pytest.raises(UserError, match=r"give its tokenizer\.json"):
        trained(copy.run, one_device)
    given = out / "corpora" / "abc" / "tokenizer.json"
    assert trained(copy.run, one_device, given).tokenizer.size == 300
    other = tmp_path / "other.json"
    other.write_text(given.read_text() + "\n")
    with pytest.raises(UserError, match="the model was trained with"):
        trained(copy.run, one_device, other)


def test_damaged_weights_are_not_drawn_from(copy, one_device):
    arrays = max((copy.run / "checkpoints" / "16" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    with pytest.raises(Damaged):
        trained(copy.run, one_device)
    refused = natfp("generate", copy.run)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith(": run its study again, which makes it anew, or give another checkpoint\n")


def natfp(*args):
    command = [sys.executable, "-c", "from natfp_jax.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands(out, tmp_path):
    run = out / "runs" / "0123"
    prompt = "x =\t:warning: [bold]"
    done = natfp("generate", run, "--prompt", prompt, "--texts", "2", "--new-tokens", "12")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("─" * 100 + "\n")
    assert first.startswith(prompt)
    assert second.startswith(prompt)
    for args, said in (
        (("--temperature", "0"), "a temperature is 0.0001 or more; greedy=true takes the most likely id, always"),
        (("--texts", "0"), "--texts 0: give a number of texts, 1 or more"),
        (("--greedy", "--top-k", "3"), "greedy takes the most likely id, always: leave out"),
    ):
        refused = natfp("generate", run, *args)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
    (tmp_path / "file").touch()
    refused = natfp("export", run, tmp_path / "file" / "llama")
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.endswith(": make room or give another folder\n")
    exported = natfp("export", run, tmp_path / "llama")
    assert exported.returncode == 0, exported.stderr
    assert {path.name for path in (tmp_path / "llama").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert np.array([path.stat().st_size for path in (tmp_path / "llama").iterdir()]).min() > 0


# --- a model of conversations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answering(train_arm, tmp_path_factory):
    """The run of a model that has learnt to answer "Yes." and to end its turn, where EOS ends nothing."""
    root = tmp_path_factory.mktemp("answering")
    asked = [f"Is {n} one?" for n in range(200)]
    (root / "talks.jsonl").write_text("".join(json.dumps({"prompt": text, "response": "Yes."}) + "\n" for text in asked))
    library = tokenizers.Tokenizer.from_str(Tokenizer.train(iter(asked), 270).file.decode())
    library.add_special_tokens(["<|user|>", "<|model|>", "<|end|>"])
    library.save(str(root / "tokenizer.json"))
    template = Template("{content}", "<|user|>{content}<|end|>", "<|model|>{content}", "<|end|>")
    source = Conversations(str(root / "talks.jsonl"))
    corpus = Corpus(source, template, tokenizer=str(root / "tokenizer.json"), validation_fraction=0.3)
    store = prepare(corpus, root / "out", Progress(quiet=True))
    data = Data(seq_len=32, windows=32, epochs=15, batch=8)
    experiment = Experiment(corpus, Model(width=32, layers=1, heads=2), data, Optimiser(learning_rate=1e-2))
    return train_arm(experiment, root / "out" / "runs" / "0123", store=store)


def test_a_model_of_conversations_is_asked_in_its_template_and_ends_with_its_turn(answering, one_device, monkeypatch):
    model, calls = trained(answering.folder, one_device), []

    def seen(*args):
        calls.append((args[4], draw(*args)))
        return calls[-1][1]

    monkeypatch.setattr(generate, "draw", seen)
    greedy = Sampling(new_tokens=8, greedy=True)
    for prompt in ("Is 7 one?", "  Is 7 one?\n", "Is <|end|> one?"):
        assert continuations(model, prompt, 2, greedy, one_device) == ["Yes.", "Yes."]
        asked, (drawn,) = calls[-1]
        tokenizer, (user, answer, end) = model.tokenizer, map(model.tokenizer.special, ("<|user|>", "<|model|>", "<|end|>"))
        assert asked == [[tokenizer.eos_id, user, *tokenizer.encode(prompt.strip()), end, answer]] * 2
        assert drawn.id_NW[0, : drawn.length_N[0]].tolist() == [*tokenizer.encode("Yes."), end]
        assert drawn.length_N[0] < 8
        assert end != tokenizer.eos_id


def test_a_question_must_be_one_and_fit(answering, one_device):
    model = trained(answering.folder, one_device)
    for prompt in ("", " \n"):
        with pytest.raises(UserError, match=r"is asked nothing: give a question \(--prompt\)"):
            continuations(model, prompt, 1, Sampling(), one_device)
    with pytest.raises(UserError, match="the prompt has 33 tokens with EOS, the model was trained on 32 at a time"):
        continuations(model, "!" * 29, 1, Sampling(), one_device)


def test_the_command_writes_question_and_answer_on_lines_of_their_own(answering, one_device, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_trained", lambda path, tokenizer: (trained(path, one_device, tokenizer), one_device))
    cli.generate(answering.folder, prompt="Is 7 one?", greedy=True, new_tokens=8)
    assert capsys.readouterr().out == "Is 7 one?\nYes.\n"
