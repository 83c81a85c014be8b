"""What becomes of a decision that is not simply put in force: shadowed, refused, or overridden by an advisor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Position, Values, values
from metalearn.controller.decision import Advice, Decision, DecisionStatus, Mode
from metalearn.controller.placing import configuration, placed
from metalearn.controller.setting import Setting
from metalearn.errors import InvalidArgumentError
from metalearn.safety.guard import OVERRIDE_RULES, judge
from metalearn.safety.proposal import Proposal

Advisor = Callable[[Decision], Any]
"""Gets what the controller would do, as a decision. Returns True to let it, False to leave the values where they are,
or other values: anything with `groups` and `run` like a decision's. What those do not name stays as it is."""


class Taken(NamedTuple):
    """A decision and where it puts the run."""

    decision: Decision
    position: Position
    values: Values


def settle(
    candidate: Taken,
    now: Taken,
    asked: np.ndarray,
    proposal: Proposal,
    *,
    mode: Mode,
    advisor: Advisor | None,
    setting: Setting,
    around: Position,
) -> Taken:
    """Does with a candidate what the mode says.

    Args:
      candidate: what the controller does if nobody keeps it from it.
      now: what is in force.
      asked: [V] what the guard let through.
      proposal: that the guard judged.
      mode: of the session.
      advisor: to ask before a change.
      setting: of the run.
      around: position whose start an advisor's values count from.
    """
    if mode == "control":
        return candidate
    if mode == "shadow":
        return candidate._replace(decision=shadowed(candidate.decision))
    if mode == "frozen":
        return _kept(candidate.decision, now, "held", "held: the session is frozen", None)
    if advisor is None or np.array_equal(asked, proposal.current):
        return candidate
    answer = advisor(candidate.decision)
    if isinstance(answer, (bool, np.bool_)):
        if answer:
            accepted = told(candidate.decision, "accepted by the advisor", advice="accepted")
            return candidate._replace(decision=accepted)
        return _kept(candidate.decision, now, "rejected", "rejected by the advisor", "rejected")
    return _overridden(candidate.decision, answer, proposal, setting, around)


def consents(advisor: Advisor | None, candidate: Decision, setting: Setting, current: np.ndarray) -> bool:
    """Asks an advisor about what moves no value yet; whoever answers with values lets it, and is asked about each move.

    Raises:
      InvalidArgumentError: the answer is none.
    """
    answer = True if advisor is None else advisor(candidate)
    if isinstance(answer, (bool, np.bool_)):
        return bool(answer)
    encode_answer(setting, answer, current)
    return True


def _kept(candidate: Decision, now: Taken, status: DecisionStatus, reason: str, advice: Advice | None) -> Taken:
    """Leaves the values where they are."""
    held = now.decision
    intended = candidate.intended if candidate.intended != held.in_force else None
    decision = told(
        candidate, reason, status=status, advice=advice, groups=held.groups, run=held.run, proposed=intended
    )
    return now._replace(decision=decision)


def _overridden(candidate: Decision, answer: Any, proposal: Proposal, setting: Setting, around: Position) -> Taken:
    """Takes the advisor's values, as far as the guard lets them through."""
    verdict = judge(replace(proposal, proposed=encode_answer(setting, answer, proposal.current)), OVERRIDE_RULES)
    position = placed(around, verdict.values)
    decoded = values(position, setting.config, np)
    groups, run = configuration(setting, decoded)
    decision = told(
        candidate,
        "; ".join(("overridden by the advisor", *verdict.reasons)),
        status=verdict.status,
        advice="overridden",
        groups=groups,
        run=run,
        proposed=candidate.intended,
    )
    return Taken(decision, position, decoded)


def told(decision: Decision, reason: str, **changes: Any) -> Decision:
    """Returns a decision with another fate and one more reason, before its own; what it explains stays.

    Args:
      decision: what the controller would do.
      reason: for what becomes of it.
      changes: fields of the decision.
    """
    return replace(
        decision,
        reasons_fn=lambda: (reason, *decision.reasons),
        improvement_fn=lambda: decision.improvement,
        explanation_fn=decision.explain,
        **changes,
    )


def shadowed(decision: Decision) -> Decision:
    """Takes a decision out of force: the loop keeps its own values."""
    nothing: tuple[dict[str, float], ...] = ({},) * len(decision.groups)
    return told(decision, "shadow: nothing of it is in force", groups=nothing, run={}, proposed=decision.intended)


def encode_answer(setting: Setting, answer: Any, current: np.ndarray) -> np.ndarray:
    """Returns an advisor's values, [V] in unit ranges: clipped to the bounds, NaN where it gave no finite number.

    Args:
      setting: of the run.
      answer: anything with `groups` and `run` like a decision's.
      current: [V] in force: what the answer does not name.

    Raises:
      InvalidArgumentError: the answer is something else, or names what there is not.
    """
    try:
        rows = [*(dict(group) for group in answer.groups), dict(answer.run)]
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"`advisor` must return True, False, or an object with `groups` and `run` like a decision's, got {answer!r}"
        ) from error
    if len(rows) != setting.num_groups + 1:
        raise InvalidArgumentError(f"`advisor` must return values for {setting.num_groups} groups, got {len(rows) - 1}")
    wanted, labels = np.array(current), setting.labels
    for g, row in enumerate(rows):
        for name, value in row.items():
            label = f"{name}[{g}]" if g < setting.num_groups else name
            if label not in labels:
                raise InvalidArgumentError(f"`advisor` returned a value for {label!r}; allowed are {list(labels)}")
            finite = isinstance(value, (int, float, np.number)) and math.isfinite(value)
            wanted[labels.index(label)] = setting.config.space[name].encode(float(value)) if finite else math.nan
    return wanted
