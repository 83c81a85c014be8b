"""Row-level splits of interactions: which rows are training, validation and test.

Both return row indices in order of time (row order where there are no times): training rows without repeats, then
validation and test rows with users and items that training knows and pairs that no earlier part has.
"""

from __future__ import annotations

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row indices of training, validation and test."""


def pair_codes(interactions: Interactions, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """(user, item) as one int64 per row."""
    return interactions.user[rows].astype(np.int64) * interactions.num_items + interactions.item[rows]


def is_among(values: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Whether each value occurs in `pool`, bool; by one sort, which beats hashing for pair codes."""
    if len(pool) == 0:
        return np.zeros(len(values), dtype=bool)
    pool = np.sort(pool)
    return pool[np.minimum(np.searchsorted(pool, values), len(pool) - 1)] == values


def _first_occurrences(interactions: Interactions, rows: np.ndarray) -> np.ndarray:
    """Keep of `rows` the first of each pair, and put them in order of time where there are times."""
    if interactions.timestamp is not None:
        rows = rows[np.argsort(interactions.timestamp[rows], kind="stable")]
    _, first = np.unique(pair_codes(interactions, rows), return_index=True)
    return rows[np.sort(first)]


def _prune(interactions: Interactions, rows: np.ndarray, minima: tuple[int, int]) -> np.ndarray:
    """Drop users and items with fewer rows than `minima` until none is left to drop."""
    while True:
        user, item = interactions.user[rows], interactions.item[rows]
        enough_user = np.bincount(user, minlength=interactions.num_users) >= minima[0]
        enough_item = np.bincount(item, minlength=interactions.num_items) >= minima[1]
        keep = enough_user[user] & enough_item[item]
        if keep.all():
            return rows
        rows = rows[keep]


def _warm(interactions: Interactions, rows: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Keep of `rows` those whose user and item both occur in `train`."""
    known_user = np.zeros(interactions.num_users, dtype=bool)
    known_item = np.zeros(interactions.num_items, dtype=bool)
    known_user[interactions.user[train]] = True
    known_item[interactions.item[train]] = True
    return rows[known_user[interactions.user[rows]] & known_item[interactions.item[rows]]]


def split_by_time(
    interactions: Interactions, validation_fraction: float, test_fraction: float, minima: tuple[int, int]
) -> Parts:
    """Cut at two times shared by everyone, the possible ones closest to the wanted shares of rows.

    Args:
        interactions: rows with timestamps.
        validation_fraction: share of rows wanted in validation.
        test_fraction: share of rows wanted in test.
        minima: fewest distinct items of a user and users of an item, counted on training.

    Raises:
        InvalidArgumentError: if there are fewer than three distinct times.
    """
    time = interactions.timestamp
    assert time is not None
    values, counts = np.unique(time, return_counts=True)
    if len(values) < 3:
        raise InvalidArgumentError(
            f"`split`='time' needs at least 3 distinct timestamps, got {len(values)}; pass split='leave-last-out'"
        )
    share = np.cumsum(counts) / len(time)
    last_train = int(np.abs(share[:-2] - (1.0 - validation_fraction - test_fraction)).argmin())
    last_validation = last_train + 1 + int(np.abs(share[last_train + 1 : -1] - (1.0 - test_fraction)).argmin())
    part = (time > values[last_train]).astype(np.int8) + (time > values[last_validation])
    train = _prune(interactions, _first_occurrences(interactions, np.flatnonzero(part == 0)), minima)
    evaluated = []
    earlier = pair_codes(interactions, train)
    for index in (1, 2):
        rows = _warm(interactions, _first_occurrences(interactions, np.flatnonzero(part == index)), train)
        rows = rows[~is_among(pair_codes(interactions, rows), earlier)]
        earlier = np.concatenate([earlier, pair_codes(interactions, rows)])
        evaluated.append(rows)
    return train, evaluated[0], evaluated[1]


def split_last_out(interactions: Interactions, minima: tuple[int, int], seed: int) -> Parts:
    """Take each user's last item for test and the one before for validation, given at least three distinct ones.

    Args:
        interactions: rows, with or without timestamps.
        minima: fewest distinct items of a user and users of an item, counted on the whole history.
        seed: of the order drawn where there are no times and the rows are merely sorted by item.
    """
    rows = np.arange(len(interactions))
    if interactions.timestamp is None and _rows_sorted_by_item(interactions):
        rows = np.random.default_rng(seed).permutation(rows)
    rows = _prune(interactions, _first_occurrences(interactions, rows), minima)
    rows = rows[np.argsort(interactions.user[rows], kind="stable")]
    counts = np.bincount(interactions.user[rows], minlength=interactions.num_users)
    ends = np.repeat(np.cumsum(counts), counts)
    from_end = np.where(np.repeat(counts, counts) >= 3, ends - 1 - np.arange(len(rows)), 2)
    train = rows[from_end >= 2]
    return train, _warm(interactions, rows[from_end == 1], train), _warm(interactions, rows[from_end == 0], train)


def _rows_sorted_by_item(interactions: Interactions) -> bool:
    """Whether each user's rows are in order of item code, so that the last row says nothing about time."""
    order = np.argsort(interactions.user, kind="stable")
    user, item = interactions.user[order], interactions.item[order]
    step = np.diff(item)[user[1:] == user[:-1]]
    return len(step) > 0 and bool((step >= 0).all() or (step <= 0).all())
