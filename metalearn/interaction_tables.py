"""Lazy reading of interaction tables on disk: open the schema, count, stream, sample whole users, or read it all.

Polars does the work and is imported only when a file is opened. Only the columns in use are read, in the streaming
engine, so that a table may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from metalearn.errors import InteractionsError
from metalearn.interaction_columns import RawColumns, encode_ids, to_seconds

if TYPE_CHECKING:
    import polars

SEPARATORS: Mapping[str, str] = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
PARQUET_SUFFIXES = (".parquet", ".pq")
SCHEMA_ROWS = 10_000

_ROW, _HASH = "__row__", "__hash__"
_Result = TypeVar("_Result")


def open_table(path: str | Path, *, as_text: bool = False) -> polars.LazyFrame:
    """Open a parquet, CSV or TSV file lazily, with a row index; reads the header and the first rows at most.

    Args:
      path: one file, or a glob of files, with the suffix of its format; CSV and TSV have a header.
      as_text: read every CSV column as text, so that no value can fail to parse.

    Raises:
      InteractionsError: the file is missing, cannot be read, or has an unknown suffix.
    """
    import polars as pl

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SEPARATORS and suffix not in PARQUET_SUFFIXES:
        allowed = [*PARQUET_SUFFIXES, *SEPARATORS]
        raise InteractionsError(f"`path` {str(path)!r} has suffix {suffix!r}; allowed are {allowed}")
    if not path.exists() and not any(mark in str(path) for mark in "*?["):
        raise InteractionsError(f"`path` {str(path)!r} does not exist; pass a parquet or CSV file")
    if suffix in PARQUET_SUFFIXES:
        return pl.scan_parquet(path, row_index_name=_ROW)
    return pl.scan_csv(
        path,
        separator=SEPARATORS[suffix],
        row_index_name=_ROW,
        infer_schema=not as_text,
        infer_schema_length=SCHEMA_ROWS,
    )


def column_names(path: str | Path) -> list[str]:
    """Return the names of the table's columns, reading nothing else."""
    import polars as pl

    try:
        names = open_table(path).collect_schema().names()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InteractionsError(f"`path` {str(path)!r} cannot be read as a table: {_first_line(error)}") from error
    return [name for name in names if name != _ROW]


def count_rows(path: str | Path) -> int:
    """Count the rows of the table in one streamed pass."""
    import polars as pl

    # Only the index is selected: a malformed value elsewhere is reported, with its row, when it is read.
    return int(open_table(path).select(pl.len()).collect(engine="streaming").item())


def read_columns(path: str | Path, names: Mapping[str, str]) -> RawColumns:
    """Read the columns in use of the whole table."""
    return _collect(path, names, lambda table: table)


