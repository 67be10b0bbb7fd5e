"""What a study consists of: arms, draws and comparisons.

Owns how factors and controls become arms, which draws are needed, and which sets of draws are compared. Pure: must not know
files, devices or stages.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from natfp_jax.config import Experiment, Factor, Model, Parent, Sampling, Seeds, Study, replace, to_json
from natfp_jax.contrast import differences
from natfp_jax.errors import UserError
from natfp_jax.files import canonical_json, hash_json

__all__ = [
    "PARENT_OF",
    "Arm",
    "Comparison",
    "Draw",
    "Grid",
    "answers",
    "arms",
    "comparisons",
    "decisive",
    "draws",
    "grids",
    "kept_fractions",
    "labels",
    "lacking",
    "parents",
    "settled",
]

PARENT_OF = "parent of "  # how a parent's name begins; an arm's has no space
_NOT_OF_WEIGHTS = ("dtype", "init_scale")  # what of a model can differ from its parent's


@dataclass(frozen=True)
class Arm:
    """One cell of a study."""

    id: str  # such as "init0-order1"; one at a time "base", and "init1" for what differs from it in that alone
    levels: tuple[str, ...]  # of each factor, in the study's order
    experiment: Experiment
    twin: bool = False


class Draw(NamedTuple):
    """One sampling of one arm at one checkpoint; number 1 is the second draw of the null."""

    arm: str
    step: int
    number: int = 0
    temperature: float | None = None  # None: the only one of the study

    @property
    def name(self) -> str:
        """What it is called."""
        warmth = "" if self.temperature is None else f".t{self.temperature}"
        return f"{self.arm}.step{self.step}{warmth}.draw{self.number}"

    def drawn_at(self, sampling: Sampling) -> float:
        """Its temperature."""
        return sampling.temperatures[0] if self.temperature is None else self.temperature

    def files(self, texts: int, each: int) -> list[str]:
        """The names of its files, so many texts in each, as Hugging Face `datasets` names the parts of a split."""
        count = -(-texts // each)
        return [f"{self.name}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


@dataclass(frozen=True)
class Comparison:
    """Classes, each of the draws of one or more arms, to be told apart."""

    name: str
    factor: str  # a factor's name, or "all", "null", "twin"
    step: int
    classes: dict[str, tuple[Draw, ...]]
    length: int  # tokens of each text that are compared, at most
    setting: str = ""  # temperature and length in words, where the study has several

    @property
    def title(self) -> str:
        """Its name and its setting."""
        return ", ".join(part for part in (self.name, self.setting) if part)

    @property
    def draws(self) -> list[Draw]:
        """All draws, in the order of the classes."""
        return [draw for pooled in self.classes.values() for draw in pooled]


@dataclass(frozen=True)
class Grid:
    """The draws of a crossed grid of two or more factors at one checkpoint."""

    factors: tuple[str, ...]
    step: int
    length: int  # tokens of each text, at most
    setting: str  # as of a comparison
    cells: dict[tuple[str, ...], Draw]  # levels → the arm's draw
    twins: tuple[tuple[tuple[str, ...], Draw], ...]  # with the levels of the cells that they are twins of
    again: tuple[tuple[str, ...], Draw]  # the second draw of the null

    @property
    def models(self) -> list[Draw]:
        """A draw of every model: cells, then twins."""
        return [*self.cells.values(), *(twin for _, twin in self.twins)]

    @property
    def draws(self) -> list[Draw]:
        """All draws: cells, then twins, then the second draw of the null."""
        return [*self.models, self.again[1]]


def labels(factor: Factor) -> list[str]:
    """What each level of a factor is called; of several fields at once, by those in which the levels differ."""
    levels = factor.levels
    if factor.path == "published":
        return [str(to_json(level).get("name")) if level is not None else "none" for level in levels]
    if all(isinstance(level, bool | int | float | str) for level in levels):
        return [str(level) for level in levels]
    if levels.count(None) == 1 and len(levels) > 1:
        others = dataclasses.replace(factor, levels=tuple(level for level in levels if level is not None))
        named = labels(others) if len(others.levels) > 1 else [factor.path.rpartition(".")[2]]
        return [*named[: levels.index(None)], "none", *named[levels.index(None) :]]
    values = [to_json(level) for level in levels]
    if not all(isinstance(value, dict) for value in values):
        return [canonical_json(value) for value in values]
    kinds = [value.get("kind") for value in values]
    if None not in kinds and len(set(kinds)) == len(kinds):
        return [str(kind) for kind in kinds]
    leaves = [dict(_leaves(value)) for value in values]
    names = dict.fromkeys(name for leaf in leaves for name in leaf)
    differ = [name for name in names if any(leaf.get(name) != leaves[0].get(name) for leaf in leaves)]
    if len(differ) == 1 and all(isinstance(leaf.get(differ[0]), str) for leaf in leaves):  # it speaks for itself
        return [leaf[differ[0]] for leaf in leaves]
    found = ["+".join(f"{name if name != 'kind' else ''}{leaf[name]}" for name in differ if name in leaf) for leaf in leaves]
    return found if all(found) else [canonical_json(value) for value in values]


def _leaves(value: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        if isinstance(one, dict):
            yield from _leaves(one, f"{before}{name}.")
        else:
            yield before + name, one


def _id(name: str) -> str:
    """`name` if it can be a part of a file's name, else as much of it as can be, and a hash that keeps ids distinct."""
    safe = re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII)[:80]
    return name if safe == name else f"{safe}-{hash_json(name)[:8]}"


