"""The answers of `natfp power`, as tables: of given numbers, and of what a pilot study has measured.

Owns how texts become prompts of a study, what is read from a summary, and the words. Must not know how power is computed, or
import what takes long to: the verb answers within seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax import config, files
from natfp_jax.errors import UserError
from natfp_jax.findings import SIGNIFICANT, decisive, percent, titled
from natfp_jax.power import MOST, Plan, least_excess, power, prompts_needed

__all__ = ["EXCESSES", "design_effect", "measured", "needed", "of_pilot"]

EXCESSES = (0.005, 0.01, 0.02, 0.05, 0.1)  # a few, where none is given
_WIDE = 3.92  # standard errors between the bounds of a 95 % interval of a normal law


def needed(plan: Plan, excesses: Sequence[float], wanted: float, test_fraction: float) -> Table:
    """How many texts detect each excess with the wanted power.

    Raises:
      UserError: a number is out of its range, or no p-value can lie below the level.
    """
    table = _table(plan, test_fraction)
    for excess in excesses:
        prompts = prompts_needed(plan, excess, wanted)
        if prompts is None:
            raise UserError(f"excess {excess:g}: takes more than {MOST:,} prompts, give a larger one")
        _line(table, plan, test_fraction, prompts, excess)
    return table


def measured(plan: Plan, texts: int, excess: float | None, wanted: float, test_fraction: float) -> Table:
    """What so many test texts detect: the least excess with the wanted power, or how surely a given excess.

    Raises:
      UserError: a number is out of its range, or no p-value can lie below the level.
    """
    table = _table(plan, test_fraction)
    prompts = texts // plan.classes  # a prompt is whole or absent
    if prompts < 1:
        raise UserError(f"texts {texts}: a prompt has a text of each of {plan.classes} classes, give {plan.classes} or more")
    if excess is None and (excess := least_excess(plan, prompts, wanted)) is None:
        raise UserError(f"texts {texts}: not even a classifier that is always right is found out, give more")
    _line(table, plan, test_fraction, prompts, excess)
    return table


def _table(plan: Plan, test_fraction: float) -> Table:
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction {test_fraction}: give a number between 0 and 1")
    if not plan.possible:
        raise UserError(
            f"permutations {plan.permutations}: the least p-value is 1/{plan.permutations + 1}, expected one below "
            f"{plan.alpha:g} / {plan.tests} test(s); no number of texts detects anything, "
            f"give {plan.permutations_needed} or more"
        )
    title = f"{plan.classes} classes, one-sided at {plan.alpha:g}" + (f", {plan.tests} tests (Holm)" if plan.tests > 1 else "")
    if plan.design_effect != 1:
        title += f", design effect {plan.design_effect:g}"
    caption = (
        f"Texts are held out: {plan.classes} at each test prompt. sampling.prompts gives so many test prompts in the mean, "
        f"with attribution.test_fraction {test_fraction:g}."
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for name in ("excess, points", "accuracy %", "test texts", "test prompts", "sampling.prompts", "power"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _line(table: Table, plan: Plan, test_fraction: float, prompts: int, excess: float) -> None:
    counts = (prompts * plan.classes, prompts, _drawn(prompts, test_fraction))
    # One digit more than asked for in the usual case; the power is of the excess before it was rounded.
    said = f"{100 * excess:.2f}", f"{100 * (1 / plan.classes + excess):.2f}"
    table.add_row(*said, *(f"{count:,}" for count in counts), f"{power(plan, prompts, excess):.3f}")


def _drawn(prompts: int, test_fraction: float) -> int:
    return math.ceil(prompts / test_fraction * (1 - 1e-12))


# --- from a pilot -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    attribution: config.Attribution


@dataclass(frozen=True)
class _Measured:
    """What is read of a classifier's result on one comparison."""

    name: str
    factor: str
    checkpoint: int
    setting: str
    classifier: str
    classes: Annotated[tuple[str, ...], pydantic.Field(min_length=2)]
    accuracy: config.Fraction
    ci95: tuple[config.Fraction, config.Fraction]
    test_texts: config.Positive
    test_prompts: config.Positive

    def excess(self, accuracy: float) -> float:
        return accuracy - 1 / len(self.classes)


@dataclass(frozen=True)
class _Pilot:
    """What is read of a summary."""

    study: str
    comparisons: Annotated[tuple[_Measured, ...], pydantic.Field(min_length=1)]
    settings: _Settings


