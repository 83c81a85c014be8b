"""Slices of a domain: many smaller and different ones out of each real one, to meta-train on."""

from __future__ import annotations

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

MIN_USERS = 48
"""Fewest users of a slice with enough distinct items to be split."""
MIN_ITEMS = 32
"""Fewest items of a slice."""
MIN_HISTORY = 3
"""Distinct items that a user needs to count towards `MIN_USERS`: one each for training, validation and test."""
_ATTEMPTS = 40


def draw_slice(
    interactions: Interactions,
    *,
    max_users: int,
    max_items: int,
    key: np.random.Generator,
    min_users: int = MIN_USERS,
    min_items: int = MIN_ITEMS,
) -> Interactions:
    """Draw a random slice of a domain.

    Each of these is drawn anew: a period (a window with 30 to 100 % of the rows, in three of ten slices with times);
    a popularity band of items (head, random or tail); random users among those active in the band; sparsification
    (20 to 100 % of the rows kept, in three of ten slices); k-core pruning with k in {1, 2, 3, 5}. Numbers of users
    and items are log-uniform up to their maxima. A draw with too little left is thrown away and drawn again.

    Args:
        interactions: positives of one domain.
        max_users: most users of the slice.
        max_items: most items of the slice.
        key: generator; two with equal state give the same slice.
        min_users: fewest users with at least 3 distinct items.
        min_items: fewest items.

    Returns:
        Compacted interactions in their original order; raw ids stay attached.

    Raises:
        InvalidArgumentError: if the maxima lie below the minima, or 40 draws left too little.

    Example:
        >>> from envs.simulated import SimulatedPrior, simulate
        >>> source = simulate(SimulatedPrior(users=(300, 300), items=(200, 200), history=(20.0, 20.0)), seed=0)
        >>> piece = draw_slice(source, max_users=100, max_items=80, key=np.random.default_rng(1))
        >>> 48 <= piece.num_users <= 100 and 32 <= piece.num_items <= 80
        True
    """
    for argument, most, least in (("max_users", max_users, min_users), ("max_items", max_items, min_items)):
        if most < least:
            raise InvalidArgumentError(f"`{argument}` must be at least {least}, got {most}")
    for attempt in range(_ATTEMPTS):
        # Later attempts draw milder slices, so that small or sparse domains succeed as well.
        rows = _draw_rows(interactions, max_users, max_items, key, min_users, min_items, mild=attempt >= _ATTEMPTS // 2)
        if _is_enough(interactions, rows, min_users, min_items):
            return interactions.select(rows).compact()
    raise InvalidArgumentError(
        f"no slice of `interactions` ({len(interactions)} rows, {interactions.num_users} users, "
        f"{interactions.num_items} items) with {min_users} users of {MIN_HISTORY} distinct items and {min_items} items "
        f"in {_ATTEMPTS} draws; raise `max_users` or `max_items`, lower the minima, or leave this domain out"
    )


def crop(interactions: Interactions, *, max_users: int, max_items: int, key: np.random.Generator) -> Interactions:
    """Crop a domain to a size and nothing else: random users among the active, the most popular items.

    Keeps what full-size domains are like: histories whole, density as it is.

    Args:
        interactions: positives of one domain.
        max_users: most users.
        max_items: most items.
        key: generator.

    Returns:
        Compacted interactions in their original order.
    """
    rows = _draw_rows(interactions, max_users, max_items, key, MIN_USERS, MIN_ITEMS, mild=True)
    return interactions.select(rows).compact()


def _draw_rows(
    interactions: Interactions,
    max_users: int,
    max_items: int,
    key: np.random.Generator,
    min_users: int,
    min_items: int,
    *,
    mild: bool,
) -> np.ndarray:
    num_users = max_users if mild else _log_uniform(key, min(2 * min_users, max_users), max_users)
    num_items = max_items if mild else _log_uniform(key, min(2 * min_items, max_items), max_items)
    rows = np.arange(len(interactions))
    if interactions.timestamp is not None and not mild and key.random() < 0.3:
        rows = _period(interactions, rows, key)
    band = "head" if mild else str(key.choice(["head", "random", "tail"], p=[0.4, 0.35, 0.25]))
    rows = _items(interactions, rows, num_items, band, key)
    if not mild and key.random() < 0.3:
        rows = rows[key.random(len(rows)) < key.uniform(0.2, 1.0)]
    rows = _users(interactions, rows, num_users, key)
    return _core(interactions, rows, 1 if mild else int(key.choice([1, 2, 3, 5])))


def _log_uniform(key: np.random.Generator, low: int, high: int) -> int:
    return round(float(np.exp(key.uniform(np.log(low), np.log(high)))))


def _period(interactions: Interactions, rows: np.ndarray, key: np.random.Generator) -> np.ndarray:
    """Keep a window of time with a random share of the rows."""
    assert interactions.timestamp is not None
    time = interactions.timestamp[rows]
    share = key.uniform(0.3, 1.0)
    start = key.uniform(0.0, 1.0 - share)
    low, high = np.quantile(time, [start, start + share])
    return rows[(time >= low) & (time <= high)]


def _items(
    interactions: Interactions, rows: np.ndarray, num_items: int, band: str, key: np.random.Generator
) -> np.ndarray:
    """Keep the rows of `num_items` items: the most popular, random ones, or the least popular with 3 rows or more."""
    counts = np.bincount(interactions.item[rows], minlength=interactions.num_items)
    order = np.lexsort((key.random(len(counts)), -counts))
    order = order[counts[order] > 0]
    if band == "random":
        order = key.permutation(order)
    elif band == "tail":
        order = order[counts[order] >= 3][::-1]
    chosen = np.zeros(interactions.num_items, dtype=bool)
    chosen[order[:num_items]] = True
    return rows[chosen[interactions.item[rows]]]


def _users(interactions: Interactions, rows: np.ndarray, num_users: int, key: np.random.Generator) -> np.ndarray:
    """Keep the rows of `num_users` random users, of those with enough rows where there are some."""
    counts = np.bincount(interactions.user[rows], minlength=interactions.num_users)
    active = np.flatnonzero(counts >= MIN_HISTORY)
    chosen = np.zeros(interactions.num_users, dtype=bool)
    chosen[key.choice(active, size=min(num_users, len(active)), replace=False)] = True
    return rows[chosen[interactions.user[rows]]]


def _core(interactions: Interactions, rows: np.ndarray, k: int) -> np.ndarray:
    """Drop users and items with fewer than k rows until none is left to drop."""
    while k > 1:
        user, item = interactions.user[rows], interactions.item[rows]
        keep = (np.bincount(user, minlength=interactions.num_users) >= k)[user]
        keep &= (np.bincount(item, minlength=interactions.num_items) >= k)[item]
        if keep.all():
            break
        rows = rows[keep]
    return rows


def _is_enough(interactions: Interactions, rows: np.ndarray, min_users: int, min_items: int) -> bool:
    pairs = np.sort(interactions.user[rows].astype(np.int64) * interactions.num_items + interactions.item[rows])
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    num_users = (np.bincount(pairs // interactions.num_items) >= MIN_HISTORY).sum()
    num_items = (np.bincount(pairs % interactions.num_items) > 0).sum()
    return bool(num_users >= min_users and num_items >= min_items)
