"""Makes decisions of what a session has decided: what is in force, and the reasons, to be worked out on demand.

Shape legend as in `metalearn.controller.setting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from metalearn.controller.actions import Position, Values, values
from metalearn.controller.decision import Decision, DecisionStatus, Mode
from metalearn.controller.explanation import Explanation, explain_event, explain_start, explain_step
from metalearn.controller.forecast import Improvement, forecast_improvement
from metalearn.controller.modes import Taken
from metalearn.controller.placing import configuration, placed
from metalearn.controller.reasons import changes, influences, situation
from metalearn.controller.setting import Moment, Past, Setting, base_position, flat_values
from metalearn.safety.proposal import Proposal, Verdict


class Stamp(NamedTuple):
    """When, by whom and in which mode a decision is taken; fields as of `Decision`."""

    index: int
    step: int
    schedule: float
    confidence: float
    mode: Mode

    @property
    def status(self) -> DecisionStatus:
        """Of a decision that nothing keeps from being applied."""
        return "fallback" if self.confidence == 0.0 else "applied"


class Course(NamedTuple):
    """Where one decision goes from."""

    held: Position
    """in force"""
    around: Position
    """whose start the next position has; the same one unless that travels"""
    decisions_left: int = 0
    """until a start that travels has arrived"""


def start_decision(stamp: Stamp, setting: Setting, position: Position, *, own_values: bool) -> Decision:
    """Returns the decision for a start configuration.

    Args:
      stamp: of the decision.
      setting: of the run.
      position: the start.
      own_values: whether it is made of the optimizer's own values.
    """
    base, trust = base_position(setting), stamp.confidence
    if own_values:
        reason = "start: the optimizer's own values, since the controller's prior is for AdamW"
    elif setting.at_rest:
        family = setting.config.families[setting.family - 1]
        reason = f"start: base configuration, which is all that this controller has for {family} models"
    elif setting.cues:
        family, moved = setting.config.families[setting.family - 1], [cue.hyperparameter for cue in setting.cues]
        reason = f"start: base configuration, from which {' and '.join(moved)} of {family} models go by cues"
    elif trust == 0.0:
        reason = "start: base configuration, since the domain lies outside the meta-training range"
    elif not np.isfinite(setting.network.start(setting.code)).all():
        reason = "start: base configuration where the controller's own is not finite"
    else:
        reason = f"start: base configuration shifted for this domain, at confidence {trust:.2f}"

    def explain() -> Explanation:
        """Explains the start, once somebody asks."""
        return explain_start(
            setting, position=position, base=flat_values(base), trust=trust, expected=decision.improvement
        )

    in_force = configuration(setting, values(position, setting.config, np))
    decision = Decision(
        **stamp._asdict(),
        status=stamp.status,
        groups=in_force.groups,
        run=in_force.run,
        reasons_fn=lambda: (reason,),
        improvement_fn=lambda: forecast_improvement(setting, position, base, None),
        explanation_fn=explain,
    )
    return decision


def step_decision(
    stamp: Stamp,
    setting: Setting,
    moment: Moment,
    course: Course,
    proposal: Proposal,
    verdict: Verdict,
    *,
    before: Decision,
    past: Sequence[Past],
    since_best: int,
) -> Taken:
    """Returns what the controller does in mid-run if nobody keeps it from it.

    Args:
      stamp: of the decision.
      setting: of the run.
      moment: what the decision saw.
      course: where it goes from.
      proposal: what the policy wanted.
      verdict: what the guard made of it.
      before: the decision in force.
      past: earlier decisions, in order.
      since_best: decisions since the best validation.
    """
    held, around, left = course
    former = before.intended if before.mode == "shadow" else before.in_force
    asked = verdict.values if verdict.rejected is None else verdict.rejected
    wanted = placed(around, asked)
    position = wanted if verdict.rejected is None else held
    decoded = values(position, setting.config, np)
    in_force = configuration(setting, decoded)
    travels = around is not held

    def reasons() -> tuple[str, ...]:
        """Puts the reasons into words, once somebody asks."""
        way = (f"on the way to the start proposed anew, {left} decisions off",) if travels else ()
        told = situation(moment.raw.run, since_best)
        return (*verdict.reasons, *way, *changes(former, in_force), *told, *influences(setting, moment))

    def foresee() -> Improvement | None:
        """Asks the outcome model, once somebody asks."""
        return forecast_improvement(setting, wanted, held, moment)

    def explain() -> Explanation:
        """Explains the decision, once somebody asks."""
        return explain_step(
            setting,
            moment,
            index=stamp.index,
            step=stamp.step,
            move=asked - proposal.current,
            position=wanted,
            expected=decision.improvement,
            past=past,
            way=flat_values(around) - proposal.current if travels else None,
        )

    decision = Decision(
        **stamp._asdict(),
        status=stamp.status if verdict.status == "applied" else verdict.status,
        groups=in_force.groups,
        run=in_force.run,
        reasons_fn=reasons,
        improvement_fn=foresee,
        explanation_fn=explain,
    )
    if verdict.rejected is not None:
        decision = replace(decision, proposed=configuration(setting, values(wanted, setting.config, np)))
    return Taken(decision, position, decoded)


def event_decision(
    stamp: Stamp, setting: Setting, decoded: Values, status: DecisionStatus, reasons: tuple[str, ...]
) -> Decision:
    """Returns the decision for what is in force for a reason that is not the policy's.

    Args:
      stamp: of the decision.
      setting: of the run.
      decoded: what is in force.
      status: of the decision.
      reasons: plain sentences.
    """
    in_force = configuration(setting, decoded)
    return Decision(
        **stamp._asdict(),
        status=status,
        groups=in_force.groups,
        run=in_force.run,
        reasons_fn=lambda: reasons,
        explanation_fn=lambda: explain_event(stamp.index, stamp.step, reasons),
    )