def design_effect(accuracy: float, ci95: tuple[float, float], texts: int) -> float:
    """How many times the variance of an accuracy is that of as many independent texts.

    Args:
      accuracy: of so many texts.
      ci95: its interval, documents resampled.
      texts: how many it is of.

    Returns:
      The ratio of variances; 1 where an accuracy of 0 or 1 or an interval without width tells nothing of them.
    """
    independent, found = accuracy * (1 - accuracy) / texts, ((ci95[1] - ci95[0]) / _WIDE) ** 2
    return found / independent if independent > 0 and found > 0 else 1.0


def of_pilot(path: Path, alpha: float = SIGNIFICANT, wanted: float = 0.8, tests: int | None = None) -> Table:
    """What a study has to be to detect what a pilot measured, and what the pilot could have detected.

    Args:
      path: the pilot's report/summary.json.
      alpha: the error of the family of tests.
      wanted: the power.
      tests: how many tests the study to come has; left out: as many as the pilot.

    Raises:
      UserError: the file is no summary of a study, is damaged, or a number is out of its range.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give the report/summary.json of a study")
    summary = files.read_json(path, remedy="give the report/summary.json of a study, or make it anew with `natfp report`,")
    found = _read(_Pilot, summary, path)
    settings, tests = found.settings.attribution, len(found.comparisons) if tests is None else tests
    table = _pilot_table(found.study, alpha, tests, wanted, settings)
    for raw in decisive(summary):
        if raw.get("factor") == "null":  # there is nothing to detect
            continue
        row = _read(_Measured, raw, path)
        effect = design_effect(row.accuracy, row.ci95, row.test_texts)
        plan = Plan(len(row.classes), alpha, tests, settings.permutations, effect)

        def asked(accuracy: float, plan: Plan = plan, row: _Measured = row) -> str:
            if not row.excess(accuracy) > 0:
                return "not to be had"
            prompts = prompts_needed(plan, row.excess(accuracy), wanted)
            if prompts is None:
                return f"> {MOST:,}" if plan.possible else "never"
            # A class that pools arms has several texts at a prompt.
            each = row.test_texts / row.test_prompts
            return f"{prompts * plan.classes:,} / {_drawn(math.ceil(prompts * plan.classes / each), settings.test_fraction):,}"

        least = least_excess(plan, row.test_texts // plan.classes, wanted) if row.test_texts >= plan.classes else None
        bounds = ", ".join(f"{100 * row.excess(bound):.1f}" for bound in row.ci95)
        table.add_row(
            Text(titled(raw)),
            str(row.checkpoint),
            Text(row.classifier),
            f"{100 * row.excess(row.accuracy):+.1f} [{bounds}]",
            f"{effect:.2f}",
            asked(row.accuracy),
            asked(row.ci95[0]),
            "none" if least is None else percent(least),
        )
    return table


def _read(kind: type[Any], values: dict[str, Any], path: Path) -> Any:
    try:
        return config.from_json(kind, values)
    except UserError as error:
        raise UserError(f"{path} is no summary of a study of this version ({error}): give its report/summary.json") from None


def _pilot_table(study: str, alpha: float, tests: int, wanted: float, settings: config.Attribution) -> Table:
    caption = (
        "Test texts / sampling.prompts of a study that detects this excess, and the lower end of its interval. An excess that "
        "a pilot measured is itself uncertain, and the largest of many is likely too large: plan with the lower end. Not to be "
        "had: it is not above chance. Least: points that the pilot's own texts detect. Design effect: the variance over that "
        "of independent texts."
    )
    plan = Plan(2, alpha, tests, settings.permutations)
    if not plan.possible:
        caption += (
            f" Never: with {settings.permutations} permutations no p-value lies below {alpha:g} / {tests}; give "
            f"attribution.permutations {plan.permutations_needed} or more."
        )
    title = f"{study}: power {wanted:g}, one-sided at {alpha:g}, {tests} tests (Holm)"
    table = Table(title=Text(title), caption=Text(caption), box=box.SIMPLE, padding=0)
    table.add_column("comparison", overflow="fold")
    table.add_column("step", justify="right")
    table.add_column("by")
    for name in ("excess, points\n[95 %]", "design\neffect", "texts /\nprompts", "the same at\nthe lower end", "least"):
        table.add_column(name, justify="right", no_wrap=True)
    return table
