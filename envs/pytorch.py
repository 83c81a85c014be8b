"""A real PyTorch training run behind the environment protocol: what the JAX environment stands for, at full cost.

Shape legend: G = 2 parameter group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from envs.domains import Domain
from envs.recommenders import Evaluator, MatrixFactorization, TripleSampler
from metalearn.controller.actions import Values, schedule_multiplier
from metalearn.meta_training.environment import Plan
from metalearn.signals import IntervalStatistics
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.monitor import Monitor


@dataclass(kw_only=True, eq=False)
class TrainingRun:
    """The state of the environment: a model in training. It is mutated in place and handed back."""

    model: MatrixFactorization
    optimizer: torch.optim.AdamW
    sampler: TripleSampler
    average: WeightAverage
    monitor: Monitor | None = None
    best_validation: float = -math.inf
    best_weights: dict[str, torch.Tensor] | None = None
    diverged: bool = False


class PyTorchEnvironment:
    """Fulfils `metalearn.meta_training.environment.Environment` for matrix factorisation on a `Domain`.

    Not pure: `step` trains the state's model and returns the same state.

    Args:
      dim: embedding dimension.
      batch_size: triples per step.
      max_users: users of an evaluation, None for all.
    """

    def __init__(self, *, dim: int = 32, batch_size: int = 512, max_users: int | None = 2000) -> None:
        self._dim, self._batch_size, self._max_users = dim, batch_size, max_users

    @property
    def num_groups(self) -> int:
        """Parameter groups: the user table, and the item table with its biases."""
        return 2

    @property
    def samples_per_step(self) -> int:
        """Training triples per step."""
        return self._batch_size

    def reset(self, task: Domain, *, key: int) -> TrainingRun:
        """Initialises model, optimizer and sampler from the seed `key`."""
        generator = torch.Generator().manual_seed(key)
        model = MatrixFactorization(task.num_users, task.num_items, self._dim, generator=generator)
        optimizer = torch.optim.AdamW(model.parameter_groups())
        return TrainingRun(
            model=model,
            optimizer=optimizer,
            sampler=TripleSampler(task.train, self._batch_size, seed=key),
            average=WeightAverage(list(model.parameters())),
        )

    def step(
        self, task: Domain, state: TrainingRun, values: Values, plan: Plan, *, key: int
    ) -> tuple[TrainingRun, IntervalStatistics]:
        """Trains one interval, validates, and measures; `key` seeds the dropout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)  # dropout knows no other generator
            self._train(state, values, plan)
        averaged = not math.isfinite(float(plan.horizon))
        metric = self._validate(task, state, averaged=averaged)
        assert state.monitor is not None
        statistics = state.monitor.statistics(validation=metric, batch_size=self._batch_size)
        state.diverged |= bool(statistics.nonfinite > 0)
        return state, statistics if not plan.single_group else _padded(statistics)

    def _train(self, state: TrainingRun, values: Values, plan: Plan) -> None:
        steps, horizon = int(plan.num_steps), float(plan.horizon)
        if state.monitor is None:
            groups = [{"params": list(state.model.parameters())}] if plan.single_group else state.optimizer.param_groups
            state.monitor = Monitor(torch.optim.AdamW(groups), steps)
        state.model.dropout.p = float(values.dropout)
        for index in range(steps):
            progress = (int(plan.first_step) + index) / horizon
            multiplier = float(schedule_multiplier(np.float64(progress), np))
            for group, param_group in enumerate(state.optimizer.param_groups):
                row = 0 if plan.single_group else group
                param_group["lr"] = float(values.learning_rate[row]) * multiplier
                param_group["weight_decay"] = float(values.weight_decay[row])
                param_group["betas"] = (float(values.beta1[row]), 0.999)
            loss = state.model(*state.sampler.next())
            loss.backward()
            state.monitor.before_step(steps - index)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.monitor.record(loss)
            if not math.isfinite(horizon) and (index + 1) % AVERAGE_EVERY == 0:
                state.average.update()

    def score(self, task: Domain, state: TrainingRun) -> float:
        """Returns test NDCG@10 of the weights that validated best; 0 before the first validation."""
        if state.best_weights is None:
            return 0.0
        current = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        state.model.load_state_dict(state.best_weights)
        value = Evaluator(task, "test", max_users=self._max_users)(state.model).mean_ndcg
        state.model.load_state_dict(current)
        return value

    def _validate(self, task: Domain, state: TrainingRun, *, averaged: bool) -> float:
        evaluate = Evaluator(task, "validation", max_users=self._max_users)

        def measure() -> float:
            value = evaluate(state.model).mean_ndcg
            if value > state.best_validation:
                weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
                state.best_validation, state.best_weights = value, weights
            return value

        if not averaged:
            return measure()
        with state.average.swapped():
            return measure()


def _padded(statistics: IntervalStatistics) -> IntervalStatistics:
    """Pads one group's statistics to [G]: the protocol keeps G, the missing group is NaN."""

    def pad(value: Any) -> Any:
        return np.array([value[0], math.nan]) if np.ndim(value) == 1 else value

    return IntervalStatistics(*(pad(value) for value in statistics))
