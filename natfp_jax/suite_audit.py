"""What the weights of published checkpoints prove of the descent that is claimed of them.

Owns `natfp audit --suite`: what is judged after what, and how verdicts become claims. Writes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natfp_jax import trajectories
from natfp_jax.ancestry import Ancestry
from natfp_jax.claims import Claim
from natfp_jax.likeness import Likeness, measured
from natfp_jax.pedigree import About, Found, Pedigree, stepping
from natfp_jax.progress import Progress
from natfp_jax.suite import Listed, read

__all__ = ["BEYOND_WEIGHTS", "Audited", "audit", "judged"]

BEYOND_WEIGHTS = (
    "Weights alone do not show which seed a start was drawn from, which data was seen, or that its order is the one that its "
    "seed gives; nor how the steps between two checkpoints were trained."
)
_CLAIMS: dict[About, tuple[str, str]] = {  # of one step, of several
    "start": ("is the start of init seed {init}, and of no other", ""),
    "descent": ("descends from the step 0 of init seed {init}", "descend from the step 0 of init seed {init}"),
    "lineage": ("goes on with its own branch, of all from this start", "go on with their own branch, of all from this start"),
    "place": ("lies where a training is at that step", "lie where a training is at these steps"),
    "weights": ("has weights that are found nowhere else", "have weights that are found nowhere else"),
}


@dataclass(frozen=True)
class Audited:
    """The claims with their verdicts, and what was measured of each checkpoint, as JSON values."""

    claims: list[Claim]
    measured: list[dict[str, Any]]


def audit(path: Path, progress: Progress) -> Audited:
    """Judges the list at `path`.

    Raises:
      UserError: it is no list, or a folder of it is not what it has to be.
    """
    suite = read(path)
    starts = [c for c, one in enumerate(suite.listed) if one.step == 0]
    with progress.task(f"read {len(suite.listed)} checkpoints", len(suite.tensors), "tensors") as advance:
        likeness = measured(suite.folders, suite.tensors, starts, advance)
    pedigree, ancestry = judged(suite.listed, likeness)
    return Audited([*_claims(pedigree)], [*_measured(pedigree, ancestry)])


def judged(listed: Sequence[Listed], likeness: Likeness) -> tuple[Pedigree, Ancestry]:
    """All verdicts: what has been found wrong is no witness in what is judged later."""
    pedigree = Pedigree(listed, likeness)
    trajectories.repeats(pedigree, at_zero=True)
    ancestry = Ancestry(pedigree)
    trajectories.repeats(pedigree, at_zero=False)
    trajectories.ways(pedigree, ancestry)
    trajectories.places(pedigree)
    trajectories.identities(pedigree)
    return pedigree, ancestry


def _claims(pedigree: Pedigree) -> Iterator[Claim]:
    for branch, checkpoints in pedigree.branches.items():
        for about, sentences in _CLAIMS.items():
            together: dict[tuple[str, str], list[int]] = {}
            for c in checkpoints:
                if (found := pedigree.found[c].get(about)) is not None:
                    together.setdefault((found.verdict, found.detail), []).append(c)
            for some in together.values():
                listed = [pedigree.listed[c] for c in some]
                yield _claim(f"branch {branch}", sentences, listed, [pedigree.found[c][about] for c in some])
    for one in pedigree.between:
        subject = f"branch{'es' if len(one.branches) > 1 else ''} {', '.join(one.branches)}"
        yield Claim(subject, one.claim, "false", one.detail)


def _claim(subject: str, sentences: tuple[str, str], listed: Sequence[Listed], found: Sequence[Found]) -> Claim:
    """One line of checkpoints of which the same was found."""
    said = f"{stepping(one.step for one in listed)} {sentences[len(listed) > 1].format(init=listed[0].init)}"
    detail = [found[0].detail]
    for name in dict.fromkeys(name for one in found for name in one.figures):
        values = [one.figures[name] for one in found if name in one.figures]
        detail.append(f"{name} {_between(min(values), max(values))}")
    return Claim(subject, said, found[0].verdict, ", ".join(detail))


def _between(low: float, high: float) -> str:
    digits = 1 if max(abs(low), abs(high)) >= 10 else 3
    one, other = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return one if one == other else f"{one} to {other}"


def _measured(pedigree: Pedigree, ancestry: Ancestry) -> Iterator[dict[str, Any]]:
    def named(c: int) -> dict[str, Any]:
        return {"branch": pedigree.listed[c].branch, "step": pedigree.listed[c].step}

    for c in range(len(pedigree.listed)):
        shown = zip(ancestry.starts, ancestry.z[c].tolist(), ancestry.cosine[c].tolist(), strict=True)
        yield named(c) | {
            "sha256": pedigree.likeness.digests[c],
            "equal_to": [named(other) for other in pedigree.equals(c)],
            # JSON has no NaN.
            "starts": [named(start) | {"z": z, "correlation": r} for start, z, r in shown if z == z],
        }
