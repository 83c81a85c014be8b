"""Linear regression as an environment in NumPy: what a third party would write, small enough to break in many ways.

Shape legend: N row, F feature, B batch, G = 2 parameter group: the weights, and the bias behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Values, schedule_multiplier
from metalearn.meta_training.environment import Plan, Status
from metalearn.signals import IntervalStatistics, ProbeSums, interval_statistics

BATCH, FEATURES, ROWS = 8, 6, 64


class LinearTask(NamedTuple):
    features: np.ndarray
    """[N, F + 1], the last column is 1"""
    targets: np.ndarray
    """[N]"""


@dataclass
class LinearRun:
    weights: np.ndarray
    """[F + 1]"""
    moment: np.ndarray
    anchor: np.ndarray | None = None
    best: np.ndarray | None = None
    best_validation: float = -math.inf
    untrained_loss: float = math.inf
    interval_loss: float = 0.0


def linear_tasks(count: int = 2) -> list[LinearTask]:
    """Return tasks, each with weights of its own."""
    tasks = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        features = np.column_stack([rng.normal(size=(ROWS, FEATURES)), np.ones(ROWS)])
        tasks.append(LinearTask(features, features @ rng.normal(size=FEATURES + 1) + 0.1 * rng.normal(size=ROWS)))
    return tasks


class LinearEnvironment:
    """Fulfils `Environment`: SGD with momentum on squares; the metric is exp(-loss)."""

    num_groups = 2
    roles: tuple[str, ...] = ("dense", "head")
    family: Any = None
    samples_per_step = BATCH

    def reset(self, task: LinearTask, *, key: int) -> LinearRun:
        return LinearRun(0.1 * np.random.default_rng(key).normal(size=FEATURES + 1), np.zeros(FEATURES + 1))

    def rate(self, values: Values, plan: Plan, index: int) -> Any:
        """Return the learning rates of a step, [G]."""
        progress = np.float64((plan.first_step + index) / plan.horizon)
        return values.learning_rate * schedule_multiplier(progress, np, plan.decay_to)

    def gradient(self, task: LinearTask, weights: np.ndarray, dropout: float, rng: np.random.Generator) -> Any:
        """Return loss and gradient of a batch."""
        rows = rng.integers(ROWS, size=BATCH)
        inputs = task.features[rows] * np.where(rng.random((BATCH, FEATURES + 1)) < dropout, 0.0, 1.0 / (1.0 - dropout))
        error = inputs @ weights - task.targets[rows]
        return float(np.square(error).mean()), 2.0 * inputs.T @ error / BATCH

    def step(
        self, task: LinearTask, state: LinearRun, values: Values, plan: Plan, *, key: int
    ) -> tuple[LinearRun, IntervalStatistics]:
        rng = np.random.default_rng(key)
        losses, history = [], []

        def spread(value: Any) -> np.ndarray:
            return np.repeat([value[0], value[0 if plan.single_group else 1]], [FEATURES, 1])

        with np.errstate(all="ignore"):
            for index in range(plan.num_steps):
                loss, gradient = self.gradient(task, state.weights, values.dropout, rng)
                rate, beta1 = spread(self.rate(values, plan, index)), spread(values.beta1)
                history.append((state.weights, gradient))
                losses.append(loss)
                state.moment = beta1 * state.moment + (1.0 - beta1) * gradient
                shrunk = state.weights * (1.0 - rate * spread(values.weight_decay))
                state.weights = shrunk - rate * state.moment
            sums = _probe(history[-2], history[-1], state.anchor, single_group=plan.single_group)
            state.anchor = history[-1][0]
            if math.isinf(state.untrained_loss):
                state.untrained_loss = losses[0]
            state.interval_loss = float(np.mean(losses))
            metric = self.metric(task, state.weights)
            if metric > state.best_validation:
                state.best_validation, state.best = metric, state.weights
            return state, interval_statistics(
                sums,
                steps=plan.num_steps,
                loss_sum=float(np.sum(losses)),
                loss_square_sum=float(np.square(losses).sum()),
                nonfinite=int(np.sum(~np.isfinite(losses))),
                validation=metric,
                samples=plan.num_steps * BATCH,
                seconds=math.nan,
                xp=np,
            )

    def metric(self, task: LinearTask, weights: np.ndarray) -> float:
        """Return exp(-mean square), 0 where that is not a number."""
        with np.errstate(all="ignore"):
            square = float(np.square(task.features @ weights - task.targets).mean())
        return math.exp(-square) if math.isfinite(square) else 0.0

    def score(self, task: LinearTask, state: LinearRun) -> float:
        return 0.0 if state.best is None else self.metric(task, state.best)

    def status(self, state: LinearRun) -> Status:
        if not (np.isfinite(state.weights).all() and math.isfinite(state.interval_loss)):
            return Status.NONFINITE
        return Status.DIVERGED if state.interval_loss > 3.0 * state.untrained_loss else Status.RUNNING


def _probe(first: Any, second: Any, anchor: np.ndarray | None, *, single_group: bool) -> ProbeSums:
    def by_group(values: Any) -> np.ndarray:
        return np.array([values.sum(), math.nan] if single_group else [values[:-1].sum(), values[-1]])

    (before, gradient), (after, next_gradient) = first, second
    ones = by_group(np.ones(FEATURES + 1))
    return ProbeSums(
        by_group(gradient**2),
        by_group(next_gradient**2),
        by_group(gradient * next_gradient),
        by_group((after - before) ** 2),
        by_group(after**2),
        by_group((next_gradient - gradient) * (after - before)),
        by_group(np.full(FEATURES + 1, math.nan) if anchor is None else (after - anchor) ** 2),
        ones,
        ones,
    )
