"""How the checkpoints of a suite lie on their ways.

Owns the verdicts on what lies between steps: whether a branch repeats itself, whose way a checkpoint is on, how far along it,
and whether weights occur twice. Must not know how starts are found.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations, pairwise
from statistics import median

from natfp_jax.ancestry import Ancestry
from natfp_jax.kinship import Numbers, lineages, means, named, votes
from natfp_jax.pedigree import Found, Pedigree, listing, stepping

__all__ = ["identities", "places", "repeats", "ways"]

_REPEATED, _MISPLACED = 0.1, 0.2  # least logarithm of a ratio of distances, between steps that are equal, and that are not
_AGREED = 0.1  # logarithm of a ratio, up to which branches have the same distance
_AROUND = 2  # steps, from each of which a checkpoint has to be nearer to another lineage than to its own


# --- a branch's own steps ---------------------------------------------------------------------------------------------


def repeats(pedigree: Pedigree, at_zero: bool) -> None:
    """Judges branches that have the same weights at two steps.

    Args:
      at_zero: where one of them is step 0, by which all else is judged; or else where none is, which is better judged when
        it is known what descends from where.
    """
    for checkpoints in pedigree.branches.values():
        for one, other in combinations(checkpoints, 2):
            same = pedigree.kin[one] == pedigree.kin[other] and not pedigree.wrong(one) and not pedigree.wrong(other)
            if same and at_zero == (pedigree.listed[one].step == 0):
                _repeated(pedigree, one, other)


def _repeated(pedigree: Pedigree, one: int, other: int) -> None:
    listed = pedigree.listed
    earlier, later = listed[one].step, listed[other].step
    both = [(pedigree.at.get((name, earlier)), pedigree.at.get((name, later))) for name in pedigree.branches]
    still = [pedigree.kin[a] == pedigree.kin[b] for a, b in both if a is not None and b is not None]
    if len(still) > 1 and all(still):
        pedigree.rest(other, f"as in every branch it has the weights of step {earlier}: nothing was trained in between")
        return
    # Where all else depends on it, one other branch is not enough of a witness.
    usual = _usual(pedigree, listed[one].branch, 1 if earlier else 2)
    for_earlier, for_later = votes(_distances(pedigree, one), usual, earlier, later, _REPEATED)
    agreed = any(listed[c].step == earlier == 0 and listed[c].init == listed[one].init for c in pedigree.equals(one))
    if (for_earlier or agreed) and not for_later:
        pedigree.say(other, "weights", "false", f"it has the weights of step {earlier} of its branch")
    elif for_later and not for_earlier:
        pedigree.say(one, "weights", "false", f"it has the weights of step {later} of its branch")
    elif earlier == 0 and len(still) == 1:
        pedigree.rest(other, "it has the weights of step 0: nothing was trained before it, or this is step 0")
    else:
        pedigree.doubtful.append((one, other))


def _distances(pedigree: Pedigree, c: int) -> dict[int, float]:
    """Step → how far a checkpoint is from the one of that step of its branch."""
    rest = [other for other in pedigree.branches[pedigree.listed[c].branch] if pedigree.kin[other] != pedigree.kin[c]]
    distance_CC = pedigree.likeness.distance_CC
    return {pedigree.listed[other].step: float(distance_CC[c, other]) for other in rest if pedigree.trusted(other)}


def _usual(pedigree: Pedigree, but: str, fewest: int) -> Callable[[int, int], float | None]:
    """How far two steps are apart in other branches than one, if at least so many, and most of them, agree."""
    distance_CC, sound = pedigree.likeness.distance_CC, {at: c for at, c in pedigree.at.items() if pedigree.trusted(c)}
    others = [name for name in pedigree.branches if name != but]

    @cache
    def usual(one: int, other: int) -> float | None:
        pairs = [(sound[name, one], sound[name, other]) for name in others if {(name, one), (name, other)} <= sound.keys()]
        known = [float(distance_CC[pair]) for pair in pairs]
        middle = median(known) if known else 0.0
        agreed = [distance for distance in known if distance and middle and abs(math.log(distance / middle)) <= _AGREED]
        return middle if len(agreed) >= max(fewest, len(known) * 2 / 3) else None

    return usual


# --- whose way --------------------------------------------------------------------------------------------------------


def ways(pedigree: Pedigree, ancestry: Ancestry) -> None:
    """Judges, among the branches of one start, which a checkpoint goes on with."""
    for start in ancestry.starts:
        some = [c for c, own in ancestry.come.items() if own == start and not pedigree.wrong(c) and c not in pedigree.resting]
        if len({pedigree.listed[c].order for c in some}) > 1:
            _Ways(pedigree, start, some).judge()
        for c in some:
            if "lineage" not in pedigree.found[c]:
                pedigree.say(c, "lineage", "recorded", "no other order from this start is listed at steps to compare")


class _Ways:
    """The ways from one start. Nodes are different weights, by the first checkpoint that has them."""

    def __init__(self, pedigree: Pedigree, start: int, some: Sequence[int]) -> None:
        self.pedigree, self.listed, self.start = pedigree, pedigree.listed, start
        self.first = {pedigree.kin[c]: c for c in reversed(some)}
        self.claims = {node: [c for c in some if self.first[pedigree.kin[c]] == node] for node in self.first.values()}
        self.nodes: dict[int, list[int]] = {step: [] for step in sorted({self.listed[c].step for c in some})}
        for c in some:
            at = self.nodes[self.listed[c].step]
            at += [node for node in [self.first[pedigree.kin[c]]] if node not in at]

    def _orders(self, node: int) -> set[str]:
        return {str(self.listed[c].order) for c in self.claims[node]}

    def _directions(self, node: int, others: Sequence[int]) -> Numbers:
        return self.pedigree.likeness.directions(self.start, node, others)

    def judge(self) -> None:
        """Judges every checkpoint."""
        for group in lineages(self.nodes, self._directions, self._orders):
            members = [c for node in group for c in self.claims[node]]
            if len(group) > 1:
                self._judge(group, members)
            elif any(len(self.nodes[self.listed[c].step]) > 1 for c in members):
                for c in members:
                    detail = "the steps around it are not clearly nearer to it than to other branches"
                    self.pedigree.say(c, "lineage", "recorded", detail)

    def _judge(self, group: Sequence[int], members: Sequence[int]) -> None:
        name = named([self._orders(node) for node in group])
        if name is None or self._parted(group, name):
            claimed: dict[str, list[int]] = {}
            for c in members:
                claimed.setdefault(self.listed[c].branch, []).append(self.listed[c].step)
            said = " and ".join(f"{stepping(steps)} of {branch}" for branch, steps in claimed.items())
            self.pedigree.contradict(members, "the steps of a branch go on from one another", f"{said} do")
        for c in members:
            if name is None or self._parted(group, name):
                self.pedigree.say(c, "lineage", "recorded", "it goes on from steps of another branch, or they from it")
            elif str(self.listed[c].order) == name:
                self.pedigree.say(c, "lineage", "proven", "nearest in direction from the start", self._figures(c, group))
            elif not self._nearer(c, group):
                self.pedigree.say(c, "lineage", "recorded", "the steps around it do not agree on whose it is")
            else:
                whose = listing(dict.fromkeys(self.listed[o].branch for o in members if str(self.listed[o].order) == name))
                detail = f"it goes on with {whose}, nearest in direction from the start"
                self.pedigree.say(c, "lineage", "false", detail, self._figures(c, group))

    def _parted(self, group: Sequence[int], name: str) -> bool:
        """Whether it is one branch's up to a step and another's from there: either part may then be the exchanged one."""
        by_step = sorted((min(self.listed[c].step for c in self.claims[node]), name in self._orders(node)) for node in group)
        ours = [own for _, own in by_step]
        return ours.count(False) > 1 and sum(one != other for one, other in pairwise(ours)) == 1

    def _nearer(self, c: int, group: Sequence[int]) -> bool:
        """Whether a checkpoint is nearer to a lineage than to its own branch, seen from each of the steps around it.

        From one alone it may seem so for another reason: two first steps of different orders may well be nearer to each other
        than each to its second, and one of these two may be shown at the other's place.
        """
        step, order, own = self.listed[c].step, str(self.listed[c].order), self.first[self.pedigree.kin[c]]
        steps = list(self.nodes)
        told = []
        for other in sorted(steps, key=lambda other: abs(steps.index(other) - steps.index(step))):
            theirs = [node for node in self.nodes[other] if node in group and node != own]
            ours = [node for node in self.nodes[other] if node not in group and order in self._orders(node)]
            if other != step and theirs and ours:
                told.append(means(self._directions(own, theirs)).max() > means(self._directions(own, ours)).max())
        return len(told) >= _AROUND and all(told[:_AROUND])

    def _figures(self, c: int, group: Sequence[int]) -> dict[str, float]:
        """The cosine with the neighbouring step of its lineage, and with the next best there."""
        steps, own = list(self.nodes), self.first[self.pedigree.kin[c]]
        near = [step for step in steps if step != self.listed[c].step and {*self.nodes[step]} & {*group} - {own}]
        if not near:
            return {}
        candidates = self.nodes[min(near, key=lambda step: abs(steps.index(step) - steps.index(self.listed[c].step)))]
        cosines = dict(zip(candidates, means(self._directions(own, candidates)).tolist(), strict=True))
        others = [cosine for node, cosine in cosines.items() if node not in group]
        inside = max(cosine for node, cosine in cosines.items() if node in group)
        return {"cosine": inside} | ({"with the next best": max(others)} if others else {})


# --- how far along ----------------------------------------------------------------------------------------------------


def places(pedigree: Pedigree) -> None:
    """Judges whether every step lies from the others of its branch as that step does elsewhere."""
    steps = sorted({one.step for one in pedigree.listed})
    for branch, checkpoints in pedigree.branches.items():
        usual = _usual(pedigree, branch, 2)
        judged = [c for c in pedigree.later(branch) if c not in pedigree.resting]
        found = {c: _place(pedigree.listed[c].step, _distances(pedigree, c), usual, steps) for c in judged}
        accused = [c for c, of in found.items() if of.verdict == "false"]
        for c, of in found.items():
            if c in accused and 3 * len(accused) > len(checkpoints):
                of = Found("recorded", "the branch as a whole keeps another pace than the others")
            pedigree.found[c]["place"] = of


def _place(here: int, distances: dict[int, float], usual: Callable[[int, int], float | None], steps: Sequence[int]) -> Found:
    told = {there: votes(distances, usual, here, there, _MISPLACED) for there in steps if there != here}
    against = {there: for_there for there, (for_here, for_there) in told.items() if for_there > 1 and not for_here}
    if against:
        return Found("false", f"it lies where other branches are at step {max(against, key=lambda step: against[step])}")
    if not any(for_here or for_there for for_here, for_there in told.values()):
        return Found("recorded", "too few other branches agree on where that is")
    if all(for_here and not for_there for for_here, for_there in told.values()):
        return Found("proven", "as far from the others as in other branches")
    return Found("recorded", "by distances it may also be another step")


# --- weights that occur twice -----------------------------------------------------------------------------------------


def identities(pedigree: Pedigree) -> None:
    """Says which equal weights no verdict explains."""
    for one, other in pedigree.doubtful:
        steps = stepping([pedigree.listed[one].step, pedigree.listed[other].step])
        pedigree.contradict([one], "no two steps have the same weights", f"{steps} are identical, and nothing says which it is")
    for kin in dict.fromkeys(pedigree.kin):
        some = [c for c, one in enumerate(pedigree.kin) if one == kin and not pedigree.wrong(c)]
        clash = sorted({c for pair in combinations(some, 2) if _must_differ(pedigree, *pair) for c in pair})
        if clash:
            detail = f"{listing(map(pedigree.called, clash))} are identical, and nothing says whose weights they are"
            pedigree.contradict(clash, "branches that differ in a seed have weights of their own", detail)
        for c in clash:
            pedigree.say(c, "weights", "recorded", "they are also those of another branch")
    for c, listed in enumerate(pedigree.listed):
        if listed.step and pedigree.trusted(c) and "weights" not in pedigree.found[c]:
            pedigree.say(c, "weights", "proven", "compared number by number, also as rounded to 16 bits")


def _must_differ(pedigree: Pedigree, one: int, other: int) -> bool:
    left, right = pedigree.listed[one], pedigree.listed[other]
    if left.branch == right.branch or (left.init, left.order, left.step) == (right.init, right.order, right.step):
        return False  # a branch by itself was judged before; and the same training, done twice, may well be the same
    if left.step == right.step == 0:
        return False  # that was judged with the starts
    at_rest = [of.step == 0 or c in pedigree.resting for c, of in ((one, left), (other, right))]
    return not (all(at_rest) and left.init == right.init)
