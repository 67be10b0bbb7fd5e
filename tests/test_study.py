"""Which arms, draws and comparisons a study has: the pairs hold everything else fixed, the classes are balanced."""

import functools
import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natfp_jax.config import (
    Attribution,
    Data,
    Experiment,
    Factor,
    MachineDocs,
    Model,
    Parent,
    Perturb,
    Sampling,
    Seeds,
    Stories,
    Study,
    TextFolder,
    Tfds,
    to_json,
)
from natfp_jax.errors import UserError
from natfp_jax.study import arms, comparisons, decisive, draws, labels, lacking

LEVELS = {
    "seeds.init": (0, 1, 2, 3),
    "seeds.order": (7, 3, 5, 9),
    "model.width": (32, 64, 96, 128),
    "optimiser.learning_rate": (1e-3, 2e-3, 3e-3, 4e-3),
}


@st.composite
def studies(draw):
    """One to three factors of two to four levels, either design, with and without a twin, one to three checkpoints."""
    paths = draw(st.lists(st.sampled_from(sorted(LEVELS)), min_size=1, max_size=3, unique=True))
    return Study(
        name="s",
        experiment=Experiment(data=Data(windows=3200, batch=32)),
        factors=tuple(Factor(path, LEVELS[path][: draw(st.integers(2, 4))]) for path in paths),
        design=draw(st.sampled_from(["crossed", "one_at_a_time"])),
        twin=draw(st.sampled_from([None, Perturb(), Perturb(ulps=-3)])),
        sampling=Sampling(checkpoints=draw(st.sampled_from([(1.0,), (0.0, 1.0), (1.0, 0.25, 0.25)]))),
    )


def flat(value, path=""):
    if not isinstance(value, dict):
        return {path: value}
    return {where: leaf for name, one in value.items() for where, leaf in flat(one, f"{path}.{name}".lstrip(".")).items()}


@functools.cache
def fields(experiment):
    """Dotted path → value, of everything in an experiment."""
    return flat(to_json(experiment))


def differing(a, b):
    """The dotted fields in which two experiments differ, whatever `arms` says about them."""
    a, b = fields(a), fields(b)
    return {path for path in {**a, **b} if a.get(path, "absent") != b.get(path, "absent")}


def refused(study, *words):
    for function in (arms, comparisons, draws):
        with pytest.raises(UserError) as error:
            function(study)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)


# --- arms -------------------------------------------------------------------------------------------------------------


@given(studies())
def test_arms_are_the_design_and_differ_in_nothing_else(study):
    found, paths = arms(study), [factor.path for factor in study.factors]
    grid = [arm for arm in found if not arm.twin]
    assert len({arm.id for arm in found}) == len(found)
    assert len({repr(arm.experiment) for arm in found}) == len(found)
    assert grid[0].levels == tuple(str(factor.levels[0]) for factor in study.factors), "the base arm comes first"

    cells = {tuple(fields(arm.experiment)[path] for path in paths) for arm in grid}
    every = set(itertools.product(*(factor.levels for factor in study.factors)))
    if study.design == "one_at_a_time":
        base = tuple(factor.levels[0] for factor in study.factors)
        every = {cell for cell in every if sum(a != b for a, b in zip(cell, base, strict=True)) <= 1}
    assert cells == every
    assert len(grid) == len(every)
    for arm in grid:
        assert differing(study.experiment, arm.experiment) <= set(paths)
        assert arm.levels == tuple(str(fields(arm.experiment)[path]) for path in paths)


@given(studies())
def test_the_twin_is_the_base_arm_but_for_its_perturbation(study):
    found = arms(study)
    twins = [arm for arm in found if arm.twin]
    assert len(twins) == (study.twin is not None)
    for twin in twins:
        assert twin == found[-1]
        assert {path.split(".")[0] for path in differing(found[0].experiment, twin.experiment)} == {"perturb"}
        assert twin.experiment.perturb == study.twin
    assert all(arm.experiment.perturb is None for arm in found if not arm.twin)


