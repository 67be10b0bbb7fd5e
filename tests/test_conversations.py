import argparse
import ast
import dataclasses
import gzip
import inspect
import json
import os
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from test_datasets import read, zstd

from natfp_jax.config import Conversations, MachineQA
from natfp_jax.datasets.machine import Machine
from natfp_jax.documents import find
from natfp_jax.errors import Damaged, UserError
from natfp_jax.files import canonical_json
from natfp_jax.progress import Progress


def texts(*conversations):
    """What is read where these, as (role, content), were written."""
    return sorted(canonical_json([{"role": role, "content": text} for role, text in messages]) for messages in conversations)


def line(*messages):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in messages], "other": 1}).encode() + b"\n"


def pair(prompt, response):
    return json.dumps({"prompt": prompt, "response": response}).encode() + b"\n"


def one_line(caught):
    assert "\n" not in str(caught.value)


# --- a user's own -----------------------------------------------------------------------------------------------------

ASKED = (("user", "one"), ("assistant", "two"))
LED = (("system", "be kind"), *ASKED, ("user", "three"), ("assistant", "four"))


def test_both_forms_of_a_line_are_read_from_every_file(tmp_path):
    folder = tmp_path / "talks"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(line(*ASKED) + b"\n" + line(*LED))
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(pair(" five\n", "\tsix ")))
    (folder / "deep" / "c.jsonl.zst").write_bytes(zstd(pair("seven", "eight")))
    (folder / "d.json").write_bytes(b"not for us")
    five, seven = [[("user", user), ("assistant", answer)] for user, answer in (("five", "six"), ("seven", "eight"))]
    assert sorted(read(Conversations(str(folder)), tmp_path / "data")) == texts(ASKED, LED, five, seven)
    for name, expected in (("a.jsonl", (ASKED, LED)), ("deep/b.jsonl.gz", (five,)), ("deep/c.jsonl.zst", (seven,))):
        assert sorted(read(Conversations(str(folder / name)), tmp_path / "data")) == texts(*expected)


def test_what_is_read_back_is_what_was_written(tmp_path):
    odd = ["\0 \0", "é \u2028 \U0001f600", '"}]\\n', "a\n\n b", "x" * 300_000]
    talks = [tuple((role, f"{i}{text}{i}") for text in odd[:i] for role in ("user", "assistant")) for i in range(1, 6)]
    (tmp_path / "talks.jsonl").write_bytes(b"".join(line(*messages) for messages in talks))
    source = Conversations(str(tmp_path / "talks.jsonl"))
    assert sorted(read(source, tmp_path / "data")) == texts(*talks)
    found = find(source, tmp_path / "data", Progress(quiet=True))
    assert re.fullmatch(r"conversations/[0-9a-f]{32}/1\.0\.0\[train\]\.messages", found.identity)


