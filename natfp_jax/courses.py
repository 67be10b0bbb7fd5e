"""How accuracies and distances go with something: the numbers behind curves.

Owns which rows of a summary make a curve, and along what. A function of the summary alone; must not know how it is drawn.
"""

from typing import Any, NamedTuple

from natfp_jax.findings import Row, Summary, decisive

__all__ = ["LEARNT", "LENGTH", "STEP", "TOGETHER", "Course", "courses", "trajectories"]


class Course(NamedTuple):
    """How an accuracy goes with something: x, and the accuracy there with its bounds."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


STEP, LEARNT, LENGTH, TOGETHER = "training step", "texts to learn from", "tokens of a text", "texts in one decision"


def courses(summary: Summary) -> dict[str, dict[str, dict[str, Course]]]:
    """Comparison → what its accuracy goes with → classifier or "ceiling" → how; what has one value alone is left out.

    Of each factor its pooled test or its only pair; at the last checkpoint, temperature and length where another goes.
    """
    rows = decisive(summary)
    last, end = rows[-1], max(row["checkpoint"] for row in rows)
    points: dict[tuple[str, str, str], dict[float, tuple[float, Any]]] = {}

    def add(row: Row, along: str, x: float, accuracy: tuple[float, Any], ceiling: tuple[float, Any]) -> None:
        points.setdefault((row["name"], along, row["classifier"]), {})[x] = accuracy
        points.setdefault((row["name"], along, "ceiling"), {})[x] = ceiling

    for row in [*rows, *({**row, "learnt": row["training_texts"]} for row in summary["curves"])]:
        found = (row["accuracy"], row["ci95"]), (row["ceiling"], row["ceiling_ci95"])
        if "learnt" in row:
            add(row, LEARNT, row["learnt"], *found)
            continue
        if row["setting"] == last["setting"]:
            add(row, STEP, row["checkpoint"], *found)
        if row["checkpoint"] == end and row["temperature"] == last["temperature"]:
            add(row, LENGTH, row["new_tokens"], *found)
        if row["checkpoint"] == end and row["setting"] == last["setting"]:
            add(row, TOGETHER, 1, *found)
            for one, best in zip(row["pooled"], row["ceiling_pooled"], strict=True):
                add(row, TOGETHER, one["texts"], (one["accuracy"], one["ci95"]), (best["accuracy"], best["ci95"]))
    courses: dict[str, dict[str, dict[str, Course]]] = {}
    for (name, along, kind), some in points.items():
        if len(some) < 2:
            continue
        x = sorted(some)
        course = Course(x, [some[at][0] for at in x], *([some[at][1][side] for at in x] for side in (0, 1)))
        courses.setdefault(name, {}).setdefault(along, {})[kind] = course
    return courses


def trajectories(summary: Summary) -> dict[str, dict[str, Course]]:
    """Kind of distance → component → its millibits by training step, where there is more than one."""
    points: dict[str, dict[str, list[Row]]] = {}
    for row in summary["components"]:
        points.setdefault(row["distance"], {}).setdefault(row["component"], []).append(row)
    if len({row["checkpoint"] for row in summary["components"]}) < 2:
        return {}

    def course(rows: list[Row]) -> Course:
        rows = sorted(rows, key=lambda row: row["checkpoint"])
        bits = [[1000 * value for value in (row["bits"], *row["ci95"])] for row in rows]
        return Course([row["checkpoint"] for row in rows], *([one[side] for one in bits] for side in range(3)))

    return {kind: {name: course(rows) for name, rows in some.items()} for kind, some in points.items()}
