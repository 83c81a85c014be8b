"""What the guard judges, and what it says.

Shape legend: V value, every controlled value of every parameter group in one vector, in unit ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Status = Literal["applied", "limited", "held", "rejected"]


class Bar(NamedTuple):
    """A direction in which one value may not move for a while."""

    value: int
    """index into [V]"""
    direction: int
    """1 up, -1 down"""
    remaining: int
    """decisions for which it holds"""


class Region(NamedTuple):
    """Bounds of every value."""

    low: np.ndarray
    """[V]"""
    high: np.ndarray
    """[V]"""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What the policy wants, and what the rules need to judge it; what is None is not judged.

    Args:
      labels: names of the values, as "learning_rate[0]".
      current: [V] in force.
      proposed: [V] wanted next.
      start: [V] start configuration, the centre of the trust region.
      low, high: [V] trust region around the start.
      max_step: [V] largest change in one decision.
      nonfinite_steps: steps of the last interval whose loss was not finite.
      free: bool [V], what this run may move.
      deviation: what lies within the largest deviation from the base.
      caps: what the user allows.
      bars: directions barred for now.
      worsening: [V] direction in which a value would worsen a constraint that is violated, or nearly: 1 up, -1 down, 0
        neither.
      risk: (values [V], tolerance) to the probability that a run which goes on with them ends worse, by more than the
        tolerance, than one that goes on as it is.
    """

    labels: tuple[str, ...]
    current: np.ndarray
    proposed: np.ndarray
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray
    max_step: np.ndarray
    nonfinite_steps: float
    free: np.ndarray | None = None
    deviation: Region | None = None
    caps: Region | None = None
    bars: tuple[Bar, ...] = ()
    worsening: np.ndarray | None = None
    risk: Callable[[np.ndarray, float], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is applied, and why it differs from what was proposed.

    Args:
      status: `applied` as proposed, `limited` by a rule, or at the current values because everything was `held` or,
        being expected to do harm, `rejected`.
      values: [V] to apply.
      reasons: one sentence for each rule that intervened.
      rejected: [V] that were weighed and rejected; None unless that is the status.
    """

    status: Status
    values: np.ndarray
    reasons: tuple[str, ...]
    rejected: np.ndarray | None = None


Rule = Callable[[Proposal], tuple[np.ndarray, str | None]]
"""Returns the values it lets through, and a sentence if they are not those proposed. One that begins with "held:" or
"rejected:" is about all of them."""
