"""What becomes of a decision that is not simply put in force: shadowed, refused, or overridden by an advisor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from metalearn.controller.decision import Decision
from metalearn.controller.setting import Setting
from metalearn.errors import InvalidArgumentError

Advisor = Callable[[Decision], Any]
"""Gets what the controller would do, as a decision. Returns True to let it, False to leave the values where they are,
or other values: anything with `groups` and `run` like a decision's. What those do not name stays as it is."""


def told(decision: Decision, reason: str, **changes: Any) -> Decision:
    """Returns a decision with another fate and one more reason, before its own; what it explains stays.

    Args:
      decision: what the controller would do.
      reason: for what becomes of it.
      changes: fields of the decision.
    """
    return replace(
        decision,
        reasons_fn=lambda: (reason, *decision.reasons),
        improvement_fn=lambda: decision.improvement,
        explanation_fn=decision.explain,
        **changes,
    )


def shadowed(decision: Decision) -> Decision:
    """Takes a decision out of force: the loop keeps its own values."""
    nothing: tuple[dict[str, float], ...] = ({},) * len(decision.groups)
    return told(decision, "shadow: nothing of it is in force", groups=nothing, run={}, proposed=decision.intended)


def encode_answer(setting: Setting, answer: Any, current: np.ndarray) -> np.ndarray:
    """Returns an advisor's values, [V] in unit ranges: clipped to the bounds, NaN where it gave no finite number.

    Args:
      setting: of the run.
      answer: anything with `groups` and `run` like a decision's.
      current: [V] in force: what the answer does not name.

    Raises:
      InvalidArgumentError: the answer is something else, or names what there is not.
    """
    try:
        rows = [*(dict(group) for group in answer.groups), dict(answer.run)]
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"`advisor` must return True, False, or an object with `groups` and `run` like a decision's, got {answer!r}"
        ) from error
    if len(rows) != setting.num_groups + 1:
        raise InvalidArgumentError(f"`advisor` must return values for {setting.num_groups} groups, got {len(rows) - 1}")
    wanted, labels = np.array(current), setting.labels
    for g, row in enumerate(rows):
        for name, value in row.items():
            label = f"{name}[{g}]" if g < setting.num_groups else name
            if label not in labels:
                raise InvalidArgumentError(f"`advisor` returned a value for {label!r}; allowed are {list(labels)}")
            finite = isinstance(value, (int, float, np.number)) and math.isfinite(value)
            wanted[labels.index(label)] = setting.config.space[name].encode(float(value)) if finite else math.nan
    return wanted
