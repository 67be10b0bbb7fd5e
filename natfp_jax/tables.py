"""The terminal's tables.

Owns their columns, and which rows become one line. A function of results alone; must not know how anything was computed.
"""

from statistics import median
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax.findings import SIGNIFICANT, Row, Summary, groups, headline, interval, p_text, percent, pooled, titled

__all__ = ["Line", "cells", "lines", "outside", "table"]

FOLD = 12  # more pairs of one factor at one checkpoint become one line in the terminal and in the figure


class Line(NamedTuple):
    """One comparison under one classifier, or many pairs of one factor."""

    name: str
    checkpoint: int
    factor: str
    rows: list[Row]


def lines(summary: Summary) -> list[Line]:
    """The lines of the terminal's table, by checkpoint; many pairs of one factor become one."""
    found = []
    for (step, _, factor), group in groups(summary).items():
        pairs: dict[str, list[Row]] = {}  # classifier → pairs
        for row in group:
            if _of_a_pair(row):
                pairs.setdefault(row["classifier"], []).append(row)
        count = len(next(iter(pairs.values()), []))
        if count > FOLD:
            name = titled(group[0], f"{factor}: {count} pairs")
            found += [Line(name, step, factor, rows) for rows in pairs.values()]
            group = [row for row in group if not _of_a_pair(row)]
        found += [Line(titled(row), step, factor, [row]) for row in group]
    return sorted(found, key=lambda line: line.checkpoint)


def _of_a_pair(row: Row) -> bool:
    """Whether it is of two arms, whose chance is one in two."""
    return not pooled(row) and len(row["classes"]) == 2


def cells(rows: list[Row]) -> list[str]:
    """The numbers of a line, from accuracy to ceiling."""

    def middle(name: str) -> float:
        return median(row[name] for row in rows)

    if len(rows) == 1:
        accuracy, p, holm = interval(rows[0]), p_text(rows[0]["p_value"]), p_text(rows[0]["p_holm"])
    else:
        found = [row["accuracy"] for row in rows]
        accuracy, p = f"{percent(middle('accuracy'))} ({percent(min(found))}–{percent(max(found))})", ""
        holm = f"{sum(row['p_holm'] < SIGNIFICANT for row in rows)} of {len(rows)}"
    auc, bits = f"{middle('auc'):.3f}", f"{middle('bits_per_text'):+.3f}"
    return [accuracy, percent(middle("chance")), p, holm, auc, bits, percent(middle("ceiling"))]


def table(summary: Summary) -> Table:
    """The terminal's table: 100 columns, however many arms."""
    shown_lines = lines(summary)
    folded = any(len(line.rows) > 1 for line in shown_lines)
    caption = "p and interval cover the choice of test texts, not the training of classifiers or models; Holm covers the study."
    if folded:
        caption += f" A line of pairs: medians, (min–max), and how many have p Holm < {SIGNIFICANT}; all are in report.md."
    # Text, not str: names with square brackets are no markup.
    shown = Table(title=Text(headline(summary)), caption=Text(caption), box=box.SIMPLE, padding=0)
    shown.add_column("comparison", overflow="fold")
    shown.add_column("step", justify="right")
    shown.add_column("by")
    for name in ("accuracy % [95 %]", "chance", "p", "p Holm", "AUC", "bits/\ntext", "ceiling"):
        shown.add_column(name, justify="right", no_wrap=True)
    for before, line, after in zip([None, *shown_lines], shown_lines, [*shown_lines[1:], None], strict=False):
        first = before is None or (before.name, before.checkpoint) != (line.name, line.checkpoint)
        style = "cyan" if line.factor in ("null", "twin") else "bold" if line.factor == "all" or pooled(line.rows[0]) else ""
        shown.add_row(
            Text(line.name if first else ""),
            str(line.checkpoint) if first else "",
            line.rows[0]["classifier"],
            *cells(line.rows),
            style=style,
            end_section=after is not None and after.checkpoint != line.checkpoint,
        )
    return shown


def outside(name: str, rows: list[Row]) -> Table:
    """The table of texts from elsewhere, whose models are not at hand: a line a classifier."""
    test, learnt = rows[0]["test_texts"], rows[0]["training_texts"]
    shown = Table(
        title=Text(f"{name}: {' vs '.join(rows[0]['classes'])}"),
        caption=Text(
            f"{test} test texts, {learnt} to learn from. p and interval cover the choice of test texts, not the training of "
            "classifiers or models; Holm covers the table. Ceiling: not available, since the models are not at hand."
        ),
        box=box.SIMPLE,
        padding=0,
    )
    shown.add_column("by")
    for column in ("accuracy % [95 %]", "chance", "p", "p Holm", "AUC", "bits/text"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        numbers = [percent(row["chance"]), p_text(row["p_value"]), p_text(row["p_holm"])]
        shown.add_row(row["classifier"], interval(row), *numbers, f"{row['auc']:.3f}", f"{row['bits_per_text']:+.3f}")
    return shown
