"""Temporal: drift, newcomers, pace and seasons. Undefined without times.

"Early" and "late" are cut at a quantile of the interactions, so that only the order of times matters there; other
values are relative to the span. Units matter for the seasons alone, which are undefined on short spans.
"""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.canonical import CanonicalTable

NAMES = (
    "drift_distance",
    "drift_excess",
    "drift_rank_correlation",
    "late_item_share",
    "item_age",
    "activity_trend",
    "cold_item_rate",
    "cold_user_rate",
    "log_user_gap",
    "temporal_burstiness",
    "short_lifetime_share",
    "daily_season",
    "weekly_season",
)

_DAY = 86_400.0
_GAP_FLOOR = 1e-6


def temporal_features(table: CanonicalTable, *, seed: int) -> dict[str, float]:
    """Compute the temporal family; all NaN without times."""
    if table.timestamp is None:
        return dict.fromkeys(NAMES, math.nan)
    order = np.argsort(table.timestamp, kind="stable")
    times = table.timestamp[order]
    users, items = table.user[order], table.item[order]
    position = (times - times[0]) / (times[-1] - times[0])
    values = (
        *_drift(items, _late_start(times, 0.5), table.num_items, seed),
        *_trajectory(items, position, _late_start(times, 0.75), table.num_items),
        _newcomer_rate(items, _late_start(times, 0.9), table.num_items),
        _newcomer_rate(users, _late_start(times, 0.9), table.num_users),
        *_pace(users, position),
        season_strength(times, period=_DAY, bins=24),
        season_strength(times, period=7 * _DAY, bins=7),
    )
    return dict(zip(NAMES, values, strict=True))


def _late_start(times: np.ndarray, quantile: float) -> int:
    """Return where the late part starts, never between equal times; both parts have at least one row."""
    cut = times[int(quantile * (len(times) - 1))]
    start = int(np.searchsorted(times, cut, side="right"))
    return start if start < len(times) else int(np.searchsorted(times, cut, side="left"))


def _drift(items: np.ndarray, start: int, num_items: int, seed: int) -> tuple[float, float, float]:
    early = np.bincount(items[:start], minlength=num_items)
    late = np.bincount(items[start:], minlength=num_items)
    # Halves of few interactions differ by chance alone: the same split at random says by how much.
    chance = np.random.default_rng([seed, 2]).permutation(len(items)) < start
    by_chance = np.bincount(items[chance], minlength=num_items)
    distance = jensen_shannon_distance(early, late)
    excess = distance - jensen_shannon_distance(by_chance, early + late - by_chance)
    return distance, excess, rank_correlation(early, late)


def jensen_shannon_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Square root of the Jensen-Shannon divergence (base 2) of two vectors of counts; in [0, 1]."""
    p, q = first / first.sum(), second / second.sum()
    middle = (p + q) / 2
    divergence = sum(0.5 * float(np.dot(x[x > 0], np.log2(x[x > 0] / middle[x > 0]))) for x in (p, q))
    return math.sqrt(min(max(divergence, 0.0), 1.0))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of two vectors of counts, ties sharing their mean rank; NaN if one is constant."""
    a, b = _centred_ranks(first), _centred_ranks(second)
    scale = math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
    return float(np.dot(a, b)) / scale if scale > 0 else math.nan


def _centred_ranks(counts: np.ndarray) -> np.ndarray:
    frequency = np.bincount(counts)
    rank_of_count = np.cumsum(frequency) - (frequency - 1) / 2
    return rank_of_count[counts] - (len(counts) + 1) / 2


def _trajectory(items: np.ndarray, position: np.ndarray, late: int, num_items: int) -> tuple[float, float, float]:
    """Return the share of late interactions with items born late, the median age of items used, and the trend."""
    first_row = np.empty(num_items, dtype=np.int64)
    first_row[items[::-1]] = np.arange(len(items) - 1, -1, -1)
    born_late = first_row[items[late:]] >= late
    ages = position - position[first_row[items]]
    return float(np.mean(born_late)), float(np.median(ages)), float(2.0 * np.mean(position) - 1.0)


def _newcomer_rate(codes: np.ndarray, late: int, size: int) -> float:
    known = np.zeros(size, dtype=bool)
    known[codes[:late]] = True
    return float(np.mean(~known[codes[late:]]))


def _pace(users: np.ndarray, position: np.ndarray) -> tuple[float, float, float]:
    """Return log median gap, burstiness (s - m) / (s + m) of gaps (Goh and Barabási 2008), and share of short lives.

    Gaps lie between successive interactions of one user, as shares of the span. A life is short below 5 % of the
    span; only users with two interactions or more have one.
    """
    # One sort of packed keys is several times faster than a lexsort.
    keys = np.sort(users.astype(np.int64) * len(users) + np.arange(len(users)))
    users, rows = np.divmod(keys, len(keys))
    when = position[rows]
    same = users[1:] == users[:-1]
    gaps = np.diff(when)[same]
    if len(gaps) == 0:
        return math.nan, math.nan, math.nan
    mean, deviation = float(gaps.mean()), float(gaps.std())
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    last = np.flatnonzero(np.concatenate([~same, [True]]))
    lives = (when[last] - when[first])[last > first]
    return (
        math.log(float(np.median(gaps)) + _GAP_FLOOR),
        (deviation - mean) / (deviation + mean) if mean > 0 else math.nan,
        float(np.mean(lives < 0.05)),
    )


def season_strength(times: np.ndarray, *, period: float, bins: int) -> float:
    """Length of the mean vector of the times on a circle of one period, from a histogram; 0 even, 1 all at once.

    Args:
      times: [N] ascending, seconds; numbers beyond the year 5000 are taken as milli-, micro- or nanoseconds.
      period: seconds.
      bins: bins of the histogram in one period.

    Returns:
      The strength in [0, 1]; NaN if the span is below two periods or the times are no finer than a period.
    """
    scale = 1.0
    while times[-1] * scale > 1e11:
        scale /= 1000.0
    phases = times * (scale / period)
    if phases[-1] - phases[0] < 2:
        return math.nan
    phases -= np.floor(phases)
    if phases.min() == phases.max():
        return math.nan
    shares = np.bincount((phases * bins).astype(np.int64), minlength=bins) / len(times)
    angles = 2 * np.pi * np.arange(len(shares)) / bins
    return math.hypot(float(np.dot(shares, np.cos(angles))), float(np.dot(shares, np.sin(angles))))
