"""Folders in an object store: whole, sealed and one writer's, as those of a file system are.

`memory://` is fsspec's store within one process; `gs://` is a server of this process that gcsfs and TensorStore really talk to.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import jax
import numpy as np
import pytest

if not (find_spec("gcsfs") and find_spec("upath")):  # gcsfs reads the environment when it is imported
    pytest.skip("needs the extra gcs", allow_module_level=True)

from natfp_jax import checkpoint, cli, config, files, flags, lock, places, runs, texts
from natfp_jax.checkpoint import Checkpoints
from natfp_jax.corpus import opened, prepare
from natfp_jax.errors import Damaged, UserError
from natfp_jax.lineage import weight_hash
from natfp_jax.progress import Progress
from natfp_jax.share import Share
from natfp_jax.workspace import Workspace
from tests import test_texts
from tests.stores import google
from tests.test_checkpoint import RECORD, moments, saved, template

numbers = itertools.count()


@pytest.fixture(scope="module")
def bucket():
    with google.bucket() as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(params=["gs", "memory"])
def folder(request, bucket):
    return places.place(f"{request.param}://bucket/folder{next(numbers)}")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in places.names(folder)}


def changed(path):
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_path_without_a_scheme_is_one_of_this_machine(tmp_path):
    assert places.place(str(tmp_path)) == tmp_path
    assert not places.remote(places.place(str(tmp_path)))
    assert places.here(tmp_path) == tmp_path


def test_what_cannot_be_a_store_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for text, said in {
        "s3://bucket/out": "pip install 'natfp-jax[s3]'",
        "gss://bucket/out": "no object store is called gss://",
        "gs://": "gs://bucket/folder",
        "file:///tmp/out": "give a folder",
    }.items():
        with pytest.raises(UserError) as caught:
            places.place(text)
        assert said in str(caught.value)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_line_refuses_them_too(monkeypatch, capsys, bucket, tmp_path):
    (tmp_path / "study.py").write_text("from natfp_jax.config import Study\nstudy = Study(name='tiny')\n")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys, "argv", ["natfp", "run", str(tmp_path / "study.py"), "--out", "s3://bucket/out"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    for wrong, said in {"gs://nobucket/out": "cannot be reached", "gs://bucket/empty": "has no studies"}.items():
        monkeypatch.setattr(sys, "argv", ["natfp", "status", wrong])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert f"natfp: {wrong} {said}" in capsys.readouterr().err


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(folder):
    path = folder / "a" / "b.txt"
    with files.whole_file(path, "w", encoding="utf-8") as file:
        file.write("ünd\n")
        assert not path.exists()
    assert path.read_bytes() == "ünd\n".encode()
    with pytest.raises(ZeroDivisionError), files.whole_file(path) as file:
        file.write(bytes([1 // 0]))
    assert contents(folder) == {"a/b.txt": "ünd\n".encode()}


def test_any_changed_byte_of_a_sealed_file_is_found(folder):
    path = folder / "sealed.json"
    files.write_json(path, {"one": 1, "two": [2.5, "ü"]})
    assert files.read_json(path) == {"one": 1, "two": [2.5, "ü"]}
    whole = path.read_bytes()
    for place in range(0, len(whole), 1 if "memory" in str(path) else 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError):
            files.read_json(path)


def test_a_manifest_finds_what_is_changed_missing_or_more(folder, tmp_path):
    for root in (folder, tmp_path):
        places.make(root / "b")
        for name, data in {"a.bin": b"0123", "b/c.bin": b"", "b/d.bin": os.urandom(1000)}.items():
            (root / name).write_bytes(data)
    listed = files.manifest(folder)
    assert {name: listed[name] for name in ("a.bin", "b/c.bin")} == files.manifest(tmp_path, ["a.bin", "b/c.bin"])
    files.verify(folder, listed, whole=True)
    (folder / "more.bin").write_bytes(b"")
    with pytest.raises(Damaged, match=r"more\.bin is not in its manifest"):
        files.verify(folder, listed, whole=True)
    changed(folder / "b" / "d.bin")
    with pytest.raises(Damaged, match=r"b/d\.bin has sha256"):
        files.verify(folder, listed)
    (folder / "a.bin").unlink()
    with pytest.raises(Damaged, match=r"a\.bin is missing"):
        files.verify(folder, listed)


def test_what_is_set_aside_is_all_there_under_another_name(folder):
    for name in ("x/1", "x/y/2", "xx/3"):
        (folder / name).write_bytes(name.encode())
    assert files.set_aside(folder / "x").name == "x.damaged"
    (folder / "x").write_bytes(b"a file")
    assert files.set_aside(folder / "x").name == "x.damaged-2"
    assert contents(folder) == {"x.damaged/1": b"x/1", "x.damaged/y/2": b"x/y/2", "x.damaged-2": b"a file", "xx/3": b"xx/3"}


def test_a_copy_on_this_machine_has_what_was_written(folder):
    for name in ("a", "b/c"):
        (folder / name).write_bytes(os.urandom(500))
    listed, there = files.manifest(folder), contents(folder)
    own = files.fetched(folder, listed)
    assert {name: (own / name).read_bytes() for name in listed} == there
    changed(own / "a")
    changed(folder / "b" / "c")  # not read: the copy is whole
    assert {name: (files.fetched(folder, listed) / name).read_bytes() for name in listed} == there
    (own / "b" / "c").unlink()
    with pytest.raises(Damaged, match="b/c has 500 bytes and sha256") as caught:
        files.fetched(folder, listed)
    assert caught.value.path == folder
    assert places.names(own) == {"a"}


def test_texts_come_back_and_damage_is_found(folder):
    path = folder / "draws" / "one.parquet"
    texts.write(path, test_texts.COLUMNS, test_texts.RECORD)
    assert texts.exists(path)
    assert texts.read_record(path) == test_texts.RECORD
    assert texts.read(path).to_pydict() == test_texts.COLUMNS
    changed(path)
    with pytest.raises(Damaged, match="sha256"):
        texts.read(path)


# --- one writer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Flags that are renewed and given up a hundred times as fast."""
    monkeypatch.setattr(flags, "RENEWED", 0.15)
    monkeypatch.setattr(flags, "GONE", 1.5)
    monkeypatch.setattr(flags, "_PAUSE", 0.1)


