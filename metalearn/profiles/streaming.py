"""Totals of a table too large to hold: a fixed number of streamed passes, each over the columns that it needs.

Sums are of integers, so the totals do not depend on how rows fall into batches and threads. Memory grows with the
number of users and items, and not with rows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from metalearn.profiles.totals import (
    DAY,
    HOURS,
    QUANTILES,
    WEEK,
    WEEKDAYS,
    DomainTotals,
    TimeTotals,
    seconds_per_unit,
)

if TYPE_CHECKING:
    import polars

_BINS = 1 << 16
_FIXED_POINT = 2.0**32
_TIME, _POSITION, _BIN = "timestamp", "position", "bin"


def streamed_totals(rows: polars.LazyFrame, *, seed: int) -> DomainTotals:
    """Count over a lazy table.

    Args:
      rows: columns "user" and "item", keys of any one type each; "timestamp", float64 seconds, if there are times.
      seed: of the part drawn at random; it is drawn from the counts, so it is not that of `table_totals`.

    Returns:
      The totals; the same for any order of the rows.
    """
    span = _span(rows)
    if span is None:
        users, items = (_group(rows, key) for key in ("user", "item"))
        return DomainTotals(user_counts=users["rows"], item_counts=items["rows"], times=None)
    return _timed_totals(rows, *span, seed)


def _timed_totals(rows: polars.LazyFrame, first: float, last: float, seed: int) -> DomainTotals:
    import polars as pl

    time = pl.col(_TIME)
    rows = rows.with_columns(((time - first) / (last - first)).alias(_POSITION))
    num_rows = int(_collect(rows.select(pl.len())).item())
    late = _late_rows(rows, num_rows, first, last)
    items = _group(rows, "item", **{name: is_late.sum() for name, is_late in late.items()})
    users = _group(rows, "user", tenth=late["tenth"].sum(), first=time.min(), last=time.max())
    begins, ends = ((users[name] - first) / (last - first) for name in ("first", "last"))
    canonical = np.lexsort([items[name] for name in ("tenth", "quarter", "half", "rows")])
    counts, half = items["rows"][canonical], items["half"][canonical]
    hours, weekdays = (_season_histogram(rows, first, last, *season) for season in ((DAY, HOURS), (WEEK, WEEKDAYS)))
    fixed_point = (pl.col(_POSITION) * _FIXED_POINT).round().cast(pl.Int64)
    times = TimeTotals(
        item_half=half,
        item_quarter=items["quarter"][canonical],
        item_tenth=items["tenth"][canonical],
        item_by_chance=np.random.default_rng([seed, 2]).binomial(counts, 1.0 - half.sum() / num_rows),
        user_tenth=users["tenth"],
        mean_position=int(_collect(rows.select(fixed_point.sum())).item()) / _FIXED_POINT / num_rows,
        lives=(ends - begins)[users["rows"] > 1],
        hours=hours,
        weekdays=weekdays,
    )
    return DomainTotals(user_counts=users["rows"], item_counts=counts, times=times)


def _span(rows: polars.LazyFrame) -> tuple[float, float] | None:
    """First and last time; None if there are no times or all are equal."""
    import polars as pl

    if _TIME not in rows.collect_schema():
        return None
    low, high = pl.col(_TIME).min().alias("low"), pl.col(_TIME).max().alias("high")
    first, last = _collect(rows.select(low, high)).row(0)
    return None if first == last else (first, last)


def _group(rows: polars.LazyFrame, key: str, **columns: polars.Expr) -> dict[str, np.ndarray]:
    """Aggregate by a key: the number of rows and other columns, in no order."""
    import polars as pl

    frame = _collect(rows.group_by(key).agg(pl.len().alias("rows"), **columns).drop(key))
    integers = [name for name in frame.columns if frame[name].dtype.is_integer()]
    return {name: frame[name].to_numpy().astype(np.int64 if name in integers else np.float64) for name in frame.columns}


def _late_rows(rows: polars.LazyFrame, num_rows: int, first: float, last: float) -> dict[str, polars.Expr]:
    """What tells the late rows: later than the time at a quantile, or not earlier if that is the last time of all."""
    import polars as pl

    ranks = [int(quantile * (num_rows - 1)) for quantile in QUANTILES.values()]
    cuts = _times_of_ranks(rows, ranks, first, last)
    time = pl.col(_TIME)
    return {name: time > cut if cut < last else time >= cut for name, cut in zip(QUANTILES, cuts, strict=True)}


def _times_of_ranks(rows: polars.LazyFrame, ranks: list[int], first: float, last: float) -> list[float]:
    """Times of some ranks, from 0, in order of time: histograms that zoom in on each until one time is left.

    Whole seconds take two passes over decades of them, any float64 at most a few more.
    """
    import polars as pl

    time = pl.col(_TIME)

    @functools.cache  # the first histogram serves every rank
    def histogram(low: float, high: float) -> polars.DataFrame:
        # The last time has its own bin, so every bin spans less than the range did.
        bins = ((time - low) / (high - low) * _BINS).floor().cast(pl.UInt32).alias(_BIN)
        inside = rows.filter(time.is_between(low, high)).select(bins, time)
        bounds = (pl.len().alias("rows"), time.min().alias("low"), time.max().alias("high"))
        return _collect(inside.group_by(_BIN).agg(*bounds)).sort(_BIN)

    times = []
    for rank in ranks:
        low, high = first, last
        while low < high:
            counts = histogram(low, high)
            upto = np.cumsum(counts["rows"].to_numpy().astype(np.int64))
            found = int(np.searchsorted(upto, rank, side="right"))
            rank -= int(upto[found - 1]) if found else 0
            low, high = counts["low"][found], counts["high"][found]
        times.append(low)
    return times


def _season_histogram(rows: polars.LazyFrame, first: float, last: float, period: float, bins: int) -> np.ndarray | None:
    """As `totals.season_histogram`, operation by operation."""
    import polars as pl

    factor = seconds_per_unit(last) / period
    if last * factor - first * factor < 2:
        return None
    phase = pl.col(_TIME) * factor
    phases = rows.select((phase - phase.floor()).alias("phase"))
    phase = pl.col("phase")
    bounds = (pl.len().alias("rows"), phase.min().alias("low"), phase.max().alias("high"))
    histogram = _collect(phases.group_by((phase * bins).cast(pl.Int64).alias(_BIN)).agg(*bounds))
    if histogram["low"].min() == histogram["high"].max():
        return None
    counts = np.zeros(bins, dtype=np.int64)
    counts[histogram[_BIN].to_numpy()] = histogram["rows"].to_numpy()
    return counts


def _collect(rows: polars.LazyFrame) -> polars.DataFrame:
    return rows.collect(engine="streaming")
