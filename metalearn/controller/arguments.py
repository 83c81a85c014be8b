"""What a session accepts, and how often it decides."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral

import numpy as np

from metalearn.controller.config import ROLES
from metalearn.controller.decision import MODES
from metalearn.controller.modes import Advisor
from metalearn.errors import InvalidArgumentError
from metalearn.signals import GROUP_STATISTICS, IntervalStatistics

DEFAULT_INTERVAL = 100
"""Steps between decisions when neither the horizon nor the length of an epoch is known."""
MIN_INTERVAL = 2
"""A probe takes two successive steps."""


def decision_interval(num_decisions: int, horizon: int | None, steps_per_epoch: float | None) -> int:
    """Returns the default number of optimizer steps between decisions.

    The horizon over the number of decisions; without a horizon half an epoch, within 10 to 1000 steps.

    >>> decision_interval(20, 10_000, None), decision_interval(20, None, 300.0), decision_interval(20, None, None)
    (500, 150, 100)
    """
    if horizon is not None:
        return max(MIN_INTERVAL, math.ceil(horizon / num_decisions))
    if steps_per_epoch is None:
        return DEFAULT_INTERVAL
    return round(min(max(steps_per_epoch / 2, 10), 1000))


def check_mode(mode: str, advisor: Advisor | None) -> None:
    """Refuses a mode that is none, and one that asks an advisor where there is none."""
    if mode not in MODES:
        raise InvalidArgumentError(f"`mode` must be one of {MODES}, got {mode!r}")
    if mode == "advise" and advisor is None:
        raise InvalidArgumentError("`advisor` must be given in mode 'advise': a function of the decision, got None")


def check_arguments(
    roles: Sequence[str],
    horizon: int | None,
    batch_size: int | None,
    interval: int | None,
    initial: Sequence[Mapping[str, float]] | None,
    withheld: Sequence[Collection[str]] | None,
) -> None:
    """Refuses bad arguments by name."""
    if not roles:
        raise InvalidArgumentError("`roles` is empty; name the role of each parameter group")
    for role in roles:
        if role not in ROLES:
            raise InvalidArgumentError(f"`roles` must be among {ROLES}, got {role!r}")
    for name, rows in (("initial", initial), ("withheld", withheld)):
        if rows is not None and len(rows) != len(roles):
            raise InvalidArgumentError(f"`{name}` must have one entry for each of {len(roles)} groups, got {len(rows)}")
    for name, value, least, what in (
        ("horizon", horizon, MIN_INTERVAL, "the optimizer steps of the whole run, or None if unknown"),
        ("batch_size", batch_size, 1, "the training samples of one step, or None if unknown"),
        ("interval", interval, MIN_INTERVAL, "the optimizer steps between decisions, or None for the default"),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise InvalidArgumentError(f"`{name}` must be an int of at least {least}, got {value!r}; pass {what}")


def checked_statistics(statistics: IntervalStatistics, num_groups: int) -> IntervalStatistics:
    """Returns an interval's statistics in float64; refuses those of other groups, or of no step."""
    statistics = IntervalStatistics(*(np.asarray(value, np.float64) for value in statistics))
    for name, value in zip(statistics._fields, statistics, strict=True):
        shape = (num_groups,) if name in GROUP_STATISTICS else ()
        if value.shape != shape:
            what = "one value for each group" if shape else "a number"
            raise InvalidArgumentError(f"`statistics.{name}` must have shape {shape}, {what}, got {value.shape}")
    if not 0 < statistics.steps < math.inf:
        raise InvalidArgumentError(f"`statistics.steps` must be positive, got {statistics.steps}; tell after training")
    return statistics
