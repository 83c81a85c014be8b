"""The JAX environment: many padded tasks of one size bucket in one jitted program.

Shape legend: U user, I item, N interaction, D embedding dimension, B batch, E evaluated user, T target, G = 2 group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.domains import Domain
from envs.evaluation_sets import EvaluationSet, evaluation_set
from envs.histories import histories
from envs.learners import LEARNERS, OPTIMIZERS, Hyperparameters, Learner, Shape, TrainingData
from envs.learners.learner import draw_rows, probe_sums
from envs.learners.optimizers import OptimizerState
from envs.learners.ranking import ndcg
from metalearn.controller.actions import Values, schedule_multiplier
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import DIVERGED_RATIO, Plan, Status
from metalearn.signals import IntervalStatistics, interval_statistics

AVERAGE_EVERY = 8
"""Steps between updates of the averaged weights."""
AVERAGE_POWER = 8.0
"""Polynomial averaging: update t has weight (p + 1) / (t + p), so the last 1 / (p + 1) of the run counts most."""
LOSS_BATCHES = 16
"""Batches that validation loss and training loss are measured on, the same in every interval."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Static sizes that tasks are padded to; one compilation each.

    Args:
      users, items, interactions: padded sizes of the training table.
      dim: embedding dimension.
      batch: training samples per step.
      evaluated, targets: users in an evaluation set, and held-out items of each.
      learner, optimizer: names in `LEARNERS` and `OPTIMIZERS`.
      history: items of each user's history, for families that read sequences.
      content: dimensions of item content.
      exposures: pairs shown and not taken.
    """

    users: int
    items: int
    interactions: int
    dim: int
    batch: int
    evaluated: int
    targets: int = 4
    learner: str = "matrix_factorization"
    optimizer: str = "adamw"
    history: int = 0
    content: int = 0
    exposures: int = 0

    def __post_init__(self) -> None:
        for name, known in (("learner", LEARNERS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise InvalidArgumentError(f"`{name}` must be one of {sorted(known)}, got {getattr(self, name)!r}")

    def make_learner(self) -> Learner:
        """Returns the family at these sizes."""
        shape = Shape(self.users, self.items, self.history, self.content)
        return LEARNERS[self.learner](shape=shape, dim=self.dim, batch=self.batch)


SMALL = Bucket(users=512, items=512, interactions=16_384, dim=8, batch=64, evaluated=256)
MIDDLE = Bucket(users=1_024, items=1_024, interactions=65_536, dim=16, batch=256, evaluated=384)
WHOLE = Bucket(users=4_096, items=4_096, interactions=131_072, dim=32, batch=256, evaluated=384)
"""Whole domains for families whose step costs more."""
LARGE = Bucket(users=6_144, items=6_144, interactions=262_144, dim=32, batch=512, evaluated=512)
HUGE = Bucket(users=24_576, items=16_384, interactions=393_216, dim=32, batch=512, evaluated=384)
"""Most public domains as they are."""


class Task(NamedTuple):
    """One domain, padded to a bucket. Stacked along a leading axis it is a batch of tasks."""

    data: TrainingData
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
    held_out_user: Any
    """int32 [LOSS_BATCHES * B], validation interactions drawn with replacement; -1 if there are none"""
    held_out_item: Any

    @property
    def num_interactions(self) -> Any:
        """Rows that an epoch consists of."""
        return self.data.num_rows

    @property
    def num_users(self) -> Any:
        """True number of users."""
        return self.data.num_users

    @property
    def num_items(self) -> Any:
        """True number of items."""
        return self.data.num_items


class EnvironmentState(NamedTuple):
    """A model in training; weights are params of the bucket's learner."""

    params: Any
    optimizer: OptimizerState
    average: Any
    num_averaged: Any
    anchor: Any
    """weights at the previous probe"""
    best: Any
    best_validation: Any
    steps: Any
    untrained_loss: Any
    """loss of the first step"""
    interval_loss: Any
    """mean loss of the last interval"""
    nonfinite: Any
    """steps whose loss was not finite"""


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
    data = _training_data(domain, bucket, rng)
    popularity = np.bincount(data.item[: int(data.num_rows)], minlength=bucket.items).astype(np.float32)
    sets, floors = [], []
    for split in ("validation", "test"):
        evaluation = evaluation_set(domain, split, max_users=bucket.evaluated, seed=seed)
        users, targets, hidden = _padded_evaluation(evaluation, bucket, train.num_items, rng)
        sets.extend((users, targets, hidden))
        floors.append(np.float32(_floor(np.broadcast_to(popularity, hidden.shape), targets, hidden)))
    held_out = np.full((2, LOSS_BATCHES * bucket.batch), -1, np.int32)
    if len(domain.validation):
        drawn = rng.integers(len(domain.validation), size=held_out.shape[1])
        held_out[:] = domain.validation.user[drawn], domain.validation.item[drawn]
    return Task(data, *sets, *floors, *held_out)


_floor = jax.jit(ndcg)


