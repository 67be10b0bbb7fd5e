"""The command line as its users meet it: real processes for the whole, `main` in this process for what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from natfp_jax import cli, files, processes

NATFP = Path(sys.executable).with_name("natfp")
TINY = """
from natfp_jax.config import Corpus, Data, Experiment, Factor, Model, Sampling, Stories, Study

study = Study(
    name="tiny",
    experiment=Experiment(
        corpus=Corpus(source=Stories(count=2000), vocabulary=300, prompt_fraction=0.2),
        model=Model(width=32, layers=1, heads=2),
        data=Data(seq_len=32, windows=160, batch=16),
    ),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    sampling=Sampling(prompts=100, prompt_chars=20, new_tokens=8, batch=40),
)
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def natfp(*args, **options):
    """A real process with the machine's own devices."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run([NATFP, *map(str, args)], capture_output=True, text=True, env=kept, check=False, **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the whole --------------------------------------------------------------------------------------------------------


def test_run_does_everything_and_stages_one_by_one_give_the_same(tiny, tmp_path):
    missing = natfp("status", tmp_path / "a")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)

    # overrides may stand before and after the option
    whole = natfp("run", tiny, "experiment.seeds.order=3", "--out", tmp_path / "a", "sampling.temperature=0.9")
    assert whole.returncode == 0, whole.stderr
    for name in ("init 0 vs 1 (order 0)", "init (pooled)", "order (pooled)", "all arms", "null of init0-order0"):
        assert name in whole.stdout
    assert "Null: no leak above" in whole.stdout
    for word in ("train", "sample", "attribute"):
        assert word in whole.stderr, "progress belongs to standard error"
    folder = tmp_path / "a" / "studies" / "tiny"
    assert {"summary.json", "report.md", "accuracies.png", "losses.png"} <= {p.name for p in (folder / "report").iterdir()}

    same = ("--out", tmp_path / "b", "experiment.seeds.order=3", "sampling.temperature=0.9")
    assert "run `natfp train` first" in natfp("sample", tiny, *same).stderr
    for stage in ("train", "sample", "attribute"):
        done = natfp(stage, tiny, *same)
        assert done.returncode == 0, done.stderr
        assert ("init (pooled)" in done.stdout) == (stage == "attribute")
        said = natfp("status", tmp_path / "b").stdout
        assert ("missing" in said) == (stage != "attribute")

    summaries = []
    for out in (tmp_path / "a", tmp_path / "b"):
        summary = files.read_json(out / "studies" / "tiny" / "report" / "summary.json")
        files.verify(out / "studies" / "tiny" / "report", summary["files"])
        summaries.append({name: value for name, value in summary.items() if name not in ("stages", "inputs", "files")})
    assert summaries[0] == summaries[1]
    assert all(arm["seeds"]["order"] in (0, 1) for arm in summaries[0]["arms"]), "a factor's levels stand above the base value"

    again = natfp("run", tiny, "--out", tmp_path / "a", "experiment.seeds.order=3", "sampling.temperature=0.9")
    assert again.stdout == whole.stdout
    assert again.stderr == "", "nothing was left to do"


SIGNALLED = """
import os, signal, sys, time
name, handler, study = sys.argv[1:]
number = signal.Signals[name]
signal.signal(number, {"own": signal.SIG_DFL, "ignored": signal.SIG_IGN}[handler])
from natfp_jax import cli, files, processes
def work(*_):
    os.kill(os.getpid(), number)
    time.sleep(2)  # as in a call into JAX: a thread answers
    print("goes on")
cli._stages = work
sys.argv = ["natfp", "run", study]
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_outside_of_training_ends_the_process_at_once_and_says_how_to_go_on(tiny, name):
    def done(handler):
        return subprocess.run(
            [sys.executable, "-c", SIGNALLED, name, handler, tiny], capture_output=True, text=True, check=False
        )

    ended = done("own")
    assert ended.returncode == 75
    assert (ended.stdout, ended.stderr) == ("", "natfp: stopped; the same command goes on from here\n")
    ended = done("ignored")  # whoever started this process, such as nohup, has its own way with the signal
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "goes on\n", "")


