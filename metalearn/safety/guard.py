"""The guard: a pipeline of small pure rules between what the policy proposes and what is applied.

Shape legend: V value, every controlled value of every parameter group in one vector, in unit ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Status = Literal["applied", "limited", "held"]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What the policy wants, and what the rules need to judge it.

    Args:
      labels: names of the values, as "learning_rate[0]".
      current: [V] in force.
      proposed: [V] wanted next.
      start: [V] start configuration, the centre of the trust region.
      low, high: [V] trust region around the start.
      max_step: [V] largest change in one decision.
      nonfinite_steps: steps of the last interval whose loss was not finite.
    """

    labels: tuple[str, ...]
    current: np.ndarray
    proposed: np.ndarray
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray
    max_step: np.ndarray
    nonfinite_steps: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is applied, and why it differs from what was proposed.

    Args:
      status: `applied` as proposed, `limited` by a rule, or `held` at the current values.
      values: [V] to apply.
      reasons: one sentence for each rule that intervened.
    """

    status: Status
    values: np.ndarray
    reasons: tuple[str, ...]


Rule = Callable[[Proposal], tuple[np.ndarray, str | None]]
"""Returns the values it lets through, and a sentence if they are not those proposed."""


def _named(proposal: Proposal, where: np.ndarray) -> str:
    return ", ".join(label for label, hit in zip(proposal.labels, where, strict=True) if hit)


def finite_loss(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds everything after an interval with losses that were not finite: its signals mean nothing."""
    if not proposal.nonfinite_steps > 0:
        return proposal.proposed, None
    return (
        proposal.current,
        f"held: {proposal.nonfinite_steps:.0f} steps of the interval had a loss that was not finite",
    )


def finite_values(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds each value whose proposal is NaN or infinite."""
    bad = ~np.isfinite(proposal.proposed)
    if not bad.any():
        return proposal.proposed, None
    return np.where(bad, proposal.current, proposal.proposed), f"held {_named(proposal, bad)}: proposal was not finite"


def _clip(proposal: Proposal, low: np.ndarray, high: np.ndarray, reason: str) -> tuple[np.ndarray, str | None]:
    if ((low <= proposal.proposed) & (proposal.proposed <= high)).all():
        return proposal.proposed, None
    # A hair of tolerance: the policy's own arithmetic may meet a bound to the last bit.
    clipped = np.clip(proposal.proposed, low, high)
    moved = np.abs(clipped - proposal.proposed) > 1e-9
    return clipped, f"limited {_named(proposal, moved)}: {reason}" if moved.any() else None


def largest_step(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits the change of one decision."""
    low, high = proposal.current - proposal.max_step, proposal.current + proposal.max_step
    return _clip(proposal, low, high, "largest step of one decision")


def trust_region(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits the distance from the start configuration."""
    low, high = proposal.start + proposal.low, proposal.start + proposal.high
    return _clip(proposal, low, high, "trust region around the base")


def bounds(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits to the bounds of the hyperparameter space."""
    return _clip(proposal, np.zeros_like(proposal.start), np.ones_like(proposal.start), "bounds of the space")


RULES: tuple[Rule, ...] = (finite_loss, finite_values, largest_step, trust_region, bounds)


def judge(proposal: Proposal, rules: Sequence[Rule] = RULES) -> Verdict:
    """Applies the rules in order; each sees what the one before let through.

    >>> one = np.array([0.5])
    >>> step = Proposal(
    ...     labels=("learning_rate[0]",),
    ...     current=one,
    ...     proposed=one + 0.3,
    ...     start=one,
    ...     low=one * -0.4,
    ...     high=one * 0.4,
    ...     max_step=one * 0.2,
    ...     nonfinite_steps=0,
    ... )
    >>> verdict = judge(step)
    >>> verdict.status, verdict.values.tolist(), verdict.reasons
    ('limited', [0.6], ('limited learning_rate[0]: largest step of one decision',))
    """
    reasons = []
    for rule in rules:
        values, reason = rule(proposal)
        if values is not proposal.proposed:
            proposal = replace(proposal, proposed=values)
        if reason:
            reasons.append(reason)
    held = any(reason.startswith("held:") for reason in reasons)
    status: Status = "held" if held else "limited" if reasons else "applied"
    return Verdict(status=status, values=proposal.proposed, reasons=tuple(reasons))
