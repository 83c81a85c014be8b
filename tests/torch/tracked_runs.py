"""A steered run beside which other things go back, what may happen to it, and a comparison to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from envs.domains import Domain
from envs.recommenders import MatrixFactorization
from metalearn import Controller
from metalearn.torch import RollbackConfig
from tests.torch.runs import Run, start

INTERVAL, HORIZON = 6, 48
EVERY = RollbackConfig(every=1)


def adamw(model: MatrixFactorization) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameter_groups(), foreach=True)


def momentum(model: MatrixFactorization) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Loop:
    """A steered run with another scheduler, whose sampler and scheduler are tracked."""

    def __init__(
        self,
        domain: Domain,
        controller: Controller,
        *,
        optimizer: Callable[[MatrixFactorization], torch.optim.Optimizer] = adamw,
        tracked: bool = True,
        rollback: RollbackConfig | None = EVERY,
        **options: Any,
    ) -> None:
        schedules: list[Any] = []
        samplers: list[Any] = []

        class Late:
            """What is made after the MetaScheduler, tracked all the same."""

            def __init__(self, made: list[Any]) -> None:
                self._made = made

            def state_dict(self) -> Any:
                return self._made[0].state_dict()

            def load_state_dict(self, state: Any) -> None:
                self._made[0].load_state_dict(state)

        def make(model: MatrixFactorization) -> torch.optim.Optimizer:
            made = optimizer(model)
            schedules.append(torch.optim.lr_scheduler.StepLR(made, 5, gamma=0.9))
            return made

        # The list is filled while `start` makes the optimizer, before it makes the MetaScheduler.
        self.run: Run = start(
            domain,
            controller=controller,
            optimizer=make,
            interval=INTERVAL,
            rollback=rollback,
            **({"tracked": _Deferred(schedules, Late(samplers))} if tracked else {}),
            **options,
        )
        self.schedule = schedules[0]
        samplers.append(self.run.sampler)
        assert self.run.scheduler is not None
        self.scheduler = self.run.scheduler

    def step(self, spoil: Callable[[Run], object] = lambda run: None) -> None:
        run = self.run
        loss = run.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        self.schedule.step()
        spoil(run)
        self.scheduler.step(loss)

    def report(self, value: float | None = None) -> None:
        if self.scheduler.should_validate:
            with self.scheduler.averaged_parameters():
                score = self.run.model.score(torch.arange(8)).std().item()
            self.scheduler.report(score if value is None else value)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.report()

    def contents(self) -> list[Any]:
        """Return all that training depends on."""
        optimizer, scheduler = self.run.optimizer, self.scheduler
        with scheduler.averaged_parameters():
            averaged = [p.detach().clone() for p in self.run.model.parameters()]
        moments = [v for p in self.run.model.parameters() for _, v in sorted(optimizer.state[p].items())]
        return [
            *(p.detach().clone() for p in self.run.model.parameters()),
            *averaged,
            *(v.clone() if isinstance(v, torch.Tensor) else v for v in moments),
            torch.get_rng_state(),
            self.schedule.state_dict()["last_epoch"],
            [group["lr"] for group in optimizer.param_groups],
            scheduler.steps,
            scheduler.get_last_lr(),
            scheduler.decision.groups,
            scheduler.decision.run,
            scheduler.decision.step,
            self.run.model.dropout.p,
        ]


class _Deferred(list):
    """What is tracked, of which the first is known only when the optimizer is made."""

    def __init__(self, first: list[Any], *rest: Any) -> None:
        super().__init__(rest)
        self._first = first

    def __iter__(self):
        yield from self._first
        yield from super().__iter__()


def assert_same(one: list[Any], other: list[Any]) -> None:
    for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, (index, mine, theirs)


def spoil_weights(run: Run) -> None:
    """What a thousandfold learning rate does."""
    with torch.no_grad():
        run.model.user.weight.mul_(1e30).mul_(1e30)