def test_a_folder_is_one_holders_until_he_leaves(folder, quick):
    assert not lock.held(folder)
    with lock.alone(folder):
        assert lock.held(folder)
        assert str(os.getpid()) in lock.holder(folder)
        with pytest.raises(UserError, match=f"in use by another process .pid {os.getpid()} on"), lock.alone(folder):
            pass
        assert lock.held(folder)
    assert not lock.held(folder)
    with lock.alone(folder):
        pass


def test_of_many_that_wait_one_at_a_time_gets_in(folder, quick):
    inside, most, entered = [], [], []

    def enter(number):
        with lock.alone(folder, wait=True):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)
            entered.append(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert sorted(entered) == list(range(5))


def elsewhere(folder):
    """The flag of a process on another machine."""
    flag = folder / lock.LOCK / "0123.json"
    said = {"holder": "pid 1 on far", "machine": "another", "process": [1, "1"]}
    return lambda number: flag.write_text(json.dumps({**said, "renewed": number}))


def test_who_renews_a_flag_elsewhere_is_not_disturbed(folder, quick):
    renew, done = elsewhere(folder), threading.Event()
    renew(0)

    def at_work():
        for number in itertools.count(1):
            if done.wait(0.2):
                return
            renew(number)

    thread = threading.Thread(target=at_work)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by another process \(pid 1 on far\)"), lock.alone(folder):
            pass
    finally:
        done.set()
        thread.join()


def test_a_flag_that_nobody_renews_is_given_up(folder, quick):
    elsewhere(folder)(0)
    begun = time.monotonic()
    with lock.alone(folder):
        assert time.monotonic() - begun > flags.GONE
        assert [path.name for path in (folder / lock.LOCK).iterdir() if path.name == "0123.json"] == []


def test_a_task_that_was_killed_elsewhere_does_not_keep_the_study_from_who_shares_it_otherwise(folder, quick):
    study = config.Study("shared", factors=(config.Factor("seeds.init", (0, 1)),))
    elsewhere(folder / "studies" / "shared" / "tasks" / "0-of-4")(0)
    for mine in (None, Share(0, 2)):
        with Workspace(study, folder, Progress(quiet=True), mine).claimed():
            pass


HOLDER = """
import sys, time
from natfp_jax import flags, lock, places
flags.RENEWED = 0.2
with lock.alone(places.place(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holding(bucket):
    """A folder, and another process that holds it."""
    where = places.place(f"gs://bucket/folder{next(numbers)}")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(where)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "holds\n"
        yield where, process
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_process_of_this_machine_held_is_free_at_once(holding):
    where, process = holding
    with pytest.raises(UserError, match=f"pid {process.pid} on"), lock.alone(where):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = time.monotonic()
    with lock.alone(where):
        assert time.monotonic() - begun < flags.GONE / 2


def test_who_was_taken_for_gone_ends_itself(holding):
    where, process = holding
    for path in (where / lock.LOCK).glob("*.json"):
        path.with_suffix(".gone").write_text("")
    assert not lock.held(where)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    said = [line for line in errors.splitlines() if line.startswith("natfp: ")]
    assert len(said) == 1
    assert f"{where} could not be held" in said[0]


# --- what is written step by step -------------------------------------------------------------------------------------


def test_a_log_in_a_store_is_the_one_of_a_folder(folder, tmp_path):
    paths = [tmp_path / "metrics.jsonl", folder / "metrics.jsonl"]
    for path in paths:
        log = runs.MetricsLog(path, -1, 10, tensorboard=False)
        for step in range(8):
            log.write(step, loss=1 / (step + 1))
        log.settle()
        again = runs.MetricsLog(path, 3, 10, tensorboard=False)  # resumed at 3
        again.write(4, loss=0.25)
        again.settle()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [line["step"] for line in runs.metrics(paths[1])[0]] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="tensorboard"):
        runs.MetricsLog(paths[1], -1, 10, tensorboard=True)


def test_a_checkpoint_in_a_store_comes_back_bit_for_bit(folder):
    place = folder / "run" / "checkpoints"
    assert checkpoint.steps(place) == []
    tree, abstract = saved(place, 5, 8, keep=1)
    assert checkpoint.steps(place) == checkpoint.sealed(place) == [8]
    assert checkpoint.record(place, 8) == {**RECORD, "step": 8}
    checkpoint.verify(place, 8)
    params, optimiser = checkpoint.restore(place, 8, abstract, template(moments(tree)))
    assert weight_hash(params) == weight_hash(tree)
    for got, expected in zip(jax.tree.leaves(optimiser), jax.tree.leaves(moments(tree)), strict=True):
        assert np.array_equal(got, expected)
    with Checkpoints(place) as checkpoints:  # another process goes on
        checkpoints.save(9, tree, moments(tree), {**RECORD, "step": 9})
    assert checkpoint.steps(place) == [8, 9]
    assert {name.partition("/")[0] for name in places.names(place)} == {"8", "9"}
    changed(place / "8" / max(name for name in files.read_json(place / "8" / files.MANIFEST)["files"] if "/d/" in name))
    with pytest.raises(Damaged, match="sha256"):
        checkpoint.verify(place, 8)
    (place / "9" / files.MANIFEST).unlink()
    with pytest.raises(Damaged, match="stopped while it saved"):
        checkpoint.steps(place)


def test_a_token_store_is_made_once_and_read_from_a_copy(folder, tiny_store):
    made = prepare(config.from_json(config.Corpus, tiny_store.meta["corpus"]), folder, Progress(quiet=True))
    assert (made.sha256, made.tokenizer.sha256) == (tiny_store.sha256, tiny_store.tokenizer.sha256)
    there = folder / "corpora" / made.folder.name
    assert {name.rpartition("/")[2] for name in places.names(there)} >= {"meta.json", *made.meta["store"]}
    before = contents(there)
    for path in made.folder.iterdir():
        path.unlink()
    again = opened(there)
    assert np.array_equal(again.windows(64, 20).rows(np.arange(20)), tiny_store.windows(64, 20).rows(np.arange(20)))
    assert contents(there) == before
    for path in again.folder.iterdir():
        path.unlink()
    changed(there / "validation.bin")
    with pytest.raises(Damaged, match="validation") as caught:
        opened(there)
    assert caught.value.path == there
