"""From statistics to profiles: near the exact one without noise, and never broken with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from envs.simulated import SimulatedPrior, simulate
from metalearn import Interactions, load_controller, profile_domain
from metalearn.privacy.estimation import ESTIMATED, NoisyStatistics, item_counts, private_profile, user_counts
from metalearn.privacy.statistics import (
    ACTIVITY_BINS,
    POPULARITY_THRESHOLDS,
    activity_histogram,
    bounded,
    popularity_survival,
)
from metalearn.profiles import META_FEATURE_NAMES


def without_noise(table: Interactions, limit: int) -> NoisyStatistics:
    kept = bounded(table, limit, np.random.default_rng(0).random(len(table)))
    return NoisyStatistics(
        activity=activity_histogram(table).astype(float),
        activity_deviation=0.0,
        survival=popularity_survival(kept).astype(float),
        survival_deviation=0.0,
        limit=limit,
        num_items=table.num_items,
    )


@pytest.fixture(scope="module")
def rows() -> Interactions:
    return simulate(SimulatedPrior(users=(400, 400), items=(300, 300)), seed=3).compact()


def test_without_noise_the_profile_is_the_exact_one_up_to_the_width_of_bins(rows: Interactions):
    exact, estimated = profile_domain(rows), private_profile(without_noise(rows, 10**6))
    assert estimated.num_users == exact.num_users and estimated.num_items == exact.num_items
    assert estimated.num_interactions == pytest.approx(exact.num_interactions, rel=0.03)
    for name in ("log_density", "log_interactions_per_user", "log_users_per_item", "user_log_median_to_mean"):
        assert estimated[name] == pytest.approx(exact[name], abs=0.05), name
    for name in ("user_gini", "item_gini", "item_entropy", "item_tail_share", "item_head_share_10"):
        assert estimated[name] == pytest.approx(exact[name], abs=0.02), name


def test_what_is_dropped_of_busy_users_is_counted_in_again(rows: Interactions):
    exact, estimated = profile_domain(rows), private_profile(without_noise(rows, 16))
    assert len(bounded(rows, 16, np.arange(len(rows)))) < 0.75 * len(rows)
    assert estimated["log_interactions_per_item"] == pytest.approx(exact["log_interactions_per_item"], abs=0.05)
    assert estimated["item_gini"] == pytest.approx(exact["item_gini"], abs=0.1)


def test_other_meta_features_are_undefined_and_the_fingerprint_is_not_of_the_data(rows: Interactions):
    statistics = without_noise(rows, 10**6)
    exact, estimated = profile_domain(rows), private_profile(statistics)
    assert {name for name in META_FEATURE_NAMES if estimated[name] is not None} <= set(ESTIMATED)
    assert estimated.fingerprint != exact.fingerprint
    # Who else has the same counts has the same fingerprint: here, users and items by other names.
    other = Interactions(
        user=rows.num_users - 1 - rows.user,
        item=rows.num_items - 1 - rows.item,
        num_users=rows.num_users,
        num_items=rows.num_items,
    )
    assert private_profile(without_noise(other, 10**6)).fingerprint == estimated.fingerprint


def test_a_tail_that_noise_hides_is_continued_so_that_interactions_add_up():
    # 100 users with 100 interactions each; 90 items used 20 times, 10 items that share the other 8200.
    activity = np.where(ACTIVITY_BINS == 91, 100.0, 0.0)
    counts = np.sort(np.append(np.full(90, 20), [400, 450, 500, 600, 700, 800, 950, 1100, 1300, 1400]))
    survival = np.array([(counts >= t).sum() for t in POPULARITY_THRESHOLDS], float)
    statistics = NoisyStatistics(
        activity=activity,
        activity_deviation=0.1,
        survival=survival,
        survival_deviation=4.0,  # three of them hide the ten items
        limit=1000,
        num_items=100,
    )
    users = user_counts(activity, 0.1)
    found = np.sort(item_counts(statistics, users))
    assert found.sum() == pytest.approx(users.sum(), rel=0.05)
    assert found[-10:].sum() == pytest.approx(8200, rel=0.25)


noise = st.floats(-1e4, 1e4)


@settings(max_examples=60, deadline=None)
@given(
    arrays(float, len(ACTIVITY_BINS), elements=noise),
    arrays(float, len(POPULARITY_THRESHOLDS), elements=noise),
    st.floats(0.0, 1e3),
    st.integers(1, 1000),
    st.integers(2, 500),
)
def test_whatever_noise_makes_of_the_statistics_there_is_a_profile_that_a_controller_takes(
    activity: np.ndarray, survival: np.ndarray, deviation: float, limit: int, num_items: int
):
    statistics = NoisyStatistics(
        activity=activity.round() / 100,
        activity_deviation=deviation,
        survival=survival.round(),
        survival_deviation=deviation * limit,
        limit=limit,
        num_items=num_items,
    )
    profile = private_profile(statistics)
    assert profile.num_users >= 2 and profile.num_items == num_items
    assert profile.num_interactions >= profile.num_users
    assert 0 <= profile["item_gini"] <= 1 and 0 <= profile["user_gini"] <= 1  # type: ignore[operator]
    session = load_controller().start(profile, family="matrix_factorization", horizon=100, batch_size=64)
    assert 0 <= session.confidence <= 1
    assert np.isfinite(session.ask().groups[0]["learning_rate"])
