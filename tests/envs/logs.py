"""Logs and domains to test with: random ones by seed, and ones made by hand."""

from __future__ import annotations

import numpy as np

from envs.domains import Domain
from metalearn.interactions import Interactions


def random_log(
    *,
    seed: int = 0,
    users: int = 80,
    items: int = 40,
    rows: int = 2000,
    timed: bool = True,
    distinct_times: int = 10_000,
) -> Interactions:
    rng = np.random.default_rng(seed)
    return Interactions(
        user=rng.integers(0, users, rows).astype(np.int32),
        item=np.minimum(rng.geometric(0.08, rows) - 1, items - 1).astype(np.int32),
        num_users=users,
        num_items=items,
        timestamp=rng.integers(0, distinct_times, rows).astype(np.float64) if timed else None,
    )


def hand_made(
    train: list[tuple[int, int, float]], validation: list[tuple[int, int, float]], test=(), **changes
) -> Domain:
    def part(rows) -> Interactions:
        user, item, time = np.array([*rows]).reshape(-1, 3).T
        return Interactions(
            user=user.astype(np.int32), item=item.astype(np.int32), num_users=4, num_items=5, timestamp=time
        )

    parts = {"train": part(train), "validation": part(validation), "test": part(test)}
    return Domain(**{"name": "hand-made", "split": "time", **parts, **changes})