def sample_columns(path: str | Path, names: Mapping[str, str], max_interactions: int, seed: int) -> RawColumns:
    """Stream the table once and keep whole users, chosen by a seeded hash of their id, up to `max_interactions` rows.

    Memory is bounded by a small multiple of `max_interactions`. A user with more than `max_interactions` rows cannot
    be kept whole and is left out.
    """
    import polars as pl

    total = count_rows(path)
    if total <= max_interactions:
        return read_columns(path, names)
    threshold = int(max_interactions / total * 2.0**32)

    def keep_hashed(table: polars.LazyFrame) -> polars.LazyFrame:
        hashed = table.with_columns((pl.col(names["user"]).hash(seed) // 2**32).alias(_HASH))
        return hashed.filter(pl.col(_HASH) < threshold).head(4 * max_interactions)

    return _collect(path, names, keep_hashed, max_interactions)


def stream_columns(
    path: str | Path, names: Mapping[str, str], compute: Callable[[polars.LazyFrame], _Result]
) -> _Result:
    """Run `compute` on the whole table, lazily, with the columns that `streamed_rows` makes of it.

    Raises:
      InteractionsError: an id is null, or a time is missing or cannot be read; names the column and a row.
    """

    def checked(table: polars.LazyFrame) -> _Result:
        for role in ("user", "item"):
            _check_ids(table, names[role])
        return compute(streamed_rows(table, names))

    try:
        return _with_text_fallback(path, names, checked)
    except InteractionsError as error:
        # Polars appends where in its query a function failed.
        raise InteractionsError(str(error).partition("\n\n")[0]) from None


def streamed_rows(table: polars.LazyFrame, names: Mapping[str, str]) -> polars.LazyFrame:
    """Give a lazy table with a row index the columns "user", "item" and, where there are times, "timestamp".

    Ids are integers, or 64-bit hashes of what else they were: with ten million ids, two have one hash in one table of
    400 000. Times are float64 seconds, converted and checked by `to_seconds` batch by batch.
    """
    import polars as pl

    schema = table.collect_schema()
    columns = []
    for role in ("user", "item"):
        column = pl.col(names[role])
        columns.append((column if schema[names[role]].is_integer() else column.hash()).alias(role))
    if "timestamp" in names:
        name = names["timestamp"]

        def seconds(batch: polars.Series) -> polars.Series:
            values = _column_array(batch.struct.field(name))
            return pl.Series(to_seconds(values, name, batch.struct.field(_ROW).to_numpy()))

        converted = pl.struct(_ROW, name).map_batches(seconds, return_dtype=pl.Float64, is_elementwise=True)
        columns.append(converted.alias("timestamp"))
    return table.select(columns)


def _check_ids(table: polars.LazyFrame, name: str) -> None:
    import polars as pl

    column = pl.col(name)
    bad = column.is_null()
    if table.collect_schema()[name].is_float():
        bad |= ~column.is_finite()
    first = table.filter(bad).select(_ROW, name).head(1).collect(engine="streaming")
    if len(first):
        encode_ids(_column_array(first[name]), name, first[_ROW].to_numpy())


def _with_text_fallback(
    path: str | Path, names: Mapping[str, str], compute: Callable[[polars.LazyFrame], _Result]
) -> _Result:
    import polars as pl

    wanted = [_ROW, *dict.fromkeys(names.values())]
    try:
        return compute(open_table(path).select(wanted))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # a parquet file that is altered makes it panic
        # A value does not fit the type its column seemed to have. As text everything fits, and the row can be named.
        try:
            return compute(open_table(path, as_text=True).select(wanted))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise InteractionsError(f"`path` {str(path)!r} cannot be read: {_first_line(error)}") from error


def _collect(
    path: str | Path,
    names: Mapping[str, str],
    transform: Callable[[polars.LazyFrame], polars.LazyFrame],
    max_interactions: int | None = None,
) -> RawColumns:
    frame = _with_text_fallback(path, names, lambda table: transform(table).collect(engine="streaming"))
    if max_interactions is not None:
        frame = _whole_users(frame, max_interactions)
    return raw_columns(frame, names, rows=frame.get_column(_ROW).to_numpy())


def _whole_users(frame: polars.DataFrame, max_interactions: int) -> polars.DataFrame:
    hashes = frame.get_column(_HASH).to_numpy()
    _, codes, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    counts = np.where(counts > max_interactions, 0, counts)
    kept = (np.cumsum(counts) <= max_interactions) & (counts > 0)
    if kept.sum() < 2:
        raise InteractionsError(
            f"`max_interactions`={max_interactions} is too small to hold 2 whole users; pass a larger number"
        )
    return frame.filter(kept[codes])


def raw_columns(frame: Any, names: Mapping[str, str], rows: np.ndarray | None = None) -> RawColumns:
    """Take the columns in use out of a Polars or pandas frame as NumPy arrays."""
    arrays = {role: _column_array(frame[name]) for role, name in names.items()}
    return RawColumns(
        user=arrays["user"],
        item=arrays["item"],
        timestamp=arrays.get("timestamp"),
        rating=arrays.get("rating"),
        names=names,
        rows=rows,
    )


def _column_array(series: Any) -> np.ndarray:
    # A pandas column with a time zone would become an array of Python objects.
    if getattr(series.dtype, "tz", None) is not None:
        return series.to_numpy(dtype="datetime64[us]")
    return series.to_numpy()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
