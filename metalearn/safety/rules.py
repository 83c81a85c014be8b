"""The guard's rules: small pure functions, each of one concern, from a proposal to what it lets through.

Shape legend as in `metalearn.safety.proposal`.
"""

from __future__ import annotations

import numpy as np

from metalearn.safety.proposal import Proposal, Region, Rule

ROUNDING = 1e-9
"""The policy's own arithmetic may miss a bound by its last bits: less than this is not reported."""


def named(proposal: Proposal, where: np.ndarray) -> str:
    """Returns the labels of the values that a mask [V] picks."""
    return ", ".join(label for label, hit in zip(proposal.labels, where, strict=True) if hit)


def finite_loss(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds everything after an interval with losses that were not finite: its signals mean nothing."""
    if not proposal.nonfinite_steps > 0:
        return proposal.proposed, None
    return (
        proposal.current,
        f"held: {proposal.nonfinite_steps:.0f} steps of the interval had a loss that was not finite",
    )


def real_numbers(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds everything if what is proposed is not one real number for each value."""
    given, wanted = np.asarray(proposal.proposed), proposal.current.shape
    if given.shape == wanted and given.dtype.kind in "fiu":
        return proposal.proposed, None
    return proposal.current, f"held: the proposal was {given.dtype} of shape {given.shape}, not {wanted[0]} numbers"


def finite_values(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds each value whose proposal is NaN or infinite."""
    bad = ~np.isfinite(proposal.proposed)
    if not bad.any():
        return proposal.proposed, None
    return np.where(bad, proposal.current, proposal.proposed), f"held {named(proposal, bad)}: proposal was not finite"


def mask(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds what this run keeps to itself: not bound, withheld by a group, or unknown to its optimizer."""
    if proposal.free is None:
        return proposal.proposed, None
    moved = ~proposal.free & (proposal.proposed != proposal.current)
    if not moved.any():
        return proposal.proposed, None
    return np.where(moved, proposal.current, proposal.proposed), f"held {named(proposal, moved)}: not to be moved"


def cool_down(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds values that would move in a direction that is barred for now."""
    if not proposal.bars:
        return proposal.proposed, None
    barred, longest = np.zeros(proposal.current.shape, bool), 0
    for bar in proposal.bars:
        if bar.direction * (proposal.proposed[bar.value] - proposal.current[bar.value]) > 0:
            barred[bar.value], longest = True, max(longest, bar.remaining)
    if not barred.any():
        return proposal.proposed, None
    held = np.where(barred, proposal.current, proposal.proposed)
    return held, f"held {named(proposal, barred)}: this direction is barred, for {longest} decisions at most"


def kept_constraints(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Holds values whose move would worsen a constraint that is violated, or nearly."""
    if proposal.worsening is None:
        return proposal.proposed, None
    worse = proposal.worsening * (proposal.proposed - proposal.current) > 0
    if not worse.any():
        return proposal.proposed, None
    held = np.where(worse, proposal.current, proposal.proposed)
    return held, f"held {named(proposal, worse)}: it would worsen a constraint"


def _clip(proposal: Proposal, low: np.ndarray, high: np.ndarray, reason: str) -> tuple[np.ndarray, str | None]:
    if ((low <= proposal.proposed) & (proposal.proposed <= high)).all():
        return proposal.proposed, None
    clipped = np.clip(proposal.proposed, low, high)
    moved = np.abs(clipped - proposal.proposed) > ROUNDING
    return clipped, f"limited {named(proposal, moved)}: {reason}" if moved.any() else None


def _within(proposal: Proposal, region: Region | None, reason: str) -> tuple[np.ndarray, str | None]:
    return (proposal.proposed, None) if region is None else _clip(proposal, *region, reason)


def largest_step(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits the change of one decision."""
    low, high = proposal.current - proposal.max_step, proposal.current + proposal.max_step
    return _clip(proposal, low, high, "largest step of one decision")


def trust_region(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits the distance from the start configuration."""
    low, high = proposal.start + proposal.low, proposal.start + proposal.high
    return _clip(proposal, low, high, "trust region around the base")


def largest_deviation(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits the distance from the base, the start's own shift included."""
    return _within(proposal, proposal.deviation, "largest deviation from the base")


def caps(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits to what the user's budget allows."""
    return _within(proposal, proposal.caps, "caps set by the user")


def bounds(proposal: Proposal) -> tuple[np.ndarray, str | None]:
    """Limits to the bounds of the hyperparameter space."""
    return _clip(proposal, np.zeros_like(proposal.start), np.ones_like(proposal.start), "bounds of the space")


def acceptance(*, tolerance: float, max_risk: float) -> Rule:
    """Makes the rule that rejects a change which is too likely to do harm; it abstains without an outcome model.

    Rejects if P(final metric relative to no change < -tolerance) > max_risk.

    Args:
      tolerance: loss that is put up with, as a share of the final metric, 0 to 1.
      max_risk: highest probability of a larger loss, 0 to 1.
    """

    def accepted(proposal: Proposal) -> tuple[np.ndarray, str | None]:
        """Lets a change pass unless it is too likely to do harm."""
        if proposal.risk is None or np.array_equal(proposal.proposed, proposal.current):
            return proposal.proposed, None
        risk = proposal.risk(proposal.proposed, tolerance)
        if risk <= max_risk:
            return proposal.proposed, None
        return (
            proposal.current,
            f"rejected: with probability {risk:.2f} it ends over {100 * tolerance:g} % worse than without a change",
        )

    return accepted