def test_messages_count_where_a_line_has_both_forms(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", **json.loads(line(*LED)), "response": "y"}))
    assert read(Conversations(str(tmp_path / "a.jsonl")), tmp_path / "data") == texts(LED)


def test_data_of_a_changed_file_is_not_reused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(pair("one", "two"))
    status = file.stat()
    before = read(Conversations(str(file)), tmp_path / "data")
    file.write_bytes(pair("one", "six"))  # the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert read(Conversations(str(file)), tmp_path / "data") == [before[0].replace("two", "six")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": ', " is not JSON"),
        (b'{"text": "x"}', r": neither 'messages', or 'prompt' and 'response' \(got fields text\): name"),
        (b'{"prompt": "x"}', r": neither .* \(got fields prompt\)"),
        (b"[1]", r": neither .* \(got list\)"),
        (pair("x", 3), r": no text in field 'response' \(got 3\): mend"),
        (pair("x", "\ud800"), ": half of a surrogate pair"),
        (pair(" ", "x"), ", message 1: the content is empty: mend"),
        (pair("x", "\n"), ", message 2: the content is empty: mend"),
        (b'{"messages": "x"}', ": 'messages' is str, expected a list"),
        (b'{"messages": []}', ": there is no message, expected one of assistant"),
        (b'{"messages": ["x"]}', r", message 1: no text in field 'role' \(got str\): set it"),
        (b'{"messages": [{"role": "user"}]}', r", message 1: no text in field 'content' \(got fields role\): set it"),
        (b'{"messages": [{"role": "user", "content": null}]}', r", message 1: no text in field 'content' \(got null\)"),
        (line(*ASKED, ("tool", "x")), ', message 3: role "tool", expected user: give'),
        (line(("human\n", "x")), r', message 1: role "human\\n", expected system or user'),
        (line(*reversed(ASKED)), ', message 1: role "assistant", expected system or user'),
        (line(*ASKED, ("system", "x"), *ASKED), ', message 3: role "system", expected user'),
        (line(("system", "x"), *LED), ', message 2: role "system", expected user'),
        (line(("user", "x"), *ASKED), ', message 2: role "user", expected assistant'),
        (line(*ASKED, ("assistant", "x")), ', message 3: role "assistant", expected user'),
        (line(*ASKED, ("user", "x")), ": the last message is of user, expected one of assistant"),
        (line(("system", "x")), ": the last message is of system, expected one of assistant"),
    ],
)
def test_what_is_no_conversation_is_told_with_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(line(*LED) + b"\n" + content)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/bad.jsonl, line 3{message}") as caught:
        read(Conversations(str(tmp_path)), tmp_path / "data")
    one_line(caught)
    assert not list((tmp_path / "data").glob("conversations/*/1.0.0"))  # nothing half done is taken for the data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", b"", "there is no file or folder '': set the source's path"),
        ("nowhere", b"", "there is no file or folder '.*nowhere': set the source's path"),
        ("a.json", line(*ASKED), r"a\.json neither is nor holds a file that ends in \.jsonl"),
        ("folder", b"", r"folder neither is nor holds a file that ends in \.jsonl"),
        ("a.jsonl", b" \n\n", r"a\.jsonl has no conversation in it: put one"),
        ("a.jsonl.gz", gzip.compress(line(*ASKED) * 999)[:-30], r"a\.jsonl\.gz cannot be read to its end"),
    ],
)
def test_a_path_without_conversations_is_told_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(Conversations(str(path) if name else ""), tmp_path / "data")
    one_line(caught)


