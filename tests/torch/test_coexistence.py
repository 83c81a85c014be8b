"""Beside implementations of optimizers, several optimizers and GradScaler: values in force are all that differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from envs.domains import Domain
from envs.recommenders import TripleSampler
from metalearn import Controller
from metalearn.torch import MetaScheduler
from tests.torch.loops import assert_equal
from tests.torch.runs import BATCH_SIZE

INTERVAL, STEPS = 4, 30


class Mixed(torch.nn.Module):
    """Sparse tables under a dense tower with dropout."""

    def __init__(self, domain: Domain, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = torch.nn.Embedding(domain.num_users, 4, sparse=sparse)
        self.item = torch.nn.Embedding(domain.num_items, 4, sparse=sparse)
        self.tower = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 4))

    def forward(self, user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        margin = (self.tower(self.user(user)) * (self.item(positive) - self.item(negative))).sum(-1)
        return torch.nn.functional.softplus(-margin).mean()

    def tables(self) -> list[torch.nn.Parameter]:
        return [self.user.weight, self.item.weight]


def one(**options: Any) -> Callable[[Mixed], list[torch.optim.Optimizer]]:
    return lambda model: [
        torch.optim.AdamW([{"params": model.tables()}, {"params": list(model.tower.parameters())}], **options)
    ]


MAKERS: dict[str, Callable[[Mixed], list[torch.optim.Optimizer]]] = {
    "one by one": one(foreach=False),
    "foreach": one(foreach=True),
    "fused": one(fused=True),
    "fused, tensor rates": one(fused=True, lr=torch.tensor(1e-3)),
    "amsgrad": one(amsgrad=True),
    "SparseAdam beside AdamW": lambda model: [
        torch.optim.SparseAdam(model.tables()),
        torch.optim.AdamW(model.tower.parameters()),
    ],
    "SGD beside AdamW": lambda model: [
        torch.optim.SGD(model.tables(), lr=0.5),
        torch.optim.AdamW(model.tower.parameters()),
    ],
}


def values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


class Steered:
    """A run that records, of each step, what its groups held and what the dropout was."""

    def __init__(self, domain: Domain, controller: Controller, name: str) -> None:
        self.model = Mixed(domain, sparse="SparseAdam" in name)
        self.optimizers = MAKERS[name](self.model)
        self.schedulers = [
            MetaScheduler(
                optimizer,
                model=self.model,
                domain=domain.profile,
                controller=controller,
                horizon=STEPS,
                interval=INTERVAL,
                batch_size=BATCH_SIZE,
            )
            for optimizer in self.optimizers
        ]
        self.in_force: list[list[Any]] = [[] for _ in self.optimizers]
        for optimizer, seen in zip(self.optimizers, self.in_force, strict=True):
            optimizer.register_step_pre_hook(lambda o, *_, seen=seen: seen.append(values(o)))
        self.dropout: list[float] = []
        sampler = TripleSampler(domain.train, BATCH_SIZE, seed=0)
        torch.manual_seed(1)
        for _ in range(STEPS):
            self.dropout.append(self.model.tower[1].p)  # type: ignore[arg-type]
            loss = self.model(*sampler.next())
            loss.backward()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                assert {p.grad.layout for p in self.model.tables() if p.grad is not None} <= {
                    torch.sparse_coo if "SparseAdam" in name else torch.strided
                }
                optimizer.zero_grad()
                scheduler.step(loss)
                if scheduler.should_validate:
                    scheduler.report(0.1)


@pytest.mark.parametrize("name", MAKERS)
def test_a_loop_that_sets_the_same_values_by_hand_trains_the_same(domain: Domain, controller: Controller, name: str):
    steered = Steered(domain, controller, name)
    model = Mixed(domain, sparse="SparseAdam" in name)
    optimizers = MAKERS[name](model)
    sampler = TripleSampler(domain.train, BATCH_SIZE, seed=0)
    torch.manual_seed(1)
    for step, dropout in enumerate(steered.dropout):
        model.tower[1].p = dropout  # type: ignore[assignment]
        model(*sampler.next()).backward()
        for optimizer, in_force in zip(optimizers, steered.in_force, strict=True):
            for group, held in zip(optimizer.param_groups, in_force[step], strict=True):
                group.update(held)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(steered.model.state_dict(), model.state_dict())
    assert len(set(steered.dropout)) > 3
    for scheduler, in_force in zip(steered.schedulers, steered.in_force, strict=True):
        assert scheduler.steps == STEPS
        assert len({float(groups[0]["lr"]) for groups in in_force}) == STEPS
    masters = ["dropout" not in scheduler.masked for scheduler in steered.schedulers]
    assert masters == [True] + [False] * (len(masters) - 1)


def scaled(domain: Domain, controller: Controller, *, scale: float, spoil: int | None = None) -> MetaScheduler:
    """A run with fused AdamW, which unscales gradients itself and skips steps on the device."""
    model = Mixed(domain, sparse=False)
    (optimizer,) = MAKERS["fused"](model)
    scheduler = MetaScheduler(
        optimizer, model=model, domain=domain.profile, controller=controller, horizon=STEPS, interval=INTERVAL
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    sampler = TripleSampler(domain.train, BATCH_SIZE, seed=0)
    torch.manual_seed(1)
    for step in range(STEPS):
        loss = model(*sampler.next())
        scaler.scale(loss).backward()
        if step == spoil:
            model.item.weight.grad[0] = math.inf  # type: ignore[index]
        before = model.item.weight.detach().clone()
        scaler.step(optimizer)
        assert torch.equal(before, model.item.weight) == (step == spoil)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step(loss)
        if scheduler.should_validate:
            scheduler.report(0.1)
    return scheduler


def test_gradients_that_are_still_scaled_are_measured_all_the_same(domain: Domain, controller: Controller):
    plain, large = (scaled(domain, controller, scale=scale) for scale in (1.0, 2.0**14))
    assert len(plain.decisions) == 1 + STEPS // INTERVAL
    for one, other in zip(plain.decisions, large.decisions, strict=True):
        for row, same in zip(one.groups, other.groups, strict=True):
            assert row == pytest.approx(same, rel=1e-4)


def test_a_step_that_a_fused_optimizer_skips_counts_since_only_the_device_knows(domain: Domain, controller: Controller):
    scheduler = scaled(domain, controller, scale=4.0, spoil=9)
    assert scheduler.steps == STEPS
    assert all(math.isfinite(v) for decision in scheduler.decisions for row in decision.groups for v in row.values())
