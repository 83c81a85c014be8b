"""Totals: counts over every row of a domain, from which all meta-features follow that need no sample.

A table in memory gives them directly; one that is too large is streamed (see streaming.py).

Shapes: U users, I items, of those that occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metalearn.profiles.canonical import CanonicalTable

QUANTILES = {"half": 0.5, "quarter": 0.75, "tenth": 0.9}
"""Parts of the interactions that count as late: the last half, the last quarter, the last tenth."""

DAY = 86_400.0
WEEK = 7 * DAY
HOURS, WEEKDAYS = 24, 7
"""Bins of the histograms over one day and over one week."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeTotals:
    """Hold what the temporal meta-features need of all rows. A position is a share of the span from first to last time.

    Args:
      item_half: int64 [I], interactions per item in the last half; likewise the last quarter and tenth.
      item_by_chance: int64 [I], interactions per item in a part as large as the first half, drawn at random.
      user_tenth: int64 [U], interactions per user in the last tenth.
      mean_position: mean position of the interactions, in [0, 1].
      lives: float64 [users with two interactions or more], span between a user's first and last position.
      hours: int64 [24], interactions by hour of the day; None where the times cannot tell.
      weekdays: int64 [7], interactions by day of the week; None where the times cannot tell.
    """

    item_half: np.ndarray
    item_quarter: np.ndarray
    item_tenth: np.ndarray
    item_by_chance: np.ndarray
    user_tenth: np.ndarray
    mean_position: float
    lives: np.ndarray
    hours: np.ndarray | None
    weekdays: np.ndarray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainTotals:
    """Hold the counts of a whole domain; the order of users and items has no meaning.

    Args:
      user_counts: int64 [U], interactions per user, all positive.
      item_counts: int64 [I], interactions per item, all positive, in the order of the arrays in `times`.
      times: totals over time, or None if there are no times or all are equal.
    """

    user_counts: np.ndarray
    item_counts: np.ndarray
    times: TimeTotals | None

    @property
    def num_users(self) -> int:
        return len(self.user_counts)

    @property
    def num_items(self) -> int:
        return len(self.item_counts)

    @property
    def num_interactions(self) -> int:
        return int(self.user_counts.sum())


def table_totals(table: CanonicalTable, *, seed: int) -> DomainTotals:
    """Count over a table in memory; the seed is that of the part drawn at random."""
    times = None if table.timestamp is None else _time_totals(table, table.timestamp, seed)
    return DomainTotals(user_counts=table.user_counts, item_counts=table.item_counts, times=times)


def _time_totals(table: CanonicalTable, timestamp: np.ndarray, seed: int) -> TimeTotals:
    order = table.time_order
    times, items = timestamp[order], table.item[order]
    half, quarter, tenth = (late_start(times, quantile) for quantile in QUANTILES.values())
    # Halves of few interactions differ by chance alone: the same split at random says by how much.
    chance = np.random.default_rng([seed, 2]).permutation(len(items)) < half
    position = (timestamp - times[0]) / (times[-1] - times[0])
    first_row = np.cumsum(table.user_counts) - table.user_counts
    lives = np.maximum.reduceat(position, first_row) - np.minimum.reduceat(position, first_row)

    def per_item(rows: np.ndarray) -> np.ndarray:
        return np.bincount(rows, minlength=table.num_items)

    return TimeTotals(
        item_half=per_item(items[half:]),
        item_quarter=per_item(items[quarter:]),
        item_tenth=per_item(items[tenth:]),
        item_by_chance=per_item(items[chance]),
        user_tenth=np.bincount(table.user[order[tenth:]], minlength=table.num_users),
        mean_position=float(np.mean(position[order])),
        lives=lives[table.user_counts > 1],
        hours=season_histogram(times, period=DAY, bins=HOURS),
        weekdays=season_histogram(times, period=WEEK, bins=WEEKDAYS),
    )


def late_start(times: np.ndarray, quantile: float) -> int:
    """Return where the late part of ascending times starts, not between equal times; both parts have a row or more."""
    cut = times[int(quantile * (len(times) - 1))]
    start = int(np.searchsorted(times, cut, side="right"))
    return start if start < len(times) else int(np.searchsorted(times, cut, side="left"))


def season_histogram(times: np.ndarray, *, period: float, bins: int) -> np.ndarray | None:
    """Count the times by their phase in a period.

    Args:
      times: [N] ascending, seconds; numbers beyond the year 5000 are taken as milli-, micro- or nanoseconds.
      period: seconds.
      bins: bins of one period.

    Returns:
      int64 [bins]; None if the span is below two periods or the times are no finer than a period.
    """
    phases = times * (seconds_per_unit(times[-1]) / period)
    if phases[-1] - phases[0] < 2:
        return None
    phases -= np.floor(phases)
    if phases.min() == phases.max():
        return None
    return np.bincount((phases * bins).astype(np.int64), minlength=bins)


def seconds_per_unit(latest: float) -> float:
    """Return the factor that turns times into seconds, guessed from the latest: none is from after the year 5000."""
    scale = 1.0
    while latest * scale > 1e11:
        scale /= 1000.0
    return scale
