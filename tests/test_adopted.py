"""Published models as arms of a study: their weights, their tokenizers, their texts, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from natfp_jax import texts
from natfp_jax.adoption import adopted
from natfp_jax.audit import audit
from natfp_jax.config import (
    Attribution,
    Conversations,
    Corpus,
    Data,
    Experiment,
    Factor,
    Lora,
    Parent,
    Perturb,
    Published,
    Run,
    Sampling,
    Seeds,
    Stories,
    Study,
)
from natfp_jax.errors import UserError
from natfp_jax.generate import continuations
from natfp_jax.hf_export import export
from natfp_jax.hf_import import imported
from natfp_jax.lineage import weight_hash
from natfp_jax.progress import Progress
from natfp_jax.published import opened
from natfp_jax.report import report
from natfp_jax.stages import Work
from natfp_jax.study import arms
from natfp_jax.tokenizer import EOS, Tokenizer
from natfp_jax.train import check_laid
from natfp_jax.trained import Trained, trained
from tests.references import CONFIGS, VOCABULARY, tensors, write

CORPUS = Corpus(source=Stories(count=600), vocabulary=300, validation_fraction=0.1, prompt_fraction=0.4, shards=2)
SAID = ["the fox jumps over 12 dogs", " né le 3 août — 日本", "a <|end|> b", f"{EOS}", "<s> </s>", "", "\n\t two  spaces "]


def byte_level(words, end="<|end|>"):
    """A tokenizer as GPT-2's and Pythia's: byte-level, one special token, which is the vocabulary's first."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator([f"{words} {n * 7919 % 1000}" for n in range(3000)], trainer)
    assert found.get_vocab_size() == VOCABULARY
    return found


def pieces():
    """A tokenizer as Llama 2's and Mistral's: a mark for a space, bytes where it has no piece, <s> in front of a text."""
    found = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*specials, *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
    )
    found.train_from_iterator(["the fox was told of the dog"] * 9, trainer)
    said = json.loads(found.to_str())
    said["added_tokens"] = said["added_tokens"][:3]  # bytes are no added tokens
    found = tokenizers.Tokenizer.from_str(json.dumps(said))
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


