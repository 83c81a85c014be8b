"""Beside other learning-rate schedulers: theirs stay theirs to the bit, and multiply the controller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

from envs.domains import Domain
from envs.recommenders import MatrixFactorization
from metalearn import Controller
from tests.torch.runs import start

STEPS = 50


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    warmup = schedulers.LinearLR(optimizer, start_factor=0.2, total_iters=10)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, 40)], milestones=[10])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    warmup = schedulers.ConstantLR(optimizer, factor=0.3, total_iters=12)
    return schedulers.ChainedScheduler([warmup, schedulers.ExponentialLR(optimizer, 0.97)], optimizer)


MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 7, gamma=0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda step: 0.97**step, lambda step: 1 / (1 + step)]),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.02, total_steps=STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 9),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.1, total_iters=20),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=3, factor=0.3),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9 if step % 2 else 1.05),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [10, 30], gamma=0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.2, total_iters=20),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=STEPS, power=2.0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=5e-4, max_lr=5e-3, step_size_up=8),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=1e-2, anneal_epochs=20),
}
CYCLE_BETAS = {"OneCycleLR", "CyclicLR"}


def two_rates(model: MatrixFactorization) -> torch.optim.Optimizer:
    first, second = model.parameter_groups()
    return torch.optim.AdamW([{**first, "lr": 2e-3}, {**second, "lr": 5e-4, "weight_decay": 0.1}])


def two_tensors(model: MatrixFactorization) -> torch.optim.Optimizer:
    first, second = model.parameter_groups()
    return torch.optim.AdamW([{**first, "lr": torch.tensor(2e-3)}, {**second, "lr": torch.tensor(5e-4)}])


def values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what groups hold, tensors as what they hold now."""
    return [
        {key: float(value) if key in ("lr", "initial_lr") else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


class Trained:
    """A run of STEPS steps beside another scheduler, and what the groups held at each."""

    def __init__(
        self,
        domain: Domain,
        name: str,
        *,
        other_first: bool,
        controller: Controller | None = None,
        make: Callable[[MatrixFactorization], torch.optim.Optimizer] = two_rates,
    ) -> None:
        options = {"controller": controller, "horizon": STEPS, "interval": 5} if controller else {}
        made: list[Any] = []

        def optimizer(model: MatrixFactorization) -> torch.optim.Optimizer:
            both = make(model)
            if other_first:
                made.append(MAKERS[name](both))
            self.initial = [float(group.get("initial_lr", group["lr"])) for group in both.param_groups]
            return both

        run = start(domain, optimizer=optimizer, **options)
        other = made[0] if made else MAKERS[name](run.optimizer)
        self.scheduler, self.in_force = run.scheduler, list[Any]()
        self.types = {type(group["lr"]) for group in run.optimizer.param_groups}
        run.optimizer.register_step_pre_hook(
            lambda o, *_: self.types.update(type(group["lr"]) for group in o.param_groups)
        )
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
    assert_other_acted(plain, name)
    assert steered.types == {float}
    assert_rates_multiply(plain, steered, rel=1e-12)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "CosineAnnealingLR"])
def test_tensor_rates_stay_theirs_too(domain: Domain, controller: Controller, name: str):
    plain = Trained(domain, name, other_first=True, make=two_tensors)
    steered = Trained(domain, name, other_first=True, make=two_tensors, controller=controller)
    assert steered.before == plain.before
    assert steered.after == plain.after
    assert_other_acted(plain, name)
    assert steered.types == {torch.Tensor}
    assert_rates_multiply(plain, steered, rel=1e-6)


def assert_other_acted(plain: Trained, name: str) -> None:
    assert len({groups[0]["lr"] for groups in plain.after}) > 1
    assert (len({groups[0]["betas"] for groups in plain.after}) > 2) == (name in CYCLE_BETAS)


def assert_rates_multiply(plain: Trained, steered: Trained, *, rel: float) -> None:
    scheduler = steered.scheduler
    assert scheduler is not None
    assert len(scheduler.decisions) == 11
    for step, groups in enumerate(steered.in_force):
        decision = [d for d in scheduler.decisions if d.step <= step][-1]
        for decided, group, own, initial in zip(
            decision.groups, groups, plain.before[step], steered.initial, strict=True
        ):
            expected = decided["learning_rate"] * scheduler.multiplier(step) * (own["lr"] / initial)
            assert group["lr"] == pytest.approx(expected, rel=rel, abs=1e-12)
            assert group["weight_decay"] == decided["weight_decay"]
            assert group["betas"] == (decided["beta1"], 0.999)


def test_every_scheduler_of_torch_is_covered():
    found = {
        name
        for module in (schedulers, swa_utils)
        for name, thing in vars(module).items()
        if isinstance(thing, type) and issubclass(thing, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == set(MAKERS)


@pytest.mark.parametrize("horizon", [STEPS, None])
def test_averaged_models_of_torch_average_the_weights_trained(
    domain: Domain, controller: Controller, horizon: int | None
):
    run = start(domain, controller=controller, horizon=horizon, interval=5)
    averaged = swa_utils.AveragedModel(run.model)
    total = torch.zeros_like(run.model.item.weight, dtype=torch.float64)
    for _ in range(20):
        run.step()
        averaged.update_parameters(run.model)
        total += run.model.item.weight.detach()
        run.report()
    torch.testing.assert_close(averaged.module.item.weight.detach(), (total / 20).float())
