"""A study's file: what it may define, what the command line sets of it, and what is said of a broken one."""

import sys

import pytest

from natfp_jax.config import Experiment, Optimiser, Study
from natfp_jax.errors import UserError
from natfp_jax.loading import load_study


def refused(*args):
    with pytest.raises(UserError) as caught:
        load_study(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def study_file(folder, text):
    path = folder / "study.py"
    path.write_text("from natfp_jax.config import *\n" + text)
    return path


def test_a_study_is_loaded_with_its_types_made_exact(tmp_path):
    path = study_file(tmp_path, "study = Study(name='a', experiment=Experiment(optimiser=Optimiser(learning_rate=1)))")
    study = load_study(path)
    assert study == Study(name="a", experiment=Experiment(optimiser=Optimiser(learning_rate=1.0)))
    assert isinstance(study.experiment.optimiser.learning_rate, float)  # 1 and 1.0 would have two fingerprints


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1", ["must define `study = Study(...)`", "NoneType"]),
        ("study = 3", ["must define `study = Study(...)`", "int"]),
        ("study = Study(name='a', size=3)", ["failed: TypeError", "size"]),
        ("raise ValueError('one\\ntwo')", ["failed: ValueError: one two"]),
        ("def f(:", ["failed: SyntaxError", "study.py, line 2"]),
        ("import not_installed_anywhere", ["failed: ModuleNotFoundError", "not_installed_anywhere"]),
        ("study = override(Study(name='a'), 'experiment.model.widht=3')", ["did you mean 'experiment.model.width'"]),
        ("study = Study(name='a/b')", ["not a Study: name: "]),
        ("study = Study(name='a', experiment=Model())", ["not a Study: experiment.width: unexpected keyword argument"]),
        ("study = Study(name='a', experiment=Experiment(model=None))", ["experiment.model: input should be an object"]),
        ("study = Study(name='a', experiment=Experiment(model=Model(width='3')))", ["experiment.model.width", "integer"]),
        ("study = Study(name='a', experiment=Experiment(model=Model(rope_theta=float('inf'))))", ["rope_theta", "finite"]),
        ("study = Study(name='a', factors=Factor('seeds.init', (0, 1)))", ["factors: input should be a valid array"]),
        ("study = Study(name='a', factors=(Factor('seeds.init', (0, len)),))", ["builtin_function_or_method"]),
    ],
)
def test_a_broken_study_is_one_line(tmp_path, text, parts):
    message = refused(study_file(tmp_path, text))
    for part in parts:
        assert part in message


def test_a_missing_study(tmp_path):
    assert refused(tmp_path / "none.py") == f"{tmp_path / 'none.py'} is no file: give a study such as " + (
        "configs/quickstart.py"
    )


# --- a function with settings of its own ------------------------------------------------------------------------------

SCALED = """
from typing import Literal

def study(scale: Literal["toy", "small"] = "toy", arms: int = 2) -> Study:
    model = Model(width={"toy": 32, "small": 64}[scale])
    factors = (Factor("seeds.init", tuple(range(arms))),)
    return Study(name=f"scaled-{scale}", experiment=Experiment(model=model), factors=factors)
"""


def test_a_file_may_have_settings_of_its_own(tmp_path):
    path = study_file(tmp_path, SCALED)
    toy, small = load_study(path), load_study(path, ["run.cohort=3", "scale=small", "arms=3", "experiment.model.layers=5"])
    assert (toy.name, toy.experiment.model.width, len(toy.factors[0].levels)) == ("scaled-toy", 32, 2)
    assert (small.name, small.experiment.model.width, len(small.factors[0].levels)) == ("scaled-small", 64, 3)
    assert (small.run.cohort, small.experiment.model.layers) == (3, 5)
    assert load_study(path, ["name=mine"]).name == "mine"


@pytest.mark.parametrize(
    ("text", "assignments", "parts"),
    [
        (SCALED, ["scale=big"], ["scale: got 'big'", "'toy' or 'small'"]),
        (SCALED, ["arms=many"], ["arms: got 'many'", "integer"]),
        (SCALED, ["scael=small"], ["has no setting 'scael'", "scale, arms"]),
        (SCALED, ["experiment.model.widht=3"], ["did you mean 'experiment.model.width'"]),
        (SCALED, ["scale"], ["'scale'", "path=value"]),
        ("study = Study(name='a')", ["scale=small"], ["no field 'scale'"]),
        ("def study(scale): return Study(name='a')", [], ["parameter scale", "default or a type"]),
        ("def study(name: str = 'a'): return Study(name=name)", [], ["parameter name", "another name"]),
        ("def study(): return 3", [], ["or a function that returns one", "int"]),
        ("def study(): raise ValueError('no')", [], ["failed: ValueError: no"]),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, text, assignments, parts):
    message = refused(study_file(tmp_path, text), assignments)
    for part in parts:
        assert part in message


def test_a_file_may_import_its_neighbours_and_only_its_own(tmp_path):
    for number, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        folder.mkdir()
        (folder / "neighbour.py").write_text("from package.inner import NAME\n")
        (folder / "package").mkdir()
        (folder / "package" / "inner.py").write_text(f"NAME = 'study{number}'\n")
    texts = (
        "import neighbour\nstudy = Study(name=neighbour.NAME)",
        "def study():\n import neighbour\n return Study(name=neighbour.NAME)",
    )
    before = list(sys.path)
    for text in texts:
        assert [load_study(study_file(tmp_path / name, text)).name for name in "ab"] == ["study0", "study1"]
    assert sys.path == before
    assert not {"neighbour", "package", "package.inner"} & set(sys.modules)
