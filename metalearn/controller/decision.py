"""A decision: the hyperparameters in force until the next one, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

DecisionStatus = Literal["applied", "limited", "held", "fallback"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Hyperparameters in force from `step` on, and on demand the reasons: working them out takes longer than deciding.

    Args:
      index: 0 for the start configuration, then 1, 2, ...
      step: optimizer steps done when it was taken.
      status: `applied`; `limited` or `held` by the guard; `fallback` when the domain is too far from what the
        controller was trained on and the base schedule runs as it is.
      groups: per parameter group, hyperparameter name to value. The learning rate is the peak of the schedule: a step
        uses it times `schedule`.
      run: hyperparameters of the whole run.
      schedule: the base schedule's factor on the learning rate at `step`.
      confidence: share of its reach that the controller used, 1 inside the meta-training range.
      explain: returns the reasons, plain sentences.
    """

    index: int
    step: int
    status: DecisionStatus
    groups: tuple[Mapping[str, float], ...]
    run: Mapping[str, float]
    schedule: float
    confidence: float
    explain: Callable[[], tuple[str, ...]] = field(repr=False)

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Plain sentences: what the guard did, what changed, what validation did, what moved the policy."""
        return self.explain()

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values, the reasons among them."""
        return {
            "index": self.index,
            "step": self.step,
            "status": self.status,
            "groups": tuple(dict(group) for group in self.groups),
            "run": dict(self.run),
            "schedule": self.schedule,
            "confidence": self.confidence,
            "reasons": self.reasons,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """Inverts `as_dict`."""
        fields = {name: value for name, value in content.items() if name not in ("groups", "reasons")}
        reasons = tuple(content["reasons"])
        return cls(**fields, groups=tuple(content["groups"]), explain=lambda: reasons)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Decision.from_dict, (self.as_dict(),)
