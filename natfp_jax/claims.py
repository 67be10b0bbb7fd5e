"""What is claimed, and what became of it.

Owns the verdict on one claim, and how verdicts are shown. Must not know what is claimed of what.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from natfp_jax.errors import UserError

__all__ = ["Claim", "Verdict", "attempt", "guarded", "short", "table", "unless"]

Verdict = Literal["proven", "recorded", "false"]


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    Attributes:
      subject: what it is about, such as "arm init0-order1".
      claim: a sentence.
      verdict: "proven": recomputed, and so. "recorded": it says so, and cannot be recomputed here. "false": it is not so.
      detail: what was found instead, or why it could not be recomputed.
    """

    subject: str
    claim: str
    verdict: Verdict
    detail: str = ""


def table(claims: list[Claim]) -> Table:
    """The claims, subject by subject, and how many of each verdict there are."""
    shown = Table(box=box.SIMPLE, pad_edge=False, caption_justify="left")
    for column in ("subject", "claim", "verdict", "what was found"):
        shown.add_column(column, overflow="fold")
    styles = {"proven": "green", "recorded": "yellow", "false": "bold red"}
    before = None
    for claim in claims:
        subject = "" if claim.subject == before else claim.subject
        before = claim.subject
        shown.add_row(Text(subject), Text(claim.claim), Text(claim.verdict, styles[claim.verdict]), Text(claim.detail))
    counts = Counter(claim.verdict for claim in claims)
    shown.caption = f"{counts['proven']} proven, {counts['recorded']} recorded but not proven here, {counts['false']} false"
    return shown


def attempt(subject: str, claim: str, check: Callable[[], str | None]) -> Claim:
    """The claim with its verdict: `check` returns what was found instead, or raises what a user can mend."""

    def judged() -> Claim:
        wrong = check()
        return Claim(subject, claim, "false", wrong) if wrong else Claim(subject, claim, "proven")

    return guarded(subject, claim, judged)


def guarded(subject: str, claim: str, judge: Callable[[], Claim]) -> Claim:
    """What `judge` says; what it raises over files that are not as they should be makes the claim false."""
    try:
        return judge()
    except UserError as error:
        return Claim(subject, claim, "false", str(error))
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a record of another shape
        return Claim(subject, claim, "false", f"its records cannot be read ({type(error).__name__}: {error})")


def unless(expected: object, got: object, what: str) -> str | None:
    """Nothing where both are the same, else a sentence of `what` was got."""
    return None if got == expected else f"{what} {short(got)}, expected {short(expected)}"


def short(value: object) -> str:
    """A hash by its first digits, anything else as it is."""
    text = str(value)
    return text[:16] if len(text) == 64 else text
