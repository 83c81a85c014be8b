"""From raw columns to validated codes: which column plays which role, and what its values must be.

Everything here works on one-dimensional NumPy arrays, whatever table they came from, so that every way to build
`Interactions` gives the same codes and the same errors. Rows are counted from 0.
"""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metalearn.errors import InteractionsError

DEFAULT_COLUMNS: Mapping[str, str] = {
    "user": "user_id",
    "item": "item_id",
    "timestamp": "timestamp",
    "rating": "rating",
}
REQUIRED_ROLES = ("user", "item")

SYNONYMS: Mapping[str, str] = {
    "user": """user userid uid user_idx user_index customer customer_id customerid visitor_id visitorid member_id
        memberid reviewer_id reviewerid account_id accountid""",
    "item": """item itemid iid item_idx item_index product product_id productid movie_id movieid article_id articleid
        book_id bookid track_id trackid song_id songid video_id videoid news_id newsid game_id gameid anime_id
        business_id asin isbn sku stock_code stockcode""",
    "timestamp": """timestamps time ts date datetime unix_time unixtime unixreviewtime event_time eventtime created_at
        t_dat""",
    "rating": "ratings score stars overall",
}

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, kw_only=True)
class RawColumns:
    """Raw columns of one table with the names that errors should use, and the rows they had in that table."""

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray | None
    rating: np.ndarray | None
    names: Mapping[str, str]
    rows: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class EncodedColumns:
    """Validated columns: int32 codes in the order of the sorted raw ids, float64 seconds, float32 ratings."""

    user: np.ndarray
    item: np.ndarray
    user_labels: np.ndarray
    item_labels: np.ndarray
    timestamp: np.ndarray | None
    rating: np.ndarray | None