def folder(path, config, tokenizer, seed, begin=0, end=0):
    """A model of random weights, which writes what its seed likes."""
    values = {name: value * (0.3 if value.ndim > 1 else 1) for name, value in tensors(config, seed).items()}
    write(path, {**config, "bos_token_id": begin, "eos_token_id": end}, values)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two of one tokenizer, and a third that has another and another shape."""
    root, one = tmp_path_factory.mktemp("models"), byte_level("the story of a fox")
    return {
        "one": folder(root / "one", CONFIGS["neox"], one, 1),
        "two": folder(root / "two", CONFIGS["neox"], one, 2),
        "far": folder(root / "far", CONFIGS["llama"], pieces(), 3, begin=1, end=2),
        "short": folder(root / "short", CONFIGS["gpt2"], one, 4),
        "window": folder(root / "window", CONFIGS["mistral"], one, 5),
    }


def study(folders, *names, **changes):
    base = Study(
        name="published",
        experiment=Experiment(corpus=CORPUS),
        factors=(Factor("published", tuple(Published(name, str(folders[name])) for name in names)),),
        sampling=Sampling(prompts=150, prompt_chars=20, new_tokens=12, batch=64),
        attribution=Attribution(classifiers=("subwords",)),
    )
    return replace(base, **changes)


def worked(out, given, devices, *stages):
    made = Work(given, out, Progress(quiet=True))
    made.devices = devices
    with made.claimed():
        for stage in stages or ("corpus", "train", "sample", "attribute"):
            getattr(made, stage)()
        if not stages:
            report(made)
    return made


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory, one_device):
    return worked(tmp_path_factory.mktemp("same"), study(folders, "one", "two"), one_device)


@pytest.fixture(scope="module")
def mixed(folders, tmp_path_factory, one_device):
    return worked(tmp_path_factory.mktemp("mixed"), study(folders, "one", "far"), one_device)


# --- a study of them --------------------------------------------------------------------------------------------------


def test_models_that_differ_are_told_apart_and_one_from_itself_is_not(made):
    summary = json.loads((made.folder / "report" / "summary.json").read_text())
    rows = {row["factor"]: row for row in summary["comparisons"]}
    assert rows["published"]["accuracy"] > 0.7
    assert rows["published"]["ceiling"] > 0.9
    assert rows["published"]["ceiling"] >= rows["published"]["accuracy"]
    assert rows["null"]["ceiling"] == 0.5
    assert not summary["reencoded"]
    assert any("published models" in said for said in summary["lacking"])
    page = (made.folder / "report" / "report.md").read_text()
    assert "Not held fixed: what was trained on, and how. As published: one, two." in page
    assert "losses.png" not in page


def test_an_arm_has_the_weights_of_its_folder(made, folders):
    for name in ("one", "two"):
        run, model = made.run_of(name), imported(opened(folders[name]))
        assert run.finished
        (record,) = run.records()
        assert record["weights"] == weight_hash(model.params(384)) == weight_hash(made.params_of(name, 0))
        assert record["published"] == opened(folders[name]).identity
    assert len({made.identities[name].fingerprint for name in ("one", "two")}) == 2


def test_its_texts_are_its_own_tokenizers_and_begin_as_it_was_trained_to(mixed, folders):
    for name in ("one", "far"):
        theirs = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
        (path,) = [path for path in mixed.folder.glob("draws/*draw0*.parquet") if path.name.startswith(name)]
        for row in texts.read(path).slice(0, 40).to_pylist():
            begun = theirs.encode(row["prompt"], add_special_tokens=False).ids  # of itself a text would lose its first space
            whole, before = theirs.decode(begun + row["ids"]), theirs.decode(begun)
            assert row["text"] == (whole.removeprefix(before) if whole.startswith(before) else theirs.decode(row["ids"]))
    begun = mixed.prompts.encoded(mixed.tokenizer_of("far"))
    assert {ids[0] for ids in begun} == {1}
    plain = tokenizers.Tokenizer.from_file(str(folders["far"] / "tokenizer.json"))
    assert begun[:9] == [plain.encode(text).ids for text in mixed.prompts.texts[:9]]


def test_it_goes_on_from_what_is_there_and_audit_proves_it(made, one_device):
    before = {
        path: path.stat().st_mtime_ns
        for path in made.out.rglob("*")
        if path.is_file() and path.name not in (".lock", "timings.json")
    }
    worked(made.out, made.study, one_device)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    claims = audit(made.out, Progress(quiet=True))
    assert {claim.verdict for claim in claims} == {"proven"}, [claim for claim in claims if claim.verdict != "proven"]


def test_arms_of_different_tokenizers_are_compared_by_text_and_the_ceiling_is_said_to_be_no_bound(mixed):
    summary = json.loads((mixed.folder / "report" / "summary.json").read_text())
    rows = {row["factor"]: row for row in summary["comparisons"]}
    assert summary["reencoded"]
    assert rows["published"]["accuracy"] > 0.8
    page = (mixed.folder / "report" / "report.md").read_text()
    assert "The ceiling is an estimate then, and no bound" in page
    assert "the models differ" not in page


def test_one_model_by_two_tokenizers_is_not_told_from_itself(folders, one_device, tmp_path):
    """They differ in a step that does nothing, so the ids are the same: the ceiling must not see what texts do not show."""
    twin = tmp_path / "twin"
    shutil.copytree(folders["one"], twin)
    file = json.loads((twin / "tokenizer.json").read_text())
    (twin / "tokenizer.json").write_text(json.dumps({**file, "normalizer": {"type": "Sequence", "normalizers": []}}))
    work = worked(tmp_path / "out", study({**folders, "twin": twin}, "one", "twin"), one_device)
    summary = json.loads((work.folder / "report" / "summary.json").read_text())
    (row,) = [row for row in summary["comparisons"] if row["factor"] == "published"]
    assert summary["reencoded"]
    assert row["p_value"] > 0.001
    assert (row["ceiling"], row["share"]) == (0.5, None)
    assert "Arms one and twin have the same weights, bit for bit: they are one model." in summary["lacking"]
    false = [claim for claim in audit(work.out, Progress(quiet=True)) if claim.verdict == "false"]
    assert not false
    with pytest.raises(UserError, match="arms one and again are one model: their folders hold the same files"):
        worked(tmp_path / "other", study({**folders, "again": folders["one"]}, "one", "again"), one_device, "corpus")


def test_a_text_that_an_arm_has_no_positions_for_says_nothing(folders, one_device, tmp_path):
    """Bytes of one tokenizer are three ids of the other's: some texts are too long for it, encoded anew."""
    tight = folder(tmp_path / "tight", {**CONFIGS["gpt2"], "n_positions": 64}, pieces(), 6, begin=1, end=2)
    given = study({**folders, "tight": tight}, "one", "tight")
    given = replace(given, sampling=replace(given.sampling, new_tokens=18))
    work = worked(tmp_path / "out", given, one_device)
    tokenizer = work.tokenizer_of("tight")
    (path,) = work.folder.glob("draws/one.step0.draw0*.parquet")
    lengths = [1 + len(tokenizer.encode(row["prompt"] + row["text"])) for row in texts.read(path).to_pylist()]
    assert any(length > 64 for length in lengths)
    assert any(length <= 64 for length in lengths)
    summary = json.loads((work.folder / "report" / "summary.json").read_text())
    (row,) = [row for row in summary["comparisons"] if row["factor"] == "published"]
    assert 0.5 < row["ceiling"] < 1


