"""Interactions: who used what, when, and how it was rated; the only layer that sees raw ids.

Shapes: N interactions. Users and items are int32 codes in 0..num_users-1 and 0..num_items-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from metalearn import interaction_tables as tables
from metalearn.errors import InteractionsError
from metalearn.interaction_columns import (
    DEFAULT_COLUMNS,
    RawColumns,
    dense_codes,
    encode_columns,
    one_dimensional,
    resolve_columns,
)

if TYPE_CHECKING:
    import polars

__all__ = ["Interactions", "InteractionsScan"]

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class Interactions:
    """Hold a table of interactions as columns of codes.

    Build one from raw data with a class method (`from_arrays`, `from_frame`, `from_sparse`, `from_dataset`, `read`):
    those encode ids in sorted order, so the codes do not depend on the order of the rows, and validate everything.
    The constructor takes finished codes. Duplicate (user, item) pairs are kept; `deduplicate` drops them.

    Args:
      user: int32 [N], codes in 0..num_users-1.
      item: int32 [N], codes in 0..num_items-1.
      num_users: size of the user code space; not every user needs to occur.
      num_items: size of the item code space.
      timestamp: float64 [N], seconds since some origin, finite and not negative; None without times.
      rating: float32 [N], NaN where unrated; None without ratings.
      user_labels: [num_users], raw ids of the codes; None if the codes are the ids.
      item_labels: [num_items], likewise.

    Raises:
      InteractionsError: columns of unequal length, codes out of range, bad times or ratings.

    Example:
      >>> table = Interactions.from_arrays(["ann", "bob", "ann"], [7, 7, 9], rating=[5, 3, 4])
      >>> len(table), table.user.tolist(), table.item.tolist(), table.user_ids([0]).tolist()
      (3, [0, 1, 0], [0, 0, 1], ['ann'])
    """

    user: np.ndarray
    item: np.ndarray
    num_users: int
    num_items: int
    timestamp: np.ndarray | None = None
    rating: np.ndarray | None = None
    user_labels: np.ndarray | None = field(default=None, repr=False)
    item_labels: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, size in (("user", self.num_users), ("item", self.num_items)):
            if size < 2:
                raise InteractionsError(f"`num_{name}s` must be at least 2, got {size}; at least 2 {name}s are needed")
            object.__setattr__(self, name, _codes(getattr(self, name), name, size))
            labels = getattr(self, f"{name}_labels")
            if labels is not None and len(labels) != size:
                raise InteractionsError(f"`{name}_labels` must have length {size}, got {len(labels)}")
        if self.timestamp is not None:
            object.__setattr__(self, "timestamp", np.asarray(self.timestamp, dtype=np.float64))
            _check_values(self.timestamp, "timestamp", np.isfinite(self.timestamp) & (self.timestamp >= 0))
        if self.rating is not None:
            object.__setattr__(self, "rating", np.asarray(self.rating, dtype=np.float32))
            _check_values(self.rating, "rating", ~np.isinf(self.rating))
        for name in ("item", "timestamp", "rating"):
            values = getattr(self, name)
            if values is not None and values.shape != self.user.shape:
                raise InteractionsError(f"`{name}` has shape {values.shape}, but `user` has {self.user.shape}")

    def __len__(self) -> int:
        return len(self.user)

    def __repr__(self) -> str:
        optional = [name for name in ("timestamp", "rating") if getattr(self, name) is not None]
        return f"Interactions({len(self)} of {self.num_users} users and {self.num_items} items; columns {optional})"

    @classmethod
    def from_arrays(cls, user: Any, item: Any, *, timestamp: Any = None, rating: Any = None) -> Interactions:
        """Build from raw id arrays.

        Args:
          user: [N] raw user ids: integers, strings or any hashables.
          item: [N] raw item ids.
          timestamp: [N] numbers in seconds, datetimes or ISO 8601 text; all equal means "no times".
          rating: [N] numbers, NaN where unrated.

        Returns:
          The interactions, in the order of the rows given.

        Raises:
          InteractionsError: empty, unequal lengths, null ids, bad times or ratings, fewer than 2 users or items.

        Example:
          >>> Interactions.from_arrays([1, 2], ["x", "y"], timestamp=["2020-01-01", "2020-01-02"])
          Interactions(2 of 2 users and 2 items; columns ['timestamp'])
        """
        names = {role: role for role in DEFAULT_COLUMNS}
        return cls._from_raw(
            RawColumns(
                user=one_dimensional(user, "user"),
                item=one_dimensional(item, "item"),
                timestamp=None if timestamp is None else one_dimensional(timestamp, "timestamp"),
                rating=None if rating is None else one_dimensional(rating, "rating"),
                names=names,
            )
        )

    @classmethod
    def from_frame(cls, frame: Any, *, columns: Mapping[str, str | None] | None = None) -> Interactions:
        """Build from a pandas or Polars data frame.

        Args:
          frame: the table; columns that play no role are ignored.
          columns: role to column name, e.g. {"user": "customer"}; a role that is left out is found by its default
            name (user_id, item_id, timestamp, rating) or the only synonym; None ignores timestamp or rating.

        Returns:
          The interactions, in the order of the frame's rows.

        Raises:
          InteractionsError: as `from_arrays`, or a column is missing or ambiguous.

        Example:
          >>> import polars
          >>> frame = polars.DataFrame({"user_id": [1, 1, 2], "movieId": [5, 6, 6]})
          >>> Interactions.from_frame(frame)
          Interactions(3 of 2 users and 2 items; columns [])
        """
        if not hasattr(frame, "columns") or not hasattr(frame, "__getitem__") or not hasattr(frame, "shape"):
            raise InteractionsError(f"`frame` must be a pandas or Polars data frame, got {type(frame).__name__}")
        return cls._from_raw(tables.raw_columns(frame, resolve_columns(list(frame.columns), columns)))

    @classmethod
    def from_sparse(cls, matrix: Any) -> Interactions:
        """Build from a SciPy sparse matrix [num_users, num_items]; rows and columns are the codes.

        Values become ratings unless all are one. Stored zeros are no interactions. Duplicate entries of a COO matrix
        stay separate interactions. Rows are ordered by (user, item).

        Raises:
          InteractionsError: not a sparse matrix, no entries, or fewer than 2 rows or columns.

        Example:
          >>> import scipy.sparse
          >>> Interactions.from_sparse(scipy.sparse.csr_array([[1, 0], [1, 1]])).item.tolist()
          [0, 0, 1]
        """
        if not hasattr(matrix, "tocoo") or len(getattr(matrix, "shape", ())) != 2:
            raise InteractionsError(
                f"`matrix` must be a SciPy sparse matrix with 2 dimensions, got {type(matrix).__name__}"
            )
        coo = matrix.tocoo()
        stored = coo.data != 0
        if not stored.any():
            raise InteractionsError("`matrix` has no entries; at least 2 users and 2 items are needed")
        user, item, values = coo.row[stored], coo.col[stored], coo.data[stored].astype(np.float32)
        order = np.lexsort((item, user))
        return cls(
            user=user[order],
            item=item[order],
            num_users=int(matrix.shape[0]),
            num_items=int(matrix.shape[1]),
            rating=None if (values == 1).all() or np.isnan(values).all() else values[order],
        )

    @classmethod
    def from_dataset(cls, dataset: Any, *, columns: Mapping[str, str | None] | None = None) -> Interactions:
        """Build from one split of a Hugging Face `datasets.Dataset`; columns as in `from_frame`.

        Raises:
          InteractionsError: several splits, a streamed dataset, or as `from_frame`.
        """
        if isinstance(dataset, Mapping):
            raise InteractionsError(f"`dataset` holds splits {list(dataset)}; pass one, such as dataset['train']")
        if not hasattr(dataset, "to_pandas") or not hasattr(dataset, "column_names"):
            raise InteractionsError(
                f"`dataset` must be a datasets.Dataset (not streamed), got {type(dataset).__name__}"
            )
        names = resolve_columns(list(dataset.column_names), columns)
        frame = dataset.select_columns(list(dict.fromkeys(names.values()))).with_format(None).to_pandas()
        return cls._from_raw(tables.raw_columns(frame, names))

    @classmethod
    def read(cls, path: str | Path, *, columns: Mapping[str, str | None] | None = None) -> Interactions:
        """Read a whole parquet, CSV or TSV file; the same as `scan(path).collect()`."""
        return cls.scan(path, columns=columns).collect()

    @classmethod
    def scan(cls, path: str | Path, *, columns: Mapping[str, str | None] | None = None) -> InteractionsScan:
        """Open a parquet, CSV or TSV file lazily: the schema is read and checked, the rows are not."""
        return InteractionsScan(Path(path), columns=columns)

    @classmethod
    def _from_raw(cls, raw: RawColumns) -> Interactions:
        encoded = encode_columns(raw)
        return cls(
            user=encoded.user,
            item=encoded.item,
            num_users=len(encoded.user_labels),
            num_items=len(encoded.item_labels),
            timestamp=encoded.timestamp,
            rating=encoded.rating,
            user_labels=encoded.user_labels,
            item_labels=encoded.item_labels,
        )

    def select(self, mask_or_index: Any) -> Interactions:
        """Keep some rows, in the same code space.

        Args:
          mask_or_index: bool [N], or row numbers [K] in the order wanted. The result may be empty.

        Example:
          >>> table = Interactions.from_arrays([1, 1, 2], [5, 6, 6])
          >>> len(table.select(table.user == 0)), table.select([2]).num_users
          (2, 2)
        """
        index = np.asarray(mask_or_index)
        if index.size == 0 and index.dtype.kind == "f":
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "biu":
            raise InteractionsError(
                f"`mask_or_index` must be one-dimensional bool or int, got {index.dtype} {index.shape}"
            )
        if index.dtype.kind == "b" and len(index) != len(self):
            raise InteractionsError(f"`mask_or_index` has {len(index)} values for {len(self)} interactions")
        if index.dtype.kind != "b" and index.size and not (-len(self) <= index.min() and index.max() < len(self)):
            raise InteractionsError(
                f"`mask_or_index` must be within 0..{len(self) - 1}, got {index.min()}..{index.max()}"
            )
        return Interactions(
            user=self.user[index],
            item=self.item[index],
            num_users=self.num_users,
            num_items=self.num_items,
            timestamp=None if self.timestamp is None else self.timestamp[index],
            rating=None if self.rating is None else self.rating[index],
            user_labels=self.user_labels,
            item_labels=self.item_labels,
        )

    def compact(self) -> Interactions:
        """Re-code so that every user and item occurs; codes keep their order, raw ids stay attached.

        Raises:
          InteractionsError: fewer than 2 users or items occur.
        """
        if len(self) == 0:
            raise InteractionsError("there are no interactions to compact; at least 2 users and 2 items are needed")
        user, users = dense_codes(self.user)
        item, items = dense_codes(self.item)
        return Interactions(
            user=user,
            item=item,
            num_users=len(users),
            num_items=len(items),
            timestamp=self.timestamp,
            rating=self.rating,
            user_labels=self.user_ids(users),
            item_labels=self.item_ids(items),
        )

    def deduplicate(self) -> Interactions:
        """Keep one row of each (user, item): the earliest, and the first row where times are equal or missing.

        Example:
          >>> table = Interactions.from_arrays([1, 1, 2], [5, 5, 6], timestamp=[9, 4, 7])
          >>> table.deduplicate().timestamp.tolist()
          [4.0, 7.0]
        """
        if len(self) == 0:
            return self
        pair = self.user.astype(np.int64) * self.num_items + self.item
        order = np.argsort(pair, kind="stable") if self.timestamp is None else np.lexsort((self.timestamp, pair))
        first = np.ones(len(self), dtype=bool)
        first[1:] = pair[order[1:]] != pair[order[:-1]]
        return self if first.all() else self.select(np.sort(order[first]))

    def positives(self, min_rating: float | None = None) -> Interactions:
        """Keep what users liked: rating >= min_rating or, by default, rating > 0 or unrated.

        Raises:
          InteractionsError: `min_rating` is given but there are no ratings.
        """
        if self.rating is None:
            if min_rating is not None:
                raise InteractionsError(
                    f"`min_rating` is {min_rating}, but there are no ratings; pass None to keep all"
                )
            return self
        if min_rating is None:
            return self.select((self.rating > 0) | np.isnan(self.rating))
        return self.select(self.rating >= min_rating)

    def user_ids(self, codes: Any) -> np.ndarray:
        """Return the raw ids of user codes."""
        return _labels(codes, self.user_labels, self.num_users, "user")

    def item_ids(self, codes: Any) -> np.ndarray:
        """Return the raw ids of item codes."""
        return _labels(codes, self.item_labels, self.num_items, "item")


class InteractionsScan:
    """Refer to a table on disk that may be larger than memory; made by `Interactions.scan`.

    Opening reads the schema only. Values are validated when they are read.

    Args:
      path: parquet (also a glob), CSV or TSV file.
      columns: role to column name, as in `Interactions.from_frame`.

    Raises:
      InteractionsError: missing file, unknown suffix, missing or ambiguous columns.
    """

    def __init__(self, path: str | Path, *, columns: Mapping[str, str | None] | None = None) -> None:
        self.path = Path(path)
        self.columns: dict[str, str] = resolve_columns(tables.column_names(self.path), columns)

    def __repr__(self) -> str:
        return f"InteractionsScan({str(self.path)!r}, columns={self.columns})"

    def count(self) -> int:
        """Count the interactions in one streamed pass."""
        return tables.count_rows(self.path)

    def sample(self, max_interactions: int, seed: int = 0) -> Interactions:
        """Read whole users, chosen by a seeded hash, with at most `max_interactions` rows, in one streamed pass.

        The same file, seed and Polars version give the same sample. Everything is read if it fits.

        Raises:
          InteractionsError: `max_interactions` cannot hold 2 users, or the rows read are invalid.
        """
        if max_interactions < 2:
            raise InteractionsError(f"`max_interactions` must be at least 2, got {max_interactions}")
        return Interactions._from_raw(tables.sample_columns(self.path, self.columns, max_interactions, seed))

    def stream(self, compute: Callable[[polars.LazyFrame], _Result]) -> _Result:
        """Run `compute` on all rows as a lazy table, with columns "user", "item" and, if there are times, "timestamp".

        Users and items are integers, or hashes of ids that were none; times are seconds.
        """
        return tables.stream_columns(self.path, self.columns, compute)

    def collect(self) -> Interactions:
        """Read the whole table into memory."""
        return Interactions._from_raw(tables.read_columns(self.path, self.columns))


def _codes(values: Any, name: str, size: int) -> np.ndarray:
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, dtype=np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InteractionsError(
            f"`{name}` must be a one-dimensional integer array of codes, got {array.dtype} {array.shape}; "
            "use Interactions.from_arrays for raw ids"
        )
    bad = (array < 0) | (array >= size)
    if bad.any():
        row = int(np.argmax(bad))
        raise InteractionsError(f"`{name}`, row {row}: code {array[row]} is not within 0..{size - 1}")
    return array.astype(np.int32, copy=False)


def _check_values(values: np.ndarray, name: str, good: np.ndarray) -> None:
    if not good.all():
        row = int(np.argmin(good))
        allowed = "a finite number that is not negative" if name == "timestamp" else "a finite number or NaN"
        raise InteractionsError(f"`{name}`, row {row}: must be {allowed}, got {values[row]}")


def _labels(codes: Any, labels: np.ndarray | None, size: int, name: str) -> np.ndarray:
    index = np.asarray(codes, dtype=np.int64)
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise InteractionsError(f"{name} codes must be within 0..{size - 1}, got {index.min()}..{index.max()}")
    return index if labels is None else labels[index]