def _training_data(domain: Domain, bucket: Bucket, rng: np.random.Generator) -> TrainingData:
    """Pads the training part; of more rows than fit a random part is kept, in order."""
    train = domain.train
    keep = np.sort(rng.permutation(len(train))[: bucket.interactions])
    user, item = train.user[keep].astype(np.int32), train.item[keep].astype(np.int32)
    content = np.zeros((bucket.items, bucket.content), np.float32)
    if domain.item_content is not None:
        width = min(bucket.content, domain.item_content.shape[1])
        content[: train.num_items, :width] = domain.item_content[:, :width]
    shown = (np.zeros(0, np.int32),) * 2
    if domain.exposures is not None and bucket.exposures:
        keep = rng.permutation(len(domain.exposures))[: bucket.exposures]
        shown = domain.exposures.user[keep], domain.exposures.item[keep]
    return TrainingData(
        user=_pad(user, bucket.interactions),
        item=_pad(item, bucket.interactions),
        first_row=np.float32(0),
        num_rows=np.float32(len(user)),
        num_users=np.int32(train.num_users),
        num_items=np.int32(train.num_items),
        history=histories(user, item, num_users=bucket.users, length=bucket.history),
        content=content,
        exposed_user=_pad(shown[0].astype(np.int32), max(bucket.exposures, 1)),
        exposed_item=_pad(shown[1].astype(np.int32), max(bucket.exposures, 1)),
        num_exposures=np.float32(len(shown[0])),
    )


