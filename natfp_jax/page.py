"""The page report.md.

Owns what stands on it and in which order. A function of the summary alone; must not know files or how anything was computed.
"""

import json
import re
from collections.abc import Sequence

from natfp_jax.contrast import held
from natfp_jax.courses import trajectories
from natfp_jax.findings import (
    Summary,
    best_rungs,
    confused,
    coverage,
    decision,
    decisive,
    headline,
    interval,
    millibits,
    p_text,
    percent,
    share,
    titled,
    verdicts,
)
from natfp_jax.tables import cells

__all__ = ["grid", "markdown"]

TOLD = 10  # telling pieces shown for each class


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table whose first `words` columns are words and whose others are numbers."""
    rule = ["---" if place < words else "---:" for place in range(len(header))]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _piece(text: str) -> str:
    """A piece of text as code: what cannot be seen is written out."""
    return _code(repr(text)[1:-1].replace(" ", "␣"))


def _code(seen: str) -> str:
    """A code span, whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", seen)), default=0)
    return f"{'`' * (longest + 1)} {seen} {'`' * (longest + 1)}" if longest else f"`{seen}`"


def _example(example: dict[str, str]) -> str:
    """A piece among its neighbours, as code."""
    return _code(repr(f"{example['before']}⟦{example['piece']}⟧{example['after']}")[1:-1])


def _wording(summary: Summary) -> list[str]:
    """How the sources use pieces otherwise: for each comparison and kind of piece a sentence and a table."""
    header = ["piece", "source", "used", "example", "log-odds [95 %]", "stability %", "held-out z"]
    blocks = []
    for one in summary["wording"]:
        said = (
            f"**{titled(one)}, step {one['checkpoint']}, {one['classifier']}**: {one['stable']:,} of {one['tested']:,} are "
            f"stable, about {one['by_chance']:.1f} would be by chance; {one['held']:,} of the stable keep their sign in the "
            "test texts."
        )
        rows = [
            [
                *(_piece(word["piece"]), word["source"], word["used"]),
                _example(word["examples"][0]) if word["examples"] else "",
                f"{word['log_odds']:+.2f} [{word['ci95'][0]:+.2f}, {word['ci95'][1]:+.2f}]",
                *(f"{100 * word['stability']:.0f}", f"{word['held_out_z']:+.1f}"),
                *(f"{word['per_10000']:.1f}", f"{word['per_10000_elsewhere']:.1f}"),
            ]
            for word in one["words"]
        ]
        blocks += [said, grid([*header, "per 10,000 there", "elsewhere"], rows, words=4)] if rows else [said]
    return blocks


def _comparison_grid(summary: Summary) -> str:
    header = ["comparison", "classifier", "step", "accuracy % [95 %]", "chance %", "p", "p Holm", "AUC", "bits/text"]
    rows = [
        [
            *(titled(row), row["classifier"], str(row["checkpoint"]), *cells([row])[:-1]),
            *(interval(row, "ceiling", "ceiling_ci95"), share(row), str(row["test_texts"]), str(row["test_prompts"])),
        ]
        for row in summary["comparisons"]
    ]
    return grid([*header, "ceiling % [95 %]", "share % [95 %]", "test texts", "test prompts"], rows, words=2)


def _best_grid(summary: Summary) -> str:
    header = ["comparison", "best by validation", "decision", "step", "validation bits/text", "accuracy % [95 %]", "chance %"]
    rows = [
        [
            *(titled(row), row["classifier"], decision(row), str(row["checkpoint"]), f"{row['validation_bits']:+.3f}"),
            *(interval(row), percent(row["chance"]), p_text(row["p_holm"])),
            *(interval(row, "ceiling", "ceiling_ci95"), share(row)),
        ]
        for row in best_rungs(summary)
    ]
    return grid([*header, "p Holm", "ceiling % [95 %]", "share % [95 %]"], rows, words=3)


def _learning_grid(summary: Summary) -> str:
    header = ["comparison", "classifier", "step", "texts to learn from", "accuracy % [95 %]", "chance %", "bits/text"]
    rows = [
        [
            *(titled(row), row["classifier"], str(row["checkpoint"]), f"{row['training_texts']:,}", interval(row)),
            *(percent(row["chance"]), f"{row['bits_per_text']:+.3f}", interval(row, "ceiling", "ceiling_ci95"), share(row)),
        ]
        for row in summary["curves"]
    ]
    return grid([*header, "ceiling % [95 %]", "share % [95 %]"], rows, words=2)


