"""Confidence intervals of means."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from metalearn.errors import InvalidArgumentError


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: np.ndarray, *, level: float = 0.95, seed: int = 0, num_resamples: int = 2000) -> Interval:
    """Bound the mean of independent values by the percentile bootstrap.

    Args:
        values: [n], finite.
        level: confidence, in (0, 1).
        seed: of the resampling.
        num_resamples: bootstrap samples.

    Raises:
        InvalidArgumentError: if there is no value, one is not finite, or `level` is not in (0, 1).

    Example:
        >>> interval = mean_interval(np.array([0.0, 1.0, 1.0, 0.0]))
        >>> interval.mean, interval.low <= 0.5 <= interval.high
        (0.5, True)

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise InvalidArgumentError(
            f"`values` must be one finite number or more in one dimension, got shape {list(data.shape)} with "
            f"{int((~np.isfinite(data)).sum())} that are not finite"
        )
    if not 0.0 < level < 1.0:
        raise InvalidArgumentError(f"`level` must lie in (0, 1), got {level}; the usual value is 0.95")
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 21) // len(data))
    means = np.concatenate(
        [
            data[rng.integers(0, len(data), (min(step, num_resamples - done), len(data)))].mean(axis=1)
            for done in range(0, num_resamples, step)
        ]
    )
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(mean=float(data.mean()), low=float(low), high=float(high))
