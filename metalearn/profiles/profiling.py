"""From interactions to a DomainProfile: count over every row, sample if need be, compute every meta-feature."""

from __future__ import annotations

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions, InteractionsScan
from metalearn.profiles.canonical import canonical_table, fingerprint, sample_users
from metalearn.profiles.domain_profile import DomainProfile
from metalearn.profiles.meta_features import META_FEATURE_NAMES, compute_meta_features
from metalearn.profiles.streaming import streamed_totals
from metalearn.profiles.totals import DomainTotals, table_totals


def profile_domain(
    interactions: Interactions | InteractionsScan, *, max_interactions: int = 2_000_000, seed: int = 0
) -> DomainProfile:
    """Compute the meta-features of a domain.

    Only users and items that occur count, so a training split in a larger code space says nothing about the rest.

    Up to `max_interactions`, everything is computed from every row. Beyond, sizes, distributions, drift, newcomers and
    seasons still are, by counting over all rows in a stream; those in `SAMPLED_META_FEATURES` are estimated on whole
    users chosen by a seeded hash, and `sampled_fraction` says on how large a share. The memory of a scan is bounded by
    `max_interactions` and the numbers of users and items.

    Args:
      interactions: the table, or a lazy scan of one.
      max_interactions: most rows to hold at a time, at least 2.
      seed: seed of every sample drawn; the same table and seed give the same profile, in any order of rows.

    Returns:
      The profile; its fingerprint identifies the rows, or the sample and the number of rows that it is from.

    Raises:
      InteractionsError: empty, or fewer than 2 users or items occur.
      InvalidArgumentError: `interactions` has another type, or `max_interactions` cannot hold 2 users.

    Example:
      >>> table = Interactions.from_arrays([1, 1, 2, 2, 3], [5, 6, 6, 7, 6])
      >>> profile = profile_domain(table)
      >>> round(profile["log_num_users"], 3), profile["item_singleton_share"], profile.num_interactions
      (1.099, 0.6666666666666666, 5)
    """
    if isinstance(max_interactions, bool) or not isinstance(max_interactions, int) or max_interactions < 2:
        raise InvalidArgumentError(f"`max_interactions` must be an int of at least 2, got {max_interactions!r}")
    if isinstance(interactions, InteractionsScan):
        total = interactions.count()
        held = interactions.collect() if total <= max_interactions else interactions.sample(max_interactions, seed)
    elif isinstance(interactions, Interactions):
        total = len(interactions)
        held = interactions if total <= max_interactions else sample_users(interactions, max_interactions, seed)
    else:
        raise InvalidArgumentError(
            f"`interactions` must be Interactions or an InteractionsScan, got {type(interactions).__name__}; "
            "build one with Interactions.from_frame or Interactions.scan"
        )
    table = canonical_table(held, sampled_fraction=len(held) / total if total else 1.0)
    totals = table_totals(table, seed=seed) if len(held) == total else _stream(interactions, seed)
    features = compute_meta_features(totals, table, seed=seed)
    values = np.array([features[name] for name in META_FEATURE_NAMES], dtype=np.float64)
    return DomainProfile(
        values=values,
        mask=np.isfinite(values),
        fingerprint=fingerprint(table),
        num_users=totals.num_users,
        num_items=totals.num_items,
        num_interactions=total,
        sampled_fraction=table.sampled_fraction,
    )


def _stream(interactions: Interactions | InteractionsScan, seed: int) -> DomainTotals:
    if isinstance(interactions, InteractionsScan):
        return interactions.stream(lambda rows: streamed_totals(rows, seed=seed))
    import polars

    columns = {"user": interactions.user, "item": interactions.item, "timestamp": interactions.timestamp}
    rows = polars.LazyFrame({name: values for name, values in columns.items() if values is not None})
    return streamed_totals(rows, seed=seed)
