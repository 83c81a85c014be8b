"""What a controller knows of a domain before training: raw descriptors, and the knots that scale everything it sees."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from metalearn.profiles import DomainProfile

PROFILE_DESCRIPTORS = (
    "log_density",
    "log_users_per_item",
    "log_interactions_per_user",
    "log_interactions_per_item",
    "user_gini",
    "user_log_median_to_mean",
    "item_gini",
    "item_entropy",
    "item_tail_share",
    "item_head_share_10",
    "item_log_variation",
    "spectral_effective_rank",
    "spectral_energy_8",
    "item_cosine",
    "landmark_log_gain",
    "landmark_log_popularity",
)
"""The meta-features a controller reads: per-entity means and shapes, never raw sizes, which do not
transfer."""

BUDGET_DESCRIPTORS = ("log_horizon_epochs", "log_batch_per_user", "log_batch_per_item")
DESCRIPTORS = PROFILE_DESCRIPTORS + BUDGET_DESCRIPTORS


class Normalizer(NamedTuple):
    """Percentile knots of everything a controller sees, each [features, K]."""

    descriptors: Any
    group: Any
    run: Any


def profile_descriptors(profile: DomainProfile, names: tuple[str, ...] = PROFILE_DESCRIPTORS) -> np.ndarray:
    """Returns the named meta-features, float64, NaN where the profile does not define them."""
    found = (profile[name] for name in names)
    return np.array([np.nan if value is None else value for value in found], np.float64)


def budget_descriptors(epochs: Any, batch: Any, num_users: Any, num_items: Any, xp: ModuleType) -> Any:
    """Describes a run's budget relative to its domain, [3].

    Args:
      epochs: passes over the training data in the whole run, NaN when the horizon is unknown.
      batch: training samples per step, NaN when unknown.
      num_users, num_items: of the training data.
    """
    return xp.log(xp.stack([xp.asarray(epochs), batch / num_users, batch / num_items]))
