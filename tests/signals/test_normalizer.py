"""Percentile scaling: knots of any data, a monotone bounded map, and how far out of range a vector lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.signals import fit_knots, out_of_range, percentile_scale
from metalearn.signals.normalizer import NUM_KNOTS, TAIL

FINITE = st.floats(-1e9, 1e9)
COLUMN = st.one_of(
    hnp.arrays(np.float64, st.integers(1, 40), elements=FINITE),
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([0.0, 1.0, np.nan])),
    st.builds(np.full, st.integers(1, 40), FINITE),
)


@given(COLUMN)
def test_knots_increase_whatever_the_data(column: np.ndarray):
    knots = fit_knots(column[:, None])
    assert knots.shape == (1, NUM_KNOTS)
    assert knots.dtype == np.float32
    assert np.isfinite(knots).all()
    assert (np.diff(knots[0]) > 0).all()


@given(COLUMN, st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=30))
def test_scaling_is_monotone_and_bounded(column: np.ndarray, values: list[float]):
    knots = fit_knots(column[:, None]).astype(np.float64)
    scaled = percentile_scale(np.sort(values)[:, None], knots, np)[:, 0]
    assert (np.diff(scaled) >= 0).all()
    assert (np.abs(scaled) <= 1 + TAIL + 1e-12).all()


@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 123.4, -7e9])
def test_a_constant_feature_stays_defined_in_single_precision(constant: float):
    knots = fit_knots(np.full((50, 1), constant))
    scaled = percentile_scale(np.full((1, 1), constant, np.float32), knots, np)
    assert np.isfinite(scaled).all()
    assert np.abs(scaled) <= 1.0  # what every task had is in range


def test_knots_are_percentiles():
    # 0 to 1000 in steps of 1: the 0.5th percentile is 5, the median 500, the 99.5th 995; in even steps of 61.875.
    knots = fit_knots(np.arange(1001.0)[:, None])
    np.testing.assert_allclose(knots[0], 5 + 61.875 * np.arange(NUM_KNOTS), atol=2.0)


def test_ties_are_spread_by_a_hair():
    # Nine in ten are 0: their knots stay within a thousandth of the range.
    column = np.concatenate([np.zeros(900), np.linspace(0.0, 1.0, 100)])
    knots = fit_knots(column[:, None])
    assert knots[0, 12] < 2e-3
    assert percentile_scale(np.zeros((1, 1)), knots, np)[0, 0] == pytest.approx(-1.0)


def test_what_was_not_measured_is_left_out_of_the_fit():
    column = np.array([1.0, np.nan, 2.0, np.inf, 3.0, -np.inf])
    np.testing.assert_array_equal(fit_knots(column[:, None]), fit_knots(np.array([[1.0], [2.0], [3.0]])))


def test_a_feature_never_seen_gets_the_unit_range():
    knots = fit_knots(np.full((10, 1), np.nan))
    np.testing.assert_allclose(knots[0], np.linspace(0, 1, NUM_KNOTS), atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_scaled_to_the_middle(value: float):
    knots = fit_knots(np.random.default_rng(0).normal(size=(100, 2)))
    with np.errstate(invalid="ignore"):
        scaled = percentile_scale(np.array([value, 0.0]), knots, np)
    assert scaled[0] == 0.0
    assert scaled[1] != 0.0


def test_training_data_spread_evenly_over_the_range():
    samples = np.random.default_rng(0).lognormal(0.0, 2.0, (5000, 1))
    scaled = percentile_scale(samples, fit_knots(samples), np)[:, 0]
    counts, _ = np.histogram(scaled, bins=10, range=(-1, 1))
    assert counts.min() > 350
    assert (np.abs(scaled) > 1).mean() < 0.02


def test_beyond_the_range_a_short_linear_tail():
    knots = np.linspace(0.0, 10.0, NUM_KNOTS)[None]
    values = np.array([[-6.0], [-3.0], [0.0], [10.0], [13.0], [16.0], [1e6]])
    scaled = percentile_scale(values, knots, np)[:, 0]
    np.testing.assert_allclose(scaled, [-1.6, -1.3, -1.0, 1.0, 1.3, 1.6, 1.6])


def test_out_of_range_is_the_mean_excess():
    # Of four features one is at 1.3, half of the tail: (0.3 / 0.6) / 4 = 0.125.
    assert out_of_range(np.array([0.0, 1.0, -0.5, 1.3]), np) == pytest.approx(0.125)
    assert out_of_range(np.array([-1.0, 1.0]), np) == 0.0
    assert out_of_range(np.array([-1.6, 1.6]), np) == pytest.approx(1.0)
    assert out_of_range(np.zeros((3, 4)), np).shape == (3,)


def test_numpy_and_jax_agree():
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    knots = fit_knots(rng.normal(size=(500, 6)))
    values = rng.normal(0.0, 3.0, (40, 6))
    values[rng.random(values.shape) < 0.1] = np.nan
    ours = percentile_scale(values, knots.astype(np.float64), np)
    theirs = percentile_scale(jnp.asarray(values, jnp.float32), jnp.asarray(knots), jnp)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    np.testing.assert_allclose(out_of_range(theirs, jnp), out_of_range(ours, np), atol=2e-5)
