"""Where a learning curve is expected to go next: a straight line in logarithmic time, fitted to what came last."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Harmful = Literal["down", "up", "both"]
"""Which way of a stream is harm: `down` for a validation metric, `up` for a loss, `both` where neither is better."""


class Baseline(NamedTuple):
    """Weighted means and co-moments of the points so far; the newer a point, the heavier.

    Of points (u, y) with u = log(1 + number of the point): total weight, means, Σw(u - ū)² and Σw(u - ū)(y - ȳ).
    """

    weight: float = 0.0
    mean_time: float = 0.0
    mean_value: float = 0.0
    time_square: float = 0.0
    time_value: float = 0.0


def log_time(count: float) -> float:
    """Returns the time at which a learning curve is nearly straight: it gains as much from 10 to 100 as to 1000."""
    return math.log1p(count)


def slope(baseline: Baseline, harmful: Harmful) -> float:
    """Returns the trend by log time, which never points to harm.

    A metric in decline is not what a learning curve does: followed by the trend, slow harm would never be noticed.
    """
    if not baseline.time_square > 0.0:
        return 0.0
    trend = baseline.time_value / baseline.time_square
    if harmful == "both":
        return trend
    return max(trend, 0.0) if harmful == "down" else min(trend, 0.0)


def predict(baseline: Baseline, count: float, harmful: Harmful) -> tuple[float, float]:
    """Returns the value expected at a point, and by how much its own error widens that of the prediction.

    A recursive residual y - ŷ has √(1 + leverage) times the standard deviation of one point; divided by that, those
    of a straight line are independent and equally wide (Brown, Durbin & Evans 1975, section 2).
    """
    if not baseline.weight > 0.0:
        return 0.0, 1.0
    trend = slope(baseline, harmful)
    ahead = log_time(count) - baseline.mean_time
    leverage = 1.0 / baseline.weight
    if trend != 0.0:
        leverage += ahead * ahead / baseline.time_square
    return baseline.mean_value + trend * ahead, math.sqrt(1.0 + leverage)


def follow(baseline: Baseline, count: float, value: float, memory: float) -> Baseline:
    """Adds a point; all earlier ones lose 1 / memory of their weight.

    Args:
      count: number of the point, from 0.
      memory: points, at least 1: the total weight settles there.
    """
    kept = 1.0 - 1.0 / memory
    weight = kept * baseline.weight + 1.0
    by_time, by_value = log_time(count) - baseline.mean_time, value - baseline.mean_value
    share = kept * baseline.weight / weight
    return Baseline(
        weight=weight,
        mean_time=baseline.mean_time + by_time / weight,
        mean_value=baseline.mean_value + by_value / weight,
        time_square=kept * baseline.time_square + share * by_time * by_time,
        time_value=kept * baseline.time_value + share * by_time * by_value,
    )
