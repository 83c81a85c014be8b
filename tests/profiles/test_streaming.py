"""Totals of a stream: equal to those of the table in memory, whatever the batches, types and order of the rows."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metalearn.interactions import Interactions
from metalearn.profiles import META_FEATURE_NAMES, SAMPLED_META_FEATURES, DomainProfile, profile_domain
from metalearn.profiles.canonical import canonical_table
from metalearn.profiles.streaming import streamed_totals
from metalearn.profiles.totals import DomainTotals, TimeTotals, table_totals

# Its split at random is drawn from counts in a stream and from rows in memory: close, not equal.
RANDOM = "drift_excess"
EXACT = [name for name in META_FEATURE_NAMES if name not in (*SAMPLED_META_FEATURES, RANDOM)]


def power_law_rows(num_rows: int, *, seed: int = 0) -> pl.DataFrame:
    """Users of eight tastes over three months, with days, nights and weekends, and items that come and go."""
    rng = np.random.default_rng(seed)
    user = (num_rows // 20 * rng.random(num_rows) ** 2).astype(np.int64)
    moment = 1.6e9 + 8e6 * rng.random(num_rows) ** 0.8
    moment += 6 * 3600 * np.sin(2 * np.pi * moment / 86_400)
    newest = 20 + 180 * (moment - moment.min()) / np.ptp(moment)
    item = 8 * (newest * rng.random(num_rows) ** 3).astype(np.int64) + user % 8
    columns = {"user_id": 1000 - 3 * user, "item_id": item, "timestamp": moment.astype(np.int64)}
    return pl.DataFrame(columns | {"rating": rng.integers(1, 6, num_rows)})


def lazy(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray | None) -> pl.LazyFrame:
    columns = {"user": user, "item": item} | ({} if timestamp is None else {"timestamp": timestamp})
    return pl.LazyFrame(columns)


def item_rows(totals: DomainTotals) -> list[tuple[int, ...]]:
    assert totals.times is not None
    columns = (totals.item_counts, totals.times.item_half, totals.times.item_quarter, totals.times.item_tenth)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def check_totals(streamed: DomainTotals, expected: DomainTotals) -> None:
    """Equal up to the order of users and items, the fixed point of the mean and the random split."""
    assert sorted(streamed.user_counts) == sorted(expected.user_counts)
    assert sorted(streamed.item_counts) == sorted(expected.item_counts)
    assert (streamed.times is None) == (expected.times is None)
    if streamed.times is None or expected.times is None:
        return
    assert item_rows(streamed) == item_rows(expected)
    users = (zip(totals.user_counts, totals.times.user_tenth, strict=True) for totals in (streamed, expected))
    assert sorted(next(users)) == sorted(next(users))
    assert streamed.times.mean_position == pytest.approx(expected.times.mean_position, abs=1e-9)
    assert sorted(streamed.times.lives) == sorted(expected.times.lives)
    for name in ("hours", "weekdays"):
        np.testing.assert_array_equal(getattr(streamed.times, name), getattr(expected.times, name))


times = st.one_of(
    st.integers(0, 6).map(float),
    st.integers(0, 3 * 10**6).map(float),
    st.floats(0, 1e15, allow_subnormal=False),
    st.sampled_from([0.0, 1e-300, 1e18, 1e300]),
)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), times), min_size=2, max_size=60), st.booleans())
@settings(max_examples=40)
def test_agrees_with_the_table_in_memory(rows, with_times):
    user, item, moment = (np.array(column) for column in zip(*rows, strict=True))
    assume(len(set(user)) > 1 and len(set(item)) > 1)
    timestamp = moment if with_times else None
    table = canonical_table(Interactions.from_arrays(user, item, timestamp=timestamp))
    check_totals(streamed_totals(lazy(user, item, timestamp), seed=0), table_totals(table, seed=0))


def test_by_hand():
    # Times 0, 10, ..., 90; the cuts are at the ranks int(9 / 2) = 4, int(9 * .75) = 6 and int(9 * .9) = 8.
    rows = lazy(np.array(list("uvuvuvuvuw")), np.array(list("ababaabcad")), np.arange(0.0, 100.0, 10.0))
    totals = streamed_totals(rows, seed=0)
    assert totals.times is not None
    # a: 3 early and 2 late, of these 1 after time 60; b: 2 and 1; c and d: one each after 60, d's after 80.
    assert item_rows(totals) == [(1, 1, 1, 0), (1, 1, 1, 1), (3, 1, 0, 0), (5, 2, 1, 0)]
    assert totals.times.mean_position == pytest.approx(0.5)
    # u from 0 to 80 and v from 10 to 70, of a span of 90; w has one row.
    assert sorted(totals.times.lives) == pytest.approx([60 / 90, 80 / 90])
    assert totals.times.hours is None and totals.times.weekdays is None
    assert (totals.num_users, totals.num_items, totals.num_interactions) == (3, 4, 10)


def test_the_split_at_random_is_seeded_and_as_large_as_the_first_part():
    # Seven of ten rows have the first time, which is that of the median, so the first part is 7 / 10 of the rows.
    rows = lazy(np.arange(40_000) % 50, np.arange(40_000) % 90, (np.arange(40_000) % 10 > 6).astype(np.float64))
    first, again, other = (streamed_totals(rows, seed=seed).times for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    np.testing.assert_array_equal(first.item_by_chance, again.item_by_chance)
    assert (first.item_by_chance != other.item_by_chance).any()
    # The deviation of the sum is sqrt(40 000 * 0.7 * 0.3) = 92.
    assert first.item_by_chance.sum() == pytest.approx(28_000, abs=5 * 92)


def test_the_order_of_rows_has_no_effect():
    table = power_law_rows(30_000).rename({"user_id": "user", "item_id": "item"})
    table = table.with_columns(pl.col("timestamp").cast(pl.Float64))
    first, second = (
        streamed_totals(rows.lazy(), seed=0).times for rows in (table, table.sample(fraction=1, shuffle=True, seed=1))
    )
    for field in fields(TimeTotals):
        a, b = (np.sort(np.atleast_1d(getattr(totals, field.name))) for totals in (first, second))
        np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "log.parquet"
    power_law_rows(120_000).write_parquet(path, row_group_size=10_000)
    return path


@pytest.fixture(scope="module")
def full(path: Path) -> DomainProfile:
    return profile_domain(Interactions.read(path))


class TestProfile:
    def check(self, streamed: DomainProfile, full: DomainProfile) -> None:
        assert 0.2 < streamed.sampled_fraction <= 0.25 and full.sampled_fraction == 1
        for name in EXACT:
            assert streamed[name] == pytest.approx(full[name], rel=1e-9, abs=1e-9), name
        assert streamed[RANDOM] == pytest.approx(full[RANDOM], abs=0.005)
        for count in ("num_users", "num_items", "num_interactions"):
            assert getattr(streamed, count) == getattr(full, count)
        for name in SAMPLED_META_FEATURES:
            assert streamed[name] == pytest.approx(full[name], abs=0.25), name

    def test_of_a_scan_agrees_with_that_of_the_table(self, path: Path, full: DomainProfile):
        streamed = profile_domain(Interactions.scan(path), max_interactions=30_000)
        assert full.mask.all() and streamed.mask.all()
        self.check(streamed, full)

    def test_of_a_large_table_in_memory_is_exact_in_the_same_features(self, path: Path, full: DomainProfile):
        self.check(profile_domain(Interactions.read(path), max_interactions=30_000), full)

    def test_repeats(self, path: Path):
        first, again = (profile_domain(Interactions.scan(path), max_interactions=30_000) for _ in range(2))
        np.testing.assert_array_equal(first.values, again.values)
        assert first.fingerprint == again.fingerprint

    @pytest.mark.parametrize("kind", ["text ids", "datetimes", "csv", "glob"])
    def test_does_not_depend_on_types_and_files(self, path: Path, full: DomainProfile, tmp_path: Path, kind: str):
        table = pl.read_parquet(path)
        moments = pl.from_epoch(pl.col("timestamp"), time_unit="s")
        if kind == "text ids":
            table = table.with_columns(pl.format("id {}", name).alias(name) for name in ("user_id", "item_id"))
        elif kind == "datetimes":
            table = table.with_columns(moments.dt.replace_time_zone("UTC"))
        where = tmp_path / ("table.csv" if kind == "csv" else "table.parquet")
        if kind == "csv":
            table.with_columns(moments.dt.strftime("%Y-%m-%dT%H:%M:%S")).write_csv(where)
        elif kind == "glob":
            for part in range(3):
                table.filter(pl.col("item_id") % 3 == part).write_parquet(tmp_path / f"part-{part}.parquet")
            where = tmp_path / "part-*.parquet"
        else:
            table.write_parquet(where)
        self.check(profile_domain(Interactions.scan(where), max_interactions=30_000), full)

    def test_without_times(self, path: Path, full: DomainProfile):
        scan = Interactions.scan(path, columns={"timestamp": None})
        streamed = profile_domain(scan, max_interactions=30_000)
        assert streamed["drift_distance"] is None
        assert streamed["item_gini"] == pytest.approx(full["item_gini"])
