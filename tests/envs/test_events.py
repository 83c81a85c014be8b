"""Events: none by default, to the bit; each hides or changes what it says, when it says; the contract always holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.domains import make_domain
from envs.events import GRADIENT_STATISTICS, HELD_OUT_LOSSES, EventConfig, EventfulEnvironment, draw_events
from envs.simulated import SimulatedPrior, simulate
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn.controller.actions import Values
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import Environment, Plan
from metalearn.signals import GROUP_STATISTICS, IntervalStatistics
from metalearn.testing import ENVIRONMENT_CHECKS, JITTED_ENVIRONMENT_CHECKS, EnvironmentContract
from tests.meta_training.toy import ToyEnvironment, ToyPool

EVERYTHING = EventConfig(
    missing_validation=1.0,
    missing_gradients=1.0,
    missing_gradients_share=(0.1, 0.5),
    delayed_validation=0.5,
    missing_losses=0.5,
    hardware_change=1.0,
    drift=0.5,
    onset=(1, 2),
)
VALUES = Values(jnp.full(2, 0.02), jnp.full(2, 0.2), jnp.full(2, 0.9), jnp.float32(0.1))


class Window(NamedTuple):
    first_row: Any
    num_rows: Any


class RecordedTask(NamedTuple):
    data: Window


@dataclass(frozen=True)
class Recorder(ToyEnvironment):
    """Trains nothing: its validation counts intervals, 0.1 each, and its loss sums tell the window it was given."""

    def step(self, task: Any, state, values, plan, *, key):
        state, ones = state + 0.1, jnp.ones(2)
        statistics = IntervalStatistics(*(jnp.ones(()) for _ in IntervalStatistics._fields))._replace(
            **dict.fromkeys(GROUP_STATISTICS, ones),
            validation=state,
            loss_sum=task.data.first_row,
            loss_square_sum=task.data.num_rows,
            seconds=jnp.float32(2.0),
        )
        return state, statistics


TASK = RecordedTask(Window(jnp.float32(0.0), jnp.float32(1000.0)))


def record(config, *, seeds=1, step_seconds=None):
    """Return the statistics of 8 intervals of the recorder and the final states, with an axis of seeds if above 1."""
    environment = EventfulEnvironment(Recorder(), config, step_seconds)
    plan = Plan(jnp.int32(10), jnp.int32(0), jnp.float32(80.0), jnp.bool_(False))

    @jax.jit
    @jax.vmap
    def episode(seed):
        key = jax.random.key(seed)

        def interval(state, index):
            return environment.step(TASK, state, VALUES, plan, key=jax.random.fold_in(key, index + 1))

        state = environment.reset(TASK, key=jax.random.fold_in(key, 0))
        return jax.lax.scan(interval, state, jnp.arange(8))

    state, statistics = jax.tree.map(np.asarray, episode(jnp.arange(seeds)))
    return jax.tree.map(lambda leaf: leaf[0], (statistics, state)) if seeds == 1 else (statistics, state)


ALL_MEASURED = np.arange(1, 9) * np.float32(0.1)


def test_nothing_happens_by_default():
    statistics, state = record(EventConfig())
    np.testing.assert_allclose(statistics.validation, ALL_MEASURED, rtol=1e-6)
    assert np.array_equal(statistics.loss_sum, np.zeros(8)) and np.array_equal(statistics.loss_square_sum, [1000.0] * 8)
    assert np.array_equal(statistics.seconds, [2.0] * 8)
    assert not np.isnan(np.concatenate([np.ravel(value) for value in statistics])).any()
    assert int(state.interval) == 8


def test_a_late_validation_comes_one_interval_later():
    statistics, _ = record(EventConfig(delayed_validation=1.0))
    np.testing.assert_allclose(statistics.validation, [np.nan, *ALL_MEASURED[:-1]], rtol=1e-6)
    for name in HELD_OUT_LOSSES:  # which are reported with it
        np.testing.assert_array_equal(getattr(statistics, name), [np.nan, *[1.0] * 7])


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_a_missing_validation_is_nan_and_the_others_are_as_measured(late):
    config = EventConfig(missing_validation=1.0, missing_validation_share=(0.5, 0.5), delayed_validation=late)
    statistics, _ = record(config, seeds=100)
    heard = statistics.validation
    known = np.broadcast_to([np.nan, *ALL_MEASURED[:-1]] if late else ALL_MEASURED, heard.shape)
    missing = np.isnan(heard)
    assert all(np.array_equal(np.isnan(getattr(statistics, name)), missing) for name in HELD_OUT_LOSSES)
    np.testing.assert_allclose(heard[~missing], known[~missing], rtol=1e-6)
    assert missing[:, 1:].mean() == pytest.approx(0.5, abs=0.07)  # of 700 draws: 3.7 standard deviations
    assert len({tuple(row) for row in missing}) > 20  # of 2^8 patterns: each interval is drawn apart


def test_missing_gradients_leave_what_weights_and_losses_say():
    statistics, _ = record(EventConfig(missing_gradients=1.0))
    for name, values in statistics._asdict().items():
        assert np.isnan(values).all() == (name in GRADIENT_STATISTICS), name


def test_a_loop_that_reports_no_losses_reports_them_in_no_interval():
    statistics, _ = record(EventConfig(missing_losses=0.5), seeds=50)
    for name, values in statistics._asdict().items():
        missing = np.isnan(values).reshape(50, -1)
        assert np.array_equal(missing.any(1), missing.all(1)), name
        assert (0 < missing[:, 0].sum() < 50) == (name in HELD_OUT_LOSSES), name


def test_a_hardware_change_scales_seconds_from_its_onset_on():
    config = EventConfig(hardware_change=1.0, slowdown=(3.0, 3.0), onset=(2, 5))
    statistics, state = record(config)
    onset = int(state.events.change_at)
    assert 2 <= onset <= 5
    np.testing.assert_allclose(statistics.seconds, [2.0] * onset + [6.0] * (8 - onset))


def test_seconds_come_from_the_cost_model_where_there_is_one():
    statistics, _ = record(
        EventConfig(hardware_change=1.0, slowdown=(2.0, 2.0), onset=(4, 4)),
        step_seconds=lambda task: 1e-3 * task.data.num_rows,
    )
    # 10 steps of 1 second each, twice that from interval 4 on
    np.testing.assert_allclose(statistics.seconds, [10.0] * 4 + [20.0] * 4)


def test_drift_moves_the_window_from_the_earlier_rows_to_the_later_ones():
    config = EventConfig(drift=1.0, drift_share=(0.3, 0.3), onset=(3, 3))
    statistics, _ = record(config)
    # floor(0.3 × 1000) = 300 earlier rows, 0 to 299, then the other 700, from 300 on
    np.testing.assert_allclose(statistics.loss_sum, [0.0] * 3 + [300.0] * 5)
    np.testing.assert_allclose(statistics.loss_square_sum, [300.0] * 3 + [700.0] * 5)
    statistics, _ = record(config.__class__(drift=1e-12))
    assert np.array_equal(statistics.loss_square_sum, [1000.0] * 8)


def test_events_are_as_likely_and_as_large_as_configured():
    config = EventConfig(
        missing_validation=0.2,
        missing_validation_share=(0.4, 0.6),
        missing_gradients=0.3,
        delayed_validation=0.4,
        missing_losses=0.7,
        hardware_change=0.5,
        slowdown=(0.25, 4.0),
        drift=0.6,
        drift_share=(0.3, 0.7),
        onset=(4, 6),
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(4000))
    events = jax.tree.map(np.asarray, jax.vmap(lambda key: draw_events(config, key=key))(keys))
    never = np.iinfo(np.int32).max
    happened = [
        events.missing_validation > 0,
        events.missing_gradients > 0,
        events.delayed,
        events.change_at < never,
        events.drift_at < never,
        events.silent,
    ]
    shares = [flag.mean() for flag in happened]
    np.testing.assert_allclose(shares, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], atol=0.03)  # 4 deviations
    assert np.corrcoef(happened)[np.triu_indices(6, 1)] == pytest.approx(0.0, abs=0.07)
    share = events.missing_validation[happened[0]]
    assert share.min() >= 0.4 and share.max() <= 0.6 and share.mean() == pytest.approx(0.5, abs=0.01)
    assert set(events.missing_gradients[happened[1]]) == {1.0}
    for onset in (events.change_at, events.drift_at):
        counts = np.bincount(onset[onset < never], minlength=7)
        assert counts[:4].sum() == 0 and len(counts) == 7 and counts[4:].min() > 0.28 * counts.sum()
    assert np.median(events.slowdown) == pytest.approx(1.0, abs=0.1)  # log-uniform over [1/4, 4]
    assert events.slowdown.min() >= 0.25 and events.slowdown.max() <= 4.0


def test_drift_needs_a_task_with_rows():
    environment = EventfulEnvironment(ToyEnvironment(), EventConfig(drift=0.1))
    with pytest.raises(InvalidArgumentError, match="`drift` must be 0 for tasks without `data`"):
        environment.reset(ToyPool().tasks, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drift": 1.5}, r"`drift` must be a probability in \[0, 1\], got 1.5"),
        ({"missing_validation": float("nan")}, "`missing_validation` must be a probability"),
        ({"slowdown": (2.0, 1.0)}, r"`slowdown` must be \(low, high\) with 0.001 <= low <= high <= 1000, got"),
        ({"drift_share": (0.0, 1.1)}, "`drift_share` must be"),
        ({"onset": (-1, 3)}, "`onset` must be"),
    ],
)
def test_what_a_configuration_refuses(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        EventConfig(**changes)


BUCKET = Bucket(users=128, items=96, interactions=4096, dim=8, batch=32, evaluated=64)


@pytest.fixture(scope="module")
def tasks():
    prior = SimulatedPrior(users=(110, 110), items=(80, 80), history=(15.0, 15.0))
    domains = [make_domain(simulate(prior, seed=seed), name="simulated", split="leave-last-out") for seed in (0, 1)]
    return [make_task(domain, BUCKET) for domain in domains]


@pytest.fixture(scope="module")
def eventful(tasks):
    environment = EventfulEnvironment(VectorizedEnvironment(BUCKET), EVERYTHING, lambda task: jnp.float32(1e-3))
    return EnvironmentContract(environment=environment, tasks=tasks)


@pytest.mark.parametrize("check", ENVIRONMENT_CHECKS + JITTED_ENVIRONMENT_CHECKS)
def test_the_contract_holds_when_everything_happens(check, eventful):
    check(eventful)


def assert_same_run(inner, outer):
    """Compare a run of the inner environment with the one inside the events, to the bit."""
    leaves = zip(jax.tree.leaves(inner.state), jax.tree.leaves(outer.state.inner), strict=True)
    assert all(np.array_equal(first, second, equal_nan=True) for first, second in leaves)
    assert np.array_equal(inner.statistics.loss_sum, outer.statistics.loss_sum)
    assert (inner.score, inner.status) == (outer.score, outer.status)


def assert_transparent(environment, tasks):
    wrapped = EventfulEnvironment(environment, EventConfig())
    assert isinstance(wrapped, Environment)
    inner, outer = (EnvironmentContract(environment=one, tasks=tasks).run() for one in (environment, wrapped))
    assert_same_run(inner, outer)
    for name in IntervalStatistics._fields:
        assert np.array_equal(getattr(inner.statistics, name), getattr(outer.statistics, name), equal_nan=True), name


class Noise(Recorder):
    """Its weights and all that it measures are noise from its keys."""

    def reset(self, task, *, key):
        return jax.random.normal(key, ())

    def step(self, task, state, values, plan, *, key):
        key_state, key_loss = jax.random.split(key)
        _, statistics = super().step(task, state, values, plan, key=key)
        noise = jax.random.normal(key_loss, ())
        state = state + values.learning_rate.sum() * jax.random.normal(key_state, ())
        return state, jax.tree.map(lambda value: value * noise, statistics)


def test_without_events_it_is_the_inner_environment_to_the_bit():
    assert_transparent(Noise(), [TASK, TASK])


def test_events_take_nothing_from_the_keys_of_the_inner_environment():
    hidden = EventfulEnvironment(
        Noise(), EventConfig(missing_validation=1.0, missing_gradients=1.0, hardware_change=1.0)
    )
    inner, outer = (EnvironmentContract(environment=one, tasks=[TASK, TASK]).run() for one in (Noise(), hidden))
    assert_same_run(inner, outer)


@pytest.mark.slow
def test_without_events_it_is_the_jax_environment_to_the_bit(tasks):
    assert_transparent(VectorizedEnvironment(BUCKET), tasks)


@pytest.mark.slow
def test_only_drift_changes_a_run_of_the_jax_environment(tasks, eventful):
    plain = EnvironmentContract(environment=VectorizedEnvironment(BUCKET), tasks=tasks)
    drifted = set()
    for seed in range(6):
        inner, outer = plain.run(seed=seed), eventful.run(seed=seed)
        drifts = bool(outer.state.events.drifts)
        assert np.array_equal(inner.statistics.loss_sum, outer.statistics.loss_sum) != drifts
        if not drifts:
            assert_same_run(inner, outer)
        drifted.add(drifts)
    assert drifted == {False, True}
