"""A decision: the hyperparameters in force until the next one, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

DecisionStatus = Literal["applied", "limited", "held", "fallback"]


class Improvement(NamedTuple):
    """What the outcome model expects of a decision: relative change of the final metric against not taking it.

    The metric is NDCG@10 plus 0.02, as in meta-training. The luck of two runs is in the interval.
    """

    expected: float
    """0.03 is 3 % above"""
    low: float
    """of the central 90 % interval"""
    high: float
    probability: float
    """that it is above 0"""


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
      foresee: returns the expected improvement: of the start over the base configuration, later of the change over
        going on without it; None where the controller has no outcome model.
    """

    index: int
    step: int
    status: DecisionStatus
    groups: tuple[Mapping[str, float], ...]
    run: Mapping[str, float]
    schedule: float
    confidence: float
    explain: Callable[[], tuple[str, ...]] = field(repr=False)
    foresee: Callable[[], Improvement | None] = field(repr=False, default=lambda: None)

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Plain sentences: what the guard did, what changed, what validation did, what moved the policy."""
        return self.explain()

    @cached_property
    def improvement(self) -> Improvement | None:
        """Expected improvement with its interval; None where the controller has no outcome model."""
        return self.foresee()

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
            "improvement": None if self.improvement is None else self.improvement._asdict(),
            "reasons": self.reasons,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """Inverts `as_dict`."""
        special = ("groups", "improvement", "reasons")
        fields = {name: value for name, value in content.items() if name not in special}
        reasons, expected = tuple(content["reasons"]), content.get("improvement")
        improvement = None if expected is None else Improvement(**expected)
        return cls(**fields, groups=tuple(content["groups"]), explain=lambda: reasons, foresee=lambda: improvement)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Decision.from_dict, (self.as_dict(),)
