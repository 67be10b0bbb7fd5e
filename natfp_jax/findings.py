"""What a study found, in words.

Owns the verdicts, what the numbers cover and do not cover, and the form of every number. Everything is a function of the
summary alone; must not know files or how anything was computed.
"""

import math
from collections.abc import Sequence
from typing import Any

__all__ = [
    "LEAST_EXCESS",
    "SIGNIFICANT",
    "Row",
    "Summary",
    "best",
    "best_rungs",
    "confused",
    "coverage",
    "decision",
    "decisive",
    "groups",
    "headline",
    "interval",
    "millibits",
    "p_text",
    "percent",
    "pooled",
    "share",
    "titled",
    "verdicts",
]

SIGNIFICANT = 0.05  # of the p-value after Holm
LEAST_EXCESS = 0.02  # of an accuracy over chance: two points are the least that is of interest
LEAK = 0.01  # what `SIGNIFICANT` is, for a null
BEYOND = 4  # standard errors above the ceiling that no classifier of a sound study reaches, among hundreds of tests

Summary = dict[str, Any]
Row = dict[str, Any]  # one classifier's result on one comparison


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f}"


def interval(row: Row, name: str = "accuracy", bounds: str = "ci95") -> str:
    """A fraction with its bounds, in percent."""
    low, high = row[bounds]
    return f"{percent(row[name])} [{percent(low)}, {percent(high)}]"


def share(row: Row) -> str:
    """How much of the ceiling's excess over chance a classifier reads, in percent, or a dash where there is none."""
    return interval(row, "share", "share_ci95") if row["share"] is not None else "–"


def p_text(value: float, sign: str = "") -> str:
    """A p-value, after a sign where it is not below what can be shown."""
    return "< 0.0001" if value < 0.00005 else f"{sign}{value:.4f}"


def _both_p(row: Row) -> str:
    return f"p {p_text(row['p_value'], '= ')}, Holm {p_text(row['p_holm'])}"


def pooled(row: Row) -> bool:
    """Whether it is of a factor's pooled test."""
    return bool(row["name"] == f"{row['factor']} (pooled)")


def titled(row: Row, name: str | None = None) -> str:
    """The comparison's name, or another, and its temperature and length where the study has several."""
    return ", ".join(part for part in (name or row["name"], row["setting"]) if part)


def groups(summary: Summary) -> dict[tuple[int, str, str], list[Row]]:
    """(Checkpoint, setting, factor) → its rows."""
    found: dict[tuple[int, str, str], list[Row]] = {}
    for row in summary["comparisons"]:
        found.setdefault((row["checkpoint"], row["setting"], row["factor"]), []).append(row)
    return found


def headline(summary: Summary) -> str:
    """The first line of the report: the study's name, and whether compared arms differ in their numerics record."""
    differ = summary["numerics"]["differ"]
    if not differ:
        return str(summary["study"])
    fields = ", ".join(dict.fromkeys(f"{field} ({one['stage']})" for one in differ for field in one["fields"]))
    count = len({(one["comparison"], one["checkpoint"]) for one in differ})
    total = max(count, len({(titled(row), row["checkpoint"]) for row in summary["comparisons"]}))
    return (
        f"{summary['study']}: WARNING, in {count} of {total} comparisons the arms do not share the numerics record; they "
        f"differ in {fields}, which may be what is recognised"
    )


def decisive(summary: Summary) -> list[Row]:
    """The rows that the study's answer rests on: of each factor at each checkpoint its pooled test or its only pair."""
    return [row for group in groups(summary).values() for row in _decisive(group)]


def _decisive(group: list[Row]) -> list[Row]:
    return [row for row in group if pooled(row)] or group


def best(rows: list[Row]) -> Row:
    """Of one comparison's rows by several classifiers, that of the most bits per text on the validation texts.

    No test text has a say, so that its accuracy is not the luckiest of several. Of equals, the first.
    """
    return max(rows, key=lambda row: float(row["validation_bits"]))


def best_rungs(summary: Summary) -> list[Row]:
    """Of each comparison that the study's answer rests on, the `best` row."""
    found: dict[tuple[int, str, str], list[Row]] = {}
    for row in decisive(summary):
        found.setdefault((row["checkpoint"], row["setting"], row["name"]), []).append(row)
    return [best(rows) for rows in found.values()]


def decision(row: Row) -> str:
    """Whether a classifier sees something: "seen", "not seen" or "not decided at this power".

    Seen is what is significant after Holm. Not seen: the 95 % interval of the accuracy ends below chance and `LEAST_EXCESS`,
    so that whatever there is, is of no interest. Anything else was asked with too few texts.
    """
    if row["p_holm"] < SIGNIFICANT:
        return "seen"
    return "not seen" if row["ci95"][1] < row["chance"] + LEAST_EXCESS else "not decided at this power"


