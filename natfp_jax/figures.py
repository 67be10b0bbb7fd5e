"""The report's figures.

Owns how accuracies, losses and confusions are drawn, without any global state of matplotlib. Must not know where results come
from or where figures are stored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from natfp_jax.courses import STEP, Course
from natfp_jax.files import whole_file
from natfp_jax.findings import Row, titled

__all__ = ["accuracies", "components", "confusion", "courses", "losses", "save"]

WIDTH = 8.0  # inches: with DPI, what a README shows without shrinking
DPI = 110
# Okabe and Ito's colours, told apart by colour-blind readers; black and yellow are left out (ceilings; too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osvP"
GREY = "#777777"


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def accuracies(panels: Mapping[int, Sequence[tuple[str, Sequence[Row]]]]) -> Figure:
    """Accuracies with intervals, chance and ceilings.

    Args:
      panels: checkpoint → named lines, from top to bottom. Lines of one name that follow each other, one a classifier, share
        a place; a line of several rows shows every accuracy, without intervals.
    """
    names = {step: list(dict.fromkeys(name for name, _ in lines)) for step, lines in panels.items()}
    kinds = list(dict.fromkeys(row["classifier"] for lines in panels.values() for _, rows in lines for row in rows))
    heights = [len(found) + 1 for found in names.values()]
    figure = Figure(figsize=(WIDTH, 0.32 * sum(heights) + 0.5 * len(panels) + 0.7), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (step, lines) in zip(grid, panels.items(), strict=True):
        for name, rows in lines:
            _line(axes, names[step].index(name), rows, kinds)
        axes.set_yticks(range(len(names[step])), names[step])
        axes.set_ylim(len(names[step]) - 0.4, -0.6)
        axes.set_title(f"step {step}", loc="left", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel("held-out texts given to their own source (%)")
    handles, labels = grid[0].get_legend_handles_labels()
    handle = dict(zip(labels, handles, strict=True))
    shown = [label for label in (*kinds, "chance", "likelihood ceiling") if label in handle]
    figure.legend([handle[label] for label in shown], shown, loc="outside upper center", ncols=len(shown), frameon=False)
    return figure


def _line(axes: Axes, place: int, rows: Sequence[Row], kinds: Sequence[str]) -> None:
    """One classifier on one line."""
    kind = kinds.index(rows[0]["classifier"])
    y = place + (kind - (len(kinds) - 1) / 2) * 0.64 / len(kinds)
    look = {"color": COLOURS[kind % len(COLOURS)], "marker": MARKERS[kind % len(MARKERS)], "label": rows[0]["classifier"]}
    x = 100 * np.array([row["accuracy"] for row in rows])
    if len(rows) == 1:
        lower, upper = 100 * np.array(rows[0]["ci95"])
        # The percentile interval may, rarely, lie beside its estimate.
        axes.errorbar(x, [y], xerr=np.clip([x - lower, upper - x], 0, None), markersize=5, capsize=2, linestyle="none", **look)
    else:
        axes.scatter(x, np.full(len(rows), y), s=18, alpha=0.4, linewidths=0, **look)
    axes.vlines(100 * rows[0]["chance"], place - 0.4, place + 0.4, colors=GREY, linestyles="dashed", label="chance")
    ceiling = 100 * median(row["ceiling"] for row in rows)
    axes.plot(ceiling, place, "D", color="black", fillstyle="none", label="likelihood ceiling", linestyle="none")


def courses(found: Mapping[str, Mapping[str, Mapping[str, Course]]]) -> Figure:
    """How accuracies and ceilings go with the training step, the texts to learn from, their length and their number.

    Args:
      found: comparison → what it goes with → line → its course, as `courses.courses` gives it.
    """
    across = list(dict.fromkeys(along for panels in found.values() for along in panels))
    kinds = [
        kind for kind in dict.fromkeys(k for p in found.values() for lines in p.values() for k in lines) if kind != "ceiling"
    ]
    figure = Figure(figsize=(max(WIDTH, 3.2 * len(across)), 2.4 * len(found) + 0.7), layout="constrained")
    grid = figure.subplots(max(len(found), 1), max(len(across), 1), sharex="col", sharey="row", squeeze=False)
    for row, (name, panels) in zip(grid, found.items(), strict=False):
        row[0].set_ylabel(f"{name}\naccuracy (%)")
        for axes, along in zip(row, across, strict=True):
            for kind, course in panels.get(along, {}).items():
                colour = "black" if kind == "ceiling" else COLOURS[kinds.index(kind) % len(COLOURS)]
                marker = "D" if kind == "ceiling" else MARKERS[kinds.index(kind) % len(MARKERS)]
                fill = "none" if kind == "ceiling" else "full"
                y, low, high = (100 * np.array(side) for side in (course.y, course.low, course.high))
                axes.plot(course.x, y, color=colour, marker=marker, markersize=4, fillstyle=fill, label=kind)
                axes.fill_between(course.x, low, high, color=colour, alpha=0.15, linewidth=0)
            # From step 0 on; early steps are close together.
            axes.set_xscale("symlog", linthresh=_least(found, along)) if along == STEP else axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, along in zip(grid[-1], across, strict=False):
        axes.set_xlabel(along)
    handle = {label: one for axes in grid.flat for one, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [label for label in (*kinds, "ceiling") if label in handle]
    if shown:
        figure.legend([handle[k] for k in shown], shown, loc="outside upper center", ncols=len(shown), frameon=False)
    return figure


def _least(found: Mapping[str, Mapping[str, Mapping[str, Course]]], along: str) -> float:
    """The least value above zero that something has."""
    values = [x for panels in found.values() for course in panels.get(along, {}).values() for x in course.x]
    return min((x for x in values if x > 0), default=1)


def components(found: Mapping[str, Mapping[str, Course]]) -> Figure:
    """Components of distances over training.

    Args:
      found: kind of distance → component → its millibits by training step.
    """
    names = list(dict.fromkeys(name for some in found.values() for name in some))
    figure = Figure(figsize=(WIDTH, 2.6 * len(found) + 0.7), layout="constrained")
    grid = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    steps = [step for some in found.values() for course in some.values() for step in course.x]
    for axes, (kind, some) in zip(grid, found.items(), strict=True):
        for name, course in some.items():
            place = names.index(name)
            colour = {"all": "black", "sampling noise": GREY}.get(name, COLOURS[place % len(COLOURS)])
            look = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "fillstyle": "none" if name == "all" else "full"}
            axes.plot(course.x, course.y, markersize=4, label=name, **look)
            axes.fill_between(course.x, course.low, course.high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color=GREY, linewidth=0.8)  # an estimate of nothing lies on both sides
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_ylabel("millibits")
        axes.set_xscale("symlog", linthresh=min((step for step in steps if step > 0), default=1))
        axes.set_xticks(sorted(set(steps)))
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel(STEP)
    handle = {label: one for axes in grid for one, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handle.values()), list(handle), loc="outside upper center", ncols=4, frameon=False)
    return figure


def losses(curves: Mapping[str, Sequence[tuple[float, float, bool]]]) -> Figure:
    """Loss against training tokens.

    Args:
      curves: arm → (tokens, loss, whether it is of the validation part), in the order of training.
    """
    figure = Figure(figsize=(WIDTH, max(4.2, 0.19 * (len(curves) + 2))), layout="constrained")
    axes = figure.subplots()
    many = colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for i, (arm, points) in enumerate(curves.items()):
        colour = COLOURS[i] if len(curves) <= len(COLOURS) else many[i]
        for validation, look in ((False, {"label": arm, "linewidth": 1.2}), (True, {"linestyle": "none", "marker": "o"})):
            some = [(tokens, loss) for tokens, loss, kind in points if kind == validation]
            axes.plot([x for x, _ in some], [y for _, y in some], color=colour, fillstyle="none", **look)
    axes.plot([], [], "o", color=GREY, fillstyle="none", label="validation")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def confusion(row: Row) -> Figure:
    """Who is taken for whom: colours are percent of each source, numbers are texts."""
    counts_KK, classes = np.array(row["confusion"]), row["classes"]
    percent_KK = 100 * counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    side = max(3.2, 0.55 * len(classes))
    figure = Figure(figsize=(side + 2.6, side + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent_KK, cmap="Blues", vmin=0)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    dark = 0.6 * percent_KK.max()
    for (i, j), count in np.ndenumerate(counts_KK):
        colour = "white" if percent_KK[i, j] > dark else "black"
        axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("source named by the classifier")
    axes.set_ylabel("true source")
    axes.set_title(f"{titled(row)}, step {row['checkpoint']}, {row['classifier']}", fontsize=10)
    figure.colorbar(image, ax=axes, label="of the source's test texts (%)", shrink=0.8)
    return figure
