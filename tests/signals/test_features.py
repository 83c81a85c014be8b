"""Features: defined from the first interval on, the same in NumPy and in JAX, blind to scale and to wall-clock time."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.signals import (
    FEATURE_SCHEMA_VERSION,
    GLOBAL_FEATURES,
    GROUP_FEATURES,
    Controls,
    IntervalStatistics,
    featurize,
    initial_history,
)
from tests.intervals import make_controls, make_interval, random_intervals
from tests.recorded_run import NUM_DECISIONS, STEPS, load_recorded_run


def run_features(
    intervals: list[IntervalStatistics], xp=np, dtype=np.float64, **changes
) -> tuple[np.ndarray, np.ndarray]:
    """Featurize a run and return [T, G, F] and [T, F]."""
    num_groups = len(intervals[0].gradient_norm)
    history = initial_history(num_groups, xp, dtype)
    group, run = [], []
    with np.errstate(all="ignore"):
        for index, statistics in enumerate(intervals):
            statistics = IntervalStatistics(*(xp.asarray(value, dtype) for value in statistics))
            controls = Controls(*(xp.asarray(v, dtype) for v in make_controls(index, num_groups, **changes)))
            features, history = featurize(statistics, controls, history, xp)
            group.append(np.asarray(features.group))
            run.append(np.asarray(features.run))
    return np.stack(group), np.stack(run)


def scaled(intervals: list[IntervalStatistics], **factors: float) -> list[IntervalStatistics]:
    """Multiply fields by factors."""
    return [
        row._replace(**{name: getattr(row, name) * factor for name, factor in factors.items()}) for row in intervals
    ]


def feature(name: str, group: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Return one feature over the run, [T, G] or [T]."""
    return group[..., GROUP_FEATURES.index(name)] if name in GROUP_FEATURES else run[..., GLOBAL_FEATURES.index(name)]


def assert_same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], **tolerance: float) -> None:
    for names, a, b in zip((GROUP_FEATURES, GLOBAL_FEATURES), one, other, strict=True):
        for index, name in enumerate(names):
            np.testing.assert_allclose(a[..., index], b[..., index], err_msg=name, **tolerance)


def test_schema_of_version_2_is_pinned():
    # A change of names or of their order needs a new FEATURE_SCHEMA_VERSION: checkpoints rely on it.
    assert FEATURE_SCHEMA_VERSION == 2
    assert len(set(GROUP_FEATURES + GLOBAL_FEATURES)) == len(GROUP_FEATURES) + len(GLOBAL_FEATURES)
    assert (len(GROUP_FEATURES), GROUP_FEATURES[0], GROUP_FEATURES[-1]) == (14, "gradient_cosine", "beta1_residual")
    assert (len(GLOBAL_FEATURES), GLOBAL_FEATURES[0], GLOBAL_FEATURES[-1]) == (
        *(21, "loss_fast_trend"),
        "generalization_gap",
    )


