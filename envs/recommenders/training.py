"""One training run of a recommender: steps, validation on a schedule, best weights kept, test at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from envs.domains import Domain
from envs.recommenders.evaluation import Evaluator
from envs.recommenders.recommender import Recommender
from metalearn.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The budget that every method gets alike.

    Args:
      steps: optimizer steps.
      batch_size: samples per step.
      dim: embedding dimension.
      validations: times the model is validated, evenly spread.
      max_validation_users: users of a validation; the test is on all.
      k: length of the ranked list.
    """

    steps: int = 3000
    batch_size: int = 512
    dim: int = 32
    validations: int = 20
    max_validation_users: int | None = 2000
    k: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dim", "validations", "k"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"`{name}` must be a positive int, got {getattr(self, name)}")
        if self.steps < 2 * self.validations:
            raise InvalidArgumentError(
                f"`steps` must be at least {2 * self.validations}, twice the validations, got {self.steps}"
            )

    @property
    def interval(self) -> int:
        """Steps between validations."""
        return -(-self.steps // self.validations)


class Steering(Protocol):
    """What steers a run; `metalearn.torch.MetaScheduler` is one, `PlainSchedule` another."""

    @property
    def should_validate(self) -> bool: ...

    def step(self, loss: torch.Tensor, /) -> None: ...

    def report(self, metrics: float, /) -> Any: ...

    def averaged_parameters(self) -> AbstractContextManager[None]: ...


class PlainSchedule:
    """No controller: constant hyperparameters, or a torch scheduler stepped after every optimizer step.

    Args:
      interval: steps between validations.
      scheduler: a torch learning-rate scheduler, or None.
    """

    def __init__(self, interval: int, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None) -> None:
        self._interval, self._scheduler, self._steps = interval, scheduler, 0

    @property
    def should_validate(self) -> bool:
        """Whether an interval has just ended."""
        return self._steps > 0 and self._steps % self._interval == 0

    def step(self, loss: torch.Tensor) -> None:
        """Steps the scheduler."""
        self._steps += 1
        if self._scheduler is not None:
            self._scheduler.step()

    def report(self, metrics: float) -> None:
        """Needs nothing of it."""

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """Averages nothing."""
        return nullcontext()


@dataclass(kw_only=True)
class TrainingResult:
    """What one run gave.

    Args:
      test: means over all test users, at the weights that validated best.
      report: more metrics of the same lists, over all and by cohort.
      validation: (step, NDCG) at each validation.
      seconds: of training, without validation.
      steps_per_second: of training, without validation.
      diverged: whether the loss at some validation was not finite.
    """

    test: dict[str, float]
    report: dict[str, float] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    steps_per_second: float = 0.0
    diverged: bool = False


def train(
    model: Recommender,
    optimizer: torch.optim.Optimizer,
    steering: Steering,
    domain: Domain,
    settings: TrainingSettings,
    *,
    seed: int,
    on_step: Callable[[int], object] | None = None,
) -> TrainingResult:
    """Trains, validates when the steering says so, and tests the weights that validated best.

    Args:
      model: of any family.
      optimizer: over the model's parameters.
      steering: a MetaScheduler or a PlainSchedule.
      seed: of batches and dropout.
      on_step: called with the number of steps done, for progress bars.
    """
    torch.manual_seed(seed)
    sampler = model.sampler(domain, settings.batch_size, seed=seed)
    validate = Evaluator(domain, "validation", k=settings.k, max_users=settings.max_validation_users)
    result = TrainingResult(test={})
    best, best_weights = -1.0, _copy(model)
    losses_finite = torch.ones((), dtype=torch.bool)
    validation_seconds = 0.0
    began = time.perf_counter()
    for step in range(1, settings.steps + 1):
        loss = model(*sampler.next())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steering.step(loss)
        if steering.should_validate or step == settings.steps:
            paused = time.perf_counter()
            with steering.averaged_parameters():
                value = validate(model).mean_ndcg
                if value > best:
                    best, best_weights = value, _copy(model)
            validation_seconds += time.perf_counter() - paused
            losses_finite &= torch.isfinite(loss.detach())
            result.validation.append((step, value))
            steering.report(value)
        if on_step is not None:
            on_step(step)
    result.seconds = time.perf_counter() - began - validation_seconds
    result.steps_per_second = settings.steps / result.seconds
    result.diverged = not bool(losses_finite)
    model.load_state_dict(best_weights)
    test = Evaluator(domain, "test", k=settings.k)
    result.test, result.report = test(model).means(), test.report(model)
    return result


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
