"""Small steered training runs for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from envs.domains import Domain
from envs.recommenders import MatrixFactorization, TripleSampler
from metalearn.torch import MetaScheduler

BATCH_SIZE = 32


@dataclass(kw_only=True, eq=False)
class Run:
    """A model in training; `scheduler` is None where nothing steers it."""

    model: MatrixFactorization
    optimizer: torch.optim.Optimizer
    sampler: TripleSampler
    scheduler: MetaScheduler | None
    losses: list[float] = field(default_factory=list)

    def backward(self) -> torch.Tensor:
        """Compute one batch's gradient."""
        loss = self.model(*self.sampler.next())
        loss.backward()
        return loss

    def step(self) -> None:
        """Take one training step, and tell the scheduler; without its report."""
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if self.scheduler is not None:
            self.scheduler.step(loss)

    def report(self) -> None:
        """Report if it is time, a metric that follows the weights."""
        if self.scheduler is not None and self.scheduler.should_validate:
            with self.scheduler.averaged_parameters():
                value = self.model.score(torch.arange(8)).std().item()
            self.scheduler.report(value)

    def advance(self, steps: int) -> None:
        """Take steps, reporting at the end of each interval."""
        for _ in range(steps):
            self.step()
            self.report()


def adamw(model: MatrixFactorization) -> torch.optim.Optimizer:
    """Make AdamW over two groups."""
    return torch.optim.AdamW(model.parameter_groups())


def start(
    domain: Domain,
    *,
    controller: Any = None,
    optimizer: Callable[[MatrixFactorization], torch.optim.Optimizer] = adamw,
    seed: int = 0,
    **options: Any,
) -> Run:
    """Start a run from a seed; options go to the MetaScheduler, without a controller there is none."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MatrixFactorization(domain.num_users, domain.num_items, 4, dropout=0.2, generator=generator)
    made = optimizer(model)
    scheduler = None
    if controller is not None:
        options = {"model": model, "domain": domain.profile, "batch_size": BATCH_SIZE, **options}
        scheduler = MetaScheduler(made, controller=controller, **options)
    sampler = TripleSampler(domain.train, BATCH_SIZE, seed=seed)
    return Run(model=model, optimizer=made, sampler=sampler, scheduler=scheduler)
