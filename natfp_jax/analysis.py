"""The analyses of a study: all that attribution.json says of its texts.

Owns which analyses are made of which texts, and the rows that they become. Must not know how texts were drawn, how any number
is computed, or how results look.

Letters after an underscore name the axes: N texts, A arms.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from natfp_jax import attribution, ladder, stats
from natfp_jax.attribution import Ceiling
from natfp_jax.ladder import Counted, Rung
from natfp_jax.study import Comparison, Draw, decisive
from natfp_jax.wording import wording
from natfp_jax.workspace import Workspace

__all__ = ["Analysis"]

Rows = list[dict[str, Any]]
Likelihoods = Mapping[tuple[Draw, str, int], np.ndarray]


class Analysis:
    """The texts of a study, prepared once for all that is asked of them.

    Args:
      work: the study.
      drawn: the rows of every draw, in the order of the prompts.
      test_rows: which of them are of the test part.
    """

    def __init__(self, work: Workspace, drawn: Mapping[Draw, Any], test_rows: np.ndarray) -> None:
        self.work, self.drawn, self.test_rows = work, drawn, test_rows
        self.settings, self.lengths = work.study.attribution, work.study.sampling.lengths
        self.first = {one: place * len(work.prompts) for place, one in enumerate(drawn)}  # row of each draw

    @cached_property
    def rungs(self) -> dict[int, list[Rung]]:
        """Of each length the classifiers, prepared with the texts of all draws."""
        tokenizer = self.work.store.tokenizer
        beginnings = {length: self._beginnings(length) for length in self.lengths}
        return {
            length: [ladder.prepare(kind, some, tokenizer) for kind in self.settings.classifiers]
            for length, some in beginnings.items()
        }

    def _beginnings(self, length: int) -> list[str]:
        """The texts of all draws, cut after so many tokens."""
        if length == self.lengths[-1]:
            return [text for table in self.drawn.values() for text in table["text"].to_pylist()]
        cut = [ids[:length] for table in self.drawn.values() for ids in table["ids"].to_pylist()]
        return self.work.store.tokenizer.decode_batch(cut)

    def made(self, likelihoods: Likelihoods) -> dict[str, Rows]:
        """Every analysis, by its name in attribution.json.

        Args:
          likelihoods: (draw, arm, step) → log-likelihood of the draw's test texts under the arm's checkpoint: [texts, lengths].
        """
        return {**self._compared(likelihoods), "noise": self._noise()}

    # --- comparisons ---

    def _compared(self, likelihoods: Likelihoods) -> dict[str, Rows]:
        rows, worded, told = Rows(), Rows(), decisive(self.work.comparisons)
        kinds, comparisons = self.settings.classifiers, self.work.comparisons
        with self.work.progress.task("attribute", len(comparisons) * len(kinds), "classifiers") as advance:
            for one in comparisons:
                compared, bound = self._comparison(one), self._ceiling(one, likelihoods)
                for rung in self.rungs[one.length]:
                    verdict = attribution.attribute(rung, compared, self.settings, bound)
                    advance(1)
                    rows.append(
                        {
                            **_named(one),
                            "temperature": one.draws[0].drawn_at(self.work.study.sampling),
                            "new_tokens": one.length,
                            "draws": [draw.name for draw in one.draws],
                            **asdict(verdict.result),
                            "ceiling": bound.accuracy,
                            "ceiling_ci95": bound.ci95,
                            "ceiling_pooled": [asdict(pooled) for pooled in bound.pooled],
                        }
                    )
                    if one in told and isinstance(rung, Counted) and rung.kind != "ngrams":  # runs share columns
                        worded.append({**_named(one), **asdict(wording(rung.features, compared, self.settings))})
        for row, p_holm in zip(rows, stats.holm([row["p_value"] for row in rows]), strict=True):
            row["p_holm"] = float(p_holm)
        return {"comparisons": rows, "wording": worded}

    def _comparison(self, one: Comparison) -> attribution.Comparison:
        prompts, sources = self.work.prompts, [(label, draw) for label, some in one.classes.items() for draw in some]
        count = len(prompts)
        return attribution.Comparison(
            name=f"{one.name} @ {one.step}" + (one.setting and f", {one.setting}"),
            rows=np.concatenate([self.first[draw] + np.arange(count) for _, draw in sources]),
            labels=[label for label, _ in sources for _ in range(count)],
            prompts=list(map(str, prompts.ids)) * len(sources),
            documents=list(prompts.documents) * len(sources),
            sources=[draw.name for _, draw in sources for _ in range(count)],
        )

    def _ceiling(self, one: Comparison, likelihoods: Likelihoods) -> Ceiling:
        sources = [(label, draw) for label, some in one.classes.items() for draw in some]
        count, place = len(self.work.prompts), self.lengths.index(one.length)
        likelihood_NA = np.full((count * len(sources), len(sources)), np.nan)
        for block, (_, draw) in enumerate(sources):
            for column, (_, other) in enumerate(sources):
                likelihood_NA[block * count + self.test_rows, column] = likelihoods[draw, other.arm, other.step][:, place]
        return attribution.ceiling(likelihood_NA, [label for label, _ in sources], self._comparison(one), self.settings)

    # --- controls ---

    def _noise(self) -> Rows:
        """Of each null whether its two draws share noise: by how often their first tokens are the same."""
        rows = dict[tuple[Draw, ...], dict[str, Any]]()
        for one in self.work.comparisons:
            if one.factor != "null" or tuple(one.draws) in rows:  # at another length
                continue
            first, again = (self.drawn[draw] for draw in one.draws)
            same_N = np.array([a[0] == b[0] for a, b in zip(first["ids"].to_pylist(), again["ids"].to_pylist(), strict=True)])
            chance_N = np.exp([log_p[0] for log_p in first["log_probabilities"].to_pylist()])
            rows[tuple(one.draws)] = {
                "draws": [draw.name for draw in one.draws],
                "checkpoint": one.step,
                "prompts": len(same_N),
                "agreements": int(same_N.sum()),
                "expected": float(chance_N.sum()),
                "p_value": stats.agreement_p(same_N, chance_N),
            }
        return list(rows.values())


def _named(one: Comparison) -> dict[str, Any]:
    return {"name": one.name, "factor": one.factor, "checkpoint": one.step, "setting": one.setting}
