"""The JAX environment: many padded tasks of one size bucket in one jitted program.

Shape legend: U user, I item, N interaction, D embedding dimension, B batch, E evaluated user, T target, G = 2 group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.domains import Domain, EvaluationSet, evaluation_set
from envs.learners import matrix_factorization as learner
from metalearn.controller.actions import Values, schedule_multiplier
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import Plan
from metalearn.signals import IntervalStatistics, interval_statistics

AVERAGE_EVERY = 8
"""Steps between updates of the averaged weights."""
AVERAGE_POWER = 8.0
"""Polynomial averaging: update t has weight (p + 1) / (t + p), so the last 1 / (p + 1) of the run counts most."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Static sizes that tasks are padded to; one compilation each.

    Args:
      users, items, interactions: padded sizes of the training table.
      dim: embedding dimension.
      batch: training triples per step.
      evaluated, targets: users in an evaluation set, and held-out items of each.
    """

    users: int
    items: int
    interactions: int
    dim: int
    batch: int
    evaluated: int
    targets: int = 4


SMALL = Bucket(users=512, items=512, interactions=16_384, dim=8, batch=64, evaluated=256)
MIDDLE = Bucket(users=1_024, items=1_024, interactions=65_536, dim=16, batch=256, evaluated=384)
LARGE = Bucket(users=6_144, items=6_144, interactions=262_144, dim=32, batch=512, evaluated=512)


class Task(NamedTuple):
    """One domain, padded to a bucket. Stacked along a leading axis it is a batch of tasks."""

    user: Any
    """int32 [N]"""
    item: Any
    """int32 [N]"""
    num_interactions: Any
    num_users: Any
    num_items: Any
    validation_users: Any
    """int32 [E]; likewise below"""
    validation_targets: Any
    """int32 [E, T], -1 for padding"""
    validation_seen: Any
    """bool [E, I], items that are not candidates"""
    test_users: Any
    test_targets: Any
    test_seen: Any
    validation_floor: Any
    """NDCG@10 of ranking by popularity"""
    test_floor: Any


class EnvironmentState(NamedTuple):
    """A model in training."""

    learner: learner.LearnerState
    average: learner.Params
    num_averaged: Any
    anchor: learner.Params
    """weights at the previous probe"""
    best: learner.Params
    best_validation: Any
    steps: Any


def _pad(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    return np.concatenate([values, np.full(size - len(values), fill, values.dtype)])


def _padded_evaluation(evaluation: EvaluationSet, bucket: Bucket, num_items: int, rng: np.random.Generator):
    """Pads an evaluation set; of a user's targets at most T are ranked, the others are hidden."""
    users = np.full(bucket.evaluated, -1, np.int32)
    targets = np.full((bucket.evaluated, bucket.targets), -1, np.int32)
    seen = np.ones((bucket.evaluated, bucket.items), bool)
    for row, user in enumerate(evaluation.users):
        users[row] = user
        mine = rng.permutation(evaluation.targets.row(row))
        seen[row, :num_items] = False
        seen[row, evaluation.seen.row(row)] = True
        seen[row, mine[bucket.targets :]] = True
        targets[row, : min(len(mine), bucket.targets)] = mine[: bucket.targets]
    return users, targets, seen


def make_task(domain: Domain, bucket: Bucket, *, seed: int = 0) -> Task:
    """Pads a domain to a bucket.

    Args:
      domain: must fit the bucket in users and items; of more interactions than fit, a random part is kept.
      bucket: the padded sizes.
      seed: of the samples of users and targets that are evaluated.

    Raises:
      InvalidArgumentError: the domain has more users or items than the bucket.
    """
    train = domain.train
    if train.num_users > bucket.users or train.num_items > bucket.items:
        raise InvalidArgumentError(
            f"`domain` {domain.name} has {train.num_users} users and {train.num_items} items, the bucket holds "
            f"{bucket.users} and {bucket.items}; draw a smaller slice or use a larger bucket"
        )
    rng = np.random.default_rng(seed)
    keep = np.sort(rng.permutation(len(train))[: bucket.interactions])
    user, item = train.user[keep].astype(np.int32), train.item[keep].astype(np.int32)
    popularity = np.bincount(item, minlength=bucket.items).astype(np.float32)
    sets, floors = [], []
    for split in ("validation", "test"):
        evaluation = evaluation_set(domain, split, max_users=bucket.evaluated, seed=seed)
        padded = _padded_evaluation(evaluation, bucket, train.num_items, rng)
        sets.extend(padded)
        floors.append(_popularity_ndcg(popularity, *padded))
    return Task(
        _pad(user, bucket.interactions),
        _pad(item, bucket.interactions),
        np.float32(len(user)),
        np.int32(train.num_users),
        np.int32(train.num_items),
        *sets,
        *(np.float32(floor) for floor in floors),
    )


@jax.jit
def _popularity_ndcg(popularity: Any, users: Any, targets: Any, seen: Any) -> Any:
    params = learner.Params(jnp.zeros((1, 1)), jnp.zeros((popularity.shape[0], 1)), popularity)
    return learner.ndcg(params, jnp.minimum(users, 0), targets, seen)


def stack_tasks(tasks: list[Task]) -> Task:
    """Stacks tasks of one bucket along a leading axis."""
    return Task(*(np.stack(leaves) for leaves in zip(*tasks, strict=True)))


