"""The part of a proposal that stays the same in a run: what may move, and how far.

Shape legend as in `metalearn.safety.proposal`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from metalearn.controller.actions import Position, trust_region
from metalearn.controller.setting import Setting, flat, flat_values
from metalearn.safety.guard import GuardConfig, GuardState
from metalearn.safety.proposal import Proposal, Region

_HAIR = 1e-9
"""More than the controller's own reach, which rounding must not make a limit."""


def guard_frame(setting: Setting, position: Position, base: Position, config: GuardConfig) -> Proposal:
    """Returns a proposal in which nothing is proposed yet.

    Args:
      setting: of the run.
      position: whose start is the centre of the trust region.
      base: what the largest deviation counts from.
      config: the user's limits.

    Raises:
      InvalidArgumentError: a limit is of a hyperparameter that is not controlled.
    """
    start = flat(position.group_start, position.global_start)
    low, high = (setting.spread(bound) for bound in trust_region(setting.config, np, np.float64))
    return Proposal(
        labels=setting.labels,
        current=start,
        proposed=start,
        start=start,
        low=low,
        high=high,
        max_step=setting.max_step,
        nonfinite_steps=0.0,
        free=setting.free,
        deviation=_deviation(setting, base, config),
        caps=_caps(setting, config),
    )


def as_it_stands(frame: Proposal, state: GuardState) -> Proposal:
    """Returns a frame with what rollbacks barred and halved, and what drift loosened.

    A lead widens the largest step and the trust region; the largest deviation, caps and bounds stay.
    """
    step = state.step_scale * state.lead
    if not state.bars and step == state.lead == 1.0:
        return frame
    return replace(
        frame,
        low=frame.low * state.lead,
        high=frame.high * state.lead,
        max_step=frame.max_step * step,
        bars=state.bars,
    )


def within_limits(setting: Setting, start: Position, base: Position, config: GuardConfig) -> Position:
    """Brings a start within the largest deviation and the caps; what of it is not finite gives way to the base."""
    where = flat_values(start)
    where = np.where(np.isfinite(where), where, flat_values(base))
    for region in (_deviation(setting, base, config), _caps(setting, config)):
        if region is not None:
            where = np.clip(where, *region)
    split = start.group_start.size
    return start._replace(group_start=where[:split].reshape(start.group_start.shape), global_start=where[split:])


def _deviation(setting: Setting, base: Position, config: GuardConfig) -> Region:
    low, high = (setting.spread(bound) for bound in trust_region(setting.config, np, np.float64))
    reach = setting.spread(np.array([reach.start for reach in setting.config.reach]))
    given = {setting.config.space[name].name: distance for name, distance in config.deviation.items()}
    tightest = np.array([given.get(name, math.inf) for name in setting.hyperparameters])
    centre = flat(base.group_start, base.global_start)
    return Region(
        centre - np.minimum(reach - low + _HAIR, tightest), centre + np.minimum(reach + high + _HAIR, tightest)
    )


def _caps(setting: Setting, config: GuardConfig) -> Region | None:
    if not config.caps:
        return None
    ends = {name: [setting.config.space[name].encode(end) for end in pair] for name, pair in config.caps.items()}
    return Region(*np.array([ends.get(name, [0.0, 1.0]) for name in setting.hyperparameters]).T)
