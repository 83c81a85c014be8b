"""Meta-features by family: each module has its NAMES and one pure function from a canonical table to their values.

A value is NaN where it is undefined. The order of META_FEATURE_NAMES and every definition belong to SCHEMA_VERSION.
"""

from __future__ import annotations

from metalearn.profiles.canonical import CanonicalTable
from metalearn.profiles.meta_features import co_occurrence, distribution, landmark, ratings, repeats, size, temporal

SCHEMA_VERSION = 1

META_FEATURE_NAMES: tuple[str, ...] = (
    *size.NAMES,
    *distribution.NAMES,
    *co_occurrence.NAMES,
    *landmark.NAMES,
    *repeats.NAMES,
    *temporal.NAMES,
    *ratings.NAMES,
)


def compute_meta_features(table: CanonicalTable, *, seed: int = 0) -> dict[str, float]:
    """Compute every family and return name to value, NaN where undefined, in the order of META_FEATURE_NAMES."""
    block = co_occurrence.dense_block(table, seed=seed)
    return {
        **size.size_features(table),
        **distribution.distribution_features(table),
        **co_occurrence.co_occurrence_features(block),
        **landmark.landmark_features(block, seed=seed),
        **repeats.repeat_features(table),
        **temporal.temporal_features(table, seed=seed),
        **ratings.rating_features(table),
    }