def _with(experiment: Experiment, values: Iterable[tuple[Factor, Any]]) -> Experiment:
    for factor, value in values:
        experiment = replace(experiment, factor.path, value)
    return experiment


def _base(study: Study) -> Experiment:
    """The experiment of every factor's first level.

    Raises:
      UserError: two factors set one field to different first levels, or vary it together.
    """
    factors = study.factors
    base = _with(study.experiment, ((factor, factor.levels[0]) for factor in factors))
    for one, other in itertools.permutations(factors, 2):
        if f"{other.path}.".startswith(f"{one.path}."):
            if study.design == "crossed":
                raise UserError(
                    f"factors {one.path} and {other.path} set the same field: set design='one_at_a_time', or leave one out"
                )
            if any(replace(base, factor.path, factor.levels[0]) != base for factor in (one, other)):
                raise UserError(
                    f"the first levels of the factors {one.path} and {other.path} set one field to different values: make "
                    "them agree, since the base arm has both"
                )
    return base


def arms(study: Study) -> list[Arm]:
    """The arms; the first is the base arm, of every factor's first level, and a twin comes last.

    Raises:
      UserError: there is no factor, a factor has fewer than two levels or a level twice, its path or type is wrong, two arms
        are the same experiment, or the steps of an arm are not whole.
    """
    factors = study.factors
    if not factors:
        raise UserError(f"study {study.name} has no factors: give at least one, such as Factor('seeds.init', (0, 1))")
    for factor in factors:
        if len(factor.levels) < 2:
            got = canonical_json(to_json(factor.levels))
            raise UserError(f"factor {factor.path} has {len(factor.levels)} level(s) {got}, expected at least two")
        named = labels(factor)
        if len(set(named)) < len(named):
            raise UserError(f"factor {factor.path} names a level twice: {named}")
        if re.search(r"(^|\.)corpus\.(?!source)", factor.path):
            raise UserError(
                f"factor {factor.path}: all arms of a study share the tokenizer and the split of the base corpus; "
                "of a corpus only corpus.source can be a factor"
            )
    if len(factors) > 1 and any(factor.path.split(".")[0] == "published" for factor in factors):
        raise UserError(
            "a factor of published models stands alone: give each model as a level, and leave the other factors out"
        )
    if len({factor.name for factor in factors}) < len(factors):
        raise UserError(f"two factors share a name: {[factor.path for factor in factors]}")

    base, still = _base(study), (0,) * len(factors)
    counts = [range(len(factor.levels)) for factor in factors]
    if study.design == "crossed":
        cells = list(itertools.product(*counts))
    else:
        moves = ((place, level) for place, some in enumerate(counts) for level in some[1:])
        cells = [still, *((*still[:place], level, *still[place + 1 :]) for place, level in moves)]
    found, names = [], [labels(factor) for factor in factors]
    for cell in cells:
        levels = tuple(some[place] for some, place in zip(names, cell, strict=True))
        # A published model has a name already.
        named_by = ["" if factor.path == "published" else factor.name for factor in factors]
        parts = [f"{before}{level}" for before, level in zip(named_by, levels, strict=True)]
        if study.design == "one_at_a_time":
            parts = [part for part, place in zip(parts, cell, strict=True) if place] or ["base"]
        # The base has every first level; of factors that set one field, only the one that moves is set again.
        moved = ((factor, factor.levels[place]) for factor, place in zip(factors, cell, strict=True) if place)
        found.append(Arm(_id("-".join(parts)), levels, _with(base, moved)))
    if study.twin is not None:
        if study.twin.ulps == 0:
            raise UserError("twin.ulps is 0, which moves nothing: give 1 or another whole number")
        first = found[0]
        found.append(Arm(f"{first.id}-twin", first.levels, replace(first.experiment, "perturb", study.twin), twin=True))
    same: dict[Experiment, Arm] = {}
    for arm in found:
        _ = arm.experiment.steps  # whole, or an error that says so
        _check_descent(f"arm {arm.id}", arm.experiment)
        if (other := same.setdefault(_deciding(arm.experiment), arm)) is arm:
            continue
        why = "change the factors so that all arms differ"
        if other.experiment != arm.experiment:
            why = "seeds.init decides nothing of a child whose weights are all its parent's, nor seeds.dropout without dropout"
        raise UserError(f"arms {other.id} and {arm.id} are the same experiment: {why}")
    return found


