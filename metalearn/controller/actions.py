"""From network outputs to hyperparameters: one code path for NumPy (in use) and jax.numpy (in meta-training).

Shape legend: G parameter group, A controlled group hyperparameter, B controlled global one, S = A + B start values.
Everything is in the unit range of its hyperparameter until `values` decodes it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED, ControllerConfig

PAST_HORIZON = 0.1
"""Share of the start's rate that a run holds at least when it goes on past its horizon: somebody had told it too short
a one."""

DAMPING = 8.0
"""How fast confidence falls as descriptors leave the meta-training range; see `confidence`."""

FALLBACK_CONFIDENCE = 0.2
"""Below this confidence the controller does not act at all: the base schedule runs as it is."""


class Position(NamedTuple):
    """Where a run stands in hyperparameter space."""

    group_start: Any
    """[G, A]"""
    global_start: Any
    """[B]"""
    group_residual: Any
    """[G, A] shift of the run's values from its start, within the trust region"""
    global_residual: Any
    """[B]"""


class Values(NamedTuple):
    """Decoded hyperparameters, before the base schedule multiplies the rate."""

    learning_rate: Any
    """[G]"""
    weight_decay: Any
    """[G]"""
    beta1: Any
    """[G]"""
    dropout: Any


def schedule_multiplier(progress: Any, xp: ModuleType, decay_to: Any = 0.0) -> Any:
    """Returns the base schedule's factor on the rate: from 1 by half a cosine to a share, 1 where progress is NaN.

    From the horizon on it is that share, at least `PAST_HORIZON`.

    >>> [round(float(schedule_multiplier(np.array(p), np, 0.3)), 3) for p in (0.0, 0.5, 1.0, 2.0, float("nan"))]
    [1.0, 0.65, 0.3, 0.3, 1.0]

    Args:
      progress: the step's number over the horizon; NaN without a horizon.
      xp: `numpy` or `jax.numpy`.
      decay_to: share of the rate, see `ControllerConfig`.
    """
    cosine = 0.5 * (1.0 + xp.cos(xp.minimum(xp.maximum(progress, 0.0), 1.0) * np.pi))
    decayed = xp.where(progress < 1.0, decay_to + (1.0 - decay_to) * cosine, xp.maximum(decay_to, PAST_HORIZON))
    return xp.where(xp.isfinite(progress), decayed, 1.0)


def confidence(distance: Any, xp: ModuleType) -> Any:
    """Returns the share of its reach that the controller uses at a distance from what it was trained on.

    exp(-8 d), and 0 where that is under `FALLBACK_CONFIDENCE`: with a tenth of the descriptors far outside, half.

    Args:
      distance: from `out_of_range`, 0 to 1.
    """
    trust = xp.exp(-DAMPING * distance)
    return xp.where(trust < FALLBACK_CONFIDENCE, 0.0, trust)


def start_position(
    base: Any, gate: Any, modifier: Any, trust: Any, config: ControllerConfig, num_groups: int, xp: ModuleType
) -> Position:
    """Places a run: base prior + gate · modifier · reach · trust, per hyperparameter.

    Args:
      base: [S] prior, in unit ranges.
      gate: [S] in [0, 1]: how much of the modifier transfers.
      modifier: [S] in [-1, 1]: what the domain asks for.
      trust: from `confidence`.
    """
    reach = xp.asarray([reach.start for reach in config.reach], base.dtype)
    start = xp.clip(base + gate * modifier * reach * trust, 0.0, 1.0)
    split = len(GROUP_CONTROLLED)
    group = xp.broadcast_to(start[:split], (num_groups, split))
    return Position(group, start[split:], xp.zeros_like(group), xp.zeros_like(start[split:]))


def trust_region(config: ControllerConfig, xp: ModuleType, dtype: Any) -> tuple[Any, Any]:
    """Returns the residuals' bounds, each [S]."""
    low = xp.asarray([reach.low for reach in config.reach], dtype)
    high = xp.asarray([reach.high for reach in config.reach], dtype)
    return low, high


def move(
    position: Position, group_action: Any, global_action: Any, trust: Any, config: ControllerConfig, xp: ModuleType
) -> Position:
    """Adds one action to the residuals: max_step · tanh(action) · trust, clipped to the trust region.

    Args:
      group_action: [G, A], any real number; 0 leaves the base schedule as it is.
      global_action: [B].
    """
    dtype = position.group_residual.dtype
    steps = xp.asarray([h.max_step for h in config.space], dtype)
    low, high = trust_region(config, xp, dtype)
    split = len(GROUP_CONTROLLED)
    group = position.group_residual + steps[:split] * xp.tanh(group_action) * trust
    run = position.global_residual + steps[split:] * xp.tanh(global_action) * trust
    return position._replace(
        group_residual=xp.minimum(xp.maximum(group, low[:split]), high[:split]),
        global_residual=xp.minimum(xp.maximum(run, low[split:]), high[split:]),
    )


def relative_residual(position: Position, config: ControllerConfig, xp: ModuleType) -> tuple[Any, Any]:
    """Returns residuals as shares of the trust region, -1 to 1: [G, A] and [B]."""
    low, high = trust_region(config, xp, position.group_residual.dtype)
    split = len(GROUP_CONTROLLED)

    def share(residual, low, high):
        return xp.where(residual < 0.0, -residual / low, residual / high)

    return share(position.group_residual, low[:split], high[:split]), share(
        position.global_residual, low[split:], high[split:]
    )


def values(position: Position, config: ControllerConfig, xp: ModuleType) -> Values:
    """Decodes a position to hyperparameter values, within the space's bounds."""
    space = config.space
    group = position.group_start + position.group_residual
    run = position.global_start + position.global_residual
    decoded = [space[name].decode(group[:, index], xp) for index, name in enumerate(GROUP_CONTROLLED)]
    decoded += [space[name].decode(run[index], xp) for index, name in enumerate(GLOBAL_CONTROLLED)]
    return Values(*decoded)
