"""A study from its file and what the command line sets.

Owns how `configs/*.py` is run, the settings that such a file has of its own, and what of a command line goes where. Must not
know what a study means.
"""

import inspect
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from natfp_jax.config import Study, from_json, override, parsed, to_json
from natfp_jax.errors import UserError

__all__ = ["load_study"]


def load_study(path: Path, assignments: Sequence[str] = ()) -> Study:
    """Runs a study's file and returns its `study`: a `Study`, or a function that returns one.

    The parameters of such a function, which all have defaults, are settings of the file's own. A file may import its
    neighbours, as a program may.

    Args:
      path: the file.
      assignments: `name=value` for a setting of the file's own, `path=value` for a field of the study.

    Raises:
      UserError: there is no such file, it fails, it does not define `study`, or a setting is unknown or has the wrong type.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give a study such as configs/quickstart.py")
    with _as_program(path):
        defined = _tried(path, lambda: runpy.run_path(str(path))).get("study")
        own = _parameters(defined, path) if inspect.isfunction(defined) else {}
        given, rest = dict[str, Any](), list[str]()
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if equals and name in own:
                given[name] = parsed(own[name], text, name)
            else:
                rest.append(assignment)
        study = _tried(path, lambda: defined(**given)) if inspect.isfunction(defined) else defined
    if not isinstance(study, Study):
        raise UserError(f"{path} must define `study = Study(...)`, or a function that returns one, got {type(study).__name__}")
    study = from_json(Study, to_json(study))  # the constructor does not check types; this does
    for assignment in rest:
        name, equals, _ = assignment.partition("=")
        if own and equals and "." not in name and name not in {field.name for field in fields(Study)}:
            raise UserError(f"{path} has no setting {name!r}: its own are {', '.join(own)}, and the fields of a study")
        study = override(study, assignment)
    return study


def _parameters(function: Callable[..., Any], path: Path) -> dict[str, Any]:
    """Each parameter's type."""
    hints = _tried(path, lambda: get_type_hints(function, include_extras=True))
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty or name not in hints:
            raise UserError(f"{path}: the parameter {name} of `study` lacks a default or a type: give both")
        if name in {field.name for field in fields(Study)}:
            raise UserError(f"{path}: the parameter {name} of `study` is a field of every study: give it another name")
    return {name: hints[name] for name in inspect.signature(function).parameters}


def _tried(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except UserError:
        raise
    except Exception as error:  # whatever the user's Python does: one line, with the place it happened
        raise UserError(f"{path} failed: {type(error).__name__}: {' '.join(str(error).split())}") from None


@contextmanager
def _as_program(path: Path) -> Iterator[None]:
    """Lets a file import its neighbours, and forgets those afterwards: another folder's may have the same names."""
    folder, before = path.resolve().parent, set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
            if any(place and folder in Path(place).parents for place in places):
                del sys.modules[name]
