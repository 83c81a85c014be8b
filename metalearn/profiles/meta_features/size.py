"""Size: how many users, items and interactions there are, and how densely they meet. All are natural logarithms."""

from __future__ import annotations

import math

from metalearn.profiles.totals import DomainTotals

NAMES = (
    "log_num_users",
    "log_num_items",
    "log_num_interactions",
    "log_density",
    "log_users_per_item",
    "log_interactions_per_user",
    "log_interactions_per_item",
)


def size_features(totals: DomainTotals) -> dict[str, float]:
    """Compute the size family."""
    users, items, interactions = map(math.log, (totals.num_users, totals.num_items, totals.num_interactions))
    values = (
        users,
        items,
        interactions,
        interactions - users - items,
        users - items,
        interactions - users,
        interactions - items,
    )
    return dict(zip(NAMES, values, strict=True))
