"""What becomes of decisions in a training loop: in force, shadowed, asked about, or frozen."""

from __future__ import annotations

import pytest
import torch

from envs.domains import Domain
from metalearn.controller import Controller, Decision
from metalearn.errors import InvalidArgumentError
from metalearn.safety.guard import GuardConfig
from tests.torch.runs import Run, start

STEPS = 60


def weights(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("horizon", [STEPS, None])
def test_a_shadow_decides_and_changes_nothing(domain: Domain, controller: Controller, horizon: int | None):
    plain = start(domain)
    plain.advance(STEPS)
    shadow = start(domain, controller=controller, horizon=horizon, interval=10, steering="shadow")
    assert shadow.scheduler is not None
    shadow.advance(STEPS)
    assert same(weights(plain), weights(shadow))
    assert plain.losses == shadow.losses
    decisions = shadow.scheduler.decisions
    assert len(decisions) == 1 + STEPS // 10
    assert all(not any(decision.groups) and decision.proposed is not None for decision in decisions)


def test_a_shadow_that_takes_over_goes_on_from_the_optimizers_values(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=STEPS, interval=10, steering="shadow")
    assert run.scheduler is not None
    run.advance(20)
    own = run.optimizer.param_groups[0]
    decision = run.scheduler.switch("control")
    assert decision.groups[0]["learning_rate"] == pytest.approx(own["lr"])
    assert decision.groups[0]["weight_decay"] == pytest.approx(own["weight_decay"])
    run.advance(20)
    factor = run.scheduler.multiplier(39)
    assert run.scheduler.get_last_lr()[0] == pytest.approx(
        run.scheduler.decisions[-2].groups[0]["learning_rate"] * factor
    )


def test_a_run_that_becomes_a_shadow_gets_its_own_values_back(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=STEPS, interval=10)
    assert run.scheduler is not None
    own_dropout, own_rate = 0.2, run.optimizer.param_groups[0]["lr"]
    run.advance(20)
    run.scheduler.switch("shadow")
    dropouts = [module.p for module in run.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert set(dropouts) == {own_dropout}
    run.advance(10)
    assert run.scheduler.get_last_lr() == [own_rate] * len(run.optimizer.param_groups)


def test_a_frozen_run_keeps_its_values(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=STEPS, interval=10, steering="frozen")
    assert run.scheduler is not None
    run.advance(STEPS)
    first, *later = run.scheduler.decisions
    assert all(decision.groups == first.groups for decision in later)


def test_the_advisor_is_asked_and_heard(domain: Domain, controller: Controller):
    asked: list[Decision] = []

    def refuse(decision: Decision) -> bool:
        asked.append(decision)
        return False

    run = start(domain, controller=controller, horizon=STEPS, interval=10, steering="advise", advisor=refuse)
    assert run.scheduler is not None
    run.advance(STEPS)
    first, *later = run.scheduler.decisions
    assert asked
    assert all(decision.groups == first.groups for decision in later)
    assert {decision.status for decision in later if decision.advice} == {"rejected"}
    with pytest.raises(InvalidArgumentError, match="advisor"):
        start(domain, controller=controller, horizon=STEPS, steering="advise")


def test_caps_hold_for_the_start_too(domain: Domain, controller: Controller):
    guard = GuardConfig(caps={"learning_rate": (1e-5, 2e-3)})
    run = start(domain, controller=controller, horizon=STEPS, interval=10, guard=guard)
    assert run.scheduler is not None
    run.advance(STEPS)
    rates = [group["learning_rate"] for decision in run.scheduler.decisions for group in decision.groups]
    assert max(rates) <= 2e-3 * (1 + 1e-9)
