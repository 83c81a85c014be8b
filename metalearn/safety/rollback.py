"""When a run is to go back to its last good snapshot: pure rules over one interval's figures and a small state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from metalearn.errors import InvalidArgumentError

Place = Literal["auto", "device", "host", "disk"]

LOSS_FLOOR = 0.25
"""Share of the first interval's loss below which the best level no longer counts as small: a loss of almost nothing
may well triple."""
LOSS_RELAXATION = 0.1
"""Share of the way to the current loss that the best level goes in a good interval, so that slow drift is no alarm."""
VALIDATIONS_KEPT = 9
LEVEL_OF = 5
"""Validations whose median is the recent level; before so many nothing is judged."""


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """When snapshots are taken, what makes a run go back to the last good one, and where they are kept.

    Args:
      every: intervals between snapshots; 1 loses one interval of work at most. None: each interval as long as that
        takes no more than `max_cost` of the training time, as measured, else as often as it allows, and at least
        every tenth interval.
      max_cost: share of the training time, in (0, 1), for snapshots; a fifth of it more may go into looking at the
        weights and moments of a large model between them.
      max_rollbacks: the run falls back to the base schedule for good at this rollback in succession, without a new
        snapshot in between. That one leaves the position in the data where it is, so that a batch which nothing
        survives is passed by, and so do those after it, the first for want of memory excepted. From then on only
        weights or moments that are not finite are gone back from, and as often again a want of memory and, until the
        next snapshot, divergence.
      loss_ratio: a mean loss so many times its best running level is divergence; above 1.
      validation_noise: a fall of validation is collapse beyond so many standard deviations of its noise,
      validation_drop: and beyond this share of its recent level.
      place: of snapshots: `device` beside what is copied, `host` memory (pinned for CUDA), or `disk`; `auto` takes the
        first of them of which a quarter of what is free holds two, the disk only if there is a `folder`.
      limit_bytes: the most that both snapshots may take.
      folder: for snapshots on disk.

    Example:
      >>> RollbackConfig(every=1).max_rollbacks
      3
    """

    every: int | None = None
    max_cost: float = 0.005
    max_rollbacks: int = 3
    loss_ratio: float = 3.0
    validation_noise: float = 6.0
    validation_drop: float = 0.25
    place: Place = "auto"
    limit_bytes: int | None = None
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("every", "max_rollbacks", "limit_bytes"):
            value = getattr(self, name)
            allowed = value is None and name != "max_rollbacks"
            if not allowed and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise InvalidArgumentError(f"`{name}` must be a positive int, got {value!r}")
        for name, low, high in (
            ("max_cost", 0.0, 1.0),
            ("loss_ratio", 1.0, math.inf),
            ("validation_noise", 0.0, math.inf),
            ("validation_drop", 0.0, math.inf),
        ):
            if not low < getattr(self, name) < high:
                raise InvalidArgumentError(
                    f"`{name}` must lie between {low:g} and {high:g}, got {getattr(self, name)!r}"
                )
        if self.place not in ("auto", "device", "host", "disk"):
            raise InvalidArgumentError(f"`place` must be 'auto', 'device', 'host' or 'disk', got {self.place!r}")
        if self.place == "disk" and self.folder is None:
            raise InvalidArgumentError("`place` is 'disk' but `folder` is None; pass the folder for snapshots")


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to the last good snapshot.

    Args:
      step: optimizer steps done when it was found to be needed; they count again from `to_step` on.
      to_step: optimizer steps of the snapshot.
      reason: sentences on what went wrong.
      fallback: whether the run has fallen back to the base schedule for good.
    """

    step: int
    to_step: int
    reason: str
    fallback: bool


class Health(NamedTuple):
    """What the rules look at, of one interval; NaN is "not measured"."""

    steps: float
    loss: float
    """mean"""
    nonfinite_steps: float
    """whose loss was not finite"""
    state_finite: bool
    """whether every weight and every moment of the optimizer is"""
    validation: float
    """higher is better"""
    unkept: tuple[str, ...] = ()
    """sentences on constraints that are violated, with nothing else left to be done"""


class RollbackState(NamedTuple):
    """What the rules know of the intervals so far; plain values."""

    first_loss: float
    best_loss: float
    """best running level"""
    validations: tuple[float, ...]
    """the last ones, oldest first"""
    rollbacks: int
    """in succession, without a new snapshot"""
    fallen_back: bool


def init() -> RollbackState:
    """Returns the state of a run that has not begun."""
    return RollbackState(math.nan, math.nan, (), 0, False)


