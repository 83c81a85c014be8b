"""What is counted for a private profile, before noise: each statistic with a bound on what one user can change.

Neighbouring tables differ in one user, all of whose interactions are there or are not. The catalogue is public.

Shapes: N interactions, A bins of activity, T thresholds of popularity.
"""

from __future__ import annotations

import numpy as np

from metalearn.interactions import Interactions

_RATIO = 2.0**0.5


def _geometric(highest: int) -> np.ndarray:
    """Returns 1 to 8, and from there on integers in a ratio of about √2, up to `highest`."""
    further = 8.0 * _RATIO ** np.arange(1, 2 * (highest.bit_length() - 4) + 1)
    return np.concatenate([np.arange(1, 9), np.round(further).astype(np.int64)])


ACTIVITY_BINS = _geometric(2**16)
"""int64 [A], the fewest interactions of a user in each bin; fixed, so that no bin tells of the data."""
POPULARITY_THRESHOLDS = _geometric(2**26)
"""int64 [T], numbers of interactions of an item."""

ACTIVITY_SENSITIVITY = 1
"""L1: a user is in one bin."""


def activity_histogram(interactions: Interactions) -> np.ndarray:
    """Counts users by how many interactions they have, int64 [A]; one user changes it by `ACTIVITY_SENSITIVITY`, L1."""
    counts = np.bincount(interactions.user)
    bins = np.searchsorted(ACTIVITY_BINS, counts[counts > 0], side="right") - 1
    return np.bincount(bins, minlength=len(ACTIVITY_BINS))


def bounded(interactions: Interactions, limit: int, priority: np.ndarray) -> Interactions:
    """Keeps at most `limit` interactions of each user: those of the lowest priority numbers.

    Args:
      interactions: the table.
      limit: at least 1.
      priority: [N] drawn at random, independently of the data: then each user's are a uniform sample.
    """
    order = np.lexsort((priority, interactions.user))
    users = interactions.user[order]
    first = np.searchsorted(users, users, side="left")
    return interactions.select(np.sort(order[np.arange(len(users)) - first < limit]))


def popularity_survival(interactions: Interactions) -> np.ndarray:
    """Counts the items that have as many interactions as each of `POPULARITY_THRESHOLDS`, or more; int64 [T].

    One more interaction lifts one item over one threshold at most. So a user with at most `limit` interactions changes
    the vector by at most `limit`, L1, however many thresholds there are.
    """
    counts = np.bincount(interactions.item)
    return len(counts) - np.searchsorted(np.sort(counts), POPULARITY_THRESHOLDS, side="left")
