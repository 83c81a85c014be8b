"""The guard: a pipeline of small pure rules between what the policy proposes and what is applied.

Shape legend as in `metalearn.safety.proposal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.safety.proposal import Bar, Proposal, Rule, Status, Verdict
from metalearn.safety.rules import (
    ROUNDING,
    acceptance,
    bounds,
    caps,
    cool_down,
    finite_loss,
    finite_values,
    kept_constraints,
    largest_deviation,
    largest_step,
    mask,
    real_numbers,
    trust_region,
)

STEP_RECOVERY = 1.1
"""A largest step that was halved grows by this at each decision: it is whole again after eight. By as much the lead of
a loosened policy shrinks."""
SMALLEST_STEP_SCALE = 1 / 16

_FIRST: tuple[Rule, ...] = (finite_loss, real_numbers)
_LIMITS: tuple[Rule, ...] = (largest_step, trust_region, largest_deviation, caps, bounds)
RULES: tuple[Rule, ...] = (*_FIRST, finite_values, mask, cool_down, kept_constraints, *_LIMITS)
OVERRIDE_RULES: tuple[Rule, ...] = (finite_values, mask, *_LIMITS)
"""What holds for a human's values too, who may go where the policy is barred."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Asks the outcome model before every change.

    Its deviation holds the luck of two runs, so that a bound far below one half rejects nearly everything; at one half
    what is rejected is what it expects to lose more than the tolerance.

    Args:
      tolerance: loss that is put up with, as a share of the final metric, 0 to 1.
      max_risk: highest probability of a larger loss, 0 to 1.
    """

    tolerance: float = 0.01
    max_risk: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("tolerance", self.tolerance), ("max_risk", self.max_risk)):
            if not 0.0 <= value < 1.0:
                raise InvalidArgumentError(f"`{name}` must be at least 0 and less than 1, got {value!r}; pass a share")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Tightens the guard of a session; the default leaves every decision as the controller's own bounds make it.

    Args:
      deviation: hyperparameter to its largest distance from the base, as a share of its unit range; by default as far
        as the controller itself reaches: the start's shift and the trust region.
      caps: hyperparameter to the lowest and highest value that the run's budget allows, in its own units.
      cool_down: decisions for which a move that was rolled back is barred.
      limit_cool_down: decisions for which a direction is barred in which a value has just been limited.
      acceptance: rejects what the outcome model expects to do harm; None does not ask it, which would make a decision
        take longer.

    Raises:
      InvalidArgumentError: a number is out of range; the message names it.
    """

    deviation: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    cool_down: int = 5
    limit_cool_down: int = 0
    acceptance: Acceptance | None = None

    def __post_init__(self) -> None:
        for name, distance in self.deviation.items():
            if not distance >= 0.0:
                raise InvalidArgumentError(f"`deviation` of {name} must be at least 0, got {distance!r}")
        for name, (low, high) in self.caps.items():
            if not low <= high:
                raise InvalidArgumentError(f"`caps` of {name} must be (lowest, highest), got {(low, high)!r}")
        for name, count in (("cool_down", self.cool_down), ("limit_cool_down", self.limit_cool_down)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise InvalidArgumentError(f"`{name}` must be an int of at least 0, got {count!r}; pass decisions")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The pipeline."""
        if self.acceptance is None:
            return RULES
        return (
            *RULES,
            acceptance(tolerance=self.acceptance.tolerance, max_risk=self.acceptance.max_risk),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        asked = self.acceptance
        return {
            "deviation": {name: float(value) for name, value in sorted(self.deviation.items())},
            "caps": {name: [float(low), float(high)] for name, (low, high) in sorted(self.caps.items())},
            "cool_down": self.cool_down,
            "limit_cool_down": self.limit_cool_down,
            "acceptance": None if asked is None else [asked.tolerance, asked.max_risk],
        }


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """What the guard remembers between decisions.

    Args:
      bars: directions barred for now.
      step_scale: share of the largest step that is allowed, halved by every rollback.
      rollbacks: so far.
      lead: factor on the largest step and on the trust region, above 1 where the policy was loosened.
      lead_for: decisions for which it has all of that lead.
    """

    bars: tuple[Bar, ...] = ()
    step_scale: float = 1.0
    rollbacks: int = 0
    lead: float = 1.0
    lead_for: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            "bars": [list(bar) for bar in self.bars],
            "step_scale": self.step_scale,
            "rollbacks": self.rollbacks,
            "lead": self.lead,
            "lead_for": self.lead_for,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GuardState:
        """Inverts `as_dict`; a state of before policies were loosened has no lead."""
        return cls(
            bars=tuple(Bar(*(int(part) for part in bar)) for bar in content["bars"]),
            step_scale=float(content["step_scale"]),
            rollbacks=int(content["rollbacks"]),
            lead=float(content.get("lead", 1.0)),
            lead_for=int(content.get("lead_for", 0)),
        )


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
    reasons: list[str] = []
    rejected = None
    for rule in rules:
        values, reason = rule(proposal)
        if reason:
            reasons.append(reason)
            if reason.startswith("rejected:"):
                rejected = proposal.proposed
        if values is not proposal.proposed:
            proposal = replace(proposal, proposed=values)
    held = any(reason.startswith("held:") for reason in reasons)
    status: Status = "rejected" if rejected is not None else "held" if held else "limited" if reasons else "applied"
    return Verdict(status=status, values=proposal.proposed, reasons=tuple(reasons), rejected=rejected)


def after_decision(state: GuardState, proposal: Proposal, verdict: Verdict, config: GuardConfig) -> GuardState:
    """Lets bars run down, steps recover and leads shrink, and bars the directions in which values were limited.

    A lead waits with shrinking until steps are whole: what lies outside the narrower trust region is then never further
    away than the largest step, as long as no side of the region is longer than ten of those.
    """
    limited: tuple[Bar, ...] = ()
    if config.limit_cool_down and verdict.status == "limited":
        with np.errstate(invalid="ignore"):
            cut = np.nan_to_num(proposal.proposed - verdict.values, posinf=1.0, neginf=-1.0)
        barred = {bar[:2] for bar in state.bars}  # was held by its bar, which shall run down
        limited = tuple(bar for bar in _bars(cut, config.limit_cool_down) if bar[:2] not in barred)
    if not (state.bars or limited) and state.step_scale == state.lead == 1.0:
        return state
    running = tuple(bar._replace(remaining=bar.remaining - 1) for bar in state.bars if bar.remaining > 1)
    scale = min(1.0, state.step_scale * STEP_RECOVERY)
    lead = max(1.0, state.lead / STEP_RECOVERY) if state.lead_for == 0 and scale == 1.0 else state.lead
    return replace(
        state, bars=_longest(running + limited), step_scale=scale, lead=lead, lead_for=max(0, state.lead_for - 1)
    )


def after_rollback(
    state: GuardState, move: np.ndarray, config: GuardConfig, erased: GuardState | None = None
) -> GuardState:
    """Bars a move that was rolled back and halves the largest step.

    Args:
      state: the guard's at the moment that the run went back to.
      move: [V] what the run had moved since then.
      erased: the guard's just before it went back: what was barred, halved or loosened then still is.
    """
    erased = state if erased is None else erased
    return GuardState(
        bars=_longest(state.bars + erased.bars + _bars(move, config.cool_down)),
        step_scale=max(SMALLEST_STEP_SCALE, 0.5 * min(state.step_scale, erased.step_scale)),
        rollbacks=max(state.rollbacks, erased.rollbacks) + 1,
        lead=erased.lead,
        lead_for=erased.lead_for,
    )


def after_loosening(state: GuardState, lead: float, decisions: int) -> GuardState:
    """Gives the policy a longer lead for some decisions; a lead that it has is not multiplied, nor cut."""
    return replace(state, lead=max(state.lead, lead), lead_for=max(state.lead_for, decisions))


def _bars(move: np.ndarray, decisions: int) -> tuple[Bar, ...]:
    if decisions == 0:
        return ()
    moved = np.flatnonzero(np.abs(move) > ROUNDING).tolist()
    return tuple(Bar(index, int(math.copysign(1, move[index])), decisions) for index in moved)


def _longest(bars: Sequence[Bar]) -> tuple[Bar, ...]:
    """Keeps the longest bar of each value and direction."""
    longest: dict[tuple[int, int], Bar] = {}
    for bar in bars:
        known = longest.get(bar[:2])
        if known is None or known.remaining < bar.remaining:
            longest[bar[:2]] = bar
    return tuple(sorted(longest.values()))
