"""Lazy tables on disk: opening is cheap, samples are bounded and hold whole users, errors name the row in the file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from metalearn.errors import InteractionsError
from metalearn.interactions import Interactions, InteractionsScan

ROWS = 1_500_000


@pytest.fixture(scope="module")
def large_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": (20_000 * rng.random(ROWS) ** 2).astype(np.int64) + 10_000_000,
            "item_id": (5_000 * rng.random(ROWS) ** 3).astype(np.int64) + 20_000_000,
            "timestamp": rng.integers(10**9, 2 * 10**9, ROWS),
            "comment": ["unused"] * ROWS,
        }
    )
    path = tmp_path_factory.mktemp("large") / "log.csv"
    frame.write_csv(path)
    assert path.stat().st_size > 50_000_000
    return path


def test_opening_reads_the_schema_only(large_csv: Path):
    Interactions.scan(large_csv)  # the first call also imports Polars
    start = time.perf_counter()
    scan = Interactions.scan(large_csv)
    assert time.perf_counter() - start < 0.2
    assert scan.columns == {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
    assert scan.count() == ROWS


def test_sample_is_bounded_seeded_and_of_whole_users(large_csv: Path):
    scan = Interactions.scan(large_csv)
    sample, again, other = scan.sample(20_000, seed=1), scan.sample(20_000, seed=1), scan.sample(20_000, seed=2)
    assert 10_000 < len(sample) <= 20_000
    np.testing.assert_array_equal(sample.user, again.user)
    np.testing.assert_array_equal(sample.timestamp, again.timestamp)
    assert set(sample.user_ids(range(sample.num_users))) != set(other.user_ids(range(other.num_users)))
    full = dict(pl.scan_csv(large_csv).group_by("user_id").len().collect().iter_rows())
    counts = np.bincount(sample.user)
    assert [full[label] for label in sample.user_ids(range(sample.num_users))] == counts.tolist()


def test_sample_reads_everything_that_fits(tmp_path: Path):
    path = tmp_path / "small.parquet"
    pl.DataFrame({"user_id": [3, 1, 2], "item_id": ["b", "a", "b"]}).write_parquet(path)
    assert Interactions.scan(path).sample(3).user.tolist() == [2, 0, 1]


def test_a_user_too_large_to_keep_whole_is_left_out(tmp_path: Path):
    path = tmp_path / "skewed.parquet"
    users = [0] * 1000 + [user for user in range(1, 201) for _ in range(2)]
    pl.DataFrame({"user_id": users, "item_id": list(range(1400))}).write_parquet(path)
    for seed in range(5):
        sample = Interactions.scan(path).sample(300, seed)
        assert len(sample) <= 300
        assert 0 not in sample.user_ids(sample.user)


def test_sample_too_small_for_two_users(tmp_path: Path):
    path = tmp_path / "wide.parquet"
    pl.DataFrame({"user_id": [1] * 50 + [2] * 50, "item_id": list(range(100))}).write_parquet(path)
    with pytest.raises(InteractionsError, match="`max_interactions`=60 is too small to hold 2 whole users"):
        Interactions.scan(path).sample(60)
    with pytest.raises(InteractionsError, match="`max_interactions` must be at least 2, got 1"):
        Interactions.scan(path).sample(1)


def test_a_glob_of_files_is_one_table(tmp_path: Path):
    for part in range(2):
        pl.DataFrame({"user_id": [part, 5], "item_id": [1, part + 2]}).write_parquet(tmp_path / f"{part}.parquet")
    assert len(Interactions.read(tmp_path / "*.parquet")) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.xlsx", "x", r"has suffix '.xlsx'; allowed are \['.parquet', '.pq', '.csv', '.tsv', '.inter'\]"),
        ("table.csv", "user,thing\n1,2\n", r"no item column.*the table has \['user', 'thing'\]"),
        ("table.csv", "", "cannot be read as a table"),
        ("table.parquet", "not parquet", "cannot be read as a table"),
    ],
)
def test_errors_on_opening(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(InteractionsError, match=message):
        Interactions.scan(tmp_path / name)


def test_missing_file(tmp_path: Path):
    with pytest.raises(InteractionsError, match="does not exist"):
        Interactions.scan(tmp_path / "none.csv")


def write_with_late_row(path: Path, row: str) -> None:
    """Write a CSV whose row 20000 is far behind the rows that types are inferred from."""
    lines = [f"{user % 50},{user % 70},{user},3" for user in range(20_000)]
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *lines, row, *lines]) + "\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,1,9,good", "column 'rating', row 20000: cannot read 'good'"),
        ("1,1,soon,3", "column 'timestamp', row 20000: cannot read 'soon'"),
        ("1,1,-9,3", "column 'timestamp', row 20000: -9 is a negative time"),
        ("1,1,,3", "column 'timestamp', row 20000: .* is not a finite time"),
        (",1,9,3", "column 'user_id', row 20000"),
    ],
)
def test_errors_on_reading_name_the_row_in_the_file(tmp_path: Path, row: str, message: str):
    path = tmp_path / "table.csv"
    write_with_late_row(path, row)
    scan = Interactions.scan(path)
    with pytest.raises(InteractionsError, match=message):
        scan.collect()


def test_errors_in_a_sample_name_the_row_in_the_file(tmp_path: Path):
    path = tmp_path / "table.csv"
    write_with_late_row(path, "1,1,-9,3")
    messages = set()
    for seed in range(20):
        try:
            Interactions.scan(path).sample(20_000, seed)
        except InteractionsError as error:
            messages.add(str(error).split(":")[0])
    assert messages == {"column 'timestamp', row 20000"}


def test_text_ids_behind_integer_ids_make_all_ids_text(tmp_path: Path):
    path = tmp_path / "table.csv"
    write_with_late_row(path, "x,1,9,3")
    table = Interactions.read(path)
    assert table.user_ids([0, table.num_users - 1]).tolist() == ["0", "x"]
    assert table.rating is not None and table.rating.max() == 3


def test_header_without_rows(tmp_path: Path):
    path = tmp_path / "table.csv"
    path.write_text("user_id,item_id\n")
    scan = Interactions.scan(path)
    assert scan.count() == 0
    with pytest.raises(InteractionsError, match="the table is empty"):
        scan.sample(10)


def write_table(path: Path, **columns: list) -> InteractionsScan:
    pl.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 6], "timestamp": [1, 2, 3]} | columns).write_parquet(path)
    return Interactions.scan(path)


def test_a_stream_has_typed_columns_and_no_others(tmp_path: Path):
    scan = write_table(tmp_path / "table.parquet", item_id=["a", "b", "a"], comment=["x", "y", "z"])
    rows = scan.stream(lambda rows: rows.collect())
    assert rows.schema == {"user": pl.Int64, "item": pl.UInt64, "timestamp": pl.Float64}
    assert rows["user"].to_list() == [1, 1, 2] and rows["timestamp"].to_list() == [1.0, 2.0, 3.0]
    assert rows["item"][0] == rows["item"][2] != rows["item"][1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": [1, None, 2]}, "column 'user_id', row 1: nan is not an id; every interaction needs one$"),
        ({"item_id": ["a", "b", None]}, "column 'item_id', row 2: None is null; every interaction needs an id$"),
        ({"item_id": [1.0, float("inf"), 2.0]}, "column 'item_id', row 1: inf is not an id"),
        ({"timestamp": [1, -2, 3]}, r"column 'timestamp', row 1: -2 is a negative time .* starts at 0$"),
        ({"timestamp": [1, 2, None]}, "column 'timestamp', row 2: nan is not a finite time; .* out$"),
        ({"timestamp": ["1", "2", "soon"]}, "column 'timestamp', row 2: cannot read 'soon' as a number or time"),
    ],
)
def test_errors_in_a_stream_name_the_row_and_nothing_of_polars(tmp_path: Path, columns: dict, message: str):
    with pytest.raises(InteractionsError, match=message):
        write_table(tmp_path / "table.parquet", **columns).stream(lambda rows: rows.collect())


def test_a_stream_of_a_malformed_csv_names_the_row(tmp_path: Path):
    path = tmp_path / "table.csv"
    write_with_late_row(path, "1,1,soon,3")
    with pytest.raises(InteractionsError, match="column 'timestamp', row 20000: cannot read 'soon'"):
        Interactions.scan(path).stream(lambda rows: rows.collect())
