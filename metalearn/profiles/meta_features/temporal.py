"""Temporal: drift, newcomers, pace and seasons. Undefined without times.

"Early" and "late" are cut at a quantile of the interactions, so that only the order of times matters there; other
values are relative to the span. Units matter for the seasons alone, which are undefined on short spans.
"""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.canonical import CanonicalTable
from metalearn.profiles.totals import DomainTotals

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
PACE_NAMES = ("item_age", "log_user_gap", "temporal_burstiness")
"""Those that need the rows of users and items in order of time, not only counts."""

_GAP_FLOOR = 1e-6
_SHORT_LIFE = 0.05


def temporal_features(totals: DomainTotals) -> dict[str, float]:
    """Compute what follows from counts; all NaN without times."""
    times = totals.times
    if times is None:
        return {name: math.nan for name in NAMES if name not in PACE_NAMES}
    early = totals.item_counts - times.item_half
    distance = jensen_shannon_distance(early, times.item_half)
    by_chance = jensen_shannon_distance(times.item_by_chance, totals.item_counts - times.item_by_chance)
    return {
        "drift_distance": distance,
        "drift_excess": distance - by_chance,
        "drift_rank_correlation": rank_correlation(early, times.item_half),
        "late_item_share": newcomer_share(times.item_quarter, totals.item_counts),
        "activity_trend": 2.0 * times.mean_position - 1.0,
        "cold_item_rate": newcomer_share(times.item_tenth, totals.item_counts),
        "cold_user_rate": newcomer_share(times.user_tenth, totals.user_counts),
        "short_lifetime_share": float(np.mean(times.lives < _SHORT_LIFE)) if len(times.lives) else math.nan,
        "daily_season": season_strength(times.hours),
        "weekly_season": season_strength(times.weekdays),
    }


def pace_features(table: CanonicalTable) -> dict[str, float]:
    """Compute the median age of items when used, and the pace of users; all NaN without times."""
    if table.timestamp is None:
        return dict.fromkeys(PACE_NAMES, math.nan)
    order = table.time_order
    times = table.timestamp[order]
    position = (times - times[0]) / (times[-1] - times[0])
    values = (_item_age(table.item[order], position, table.num_items), *_pace(table.user[order], position))
    return dict(zip(PACE_NAMES, values, strict=True))


def newcomer_share(late: np.ndarray, counts: np.ndarray) -> float:
    """Share of the late interactions whose user (or item) has no earlier one, from late and all counts of each."""
    return float(late[late == counts].sum() / late.sum())


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


def _item_age(items: np.ndarray, position: np.ndarray, num_items: int) -> float:
    """Median time between the first use of an item and each of its uses, as a share of the span."""
    first_row = np.empty(num_items, dtype=np.int64)
    first_row[items[::-1]] = np.arange(len(items) - 1, -1, -1)
    return float(np.median(position - position[first_row[items]]))


def _pace(users: np.ndarray, position: np.ndarray) -> tuple[float, float]:
    """Return log median gap and burstiness (s - m) / (s + m) of gaps (Goh and Barabási 2008).

    Gaps lie between successive interactions of one user, as shares of the span.
    """
    # One sort of packed keys is several times faster than a lexsort.
    keys = np.sort(users.astype(np.int64) * len(users) + np.arange(len(users)))
    users, rows = np.divmod(keys, len(keys))
    gaps = np.diff(position[rows])[users[1:] == users[:-1]]
    if len(gaps) == 0:
        return math.nan, math.nan
    mean, deviation = float(gaps.mean()), float(gaps.std())
    burstiness = (deviation - mean) / (deviation + mean) if mean > 0 else math.nan
    return math.log(float(np.median(gaps)) + _GAP_FLOOR), burstiness


def season_strength(histogram: np.ndarray | None) -> float:
    """Length of the mean vector of the times on a circle of one period: 0 even, 1 all at once; NaN without times."""
    if histogram is None:
        return math.nan
    shares = histogram / histogram.sum()
    angles = 2 * np.pi * np.arange(len(shares)) / len(shares)
    return math.hypot(float(np.dot(shares, np.cos(angles))), float(np.dot(shares, np.sin(angles))))
