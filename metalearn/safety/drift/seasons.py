"""Seasons: whether a stream repeats itself, at which period, and what it adds at each phase.

Shape legend: N points, P phases of a period.
"""

from __future__ import annotations

import numpy as np

CYCLES = 3
"""Full periods that must have been seen before a season is believed."""


def find_period(clock: np.ndarray, values: np.ndarray, *, longest: int, level: float) -> int | None:
    """Finds the period of a season in a short stream with a trend, or None if there is none.

    For each period the values are folded: an analysis of variance asks whether the means of the phases differ by more
    than the noise within them explains, F with (P - 1, N - P) degrees of freedom (Box & Jenkins' autocorrelation at a
    lag would ask the same of one pair of points at a time). Noise that is correlated from point to point would seem
    to repeat; so values are whitened with the lag-one correlation that is left *after* the candidate's phases are
    removed: with that of the raw values, a smooth season would whiten itself away. Among the periods that pass, the
    Bayesian information criterion (Schwarz 1978), with the unbiased variance, prefers the shortest that explains the
    stream: twice a period passes as well.

    Args:
      clock: [N] times of the values, ascending integers; gaps are points not measured.
      values: [N], finite.
      longest: longest period to try; each must have been seen `CYCLES` times over.
      level: chance to find a season where there is none, shared by all periods tried (Bonferroni).

    >>> week = np.tile([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0], 6)
    >>> noise = 0.2 * np.random.default_rng(0).standard_normal(42)
    >>> find_period(np.arange(42), week + noise, longest=14, level=0.01)
    7
    >>> find_period(np.arange(42), noise, longest=14, level=0.01) is None
    True
    """
    from scipy.special import fdtrc

    clock = clock.astype(np.int64)
    residual = _without_trend(clock, values)
    residual = residual / max(float(np.abs(residual).max()), 1e-300)
    periods = range(2, min(longest, int(clock[-1] - clock[0] + 1) // CYCLES, len(values) // CYCLES) + 1)
    floor = 1e-12
    best, least = None, np.inf
    for period in periods:
        phase = clock % period
        if np.bincount(phase, minlength=period).min() < 2:
            continue
        noise = residual - phase_means(phase, residual, period)[phase]
        correlation = float(np.clip(noise[1:] @ noise[:-1] / max(float(noise @ noise), floor), 0.0, 0.9))
        white = residual[1:] - correlation * residual[:-1]
        within = white - phase_means(phase[1:], white, period)[phase[1:]]
        total, rest = float(white.var() * len(white)), max(float(within @ within), floor)
        freedom = len(white) - period
        if total <= rest or freedom < 1:
            continue
        chance = fdtrc(period - 1, freedom, (total - rest) / (period - 1) / (rest / freedom))
        variance = rest / freedom / (1.0 - correlation**2)
        criterion = len(white) * np.log(variance) + period * np.log(len(white))
        if chance * len(periods) < level and criterion < least:
            best, least = period, criterion
    return best


def phase_means(phase: np.ndarray, values: np.ndarray, period: int) -> np.ndarray:
    """Returns [P] the mean at each phase, 0 where there is none."""
    count = np.bincount(phase, minlength=period)
    return np.bincount(phase, weights=values, minlength=period) / np.maximum(count, 1)


def seasonal_profile(clock: np.ndarray, values: np.ndarray, period: int) -> tuple[float, ...]:
    """Returns [P] what the season adds to the trend at each phase of the clock; the sum over phases is 0."""
    ticks = clock.astype(np.int64)
    means = phase_means(ticks % period, _without_trend(ticks, values), period)
    return tuple((means - means.mean()).tolist())


def _without_trend(clock: np.ndarray, values: np.ndarray) -> np.ndarray:
    ticks = clock - clock[0]
    basis = np.stack([np.ones(len(ticks)), ticks / max(ticks[-1], 1), np.log1p(ticks)], axis=1)
    return values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
