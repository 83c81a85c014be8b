"""Averaged weights: the recursion, the swap and the way back; and what a loop that evaluates them is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn.controller.controller import Controller
from metalearn.errors import InvalidArgumentError
from metalearn.torch.averaging import AVERAGE_EVERY, AVERAGE_POWER, WeightAverage
from tests.torch.runs import start


def params(*values: float) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([value, -value])) for value in values]


def test_updates_weigh_by_hand():
    (weight,) = held = params(1.0)
    average = WeightAverage(held)
    expected = 1.0
    for count, value in enumerate((2.0, 5.0, -1.0), 1):
        with torch.no_grad():
            weight.copy_(torch.tensor([value, -value]))
        average.update()
        share = (AVERAGE_POWER + 1) / (count + AVERAGE_POWER)  # 9/9, then 9/10, 9/11: the first update replaces
        expected += share * (value - expected)
    # 2; 2 + .9 · 3 = 4.7; 4.7 + 9/11 · (-5.7) = 0.036364
    assert expected == pytest.approx(0.036364, abs=1e-6)
    with average.swapped():
        torch.testing.assert_close(weight.detach(), torch.tensor([expected, -expected]))


def test_swap_restores_to_the_bit_even_after_an_error():
    held = params(1.0, 0.1)
    average = WeightAverage(held)
    for weight in held:
        weight.data.mul_(3.0)
    before = [weight.detach().clone() for weight in held]
    with pytest.raises(RuntimeError, match="inside"), average.swapped():
        assert held[0][0].item() == 1.0
        with average.swapped():  # nested: still the average, and back to it
            assert held[0][0].item() == 1.0
        assert held[0][0].item() == 1.0
        raise RuntimeError("inside")
    assert all(torch.equal(weight, kept) for weight, kept in zip(held, before, strict=True))
    assert all(weight.requires_grad and weight.grad is None for weight in held)


def test_frozen_parameters_are_left_out():
    free, frozen = params(1.0, 2.0)
    frozen.requires_grad_(False)
    average = WeightAverage([free, frozen])
    frozen.data.fill_(7.0)
    with average.swapped():
        assert frozen[0].item() == 7.0
    assert len(average.state_dict()["average"]) == 1


def test_state_is_copied_in_and_out():
    held = params(1.0)
    average, other = WeightAverage(held), WeightAverage(params(0.0))
    held[0].data.fill_(4.0)
    average.update()
    state = average.state_dict()
    average.update()
    other.load_state_dict(state)
    state["average"][0].fill_(9.0)
    assert other.state_dict()["count"] == 1
    assert torch.equal(other.state_dict()["average"][0], torch.full((2,), 4.0))


def test_averaged_parameters_are_those_of_an_unknown_horizon(domain: Domain, controller: Controller):
    run = start(domain, controller=controller)
    scheduler, weight = run.scheduler, run.model.user.weight
    assert scheduler is not None
    run.advance(2 * AVERAGE_EVERY + 3)
    before = weight.detach().clone()
    with scheduler.averaged_parameters():
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    assert scheduler.multiplier(10**6) == 1.0

    snapshots = []
    again = start(domain, controller=controller)
    for _ in range(2):
        again.advance(AVERAGE_EVERY)
        snapshots.append(again.model.user.weight.detach().clone())
    with scheduler.averaged_parameters():  # 9/9 of the first, then 9/10 of the second
        torch.testing.assert_close(weight.detach(), 0.1 * snapshots[0] + 0.9 * snapshots[1])


def test_averaged_parameters_change_nothing_where_the_rate_decays(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120)
    assert run.scheduler is not None
    run.advance(2 * AVERAGE_EVERY)
    before = run.model.user.weight.detach().clone()
    with run.scheduler.averaged_parameters():
        assert torch.equal(run.model.user.weight, before)


@pytest.mark.parametrize("horizon", [120, 60, 240])
def test_no_horizon_can_be_wrong_for_a_loop_that_averages(horizon: int, domain: Domain, controller: Controller):
    told = start(domain, controller=controller, horizon=horizon, averaging=True, interval=6)
    unknown = start(domain, controller=controller, interval=6)
    for run in (told, unknown):
        torch.manual_seed(0)  # of dropout
        run.advance(70)
    assert told.scheduler is not None and unknown.scheduler is not None
    assert told.scheduler.decisions == unknown.scheduler.decisions
    assert told.losses == unknown.losses
    assert {told.scheduler.multiplier(step) for step in (0, horizon // 2, horizon, 10 * horizon)} == {1.0}
    with told.scheduler.averaged_parameters(), unknown.scheduler.averaged_parameters():
        assert torch.equal(told.model.user.weight, unknown.model.user.weight)
        averaged = told.model.user.weight.detach().clone()
    assert not torch.equal(told.model.user.weight, averaged)


def test_the_horizon_of_a_loop_that_averages_sets_its_interval(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=200, averaging=True)
    assert run.scheduler is not None
    assert run.scheduler.interval == 10


def test_a_loop_that_averages_is_resumed_to_the_bit(domain: Domain, controller: Controller):
    first, second, again = (start(domain, controller=controller, horizon=120, averaging=True) for _ in range(3))
    for run in (first, again):
        torch.manual_seed(0)  # of dropout
        run.advance(17)
    for part in ("model", "optimizer", "scheduler"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    second.sampler = first.sampler
    torch.manual_seed(1)
    second.advance(23)
    torch.manual_seed(1)
    again.advance(23)
    assert second.scheduler is not None and again.scheduler is not None
    assert second.scheduler.decisions == again.scheduler.decisions
    with second.scheduler.averaged_parameters(), again.scheduler.averaged_parameters():
        assert torch.equal(second.model.user.weight, again.model.user.weight)


@pytest.mark.parametrize("options", [{"horizon": 120, "averaging": True}, {"horizon": None}])
def test_a_loop_that_is_to_average_and_evaluates_the_weights_is_warned_once(
    domain: Domain, controller: Controller, options: dict
):
    run = start(domain, controller=controller, interval=6, **options)
    assert run.scheduler is not None
    run.advance(12)  # as promised
    for _ in range(6):
        run.step()
    with pytest.warns(RuntimeWarning, match="evaluate and export inside `averaged_parameters`"):
        run.scheduler.report(0.1)
    for _ in range(6):
        run.step()
    run.scheduler.report(0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"averaging": False}, "`averaging` must be True where the horizon is unknown"),
        ({"averaging": "yes", "horizon": 100}, "`averaging` must be True, False or None, got 'yes'"),
        ({"averaging": True, "horizon": 0}, "`horizon` must be an int of at least 2, got 0"),
    ],
)
def test_wrong_averaging_is_refused(options: dict[str, Any], said: str, domain: Domain, controller: Controller):
    with pytest.raises(InvalidArgumentError, match=said):
        start(domain, controller=controller, **options)
