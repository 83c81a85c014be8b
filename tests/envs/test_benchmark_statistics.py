"""The benchmark's statistics against SciPy, hand-worked cases, and the coverage of their intervals."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from scipy import stats

from envs.benchmark.statistics import (
    bootstrap,
    geometric_mean,
    interquartile_mean,
    lost,
    mean_ratio,
    normalised,
    pad,
    performance_profile,
    probability_of_improvement,
    relative_noise,
    standard_error,
    worst_loss,
)
from metalearn.errors import InvalidArgumentError

SCORES = arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 6).map(float))


@given(SCORES, st.integers(0, 4))
def test_interquartile_mean_is_scipys_and_ignores_padding(values: np.ndarray, padding: int) -> None:
    padded = np.concatenate([values, np.full(padding, np.nan)])
    np.testing.assert_allclose(interquartile_mean(padded), stats.trim_mean(values, 0.25))


@given(SCORES, SCORES, st.integers(0, 3))
def test_probability_of_improvement_is_scipys_u(ours: np.ndarray, theirs: np.ndarray, padding: int) -> None:
    expected = stats.mannwhitneyu(ours, theirs).statistic / (len(ours) * len(theirs))
    padded = np.concatenate([ours, np.full(padding, np.nan)])
    np.testing.assert_allclose(probability_of_improvement(padded, theirs), expected)


def test_ratios_are_of_means_and_average_geometrically() -> None:
    ours, theirs = pad([np.array([0.1, 0.3]), np.array([0.2])]), pad([np.array([0.1]), np.array([0.1, 0.3])])
    np.testing.assert_allclose(mean_ratio(ours, theirs), [2.0, 1.0])
    values = np.random.default_rng(0).uniform(0.5, 2.0, 9)
    np.testing.assert_allclose(geometric_mean(values), stats.gmean(values))


def test_ratios_of_collapsed_runs_stay_finite() -> None:
    np.testing.assert_allclose(mean_ratio(np.array([[0.0], [0.1]]), np.array([[0.1], [0.0]])), [1e-5, 1e5])


def test_normalised_puts_the_two_means_at_0_and_1() -> None:
    # Means 0.2 and 0.4: 0.3 lies halfway, 0.5 half a reach above.
    scores = normalised(np.array([[0.3, 0.5, np.nan]]), np.array([[0.1, 0.3]]), np.array([[0.4]]))
    np.testing.assert_allclose(scores, [[0.5, 1.5, np.nan]])
    assert np.isnan(normalised(np.array([[0.3]]), np.array([[0.1]]), np.array([[0.1]]))).all()


def test_standard_error_is_welchs() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.2, 0.01, 5), rng.normal(0.19, 0.02, 4)
    statistic = stats.ttest_ind(ours, theirs, equal_var=False).statistic
    np.testing.assert_allclose((ours.mean() - theirs.mean()) / standard_error(ours, theirs, math.nan), statistic)


def test_a_single_seed_borrows_the_tasks_noise() -> None:
    # 10 % of 0.2 is 0.02 on one side; the other has deviation sqrt(0.0002) over two seeds, so variance 0.0001.
    error = standard_error(np.array([0.2]), np.array([0.09, 0.11]), 0.1)
    np.testing.assert_allclose(error, math.sqrt(0.02**2 + 0.0001))
    assert math.isnan(standard_error(np.array([0.2]), np.array([0.09, 0.11]), math.nan))


def test_relative_noise_pools_by_degrees_of_freedom() -> None:
    # Relative variances 0.02 with 1 degree and 0.01 with 2: (0.02 + 0.02) / 3. One seed and a collapse say nothing.
    vectors = [np.array([0.9, 1.1]), 5 * np.array([0.9, 1.0, 1.1]), np.array([3.0]), np.zeros(4)]
    np.testing.assert_allclose(relative_noise(vectors), math.sqrt(0.04 / 3))
    assert math.isnan(relative_noise([np.array([1.0])]))


def test_lost_is_beyond_two_standard_errors() -> None:
    ours, theirs = np.array([[0.79], [0.81], [1.5]]), np.array([[1.0], [1.0], [1.0]])
    assert lost(ours, theirs, np.full((3, 1), 0.1)).tolist() == [True, False, False]


def test_worst_loss_and_profile_keep_leading_axes() -> None:
    ratios = np.array([[0.9, 1.1], [1.2, 1.3]])
    np.testing.assert_allclose(worst_loss(ratios), [-0.1, 0.0])
    profile = performance_profile(ratios, np.array([0.9, 1.0, 1.25]))
    np.testing.assert_allclose(profile, [[1.0, 0.5, 0.0], [1.0, 1.0, 0.5]])


def grand_mean(values: np.ndarray) -> np.ndarray:
    return np.nanmean(values, axis=-1).mean(axis=-1)


def test_bootstrap_spread_is_that_of_the_two_stages() -> None:
    """Bounds ± 1.96 deviations, worked out: variance over tasks within strata plus variance over seeds within tasks."""
    rng = np.random.default_rng(2)
    scores = rng.normal(0.0, 1.0, (40, 1)) + rng.normal(0.0, 1.0, (40, 6))
    strata = ["a"] * 10 + ["b"] * 30
    estimate = bootstrap(grand_mean, [scores], strata, num_resamples=8000)
    between = sum(len(part) * part.mean(axis=1).var() for part in (scores[:10], scores[10:])) / 40**2
    within = scores.var(axis=1).mean() / 6 / 40
    spread = 2 * stats.norm.ppf(0.975) * math.sqrt(between + within)
    np.testing.assert_allclose(estimate.high - estimate.low, spread, rtol=0.05)
    np.testing.assert_allclose(estimate.value, scores.mean())


def test_strata_are_not_mixed() -> None:
    """Two strata far apart: if tasks were drawn over both, their shares would vary."""
    scores = np.array([[0.0], [0.1], [100.0], [100.1]])
    estimate = bootstrap(grand_mean, [scores], ["a", "a", "b", "b"])
    assert 50.0 - 1e-9 <= estimate.low < estimate.high <= 50.1 + 1e-9


def test_one_task_a_stratum_leaves_the_seeds() -> None:
    scores = np.array([[1.0, 2.0, 3.0], [5.0, np.nan, np.nan]])
    estimate = bootstrap(grand_mean, [scores], ["a", "b"])
    assert estimate.low >= (1 + 5) / 2 and estimate.high <= (3 + 5) / 2 and estimate.low < estimate.high


def test_nothing_to_resample_gives_no_bounds() -> None:
    estimate = bootstrap(grand_mean, [np.array([[1.0], [5.0]])], ["a", "b"])
    assert float(estimate.value) == 3.0
    assert np.isnan(estimate.low) and np.isnan(estimate.high)


def test_samples_are_resampled_over_the_same_tasks() -> None:
    """A ratio of two constants per task is drawn with its task, so equal ratios have no spread."""
    ours = np.array([[2.0], [4.0], [6.0]])
    estimate = bootstrap(lambda a, b: geometric_mean(mean_ratio(a, b)), [ours, ours / 2], ["a"] * 3)
    np.testing.assert_allclose([estimate.value, estimate.low, estimate.high], 2.0)


def test_intervals_cover_about_as_often_as_they_say() -> None:
    """40 tasks with 5 seeds each, 300 experiments; a percentile bootstrap covers slightly less than 95 %."""
    rng = np.random.default_rng(3)
    covered = 0
    for experiment in range(300):
        scores = rng.normal(0.0, 1.0, (40, 1)) + rng.normal(0.0, 1.0, (40, 5))
        estimate = bootstrap(grand_mean, [scores], ["a"] * 40, seed=experiment, num_resamples=400)
        covered += bool(estimate.low <= 0.0 <= estimate.high)
    assert 0.90 <= covered / 300 <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(4).normal(size=(6, 3))
    first, second, other = (bootstrap(grand_mean, [scores], ["a"] * 6, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    ("samples", "strata", "level", "argument"),
    [
        ([np.ones((2, 1))], ["a"], 0.95, "samples"),
        ([], ["a"], 0.95, "samples"),
        ([np.ones((0, 1))], [], 0.95, "samples"),
        ([np.array([[np.nan]])], ["a"], 0.95, "samples"),
        ([np.ones((1, 1))], ["a"], 95.0, "level"),
    ],
)
def test_bad_arguments_are_named(samples, strata, level, argument) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{argument}`"):
        bootstrap(grand_mean, samples, strata, level=level)