def test_a_tokenizer_is_the_same_whatever_version_has_written_its_file(tmp_path):
    there = folder(tmp_path, CONFIGS["neox"], byte_level("a fox"), 0)
    found = imported(opened(there))
    before = found.tokenizer
    file = json.loads((there / "tokenizer.json").read_text())
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    for name in ("ignore_merges", "byte_fallback", "dropout"):
        file["model"].pop(name, None)
    (there / "tokenizer.json").write_text(json.dumps(dict(reversed(file.items()))))
    assert found.tokenizer.sha256 == before.sha256


def test_a_kill_while_adopting_costs_nothing(folders, one_device, tmp_path):
    given = study(folders, "one", "two")
    work = worked(tmp_path, given, one_device, "corpus", "train")
    run = work.run_of("one")
    expected = run.record(0)["weights"]
    for left in (run.checkpoints / "0" / "manifest.json", run.folder / "lineage.json"):
        left.unlink()
    assert worked(tmp_path, given, one_device, "corpus", "train").run_of("one").record(0)["weights"] == expected


def test_a_folder_that_changes_is_another_experiment_and_audit_says_what_it_cannot_prove(one_device, tmp_path):
    mine = {name: folder(tmp_path / name, CONFIGS["neox"], byte_level("a fox"), len(name)) for name in ("one", "other")}
    given = study(mine, "one", "other")
    work = worked(tmp_path / "out", given, one_device, "corpus", "train")
    (mine["one"] / "model.safetensors").unlink()
    write(mine["other"], CONFIGS["neox"], tensors(CONFIGS["neox"], seed=9))
    found = {claim.subject: claim for claim in audit(work.out, Progress(quiet=True)) if "published folder" in claim.claim}
    assert found["arm one"].verdict == "recorded"
    assert "has no model.safetensors" in found["arm one"].detail
    assert found["arm other"].verdict == "recorded"
    assert "the folder has changed since" in found["arm other"].detail
    folder(mine["one"], CONFIGS["neox"], byte_level("a fox"), 3)
    with pytest.raises(UserError, match=r"arm other of .* is the experiment"):
        worked(tmp_path / "out", given, one_device, "corpus")


def test_a_run_is_opened_with_its_own_tokenizer(made, folders, one_device):
    source = trained(made.run_of("one").folder, one_device)
    assert (source.end_id, source.context, source.limit) == (0, 64, None)
    assert source.tokenizer.sha256 == made.tokenizer_of("one").sha256


def test_what_was_exported_is_taken_back(tmp_path):
    """Our own model, published: the same weights, bit for bit, and the same ids."""
    llama = imported(opened(folder(tmp_path / "llama", CONFIGS["llama"], byte_level("a fox"), 4)))
    tree, ours = llama.params(384), llama.tokenizer
    export(tree, llama.model, ours, 64, tmp_path / "again")
    again = adopted(Experiment(published=Published("again", str(tmp_path / "again"))))
    assert again.tokenizer.sha256 == imported(opened(tmp_path / "again")).tokenizer.sha256
    assert [again.tokenizer.encode(text) for text in SAID] == [ours.encode(text) for text in SAID]
    assert weight_hash(again.source.params(384)) == weight_hash(tree)


