"""The release of a profile under differential privacy: what is counted, bounded, made noisy, charged, and no more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from metalearn.errors import InvalidArgumentError, PrivacyError
from metalearn.interactions import Interactions
from metalearn.privacy.estimation import NoisyStatistics, private_profile
from metalearn.privacy.ledger import PrivacyLedger
from metalearn.privacy.statistics import ACTIVITY_SENSITIVITY, activity_histogram, bounded, popularity_survival
from metalearn.profiles import DomainProfile

ACTIVITY_SHARE = 0.3
"""Share of epsilon for the users' histogram; the rest is for the items'."""
ITEM_NOISE = 0.007
"""Standard deviation of the noise in numbers of items, as a share of the catalogue, that sets how much of a user is
kept: much of each user, and noise hides the items; little, and most interactions are dropped."""


def release_profile(
    interactions: Interactions, *, num_items: int, epsilon: float, ledger: PrivacyLedger, tenant: str
) -> DomainProfile:
    """Computes a profile that tells next to nothing of any one user, and charges it to a tenant's budget.

    The release is epsilon-differentially private with respect to adding or removing one user with everything that this
    user did: whatever anybody infers from the profile, its likelihood would change by a factor of e^epsilon at most.
    The catalogue, and so the number of items, is taken to be public. Two statistics are released, with noise of
    opendp's discrete Laplace mechanism: users by activity, and items by popularity among at most
    `interactions_kept(num_items, epsilon)` random interactions of each user.

    The profile has the meta-features of size and of the distributions of users and items; others are undefined, and
    count as those of a middling domain for a controller.

    Args:
      interactions: the table. Only the profile that is returned is private: not errors, and not what a training run on
        these interactions logs.
      num_items: items on offer, known without the data; at least 2, and as many as occur.
      epsilon: above 0; below 1 is strong, above 10 hardly anything.
      ledger: where the release is charged.
      tenant: whose users they are.

    Returns:
      The profile; its fingerprint is a hash of what was released, not of the data.

    Raises:
      InvalidArgumentError: an argument is out of range, or more items occur than `num_items`.
      PrivacyError: the tenant's budget does not allow it, or the extra is not installed.
    """
    if not isinstance(interactions, Interactions):
        raise InvalidArgumentError(
            f"`interactions` must be Interactions, got {type(interactions).__name__}; a scan has `collect()`"
        )
    if isinstance(num_items, bool) or not isinstance(num_items, int) or num_items < 2:
        raise InvalidArgumentError(f"`num_items` must be an int of at least 2, got {num_items!r}")
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not 0 < epsilon <= 100:
        raise InvalidArgumentError(f"`epsilon` must be a number above 0 and at most 100, got {epsilon!r}")
    if not isinstance(ledger, PrivacyLedger):
        raise InvalidArgumentError(f"`ledger` must be a PrivacyLedger, got {type(ledger).__name__}")
    occurring = len(np.unique(interactions.item))
    if occurring > num_items:
        raise InvalidArgumentError(f"`num_items` is {num_items}, but {occurring} items occur; pass the whole catalogue")
    statistics, spent = noisy_statistics(interactions, num_items=num_items, epsilon=float(epsilon))
    profile = private_profile(statistics)
    ledger.charge(tenant, spent, release=profile.fingerprint)
    return profile


def interactions_kept(num_items: int, epsilon: float) -> int:
    """Returns how many interactions of a user count for the items' popularity at most; a function of public numbers."""
    return max(1, math.floor(ITEM_NOISE * num_items * (1 - ACTIVITY_SHARE) * epsilon / math.sqrt(2)))


def noisy_statistics(interactions: Interactions, *, num_items: int, epsilon: float) -> tuple[NoisyStatistics, float]:
    """Releases both statistics.

    Returns:
      Them, and the epsilon that opendp says they cost together.
    """
    limit = interactions_kept(num_items, epsilon)
    # From the system's entropy: samples that others could foresee would be as good as none.
    kept = bounded(interactions, limit, np.random.default_rng().random(len(interactions)))
    of_users, of_items = ACTIVITY_SHARE * epsilon, (1 - ACTIVITY_SHARE) * epsilon
    activity, users_spent = _noised(activity_histogram(interactions), ACTIVITY_SENSITIVITY, of_users)
    survival, items_spent = _noised(popularity_survival(kept), limit, of_items)
    statistics = NoisyStatistics(
        activity=activity,
        activity_deviation=math.sqrt(2) * ACTIVITY_SENSITIVITY / of_users,
        survival=survival,
        survival_deviation=math.sqrt(2) * limit / of_items,
        limit=limit,
        num_items=num_items,
    )
    return statistics, users_spent + items_spent


def laplace(sensitivity: int, epsilon: float) -> Any:
    """Returns opendp's measurement of int64 vectors under the discrete Laplace mechanism.

    Args:
      sensitivity: L1 distance of neighbours.
      epsilon: that it may cost.

    Raises:
      PrivacyError: opendp is not installed.
    """
    try:
        import opendp.prelude as dp  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PrivacyError("differential privacy needs an extra: pip install 'metalearn[privacy]'") from error
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l1_distance(T=dp.i64)
    return dp.m.make_laplace(*space, scale=sensitivity / epsilon)


def _noised(counts: np.ndarray, sensitivity: int, epsilon: float) -> tuple[np.ndarray, float]:
    measurement = laplace(sensitivity, epsilon)
    return np.array(measurement(counts.astype(np.int64).tolist()), np.float64), float(measurement.map(sensitivity))