def test_ids_are_readable_and_stand_as_file_names():
    study = Study(name="s", factors=(Factor("seeds.init", (0, 1)), Factor("optimiser.schedule", ("cosine", "linear"))))
    assert [arm.id for arm in arms(study)] == [
        "init0-schedulecosine",
        "init0-schedulelinear",
        "init1-schedulecosine",
        "init1-schedulelinear",
    ]
    # texts with slashes, whole configurations, and two that are alike once the slashes are gone
    levels = (Stories(), MachineDocs(), TextFolder(path="/a/b" * 60), TextFolder(path="/a_b" * 60), TextFolder(path="/../../c"))
    study = Study(name="s", factors=(Factor("corpus.source", levels),))
    found = arms(study)
    assert found == arms(study)
    assert len({arm.id for arm in found}) == len(levels)
    for arm in found:
        assert set("/\\\"' {}:") & set(arm.id) == set()
        assert len(arm.id) < 150


# --- comparisons ------------------------------------------------------------------------------------------------------


@given(studies())
def test_pairs_along_a_factor_hold_all_others_fixed(study):
    found, by_id = comparisons(study), {arm.id: arm for arm in arms(study)}
    for factor in study.factors:
        pairs = [c for c in found if c.factor == factor.name and "(pooled)" not in c.name]
        wanted = {
            frozenset((a.id, b.id))
            for a, b in itertools.combinations(by_id.values(), 2)
            if not a.twin and not b.twin and differing(a.experiment, b.experiment) == {factor.path}
        }
        for step in {c.step for c in found}:
            named = [frozenset(draw.arm for draw in c.draws) for c in pairs if c.step == step]
            assert set(named) == wanted
            assert len(named) == len(wanted)
        for pair in pairs:
            assert len(pair.classes) == len(pair.draws) == 2
            a, b = (by_id[draw.arm].experiment for draw in pair.draws)
            assert differing(a, b) == {factor.path}
            for label, (draw,) in pair.classes.items():
                assert label == str(fields(by_id[draw.arm].experiment)[factor.path])
                assert f" {label}" in pair.name
            others = [o for o in study.factors if o is not factor and study.design == "crossed"]  # else at the base's level
            for other in others:  # what is held fixed is said
                assert f"{other.name} {fields(a)[other.path]}" in pair.name


@given(studies())
def test_pooled_classes_are_balanced_over_the_other_factors(study):
    found, by_id = comparisons(study), {arm.id: arm for arm in arms(study)}
    pooled = [c for c in found if c.name.endswith("(pooled)")]
    if study.design == "crossed" and len(study.factors) > 1:
        assert {c.factor for c in pooled} == {factor.name for factor in study.factors}
    for comparison in pooled:
        (factor,) = (f for f in study.factors if f.name == comparison.factor)
        rest = []
        for label, sources in comparison.classes.items():
            values = [fields(by_id[draw.arm].experiment) for draw in sources]
            assert {str(one[factor.path]) for one in values} == {label}
            assert len(set(sources)) == len(sources)
            others = [tuple(one[f.path] for f in study.factors if f is not factor) for one in values]
            rest.append(sorted(others))
        assert all(one == rest[0] for one in rest)
        assert len(comparison.classes) == len(factor.levels)
        if study.design == "crossed":
            every = itertools.product(*(f.levels for f in study.factors if f is not factor))
            assert rest[0] == sorted(every)