def update(config: RollbackConfig, state: RollbackState, health: Health) -> tuple[RollbackState, tuple[str, ...]]:
    """Judges an interval, and takes a good one into account.

    Args:
      config: thresholds.
      state: of the intervals before.
      health: of this one.

    Returns:
      The state, unchanged by a bad interval, and one sentence for each rule that calls the interval bad.

    >>> good = Health(50, 0.6, 0, True, 0.1)
    >>> state, reasons = update(RollbackConfig(), init(), good)
    >>> reasons
    ()
    >>> update(RollbackConfig(), state, good._replace(loss=2.4))[1]
    ('the mean loss 2.4 lies far above its best running level 0.6',)
    """
    rules = _rules(config, state)
    reasons = tuple(reason for rule in rules if (reason := rule(config, state, health)) is not None)
    if reasons:
        return state, reasons
    if math.isfinite(health.loss):
        first = health.loss if math.isnan(state.first_loss) else state.first_loss
        best = health.loss if math.isnan(state.best_loss) else state.best_loss
        state = state._replace(
            first_loss=first, best_loss=min(health.loss, best + LOSS_RELAXATION * (health.loss - best))
        )
    if math.isfinite(health.validation):
        state = state._replace(validations=(*state.validations, health.validation)[-VALIDATIONS_KEPT:])
    return state, ()


def _rules(config: RollbackConfig, state: RollbackState) -> tuple[Any, ...]:
    """Returns those that hold: what made the run fall back may go on for an interval or two, in data passed by."""
    if not state.fallen_back:
        return RULES
    passing_by = config.max_rollbacks <= state.rollbacks < 2 * config.max_rollbacks
    return (_nonfinite_state, _divergence) if passing_by else (_nonfinite_state,)


def rolled_back(config: RollbackConfig, saved: RollbackState, found: RollbackState) -> RollbackState:
    """Returns the state after a rollback: what the snapshot knew, and one rollback more in succession.

    Args:
      config: whose `max_rollbacks` counts.
      saved: state at the snapshot.
      found: state when the rollback was found to be needed.
    """
    count = found.rollbacks + 1
    return saved._replace(rollbacks=count, fallen_back=found.fallen_back or count >= config.max_rollbacks)


def validation_noise(validations: tuple[float, ...]) -> float:
    """Returns a robust estimate of the standard deviation of one validation's noise.

    From the median absolute deviation of successive differences, so that neither trend nor single outliers count:
    σ = 1.4826 · MAD(vᵢ₊₁ - vᵢ) / √2 (Rousseeuw and Croux, 1993, on MAD).
    """
    differences = [after - before for before, after in pairwise(validations)]
    centre = median(differences)
    return 1.4826 * median(abs(difference - centre) for difference in differences) / math.sqrt(2.0)


def _nonfinite_state(config: RollbackConfig, state: RollbackState, health: Health) -> str | None:
    return None if health.state_finite else "a weight, or a moment of the optimizer, is not finite"


def _nonfinite_loss(config: RollbackConfig, state: RollbackState, health: Health) -> str | None:
    if not health.nonfinite_steps > 0:
        return None
    return f"the loss of {health.nonfinite_steps:.0f} of {health.steps:.0f} steps was not finite"


def _divergence(config: RollbackConfig, state: RollbackState, health: Health) -> str | None:
    scale = max(abs(state.best_loss), LOSS_FLOOR * abs(state.first_loss))
    if not health.loss - state.best_loss > (config.loss_ratio - 1.0) * scale:
        return None
    return f"the mean loss {health.loss:.4g} lies far above its best running level {state.best_loss:.4g}"


def _collapse(config: RollbackConfig, state: RollbackState, health: Health) -> str | None:
    if len(state.validations) < LEVEL_OF or not math.isfinite(health.validation):
        return None
    level, noise = median(state.validations[-LEVEL_OF:]), validation_noise(state.validations)
    if not level - health.validation > max(config.validation_noise * noise, config.validation_drop * abs(level)):
        return None
    return f"validation collapsed to {health.validation:.4g} from {level:.4g}, with noise of {noise:.2g}"


def _unkept_constraint(config: RollbackConfig, state: RollbackState, health: Health) -> str | None:
    return "; ".join(health.unkept) or None


RULES: tuple[Any, ...] = (_nonfinite_state, _nonfinite_loss, _divergence, _collapse, _unkept_constraint)
"""Each takes (config, state, health) and returns a sentence if the interval is bad."""