def verdicts(summary: Summary) -> list[str]:
    """What the study found, a sentence for each factor at each checkpoint."""
    said, nulls = [], []
    for (step, _, factor), group in groups(summary).items():
        if factor == "null":
            nulls += group
            continue
        row = _decisive(group)[0]
        found = "; ".join(_finding(row) for row in _decisive(group))
        low, _ = row["ceiling_ci95"]
        proof = "the models differ" if low > row["chance"] else "that the models differ is not shown"
        if summary.get("reencoded"):
            proof = "no bound, since tokenizers differ"
        bounds = f"chance {percent(row['chance'])} %, ceiling {interval(row, 'ceiling', 'ceiling_ci95')} %: {proof}"
        said.append(f"{titled(row)} at step {step}: {found}; {bounds}.")
    said += _apart(summary) + _components(summary)
    return said + _general(summary) + _null(nulls) + _shared(summary) + _impossible(summary) + _powerless(summary)


def _finding(row: Row) -> str:
    if row["p_holm"] < SIGNIFICANT:
        return f"recognisable by {row['classifier']}, {interval(row)} %, {_both_p(row)}"
    most = f"at most {percent(row['ci95'][1])} %"
    return f"not shown at this power by {row['classifier']}, {percent(row['accuracy'])} %, {most}, {_both_p(row)}"