@given(studies())
def test_classes_have_equally_many_draws_and_controls_stand_at_every_checkpoint(study):
    found, by_id = comparisons(study), {arm.id: arm for arm in arms(study)}
    base, steps = next(iter(by_id)), {round(f * study.experiment.steps) for f in study.sampling.checkpoints}
    assert {c.step for c in found} == steps
    for comparison in found:
        assert len({len(pooled) for pooled in comparison.classes.values()}) == 1
        assert len(comparison.classes) > 1
        assert len(set(comparison.draws)) == len(comparison.draws), "no draw is on two sides"
        assert {draw.step for draw in comparison.draws} == {comparison.step}
    assert len({(c.name, c.step) for c in found}) == len(found)
    for step in steps:
        (null,) = (c for c in found if c.step == step and c.factor == "null")
        assert [tuple(draw) for draw in null.draws] == [(base, step, 0, None), (base, step, 1, None)]
        twins = [c for c in found if c.step == step and c.factor == "twin"]
        assert len(twins) == (study.twin is not None)
        for twin in twins:
            assert {draw.arm for draw in twin.draws} == {base, list(by_id)[-1]}
        grid = [arm.id for arm in by_id.values() if not arm.twin]
        everything = [c for c in found if c.step == step and c.factor == "all"]
        assert len(everything) == (len(grid) > 2)
        for comparison in everything:
            assert list(comparison.classes) == grid


@given(studies())
def test_one_comparison_of_each_factor_and_control_decides_in_the_end(study):
    every = comparisons(study)
    found = decisive(every)
    assert [one.factor for one in found] == list(dict.fromkeys(one.factor for one in every if one.factor != "all"))
    for one in found:
        assert one.step == max(other.step for other in every)
        rivals = [other for other in every if (other.factor, other.step, other.setting) == (one.factor, one.step, one.setting)]
        assert len(rivals) == 1 or one.name == f"{one.factor} (pooled)"


@given(studies())
def test_draws_lists_each_needed_draw_once(study):
    listed = draws(study)
    assert len(set(listed)) == len(listed)
    assert set(listed) == {draw for comparison in comparisons(study) for draw in comparison.draws}
    # every arm at every checkpoint, and the second draw of the base arm
    assert len(listed) == (len(arms(study)) + 1) * len(set(study.sampling.checkpoints))


def test_arms_of_unequal_length_are_compared_at_the_same_fraction():
    study = Study(
        name="s",
        experiment=Experiment(data=Data(windows=640)),
        factors=(Factor("data.batch", (32, 16, 64)),),
        sampling=Sampling(checkpoints=(0.0, 0.5, 1.0)),
    )
    for comparison in comparisons(study):
        steps = {draw.arm: draw.step for draw in comparison.draws}
        wanted = {"batch32": comparison.step, "batch16": 2 * comparison.step, "batch64": comparison.step // 2}
        assert steps == {arm: wanted[arm] for arm in steps}
    names = [[c.name for c in comparisons(study) if c.step == step] for step in (0, 10, 20)]
    assert names[0] == names[1] == names[2] != []


# --- refused ----------------------------------------------------------------------------------------------------------

INIT, ORDER = Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((), ("no factors", "seeds.init")),
        ((Factor("seeds.init", ()),), ("seeds.init", "at least two")),
        ((Factor("seeds.init", (3,)),), ("seeds.init", "at least two", "3")),
        ((INIT, Factor("seeds.order", (1, 2, 1))), ("seeds.order", "twice")),
        ((Factor("seeds.inti", (0, 1)),), ("'inti'", "did you mean 'seeds.init'?")),
        ((Factor("sedes.init", (0, 1)),), ("'sedes'", "did you mean 'seeds'?")),
        ((Factor("seeds", (0, 1)),), ("seeds",)),
        ((Factor("seeds.init.deeper", (0, 1)),), ("seeds.init", "'deeper'")),
        ((Factor("seeds.init", (0, "one")),), ("seeds.init", "'one'", "integer")),
        ((Factor("seeds.init", (0, 1.5)),), ("seeds.init", "1.5")),
        ((Factor("seeds.init", (0, -1)),), ("seeds.init", "-1")),
        ((Factor("optimiser.schedule", ("cosine", "cosin")),), ("optimiser.schedule", "'cosin'", "'linear'")),
        ((INIT, ORDER, Factor("seeds.init", (2, 3))), ("share a name", "seeds.init")),
        ((Factor("data.batch", (32, 48)),), ("steps are not whole", "48")),
    ],
)
@pytest.mark.parametrize("design", ["crossed", "one_at_a_time"])
def test_wrong_factors_are_refused_in_one_line(factors, words, design):
    refused(Study(name="s", factors=factors, design=design), *words)


