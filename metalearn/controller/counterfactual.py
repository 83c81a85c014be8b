"""What would have turned a decision round: the smallest change of the signals, found on the network.

Shape legend as in `metalearn.controller.setting`, and N variant.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np

from metalearn.controller.config import CONTROLLED, GROUP_CONTROLLED
from metalearn.controller.setting import Moment, Setting, flat
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES

REACH = 1.0
"""Signals are varied within ± this, scaled: where 99 % of those of meta-training lie."""
NOT_SIGNALS = frozenset(
    {
        *("shrinkage", "learning_rate_residual", "weight_decay_residual", "beta1_residual"),
        *("dropout", "dropout_residual", "progress", "epochs", "epochs_per_interval", "decisions"),
        *("horizon_known", "validation_missing", "loss_not_finite"),
    }
)
"""Features that say what the controller itself has set, how far the run is, or what the loop measures."""
_GRID = np.linspace(-REACH, REACH, 129)
_PAIRED_SIGNALS, _COARSE_GRID = 6, np.linspace(-REACH, REACH, 17)
_BISECTIONS = 14

Turned = Callable[[np.ndarray], np.ndarray]


class SignalChange(NamedTuple):
    """Another value of one signal."""

    name: str
    group: int | None
    """parameter group; None for a signal of the whole run"""
    measured: float
    instead: float
    scaled: float
    """what the network saw"""
    scaled_instead: float


class Counterfactual(NamedTuple):
    """The smallest change of one signal, or of two, that turns the step of one value round."""

    label: str
    direction: int
    """of the step as it was, 1 or -1"""
    changes: tuple[SignalChange, ...]
    distance: float
    """length of the change among the scaled signals"""


def main_value(setting: Setting, moment: Moment) -> int | None:
    """Returns the index of what most would ask about: the first bound hyperparameter, of the group that it moves most.

    None if nothing is bound.
    """
    action = np.abs(flat(moment.group_action, moment.run_action))
    free, names = setting.free, np.array(setting.hyperparameters)
    for name in CONTROLLED:
        candidates = np.flatnonzero(free & (names == name))
        if candidates.size:
            return int(candidates[np.argmax(action[candidates])])
    return None


def find_counterfactual(setting: Setting, moment: Moment) -> Counterfactual | None:
    """Searches the network for the smallest change of one measured signal, or of two, that turns the main step round.

    A grid over each signal's range, then bisection; pairs are tried, on a coarser grid and among the signals that move
    the step most, only if no single signal does it.

    Returns:
      None if nothing was found, or if there is no step to turn.
    """
    value = main_value(setting, moment)
    if value is None or moment.trust == 0.0:
        return None
    taken = float(flat(moment.group_action, moment.run_action)[value])
    split = len(GROUP_CONTROLLED) * setting.num_groups
    group = value // len(GROUP_CONTROLLED) if value < split else 0
    width = len(GROUP_FEATURES)
    now = np.concatenate([moment.group[group], moment.run])
    raw = np.concatenate([moment.raw.group[group], moment.raw.run])
    names = (*GROUP_FEATURES, *GLOBAL_FEATURES)
    signals = np.array([i for i, n in enumerate(names) if n not in NOT_SIGNALS and np.isfinite(raw[i])], int)
    if taken == 0.0 or not signals.size:
        return None

    def turned(points: np.ndarray) -> np.ndarray:
        """Of other values [N, F] of the signals, how far the step goes the other way."""
        groups = np.repeat(moment.group[None], len(points), 0)
        groups[:, group] = points[:, :width]
        action = setting.network.act(moment.hidden, groups, points[:, width:], setting.context)
        return -np.sign(taken) * flat(*action[:2])[:, value]

    found = _one_signal(turned, now, signals)
    if found is None:
        found = _two_signals(turned, now, signals)
    if found is None:
        return None
    point = _nearest_turn(turned, now, found)
    labels = tuple(
        SignalChange(
            names[i],
            group if i < width else None,
            float(raw[i]),
            _unscaled(float(point[i]), setting.knots[0][i] if i < width else setting.knots[1][i - width]),
            float(now[i]),
            float(point[i]),
        )
        for i in np.flatnonzero(point != now).tolist()
    )
    return Counterfactual(setting.labels[value], int(np.sign(taken)), labels, float(np.linalg.norm(point - now)))


def _one_signal(turned: Turned, now: np.ndarray, signals: np.ndarray) -> np.ndarray | None:
    """Returns the nearest point of the grid that turns the step and differs in one signal."""
    points = np.repeat(now[None], len(signals) * len(_GRID), 0)
    points[np.arange(len(points)), np.repeat(signals, len(_GRID))] = np.tile(_GRID, len(signals))
    return _nearest(turned(points), points, now)


def _two_signals(turned: Turned, now: np.ndarray, signals: np.ndarray) -> np.ndarray | None:
    """Returns the nearest point of the coarse grid that turns the step and differs in two of the strongest signals."""
    ends = np.repeat(now[None], 2 * len(signals), 0)
    ends[np.arange(len(ends)), np.repeat(signals, 2)] = np.tile([-REACH, REACH], len(signals))
    strongest = signals[np.argsort(-turned(ends).reshape(-1, 2).max(1), kind="stable")[:_PAIRED_SIGNALS]]
    pairs = np.array(list(combinations(strongest.tolist(), 2)), int).reshape(-1, 2)
    if not len(pairs):
        return None
    first, second = (axis.ravel() for axis in np.meshgrid(_COARSE_GRID, _COARSE_GRID))
    points = np.repeat(now[None], len(pairs) * len(first), 0)
    rows = np.arange(len(points))
    points[rows, np.repeat(pairs[:, 0], len(first))] = np.tile(first, len(pairs))
    points[rows, np.repeat(pairs[:, 1], len(first))] = np.tile(second, len(pairs))
    return _nearest(turned(points), points, now)


def _nearest(turned: np.ndarray, points: np.ndarray, now: np.ndarray) -> np.ndarray | None:
    distance = np.where(turned > 0.0, np.linalg.norm(points - now, axis=1), np.inf)
    best = int(np.argmin(distance))
    return points[best] if np.isfinite(distance[best]) else None


def _nearest_turn(turned: Turned, now: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Moves a point that turns the step towards where the run is, as long as it does."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if turned((now + middle * (point - now))[None])[0] > 0.0:
            high = middle
        else:
            low = middle
    return now + high * (point - now)


def _unscaled(scaled: float, knots: np.ndarray) -> float:
    """Inverts `percentile_scale` for one feature."""
    inside = float(np.interp(scaled, np.linspace(-1.0, 1.0, len(knots)), knots))
    beyond = scaled - min(max(scaled, -1.0), 1.0)
    return inside + beyond * float(knots[-1] - knots[0])
