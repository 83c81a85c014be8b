"""A decision: the hyperparameters in force until the next one, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from metalearn.controller.explanation import Explanation, not_recorded
from metalearn.controller.forecast import Improvement

if TYPE_CHECKING:
    from metalearn.safety.drift.report import Response

DecisionStatus = Literal["applied", "limited", "held", "rejected", "rolled back", "fallback"]
Mode = Literal["control", "shadow", "advise", "frozen"]
MODES: tuple[Mode, ...] = ("control", "shadow", "advise", "frozen")
Advice = Literal["accepted", "rejected", "overridden"]


class Configuration(NamedTuple):
    """Values of the hyperparameters that a session may change."""

    groups: tuple[Mapping[str, float], ...]
    """per parameter group, hyperparameter name to value; the learning rate is the peak of the schedule"""
    run: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Hyperparameters in force from `step` on, and on demand the reasons: working them out takes longer than deciding.

    Args:
      index: 0 for the start configuration, then 1, 2, ...
      step: optimizer steps done when it was taken.
      status: `applied`; `limited` or `held` by the guard; `rejected` by its acceptance rule or by the advisor; `rolled
        back` after a rollback, with what was in force before; `fallback` when the base schedule runs as it is: the
        domain is too far from what the controller was trained on, or the run was given up to it.
      groups: per parameter group, hyperparameter name to value. The learning rate is the peak of the schedule: a step
        uses it times `schedule`. Empty in shadow mode, in which the loop keeps its own values.
      run: hyperparameters of the whole run.
      schedule: the base schedule's factor on the learning rate at `step`.
      confidence: share of its reach that the controller used, 1 inside the meta-training range.
      mode: of the session.
      proposed: what it would have done, where that is not what is in force: in the modes `shadow` and `frozen`, and
        where a change was rejected or overridden.
      advice: of the advisor, if one was asked.
      response: to drift, of a decision that is one: what is done. None for any other, and where nothing is done.
      reasons_fn: returns the reasons, plain sentences.
      improvement_fn: returns the expected improvement: of the start over the base configuration, later of the change
        over going on without it; None where the controller has no outcome model.
      explanation_fn: returns the explanation; None if it was not recorded.
    """

    index: int
    step: int
    status: DecisionStatus
    groups: tuple[Mapping[str, float], ...]
    run: Mapping[str, float]
    schedule: float
    confidence: float
    mode: Mode = "control"
    proposed: Configuration | None = None
    advice: Advice | None = None
    response: Response | None = None
    reasons_fn: Callable[[], tuple[str, ...]] = field(repr=False)
    improvement_fn: Callable[[], Improvement | None] = field(repr=False, default=lambda: None)
    explanation_fn: Callable[[], Explanation] | None = field(repr=False, default=None)

    @property
    def in_force(self) -> Configuration:
        """What the loop is to use."""
        return Configuration(self.groups, self.run)

    @property
    def intended(self) -> Configuration:
        """What the controller would have: `proposed`, or what is in force."""
        return self.proposed or self.in_force

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Plain sentences: what the guard did, what changed, what validation did, what moved the policy."""
        return self.reasons_fn()

    @cached_property
    def improvement(self) -> Improvement | None:
        """Expected improvement with its interval; None where the controller has no outcome model."""
        return self.improvement_fn()

    def explain(self) -> Explanation:
        """Explains the decision, in a sentence and in numbers; the first call works it out, in tens of milliseconds."""
        return self._explanation

    @cached_property
    def _explanation(self) -> Explanation:
        return not_recorded(self.index, self.step) if self.explanation_fn is None else self.explanation_fn()

    def __str__(self) -> str:
        lines = [f"decision {self.index} at step {self.step}: {self.status} ({self.mode})"]
        named = "intended" if self.proposed is not None else "in force"
        for suffix, values in (
            *((f"[{g}]", row) for g, row in enumerate(self.intended.groups)),
            ("", self.intended.run),
        ):
            lines += [f"  {named}: {name}{suffix} = {value:.4g}" for name, value in values.items()]
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])

    def as_dict(self, *, explanation: bool = False) -> dict[str, Any]:
        """Returns JSON-ready values, the reasons among them.

        Args:
          explanation: whether to work out the explanation and keep it, some kilobytes.
        """
        content = {
            "index": self.index,
            "step": self.step,
            "status": self.status,
            "groups": tuple(dict(group) for group in self.groups),
            "run": dict(self.run),
            "schedule": self.schedule,
            "confidence": self.confidence,
            "mode": self.mode,
            "proposed": None
            if self.proposed is None
            else {"groups": tuple(dict(group) for group in self.proposed.groups), "run": dict(self.proposed.run)},
            "advice": self.advice,
            "improvement": None if self.improvement is None else self.improvement._asdict(),
            "reasons": self.reasons,
        }
        if self.response is not None:
            content["response"] = self.response
        return {**content, "explanation": self.explain().as_dict()} if explanation else content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """Inverts `as_dict`; a record of before there were modes is one of mode `control`."""
        special = ("groups", "proposed", "improvement", "reasons", "explanation")
        fields = {name: value for name, value in content.items() if name not in special}
        reasons, expected = tuple(content["reasons"]), content.get("improvement")
        improvement = None if expected is None else Improvement(**expected)
        proposed, explained = content.get("proposed"), content.get("explanation")
        explanation = None if explained is None else Explanation.from_dict(explained)
        return cls(
            **fields,
            groups=tuple(content["groups"]),
            proposed=None if proposed is None else Configuration(tuple(proposed["groups"]), proposed["run"]),
            reasons_fn=lambda: reasons,
            improvement_fn=lambda: improvement,
            explanation_fn=None if explanation is None else lambda: explanation,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Decision.from_dict, (self.as_dict(),)
