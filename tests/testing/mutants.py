"""Environments with one fault each, seeded into a sound one: every check must find the faults made for it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.controller.actions import schedule_multiplier
from metalearn.meta_training.environment import Status
from tests.meta_training.toy import ToyEnvironment
from tests.testing.linear import LinearEnvironment

# --- what it says it is


class OneRoleShort(LinearEnvironment):
    roles = ("dense",)


class UnknownRole(LinearEnvironment):
    roles = ("dense", "bias")


class FamilyByNumber(LinearEnvironment):
    family = 1


# --- what it measures


class Altered(LinearEnvironment):
    """Trains soundly, and then alters what was measured."""

    def step(self, task, state, values, plan, *, key):
        state, statistics = super().step(task, state, values, plan, key=key)
        return state, self.alter(statistics, plan)

    def alter(self, statistics, plan):
        raise NotImplementedError


class LossInAVector(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(loss_sum=[statistics.loss_sum])


class MeanOverGroups(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(weight_norm=statistics.weight_norm.mean())


class ValidationInWholePercent(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(validation=round(100.0 * statistics.validation))


class ValidationInPercent(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(validation=100.0 * statistics.validation)


class CosineNotNormalised(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(gradient_cosine=statistics.gradient_cosine * 100.0)


class SquareOfTheMean(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(loss_square_sum=(statistics.loss_sum / statistics.steps) ** 2)


class SamplesOfOneStep(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(samples=statistics.samples / statistics.steps)


class StepsWithoutTheProbe(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(steps=statistics.steps - 2)


class NothingIsNotFinite(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(nonfinite=0)


class CountsFiniteLosses(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(nonfinite=statistics.steps - statistics.nonfinite)


class NeverValidates(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(validation=math.nan)


class SecondGroupMeasuredTwice(Altered):
    """With one group, the sums are spread over both."""

    def alter(self, statistics, plan):
        return statistics._replace(weight_norm=np.full(2, statistics.weight_norm[0]))


# --- keys and state


class KeyOfItsOwn(LinearEnvironment):
    """Its draws come from a generator that nobody seeds."""

    def step(self, task, state, values, plan, *, key):
        return super().step(task, state, values, plan, key=int(np.random.default_rng().integers(2**31)))


class OneKeyForAll(LinearEnvironment):
    def reset(self, task, *, key):
        return super().reset(task, key=0)

    def step(self, task, state, values, plan, *, key):
        return super().step(task, state, values, plan, key=1)


class ScoreLeavesTheBestWeights(LinearEnvironment):
    """It swaps weights in to evaluate them, and does not put the others back."""

    def score(self, task, state):
        if state.best is not None:
            state.weights, state.moment = state.best, np.zeros_like(state.moment)
        return super().score(task, state)


class MomentInTheObject(LinearEnvironment):
    """The optimizer belongs to the environment, so runs that take turns share it."""

    def step(self, task, state, values, plan, *, key):
        if plan.first_step > 0:
            state.moment = self._moment
        state, statistics = super().step(task, state, values, plan, key=key)
        self._moment = state.moment
        return state, statistics


# --- score and status


class AlwaysDiverged(LinearEnvironment):
    def status(self, state):
        return Status.DIVERGED


class AlwaysRunning(LinearEnvironment):
    def status(self, state):
        return Status.RUNNING


class NaNIsDivergence(LinearEnvironment):
    """Compares NaN, and takes what is lost for merely diverged."""

    def status(self, state):
        return Status.RUNNING if state.interval_loss <= 3.0 * state.untrained_loss else Status.DIVERGED


class ScoreInPercent(LinearEnvironment):
    def score(self, task, state):
        return 100.0 * super().score(task, state)


class LossForScore(LinearEnvironment):
    def score(self, task, state):
        return 1.0 - super().score(task, state)


class NaNBeforeTheFirst(LinearEnvironment):
    def score(self, task, state):
        return math.nan if state.best is None else super().score(task, state)


class LostIsFirst(LinearEnvironment):
    """It ranks by counting what scores higher: nothing does among NaN, so the lost run comes first."""

    def metric(self, task, weights):
        return 1.0 if np.isnan(weights).any() else super().metric(task, weights)


class RaisesWhenLost(LinearEnvironment):
    def step(self, task, state, values, plan, *, key):
        state, statistics = super().step(task, state, values, plan, key=key)
        if not np.isfinite(state.weights).all():
            raise FloatingPointError("a weight is not finite")
        return state, statistics


# --- what the values do


class DecayNotScaledByTheRate(LinearEnvironment):
    def step(self, task, state, values, plan, *, key):
        state.weights = state.weights * (1.0 - 0.01 * values.weight_decay[0])
        return super().step(task, state, values, plan, key=key)


class ProbeFindsMovement(Altered):
    def alter(self, statistics, plan):
        return statistics._replace(update_ratio=np.maximum(statistics.update_ratio, 1e-6))


class FirstRateForAll(LinearEnvironment):
    def rate(self, values, plan, index):
        return super().rate(values, plan, index)[[0, 0]]


class RatesSwapped(LinearEnvironment):
    def rate(self, values, plan, index):
        return super().rate(values, plan, index)[::-1]


class Ignores(LinearEnvironment):
    """Takes no notice of one hyperparameter."""

    def __init__(self, name: str, value: Any) -> None:
        self._fixed = {name: value}

    def step(self, task, state, values, plan, *, key):
        return super().step(task, state, values._replace(**self._fixed), plan, key=key)


class GroupsKeptApart(LinearEnvironment):
    def step(self, task, state, values, plan, *, key):
        return super().step(task, state, values, plan._replace(single_group=False), key=key)


# --- the schedule


class HalfRateWithoutHorizon(LinearEnvironment):
    def rate(self, values, plan, index):
        return super().rate(values, plan, index) * (1.0 if math.isfinite(plan.horizon) else 0.5)


class ScheduleLeftOut(LinearEnvironment):
    def rate(self, values, plan, index):
        return values.learning_rate


class DecaysAllTheWay(LinearEnvironment):
    def rate(self, values, plan, index):
        return super().rate(values, plan._replace(decay_to=0.0), index)


class CosineComesBack(LinearEnvironment):
    """After the horizon the rate rises again."""

    def rate(self, values, plan, index):
        progress = (plan.first_step + index) / plan.horizon
        inside = schedule_multiplier(np.float64(progress), np)
        return values.learning_rate * (0.5 * (1.0 + math.cos(math.pi * progress)) if progress > 1.0 else inside)


# --- under jit


class CountOfAnotherType(ToyEnvironment):
    """The first state is an int, the later ones are floats."""

    def reset(self, task, *, key):
        return jnp.zeros((), jnp.int32)

    def step(self, task, state, values, plan, *, key):
        return super().step(task, state.astype(jnp.float32), values, plan, key=key)


class BranchesOnAValue(ToyEnvironment):
    def step(self, task, state, values, plan, *, key):
        if plan.num_steps > 2:
            return super().step(task, state, values, plan, key=key)
        raise ValueError


class ScoresOnTheHost(ToyEnvironment):
    """Calls back into Python, one run at a time."""

    def score(self, task, state):
        return jax.pure_callback(lambda score: score, jax.ShapeDtypeStruct((), jnp.float32), state)


class BatchedDifferently(ToyEnvironment):
    """Has another rule for batches of runs, which forgets the seventh part of the loss."""

    def step(self, task, state, values, plan, *, key):
        @jax.custom_batching.custom_vmap
        def loss_of(total):
            return total

        @loss_of.def_vmap
        def _(axis_size, in_batched, total):
            return total * (6.0 / 7.0), in_batched[0]

        state, statistics = super().step(task, state, values, plan, key=key)
        return state, statistics._replace(loss_sum=loss_of(statistics.loss_sum))
