"""From which step 0 the checkpoints of a suite come.

Owns the verdicts on step 0 and on descent. Must not know what happens between two later steps.

A start is what is listed as a step 0. It shows in a checkpoint where z (`Likeness.descent`) is beyond what chance does in the
whole suite together. It shows in all that was trained on from it, so also in trained weights that someone has published as a
step 0; these show in what was trained from there, more than the start does. So where two starts show in one another,
nothing is concluded from which of them shows more.

That no start shows is no reproach by itself, since training may lead away from it. It is one where the same training, or two
others, have kept half of theirs by then or later.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from natfp_jax.kinship import Numbers, assigned, beyond
from natfp_jax.likeness import FLOAT32
from natfp_jax.pedigree import Pedigree, listing, stepping

__all__ = ["Ancestry"]

_KEPT, _LOST = 0.5, 0.25  # correlations with a start: what others still have of it, and what one has lost that has less
_VOICES = 2.0  # of a branch's later steps together; its step 0 has one


class Ancestry:
    """The starts of a suite, and what comes from them.

    Attributes:
      starts: the different starts, each by the first checkpoint that has it.
      z, cosine: of every checkpoint with each of them.
      come: later checkpoint → the start that it descends from, where that is known.
    """

    starts: list[int]
    z: Numbers
    cosine: Numbers

    def __init__(self, pedigree: Pedigree) -> None:
        self.pedigree, self.listed = pedigree, pedigree.listed
        self.come: dict[int, int] = {}
        self._look()
        if self._borrowed():
            self._look()
        self._begun = self._assigned()
        for zero in self._zeros():
            if not pedigree.wrong(zero):
                self._begins(zero)
        self._independent()
        self._descend()

    # --- starts -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """How much of which start is in what."""
        zeros = [zero for zero in self._zeros() if self.pedigree.trusted(zero)]
        self.starts = sorted({self.pedigree.kin[zero]: zero for zero in reversed(zeros)}.values())
        shown = self.pedigree.likeness.descent(self.starts) if self.starts else np.zeros((2, len(self.listed), 0))
        self.z, self.cosine = shown
        self._limit = beyond(len(self.listed) * max(len(self.starts), 1))

    def _zeros(self, init: int | None = None) -> list[int]:
        """The checkpoints of step 0, of one seed or of all."""
        return [c for c, one in enumerate(self.listed) if one.step == 0 and init in (None, one.init)]

    def start(self, c: int) -> int | None:
        """The start that a checkpoint is equal to."""
        return next((start for start in self.starts if self.pedigree.kin[start] == self.pedigree.kin[c]), None)

    def _own(self, branch: str) -> int | None:
        """The start that a branch lists."""
        zero = self.pedigree.at.get((branch, 0))
        return None if zero is None else self.start(zero)

    def _shows(self, start: int, c: int) -> bool:
        return bool(self.z[c, self.starts.index(start)] > self._limit)

    def _showing(self, c: int) -> list[int]:
        """The starts that show in a checkpoint, those first that do most."""
        some = [start for start in self.starts if self._shows(start, c)]
        return sorted(some, key=lambda start: -self.cosine[c, self.starts.index(start)])

    def _figures(self, c: int, start: int) -> dict[str, float]:
        place = self.starts.index(start)
        return {"correlation": float(self.cosine[c, place]), "z": float(self.z[c, place])}

    def _sharing(self, start: int) -> list[int]:
        """The checkpoints of step 0 that have this start."""
        return [c for c in sorted([start, *self.pedigree.equals(start)]) if self.listed[c].step == 0]

    def _whose(self, start: int) -> str:
        return f"step 0 of {listing(self.listed[c].branch for c in self._sharing(start))}"

    def _clear(self, start: int) -> bool:
        """Whether it is known which seed a start is of."""
        return any(clear and own == start for own, clear in self._begun.values())

    # --- step 0 -------------------------------------------------------------------------------------------------------

    def _borrowed(self) -> bool:
        """Whether any step 0 has the weights of a later step of another branch and is at home there, but not in its own."""
        pedigree = self.pedigree

        def at_home(branch: str, start: int, but: int) -> bool:
            own = self._own(branch)
            begun = own not in (None, start) and self._shows(own, but)
            return begun or any(self._shows(start, c) for c in pedigree.later(branch) if c != but and self.start(c) is None)

        found = False
        for zero in self._zeros():
            start, own = self.start(zero), self.listed[zero].branch
            if start is None or not pedigree.trusted(zero):
                continue
            for c in pedigree.equals(zero):
                other = self.listed[c].branch
                if self.listed[c].step and other != own and at_home(other, start, c) and not at_home(own, start, zero):
                    pedigree.say(zero, "start", "false", f"it has the weights of {pedigree.called(c)}")
                    found = True
                    break
        return found

    def _assigned(self) -> dict[int, tuple[int | None, bool]]:
        """Init seed → its start, and whether that is clear."""
        inits = sorted({one.init for one in self.listed})
        support_IJ = np.zeros((len(inits), len(self.starts)))
        for branch, checkpoints in self.pedigree.branches.items():
            i = inits.index(self.listed[checkpoints[0]].init)
            if (own := self._own(branch)) is not None:
                support_IJ[i, self.starts.index(own)] += 1
            later = [c for c in self.pedigree.later(branch) if self.start(c) is None]
            for c in later:
                for place in self._related(self._showing(c)[:1]):
                    support_IJ[i, place] += min(_VOICES, len(later)) / len(later)
        chosen = [(None if j is None else self.starts[j], clear) for j, clear in assigned(support_IJ)]
        return dict(zip(inits, chosen, strict=True))

    def _related(self, some: Sequence[int]) -> list[int]:
        """The places of starts, and of those that show in them or that they show in."""
        related = {other for start in some for other in self.starts if self._shows(start, other) or self._shows(other, start)}
        return [self.starts.index(start) for start in sorted(related | {*some})]

    def _begins(self, zero: int) -> None:
        """Judges a step 0."""
        pedigree, one, own = self.pedigree, self.listed[zero], self.start(zero)
        start, clear = self._begun[one.init]
        others = [other for other in self._zeros(one.init) if other != zero and pedigree.trusted(other)]
        if not pedigree.trusted(zero):
            if clear and start is not None and self._shows(start, zero):
                step = next(self.listed[later].step for earlier, later in pedigree.doubtful if earlier == zero)
                pedigree.say(zero, "start", "false", f"it has the weights of step {step} of its branch")
                pedigree.doubtful = [pair for pair in pedigree.doubtful if zero not in pair]
        elif not clear:
            pedigree.say(zero, "start", "recorded", "which start this seed has is not clear")
            unlike = [other for other in others if pedigree.kin[other] != pedigree.kin[zero]]
            alike = [c for c in pedigree.equals(zero) if self.listed[c].step == 0 and self.listed[c].init != one.init]
            if unlike:
                detail = "it differs, and nothing says which is right"
                pedigree.contradict([zero, *unlike], "step 0 is the same where the init seed is", detail)
            if alike:
                detail = "it is the same, and nothing says whose it is"
                pedigree.contradict([zero, *alike], "step 0 differs where the init seed does", detail)
        elif start is not None and start == own:
            same = [other for other in others if pedigree.kin[other] == pedigree.kin[zero]]
            also = listing(self.listed[c].branch for c in same)
            detail = f"the same as in {also}" if same else "no other branch of this seed is listed with one"
            coarse = {pedigree.likeness.equal(zero, other) or "16 bits" for other in same} - {FLOAT32}
            detail += f", up to rounding to {' or '.join(sorted(coarse))}" if coarse else ""
            apart = [abs(r) for r in np.delete(self.cosine[zero], self.starts.index(start)).tolist() if r == r]
            figures = {"correlation with other starts at most": max(apart)} if apart else {}
            pedigree.say(zero, "start", "proven" if same or apart else "recorded", detail, figures)
        else:
            pedigree.say(zero, "start", "false", self._instead(zero, own))

    def _instead(self, zero: int, own: int | None) -> str:
        """What a step 0 is, if it is not the start of its seed."""
        pedigree, one = self.pedigree, self.listed[zero]
        for init, (start, clear) in self._begun.items():
            if clear and start == own and own is not None:
                also = listing(self.listed[c].branch for c in self._sharing(own) if c != zero)
                return f"it is the start of init seed {init}" + (f", as in {also}" if also else "")
        for c in pedigree.equals(zero):
            if self.listed[c].step:
                return f"it has the weights of {pedigree.called(c)}"
        right = [self.listed[c].branch for c in self._zeros(one.init) if self.start(c) == self._begun[one.init][0]]
        went = any(self._showing(c)[:1] == [own] for c in pedigree.later(one.branch))
        detail = f"it differs from step 0 of {listing(right)}" if right else "later steps of this seed come from another start"
        return detail + (", and later steps of its branch go on from it" if went else "")

    def _independent(self) -> None:
        clear = [start for start, known in self._begun.values() if known and start is not None]
        for one, other in combinations(clear, 2):
            if self._shows(one, other):
                z = self.z[other, self.starts.index(one)]
                detail = f"one shows in the other (z {z:.1f}, by chance at most {self._limit:.1f}): one at least is no draw"
                some = [*self._sharing(one), *self._sharing(other)]
                self.pedigree.contradict(some, "the starts of different init seeds are independent", detail)

    # --- descent ------------------------------------------------------------------------------------------------------

    def _descend(self) -> None:
        pedigree = self.pedigree
        silent = [c for branch in pedigree.branches for c in pedigree.later(branch) if not self._descends(c)]
        for branch in pedigree.branches:
            mine, own = [c for c in silent if self.listed[c].branch == branch], self._own(branch)
            lost = [c for c in mine if self._lost(c)]
            alone = own is not None and {self.listed[c].branch for c in self._sharing(own)} == {branch}
            if lost and alone and not any(self.listed[c].branch == branch for c in self.come):
                # Nobody else vouches for this step 0.
                steps = stepping(self.listed[c].step for c in lost)
                detail = f"step 0 does not show in {steps}: it or they are of another training"
                pedigree.contradict(lost, "step 0 and later steps are of one training", detail)
                lost = []
            for c in mine:
                figures = {} if own is None else {"z with its own": self._figures(c, own)["z"]}
                if c in lost:
                    detail = "no step 0 of the suite shows in it, though at this step or later others plainly show theirs"
                    pedigree.say(c, "descent", "false", detail, figures)
                else:
                    detail = "no step 0 shows in it: training has led too far from it, or it comes from one that is not listed"
                    pedigree.say(c, "descent", "recorded", detail, figures)

    def _descends(self, c: int) -> bool:
        """Judges what can be judged of one checkpoint alone; whether that was anything."""
        pedigree, right = self.pedigree, self._right(c)
        if (equal := self.start(c)) is not None:
            if equal in right:
                self._unmoved(c, equal)
            elif self._clear(equal) and not any(self._shows(start, c) for start in right):
                pedigree.say(c, "descent", "false", f"it is {self._whose(equal)}")
            else:
                pedigree.say(c, "descent", "recorded", f"it is {self._whose(equal)}, which may not be a start")
            return True
        if np.isnan(self.z[c]).all():
            why = "no step 0 has a matrix that may be a random draw of its own" if self.starts else "no step 0 is listed"
            pedigree.say(c, "descent", "recorded", why)
            return True
        if not (showing := self._showing(c)):
            return False
        best, figures = showing[0], self._figures(c, showing[0])
        if best in right:
            rivals = [start for start in showing if start not in right]
            if rivals and 1 - figures["correlation"] > (1 - self._figures(c, rivals[0])["correlation"]) / 2:
                pedigree.say(c, "descent", "recorded", f"{self._whose(rivals[0])} shows in it nearly as much", figures)
            else:
                self.come[c] = best
                pedigree.say(c, "descent", "proven", f"by chance z is at most {self._limit:.1f}", figures)
        elif right & {*showing}:
            pedigree.say(c, "descent", "recorded", f"{self._whose(best)} shows in it too, and more", figures)
        elif self._clear(best) or (right and self._begun[self.listed[c].init][1]):
            self.come[c] = best
            figures |= {"z with its own": max(self._figures(c, start)["z"] for start in right)} if right else {}
            pedigree.say(c, "descent", "false", f"it descends from {self._whose(best)}", figures)
        else:
            pedigree.say(c, "descent", "recorded", f"{self._whose(best)} shows in it, whose seed is not clear", figures)
            if right:
                detail = f"{pedigree.called(c)} descends from {self._whose(best)}, and nothing says which is misplaced"
                pedigree.contradict([c, *self._sharing(best)], "later steps descend from step 0 of their branch", detail)
        return True

    def _right(self, c: int) -> set[int]:
        """The starts that a checkpoint may descend from without contradiction to its branch."""
        branch = self.listed[c].branch
        own, (start, clear) = self._own(branch), self._begun[self.listed[c].init]
        if clear and own not in (None, start):
            # Its branch has another step 0 than its seed: as a whole, or at step 0 alone.
            later = self.pedigree.later(branch)
            went = [other for other in later if self._showing(other)[:1] == [own]]
            own = own if start is None or 2 * len(went) > len(later) else None
        return {j for j in (own, start if clear else None) if j is not None}

    def _unmoved(self, c: int, start: int) -> None:
        """A later checkpoint is its own start."""
        one = self.listed[c]
        others = (other for other, that in enumerate(self.listed) if 0 < that.step <= one.step and that.branch != one.branch)
        if c in self.pedigree.resting:
            return
        if any(self.start(other) is None for other in others):
            detail = f"it is {self._whose(start)}, while other branches have moved by then"
            self.pedigree.say(c, "weights", "false", detail)
        else:
            self.pedigree.rest(c, f"it is {self._whose(start)}: nothing was trained before it, or this is step 0")

    def _lost(self, c: int) -> bool:
        """Whether a checkpoint has less of its own start than any training of the suite leaves."""
        one = self.listed[c]
        zero, (own, clear) = self.pedigree.at.get((one.branch, 0)), self._begun[one.init]
        if not clear or own is None:
            own = None if zero is None or self.pedigree.wrong(zero) else self.start(zero)
        if own is None or not (had := self._figures(c, own))["z"]:
            return False
        error = abs(had["correlation"] / had["z"])
        since = [other for other in self.come if self.listed[other].step >= one.step and self.pedigree.trusted(other)]
        kept = {self.listed[other].branch for other in since if self._figures(other, self.come[other])["correlation"] >= _KEPT}
        return (one.branch in kept or len(kept) > 1) and had["correlation"] + self._limit * error < _LOST
