"""Ratings: where they lie in their range, how varied they are, and whose they are. Undefined without ratings."""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.canonical import CanonicalTable
from metalearn.profiles.meta_features.distribution import normalised_entropy

NAMES = (
    "rated_share",
    "rating_position",
    "rating_spread",
    "rating_share_at_maximum",
    "rating_entropy",
    "rating_user_variance",
    "rating_item_variance",
)


def rating_features(table: CanonicalTable) -> dict[str, float]:
    """Compute the rating family over the rated interactions; all NaN without ratings, most if all ratings are equal."""
    if table.rating is None:
        return dict.fromkeys(NAMES, math.nan)
    rated = ~np.isnan(table.rating)
    ratings = table.rating[rated].astype(np.float64)
    lowest, highest = float(ratings.min()), float(ratings.max())
    span = highest - lowest
    share = float(np.mean(rated))
    if span == 0:
        return dict(zip(NAMES, (share, *[math.nan] * (len(NAMES) - 1)), strict=True))
    counts = np.unique(ratings, return_counts=True)[1]
    values = (
        share,
        (float(ratings.mean()) - lowest) / span,
        float(ratings.std()) / span,
        float(np.mean(ratings == highest)),
        normalised_entropy(counts),
        variance_share(table.user[rated], ratings),
        variance_share(table.item[rated], ratings),
    )
    return dict(zip(NAMES, values, strict=True))


def variance_share(groups: np.ndarray, ratings: np.ndarray) -> float:
    """Share of the variance between the means of groups, Σ n_g (m_g - m)² / Σ (r - m)², of groups of two or more.

    NaN if no group has two ratings, or their ratings are all equal.
    """
    counts = np.bincount(groups)
    kept = counts[groups] >= 2
    if not kept.any():
        return math.nan
    centred = ratings[kept] - ratings[kept].mean()
    total = float(np.dot(centred, centred))
    sums = np.bincount(groups[kept], weights=centred, minlength=len(counts))
    between = float(np.sum(sums[counts >= 2] ** 2 / counts[counts >= 2]))
    return min(between / total, 1.0) if total > 0 else math.nan
