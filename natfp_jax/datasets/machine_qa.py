"""Questions and answers that every machine has: what a function, class or module is called → what its docstring says first.

Owns how a signature is written and what counts as an answer.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from natfp_jax.datasets.builder import ConversationBuilder
from natfp_jax.datasets.machine import Definition, Docstring, Machine, is_prose

__all__ = ["MachineQA"]

_QUESTION = 100  # characters at most
_ANSWER = range(20, 301)  # characters
_DEFAULT = 12  # characters of a default at most


class MachineQA(ConversationBuilder):
    """The signature of a public function or class, or the title of a module → the first paragraph of its docstring.

    An answer is one line of 20 to 300 characters, mostly words; a question has at most 100 characters and one answer.
    """

    def __init__(self, *, data_dir: str | Path) -> None:
        self._machine = Machine.here()
        super().__init__(
            data_dir=data_dir,
            inputs=self._machine.name,
            description=f"Questions and answers from the docstrings of {', '.join(self._machine.parts)}",
        )

    def conversations(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields (package, file and line; question of the user and answer of the assistant)."""
        asked = set()
        for docstring in self._machine.docstrings():
            question, answer = _question(docstring), _first_paragraph(docstring.text)
            if question and question not in asked and len(answer) in _ANSWER and is_prose(answer):
                asked.add(question)
                yield f"{docstring.file}:{docstring.line}", [("user", question), ("assistant", answer)]


def _first_paragraph(docstring: str) -> str:
    """On one line."""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0].split())


def _question(docstring: Docstring) -> str | None:
    """What is asked for a docstring; None where that is private, local, too long, or no name that could be imported."""
    module = PurePosixPath(docstring.file.partition(":")[2]).with_suffix("").parts
    if module[-1] == "__init__":
        module = module[:-1]
    owners = docstring.owners
    own = tuple(owner.name for owner in owners) or module[-1:]
    # Of what is in a private module much is public under another name: packages export it from a `_src`.
    private = any(name.startswith("_") for name in own)
    local = any(not isinstance(owner, ast.ClassDef) for owner in owners[:-1])
    if private or local or not module or not all(map(str.isidentifier, module)):
        return None
    return _signed(".".join((*module, *(owner.name for owner in owners))), _arguments(owners[-1]) if owners else None)


def _signed(name: str, arguments: ast.arguments | None) -> str | None:
    """A name and its arguments, of which the last become `...` where there is no room for all."""
    if arguments is None:
        return name if len(name) <= _QUESTION else None
    written = ast.unparse(arguments).split(", ")  # no default has a comma in it
    for kept in range(len(written), -1, -1):
        question = f"{name}({', '.join(written[:kept] + ['...'] * (kept < len(written)))})"
        if len(question) <= _QUESTION:
            return question
    return None


def _arguments(definition: Definition) -> ast.arguments | None:
    """Those that a caller gives, as `inspect.signature` has it: of a class those of its own `__init__`, but for `self`."""
    if not isinstance(definition, ast.ClassDef):
        return _short(definition.args)
    for statement in reversed(definition.body):  # the last one counts
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            short = _short(statement.args)
            del (short.posonlyargs or short.args)[:1]
            return short
    return None


def _short(arguments: ast.arguments) -> ast.arguments:
    """A copy without annotations, and with `...` for each default that is long or no plain constant or name."""
    return ast.arguments(
        posonlyargs=[ast.arg(one.arg) for one in arguments.posonlyargs],
        args=[ast.arg(one.arg) for one in arguments.args],
        vararg=arguments.vararg and ast.arg(arguments.vararg.arg),
        kwonlyargs=[ast.arg(one.arg) for one in arguments.kwonlyargs],
        kw_defaults=[one and _plain(one) for one in arguments.kw_defaults],
        kwarg=arguments.kwarg and ast.arg(arguments.kwarg.arg),
        defaults=[_plain(one) for one in arguments.defaults],
    )


def _plain(default: ast.expr) -> ast.expr:
    number = default.operand if isinstance(default, ast.UnaryOp) else default  # -1 is an operation on 1
    if isinstance(number, ast.Constant | ast.Name):
        written = ast.unparse(default)
        if len(written) <= _DEFAULT and "," not in written:
            return default
    return ast.Constant(...)