def test_help_names_every_verb_and_option():
    said = natfp("--help")
    assert said.returncode == 0
    for verb in ("run", "train", "sample", "attribute", "report", "status", "power"):
        assert verb in said.stdout
    said = natfp("run", "--help")
    assert said.returncode == 0
    for word in ("STUDY", "PATH=VALUE", "--out DIR", "--strict", "--coordinator HOST:PORT", "configs/quickstart.py"):
        assert word in said.stdout


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tiny, tmp_path):
    """Runs `natfp run` in this process, which must end with 2, and returns its one line on standard error."""

    monkeypatch.setattr(processes, "start", lambda *_: None)  # JAX runs in this process already

    def run(*overrides, study=tiny):
        out = tmp_path / "out"
        before = contents(out) if out.exists() else {}
        monkeypatch.setattr(sys, "argv", ["natfp", "run", str(study), "--out", str(out), *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("natfp: ")]
        assert len(lines) == 1, captured.err
        assert captured.err.endswith(f"{lines[0]}\n")
        assert "Traceback" not in captured.err
        after = contents(out) if out.exists() else {}
        assert {path: after.get(path) for path in before} == before, "something was overwritten"
        return lines[0]

    return run


FOLDER = '{"kind": "text_folder", "path": "%s"}'


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.model.widht=64", "experiment.model has no field 'widht': did you mean 'experiment.model.width'?"),
        ("sampling.prompts=many", "sampling.prompts: got 'many', input should be a valid integer"),
        ("experiment.model.mlp=relu", "input should be 'swiglu', 'gelu' or 'gelu_exact'"),
        ("experiment.model.heads=3", "model.width 32 is no multiple of model.heads 3"),
        ("sampling", "override 'sampling' is not of the form path=value"),
        ('factors=[{"path": "seeds.init", "levels": [1]}]', "factor seeds.init has 1 level(s) [1], expected at least two"),
        ('factors=[{"path": "seeds.inti", "levels": [1, 2]}]', "did you mean 'seeds.init'?"),
        ('factors=[{"path": "seeds.init", "levels": [1, "two"]}]', "seeds.init: got 'two', input should be a valid integer"),
        ("experiment.data.batch=12", "steps are not whole: windows 160 x epochs 1 / batch 12 = 13.33"),
        ("experiment.data.batch=20", "experiment.data.batch 20 does not divide over data 8 x fsdp 1 = 8 devices"),
        ("sampling.temperature=0", "sampling.temperature"),
        ("sampling.temperature=[1.0, -0.5]", "sampling.temperature"),
        ("sampling.prompt_file=nowhere.txt", "sampling.prompt_file nowhere.txt is no file"),
        ("run.mesh.tensor=3", "does not multiply to the 8 devices"),
        ('run.mesh={"data": 1, "tensor": 8}', "does not divide over mesh.tensor = 8"),
        ("experiment.data.windows=160000", "the corpus is too small: 160000 windows"),
        ('experiment.data={"seq_len": 128, "windows": 320, "batch": 160}', "expected a batch of 160"),
        ("sampling.prompts=5000", "5000 were asked for"),
        ("sampling.prompt_chars=5000", "has 0 prompts of 5000 characters"),
        ('experiment.corpus.source={"kind": "tfds", "name": "no_such_data"}', "TFDS knows no data set 'no_such_data'"),
    ],
)
def test_a_mistake_is_answered_with_one_line(refused, override, message):
    assert message in refused(override)


def test_what_is_wrong_with_a_study_file_is_one_line(refused, tmp_path):
    assert "no-such.py is no file: give a study" in refused(study=tmp_path / "no-such.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_at_all\n")
    assert "broken.py failed: ModuleNotFoundError" in refused(study=broken)
    broken.write_text("study = 3\n")
    assert "must define `study = Study(...)`, or a function that returns one, got int" in refused(study=broken)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.md", b"text", "has no file that ends in .txt"),
        ("a.txt", b"\xff\xfe broken", "a.txt"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "a.jsonl.*line 2|a.jsonl:2"),
        ("a.jsonl", b'{"text": "fine"}\n\xff\n', "a.jsonl.*line 2|a.jsonl:2"),
        ("a.txt.gz", b"not gzip", "a.txt.gz"),
    ],
)
def test_a_broken_text_folder_is_answered_with_file_and_line(refused, tmp_path, name, data, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(data)
    assert re.search(message, refused("experiment.corpus.source=" + FOLDER % (tmp_path / "texts")))


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(refused, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "somewhere"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused()
    assert "No space left on device" in said
    assert "make room" in said
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_another_study_under_the_same_name_is_refused_with_both_hashes(refused, tmp_path, tiny):
    folder = tmp_path / "out" / "studies" / "tiny"
    folder.mkdir(parents=True)
    files.write_json(folder / "study.json", {"fingerprint": "0123456789abcdef0", "study": {"name": "tiny"}})
    files.write_json(folder / "arms.json", {})
    said = refused()
    assert re.search(r"holds the study 0123456789abcdef, expected [0-9a-f]{16} \(they differ in ", said)