def kept_fractions(study: Study, every: Iterable[Arm], experiment: Experiment) -> tuple[float, ...]:
    """The fractions of training at which checkpoints are kept: of an arm the study's, of a parent what begins a child."""
    own = {arm.experiment for arm in every}
    line = {one for arm in own for one in (*arm.ancestors, arm)}
    begun = {one.parent.fraction for one in line if one.parent is not None and one.parent.experiment == experiment}
    drawn = set(study.kept_fractions) if experiment in own else set[float]()
    return tuple(sorted(begun | drawn))


def parents(every: Iterable[Arm]) -> list[Arm]:
    """What has to be trained before the arms: every ancestor once, each before its children."""
    found: dict[Experiment, str] = {}
    for arm in every:
        line = [arm.experiment, *reversed(arm.experiment.ancestors)]
        for distance, ancestor in enumerate(line[1:], 1):
            found.setdefault(ancestor, PARENT_OF * distance + arm.id)
    return [Arm(name, (), one) for one, name in sorted(found.items(), key=lambda entry: len(entry[0].ancestors))]


def _check_descent(name: str, experiment: Experiment) -> None:
    """Raises a UserError if an experiment cannot begin with its parent's weights, or that with its own parent's."""
    parent = experiment.parent
    if experiment.published is not None:
        _check_published(name, experiment)
    if parent is None:
        if experiment.lora is not None:
            raise UserError(f"{name} has lora but no parent whose weights it adapts: give it a parent, or leave lora out")
        return
    for path, (got, expected) in differences(*map(to_json, (experiment.model, parent.experiment.model))).items():
        if path not in _NOT_OF_WEIGHTS:
            raise UserError(f"{name} has model.{path} {got}, its parent {expected}: give both the same, as the weights are")
    if parent.experiment.published is not None:
        raise UserError(f"the parent of {name} is a published model: such a one is an arm, and begins no training here")
    _ = parent.step  # whole steps, or an error that says so
    _check_descent(f"the parent of {name}", parent.experiment)


