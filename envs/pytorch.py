"""A real PyTorch training run behind the environment protocol: what the JAX environment stands for, at full cost.

Shape legend: G parameter group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from envs.domains import Domain
from envs.recommenders import RECOMMENDERS, Evaluator, Recommender, Sampler
from metalearn.controller.actions import Values, schedule_multiplier
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import DIVERGED_RATIO, Plan, Status
from metalearn.signals import IntervalStatistics
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import dropout_modules
from metalearn.torch.monitor import Monitor


@dataclass(kw_only=True, eq=False)
class TrainingRun:
    """The state of the environment: a model in training. It is mutated in place and handed back."""

    model: Recommender
    optimizer: torch.optim.AdamW
    sampler: Sampler
    average: WeightAverage
    monitor: Monitor | None = None
    best_validation: float = -math.inf
    best_weights: dict[str, torch.Tensor] | None = None
    untrained_loss: float = math.nan
    interval_loss: float = math.nan
    nonfinite: int = 0


class PyTorchEnvironment:
    """Fulfils `metalearn.meta_training.environment.Environment` for a recommender on a `Domain`.

    Not pure: `step` trains the state's model and returns the same state.

    Args:
      recommender: name in `RECOMMENDERS`.
      dim: embedding dimension.
      batch_size: samples per step.
      max_users: users of an evaluation, None for all.
    """

    def __init__(
        self,
        recommender: str = "matrix_factorization",
        *,
        dim: int = 32,
        batch_size: int = 512,
        max_users: int | None = 2000,
    ) -> None:
        if recommender not in RECOMMENDERS:
            raise InvalidArgumentError(f"`recommender` must be one of {sorted(RECOMMENDERS)}, got {recommender!r}")
        self._family = recommender
        self._dim, self._batch_size, self._max_users = dim, batch_size, max_users

    @property
    def family(self) -> str | None:
        """Name of the recommender."""
        return self._family

    @property
    def roles(self) -> tuple[str, ...]:
        """Role of every parameter group."""
        return RECOMMENDERS[self._family].roles

    @property
    def num_groups(self) -> int:
        """Parameter groups."""
        return len(self.roles)

    @property
    def samples_per_step(self) -> int:
        """Training samples per step."""
        return self._batch_size

    def reset(self, task: Domain, *, key: int) -> TrainingRun:
        """Initialises model, optimizer and sampler from the seed `key`."""
        generator = torch.Generator().manual_seed(key)
        model = RECOMMENDERS[self._family].for_domain(task, dim=self._dim, generator=generator)
        optimizer = torch.optim.AdamW(model.parameter_groups())
        return TrainingRun(
            model=model,
            optimizer=optimizer,
            sampler=model.sampler(task, self._batch_size, seed=key),
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
        state.nonfinite += int(statistics.nonfinite)
        state.interval_loss = float(statistics.loss_sum) / int(plan.num_steps)
        return state, _padded(statistics, self.num_groups) if plan.single_group else statistics

    def _train(self, state: TrainingRun, values: Values, plan: Plan) -> None:
        steps, horizon = int(plan.num_steps), float(plan.horizon)
        if state.monitor is None:
            groups = [{"params": list(state.model.parameters())}] if plan.single_group else state.optimizer.param_groups
            state.monitor = Monitor(torch.optim.AdamW(groups), steps)
        for module in dropout_modules(state.model):
            module.p = float(values.dropout)
        for index in range(steps):
            progress = np.float64((int(plan.first_step) + index) / horizon)
            multiplier = float(schedule_multiplier(progress, np, float(plan.decay_to)))
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
            if math.isnan(state.untrained_loss):
                state.untrained_loss = loss.item()
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

    def status(self, state: TrainingRun) -> Status:
        """Returns the `Status` of the run."""
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in state.model.parameters())
        if state.nonfinite or not finite:
            return Status.NONFINITE
        return Status.DIVERGED if state.interval_loss > DIVERGED_RATIO * state.untrained_loss else Status.RUNNING

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


def _padded(statistics: IntervalStatistics, num_groups: int) -> IntervalStatistics:
    """Pads one group's statistics to [G]: the protocol keeps G, the missing groups are NaN."""

    def pad(value: Any) -> Any:
        return np.array([value[0], *[math.nan] * (num_groups - 1)]) if np.ndim(value) == 1 else value

    return IntervalStatistics(*(pad(value) for value in statistics))