def test_an_export_names_what_begins_and_what_ends_a_text(folders, tmp_path):
    far = adopted(Experiment(published=Published("far", str(folders["far"]))))
    tree = far.source.params(far.tokenizer.padded_size)
    export(tree, far.experiment.model, far.tokenizer, 64, tmp_path / "out", far.source.described.end)
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (said["bos_token"], said["eos_token"]) == (EOS, "</s>")


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte level", "pieces"])
def test_a_published_tokenizer_has_its_own_ids_and_texts(kind, tmp_path):
    theirs = byte_level("a fox") if kind == "byte level" else pieces()
    begin, end = (0, 0) if kind == "byte level" else (1, 2)
    found = imported(opened(folder(tmp_path, CONFIGS["llama"], theirs, 0, begin, end)))
    ours = found.tokenizer
    assert (ours.eos_id, found.described.end, ours.size) == (begin, end, theirs.get_vocab_size())
    theirs.encode_special_tokens = True  # a special token in a text is text
    for text in SAID + CORPUS_TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode([begin, *ids, end]) == theirs.decode(ids)
    stored = tmp_path / "ours.json"
    ours.save(stored)
    assert Tokenizer.load(stored).encode("the fox") == ours.encode("the fox")


CORPUS_TEXTS = [(__doc__ or "")[:n] for n in (1, 7, 40, 200)] + [CORPUS.__doc__ or ""]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.pop("model"), "is no tokenizer"),
        (lambda file: file.update(added_tokens=[]), "the id 0, which begins a text, is no added token"),
        (lambda file: file["model"].update(type="Nonsense"), "is no tokenizer"),
        (lambda file: file["model"]["vocab"].update({f"more{n}": 300 + n for n in range(9)}), "ids up to 308"),
        (lambda file: file["model"].update(vocab=None), "is no tokenizer (model.vocab"),
        (lambda file: file["model"].update(vocab=[1, 2]), "is no tokenizer (model.vocab"),
        (lambda file: file["model"]["vocab"].update({"\ud800": 9}), "is no tokenizer"),
        (lambda file: file["added_tokens"][0].pop("content"), "is no tokenizer (added_tokens.0.content"),
        (lambda file: file.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "is no tokenizer"),
    ],
)
def test_a_tokenizer_that_is_wrong_is_one_line(change, said, tmp_path):
    path = folder(tmp_path, CONFIGS["neox"], byte_level("a fox"), 0)
    file = json.loads((path / "tokenizer.json").read_text())
    change(file)
    (path / "tokenizer.json").write_text(json.dumps(file))
    found = imported(opened(path))
    with pytest.raises(UserError) as caught:
        _ = found.tokenizer
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ({"bos_token_id": None, "eos_token_id": None}, "bos_token_id and eos_token_id are missing"),
        ({"bos_token_id": 300, "eos_token_id": 0}, "the ids 300 that begin or end a text are none of 300"),
        ({"bos_token_id": 0, "eos_token_id": []}, "eos_token_id"),
        ({"bos_token_id": "0", "eos_token_id": 0}, "bos_token_id: "),
    ],
)
def test_ids_that_begin_and_end_a_text_are_ids(ids, said, tmp_path):
    write(tmp_path, {**CONFIGS["neox"], **ids}, tensors(CONFIGS["neox"]))
    with pytest.raises(UserError, match=said):
        imported(opened(tmp_path))


