"""Size: how many users, items and interactions there are, and how densely they meet. All are natural logarithms."""

from __future__ import annotations

import math

from metalearn.profiles.canonical import CanonicalTable

NAMES = (
    "log_num_users",
    "log_num_items",
    "log_num_interactions",
    "log_density",
    "log_users_per_item",
    "log_interactions_per_user",
    "log_interactions_per_item",
)


def size_features(table: CanonicalTable) -> dict[str, float]:
    """Compute the size family; users and interactions of a sampled table are scaled up to the domain."""
    users = math.log(table.num_users / table.sampled_fraction)
    items = math.log(table.num_items)
    interactions = math.log(len(table.user) / table.sampled_fraction)
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
