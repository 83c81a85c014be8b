"""Repeats: whether users come back to the same items."""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.canonical import CanonicalTable

NAMES = ("repeat_share", "repeated_pair_share", "log_repeats_per_repeated_pair")


def repeat_features(table: CanonicalTable) -> dict[str, float]:
    """Compute the share of interactions that repeat an earlier pair, the share of pairs repeated, and how often.

    The last is the logarithm of the mean number of interactions of the pairs that occur twice or more; NaN if none.
    """
    starts = np.flatnonzero(table.first_of_pair)
    counts = np.diff(starts, append=len(table.user))
    repeated = counts[counts > 1]
    values = (
        1.0 - len(counts) / len(table.user),
        len(repeated) / len(counts),
        math.log(repeated.mean()) if len(repeated) else math.nan,
    )
    return dict(zip(NAMES, values, strict=True))
