"""Each user's last items, for recommenders that read sequences."""

from __future__ import annotations

import numpy as np


def histories(user: np.ndarray, item: np.ndarray, *, num_users: int, length: int) -> np.ndarray:
    """Collects each user's last items in the order of the rows.

    Args:
      user, item: int [N] rows in order.
      num_users: U.
      length: L.

    Returns:
      int32 [U, L], the most recent item last, -1 before the first.

    Example:
      >>> histories(np.array([0, 1, 0, 0]), np.array([5, 6, 7, 8]), num_users=2, length=2).tolist()
      [[7, 8], [-1, 6]]
    """
    table = np.full((num_users, length), -1, np.int32)
    order = np.argsort(user, kind="stable")
    counts = np.bincount(user, minlength=num_users)
    from_end = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(user))
    recent = from_end < length
    table[user[order][recent], length - 1 - from_end[recent]] = item[order][recent]
    return table