@pytest.mark.parametrize("missing", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_numpy_and_jax_agree(num_groups: int, missing: float):
    intervals = random_intervals(7, num_groups=num_groups, missing=missing)
    ours = run_features(intervals)
    theirs = run_features(intervals, jnp, jnp.float32)
    assert np.isnan(ours[0]).any() == (missing > 0)
    assert_same(theirs, ours, rtol=1e-4, atol=2e-5)


def test_numpy_and_jax_agree_on_a_recorded_run():
    intervals = list(load_recorded_run().intervals)
    assert len(intervals) == NUM_DECISIONS
    assert all(interval.steps == STEPS for interval in intervals)
    assert_same(run_features(intervals, jnp, jnp.float32), run_features(intervals), rtol=2e-4, atol=1e-4)


def test_from_the_first_interval_on_all_is_defined_but_what_compares_with_the_one_before():
    group, run = run_features([make_interval(displacement=[np.nan] * 2), make_interval(training_sample_loss=0.4)])
    undefined = {n for n in GROUP_FEATURES + GLOBAL_FEATURES if not np.isfinite(feature(n, group[0], run[0])).all()}
    assert undefined == {
        *("straightness", "validation_change", "validation_z_score"),
        "generalization_gap",
    }
    assert np.isfinite(group[1]).all()
    assert np.isfinite(run[1]).all()


def test_a_loop_that_measures_nothing_has_defined_controls_only():
    nothing = IntervalStatistics(*(np.full(np.shape(value), np.nan) for value in make_interval()))
    group, run = run_features([nothing._replace(steps=np.float64(50), nonfinite=np.float64(0))] * 3)
    defined = {n for n in GROUP_FEATURES + GLOBAL_FEATURES if np.isfinite(feature(n, group, run)).all()}
    residuals = {"learning_rate_residual", "weight_decay_residual", "beta1_residual", "dropout_residual"}
    counted = {"plateau_share", "plateau_length", "progress", "epochs", "epochs_per_interval", "decisions"}
    flags = {"horizon_known", "validation_missing", "loss_not_finite"}
    assert defined == residuals | counted | flags | {"shrinkage", "dropout"}
    assert (feature("validation_missing", group, run) == 1).all()


@pytest.mark.parametrize("factor", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize(
    "powers",
    [
        pytest.param({"loss_sum": 1, "loss_square_sum": 2}, id="loss"),
        pytest.param({"validation_loss": 1, "training_sample_loss": 1}, id="reported losses"),
        pytest.param({"validation": 1}, id="metric"),
        pytest.param({"gradient_norm": 1}, id="gradients"),
        pytest.param({"weight_norm": 1}, id="weights"),
    ],
)
def test_no_feature_depends_on_scale(powers: dict[str, int], factor: float):
    intervals = random_intervals(3)
    multiplied = scaled(intervals, **{name: factor**power for name, power in powers.items()})
    assert_same(run_features(multiplied), run_features(intervals), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_curvature_counts_relative_to_the_step_that_the_rate_takes(factor: float):
    # A loss c times as large has c times the curvature, and Adam's steps do not see it: the one feature that does is
    # scaled_curvature, rate times curvature. A rate of 1/c gives it back (and c times the decay the same shrinkage).
    intervals = random_intervals(3)
    multiplied = run_features(scaled(intervals, curvature=factor))
    plain = run_features(intervals)
    for index, name in enumerate(GROUP_FEATURES):
        same = np.allclose(multiplied[0][..., index], plain[0][..., index], equal_nan=True)
        assert same == (name != "scaled_curvature"), name
    np.testing.assert_array_equal(multiplied[1], plain[1])
    rates = {"learning_rate": np.full(2, 0.02 / factor), "weight_decay": np.full(2, 0.3 * factor)}
    assert_same(run_features(scaled(intervals, curvature=factor), **rates), plain, rtol=1e-12, atol=1e-12)


def test_no_feature_depends_on_seconds_or_samples():
    intervals = random_intervals(5)
    other = [row._replace(seconds=np.float64(index**3), samples=np.float64(1)) for index, row in enumerate(intervals)]
    for one, two in zip(run_features(other), run_features(intervals), strict=True):
        np.testing.assert_array_equal(one, two)


def test_arguments_are_not_changed():
    statistics, controls = make_interval(), make_controls(0)
    _, history = featurize(statistics, controls, initial_history(2, np, np.float64), np)
    before = copy.deepcopy((statistics, controls, history))
    featurize(statistics, controls, history, np)
    for old, new in zip(before, (statistics, controls, history), strict=True):
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)


def test_golden_loss_features():
    # Mean losses 1.0 and then 0.6, without spread. Half-lives 1, 3, 9: decays 0.5, 0.7937, 0.9259.
    # Averages: 1 - 0.4 (1 - decay) = 0.8, 0.91748, 0.97035; scale: the slowest. Best: 0.6.
    intervals = [
        make_interval(loss_sum=50.0, loss_square_sum=50.0),
        make_interval(loss_sum=30.0, loss_square_sum=18.0),
    ]
    group, run = run_features(intervals)
    assert feature("loss_fast_trend", group, run)[1] == pytest.approx((0.8 - 0.91748) / 0.97035, abs=1e-4)
    assert feature("loss_slow_trend", group, run)[1] == pytest.approx((0.91748 - 0.97035) / 0.97035, abs=1e-4)
    assert feature("loss_above_best", group, run).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)


def test_golden_validation_features():
    values = [0.1, 0.2, 0.15, np.nan, 0.25]
    group, run = run_features([make_interval(validation=value) for value in values])
    below = feature("validation_below_best", group, run)
    assert below[[0, 1, 2, 4]].tolist() == pytest.approx([0.0, 0.0, -0.25, 0.0])  # (0.15 - 0.2) / 0.2
    change = feature("validation_change", group, run)
    assert change[[1, 2, 4]].tolist() == pytest.approx([0.5, -0.25, 0.4])  # the last against 0.15: 0.1 / 0.25
    assert np.isnan(change[[0, 3]]).all()
    assert feature("validation_gain", group, run).tolist() == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.6])
    assert feature("plateau_length", group, run).tolist() == pytest.approx(np.log1p([0, 0, 1, 2, 0]))
    assert feature("plateau_share", group, run).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 4, 0])
    assert feature("validation_missing", group, run).tolist() == [0, 0, 0, 1, 0]