def _pooled_grid(summary: Summary) -> str:
    header = ["comparison", "classifier", "step", "texts", "decisions", "accuracy % [95 %]", "chance %", "ceiling % [95 %]"]
    rows = [
        [
            *(titled(row), row["classifier"], str(row["checkpoint"]), str(one["texts"]), str(one["decisions"])),
            *(interval(one), percent(row["chance"]), interval(best)),
        ]
        for row in decisive(summary)
        for one, best in zip(row["pooled"], row["ceiling_pooled"], strict=True)
    ]
    return grid(header, rows, words=2) if rows else "There are too few test prompts for it."


def trained(summary: Summary) -> bool:
    """Whether any arm was."""
    return any(arm["steps"] for arm in summary["arms"])


def _corpus(summary: Summary) -> str:
    """What arms were trained on, and prompts are of; of published models alone it is of the prompts."""
    corpus = summary["corpus"]
    if all("published" in arm for arm in summary["arms"]):
        return f"Prompts unless from a file: corpus {corpus['name']}, sha256 `{corpus['sha256'][:16]}`"
    return f"Corpus {corpus['name']}, {corpus['tokens']:,} training tokens, sha256 `{corpus['sha256'][:16]}`"


def _arm_grid(summary: Summary) -> str:
    arms = summary["arms"]
    hashes = ("fingerprint", "init_hash", "order_hash", "final_hash")
    header = ["arm", "fingerprint", "initial weights", "order", "final weights", "seeds", "val. loss", "steps", "tokens"]
    rows = [
        [
            *(arm["id"], *("" if arm[name] is None else f"`{arm[name][:12]}`" for name in hashes)),
            ", ".join(f"{name} {seed}" for name, seed in arm["seeds"].items()),
            *("" if arm["val_loss"] is None else f"{arm['val_loss']:.4f}", f"{arm['steps']:,}", f"{arm['tokens']:,}"),
        ]
        for arm in arms
    ]
    weights, orders, final = (len({arm[name] for arm in arms}) for name in hashes[1:])
    proof = f"{len(arms)} arms; different initial weights: {weights}, orders: {orders}, final weights: {final}."
    return f"{grid(header, rows, words=6)}\n\n{proof}"


def _contrast_grid(summary: Summary) -> str:
    """In which fields of its experiment each arm departs from the base arm, which stands first."""
    base = summary["arms"][0]["id"]
    rows = [
        [arm["id"], f"`{path}`", *(_code(json.dumps(value)) for value in values)]
        for arm in summary["arms"]
        for path, values in arm["differs"].items()
    ]
    return grid(["arm", "field", base, "there"], rows, words=4)


def _stage_grid(summary: Summary) -> str:
    rows = []
    for stage, entry in summary["stages"].items():
        amounts = [(amount, name) for name, amount in entry.items() if name != "seconds"]
        rate = ", ".join(f"{amount / max(entry['seconds'], 0.01):,.0f} {name}/s" for amount, name in amounts)
        rows.append([stage, f"{entry['seconds']:,.1f}", ", ".join(f"{amount:,} {name}" for amount, name in amounts), rate])
    return grid(["stage", "seconds", "amount", "rate"], rows, words=1)


def _apart_grid(summary: Summary) -> str:
    header = ["factor", "classifier", "step", "runs", "held-out runs % [95 %]", "from one stratum", "within a stratum"]
    rows = [
        [
            *(titled(row, row["factor"]), row["classifier"], str(row["checkpoint"]), f"{row['levels']} x {row['strata']}"),
            *(interval(row), interval(row, "one_accuracy", "one_ci95"), interval(row, "within_accuracy", "within_ci95")),
            *(percent(row["chance"]), p_text(row["p_value"]), p_text(row["p_holm"]), p_text(row["least_p"])),
            *(str(row["training_texts"]), str(row["test_texts"])),
        ]
        for row in summary["apart"]
    ]
    return grid([*header, "chance %", "p", "p Holm", "least p", "training texts", "test texts"], rows, words=2)


def _component_grid(summary: Summary) -> str:
    rows = [
        [titled(row, row["distance"]), row["component"], str(row["checkpoint"]), millibits(row), share(row)]
        for row in summary["components"]
    ]
    return grid(["distance", "component", "step", "millibits [95 %]", "share of all % [95 %]"], rows, words=2)