def stack_tasks(tasks: list[Task]) -> Task:
    """Stacks tasks of one bucket along a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)


@dataclass(frozen=True)
class VectorizedEnvironment:
    """Fulfils `metalearn.meta_training.environment.Environment` for one bucket and learner, under jit.

    Args:
      bucket: static sizes, learner and optimizer.
    """

    bucket: Bucket

    @property
    def roles(self) -> tuple[str, ...]:
        """Role of every parameter group."""
        return LEARNERS[self.bucket.learner].roles

    @property
    def num_groups(self) -> int:
        """Parameter groups."""
        return len(self.roles)

    @property
    def family(self) -> str | None:
        """Name of the learner."""
        return self.bucket.learner

    @property
    def samples_per_step(self) -> int:
        """Training samples per step."""
        return self.bucket.batch

    def reset(self, task: Task, *, key: jax.Array) -> EnvironmentState:
        """Initialises the learner."""
        params = self.bucket.make_learner().init(task.data, key=key)
        zero, nan = jnp.zeros(()), jnp.full((), jnp.nan, jnp.float32)
        return EnvironmentState(
            params=params,
            optimizer=OPTIMIZERS[self.bucket.optimizer].init(params),
            average=params,
            num_averaged=zero,
            anchor=params,
            best=params,
            best_validation=jnp.full((), -jnp.inf, jnp.float32),
            steps=zero,
            untrained_loss=nan,
            interval_loss=nan,
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def step(
        self, task: Task, state: EnvironmentState, values: Values, plan: Plan, *, key: jax.Array
    ) -> tuple[EnvironmentState, IntervalStatistics]:
        """Trains one interval, validates, and measures; a probe takes the interval's last two steps."""
        learner = self.bucket.make_learner()
        take_step = self._stepper(learner, task, values, plan, key)
        averaging = ~jnp.isfinite(plan.horizon)

        def body(index, carry):
            """Takes one step of an interval, averages where it is time, and sums up what is measured."""
            model, average, num_averaged, sums = carry
            model, loss, _ = take_step(index, model)
            average, num_averaged = jax.lax.cond(
                averaging & (index % AVERAGE_EVERY == AVERAGE_EVERY - 1),
                _update_average,
                lambda average, _, count: (average, count),
                average,
                model[0],
                num_averaged,
            )
            return model, average, num_averaged, sums.add(loss)

        carry = ((state.params, state.optimizer), state.average, state.num_averaged, _LossSums.zero())
        carry = jax.lax.fori_loop(0, plan.num_steps - 2, body, carry)
        first, average, num_averaged, losses = carry
        second, loss_1, gradient = take_step(plan.num_steps - 2, first)
        third, loss_2, next_gradient = take_step(plan.num_steps - 1, second)
        average, num_averaged = _update_average(average, third[0], num_averaged)
        losses = losses.add(loss_1).add(loss_2)

        sums = probe_sums(learner, task.data, first[0], gradient, second[0], next_gradient, state.anchor)
        sums = sums._replace(displacement_square=jnp.where(state.steps > 0, sums.displacement_square, jnp.nan))
        pooled = jax.tree.map(lambda groups: jnp.full_like(groups, jnp.nan).at[0].set(groups.sum()), sums)
        sums = jax.tree.map(lambda one, many: jnp.where(plan.single_group, one, many), pooled, sums)
        evaluated = jax.tree.map(lambda a, w: jnp.where(averaging, a, w), average, third[0])
        scores = learner.scores(evaluated, task.data, task.validation_users)
        metric = ndcg(scores, task.validation_targets, task.validation_seen)
        validation_loss, training_sample_loss = self._losses(learner, task, evaluated)
        statistics = interval_statistics(
            sums,
            steps=plan.num_steps,
            loss_sum=losses.total,
            loss_square_sum=losses.square,
            nonfinite=losses.nonfinite,
            validation=metric,
            samples=plan.num_steps * self.bucket.batch,
            seconds=jnp.nan,
            xp=jnp,
            validation_loss=validation_loss,
            training_sample_loss=training_sample_loss,
        )
        better = metric > state.best_validation
        state = EnvironmentState(
            params=third[0],
            optimizer=third[1],
            average=average,
            num_averaged=num_averaged,
            anchor=second[0],
            best=jax.tree.map(lambda new, old: jnp.where(better, new, old), evaluated, state.best),
            best_validation=jnp.maximum(metric, state.best_validation),
            steps=state.steps + plan.num_steps.astype(jnp.float32),
            untrained_loss=jnp.where(state.steps > 0, state.untrained_loss, losses.first),
            interval_loss=losses.total / plan.num_steps.astype(jnp.float32),
            nonfinite=state.nonfinite + losses.nonfinite,
        )
        return state, statistics

    def _losses(self, learner: Learner, task: Task, params: Any) -> tuple[Any, Any]:
        """Measures the loss of validation and of training interactions; NaN without any, or if it learns no pairs."""
        if not learner.learns_pairs:
            return jnp.nan, jnp.nan
        data = task.data
        row = draw_rows(data, jax.random.uniform(jax.random.key(0), task.held_out_user.shape))
        held_out = learner.mean_loss(params, data, task.held_out_user, task.held_out_item)
        return (
            jnp.where(task.held_out_user[0] >= 0, held_out, jnp.nan),
            learner.mean_loss(params, data, data.user[row], data.item[row]),
        )

    def _stepper(self, learner: Learner, task: Task, values: Values, plan: Plan, key: jax.Array) -> Any:
        """Returns (index, model) -> (model, loss, gradient); dropout masks are windows of a pool drawn once."""
        key_pool, key_steps = jax.random.split(key)
        pool = jax.random.uniform(key_pool, (8 * learner.num_keep,))
        optimizer = OPTIMIZERS[self.bucket.optimizer]

        def take_step(index: Any, model: Any) -> tuple[Any, Any, Any]:
            """Draws a batch and takes one optimizer step; returns the model, the loss and the gradients."""
            params, state = model
            uniforms = jax.random.uniform(jax.random.fold_in(key_steps, index), (learner.num_uniforms + 1,))
            offset = (uniforms[-1] * (pool.shape[0] - learner.num_keep)).astype(jnp.int32)
            window = jax.lax.dynamic_slice(pool, (offset,), (learner.num_keep,))
            keep = jnp.where(window >= values.dropout, 1.0 / (1.0 - values.dropout), 0.0)
            batch = learner.draw(task.data, uniforms[:-1], keep)
            loss, gradient = learner.loss_and_gradient(params, task.data, batch)
            progress = (plan.first_step + index).astype(jnp.float32) / plan.horizon
            rate = values.learning_rate * schedule_multiplier(progress, jnp, plan.decay_to)
            hyperparameters = Hyperparameters(
                *(self._of_groups(value, plan) for value in (rate, values.weight_decay, values.beta1))
            )
            model = optimizer.update(params, gradient, state, hyperparameters, learner.groups(params))
            return tuple(model), loss, gradient

        return take_step

    def _of_groups(self, value: Any, plan: Plan) -> Any:
        """Spreads the first group's value over all where the loop has one group."""
        return jnp.where(plan.single_group, value[0], value)

    def score(self, task: Task, state: EnvironmentState) -> jax.Array:
        """Returns test NDCG@10 of the weights that validated best."""
        scores = self.bucket.make_learner().scores(state.best, task.data, task.test_users)
        return ndcg(scores, task.test_targets, task.test_seen)

    def status(self, state: EnvironmentState) -> jax.Array:
        """Returns the `Status` of the run, int32."""
        diverged = state.interval_loss > DIVERGED_RATIO * state.untrained_loss
        finite = (state.nonfinite == 0) & jnp.all(
            jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)])
        )
        return jnp.where(finite, jnp.where(diverged, Status.DIVERGED, Status.RUNNING), Status.NONFINITE)


class _LossSums(NamedTuple):
    """Running sums over the losses of an interval."""

    first: Any
    count: Any
    total: Any
    square: Any
    nonfinite: Any

    @classmethod
    def zero(cls) -> _LossSums:
        zero = jnp.zeros(())
        return cls(zero, jnp.zeros((), jnp.int32), zero, zero, jnp.zeros((), jnp.int32))

    def add(self, loss: Any) -> _LossSums:
        return _LossSums(
            jnp.where(self.count == 0, loss, self.first),
            self.count + 1,
            self.total + loss,
            self.square + loss**2,
            self.nonfinite + (~jnp.isfinite(loss)).astype(jnp.int32),
        )


def _update_average(average: Any, params: Any, count: Any) -> tuple[Any, Any]:
    """Folds the current weights into the polynomial average."""
    weight = (AVERAGE_POWER + 1.0) / (count + 1.0 + AVERAGE_POWER)
    return jax.tree.map(lambda a, w: a + weight * (w - a), average, params), count + 1.0
