"""Trials: what one inner training run on one task was, measured and cost; written into results and histories."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Literal

from metalearn.errors import InvalidArgumentError, SessionError


class TrialStatus(StrEnum):
    """Where a trial stands; `invalid`, `diverged` and `complete` are final."""

    RUNNING = "running"
    PAUSED = "paused"
    """stopped on purpose, to be resumed if it is worth it"""
    PREEMPTED = "preempted"
    """its machine was taken away"""
    INVALID = "invalid"
    """its figures mean nothing: a configuration that cannot run, a bug, a leak"""
    DIVERGED = "diverged"
    """its loss stopped being finite; its figures count"""
    COMPLETE = "complete"


_TRANSITIONS: Mapping[TrialStatus, frozenset[TrialStatus]] = {
    TrialStatus.RUNNING: frozenset(TrialStatus) - {TrialStatus.RUNNING},
    TrialStatus.PAUSED: frozenset({TrialStatus.RUNNING, TrialStatus.INVALID}),
    TrialStatus.PREEMPTED: frozenset({TrialStatus.RUNNING, TrialStatus.INVALID}),
    TrialStatus.INVALID: frozenset(),
    TrialStatus.DIVERGED: frozenset(),
    TrialStatus.COMPLETE: frozenset(),
}


@dataclass(frozen=True)
class Measurement:
    """One metric at one step.

    Args:
      step: optimizer steps done, at least 0.
      metric: its name, as in "validation_ndcg@10".
      value: any float; not finite where the model had diverged.
    """

    step: int
    metric: str
    value: float

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 0:
            raise InvalidArgumentError(
                f"`step` must be an int of at least 0, got {self.step!r}; pass optimizer steps done"
            )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One inner training run on one task; every method returns a new trial.

    Args:
      task: what was trained, as in "movies/matrix_factorization/3000".
      configuration: hyperparameters at the start, JSON-ready.
      seed: of the run.
      status: see `TrialStatus`.
      measurements: in the order taken; of one metric the steps increase.
      cost: seconds of training so far.

    >>> trial = Trial(task="movies", configuration={"learning_rate": 0.001}, seed=0)
    >>> trial = trial.record(Measurement(100, "ndcg@10", 0.11), Measurement(200, "ndcg@10", 0.1)).complete(cost=2.5)
    >>> trial.best("ndcg@10")
    Measurement(step=100, metric='ndcg@10', value=0.11)
    >>> Trial.from_json(trial.to_json()) == trial
    True
    """

    task: str
    configuration: Mapping[str, Any]
    seed: int
    status: TrialStatus = TrialStatus.RUNNING
    measurements: tuple[Measurement, ...] = ()
    cost: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost >= 0):
            raise InvalidArgumentError(
                f"`cost` must be finite and not negative, got {self.cost}; pass seconds of training"
            )
        last: dict[str, int] = {}
        for measurement in self.measurements:
            if measurement.step <= last.get(measurement.metric, -1):
                raise InvalidArgumentError(
                    f"`measurements` of {measurement.metric} must be at increasing steps, got {measurement.step} "
                    f"after {last[measurement.metric]}"
                )
            last[measurement.metric] = measurement.step
        object.__setattr__(self, "configuration", dict(self.configuration))
        object.__setattr__(self, "status", TrialStatus(self.status))

    def record(self, *measurements: Measurement) -> Trial:
        """Returns the trial with more measurements; only a running one can be measured."""
        if self.status is not TrialStatus.RUNNING:
            raise SessionError(f"a trial that is {self.status} cannot be measured; resume it, or start another")
        return replace(self, measurements=(*self.measurements, *measurements))

    def moved(self, status: TrialStatus, *, cost: float = 0.0) -> Trial:
        """Returns the trial in another status.

        Args:
          status: the next one.
          cost: seconds of training since the last change, added to the trial's.

        Raises:
          SessionError: there is no way from this status to that one; the message names both.
        """
        if status not in _TRANSITIONS[self.status]:
            allowed = sorted(_TRANSITIONS[self.status]) or "nothing, it is final"
            raise SessionError(
                f"a trial cannot go from {self.status} to {status}; from {self.status} it can go to {allowed}"
            )
        return replace(self, status=status, cost=self.cost + cost)

    def diverge(self, *, cost: float = 0.0) -> Trial:
        """Ends it: its loss stopped being finite."""
        return self.moved(TrialStatus.DIVERGED, cost=cost)

    def complete(self, *, cost: float = 0.0) -> Trial:
        """Ends it as planned."""
        return self.moved(TrialStatus.COMPLETE, cost=cost)

    def best(self, metric: str, *, mode: Literal["max", "min"] = "max") -> Measurement | None:
        """Returns the best finite measurement of a metric, the earliest of equals; None if there is none."""
        if mode not in ("max", "min"):
            raise InvalidArgumentError(f"`mode` must be 'max' or 'min', got {mode!r}")
        finite = [m for m in self.measurements if m.metric == metric and math.isfinite(m.value)]
        return (max if mode == "max" else min)(finite, key=lambda m: m.value, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Returns strict JSON values: measurements as [step, metric, value], values that are not finite as null."""
        rows = [[m.step, m.metric, m.value if math.isfinite(m.value) else None] for m in self.measurements]
        return {
            **vars(self),
            "configuration": dict(self.configuration),
            "status": str(self.status),
            "measurements": rows,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Trial:
        """Inverts `as_dict`; null becomes NaN.

        Raises:
          InvalidArgumentError: keys are missing or unknown, or a value does not fit.
        """
        names = {field.name for field in fields(cls)}
        try:
            if set(content) != names:
                raise InvalidArgumentError(f"it must have the keys {sorted(names)}, got {sorted(content)}")
            rows = [Measurement(s, m, math.nan if v is None else float(v)) for s, m, v in content["measurements"]]
            return cls(**{**content, "measurements": tuple(rows)})
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"not a trial: {error}; pass what Trial.as_dict gave") from error

    def to_json(self) -> str:
        """Serialises the trial."""
        return json.dumps(self.as_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Trial:
        """Rebuilds a trial written by `to_json`."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InvalidArgumentError(f"not a trial: {error}; pass what Trial.to_json wrote") from error
        return cls.from_dict(content)