def test_two_factors_of_one_short_name_are_refused():
    experiment = Experiment(model=Experiment().model, perturb=Perturb())
    factors = (Factor("perturb.index", (0, 1)), Factor("perturb.index", (2, 3)))
    refused(Study(name="s", experiment=experiment, factors=factors), "share a name")


@pytest.mark.parametrize(
    "fields",
    [
        {"factors": (Factor("optimiser.learning_rate", (1, 1.0)),)},  # two ways to write one level
        {"factors": (Factor("perturb", (None, Perturb())),), "twin": Perturb()},
    ],
)
def test_arms_that_are_the_same_experiment_are_refused(fields):
    """They would share a run and its noise: two draws that are one."""
    refused(Study(name="s", **fields), "are the same experiment")


def test_one_factor_may_vary_what_another_varies_alone():
    """Init, order, and both together: each arm differs from the base in its own factor and nothing else."""
    both = Factor("seeds", (Seeds(0, 5), Seeds(1, 6), Seeds(2, 7)))
    factors = (Factor("seeds.init", (0, 1, 2)), Factor("seeds.order", (5, 6, 7)), both)
    found = arms(Study(name="s", factors=factors, design="one_at_a_time", twin=Perturb()))
    seeds = {arm.id: (arm.experiment.seeds.init, arm.experiment.seeds.order) for arm in found}
    assert seeds == {
        **{"base": (0, 5), "init1": (1, 5), "init2": (2, 5), "order6": (0, 6), "order7": (0, 7)},
        **{"seedsinit1+order6": (1, 6), "seedsinit2+order7": (2, 7), "base-twin": (0, 5)},
    }
    refused(Study(name="s", factors=factors), "seeds and seeds.init set the same field", "one_at_a_time")
    other = Factor("seeds", (Seeds(3, 5), Seeds(1, 6)))
    for both in ((other, factors[0]), (factors[0], other)):  # whichever is set last
        refused(Study(name="s", factors=both, design="one_at_a_time"), "seeds and seeds.init", "make them agree")


def test_levels_of_many_fields_are_called_by_what_differs():
    assert labels(Factor("model", (Model(), Model(width=64, heads=2)))) == ["width128+heads4", "width64+heads2"]
    assert labels(Factor("corpus.source", (MachineDocs(), Stories(count=9)))) == ["machine_docs", "stories"]
    assert labels(Factor("corpus.source", (Stories(seed=1), Stories(seed=2)))) == ["seed1", "seed2"]
    assert labels(Factor("corpus.source", (Tfds("wiki40b/en"), Tfds("lm1b")))) == ["wiki40b/en", "lm1b"]
    assert labels(Factor("optimiser", ({"kind": "lion"}, {"learning_rate": 1e-3}))) == ["lion", "learning_rate0.001"]
    refused(Study(name="s", factors=(Factor("seeds", (Seeds(),)),)), "seeds", "at least two")
    assert labels(Factor("perturb", (None, Perturb()))) == ["none", "perturb"]
    assert labels(Factor("perturb", (Perturb(), None, Perturb(ulps=8)))) == ["ulps1", "none", "ulps8"]
    assert labels(Factor("parent", (Parent(Experiment()), None))) == ["parent", "none"]
    assert Factor("parent.experiment.parent.experiment.seeds.init", (0, 1)).name == "parent_parent_init"