@dataclass(frozen=True)
class MatrixFactorizationEnvironment:
    """Fulfils `metalearn.meta_training.environment.Environment` for BPR matrix factorisation, under jit.

    Args:
      bucket: static sizes.
    """

    bucket: Bucket

    @property
    def num_groups(self) -> int:
        """Parameter groups: the user table, and the item table with its biases."""
        return learner.NUM_GROUPS

    @property
    def samples_per_step(self) -> int:
        """Training triples per step."""
        return self.bucket.batch

    def reset(self, task: Task, *, key: jax.Array) -> EnvironmentState:
        """Initialises the learner."""
        bucket = self.bucket
        state = learner.init(task.num_users, task.num_items, shape=(bucket.users, bucket.items, bucket.dim), key=key)
        nothing = jnp.full((), -jnp.inf, jnp.float32)
        return EnvironmentState(state, state.params, jnp.zeros(()), state.params, state.params, nothing, jnp.zeros(()))

    def _draw(self, task: Task, dropout: Any, pool: Any, key: jax.Array) -> learner.Batch:
        """Draws a batch of triples; the dropout mask is a random window of a pool drawn once an interval."""
        batch, dim = self.bucket.batch, self.bucket.dim
        uniform = jax.random.uniform(key, (2 * batch + 1,))
        row = (uniform[:batch] * task.num_interactions).astype(jnp.int32)
        negative = (uniform[batch : 2 * batch] * task.num_items.astype(jnp.float32)).astype(jnp.int32)
        offset = (uniform[-1] * (pool.shape[0] - batch * dim)).astype(jnp.int32)
        window = jax.lax.dynamic_slice(pool, (offset,), (batch * dim,)).reshape(batch, dim)
        keep = jnp.where(window >= dropout, 1.0 / (1.0 - dropout), 0.0)
        return learner.Batch(task.user[row], task.item[row], negative, keep)

    def step(
        self, task: Task, state: EnvironmentState, values: Values, plan: Plan, *, key: jax.Array
    ) -> tuple[EnvironmentState, IntervalStatistics]:
        """Trains one interval, validates, and measures; a probe takes the interval's last two steps."""
        key_pool, key_steps = jax.random.split(key)
        pool = jax.random.uniform(key_pool, (8 * self.bucket.batch * self.bucket.dim,))
        averaging = ~jnp.isfinite(plan.horizon)

        def one(index, learner_state):
            batch = self._draw(task, values.dropout, pool, jax.random.fold_in(key_steps, index))
            progress = (plan.first_step + index).astype(jnp.float32) / plan.horizon
            multiplier = schedule_multiplier(progress, jnp)
            hyperparameters = learner.Hyperparameters(
                values.learning_rate * multiplier, values.weight_decay, values.beta1
            )
            return learner.step(learner_state, batch, hyperparameters)

        def body(index, carry):
            learner_state, average, num_averaged, loss_sum, loss_square, nonfinite = carry
            learner_state, loss, _ = one(index, learner_state)
            average, num_averaged = jax.lax.cond(
                averaging & (index % AVERAGE_EVERY == AVERAGE_EVERY - 1),
                _update_average,
                lambda average, _, count: (average, count),
                average,
                learner_state.params,
                num_averaged,
            )
            return (
                learner_state,
                average,
                num_averaged,
                loss_sum + loss,
                loss_square + loss**2,
                nonfinite + _is_not_finite(loss),
            )

        zero = jnp.zeros(())
        carry = (state.learner, state.average, state.num_averaged, zero, zero, jnp.zeros((), jnp.int32))
        carry = jax.lax.fori_loop(0, plan.num_steps - 2, body, carry)
        first, average, num_averaged, loss_sum, loss_square, nonfinite = carry
        second, loss_1, gradient = one(plan.num_steps - 2, first)
        third, loss_2, next_gradient = one(plan.num_steps - 1, second)
        average, num_averaged = _update_average(average, third.params, num_averaged)

        rows = jnp.stack([task.num_users, task.num_items]).astype(jnp.float32)
        sums = learner.probe_sums(first.params, gradient, second.params, next_gradient, state.anchor, rows)
        sums = sums._replace(displacement_square=jnp.where(state.steps > 0, sums.displacement_square, jnp.nan))
        pooled = jax.tree.map(lambda groups: jnp.full_like(groups, jnp.nan).at[0].set(groups.sum()), sums)
        sums = jax.tree.map(lambda one, many: jnp.where(plan.single_group, one, many), pooled, sums)
        evaluated = jax.tree.map(lambda a, w: jnp.where(averaging, a, w), average, third.params)
        metric = learner.ndcg(evaluated, task.validation_users, task.validation_targets, task.validation_seen)
        statistics = interval_statistics(
            sums,
            steps=plan.num_steps,
            loss_sum=loss_sum + loss_1 + loss_2,
            loss_square_sum=loss_square + loss_1**2 + loss_2**2,
            nonfinite=nonfinite + _is_not_finite(loss_1) + _is_not_finite(loss_2),
            validation=metric,
            samples=plan.num_steps * self.bucket.batch,
            seconds=jnp.nan,
            xp=jnp,
        )
        better = metric > state.best_validation
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), evaluated, state.best)
        state = EnvironmentState(
            third,
            average,
            num_averaged,
            second.params,
            best,
            jnp.maximum(metric, state.best_validation),
            state.steps + plan.num_steps.astype(jnp.float32),
        )
        return state, statistics

    def score(self, task: Task, state: EnvironmentState) -> jax.Array:
        """Returns test NDCG@10 of the weights that validated best."""
        return learner.ndcg(state.best, task.test_users, task.test_targets, task.test_seen)


def _is_not_finite(loss: Any) -> Any:
    return (~jnp.isfinite(loss)).astype(jnp.int32)


def _update_average(average: learner.Params, params: learner.Params, count: Any) -> tuple[learner.Params, Any]:
    """Folds the current weights into the polynomial average."""
    weight = (AVERAGE_POWER + 1.0) / (count + 1.0 + AVERAGE_POWER)
    return jax.tree.map(lambda a, w: a + weight * (w - a), average, params), count + 1.0
