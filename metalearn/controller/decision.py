"""A decision: the hyperparameters in force until the next one, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

DecisionStatus = Literal["applied", "limited", "held", "fallback"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Hyperparameters in force from `step` on.

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
      reasons: plain sentences.
    """

    index: int
    step: int
    status: DecisionStatus
    groups: tuple[Mapping[str, float], ...]
    run: Mapping[str, float]
    schedule: float
    confidence: float
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """Inverts `as_dict`."""
        return cls(**{**content, "groups": tuple(content["groups"]), "reasons": tuple(content["reasons"])})