def resolve_columns(available: Sequence[str], columns: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Decide which column plays which role: explicit mapping, else the default name, else the only synonym.

    Args:
      available: the column names of the table.
      columns: role ("user", "item", "timestamp", "rating") to column name; None as a name ignores an optional role.

    Returns:
      Role to column name; optional roles without a column are absent.

    Raises:
      InteractionsError: unknown role, missing column, or several columns that could play one role.

    Example:
      >>> resolve_columns(["uid", "movieId", "date"])
      {'user': 'uid', 'item': 'movieId', 'timestamp': 'date'}
    """
    explicit = dict(columns or {})
    unknown = sorted(set(explicit) - set(DEFAULT_COLUMNS))
    if unknown:
        raise InteractionsError(f"`columns` has unknown roles {unknown}; allowed are {list(DEFAULT_COLUMNS)}")
    resolved: dict[str, str] = {}
    for role, name in explicit.items():
        if name is None and role in REQUIRED_ROLES:
            raise InteractionsError(f"`columns[{role!r}]` is None, but the {role} column is required; pass its name")
        if name is not None and name not in available:
            raise InteractionsError(
                f"column {name!r} (given as the {role} column) is missing; the table has {list(available)}"
            )
        if name is not None:
            resolved[role] = name
    for role in DEFAULT_COLUMNS:
        if role not in explicit:
            found = _find_column(role, available, taken=set(resolved.values()))
            if found is not None:
                resolved[role] = found
    return {role: resolved[role] for role in DEFAULT_COLUMNS if role in resolved}


def _find_column(role: str, available: Sequence[str], taken: set[str]) -> str | None:
    default = DEFAULT_COLUMNS[role]
    free = [name for name in available if name not in taken]
    if default in free:
        return default
    for accepted in ([default], SYNONYMS[role].split()):
        matches = [name for name in free if _normalised(name) in accepted]
        if len(matches) > 1:
            raise InteractionsError(
                f"columns {matches} could each be the {role} column; pass columns={{{role!r}: {matches[0]!r}}}"
            )
        if matches:
            return matches[0]
    if role in REQUIRED_ROLES:
        raise InteractionsError(
            f"no {role} column: {default!r} is missing and no synonym of it was found; the table has "
            f"{list(available)}; pass columns={{{role!r}: name}}"
        )
    return None


def _normalised(name: str) -> str:
    # RecBole writes "user_id:token": the part after the colon is a type.
    return name.split(":")[0].strip().lower().replace(" ", "_").replace("-", "_")


def encode_columns(raw: RawColumns) -> EncodedColumns:
    """Validate raw columns and turn ids into codes, times into seconds and ratings into floats.

    Raises:
      InteractionsError: empty table, unequal lengths, missing ids, bad times or ratings, fewer than two users or items.
    """
    arrays = {"user": raw.user, "item": raw.item, "timestamp": raw.timestamp, "rating": raw.rating}
    lengths = {raw.names[role]: len(values) for role, values in arrays.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise InteractionsError(f"columns differ in length: {lengths}; pass columns of equal length")
    if len(raw.user) == 0:
        raise InteractionsError("the table is empty; at least 2 users and 2 items are needed")
    user, user_labels = encode_ids(raw.user, raw.names["user"], raw.rows)
    item, item_labels = encode_ids(raw.item, raw.names["item"], raw.rows)
    require_two(len(user_labels), "users", raw.names["user"])
    require_two(len(item_labels), "items", raw.names["item"])
    timestamp = None if raw.timestamp is None else to_seconds(raw.timestamp, raw.names["timestamp"], raw.rows)
    if timestamp is not None and timestamp.min() == timestamp.max():
        timestamp = None
    rating = None if raw.rating is None else to_ratings(raw.rating, raw.names["rating"], raw.rows)
    if rating is not None and np.isnan(rating).all():
        rating = None
    return EncodedColumns(
        user=user, item=item, user_labels=user_labels, item_labels=item_labels, timestamp=timestamp, rating=rating
    )


def require_two(count: int, plural: str, column: str) -> None:
    """Raise unless there are at least two users (or items)."""
    if count < 2:
        raise InteractionsError(f"column {column!r} holds {count} distinct {plural}; at least 2 {plural} are needed")


def one_dimensional(values: Any, column: str) -> np.ndarray:
    """Return values as a one-dimensional array; lists that hold both numbers and text stay objects."""
    array = np.asarray(values)
    if array.dtype.kind in "US" and not isinstance(values, np.ndarray):
        array = np.asarray(values, dtype=object)
    if array.ndim != 1:
        raise InteractionsError(f"column {column!r} must be one-dimensional, got shape {array.shape}")
    return array


def dense_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (int32 codes, sorted distinct values) of an integer array; linear where the range is small."""
    low, high = int(values.min()), int(values.max())
    if high - low > 4 * len(values) + 1_000_000:
        labels, codes = np.unique(values, return_inverse=True)
        return codes.astype(np.int32), labels
    # A difference of narrow signed integers may not fit their type; one of unsigned integers always does.
    widened = values if values.dtype.kind == "u" else values.astype(np.int64)
    offset = (widened - widened.dtype.type(low)).astype(np.int64)
    present = np.zeros(high - low + 1, dtype=bool)
    present[offset] = True
    rank = np.cumsum(present, dtype=np.int32) - 1
    labels = np.flatnonzero(present).astype(widened.dtype) + widened.dtype.type(low)
    return rank[offset].astype(np.int32), labels.astype(values.dtype)


def encode_ids(values: np.ndarray, column: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Encode raw ids as int32 codes in the order of the sorted ids.

    Returns:
      Codes [N], and labels [K] such that labels[codes] gives the raw ids back.

    Raises:
      InteractionsError: an id is null or NaN; the message names the column and the first such row.

    Example:
      >>> codes, labels = encode_ids(np.array(["b", "a", "b"]), "user_id")
      >>> codes.tolist(), labels.tolist()
      ([1, 0, 1], ['a', 'b'])
    """
    kind = values.dtype.kind
    if kind in "mM":
        _raise_first(np.isnat(values), column, "is null; every interaction needs an id", values, rows)
    if kind == "f":
        _raise_first(~np.isfinite(values), column, "is not an id; every interaction needs one", values, rows)
        # Tables with one missing value come back as floats; whole numbers are the integers they were.
        if (values == np.floor(values)).all() and (np.abs(values) < 2**53).all():
            return dense_codes(values.astype(np.int64))
    if kind in "iu":
        return dense_codes(values)
    if kind == "b":
        return dense_codes(values.astype(np.int8))
    if kind in "OUS":
        return _encode_objects(values.tolist(), column, rows)
    labels, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int32), labels


def _encode_objects(values: list[Any], column: str, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        distinct = set(values)
    except TypeError as error:
        raise InteractionsError(
            f"column {column!r} holds ids that cannot be hashed: {error}; pass ints or strings"
        ) from error
    if any(map(_is_null, distinct)):
        row = next(row for row, value in enumerate(values) if _is_null(value))
        raise InteractionsError(
            f"column {column!r}, row {_row(row, rows)}: {values[row]!r} is null; every interaction needs an id"
        )
    try:
        ordered = sorted(distinct)
    except TypeError:
        ordered = sorted(distinct, key=lambda value: (type(value).__name__, str(value)))
    index = {value: code for code, value in enumerate(ordered)}
    codes = np.fromiter(map(index.__getitem__, values), dtype=np.int32, count=len(values))
    if all(type(value) is int and abs(value) < 2**63 for value in ordered):
        return codes, np.asarray(ordered, dtype=np.int64)
    return codes, np.fromiter(ordered, dtype=object, count=len(ordered))


def _is_null(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and math.isnan(value)


def to_seconds(values: np.ndarray, column: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Convert numbers, datetimes or ISO 8601 text to float64 seconds; text without a zone is taken as UTC.

    Raises:
      InteractionsError: a time is missing, not finite, negative or cannot be read; names the column and first row.

    Example:
      >>> to_seconds(np.array(["1970-01-01T00:01:00", "1970-01-02"]), "date").tolist()
      [60.0, 86400.0]
    """
    if values.dtype.kind == "M":
        _raise_first(np.isnat(values), column, "is not a time", values, rows)
        seconds = values.astype("datetime64[us]").astype(np.int64) / 1e6
    elif values.dtype.kind in "iufb":
        seconds = values.astype(np.float64)
    else:
        seconds = _plain_text_seconds(values)
        if seconds is None:
            seconds = _parse(values.tolist(), _seconds_of, column, rows, "pass seconds, datetimes or ISO 8601 text")
    _raise_first(
        ~np.isfinite(seconds), column, "is not a finite time; drop the row or leave the column out", values, rows
    )
    _raise_first(
        seconds < 0, column, "is a negative time (before 1970); shift the column so that it starts at 0", values, rows
    )
    return seconds


def to_ratings(values: np.ndarray, column: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Convert ratings to float32; missing ones become NaN, anything that is no finite number is an error."""
    if values.dtype.kind in "iufb":
        with np.errstate(over="ignore"):
            ratings = values.astype(np.float32)
    elif values.dtype.kind in "OUS":
        parsed = _parse(values.tolist(), _rating_of, column, rows, "pass numbers")
        return to_ratings(parsed, column, rows)
    else:
        raise InteractionsError(
            f"column {column!r} has type {values.dtype}, which is not numeric; pass ratings as numbers"
        )
    _raise_first(
        np.isinf(ratings), column, "is an infinite rating; pass finite numbers, or NaN where unrated", values, rows
    )
    return ratings


def _plain_text_seconds(values: np.ndarray) -> np.ndarray | None:
    """Read a column of numbers or of ISO times without zones at once; None if that does not fit every row."""
    text = values.astype(str)
    try:
        return text.astype(np.float64)
    except ValueError:
        pass
    try:
        # NumPy warns about zones, which it drops.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            moments = text.astype("datetime64[us]")
    except (ValueError, Warning):
        return None
    return np.where(np.isnat(moments), np.nan, moments.astype(np.int64) / 1e6)


def _parse(values: list[Any], read: Any, column: str, rows: np.ndarray | None, advice: str) -> np.ndarray:
    parsed = np.empty(len(values), dtype=np.float64)
    for row, value in enumerate(values):
        try:
            parsed[row] = read(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise InteractionsError(
                f"column {column!r}, row {_row(row, rows)}: cannot read {value!r} as a number or time; {advice}"
            ) from error
    return parsed


def _seconds_of(value: Any) -> float:
    if _is_null(value):
        return math.nan
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            value = datetime.datetime.fromisoformat(value.strip())
    if isinstance(value, datetime.datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
        return (moment - _EPOCH).total_seconds()
    if isinstance(value, datetime.date):
        return (datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.UTC) - _EPOCH).total_seconds()
    return float(value)


def _rating_of(value: Any) -> float:
    return math.nan if _is_null(value) or value == "" else float(value)


def _raise_first(bad: np.ndarray, column: str, problem: str, values: Iterable[Any], rows: np.ndarray | None) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise InteractionsError(f"column {column!r}, row {_row(row, rows)}: {np.asarray(values)[row]} {problem}")


def _row(row: int, rows: np.ndarray | None) -> int:
    return row if rows is None else int(rows[row])
