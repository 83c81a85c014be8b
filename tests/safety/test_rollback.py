"""The rules of rolling back: each by hand, what a run without accidents may do, and the state they keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from metalearn.errors import InvalidArgumentError
from metalearn.safety.rollback import (
    Health,
    RollbackConfig,
    RollbackState,
    init,
    rolled_back,
    update,
    validation_noise,
)

CONFIG = RollbackConfig()
GOOD = Health(50.0, 0.6, 0.0, True, 0.1)


def after(*intervals: Health, config: RollbackConfig = CONFIG) -> RollbackState:
    """Return the state after good intervals."""
    state = init()
    for health in intervals:
        state, reasons = update(config, state, health)
        assert reasons == ()
    return state


def reasons(health: Health, *before: Health, config: RollbackConfig = CONFIG) -> tuple[str, ...]:
    return update(config, after(*before, config=config), health)[1]


def test_what_is_not_finite():
    assert reasons(GOOD._replace(state_finite=False)) == ("a weight, or a moment of the optimizer, is not finite",)
    assert reasons(GOOD._replace(nonfinite_steps=2.0)) == ("the loss of 2 of 50 steps was not finite",)
    assert reasons(GOOD._replace(nonfinite_steps=math.nan)) == ()


def test_divergence_is_relative_to_the_best_level():
    # first 0.8, best 0.6: 0.6 + 2 · 0.6 = 1.8
    before = (GOOD._replace(loss=0.8), GOOD)
    assert reasons(GOOD._replace(loss=1.79), *before) == ()
    assert reasons(GOOD._replace(loss=1.81), *before) == (
        "the mean loss 1.81 lies far above its best running level 0.6",
    )
    # A tenth of the first loss counts as a quarter of it: 0.08 + 2 · 0.2 = 0.48
    low = (GOOD._replace(loss=0.8), GOOD._replace(loss=0.08))
    assert reasons(GOOD._replace(loss=0.47), *low) == ()
    assert reasons(GOOD._replace(loss=0.49), *low) != ()
    # Negative losses: from -1.0 on, up by 2 · 1.0
    assert reasons(GOOD._replace(loss=0.9), GOOD._replace(loss=-1.0)) == ()
    assert reasons(GOOD._replace(loss=1.1), GOOD._replace(loss=-1.0)) != ()


def test_a_loss_that_rises_slowly_is_no_divergence():
    state = init()
    for loss in np.geomspace(0.5, 5.0, 60):
        state, found = update(CONFIG, state, GOOD._replace(loss=float(loss)))
        assert found == ()


def test_validation_collapses_beyond_its_noise_and_a_share_of_its_level():
    quiet = [GOOD._replace(validation=v) for v in (0.100, 0.101, 0.100, 0.102, 0.101, 0.100)]  # median of five: 0.101
    assert reasons(GOOD._replace(validation=0.08), *quiet) == ()  # far beyond the noise, but less than a quarter
    (sentence,) = reasons(GOOD._replace(validation=0.07), *quiet)
    assert sentence.startswith("validation collapsed to 0.07 from 0.101, with noise of ")
    noisy = [GOOD._replace(validation=v) for v in (0.10, 0.18, 0.06, 0.16, 0.05, 0.17)]
    assert reasons(GOOD._replace(validation=0.01), *noisy) == ()
    assert reasons(GOOD._replace(validation=0.0), *quiet[:4]) == ()  # too few to know
    assert reasons(GOOD._replace(validation=math.nan), *quiet) == ()  # lost
    absurd = [*quiet[:3], GOOD._replace(validation=1e9), *quiet[3:]]
    assert reasons(GOOD, *absurd) == ()  # one absurd value makes no collapse of what follows


def test_metrics_to_be_minimized_come_negated():
    quiet = [GOOD._replace(validation=-v) for v in (2.0, 1.9, 1.95, 1.85, 1.9, 1.85)]
    assert reasons(GOOD._replace(validation=-2.2), *quiet) == ()
    assert reasons(GOOD._replace(validation=-6.0), *quiet) != ()


def test_constraints_that_nothing_else_can_keep():
    assert reasons(GOOD._replace(unkept=("too slow", "nothing helps"))) == ("too slow; nothing helps",)


def test_a_bad_interval_changes_nothing_that_the_rules_know():
    state = after(GOOD, GOOD)
    assert update(CONFIG, state, GOOD._replace(loss=math.nan, nonfinite_steps=1.0, validation=9.0))[0] is state


def test_repeated_rollbacks_end_in_the_fallback_after_which_only_what_is_not_finite_counts():
    saved = after(GOOD)
    found = after(GOOD, GOOD)
    diverged = GOOD._replace(loss=1e9, nonfinite_steps=3.0, validation=-1e9)
    for count in range(1, 8):
        found = rolled_back(CONFIG, saved, found)
        assert found == saved._replace(rollbacks=count, fallen_back=count >= 3)
        told = update(CONFIG, found, diverged)[1]
        assert len(told) == (2 if count < 3 else count < 6)  # what made it fall back may go on for a while
        assert not told or "best running level" in told[-1]
        assert update(CONFIG, found, GOOD._replace(state_finite=False))[1] != ()
    assert update(CONFIG, found._replace(rollbacks=0), diverged)[1] == ()  # after a new snapshot
    assert rolled_back(CONFIG, saved, saved._replace(fallen_back=True)).fallen_back


@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=9))
def test_noise_is_the_scaled_deviation_of_differences(values: list[float]):
    expected = scipy.stats.median_abs_deviation(np.diff(values), scale="normal") / math.sqrt(2.0)
    assert validation_noise(tuple(values)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_undisturbed_learning_curves_raise_no_alarm():
    """Two hundred noisy runs of forty intervals: rising validation with overfitting after it, falling loss."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        time = np.arange(40) / rng.uniform(3, 20)
        loss = 0.1 + 0.6 * np.exp(-time) * (1 + 0.05 * rng.standard_normal(40))
        level = rng.uniform(0.02, 0.3) * (1.05 - np.exp(-time)) * (1 - 0.3 * np.clip(np.arange(40) / 40 - 0.5, 0, 1))
        validation = level * (1 + rng.uniform(0.01, 0.08) * rng.standard_normal(40))
        state = init()
        for one, other in zip(loss, validation, strict=True):
            state, found = update(CONFIG, state, GOOD._replace(loss=float(one), validation=float(other)))
            alarms += bool(found)
    assert alarms == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "`every` must be a positive int, got 0"),
        ({"max_rollbacks": None}, "`max_rollbacks` must be a positive int"),
        ({"limit_bytes": 1.5}, "`limit_bytes` must be a positive int"),
        ({"max_cost": 0.0}, "`max_cost` must lie between 0 and 1, got 0.0"),
        ({"loss_ratio": 1.0}, "`loss_ratio` must lie between 1 and inf"),
        ({"validation_noise": math.nan}, "`validation_noise` must lie"),
        ({"place": "cloud"}, "`place` must be 'auto', 'device', 'host' or 'disk', got 'cloud'"),
        ({"place": "disk"}, "`folder` is None"),
    ],
)
def test_bad_configs_are_refused_by_name(changes, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        RollbackConfig(**changes)