def _check_published(name: str, experiment: Experiment) -> None:
    """Raises a UserError if a published model is asked for with what is only done to models that are trained here."""
    for field in ("parent", "lora", "perturb"):
        if getattr(experiment, field) is not None:
            raise UserError(f"{name} is a published model with {field}: its weights are taken as they are; leave {field} out")
    if experiment.corpus.conversations:
        raise UserError(f"{name} is a published model, and is not asked in a template: give a corpus of documents")


def _deciding(experiment: Experiment) -> Experiment:
    """The experiment without the seeds that decide nothing of it."""
    if experiment.published is not None:  # nor anything else of a training
        return Experiment(corpus=experiment.corpus, model=Model(dtype=experiment.model.dtype), published=experiment.published)
    kept, parent = {name: getattr(experiment.seeds, name) for name in experiment.deciding}, experiment.parent
    if parent is not None:
        parent = Parent(_deciding(parent.experiment), parent.step / parent.experiment.steps)
    return dataclasses.replace(experiment, seeds=Seeds(**kept), parent=parent)


def settled(study: Study) -> Study:
    """The study with every level as its field has it: what a level leaves out, or did not know yet, is a default."""

    def value(factor: Factor, level: Any) -> Any:
        found: Any = replace(study.experiment, factor.path, level)
        for name in factor.path.split("."):
            found = getattr(found, name)
        return found

    factors = [dataclasses.replace(one, levels=tuple(value(one, level) for level in one.levels)) for one in study.factors]
    return dataclasses.replace(study, factors=tuple(factors))


def _steps(study: Study, all_arms: list[Arm]) -> list[dict[str, int]]:
    """For each sampled fraction of training: arm → step. Arms may differ in their number of steps."""
    return [
        {arm.id: round(fraction * arm.experiment.steps) for arm in all_arms}
        for fraction in sorted(set(study.sampling.checkpoints))
    ]


def _settings(study: Study) -> list[tuple[float | None, int, str]]:
    """Temperature, length, and what they are called where there are several."""
    warmths, lengths = study.sampling.temperatures, study.sampling.lengths
    found = []
    for warmth, length in itertools.product(warmths, lengths):
        said = [f"temperature {warmth}"] * (len(warmths) > 1) + [f"{length} tokens"] * (len(lengths) > 1)
        found.append((warmth if len(warmths) > 1 else None, length, ", ".join(said)))
    return found


def comparisons(study: Study) -> list[Comparison]:
    """At each sampled checkpoint, temperature and length: pairs along each factor, each factor pooled, all arms, twin, null.

    Between the pairs and the pooled comparison come a factor's first so many levels, where the study asks for them.
    """
    all_arms = arms(study)
    grid = [arm for arm in all_arms if not arm.twin]
    base = grid[0]
    found = []
    for step, (warmth, length, setting) in itertools.product(_steps(study, all_arms), _settings(study)):
        here: list[tuple[str, str, dict[str, tuple[Draw, ...]]]] = []

        def draw(arm: Arm, number: int = 0, step: dict[str, int] = step, warmth: float | None = warmth) -> Draw:
            return Draw(arm.id, step[arm.id], number, warmth)

        for place, factor in enumerate(study.factors):
            strata: dict[tuple[str, ...], list[Arm]] = {}
            for arm in grid:
                strata.setdefault(arm.levels[:place] + arm.levels[place + 1 :], []).append(arm)
            strata = {rest: members for rest, members in strata.items() if len(members) > 1}
            others = [f.name for f in study.factors if f is not factor]
            for rest, members in strata.items():
                crossed = study.design == "crossed"  # else all others are the base arm's
                held = ", ".join(f"{name} {level}" for name, level in zip(others, rest, strict=True) if crossed)
                for a, b in itertools.combinations(members, 2):
                    name = f"{factor.name} {a.levels[place]} vs {b.levels[place]}" + (f" ({held})" if held else "")
                    here.append((name, factor.name, {arm.levels[place]: (draw(arm),) for arm in (a, b)}))
            pooled: dict[str, tuple[Draw, ...]] = {}
            for members in strata.values():
                for arm in members:
                    pooled[arm.levels[place]] = (*pooled.get(arm.levels[place], ()), draw(arm))
            for count in study.attribution.class_counts:
                if 2 < count < len(pooled):
                    some = dict(itertools.islice(pooled.items(), count))
                    here.append((f"{factor.name}, {count} levels", factor.name, some))
            if len(strata) > 1 or len(pooled) > 2:  # else it is the one pair again
                here.append((f"{factor.name} (pooled)", factor.name, pooled))
        if len(grid) > 2:
            here.append(("all arms", "all", {arm.id: (draw(arm),) for arm in grid}))
        for twin in all_arms[len(grid) :]:
            here.append((f"twin of {base.id}", "twin", {base.id: (draw(base),), twin.id: (draw(twin),)}))
        here.append((f"null of {base.id}", "null", {"draw 0": (draw(base),), "draw 1": (draw(base, 1),)}))
        found += [Comparison(name, factor, step[base.id], classes, length, setting) for name, factor, classes in here]
    # Arms of fewer steps may have one checkpoint for two near fractions: the same draws are compared once.
    distinct = {(comparison.length, *comparison.classes.items()): comparison for comparison in reversed(found)}
    return list(reversed(distinct.values()))


