"""One training run of a recommender: steps, validation on a schedule, best weights kept, test at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from envs.domains import Domain
from envs.recommenders.evaluation import Evaluator
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import Sampler
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

    @property
    def reads_losses(self) -> bool: ...

    def step(self, loss: torch.Tensor, /) -> None: ...

    def report(self, metrics: Mapping[str, float], /) -> Any: ...

    def averaged_parameters(self) -> AbstractContextManager[None]: ...


class PlainSchedule:
    """No controller: constant hyperparameters, or a torch scheduler stepped after every optimizer step.

    Args:
      interval: steps between validations.
      scheduler: a torch learning-rate scheduler, or None.
    """

    def __init__(self, interval: int, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None) -> None:
        self._interval, self._scheduler, self._steps = interval, scheduler, 0

    reads_losses = False

    @property
    def should_validate(self) -> bool:
        """Whether an interval has just ended."""
        return self._steps > 0 and self._steps % self._interval == 0

    def step(self, loss: torch.Tensor) -> None:
        """Steps the scheduler."""
        self._steps += 1
        if self._scheduler is not None:
            self._scheduler.step()

    def report(self, metrics: Mapping[str, float]) -> None:
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


class HeldOutLosses:
    """Mean losses of validation and of training interactions, of the same weights, without dropout, on a few batches.

    The batches are the same every time, so that what changes is the model.

    Args:
      sampler: of the model's batches; its position stays.
      domain: whose interactions are drawn.
    """

    NUM_BATCHES = 16

    def __init__(self, sampler: Sampler, domain: Domain) -> None:
        parts = {"validation_loss": domain.validation, "training_sample_loss": domain.train}
        samplers = {name: sampler.over(part, seed=0) for name, part in parts.items()}
        self._batches = {
            name: [found.next() for _ in range(self.NUM_BATCHES)]
            for name, found in samplers.items()
            if found is not None
        }

    @torch.no_grad()
    def __call__(self, model: Recommender) -> dict[str, float]:
        """Returns both, by the names that a MetaScheduler knows; nothing where the family has no such batches."""
        training = model.training
        model.train(False)
        losses = {
            name: float(torch.stack([model(*batch) for batch in batches]).mean())
            for name, batches in self._batches.items()
        }
        model.train(training)
        return losses


class TrainingRun:
    """A run that can be taken in parts: it keeps the weights that validated best, and its own random state.

    Args:
      model: of any family.
      optimizer: over the model's parameters.
      steering: a MetaScheduler or a PlainSchedule.
      domain: to train and validate on.
      settings: the budget.
      seed: of batches and dropout.
      on_step: called with the number of steps done, for progress bars.
    """

    def __init__(
        self,
        model: Recommender,
        optimizer: torch.optim.Optimizer,
        steering: Steering,
        domain: Domain,
        settings: TrainingSettings,
        *,
        seed: int,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        self.model, self.optimizer, self.steering, self.settings = model, optimizer, steering, settings
        self.result = TrainingResult(test={})
        self.steps = 0
        """Optimizer steps taken."""
        self._on_step = on_step
        torch.manual_seed(seed)
        self._random_state = torch.get_rng_state()
        self._sampler = model.sampler(domain, settings.batch_size, seed=seed)
        self._losses = HeldOutLosses(self._sampler, domain) if steering.reads_losses else None
        self._validate = Evaluator(domain, "validation", k=settings.k, max_users=settings.max_validation_users)
        self._best, self._best_weights = -1.0, _copy(model)
        self._losses_finite = torch.ones((), dtype=torch.bool)

    def advance(self, steps: int | None = None) -> None:
        """Takes some steps, at most those that are left; all of these by default."""
        left = self.settings.steps - self.steps
        last = self.steps + (left if steps is None else min(steps, left))
        torch.set_rng_state(self._random_state)
        validation_seconds = 0.0
        began = time.perf_counter()
        while self.steps < last:
            self.steps += 1
            loss = self.model(*self._sampler.next())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steering.step(loss)
            if self.steering.should_validate or self.steps == self.settings.steps:
                paused = time.perf_counter()
                value, losses = self._validated()
                validation_seconds += time.perf_counter() - paused
                self._losses_finite &= torch.isfinite(loss.detach())
                self.result.validation.append((self.steps, value))
                self.steering.report({"ndcg": value, **losses})
            if self._on_step is not None:
                self._on_step(self.steps)
        self._random_state = torch.get_rng_state()
        self.result.seconds += time.perf_counter() - began - validation_seconds
        self.result.steps_per_second = self.steps / self.result.seconds
        self.result.diverged = not bool(self._losses_finite)

    def restore_best(self) -> None:
        """Puts the weights that validated best into the model."""
        self.model.load_state_dict(self._best_weights)

    def _validated(self) -> tuple[float, dict[str, float]]:
        with self.steering.averaged_parameters():
            value = self._validate(self.model).mean_ndcg
            losses = {} if self._losses is None else self._losses(self.model)
            if value > self._best:
                self._best, self._best_weights = value, _copy(self.model)
        return value, losses


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
      model, optimizer, steering, domain, settings, seed, on_step: as in `TrainingRun`.
    """
    run = TrainingRun(model, optimizer, steering, domain, settings, seed=seed, on_step=on_step)
    run.advance()
    run.restore_best()
    test = Evaluator(domain, "test", k=settings.k)
    run.result.test, run.result.report = test(model).means(), test.report(model)
    return run.result


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
