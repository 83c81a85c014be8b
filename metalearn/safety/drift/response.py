"""What is done about drift: by degree, and the next milder where something cannot be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from metalearn.errors import InvalidArgumentError
from metalearn.safety.drift.report import DriftReport, Response

RESPONSES: tuple[Response, ...] = ("none", "re_profile", "loosen", "re_propose", "roll_back")
"""From the mildest on."""


@dataclass(frozen=True, kw_only=True)
class Loosening:
    """How far, and for how long, a policy gets a longer lead.

    Args:
      decisions: with the whole factor, in [1, 10000]; after them it shrinks by a tenth a decision until it is 1.
      factor: on the largest step and on the trust region around the start, in [1, 4]. Bounds of the space, caps, the
        largest deviation from the base and the confidence in the domain hold as ever.

    Raises:
      InvalidArgumentError: a value out of its range.
    """

    decisions: int = 5
    factor: float = 1.5

    def __post_init__(self) -> None:
        count = self.decisions
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10_000:
            raise InvalidArgumentError(f"`decisions` must be an int in [1, 10000], got {count!r}; pass decisions")
        if not 1.0 <= self.factor <= 4.0:
            raise InvalidArgumentError(f"`factor` must be in [1, 4], got {self.factor!r}; 1 changes nothing")


class Chosen(NamedTuple):
    """What can be done about a report."""

    response: Response
    reasons: tuple[str, ...]
    """why it is not what the report asks for; empty where it is"""
    awaits_profile: bool
    """whether a profile of the data as it is now is asked for"""


def choose_response(report: DriftReport, *, has_profile: bool, no_way_back: str | None) -> Chosen:
    """Choose what to do about a report.

    What it asks for (`DriftReport.response`), nothing where the change is no harm, and the next milder where something
    is missing: without a way back the start is proposed anew, and as long as there is no profile to propose one from,
    the policy is loosened.

    Args:
      report: of a monitor.
      has_profile: whether there is a profile of the data as it is now.
      no_way_back: why the run cannot go back to its last good snapshot; None if it can.

    >>> fell = DriftReport(degree="severe", kind="abrupt", direction="down", harmful=True, stream="ndcg")
    >>> choose_response(fell, has_profile=True, no_way_back="rollback is off")[:2]
    ('re_propose', ('not rolled back, since rollback is off',))
    >>> choose_response(fell, has_profile=False, no_way_back=None).response
    'roll_back'
    """
    if not report.harmful or report.degree == "none":
        return Chosen("none", (), False)
    response, reasons = report.response, ()
    if response == "roll_back" and no_way_back is not None:
        response, reasons = "re_propose", (f"not rolled back, since {no_way_back}",)
    if has_profile or response not in ("re_profile", "re_propose"):
        return Chosen(response, reasons, False)
    if response == "re_propose":
        response, reasons = "loosen", (*reasons, "no start is proposed anew without a profile")
    return Chosen(response, reasons, True)