def test_golden_generalization_gap():
    # It fell from 0.7 to 0.5, and validation is 0.05 above: a quarter of that is memorised.
    losses = [(0.7, 0.7), (0.695, 0.7), (0.5, 0.55), (0.5, np.nan), (np.nan, 0.6), (0.4, 0.7), (0.75, 0.7)]
    run = run_features([make_interval(training_sample_loss=a, validation_loss=b) for a, b in losses])
    gap = feature("generalization_gap", *run)
    assert gap[[2, 5]].tolist() == pytest.approx([0.25, 1.0])
    assert np.isnan(gap[[0, 1, 3, 4, 6]]).all()  # not before it has fallen, by more than noise
    late = run_features([make_interval(training_sample_loss=a) for a in (np.nan, 0.8, 0.6)])
    assert feature("generalization_gap", *late)[2] == pytest.approx(0.0)  # 0.6 of validation, too


def test_golden_group_features():
    intervals = [make_interval(), make_interval(gradient_norm=[0.1, 0.4], weight_norm=[8.0, 2.0])]
    group, run = run_features(intervals)
    assert feature("gradient_below_peak", group, run)[1].tolist() == pytest.approx([np.log(0.5), 0.0])
    assert feature("weight_growth", group, run)[1].tolist() == pytest.approx([np.log(2), np.log(0.5)])
    assert feature("shrinkage", group, run)[0].tolist() == pytest.approx([np.log(0.02 * 0.3 * 50)] * 2)
    assert feature("straightness", group, run)[0].tolist() == pytest.approx([np.log(0.2 / (50 * 0.01))] * 2)
    assert feature("scaled_curvature", group, run)[0].tolist() == pytest.approx([np.arcsinh(0.01)] * 2)
    assert feature("update_ratio", group, run)[0].tolist() == pytest.approx([np.log(0.01)] * 2)


def test_unknown_horizon_and_epochs():
    nan = np.float64(np.nan)
    group, run = run_features([make_interval()] * 2, progress=nan, epochs=nan)
    assert np.isnan(feature("progress", group, run)).all()
    assert np.isnan(feature("epochs", group, run)).all()
    assert (feature("horizon_known", group, run) == 0).all()
    assert (feature("horizon_known", *run_features([make_interval()])) == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_interval_is_flagged_and_leaves_no_trace_in_the_averages(bad: float):
    broken = make_interval(loss_sum=bad, loss_square_sum=bad, nonfinite=3.0, gradient_norm=[bad, 0.2], validation=bad)
    calm = [make_interval(), *(make_interval(training_sample_loss=0.4) for _ in range(2))]
    group, run = run_features([calm[0], broken, calm[1]])
    assert feature("loss_not_finite", group, run).tolist() == [0, 1, 0]
    assert np.isfinite(group[2]).all()
    assert np.isfinite(run[2]).all()
    undisturbed = run_features(calm)
    for name in ("loss_fast_trend", "gradient_fast_trend", "gradient_below_peak", "loss_above_best", "validation_gain"):
        a, b = feature(name, group, run)[2], feature(name, *undisturbed)[2]
        np.testing.assert_allclose(a, b, err_msg=name)
