"""Meta-features by family: each module has its NAMES and a pure function from totals or from a table to their values.

Totals are counts over every row of a domain; a table holds its rows, or those of some users where there are too many. A
value is NaN where it is undefined. The order of META_FEATURE_NAMES and every definition belong to SCHEMA_VERSION.
"""

from __future__ import annotations

from metalearn.profiles.canonical import CanonicalTable
from metalearn.profiles.meta_features import co_occurrence, distribution, landmark, ratings, repeats, size, temporal
from metalearn.profiles.totals import DomainTotals

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


SAMPLED_META_FEATURES: tuple[str, ...] = (
    *co_occurrence.NAMES,
    *landmark.NAMES,
    *repeats.NAMES,
    *temporal.PACE_NAMES,
    *ratings.NAMES,
)
"""Those that a profile with a `sampled_fraction` below 1 estimates on its sample; it has all others from every row."""


def compute_meta_features(totals: DomainTotals, table: CanonicalTable, *, seed: int = 0) -> dict[str, float]:
    """Compute every family and return name to value, NaN where undefined."""
    block = co_occurrence.dense_block(table, seed=seed)
    return {
        **size.size_features(totals),
        **distribution.distribution_features(totals),
        **co_occurrence.co_occurrence_features(block),
        **landmark.landmark_features(block, seed=seed),
        **repeats.repeat_features(table),
        **temporal.temporal_features(totals),
        **temporal.pace_features(table),
        **ratings.rating_features(table),
    }