def _apart(summary: Summary) -> list[str]:
    """Of each factor at each checkpoint, whether it is recognised whatever the levels of the others."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in summary["apart"]:
        found.setdefault((row["checkpoint"], row["factor"]), []).append(row)
    said = []
    for (step, factor), rows in found.items():
        row, parts = rows[0], []
        for one in rows:
            held, own = interval(one), interval(one, "within_accuracy", "within_ci95")
            p = f"p {p_text(one['p_value'], '= ')}, Holm {p_text(one['p_holm'])}"
            parts.append(f"{held} % by {one['classifier']} in runs held out, {own} % in the runs learnt from, {p}")
        least = f"the least p that relabelling its {row['levels']} x {row['strata']} runs can give is {p_text(row['least_p'])}"
        if row["least_p"] >= SIGNIFICANT:
            least += ", so nothing is shown by it: more levels are needed, 4 x 4 are enough"
        said.append(
            f"{titled(row, factor)} apart from the other factors at step {step}: {'; '.join(parts)}; chance "
            f"{percent(row['chance'])} %; {least}."
        )
    return said


def _components(summary: Summary) -> list[str]:
    """Of each checkpoint and kind of distance, what the distance of two models consists of."""
    found: dict[tuple[int, str], dict[str, Row]] = {}
    for row in summary["components"]:
        found.setdefault((row["checkpoint"], row["distance"]), {})[row["component"]] = row
    said = []
    for (step, kind), rows in found.items():
        whole = rows["all"]
        parts = [f"{name} {share(row)} %" for name, row in rows.items() if name != "all" and row["share"] is not None]
        of = f", of which {', '.join(parts)}" if parts else ", which is not sure to be above zero: it has no shares"
        said.append(
            f"{titled(whole, f'Distance by {kind}')} at step {step} of two models that differ in every factor: "
            f"{millibits(whole)} millibits{of}."
        )
    return said


def millibits(row: Row) -> str:
    """A component of a distance with its bounds, in thousandths of a bit."""
    # Divergences are differences of entropies: what is below a millionth of a millibit is rounding. Zero has no sign.
    value, low, high = (f"{round(1000 * bits, 6) + 0.0:.3g}" for bits in (row["bits"], *row["ci95"]))
    return f"{value} [{low}, {high}]"


def _general(summary: Summary) -> list[str]:
    said = []
    for row in summary["levels"]:
        pairs = titled(row, f"{row['pairs']} pairs of {row['levels']}")
        bound = interval(row, "ceiling", "ceiling_ci95")
        said.append(
            f"Two levels of {row['factor']} in general ({pairs}) at step {row['checkpoint']}: {interval(row)} % by "
            f"{row['classifier']}, ceiling {bound} %; levels and documents resampled."
        )
    return said


def _shared(summary: Summary) -> list[str]:
    rows = summary["noise"]
    return [
        f"LEAK: {' and '.join(row['draws'])} begin with the same token at {row['agreements']} of {row['prompts']} prompts, "
        f"expected {row['expected']:.1f} (p {p_text(row['p_value'], '= ')}). Draws share noise: trust no other number here."
        for row in rows
        if row["p_value"] * len(rows) < LEAK
    ]


def _null(rows: list[Row]) -> list[str]:
    leaks = [row for row in rows if row["p_holm"] < LEAK]
    if leaks:
        return [
            f"LEAK: {titled(row)} at step {row['checkpoint']} is recognisable by {row['classifier']}, {interval(row)} %, "
            f"{_both_p(row)}. Two draws of one model must not be: trust no other number here."
            for row in leaks
        ]
    points = 100 * max((max(row["ci95"][1] - row["chance"], 0) for row in rows), default=0)
    return [f"Null: no leak above {points:.1f} points, at any checkpoint, by any classifier."] if rows else []


def _impossible(summary: Summary) -> list[str]:
    """Classifiers far beyond the likelihood ceiling: texts or likelihoods are then not what they claim to be."""

    def variance(bounds: Sequence[float]) -> float:
        return ((bounds[1] - bounds[0]) / 3.92) ** 2  # 95 % of a normal law lie within 3.92 standard errors

    if summary.get("reencoded"):  # it is no bound then
        return []
    return [
        f"IMPOSSIBLE: {row['classifier']} at step {row['checkpoint']} of {titled(row)} reads {interval(row)} %, above the "
        f"ceiling of {interval(row, 'ceiling', 'ceiling_ci95')} %: texts or likelihoods are wrong."
        for row in summary["comparisons"]
        if row["accuracy"] - row["ceiling"] > BEYOND * math.sqrt(variance(row["ci95"]) + variance(row["ceiling_ci95"]))
    ]


def _least_p(summary: Summary) -> tuple[float, float]:
    """The least p-value that one test can reach, before and after Holm."""
    least = 1 / (1 + summary["settings"]["attribution"]["permutations"])
    return least, min(1, least * len(summary["comparisons"]))


def _powerless(summary: Summary) -> list[str]:
    _, least = _least_p(summary)
    said = f"No test can reach p Holm < {SIGNIFICANT}: the least is {p_text(least)}. Raise attribution.permutations."
    return [said] if least >= SIGNIFICANT else []


def coverage(summary: Summary) -> list[str]:
    """What the numbers cover, and what they do not."""
    settings, (least, least_holm) = summary["settings"]["attribution"], _least_p(summary)
    return [
        "Accuracy is of texts that no choice was made on. The penalty of a classifier of counts is chosen on the validation "
        "part, and it is then fitted on the training and validation parts; a network is fitted on the training part, and the "
        "validation part says when to stop. No document is on two sides.",
        "The p-value permutes the labels among the texts of one prompt, the classifier fixed; the interval resamples "
        f"documents ({settings['bootstraps']} times, 95 %). Both cover the choice of the test texts. They do not cover the "
        "training of the classifier, nor that of the models: another run of the same level may read otherwise.",
        f"Holm's correction is over all {len(summary['comparisons'])} tests of this study. With {settings['permutations']} "
        f"permutations the least value that a test can reach is {p_text(least)} before and {p_text(least_holm)} after it.",
        "Which rung is best is chosen by its bits per text on the validation part, fitted on the training part alone; no test "
        "text has a say. Every rung's probabilities are at the scale that suits these texts best; a network's epoch was chosen "
        f"on them too, and so was the penalty of a classifier of counts. *Seen*: p Holm < {SIGNIFICANT}. *Not seen*: the "
        f"interval of the accuracy ends below chance and {100 * LEAST_EXCESS:g} points, the least excess that is of interest. "
        "Anything else is not decided at this power.",
        _REENCODED if summary.get("reencoded") else _CEILING,
        "A decision on several texts adds up their log-probabilities; the groups of prompts are the same for all classifiers "
        "and for the ceiling, and the interval resamples groups.",
        "Accuracies of comparisons with different numbers of classes are not comparable; AUC (mean over pairs of classes) and "
        "bits per text (log2 of the classes less the log-loss; negative where the classifier is worse than a guess) are.",
        *([_APART] if summary["apart"] else []),
        *([_COMPONENTS] if summary["components"] else []),
        *([_LEVELS] if summary["levels"] else []),
    ]


_CEILING = (
    "The ceiling is the accuracy of the likelihood itself on the same texts: no classifier can be better but by chance. "
    "Where its interval lies above chance, the models differ, whether or not a classifier finds it. The share is how much "
    "of the ceiling's excess over chance a classifier reads."
)
_REENCODED = (
    "Arms have different tokenizers, so that a text has other ids for each of them: every arm counts it by those that its own "
    "tokenizer gives it, one way of many to write it. The ceiling is an estimate then, and no bound, and nothing is concluded "
    "from it."
)
_LEVELS = (
    "Two levels in general: the interval resamples levels and documents. Of five to ten levels that differ much it is a little "
    "too narrow: in simulations a nominal 95 % covers 88 to 92 %."
)
_APART = (
    "A factor apart: the classifier was shown neither the runs that it is asked about nor their documents. The p-value "
    "exchanges the labels of the runs within every combination of the other factors, so it is over runs, which that of a "
    "comparison is not; its Holm is over the rows of that table. The intervals are of these runs."
)
_COMPONENTS = (
    "Components of distances are unbiased and not clipped: one of nothing is below zero as often as above. Their intervals "
    "resample documents, so they cover the texts and not other levels; chaos is of the twins that there are, not of every cell."
)


def confused(summary: Summary) -> list[Row]:
    """The rows whose confusions are shown: all arms at the last checkpoint, or a study's only factor where that is all.

    Of several temperatures and lengths, the last.
    """
    rows = summary["comparisons"]
    factor = "all" if any(row["factor"] == "all" for row in rows) else rows[0]["factor"]
    last = max(row["checkpoint"] for row in rows)
    rows = [row for row in rows if (row["factor"], row["checkpoint"]) == (factor, last)]
    return [row for row in rows if row["setting"] == rows[-1]["setting"]]
