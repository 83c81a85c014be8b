"""Cohorts: groups of users by activity and of items by popularity, to report metrics by.

Shape legend: U users, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.domains import Domain


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohorts:
    """Groups of users and items to report metrics by.

    Args:
        user: int8 [U], index into `USER_COHORTS`.
        item: int8 [I], index into `ITEM_COHORTS`.
    """

    user: np.ndarray
    item: np.ndarray


USER_COHORTS = ("light", "medium", "heavy")
ITEM_COHORTS = ("head", "mid", "tail")


def cohorts(domain: Domain) -> Cohorts:
    """Group users by activity and items by popularity, both counted on training.

    Users: terciles of the number of interactions; equal counts stay together, so groups can differ in size.
    Items: in order of popularity, the head receives the first third of interactions, mid the second, tail the last.
    """
    activity = np.bincount(domain.train.user, minlength=domain.num_users)
    user = np.searchsorted(np.quantile(activity, [1 / 3, 2 / 3]), activity, side="left")
    popularity = np.bincount(domain.train.item, minlength=domain.num_items)
    order = np.argsort(-popularity, kind="stable")
    before = np.cumsum(popularity[order]) - popularity[order]
    item = np.empty(domain.num_items, dtype=np.int8)
    item[order] = np.minimum(3 * before // max(int(popularity.sum()), 1), 2)
    return Cohorts(user=user.astype(np.int8), item=item)
