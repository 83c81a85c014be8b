"""Beside other learning-rate schedulers: theirs stay theirs to the bit, and multiply the controller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from envs.domains import Domain
from envs.recommenders import MatrixFactorization
from metalearn import Controller
from tests.torch.runs import start

STEPS = 50


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    warmup = schedulers.LinearLR(optimizer, start_factor=0.2, total_iters=10)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 40)], milestones=[10])


MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 7, gamma=0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda step: 0.97**step, lambda step: 1 / (1 + step)]),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.02, total_steps=STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 9),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.1, total_iters=20),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=3, factor=0.3),
    "SequentialLR": sequential,
}


def two_rates(model: MatrixFactorization) -> torch.optim.Optimizer:
    first, second = model.parameter_groups()
    return torch.optim.AdamW([{**first, "lr": 2e-3}, {**second, "lr": 5e-4, "weight_decay": 0.1}])


def values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


class Trained:
    """A run of STEPS steps beside another scheduler, and what the groups held at each."""

    def __init__(self, domain: Domain, name: str, *, other_first: bool, controller: Controller | None = None) -> None:
        options = {"controller": controller, "horizon": STEPS, "interval": 5} if controller else {}
        made: list[Any] = []

        def optimizer(model: MatrixFactorization) -> torch.optim.Optimizer:
            both = two_rates(model)
            if other_first:
                made.append(MAKERS[name](both))
            self.initial = [group.get("initial_lr", group["lr"]) for group in both.param_groups]
            return both

        run = start(domain, optimizer=optimizer, **options)
        other = made[0] if made else MAKERS[name](run.optimizer)
        self.scheduler, self.in_force = run.scheduler, list[Any]()
        run.optimizer.register_step_pre_hook(lambda o, *_: self.in_force.append(values(o)))
        self.before, self.after = list[Any](), list[Any]()
        for _ in range(STEPS):
            self.before.append(values(run.optimizer))
            run.step()
            other.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            run.report()
            self.after.append(values(run.optimizer))


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR's own call
@pytest.mark.parametrize("other_first", [True, False], ids=["attached before", "attached after"])
@pytest.mark.parametrize("name", MAKERS)
def test_others_see_their_own_values_to_the_bit(domain: Domain, controller: Controller, name: str, other_first: bool):
    plain = Trained(domain, name, other_first=other_first)
    steered = Trained(domain, name, other_first=other_first, controller=controller)
    assert steered.before == plain.before
    assert steered.after == plain.after
    assert len({groups[0]["lr"] for groups in plain.after}) > 2  # the other scheduler did something
    scheduler = steered.scheduler
    assert scheduler is not None
    assert len(scheduler.decisions) == 11
    for step, groups in enumerate(steered.in_force):
        decision = [d for d in scheduler.decisions if d.step <= step][-1]
        for decided, group, own, initial in zip(
            decision.groups, groups, plain.before[step], steered.initial, strict=True
        ):
            expected = decided["learning_rate"] * scheduler.multiplier(step) * (own["lr"] / initial)
            assert type(group["lr"]) is float
            assert group["lr"] == pytest.approx(expected, rel=1e-12)
            assert group["weight_decay"] == decided["weight_decay"]
            assert group["betas"] == (decided["beta1"], 0.999)