def grids(study: Study) -> list[Grid]:
    """The grid at each sampled checkpoint, at the last temperature and length; none where no two factors are crossed."""
    if study.design != "crossed" or len(study.factors) < 2:
        return []
    all_arms = arms(study)
    base, (warmth, length, setting) = all_arms[0], _settings(study)[-1]
    found: dict[tuple[Draw, ...], Grid] = {}
    for step in _steps(study, all_arms):
        drawn = {arm.id: Draw(arm.id, step[arm.id], 0, warmth) for arm in all_arms}
        grid = Grid(
            factors=tuple(factor.name for factor in study.factors),
            step=step[base.id],
            length=length,
            setting=setting,
            cells={arm.levels: drawn[arm.id] for arm in all_arms if not arm.twin},
            twins=tuple((arm.levels, drawn[arm.id]) for arm in all_arms if arm.twin),
            again=(base.levels, drawn[base.id]._replace(number=1)),
        )
        found.setdefault(tuple(grid.draws), grid)  # two near fractions may be one step
    return list(found.values())


def answers(every: list[Comparison]) -> list[Comparison]:
    """At each checkpoint and setting each factor's pooled comparison, or its only pair, and the controls."""
    of: dict[tuple[str, int, str], Comparison] = {}
    for one in every:  # a pooled comparison comes after its pairs
        if one.factor != "all":
            of[one.factor, one.step, one.setting] = one
    return list(of.values())


def decisive(every: list[Comparison]) -> list[Comparison]:
    """The `answers` in the end: at the last checkpoint and setting."""
    last = max(one.step for one in every)
    setting = [one.setting for one in every if one.step == last][-1]
    return [one for one in answers(every) if (one.step, one.setting) == (last, setting)]


def draws(study: Study) -> list[Draw]:
    """Every draw that some comparison needs, each once."""
    return list(dict.fromkeys(draw for comparison in comparisons(study) for draw in comparison.draws))


def lacking(study: Study) -> list[str]:
    """The controls and the claims that the study cannot make, a sentence each."""
    said = []
    if study.twin is None:
        said.append(
            "No twin control: whether a change of one unit in the last place already makes models recognisable is not shown."
        )
    if not any(f"{factor.path}.".startswith(("corpus.", "data.first.")) for factor in study.factors):
        said.append("No other-data control: that the classifiers find a difference which is surely there is not shown.")
    if study.experiment.parent is not None and not any(factor.path.startswith("parent") for factor in study.factors):
        said.append("All arms are children of one parent: what is said of a factor is of its children, not of those of others.")
    if any(factor.path == "published" for factor in study.factors):
        said.append("Of published models it is not shown what each was trained on, and how: their authors say it.")
    for factor in study.factors:
        if len(factor.levels) < 5:
            said.append(
                f"Factor {factor.name} has {len(factor.levels)} levels: the p-values say that these runs differ, not how much "
                "runs in general do; no interval over runs is given."
            )
    return said