def _apart(summary: Summary) -> list[str]:
    """What is said of a crossed grid."""
    if not summary["components"]:
        return []
    drawn = ["![components of the distances by training step](components.png)", "*Bands are 95 % intervals over documents.*"]
    return [
        "## The factors apart",
        "Each factor's levels, recognised in runs that the classifier was not shown. A *stratum* is a combination of the other "
        "factors: the classifier learns from the runs of all strata but one, and is asked about that one's, in other "
        "documents. *From one stratum*: it learns from one alone, and p is of that. *Within a stratum*: it is asked about runs "
        "that it learnt from; what these have beyond the held-out ones is of these runs alone. p exchanges the labels of runs "
        "within strata; *least p* is as far as it can go with so many runs.",
        _apart_grid(summary),
        "How far apart two models are that differ in every factor (*all*; Jensen-Shannon divergence), and what each factor "
        "adds to that. *Interaction*: what is of a combination of levels alone; *chaos*: what a twin has too, from a change in "
        "the last place of one weight. By subwords and words: frequencies in the texts, freed from *sampling noise*, which "
        "stands beside them for half of an arm's texts; the *null*, two draws of one model, must be about zero. By next token: "
        "what the models expect after a prompt, exactly, at temperature 1 and without truncation.",
        _component_grid(summary),
        *(drawn if trajectories(summary) else []),
    ]


def markdown(summary: Summary) -> str:
    """The page report.md."""
    rows = confused(summary)
    scene = f"{titled(rows[0])}, step {rows[0]['checkpoint']}"
    telling = [
        [row["classifier"], name, " ".join(map(_piece, pieces[:TOLD]))]
        for row in rows
        for name, pieces in row["telling"].items()
    ]
    numerics = json.dumps(summary["numerics"], indent=1, ensure_ascii=False)

    def bullets(lines: list[str]) -> str:
        return "\n".join(f"- {line}" for line in lines)

    blocks = [
        f"# {headline(summary)}",
        f"{_corpus(summary)}; study `{summary['fingerprint'][:16]}`.",
        bullets(verdicts(summary)),
        "## What the arms differ in",
        _contrast_grid(summary),
        bullets(held(summary["arms"])),
        "## Comparisons",
        _comparison_grid(summary),
        "![accuracies with intervals, chance and ceilings](accuracies.png)",
        "*Bars are 95 % intervals over test documents; dashed lines are chance, diamonds the likelihood ceiling.*",
        "## Which rung is best",
        "Of each comparison that the answer rests on, the classifier with the most bits per text on the validation part.",
        _best_grid(summary),
        "## What the accuracy goes with",
        "![accuracy by training step, texts to learn from, their length, and texts in one decision](courses.png)",
        "*Bands are 95 % intervals over test documents (over groups of prompts where texts are pooled); black is the "
        "likelihood ceiling.*",
        *([_learning_grid(summary)] if summary["curves"] else []),
        "## Several texts of one model in one decision",
        _pooled_grid(summary),
        *_apart(summary),
        f"## Who is taken for whom: {scene}",
        *(f"![confusion matrix, {row['classifier']}](confusion-{row['classifier']}.png)" for row in rows),
        "The pieces that speak most for each source, strongest first. Ids in <> are of one that has no text, such as a part of "
        "a character.",
        grid(["classifier", "source", "pieces"], telling, words=3),
        "## Which words",
        "Pieces that a source uses more or less than the others, in the training and validation texts, the surest first. The "
        "log-odds ratio has a weak prior from all sources together. *Stability*: the part of the resamples of documents in "
        "which it keeps its sign, 1.96 errors from zero; from 95 % a piece is called stable. *Held-out z*: the ratio in the "
        "test texts, in errors, positive where the sign is the same. Of two sources what one uses more the other uses less: "
        "it stands there once.",
        *_wording(summary),
        "## Training",
        *(["![loss curves](losses.png)"] if trained(summary) else []),
        _arm_grid(summary),
        "## What the numbers cover",
        bullets(coverage(summary)),
        "## What this study lacks",
        bullets(summary["lacking"]) or "Nothing that is known of.",
        "## Time",
        _stage_grid(summary),
        "## Numerics",
        f"<details><summary>What bits may depend on beyond the experiments</summary>\n\n```json\n{numerics}\n```\n\n</details>",
    ]
    return "\n\n".join(blocks) + "\n"