@given(studies(), st.sampled_from([(), (3,), (4, 3), (9,)]))
def test_of_many_levels_the_first_few_are_told_apart_too(study, counts):
    plain, more = comparisons(study), comparisons(replace(study, attribution=Attribution(class_counts=counts)))
    assert [one for one in more if "levels" not in one.name] == plain
    assert decisive(more) == decisive(plain)
    added = [one for one in more if one not in plain]
    levels = {factor.name: labels(factor) for factor in study.factors}
    steps = len({one.step for one in plain})
    wanted = [(name, count) for name, some in levels.items() for count in counts if count < len(some)]
    assert len(added) == steps * len(wanted)
    for one in added:
        assert list(one.classes) == levels[one.factor][: len(one.classes)]
        assert (one.factor, len(one.classes)) in wanted
        assert len({len(some) for some in one.classes.values()}) == 1, "chance is one over the classes"


def test_a_twin_that_moves_nothing_is_refused():
    refused(Study(name="s", factors=(INIT,), twin=Perturb(ulps=0)), "twin.ulps is 0")


def test_a_study_says_what_it_cannot_show():
    without = " ".join(lacking(Study(name="s", factors=(INIT,))))
    assert "No twin" in without
    assert "No other-data" in without
    assert "init has 2 levels" in without
    whole = Study(name="s", factors=(Factor("seeds.init", tuple(range(5))), Factor("corpus.source.seed", tuple(range(5)))))
    assert [said for said in lacking(whole) if "twin" not in said] == []


def test_near_fractions_of_few_steps_are_compared_once():
    """Steps 0 and 0, 2 and 4, of arms with 400 and 50 steps: a draw meets two checkpoints of the other arm."""
    study = Study(
        name="batches",
        experiment=Experiment(data=Data(windows=12_800)),
        factors=(Factor("data.batch", (256, 32)),),
        sampling=Sampling(checkpoints=(0.005, 0.01, 1.0)),
    )
    found = comparisons(study)
    assert len({tuple(comparison.draws) for comparison in found}) == len(found)
    assert {comparison.factor for comparison in found} == {"batch", "null"}


def test_temperatures_are_drawn_each_and_lengths_share_their_texts():
    factors = (Factor("seeds.init", (0, 1)),)
    one, several = (
        Study(name="sweep", factors=factors, sampling=Sampling(temperature=temperature, new_tokens=tokens))
        for temperature, tokens in ((0.7, 32), ((1.0, 0.7, 1.0), (32, 8)))
    )
    found = comparisons(several)
    assert [c.name for c in found] == [c.name for c in comparisons(one)] * 4
    settings = [
        "temperature 1.0, 8 tokens",
        "temperature 1.0, 32 tokens",
        "temperature 0.7, 8 tokens",
        "temperature 0.7, 32 tokens",
    ]
    assert list(dict.fromkeys(c.setting for c in found)) == settings
    assert len(draws(several)) == 2 * len(draws(one)), "lengths need no draws of their own"
    for comparison in found:
        (warmth,) = {draw.temperature for draw in comparison.draws}
        assert f"temperature {warmth}, {comparison.length} tokens" == comparison.setting
    assert {(c.length, c.setting) for c in comparisons(one)} == {(32, "")}
    names = [name for draw in draws(several) for name in draw.files(100, 40)]
    assert len(set(names)) == len(names) == 3 * len(draws(several))
    assert names[0] == "init0.step200.t1.0.draw0-00000-of-00003.parquet"
    assert draws(one)[0].files(80, 40)[1] == "init0.step200.draw0-00001-of-00002.parquet"


@pytest.mark.parametrize("path", ["corpus.vocabulary", "corpus.prompt_fraction", "corpus.tokenizer_bytes"])
def test_what_all_arms_share_is_no_factor(path):
    with pytest.raises(UserError, match=r"only corpus\.source can be a factor"):
        arms(Study(name="shared", factors=(Factor(path, (512, 1024)),)))
