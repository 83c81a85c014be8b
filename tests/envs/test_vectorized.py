"""The JAX environment: padding changes nothing, one program serves a bucket, seeds decide everything."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.domains import make_domain
from envs.simulated import SimulatedPrior, simulate
from envs.vectorized import Bucket, VectorizedEnvironment, make_task, stack_tasks
from metalearn.controller.actions import Values
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import Plan, Status

BUCKET = Bucket(users=128, items=96, interactions=4096, dim=8, batch=32, evaluated=64)
VALUES = Values(jnp.array([0.02, 0.02]), jnp.array([0.2, 0.2]), jnp.array([0.9, 0.9]), jnp.float32(0.1))


def _domain(seed):
    prior = SimulatedPrior(users=(110, 110), items=(80, 80), history=(15.0, 15.0))
    return make_domain(simulate(prior, seed=seed), name="simulated", split="leave-last-out")


def _task(seed, bucket=BUCKET):
    return jax.tree.map(jnp.asarray, make_task(_domain(seed), bucket))


def _plan(index, horizon=80.0, single=False):
    return Plan(jnp.int32(20), jnp.int32(20 * index), jnp.float32(horizon), jnp.bool_(single))


@pytest.fixture(scope="module")
def environment():
    return VectorizedEnvironment(BUCKET)


@pytest.fixture(scope="module")
def step(environment):
    return jax.jit(environment.step)


def _run(environment, step, task, intervals=3, seed=0, **plan):
    state = environment.reset(task, key=jax.random.key(seed))
    rows = []
    for index in range(intervals):
        state, statistics = step(task, state, VALUES, _plan(index, **plan), key=jax.random.key(100 + index))
        rows.append(statistics)
    return state, rows


def test_seeds_reproduce_to_the_bit(environment, step):
    task = _task(0)
    (first, rows), (second, again) = (_run(environment, step, task) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert float(rows[-1].loss_sum) == float(again[-1].loss_sum)
    other, _ = _run(environment, step, task, seed=1)
    assert not np.array_equal(first.params.user, other.params.user)


def test_one_program_serves_every_task_of_a_bucket(environment):
    step = jax.jit(environment.step)
    for seed in (0, 1, 2):
        _run(environment, step, _task(seed), intervals=2)
    assert step._cache_size() == 1


def test_padding_rows_are_never_touched(environment, step):
    task = _task(0)
    state, rows = _run(environment, step, task)
    users, items = int(task.num_users), int(task.num_items)
    assert users < BUCKET.users and items < BUCKET.items
    for tables in (state.params, state.optimizer.first, state.optimizer.second):
        assert not np.any(tables.user[users:]) and not np.any(tables.item[items:]) and not np.any(tables.bias[items:])
    norm = float(jnp.sqrt(jnp.square(state.anchor.user[:users]).sum()))
    assert float(rows[-1].weight_norm[0]) == pytest.approx(norm, rel=1e-5)


def test_a_larger_bucket_measures_the_same(step, environment):
    wide = Bucket(users=200, items=150, interactions=6000, dim=8, batch=32, evaluated=64)
    other = VectorizedEnvironment(wide)
    narrow_task, wide_task = _task(0), _task(0, wide)
    # The same first weights, which draws of another shape would not give.
    state = environment.reset(narrow_task, key=jax.random.key(0))
    padded = jax.tree.map(
        lambda small, large: jnp.zeros_like(large).at[tuple(slice(0, n) for n in small.shape)].set(small),
        state,
        other.reset(wide_task, key=jax.random.key(0)),
    )
    _, small = step(narrow_task, state, VALUES, _plan(0), key=jax.random.key(1))
    _, large = jax.jit(other.step)(wide_task, padded, VALUES, _plan(0), key=jax.random.key(1))
    for name in ("loss_sum", "gradient_norm", "update_ratio", "touched", "weight_norm"):
        np.testing.assert_allclose(getattr(small, name), getattr(large, name), rtol=1e-4, err_msg=name)
    assert float(small.validation) == pytest.approx(float(large.validation), abs=1e-5)


def test_one_group_pools_the_sums(environment, step):
    task = _task(0)
    _, apart = _run(environment, step, task, intervals=1)
    _, together = _run(environment, step, task, intervals=1, single=True)
    norms = np.asarray(apart[0].gradient_norm)
    assert float(together[0].gradient_norm[0]) == pytest.approx(np.sqrt((norms**2).sum()), rel=1e-5)
    assert np.isnan(together[0].gradient_norm[1])


def test_an_unknown_horizon_holds_the_rate_and_averages(environment, step):
    task = _task(0)
    state, _ = _run(environment, step, task, horizon=float("nan"))
    assert float(state.num_averaged) > 0
    assert not np.array_equal(state.average.user, state.params.user)
    decayed, _ = _run(environment, step, task, intervals=4, horizon=80.0)
    held, _ = _run(environment, step, task, intervals=4, horizon=float("nan"))
    moved = [float(jnp.abs(s.params.user - s.anchor.user).max()) for s in (decayed, held)]
    assert moved[0] < 0.2 * moved[1]  # one step at the end of a cosine against one at the full rate


def _losses(statistics):
    return float(statistics.validation_loss), float(statistics.training_sample_loss)


def test_validation_loss_does_not_follow_training_loss_where_a_run_memorises(environment, step):
    task = _task(0)
    _, learning = _run(environment, step, task, intervals=1)
    state = environment.reset(task, key=jax.random.key(0))
    memorising = VALUES._replace(weight_decay=jnp.zeros(2), dropout=jnp.float32(0.0))
    for index in range(40):
        state, statistics = step(task, state, memorising, _plan(index, horizon=800.0), key=jax.random.key(index))
    (held_out, own), (held_out_at_first, own_at_first) = _losses(statistics), _losses(learning[0])
    assert own < 0.5 * own_at_first and own_at_first == pytest.approx(held_out_at_first, rel=0.1)
    assert held_out - own > 0.5 * (own_at_first - own)  # most of what was learnt is memorised


def test_losses_are_of_the_same_pairs_every_time_and_of_the_weights_that_are_validated(environment, step):
    task = _task(0)
    still = VALUES._replace(learning_rate=jnp.zeros(2))
    state = environment.reset(task, key=jax.random.key(0))
    rows = []
    for index in range(2):
        state, statistics = step(task, state, still, _plan(index), key=jax.random.key(index))
        rows.append(_losses(statistics))
    assert rows[0] == rows[1] and rows[0][0] != rows[0][1]
    state, rows = _run(environment, step, task, horizon=float("nan"))
    expected = environment.bucket.make_learner().mean_loss(
        state.average, task.data, task.held_out_user, task.held_out_item
    )
    assert float(rows[-1].validation_loss) == pytest.approx(float(expected), rel=1e-6)


def test_without_validation_pairs_there_is_no_validation_loss(environment, step):
    domain = _domain(0)
    task = make_task(replace(domain, validation=domain.validation.select(np.arange(0))), BUCKET)
    _, rows = _run(environment, step, jax.tree.map(jnp.asarray, task), intervals=1)
    assert np.isnan(float(rows[0].validation_loss)) and np.isfinite(float(rows[0].training_sample_loss))


def test_a_family_whose_batches_are_histories_reports_no_losses():
    bucket = replace(BUCKET, learner="self_attention", history=8, dim=4)
    environment = VectorizedEnvironment(bucket)
    _, rows = _run(environment, jax.jit(environment.step), _task(0, bucket), intervals=1)
    assert np.isnan(_losses(rows[0])).all()


def test_a_diverged_run_scores_nothing(environment, step):
    task = _task(0)
    state = environment.reset(task, key=jax.random.key(0))
    wild = VALUES._replace(learning_rate=jnp.full(2, 3e38, jnp.float32), weight_decay=jnp.zeros(2))
    for index in range(2):
        state, statistics = step(task, state, wild, _plan(index), key=jax.random.key(index))
    assert int(statistics.nonfinite) > 0
    assert float(statistics.validation) == 0.0
    assert float(environment.score(task, state)) <= 0.1
    assert int(environment.status(state)) == Status.NONFINITE


def test_statuses(environment, step):
    task = _task(0)
    state, _ = _run(environment, step, task)
    assert int(environment.status(state)) == Status.RUNNING
    state = environment.reset(task, key=jax.random.key(0))
    wild = VALUES._replace(learning_rate=jnp.full(2, 5.0, jnp.float32), weight_decay=jnp.zeros(2))
    state, _ = step(task, state, wild, _plan(0), key=jax.random.key(1))
    assert int(environment.status(state)) == Status.DIVERGED


def test_a_domain_that_does_not_fit_is_refused():
    tiny = Bucket(users=50, items=50, interactions=512, dim=4, batch=16, evaluated=16)
    with pytest.raises(InvalidArgumentError, match="the bucket holds 50 and 50"):
        make_task(_domain(0), tiny)


def test_stacked_tasks_keep_their_leaves():
    stacked = stack_tasks([make_task(_domain(seed), BUCKET) for seed in (0, 1)])
    assert stacked.data.user.shape == (2, BUCKET.interactions)
    assert stacked.test_seen.shape == (2, BUCKET.evaluated, BUCKET.items)