def test_of_several_ends_one_ends_a_text(tmp_path):
    write(tmp_path, {**CONFIGS["neox"], "bos_token_id": 3, "eos_token_id": [7, 8]}, tensors(CONFIGS["neox"]))
    found = imported(opened(tmp_path)).described
    assert (found.begin, found.end) == (3, 7)
    assert "ends a text by the id 7 alone, of 7, 8" in found.notes[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def of(experiment, **changes):
    return replace(experiment, published=Published("one", "one"), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factors": (Factor("published", (Published("a", "x"), Published("a", "y"))),)}, "names a level twice"),
        (
            {"factors": (Factor("published", (Published("a", "x"), Published("b", "y"))), Factor("seeds.init", (0, 1)))},
            "a factor of published models stands alone",
        ),
        ({"experiment": of(Experiment(corpus=CORPUS)), "factors": (Factor("seeds.init", (0, 1)),)}, "are the same experiment"),
        (
            {"experiment": of(Experiment(lora=Lora())), "factors": (Factor("seeds.init", (0, 1)),)},
            "a published model with lora",
        ),
        (
            {"experiment": Experiment(parent=Parent(of(Experiment()))), "factors": (Factor("seeds.order", (0, 1)),)},
            "the parent of arm order0 is a published model",
        ),
        ({"twin": Perturb()}, "a published model with perturb"),
        ({"experiment": Experiment(corpus=Corpus(source=Conversations("c.jsonl")))}, "is not asked in a template"),
    ],
)
def test_what_is_not_done_to_a_published_model_is_refused(changes, said, folders):
    with pytest.raises(UserError, match=said):
        arms(study(folders, "one", "two", **changes))


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        (("one", "short"), {"new_tokens": 60}, "arm short can have 64 tokens, a prompt has up to"),
        (("one", "window"), {"new_tokens": 48}, "arm window can have 50 tokens, a prompt has up to"),
        (("one", "far"), {"new_tokens": (4, 8)}, "arms of different tokenizers share no lengths"),
        (("one", "far"), {"top_k": 20}, "sampling.top_k 20: arms of different tokenizers are compared by whole"),
    ],
)
def test_so_are_texts_that_it_cannot_write(names, changes, said, folders, one_device, tmp_path):
    given = study(folders, *names)
    with pytest.raises(UserError, match=said):
        worked(tmp_path, replace(given, sampling=replace(given.sampling, **changes)), one_device, "corpus")


def test_nor_is_anything_written_where_there_are_no_positions(one_device, tmp_path):
    found = adopted(Experiment(published=Published("a", str(folder(tmp_path / "a", CONFIGS["gpt2"], byte_level("a fox"), 1)))))
    model = Trained(found.experiment, "f", 0, found.source.params(384), found.tokenizer, found.source.described)
    with pytest.raises(UserError, match="tokens and 64 new ones are more than the model can have, 64"):
        continuations(model, "the fox", 1, Sampling(new_tokens=64), one_device)
    data = Data(seq_len=65, windows=8, batch=8)
    with pytest.raises(UserError, match=r"seq_len 65 is more than experiment.model.context 64"):
        check_laid(Experiment(model=found.experiment.model, data=data), 384, Run(), one_device)


def test_rotary_models_may_go_on_beyond_what_they_were_trained_on(folders, one_device, tmp_path):
    """As our own may."""
    given = study(folders, "one", "two")
    work = worked(tmp_path, replace(given, sampling=replace(given.sampling, new_tokens=80)), one_device, "corpus")
    assert work.longest_prompt + 80 > 64


def test_a_name_is_no_part_of_what_it_is(folders):
    """Nor is where it lies, or how a training would be that is none."""
    one = adopted(Experiment(published=Published("one", str(folders["one"]))))
    other = adopted(Experiment(published=Published("other", f"{folders['one']}/."), seeds=Seeds(init=7)))
    assert one.identity == other.identity
    assert one.identity != adopted(Experiment(published=Published("one", str(folders["two"])))).identity
    wide = replace(one.experiment, model=replace(one.experiment.model, dtype="bfloat16"))
    assert replace(one, experiment=wide).identity != one.identity


def test_the_commands(folders, tmp_path):
    """On the devices of the machine; a study's own file, from folders that it is given."""

    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def natfp(*args):
        command = [sys.executable, "-c", "from natfp_jax.cli import main; main()", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)

    few = ["sampling.prompts=60", "sampling.new_tokens=6", "sampling.prompt_chars=20", 'attribution.classifiers=["words"]']
    few += ['experiment.corpus.source={"kind": "stories", "count": 300}', "experiment.corpus.prompt_fraction=0.4"]
    named = f"models={json.dumps([str(folders['one']), str(folders['two'])])}"
    done = natfp("run", "configs/published.py", "--out", tmp_path / "out", named, "experiment.corpus.vocabulary=300", *few)
    assert done.returncode == 0, done.stderr
    assert "published one vs two" in done.stdout
    run = next((tmp_path / "out" / "runs").iterdir())
    told = natfp("generate", run, "--prompt", "the fox", "--new-tokens", 5)
    assert (told.returncode, told.stdout.startswith("the fox")) == (0, True), told.stderr
    wrong = natfp("run", "configs/published.py", "--out", tmp_path / "other", f'models=["{tmp_path}/none", "two"]')
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].endswith("or hf://OWNER/NAME")
    planned = natfp("plan", "configs/published.py", "--topology", "cpu:2")
    assert (planned.returncode, "a plan is of what is trained" in planned.stderr) == (2, True)