@pytest.mark.parametrize("name", ["features.json", "conversations-train.array_record-00000-of-00001"])
def test_damaged_prepared_conversations_are_told_in_one_line(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(line(*LED) * 9)
    source = Conversations(str(tmp_path / "a.jsonl"))
    read(source, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=f"is damaged: {name} has sha256") as caught:
        read(source, tmp_path / "data")
    one_line(caught)


# --- this machine's ---------------------------------------------------------------------------------------------------


def pairs(monkeypatch, tmp_path, *files):
    """Question → answer of source files, given as (package:path, file), read through TFDS."""
    monkeypatch.setattr(Machine, "files", lambda self: iter(files))
    found = find(MachineQA(), tmp_path / "data", Progress(quiet=True))
    yielded = list(found.builder.conversations())
    documents = found.documents(Progress(quiet=True))
    assert sorted(documents[index] for index in range(len(documents))) == texts(*(messages for _, messages in yielded))
    assert all([role for role, _ in messages] == ["user", "assistant"] for _, messages in yielded)
    asked = {question: answer for _, ((_, question), (_, answer)) in yielded}
    assert len(asked) == len(yielded)
    return asked


@pytest.mark.parametrize("module", [textwrap, shlex, dataclasses, argparse])
def test_questions_and_answers_of_a_module_are_those_that_inspection_finds(monkeypatch, tmp_path, module):
    expected = {module.__name__: (module.__doc__, None)}

    def look(owner):
        for name, thing in vars(owner).items():
            thing = inspect.unwrap(getattr(thing, "fget", getattr(thing, "__func__", thing)))
            known = inspect.isfunction(thing) or inspect.isclass(thing)
            if known and thing.__module__ == module.__name__ and not name.startswith("_"):
                signature = None if inspect.isclass(thing) and "__init__" not in vars(thing) else inspect.signature(thing)
                expected[f"{module.__name__}.{thing.__qualname__}"] = thing.__doc__, signature
                if inspect.isclass(thing):
                    look(thing)

    look(module)
    firsts = {name: " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split()) for name, (doc, _) in expected.items()}
    asked = pairs(monkeypatch, tmp_path, (f"python:{module.__name__}.py", Path(module.__file__)))
    words = re.compile(r"[^\W\d_]|\s")
    assert {question.partition("(")[0]: answer for question, answer in asked.items()} == {
        name: text for name, text in firsts.items() if 20 <= len(text) <= 300 and len(words.findall(text)) >= 0.85 * len(text)
    }
    for question in asked:
        name, bracket, arguments = question.partition("(")
        signature = expected[name][1]
        assert (signature is not None) == bool(bracket)
        if bracket and not arguments.endswith("...)"):
            given = ast.parse(f"def f({arguments}: 0").body[0].args
            for found, kinds in (
                ([one.arg for one in given.args], [inspect.Parameter.POSITIONAL_OR_KEYWORD]),
                ([one.arg for one in given.kwonlyargs], [inspect.Parameter.KEYWORD_ONLY]),
            ):
                assert found == [one.name for one in signature.parameters.values() if one.kind in kinds]


SOURCE = '''
"""What nobody else should import."""

def typed(a: int, /, b: "Long[Annotation]" = -1, *c: int, d=None, e: str = ", ", f=[1, 2], g="thirteen long", **h: int) -> str:
    """Types are left out, and defaults."""
    def local():
        """What nobody else can call."""
    class Local:
        """What nobody else can make."""

def many(first_of_the_arguments, second_of_the_arguments, third_of_the_arguments, fourth_of_the_arguments, fifth=5):
    """Arguments are left out."""

def _private():
    """What nobody else should call."""

def short():
    """Too few letters."""

def long():
    """LONG"""

def table():
    """0 1 2 3 4 5 6 7 8 9 10 11 12 13"""

def broken():
    """Half of a surrogate \\ud800 pair."""

class Class(Base):
    """Something to be made."""

    def __init__(self, size: int, /, *, colour="red"):
        """What is no question."""

    class Inner:
        """Something within it."""

        async def method(self, *, x=None):
            """A line
            that goes on."""

    def __len__(self):
        """What is no question."""

class _Private:
    """What nobody else should make."""
    def method(self):
        """What nobody else should call."""

if True:
    def twice(x):
        """The first of two answers."""
else:
    def twice(x):
        """The second of two answers."""
'''.replace("LONG", "word " * 61)


def test_questions_are_short_public_and_have_one_answer(monkeypatch, tmp_path):
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "title.py").write_text('"""Nothing but\nthe title.\n\nAnd more."""')
    (tmp_path / "broken.py").write_text('def f(:\n    """What does not parse."""')
    files = {
        "p/_src/__init__.py": "source.py",
        "p/title.py": "title.py",
        "p/_private.py": "title.py",
        "p/__main__.py": "title.py",
        "p/bin/no-name.py": "title.py",
        "../title.py": "title.py",
        "p/broken.py": "broken.py",
        "p/absent.py": "absent.py",
    }
    asked = pairs(monkeypatch, tmp_path, *((f"package:{name}", tmp_path / file) for name, file in files.items()))
    assert asked == {
        "p.title": "Nothing but the title.",
        "p._src.typed(a, /, b=-1, *c, d=None, e=..., f=..., g=..., **h)": "Types are left out, and defaults.",
        "p._src.many(first_of_the_arguments, second_of_the_arguments, third_of_the_arguments, ...)": "Arguments are left out.",
        "p._src.Class(size, /, *, colour='red')": "Something to be made.",
        "p._src.Class.Inner": "Something within it.",
        "p._src.Class.Inner.method(self, *, x=None)": "A line that goes on.",
        "p._src.twice(x)": "The first of two answers.",
    }
