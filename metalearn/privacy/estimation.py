"""From noisy statistics to a profile: nothing here sees the data, so nothing here costs privacy.

Shapes: A bins of activity, T thresholds of popularity, U users, I items.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, isotonic_regression

from metalearn.privacy.statistics import ACTIVITY_BINS, POPULARITY_THRESHOLDS
from metalearn.profiles import META_FEATURE_NAMES, DomainProfile
from metalearn.profiles.meta_features import distribution, size
from metalearn.profiles.totals import DomainTotals

ESTIMATED = (*size.NAMES, *distribution.NAMES)
"""The meta-features of a private profile; all others are undefined in it."""

_DEVIATIONS = 3.0
"""A tail of a distribution that lies below so many standard deviations of its noise is not told from none."""
_STEEPEST = 3.0
"""Exponent of the steepest tail that item counts are continued with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisyStatistics:
    """Holds what was released.

    Args:
      activity: float64 [A], users by activity.
      activity_deviation: standard deviation of the noise in each; 0 without noise.
      survival: float64 [T], items by popularity among the kept interactions.
      survival_deviation: likewise.
      limit: interactions that were kept of a user at the most.
      num_items: items of the catalogue.
    """

    activity: np.ndarray
    activity_deviation: float
    survival: np.ndarray
    survival_deviation: float
    limit: int
    num_items: int


def private_profile(statistics: NoisyStatistics) -> DomainProfile:
    """Computes the meta-features that follow from counts, from counts that fit the statistics.

    Returns:
      A profile with the families of size and distribution; its fingerprint is a hash of the noisy statistics.
    """
    users = user_counts(statistics.activity, statistics.activity_deviation)
    items = item_counts(statistics, users)
    totals = DomainTotals(user_counts=users, item_counts=items, times=None)
    found = {**size.size_features(totals), **distribution.distribution_features(totals)}
    values = np.array([found.get(name, math.nan) for name in META_FEATURE_NAMES])
    digest = hashlib.sha256(f"metalearn-private-1 {statistics.limit} {statistics.num_items}\n".encode())
    for released in (statistics.activity, statistics.survival):
        digest.update(released.astype("<f8").tobytes())
    return DomainProfile(
        values=values,
        mask=np.isfinite(values),
        fingerprint=digest.hexdigest(),
        num_users=totals.num_users,
        num_items=totals.num_items,
        num_interactions=totals.num_interactions,
    )


def user_counts(activity: np.ndarray, deviation: float) -> np.ndarray:
    """Spreads users over the bins of a noisy histogram, evenly by the logarithm within a bin.

    Args:
      activity: [A].
      deviation: of the noise in each bin.

    Returns:
      int64 [U] ascending, two or more.
    """
    from_top = np.cumsum(activity[::-1])[::-1]
    noise = deviation * np.sqrt(np.arange(len(activity), 0, -1))
    told = np.flatnonzero(from_top > _DEVIATIONS * noise)
    kept = activity[: told[-1] + 1] if len(told) else activity[:1]
    # Bins that noise made negative take from their neighbours: users with as many interactions or more only get fewer.
    survival = isotonic_regression(np.cumsum(kept[::-1])[::-1], increasing=False).x
    steps = np.round(np.maximum(survival, 0.0)).astype(np.int64)
    users = steps - np.append(steps[1:], 0)
    if users.sum() < 2:
        users[0] += 2 - users.sum()
    edges = [*ACTIVITY_BINS.tolist(), int(ACTIVITY_BINS[-1]) + 1]
    return np.concatenate([_log_spread(edges[b], edges[b + 1], number) for b, number in enumerate(users.tolist())])


def item_counts(statistics: NoisyStatistics, users: np.ndarray) -> np.ndarray:
    """Finds how often each item was used, all that its users did counted in.

    The noisy survival function is made to fall, and read at each item's rank. Its tail, where items are fewer than the
    noise can tell, is continued by a power law with the exponent that gives the kept interactions their number.

    Args:
      statistics: as released.
      users: int64 [U], as estimated from them.

    Returns:
      int64 [I], all positive: an item that nobody was seen to use counts as used once.
    """
    kept = float(np.minimum(users, statistics.limit).sum())
    # Of k interactions, at most k / t items have t or more.
    most = np.minimum(statistics.num_items, kept / POPULARITY_THRESHOLDS)
    survival = np.clip(isotonic_regression(statistics.survival, increasing=False).x, 0.0, most)
    told = survival > max(_DEVIATIONS * statistics.survival_deviation, 0.5)
    body = max(int(np.argmin(told)) if not told.all() else len(told), 1)
    ranks = np.arange(statistics.num_items) + 0.5
    # np.interp wants ascending ranks; items beyond the first threshold's rank were not seen at all.
    logs = np.interp(ranks, survival[:body][::-1], np.log(POPULARITY_THRESHOLDS[:body])[::-1])
    counts = np.where(ranks <= survival[0], np.exp(logs), 0.0)
    head = ranks < survival[body - 1]
    if head.any():
        rise = np.log(survival[body - 1] / ranks[head])
        least = float(POPULARITY_THRESHOLDS[body - 1])
        missing = kept - float(counts[~head].sum())
        counts[head] = least * np.exp(_exponent(rise, missing / least) * rise)
    share = kept / float(users.sum())
    return np.maximum(np.round(counts / share), 1.0).astype(np.int64)


def _exponent(rise: np.ndarray, total: float) -> float:
    """Returns the a at which Σ exp(a · rise) is `total`, within 0 and the steepest."""

    def excess(exponent: float) -> float:
        return float(np.exp(exponent * rise).sum()) - total

    if excess(0.0) >= 0 or excess(_STEEPEST) <= 0:
        return 0.0 if excess(0.0) >= 0 else _STEEPEST
    return float(brentq(excess, 0.0, _STEEPEST))  # pyright: ignore[reportArgumentType]


def _log_spread(low: int, high: int, number: int) -> np.ndarray:
    """Returns integers from `low` to below `high`, ascending, evenly by their logarithm."""
    places = (np.arange(number) + 0.5) / max(number, 1)
    return np.floor(low * (high / low) ** places).astype(np.int64)
