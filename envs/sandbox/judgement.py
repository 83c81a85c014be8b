"""Worse than the fallback, by more than its seed noise: the rule, and how often it is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from metalearn.errors import InvalidArgumentError


class Bound(NamedTuple):
    """What the fallback's seeds say of one more run like them."""

    mean: float
    deviation: float
    low: float
    """below it lies one run in 1 / rate"""


def bound(metrics: Sequence[float], *, rate: float) -> Bound:
    """Returns the lower prediction bound of one more run of the fallback.

    low = mean - t · s · √(1 + 1/n), where t is the (1 - rate) quantile of Student's t with n - 1 degrees of freedom:
    a further run of the same kind lies below it with probability `rate`, if runs are normally distributed over seeds.

    Args:
      metrics: final test metrics of the fallback's seeds, at least 3.
      rate: of false positives, in (0, 0.5).

    Raises:
      InvalidArgumentError: too few metrics.

    >>> [round(value, 4) for value in bound([0.1, 0.11, 0.12], rate=0.05)]
    [0.11, 0.01, 0.0763]
    """
    count = len(metrics)
    if count < 3:
        raise InvalidArgumentError(f"`metrics` must hold at least 3 runs of the fallback, got {count}; run more seeds")
    mean, deviation = float(np.mean(metrics)), float(np.std(metrics, ddof=1))
    return Bound(mean, deviation, mean - _quantile(rate, count - 1) * deviation * math.sqrt(1.0 + 1.0 / count))


def systematically_worse(repeats: Sequence[float], fallback: Sequence[float], *, rate: float) -> bool:
    """Says whether runs lie below the fallback on average: Welch's t-test, one-sided.

    Args:
      repeats: final test metrics of a run, with other seeds; at least 2. The run that gave cause to repeat it is not
        among them: it was selected for being low.
      fallback: final test metrics of the fallback's seeds, at least 2.
      rate: of false positives, in (0, 0.5).

    >>> systematically_worse([0.10, 0.11, 0.12], [0.10, 0.12, 0.13], rate=0.05)
    False
    """
    from scipy.stats import ttest_ind

    if np.ptp(repeats) == np.ptp(fallback) == 0.0:
        return repeats[0] < fallback[0]
    _, p_value = np.asarray(ttest_ind(repeats, fallback, equal_var=False, alternative="less"), np.float64)
    return bool(p_value < rate)


@lru_cache
def _quantile(rate: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(1.0 - rate, freedom))


def false_positive_rate(groups: Iterable[Sequence[float]], *, rate: float) -> float:
    """Returns the share of fallback runs that the rule calls worse, each judged by the other seeds of its group.

    Args:
      groups: final test metrics of the fallback's seeds, by what is compared with each other.
      rate: as for `bound`.
    """
    wrong = [
        value < bound([*group[:index], *group[index + 1 :]], rate=rate).low
        for group in groups
        for index, value in enumerate(group)
    ]
    return float(np.mean(wrong)) if wrong else math.nan
