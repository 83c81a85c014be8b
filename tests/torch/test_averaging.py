"""Averaged weights: the recursion, the swap and the way back."""

from __future__ import annotations

import pytest
import torch

from metalearn.torch.averaging import AVERAGE_POWER, WeightAverage


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
