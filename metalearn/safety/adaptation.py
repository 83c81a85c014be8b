"""What drift makes of a run: a policy with a longer lead, or a start proposed anew, to which the run travels.

A start that is proposed anew lies where the run is not, further away than the guard lets it go at once. So the run
takes the values that it has for its start, and that start travels: at most the largest step a decision, with the
policy's moves on top, and all of it before the guard. The trust region travels with it; the largest deviation from the
base, caps and bounds do not. When it has arrived the run stands where a fresh session would have begun.

Shape legend as in `metalearn.controller.setting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Position, values
from metalearn.controller.placing import anchored, configuration, started
from metalearn.controller.reasons import changes
from metalearn.controller.setting import Setting, flat, flat_values, starts
from metalearn.safety.drift.report import Response
from metalearn.safety.drift.response import Chosen, Loosening
from metalearn.safety.frame import as_it_stands, within_limits
from metalearn.safety.guard import STEP_RECOVERY, GuardConfig, GuardState, after_loosening
from metalearn.safety.proposal import Proposal


class Renewal(NamedTuple):
    """What a later profile has made of a run."""

    fingerprint: str
    """of the domain as it is now"""
    descriptors: np.ndarray
    """[D] scaled"""
    target: np.ndarray | None
    """[V] the start that was proposed anew; None where the run kept its own"""

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            "fingerprint": self.fingerprint,
            "descriptors": self.descriptors.tolist(),
            "target": None if self.target is None else self.target.tolist(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Renewal:
        """Inverts `as_dict`."""
        target = content["target"]
        return cls(
            str(content["fingerprint"]),
            np.array(content["descriptors"], np.float64),
            None if target is None else np.array(target, np.float64),
        )


class Bearings(NamedTuple):
    """What of a session drift may change."""

    setting: Setting
    trust: float
    """share of its reach that the controller uses"""
    position: Position
    guard: GuardState
    renewal: Renewal | None = None


class Answer(NamedTuple):
    """What is done about drift."""

    bearings: Bearings
    """as they were, the very same, if nothing is changed"""
    response: Response | None
    """None if there is nothing that could be done"""
    sentence: str


def propose_anew(
    setting: Setting, initial: Sequence[Mapping[str, float]] | None, config: GuardConfig, otherwise: np.ndarray
) -> np.ndarray:
    """Returns [V] the start that a fresh session would have in a setting; what the run may not change stays.

    Args:
      setting: of the domain as it is now.
      initial: the loop's own values, if the run began from those: a profile says nothing of them.
      config: the user's limits.
      otherwise: [V] for what the run may not change.
    """
    position, base = starts(setting, setting.confidence, initial)
    start = within_limits(setting, position, base, config)
    return np.where(setting.free, flat(start.group_start, start.global_start), otherwise)


def renewed(now: Bearings, renewal: Renewal) -> Bearings:
    """Returns the bearings that a renewal leads to; values stay as they are until the next decision."""
    setting = now.setting.described_by(renewal.descriptors)
    position = anchored(now.position) if _has_other_target(now, renewal) else now.position
    return Bearings(setting, setting.confidence, position, now.guard, renewal)


def caught_up(now: Bearings, left: Renewal | None) -> Bearings:
    """Returns the bearings of a run that was taken back, with what was known of the data: that is not undone."""
    if left is None or (now.renewal is not None and now.renewal.as_dict() == left.as_dict()):
        return now
    return renewed(now, left)


def _has_other_target(now: Bearings, renewal: Renewal) -> bool:
    before = None if now.renewal is None else now.renewal.target
    if renewal.target is None or before is None:
        return renewal.target is not None
    return not np.array_equal(renewal.target, before)


def respond(
    now: Bearings, choice: Chosen, renewal: Renewal | None, *, loosening: Loosening, frame: Proposal, given_up: bool
) -> Answer:
    """Makes a response to drift.

    Args:
      now: of the session.
      choice: of a response other than `none`.
      renewal: by a profile of the data as it is now, if there is one.
      loosening: of the policy.
      frame: the guard's.
      given_up: whether the run was given up to the base schedule.
    """
    response, asks = choice.response, "asks for a profile of the data as it is now"
    if response == "roll_back":
        return Answer(now, response, "goes back to the last good snapshot")
    if given_up:
        return Answer(now, None, "nothing is done: the run was given up to the base schedule, for good")
    if response == "loosen":
        if now.trust == 0.0:
            idle = "nothing to loosen: the base schedule runs as it is"
            return Answer(now, "re_profile", f"{idle}; {asks}") if choice.awaits_profile else Answer(now, None, idle)
        guard = after_loosening(now.guard, loosening.factor, loosening.decisions)
        sentence = (
            f"loosened: largest step and trust region {guard.lead:.3g} times as wide for {guard.lead_for} decisions, "
            f"then less by {1.0 - 1.0 / STEP_RECOVERY:.0%} a decision"
        )
        return Answer(now._replace(guard=guard), response, f"{sentence}; {asks}" if choice.awaits_profile else sentence)
    if renewal is None:
        return Answer(now, response, asks)
    then = renewed(now, renewal)
    read = f"goes by the profile of the data as it is now, at confidence {then.trust:.2f} after {now.trust:.2f}"
    if renewal.target is None or not _has_other_target(now, renewal):
        return Answer(then, response, read)
    before, after = (
        configuration(then.setting, values(position, then.setting.config, np))
        for position in (now.position, started(then.position, renewal.target))
    )
    count = decisions_left(then.position, renewal.target, as_it_stands(frame, now.guard).max_step)
    way = f"on the way there for {count} decisions or more" if count else "which is where it is"
    return Answer(then, "re_propose", f"{read}; start proposed anew, {way}: {', '.join(changes(before, after))}")


def decisions_left(position: Position, target: np.ndarray, max_step: np.ndarray) -> int:
    """Returns how many decisions a start is away from another [V] at the least."""
    distance = np.abs(target - flat(position.group_start, position.global_start))
    return math.ceil(float((distance / max_step).max()) - 1e-9)


def travelled(position: Position, target: np.ndarray, frame: Proposal) -> Position:
    """Returns a position whose start is one decision nearer to a target, with the policy's residuals riding on it.

    It goes no further than the largest step, not where that is barred, and never so far that the trust region around
    it would leave out everything within the largest step of the values in force.

    Args:
      position: of the run.
      target: [V] start to travel to.
      frame: what the guard allows for this decision.
    """
    start, now = flat(position.group_start, position.global_start), flat_values(position)
    way = target - start
    for bar in frame.bars:
        if bar.direction * way[bar.value] > 0:
            way[bar.value] = 0.0
    reached = start + np.clip(way, -frame.max_step, frame.max_step)
    reached = np.clip(reached, now - frame.max_step - frame.high, now + frame.max_step - frame.low)
    arrives = np.abs(reached - target) <= 1e-12
    return started(position, np.where(arrives, target, reached))
