"""A study that is a crossed grid: which of its texts are asked what about its factors, and the rows that this becomes.

Owns how draws become the arrays of `apart` and `decomposition`. Must not know how texts were drawn, how any number is computed,
or how results look.

Letters after an underscore name the axes: A arms and further draws, N texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from natfp_jax import config, rng, stats
from natfp_jax.apart import Crossed, held_out
from natfp_jax.decomposition import Component, Design, by_frequencies, by_places, frequency_distances
from natfp_jax.ladder import Counted
from natfp_jax.next_token import NextTokens
from natfp_jax.progress import Progress
from natfp_jax.study import Draw, Grid

__all__ = ["NEXT_TOKEN", "Texts", "apart", "components"]

NEXT_TOKEN = "next token"  # a distance, beside those by the pieces of a classifier

Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a grid at one checkpoint, and what counts them.

    Attributes:
      grid: its draws.
      rungs: the classifiers of counts, prepared with its texts.
      first: the row of each draw's first text among those.
      documents: of the prompts, in their order, which is that of every draw's texts.
    """

    grid: Grid
    rungs: Sequence[Counted]
    first: Mapping[Draw, int]
    documents: list[str]

    def rows(self, draws: Sequence[Draw]) -> np.ndarray:
        """The rows of all texts of some draws, one after another."""
        return np.concatenate([self.first[draw] + np.arange(len(self.documents)) for draw in draws])

    def crossed(self, factor: int) -> Crossed:
        """One factor against all others."""
        grid, each = self.grid, len(self.documents)

        def stratum(cell: tuple[str, ...]) -> str:
            named = zip(grid.factors, cell, strict=True)
            return ", ".join(f"{name} {level}" for k, (name, level) in enumerate(named) if k != factor)

        return Crossed(
            name=f"{grid.factors[factor]} apart @ {grid.step}" + (grid.setting and f", {grid.setting}"),
            rows=self.rows(list(grid.cells.values())),
            levels=[cell[factor] for cell in grid.cells for _ in range(each)],
            strata=[stratum(cell) for cell in grid.cells for _ in range(each)],
            documents=self.documents * len(grid.cells),
        )


def apart(every: Sequence[Texts], settings: config.Attribution, progress: Progress) -> Rows:
    """Of each factor, checkpoint and classifier of counts how well it is recognised in held-out strata."""
    rows = Rows()
    if not every:
        return rows
    steps = sum(len(one.grid.factors) * len(one.rungs) for one in every)
    with progress.task("the factors apart", steps, "classifiers") as advance:
        for one in every:
            for k, factor in enumerate(one.grid.factors):
                for rung in one.rungs:
                    found = held_out(rung, one.crossed(k), settings)
                    rows.append({"factor": factor, **_placed(one.grid), **asdict(found)})
                    advance(1)
    for row, p_holm in zip(rows, stats.holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = float(p_holm)
    return rows


def components(
    every: Sequence[Texts], expected: Sequence[NextTokens], settings: config.Attribution, progress: Progress
) -> Rows:
    """Of each checkpoint what the distance of two arms consists of: by the pieces of their texts, and by the next token."""
    rows = Rows()
    if not every:
        return rows
    with progress.task("distances", sum(1 + len(one.rungs) for one in every), "kinds") as advance:
        for one, next_token in zip(every, expected, strict=True):
            grid = one.grid

            def random(kind: str, grid: Grid = grid) -> np.random.Generator:
                return rng.generator(settings.split_seed, "components", grid.step, grid.setting, kind)

            def add(kind: str, found: list[Component], grid: Grid = grid) -> None:
                # What is expected next is of no temperature or length.
                setting = {"setting": ""} if kind == NEXT_TOKEN else {}
                rows.extend({**_placed(grid), **setting, "distance": kind, **asdict(one)} for one in found)
                advance(1)

            cells, twins = tuple(grid.cells), tuple(cell for cell, _ in grid.twins)
            models = Design(grid.factors, cells, twins)
            draws = Design(grid.factors, cells, twins, (grid.again[0],))
            arm_N, documents = np.repeat(np.arange(draws.arms), len(one.documents)), one.documents * draws.arms
            for rung in one.rungs:
                if rung.kind == "ngrams":  # runs share columns
                    advance(1)
                    continue
                counts_NV = rung.features.counts_NV[one.rows(grid.draws)]
                distances = frequency_distances(counts_NV, arm_N, documents, settings.split_seed, random(rung.kind))
                add(rung.kind, by_frequencies(draws, distances))
            of = next_token.distance_AAN, next_token.documents, random(NEXT_TOKEN)
            add(NEXT_TOKEN, by_places(models, *of, settings.bootstraps))
    return rows


def _placed(grid: Grid) -> dict[str, Any]:
    return {"checkpoint": grid.step, "setting": grid.setting}
