"""How high a CUSUM must climb before it alarms, for a rate of false alarms that the user chooses."""

from __future__ import annotations

import math
from functools import lru_cache


def cusum_run_length(threshold: float, reference: float) -> float:
    """Approximates the mean number of points until a one-sided CUSUM alarms, although nothing has changed.

    Of a CUSUM S ← max(0, S + z - k) of independent standard normal z that alarms at S > h:
    ARL = (exp(2kb) - 2kb - 1) / (2k²) with b = h + 1.166, the last to correct for the overshoot in discrete time.

    Args:
      threshold: h, at least 0, in standard deviations of one point.
      reference: k, above 0: half of the smallest shift worth an alarm, in standard deviations.

    Source: Siegmund, "Sequential Analysis", 1985, section 2.6, in the form of Montgomery, "Introduction to Statistical
    Quality Control", equation 9.6.

    >>> round(cusum_run_length(5.0, 0.5), 1), round(cusum_run_length(4.0, 0.5), 1)
    (938.2, 338.1)
    """
    climb = 2.0 * reference * (threshold + 1.166)
    return (math.expm1(climb) - climb) / (2.0 * reference**2)


@lru_cache(maxsize=256)
def cusum_threshold(false_alarms_per_1000: float, reference: float, margin: float = 0.0) -> float:
    """Returns the threshold at which a two-sided CUSUM raises that many false alarms per 1000 points.

    Solves Siegmund's approximation (`cusum_run_length`) for h; each side gets half of the rate. With a margin m the
    rate still holds where the points' true standard deviation is 1 + m, not 1: z is then (1 + m) times a standard one,
    so that h = (1 + m) h'(k / (1 + m)). The margin stands for what the formula leaves out: an estimated scale, what is
    left of autocorrelation and trend. How large it must be is measured, not derived (`DetectorConfig.margin`).

    Args:
      false_alarms_per_1000: above 0 and below 1000.
      reference: k, above 0, in standard deviations.
      margin: m, at least 0.

    >>> h = cusum_threshold(1.0, 0.5)
    >>> round(h, 2), round(2000.0 / cusum_run_length(h, 0.5), 6)
    (5.75, 1.0)
    """
    points = 2000.0 / false_alarms_per_1000
    k = reference / (1.0 + margin)
    climb = 0.0
    # exp(c) = 1 + c + 2k²·ARL, from below: the map is a contraction, and at these sizes settles in some ten rounds.
    for _ in range(100):
        climb = math.log(1.0 + climb + 2.0 * k**2 * points)
    return (1.0 + margin) * max(climb / (2.0 * k) - 1.166, 0.0)
