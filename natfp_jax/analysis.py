"""The analyses of a study: all that attribution.json says of its texts.

Owns which analyses are made of which texts, and the rows that they become. Must not know how texts were drawn, how any number
is computed, or how results look.

Letters after an underscore name the axes: N texts, A arms.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, cast

import numpy as np

from natfp_jax import attribution, config, grid, ladder, rng, stats
from natfp_jax.attribution import Ceiling
from natfp_jax.ladder import NETWORKS, Counted, Rung
from natfp_jax.next_token import NextTokens
from natfp_jax.study import Comparison, Draw, Grid, answers, decisive
from natfp_jax.wording import wording
from natfp_jax.workspace import Workspace

__all__ = ["Analysis"]

NO_FACTORS = ("all", "null", "twin")  # what a comparison may be of instead

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
        self.costs: dict[str, tuple[float, int]] = {}  # classifier → seconds, and texts that it was fitted on or asked for
        self.first = {one: place * len(work.prompts) for place, one in enumerate(drawn)}  # row of each draw

    @cached_property
    def rungs(self) -> dict[int, dict[str, Rung]]:
        """Length → classifier → it, prepared with the texts of all draws."""
        tokenizer = self.work.store.tokenizer
        beginnings = {length: self._beginnings(length) for length in self.lengths}
        return {
            length: {kind: ladder.prepare(kind, some, tokenizer) for kind in self.settings.classifiers}
            for length, some in beginnings.items()
        }

    def _beginnings(self, length: int) -> list[str]:
        """The texts of all draws, cut after so many tokens."""
        if length == self.lengths[-1]:
            return [text for table in self.drawn.values() for text in table["text"].to_pylist()]
        return [
            text
            for one, table in self.drawn.items()
            for text in self.work.written(one.arm, self.work.prompts, [ids[:length] for ids in table["ids"].to_pylist()])
        ]

    def made(
        self, likelihoods: Likelihoods, grids: Sequence[Grid] = (), expected: Sequence[NextTokens] = ()
    ) -> dict[str, Rows]:
        """Every analysis, by its name in attribution.json.

        Args:
          likelihoods: (draw, arm, step) → log-likelihood of the draw's test texts under the arm's checkpoint: [texts, lengths].
          grids: the study as a crossed grid, at each checkpoint.
          expected: what the models of each grid expect next.
        """
        told, fractions = decisive(self.work.comparisons), self.settings.learning_curve
        learnt = [one for one in told if fractions and one.factor not in NO_FACTORS]
        judges = self._judges()
        steps = sum(map(len, judges)) + len(fractions) * len(learnt) * len(self.settings.classifiers)
        compared, worded, curves, by_pair = Rows(), Rows(), Rows(), _Pairs()
        with self.work.progress.task("attribute", steps, "classifiers") as advance:
            for one, kinds in zip(self.work.comparisons, judges, strict=True):
                texts, bound = self._comparison(one), self._ceiling(one, likelihoods)
                for kind in kinds:
                    rung = self.rungs[one.length][kind]
                    verdict = self._attributed(rung, texts, bound)
                    advance(1)
                    compared.append(self._row(one, verdict.result, bound))
                    by_pair.add(one, rung.kind, verdict.correct_N, verdict.documents_N, bound.scores_N)
                    if one not in told:
                        continue
                    if isinstance(rung, Counted) and rung.kind != "ngrams":  # runs share columns
                        worded.append({**_named(one), **asdict(wording(rung.features, texts, self.settings))})
                    if one not in learnt:
                        continue
                    for fraction in fractions:
                        curves.append(_point(one, self._attributed(rung, texts, bound, fraction).result, bound))
                        advance(1)
                    curves.append(_point(one, verdict.result, bound))
        for row, p_holm in zip(compared, stats.holm([row["p_value"] for row in compared]), strict=True):
            row["p_holm"] = float(p_holm)
        crossed = [self._texts(one) for one in grids]
        return {
            **{"comparisons": compared, "wording": worded, "curves": curves, "levels": by_pair.rows(self.settings)},
            "noise": self._noise(),
            "apart": grid.apart(crossed, self.settings, self.work.progress),
            "components": grid.components(crossed, expected, self.settings, self.work.progress),
        }

    def _texts(self, one: Grid) -> grid.Texts:
        counted = [rung for rung in self.rungs[one.length].values() if isinstance(rung, Counted)]
        return grid.Texts(one, counted, {draw: self.first[draw] for draw in one.draws}, list(self.work.prompts.documents))

    # --- comparisons ---

    def _judges(self) -> list[list[str]]:
        """The classifiers of each comparison: networks take a training each, and are kept for what the answer rests on."""
        every, answering = self.work.comparisons, {id(one) for one in answers(self.work.comparisons)}
        return [[kind for kind in self.settings.classifiers if kind not in NETWORKS or id(one) in answering] for one in every]

    def _attributed(
        self, rung: Rung, texts: attribution.Comparison, bound: Ceiling, fraction: float = 1.0
    ) -> attribution.Verdict:
        begun = time.perf_counter()
        verdict = attribution.attribute(rung, texts, self.settings, bound, fraction)
        seconds, count = self.costs.get(rung.kind, (0.0, 0))
        used = verdict.result.training_texts + verdict.result.test_texts
        self.costs[rung.kind] = seconds + time.perf_counter() - begun, count + used
        return verdict

    def _row(self, one: Comparison, result: attribution.Result, bound: Ceiling) -> dict[str, Any]:
        return {
            **_named(one),
            "temperature": one.draws[0].drawn_at(self.work.study.sampling),
            "new_tokens": one.length,
            "draws": [draw.name for draw in one.draws],
            **asdict(result),
            "ceiling": bound.accuracy,
            "ceiling_ci95": bound.ci95,
            "ceiling_pooled": [asdict(pooled) for pooled in bound.pooled],
        }

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


class _Pairs:
    """Hits of every pair of levels, for what can be said of levels in general."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int, str, str], list[tuple[Comparison, np.ndarray, np.ndarray, np.ndarray]]] = {}

    def add(self, one: Comparison, kind: str, correct_N: np.ndarray, documents_N: np.ndarray, scores_N: np.ndarray) -> None:
        """Keeps a comparison if it is of two levels of a factor."""
        if one.factor in NO_FACTORS or len(one.draws) != 2:
            return
        of = one.factor, one.step, one.setting, kind
        self.found.setdefault(of, []).append((one, correct_N, documents_N, scores_N))

    def rows(self, settings: config.Attribution) -> Rows:
        """Of each factor with levels enough the mean accuracy over its pairs, with an interval over levels and documents."""
        rows = Rows()
        for (factor, step, setting, kind), some in self.found.items():
            pairs = [cast("tuple[str, str]", tuple(one.classes)) for one, *_ in some]
            levels = len({name for pair in pairs for name in pair})
            if levels < stats.LEAST_LEVELS:
                continue
            scores = {"accuracy": [correct_N for _, correct_N, _, _ in some], "ceiling": [bound_N for *_, bound_N in some]}
            intervals = {}
            for name, score_PN in scores.items():
                random = rng.generator(settings.split_seed, "levels", factor, step, setting, kind, name)
                intervals[name] = stats.levels_interval(pairs, score_PN, some[0][2], random, settings.bootstraps)
            rows.append(
                {
                    **{"factor": factor, "checkpoint": step, "setting": setting, "classifier": kind},
                    **{"levels": levels, "pairs": len(pairs), "chance": 0.5},
                    **{"accuracy": float(np.mean(scores["accuracy"])), "ci95": intervals["accuracy"]},
                    **{"ceiling": float(np.mean(scores["ceiling"])), "ceiling_ci95": intervals["ceiling"]},
                }
            )
        return rows


def _point(one: Comparison, result: attribution.Result, bound: Ceiling) -> dict[str, Any]:
    """A point of a learning curve: no test, since the same texts were tested with all others."""
    judged = "accuracy", "ci95", "bits_per_text", "validation_bits", "share", "share_ci95"
    kept = "classifier", "training_texts", "test_texts", "chance", *judged
    found = asdict(result)
    bounds = {"ceiling": bound.accuracy, "ceiling_ci95": bound.ci95}
    return {**_named(one), "new_tokens": one.length, **{name: found[name] for name in kept}, **bounds}


def _named(one: Comparison) -> dict[str, Any]:
    return {"name": one.name, "factor": one.factor, "checkpoint": one.step, "setting": one.setting}
