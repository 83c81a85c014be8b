"""The canonical table that meta-features are computed on: compact codes, one order of rows, whole users at most.

Row order of the source never matters: rows are sorted by (user, item, timestamp, rating) before anything is summed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions


@dataclass(frozen=True, kw_only=True, eq=False)
class CanonicalTable:
    """Hold the sorted, compact columns and what every family of meta-features needs of them.

    Args:
      user: int32 [N], ascending; every code in 0..num_users-1 occurs.
      item: int32 [N]; every code in 0..num_items-1 occurs.
      user_counts: int64 [num_users], interactions per user.
      item_counts: int64 [num_items], interactions per item.
      first_of_pair: bool [N], true at the first row of each distinct (user, item).
      timestamp: float64 [N], or None if there are no times or all are equal.
      rating: float32 [N], or None if there are no ratings.
      sampled_fraction: share of the domain's interactions that this table holds, in (0, 1].
    """

    user: np.ndarray
    item: np.ndarray
    user_counts: np.ndarray
    item_counts: np.ndarray
    first_of_pair: np.ndarray
    timestamp: np.ndarray | None
    rating: np.ndarray | None
    sampled_fraction: float = 1.0

    @property
    def num_users(self) -> int:
        return len(self.user_counts)

    @property
    def num_items(self) -> int:
        return len(self.item_counts)

    @cached_property
    def time_order(self) -> np.ndarray:
        """Rows in order of time, those of one time in the order of the table; only where there are times."""
        assert self.timestamp is not None
        return np.argsort(self.timestamp, kind="stable")


def canonical_table(interactions: Interactions, *, sampled_fraction: float = 1.0) -> CanonicalTable:
    """Sort and compact the interactions.

    Raises:
      InteractionsError: empty, or fewer than 2 users or items occur.
    """
    table = interactions.compact()
    pair = table.user.astype(np.int64) * table.num_items + table.item
    order = np.argsort(pair)
    pair = pair[order]
    same = pair[1:] == pair[:-1]
    if same.any():
        _order_repeats(order, same, pair, table)
    timestamp = None if table.timestamp is None else table.timestamp[order] + 0.0
    if timestamp is not None and timestamp.min() == timestamp.max():
        timestamp = None
    rating = None if table.rating is None else table.rating[order] + np.float32(0)
    if rating is not None and np.isnan(rating).all():
        rating = None
    return CanonicalTable(
        user=table.user[order],
        item=table.item[order],
        user_counts=np.bincount(table.user, minlength=table.num_users),
        item_counts=np.bincount(table.item, minlength=table.num_items),
        first_of_pair=np.concatenate([[True], ~same]),
        timestamp=timestamp,
        rating=rating,
        sampled_fraction=sampled_fraction,
    )


def _order_repeats(order: np.ndarray, same: np.ndarray, pair: np.ndarray, table: Interactions) -> None:
    """Sort the rows of equal (user, item) by time and rating, in place; the other rows are in order already."""
    repeated = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    rows = order[repeated]
    keys = [column[rows] for column in (table.rating, table.timestamp) if column is not None]
    order[repeated] = rows[np.lexsort((*keys, pair[repeated]))]


def fingerprint(table: CanonicalTable) -> str:
    """Return the SHA-256 of the canonical content, as 64 hexadecimal digits; the order of source rows has no effect."""
    header = (
        f"metalearn-domain-1 {len(table.user)} {table.num_users} {table.num_items} "
        f"{table.timestamp is not None} {table.rating is not None} {table.sampled_fraction!r}\n"
    )
    digest = hashlib.sha256(header.encode())
    for column, dtype in ((table.user, "<i4"), (table.item, "<i4"), (table.timestamp, "<f8"), (table.rating, "<f4")):
        if column is not None:
            # Any NaN counts as the same "unrated", whatever its bits.
            plain = np.where(np.isnan(column), np.float32(np.nan), column) if column.dtype == np.float32 else column
            digest.update(plain.astype(dtype).tobytes())
    return digest.hexdigest()


def sample_users(interactions: Interactions, max_interactions: int, seed: int) -> Interactions:
    """Keep whole users, chosen by a seeded hash of their code, with at most `max_interactions` rows.

    A user with more than `max_interactions` rows cannot be kept whole and is left out.

    Raises:
      InvalidArgumentError: fewer than 2 users fit.
    """
    counts = np.bincount(interactions.user, minlength=interactions.num_users)
    order = np.argsort(_hash(np.arange(interactions.num_users, dtype=np.uint64), seed), kind="stable")
    ordered = np.where(counts[order] > max_interactions, 0, counts[order])
    kept = order[(np.cumsum(ordered) <= max_interactions) & (ordered > 0)]
    if len(kept) < 2:
        raise InvalidArgumentError(
            f"`max_interactions`={max_interactions} is too small to hold 2 whole users; pass a larger number"
        )
    chosen = np.zeros(interactions.num_users, dtype=bool)
    chosen[kept] = True
    return interactions.select(chosen[interactions.user])


def _hash(values: np.ndarray, seed: int) -> np.ndarray:
    # SplitMix64 (Steele, Lea and Flood 2014): the same sample on every platform.
    mixed = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
