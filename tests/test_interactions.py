"""Building interactions from every source, what is refused, and the operations on tables."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from metalearn.errors import InteractionsError, MetalearnError
from metalearn.interaction_columns import encode_ids, resolve_columns
from metalearn.interactions import Interactions, InteractionsScan

COLUMNS = {
    "user_id": ["u2", "u1", "u2", "u3"],
    "item_id": [30, 10, 10, 20],
    "timestamp": [5.0, 6.0, 7.0, 8.0],
    "rating": [1.0, np.nan, 3.0, 0.0],
}


def assert_is_the_table(table: Interactions) -> None:
    # Codes follow the sorted ids: u1 u2 u3 are 0 1 2, and 10 20 30 are 0 1 2.
    assert table.user.tolist() == [1, 0, 1, 2]
    assert table.item.tolist() == [2, 0, 0, 1]
    assert table.timestamp is not None and table.timestamp.tolist() == [5, 6, 7, 8]
    assert table.rating is not None
    np.testing.assert_array_equal(table.rating, np.array([1, np.nan, 3, 0], dtype=np.float32))
    assert (table.num_users, table.num_items, len(table)) == (3, 3, 4)
    assert table.user_ids(table.user).tolist() == COLUMNS["user_id"]
    assert table.item_ids(table.item).tolist() == COLUMNS["item_id"]
    dtypes = (table.user.dtype, table.item.dtype, table.timestamp.dtype, table.rating.dtype)
    assert dtypes == (np.int32, np.int32, np.float64, np.float32)


class TestSources:
    def test_arrays(self):
        columns = dict(zip(("user", "item", "timestamp", "rating"), COLUMNS.values(), strict=True))
        assert_is_the_table(Interactions.from_arrays(**columns))

    @pytest.mark.parametrize("frame", [pd.DataFrame(COLUMNS), pl.DataFrame(COLUMNS, strict=False)])
    def test_frames(self, frame):
        assert_is_the_table(Interactions.from_frame(frame))

    def test_pandas_nullable_and_categorical_columns(self):
        frame = pd.DataFrame(COLUMNS).astype({"user_id": "category", "item_id": "Int64", "rating": "Float64"})
        assert_is_the_table(Interactions.from_frame(frame))

    def test_polars_null_ratings_are_unrated(self):
        frame = pl.DataFrame(COLUMNS, strict=False).with_columns(pl.col("rating").fill_nan(None))
        assert_is_the_table(Interactions.from_frame(frame))

    def test_hugging_face_dataset(self):
        datasets = pytest.importorskip("datasets")
        assert_is_the_table(Interactions.from_dataset(datasets.Dataset.from_dict(COLUMNS)))

    @pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
    def test_files(self, tmp_path: Path, suffix: str):
        frame, path = pl.DataFrame(COLUMNS, strict=False), tmp_path / f"table.{suffix}"
        if suffix == "parquet":
            frame.write_parquet(path)
        else:
            frame.write_csv(path, separator="\t" if suffix == "tsv" else ",")
        assert_is_the_table(Interactions.read(path))
        assert isinstance(Interactions.scan(path), InteractionsScan)

    def test_sparse_values_are_ratings_and_indices_are_codes(self):
        matrix = scipy.sparse.coo_array(([4.0, 2.0, 0.0], ([2, 0, 1], [1, 3, 0])), shape=(3, 5))
        table = Interactions.from_sparse(matrix)
        assert (table.user.tolist(), table.item.tolist()) == ([0, 2], [3, 1])
        assert table.rating is not None and table.rating.tolist() == [2, 4]
        assert (table.num_users, table.num_items) == (3, 5)
        assert table.item_ids([3]).tolist() == [3]

    def test_sparse_ones_are_no_ratings(self):
        assert Interactions.from_sparse(scipy.sparse.eye_array(3, dtype=bool).tocsr()).rating is None

    def test_ids_of_several_types(self):
        table = Interactions.from_arrays([1, "a", 1], [b"x", b"y", b"x"])
        assert table.user_ids(table.user).tolist() == [1, "a", 1]
        assert table.item_ids(table.item).tolist() == [b"x", b"y", b"x"]

    def test_whole_floats_are_integer_ids(self):
        labels = encode_ids(np.array([2.0, 1.0]), "user")[1]
        assert labels.dtype == np.int64

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
    def test_widest_and_narrowest_integer_ids(self, dtype):
        bounds = np.iinfo(dtype)
        ids = np.array([bounds.max, bounds.min, bounds.max - 1, bounds.max], dtype=dtype)
        codes, labels = encode_ids(ids, "user")
        np.testing.assert_array_equal(labels[codes], ids)
        assert codes.tolist() == [2, 0, 1, 2]

    @given(st.lists(st.one_of(st.integers(-(10**9), 10**9), st.text(max_size=3)), min_size=1, max_size=30))
    def test_codes_decode_to_ids(self, ids):
        codes, labels = encode_ids(np.array(ids, dtype=object), "user")
        assert labels[codes].tolist() == ids
        assert sorted(set(codes.tolist())) == list(range(len(set(ids))))


class TestColumnResolution:
    def test_synonyms_are_found(self):
        found = resolve_columns(["userId", "Movie-ID", "ts:float", "stars", "genre"])
        assert found == {"user": "userId", "item": "Movie-ID", "timestamp": "ts:float", "rating": "stars"}

    def test_default_names_win_over_synonyms(self):
        assert resolve_columns(["uid", "user_id", "item_id", "asin"])["user"] == "user_id"

    def test_explicit_names_win_and_none_ignores(self):
        found = resolve_columns(["user_id", "who", "item", "date"], {"user": "who", "timestamp": None})
        assert found == {"user": "who", "item": "item"}

    @pytest.mark.parametrize(
        ("available", "columns", "message"),
        [
            (["item_id", "x"], None, r"no user column: 'user_id' is missing .* the table has \['item_id', 'x'\]"),
            (["user_id", "x"], None, r"no item column"),
            (["user_id", "asin", "sku"], None, r"\['asin', 'sku'\] could each be the item column"),
            (["user_id", "item_id", "date", "time"], None, r"could each be the timestamp column"),
            (["user_id", "item_id"], {"rating": "stars"}, r"'stars' \(given as the rating column\) is missing"),
            (["user_id", "item_id"], {"usr": "user_id"}, r"unknown roles \['usr'\]"),
            (["user_id", "item_id"], {"user": None}, r"the user column is required"),
        ],
    )
    def test_errors(self, available, columns, message):
        with pytest.raises(InteractionsError, match=message):
            resolve_columns(available, columns)


class TestTimes:
    @pytest.mark.parametrize(
        "times",
        [
            ["1970-01-02", "1970-01-01T00:01:00"],
            ["1970-01-02T01:00:00+01:00", "1970-01-01 00:01:00Z"],
            ["86400", "60.0"],
            [datetime.datetime(1970, 1, 2), datetime.datetime(1970, 1, 1, 0, 1, tzinfo=datetime.UTC)],
            np.array(["1970-01-02", "1970-01-01T00:01"], dtype="datetime64[ns]"),
            pd.Series(pd.to_datetime(["1970-01-02T00:00", "1970-01-01T00:01"])),
        ],
    )
    def test_become_seconds(self, times):
        table = Interactions.from_arrays([1, 2], [1, 2], timestamp=times)
        assert table.timestamp is not None and table.timestamp.tolist() == [86400, 60]

    @pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
    def test_datetime_columns_of_frames(self, zone):
        # 01:00 in Berlin (UTC+1 in the winter of 1970) is midnight UTC.
        clock = ["1970-01-02T01:00", "1970-01-01T01:01"] if zone else ["1970-01-02T00:00", "1970-01-01T00:01"]
        times = pd.Series(pd.to_datetime(clock)).dt.tz_localize(zone)
        frame = pd.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "date": times})
        for table in (Interactions.from_frame(frame), Interactions.from_frame(pl.from_pandas(frame))):
            assert table.timestamp is not None and table.timestamp.tolist() == [86400, 60]

    def test_date_and_text_columns_of_files(self, tmp_path: Path):
        dates = pl.Series(["1970-01-02", "1970-01-03"])
        frame = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "date": dates})
        frame.write_csv(tmp_path / "text.csv")
        frame.with_columns(pl.col("date").str.to_date()).write_parquet(tmp_path / "date.parquet")
        for name in ("text.csv", "date.parquet"):
            table = Interactions.read(tmp_path / name)
            assert table.timestamp is not None and table.timestamp.tolist() == [86400, 2 * 86400]

    def test_equal_times_are_no_times(self):
        assert Interactions.from_arrays([1, 2], [1, 2], timestamp=[0, 0]).timestamp is None

    def test_missing_ratings_throughout_are_no_ratings(self):
        assert Interactions.from_arrays([1, 2], [1, 2], rating=[np.nan, None]).rating is None


class TestErrors:
    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"user": [], "item": []}, "the table is empty"),
            ({"user": [1, 2, 3], "item": [1, 2]}, r"columns differ in length: \{'user': 3, 'item': 2\}"),
            ({"user": [1, 2], "item": [1, 2], "rating": [1]}, r"differ in length.*'rating': 1"),
            ({"user": [1.0, np.nan], "item": [1, 2]}, "column 'user', row 1: nan is not an id"),
            ({"user": ["a", "b"], "item": ["x", None]}, "column 'item', row 1: None is null"),
            ({"user": ["a", pd.NA], "item": ["x", "y"]}, "column 'user', row 1: <NA> is null"),
            ({"user": [[1], [2]], "item": [1, 2]}, "column 'user' must be one-dimensional"),
            ({"user": [1, 1], "item": [1, 2]}, "column 'user' holds 1 distinct users; at least 2 users"),
            ({"user": [1, 2], "item": [1, 1]}, "column 'item' holds 1 distinct items; at least 2 items"),
            ({"user": [1, 2], "item": [1, 2], "timestamp": [3, -1]}, "'timestamp', row 1: -1 is a negative time"),
            ({"user": [1, 2], "item": [1, 2], "timestamp": [3, np.nan]}, "row 1: nan is not a finite time"),
            ({"user": [1, 2], "item": [1, 2], "timestamp": [np.inf, 1]}, "row 0: inf is not a finite time"),
            ({"user": [1, 2], "item": [1, 2], "timestamp": ["1", "soon"]}, "row 1: cannot read 'soon'"),
            ({"user": [1, 2], "item": [1, 2], "timestamp": ["NaT", "2020-01-01"]}, "row 0: NaT is not a finite time"),
            ({"user": [1, 2], "item": [1, 2], "timestamp": ["1969-12-31", "2020-01-01"]}, "row 0: .* negative time"),
            ({"user": [1, 2], "item": [1, 2], "rating": [3, "good"]}, "'rating', row 1: cannot read 'good'"),
            ({"user": [1, 2], "item": [1, 2], "rating": [3, np.inf]}, "row 1: inf is an infinite rating"),
            ({"user": [1, 2], "item": [1, 2], "rating": [3, 1e300]}, "row 1: 1e\\+300 is an infinite rating"),
            ({"user": [1, 2], "item": [1, 2], "rating": np.array([1, 2], "m8[s]")}, "which is not numeric"),
        ],
    )
    def test_arrays(self, columns, message):
        with pytest.raises(InteractionsError, match=message):
            Interactions.from_arrays(**columns)

    def test_unhashable_ids(self):
        ids = np.empty(2, dtype=object)
        ids[:] = [[1], {2}]
        with pytest.raises(InteractionsError, match="cannot be hashed"):
            Interactions.from_arrays(ids, [1, 2])

    def test_null_ids_in_frames(self):
        for frame in (
            pd.DataFrame({"user_id": ["a", None, "b"], "item_id": [1, 2, 3]}),
            pl.DataFrame({"user_id": ["a", None, "b"], "item_id": [1, 2, 3]}),
            pl.DataFrame({"user_id": [1, None, 2], "item_id": [1, 2, 3]}),
        ):
            with pytest.raises(InteractionsError, match="column 'user_id', row 1"):
                Interactions.from_frame(frame)

    def test_other_types(self):
        with pytest.raises(InteractionsError, match="must be a pandas or Polars data frame, got dict"):
            Interactions.from_frame({"user_id": [1]})
        with pytest.raises(InteractionsError, match="must be a SciPy sparse matrix with 2 dimensions, got ndarray"):
            Interactions.from_sparse(np.eye(2))
        with pytest.raises(InteractionsError, match="has no entries"):
            Interactions.from_sparse(scipy.sparse.csr_array((2, 2)))
        with pytest.raises(InteractionsError, match=r"holds splits \['train'\]"):
            Interactions.from_dataset({"train": None})
        with pytest.raises(InteractionsError, match=r"must be a datasets.Dataset \(not streamed\)"):
            Interactions.from_dataset(iter([]))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"user": [0, 2]}, "`user`, row 1: code 2 is not within 0..1"),
            ({"item": [-1, 0]}, "`item`, row 0: code -1"),
            ({"user": [0.0, 1.0]}, "use Interactions.from_arrays for raw ids"),
            ({"item": [0]}, r"`item` has shape \(1,\), but `user` has \(2,\)"),
            ({"timestamp": [1.0, -1.0]}, "`timestamp`, row 1: must be a finite number that is not negative, got -1"),
            ({"rating": [np.inf, 0]}, "`rating`, row 0"),
            ({"num_users": 1}, "`num_users` must be at least 2, got 1"),
            ({"item_labels": np.array(["a"])}, "`item_labels` must have length 2, got 1"),
        ],
    )
    def test_constructor(self, changes, message):
        arguments = {"user": [0, 1], "item": [1, 0], "num_users": 2, "num_items": 2} | changes
        with pytest.raises(InteractionsError, match=message):
            Interactions(**arguments)

    def test_are_caught_by_the_root_and_by_value_error(self):
        assert issubclass(InteractionsError, MetalearnError) and issubclass(InteractionsError, ValueError)


class TestOperations:
    table = Interactions.from_arrays(
        ["a", "b", "a", "c", "a"], [7, 8, 7, 9, 8], timestamp=[5, 4, 3, 2, 1], rating=[1, 2, 0, np.nan, -1]
    )

    def test_select_keeps_the_code_space(self):
        by_mask, by_index = self.table.select(self.table.user == 0), self.table.select([0, 2, 4])
        for part in (by_mask, by_index):
            assert part.item.tolist() == [0, 0, 1]
            assert (part.num_users, part.num_items) == (3, 3)
            assert part.timestamp is not None and part.timestamp.tolist() == [5, 3, 1]
        assert len(self.table.select([])) == 0

    @pytest.mark.parametrize(
        ("index", "message"),
        [([True], "has 1 values for 5"), ([5], r"within 0..4, got 5..5"), ([0.5], "bool or int"), ([[0]], "one-dim")],
    )
    def test_select_errors(self, index, message):
        with pytest.raises(InteractionsError, match=message):
            self.table.select(index)

    def test_compact_drops_what_does_not_occur_and_keeps_ids(self):
        part = self.table.select([1, 3]).compact()
        assert (part.user.tolist(), part.item.tolist(), part.num_users) == ([0, 1], [0, 1], 2)
        assert part.user_ids(part.user).tolist() == ["b", "c"]
        assert part.item_ids(part.item).tolist() == [8, 9]
        with pytest.raises(InteractionsError, match="no interactions to compact"):
            self.table.select([]).compact()
        with pytest.raises(InteractionsError, match="at least 2 users"):
            self.table.select([0]).compact()

    def test_deduplicate_keeps_the_earliest(self):
        # (a, 7) occurs at times 5 and 3: row 2, the earlier one, stays.
        kept = self.table.deduplicate()
        assert kept.timestamp is not None and kept.timestamp.tolist() == [4, 3, 2, 1]

    def test_deduplicate_without_times_keeps_the_first_row(self):
        table = Interactions.from_arrays([1, 2, 1], [5, 6, 5], rating=[3, 4, 9])
        kept = table.deduplicate()
        assert kept.rating is not None and kept.rating.tolist() == [3, 4]
        assert kept.deduplicate() is kept

    def test_positives(self):
        # By default rating > 0 or unrated: 1, 2 and NaN; at least 2 by number: 2 alone.
        assert self.table.positives().user.tolist() == [0, 1, 2]
        assert self.table.positives(2).user.tolist() == [1]
        unrated = Interactions.from_arrays([1, 2], [1, 2])
        assert unrated.positives() is unrated
        with pytest.raises(InteractionsError, match="there are no ratings"):
            unrated.positives(3)

    def test_ids_of_unknown_codes(self):
        with pytest.raises(InteractionsError, match=r"user codes must be within 0..2, got 3..3"):
            self.table.user_ids([3])

    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40))
    def test_deduplicate_agrees_with_pandas(self, rows):
        user, item, time = (np.array(column) for column in zip(*rows, strict=True))
        table = Interactions(user=user, item=item, num_users=5, num_items=5, timestamp=time)
        frame = pd.DataFrame({"user": user, "item": item, "time": time}).sort_values("time", kind="stable")
        expected = frame.drop_duplicates(["user", "item"]).sort_index()
        kept = table.deduplicate()
        assert kept.user.tolist() == expected["user"].tolist()
        assert kept.timestamp is not None and kept.timestamp.tolist() == expected["time"].tolist()


def test_import_loads_only_numpy():
    code = (
        "import sys, metalearn.interactions, metalearn.profiles;"
        "heavy = {'polars', 'pandas', 'scipy', 'torch', 'jax', 'datasets', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stderr
