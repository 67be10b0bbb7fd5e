"""Who is to blame for what in a suite of checkpoints.

Owns what was found of every claim, and the rules by which a judgement may rest on a checkpoint. Must not know how anything is
judged (ancestry.py, trajectories.py), nor how verdicts are shown.

Blame falls on a checkpoint only for what is wrong with itself. Where it cannot be told which of those that contradict one
another is wrong, the contradiction is said once, of all that take part in it. What is found wrong, or may be, is no witness in
what is judged after it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from natfp_jax.claims import Verdict
from natfp_jax.kinship import joined
from natfp_jax.likeness import Likeness
from natfp_jax.suite import Listed

__all__ = ["About", "Between", "Found", "Pedigree", "listing", "stepping"]

About = Literal["start", "descent", "lineage", "place", "weights"]


@dataclass(frozen=True)
class Found:
    """What was found of one claim of one checkpoint.

    Attributes:
      detail: the same for checkpoints that can be told of together.
      figures: name → value.
    """

    verdict: Verdict
    detail: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Between:
    """What is wrong between checkpoints, where nothing says with which of them."""

    branches: tuple[str, ...]
    claim: str
    detail: str


class Pedigree:
    """What was found so far; checkpoints are numbered as they are listed.

    Attributes:
      found: checkpoint → what was found, claim by claim.
      between: what is not to be blamed on one.
      branches: branch → its checkpoints, by step.
      at: (branch, step) → checkpoint.
      kin: a number that checkpoints with the same weights have in common.
      resting: later checkpoints that may well be no further than an earlier one.
      doubtful: pairs of a branch with the same weights, one of which is wrong.
    """

    def __init__(self, listed: Sequence[Listed], likeness: Likeness) -> None:
        self.listed, self.likeness = listed, likeness
        self.found: list[dict[About, Found]] = [{} for _ in listed]
        self.between: list[Between] = []
        self.branches = {one.branch: [c for c, other in enumerate(listed) if other.branch == one.branch] for one in listed}
        self.at = {(one.branch, one.step): c for c, one in enumerate(listed)}
        self.kin = joined(len(listed), (pair for pair in combinations(range(len(listed)), 2) if self._same(*pair)))
        self.resting = set[int]()
        self.doubtful: list[tuple[int, int]] = []

    def _same(self, one: int, other: int) -> bool:
        left, right = self.listed[one], self.listed[other]
        begun = left.step == right.step == 0 and left.init == right.init
        return bool(self.likeness.equal(one, other)) or (begun and self.likeness.equal_if_rounded(one, other))

    def equals(self, c: int) -> list[int]:
        """The other checkpoints with the same weights."""
        return [other for other, kin in enumerate(self.kin) if kin == self.kin[c] and other != c]

    def called(self, c: int) -> str:
        """Its name in a sentence."""
        return f"{self.listed[c].branch} step {self.listed[c].step}"

    def later(self, branch: str) -> list[int]:
        """The checkpoints of a branch behind step 0 that nothing speaks against so far."""
        return [c for c in self.branches[branch] if self.listed[c].step and self.trusted(c)]

    # --- judging ------------------------------------------------------------------------------------------------------

    def wrong(self, c: int) -> bool:
        """Whether a claim of this checkpoint is false."""
        return any(found.verdict == "false" for found in self.found[c].values())

    def trusted(self, c: int) -> bool:
        """Whether nothing speaks against it so far."""
        return not self.wrong(c) and not any(c in pair for pair in self.doubtful)

    def say(self, c: int, about: About, verdict: Verdict, detail: str, figures: dict[str, float] | None = None) -> None:
        """What was found of a claim."""
        known = {name: value for name, value in (figures or {}).items() if not math.isnan(value)}
        self.found[c][about] = Found(verdict, detail, known)

    def rest(self, c: int, why: str) -> None:
        """It has the weights of an earlier step, which is no contradiction."""
        self.resting.add(c)
        self.say(c, "weights", "recorded", why)

    def contradict(self, checkpoints: Iterable[int], claim: str, detail: str) -> None:
        """What is wrong between checkpoints; what is wrong between the same branches is put together."""
        branches = tuple(dict.fromkeys(self.listed[c].branch for c in sorted(checkpoints)))
        for place, had in enumerate(self.between):
            if {*branches} == {*had.branches} and claim == had.claim:
                if detail not in had.detail:
                    self.between[place] = Between(had.branches, claim, f"{had.detail}; {detail}")
                return
        self.between.append(Between(branches, claim, detail))


def listing(names: Iterable[object], most: int = 4) -> str:
    """The first few, and how many more there are."""
    every = [str(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return f"{', '.join(every[:most])}{more}"


def stepping(steps: Iterable[int], most: int = 12) -> str:
    """Steps by their numbers."""
    every = sorted(steps)
    return f"step{'s' if len(every) > 1 else ''} {listing(every, most)}"
