"""Where a run stands: its position moved, decoded, and told to the networks; and written down as plain lists.

Shape legend as in `metalearn.controller.setting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metalearn.controller.actions import Position, Values, relative_residual
from metalearn.controller.config import GROUP_CONTROLLED
from metalearn.controller.decision import Configuration
from metalearn.controller.setting import Past, Setting
from metalearn.signals import Controls


def placed(position: Position, where: np.ndarray) -> Position:
    """Returns a position with the same start whose values are `where` [V]."""
    group, run = split(position, where)
    return position._replace(
        group_residual=group - position.group_start,
        global_residual=run - position.global_start,
    )


def started(position: Position, start: np.ndarray) -> Position:
    """Returns a position with the same residuals around another start [V]."""
    group, run = split(position, start)
    return position._replace(group_start=group, global_start=run)


def anchored(position: Position) -> Position:
    """Returns the same values as a start of their own, from which nothing has moved yet."""
    group, run = position.group_start + position.group_residual, position.global_start + position.global_residual
    return Position(group, run, np.zeros_like(group), np.zeros_like(run))


def split(position: Position, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Takes [V] apart into [G, A] and [B]."""
    groups = position.group_start.shape[0]
    cut = groups * len(GROUP_CONTROLLED)
    return where[:cut].reshape(groups, -1), where[cut:]


def configuration(setting: Setting, decoded: Values) -> Configuration:
    """Returns what the run may change of decoded values, by name."""
    in_group, in_run = setting.names
    return Configuration(
        tuple({name: float(getattr(decoded, name)[g]) for name in names} for g, names in enumerate(in_group)),
        {name: float(getattr(decoded, name)) for name in in_run},
    )


def sound(action: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an action as it is, or NaN, which the guard holds, if it is not one real number for each value."""
    is_sound = isinstance(action, np.ndarray) and action.shape == shape and action.dtype.kind in "fiu"
    return action if is_sound else np.full(shape, math.nan)


def controls(
    setting: Setting,
    position: Position,
    decoded: Values,
    *,
    schedule: float,
    shadow: bool,
    progress: float,
    epochs: float,
) -> Controls:
    """Returns what was in force during an interval; NaN for what is not the controller's to set.

    Args:
      setting: of the run.
      position: during the interval.
      decoded: its values.
      schedule: factor on the learning rate at the interval's last step.
      shadow: whether the loop kept its own values.
      progress: share of the horizon that is done, NaN if unknown.
      epochs: that are done, NaN if unknown.
    """
    group_residual, run_residual = relative_residual(position, setting.config, np)
    in_group, in_run = (np.where(bound, 1.0, math.nan) for bound in setting.bound)
    ours = math.nan if shadow else 1.0
    return Controls(
        learning_rate=decoded.learning_rate * schedule * in_group[:, 0] * ours,
        weight_decay=decoded.weight_decay * in_group[:, 1] * ours,
        group_residual=group_residual * in_group,
        dropout=np.float64(decoded.dropout) * in_run[0] * ours,
        dropout_residual=run_residual[0] * in_run[0],
        progress=np.float64(progress),
        epochs=np.float64(epochs),
    )


def listed(arrays: Any) -> dict[str, Any]:
    """Returns the arrays of a named tuple as lists."""
    return {name: value.tolist() for name, value in arrays._asdict().items()}


def arrays(lists: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverts `listed`, for a named tuple's constructor."""
    return {name: np.array(value, np.float64) for name, value in lists.items()}


def listed_past(past: Past) -> list[Any]:
    """Returns an earlier decision as a plain list."""
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in past]


def past_of(content: Sequence[Any]) -> Past:
    """Inverts `listed_past`."""
    index, step, group, run, moved, change = content
    parts = (np.array(part, np.float64) for part in (group, run, moved))
    return Past(int(index), int(step), *parts, validation_change=float(change))
