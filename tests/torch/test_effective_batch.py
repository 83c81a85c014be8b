"""How learning rates follow the batch, against runs that show why; accumulation changes between steps only."""

from __future__ import annotations

import math

import pytest
import torch

from metalearn.errors import InvalidArgumentError
from metalearn.torch import Accumulation, rate_factor
from metalearn.torch.effective_batch import rate_rule


@pytest.mark.parametrize(
    ("growth", "role", "rule", "expected"),
    [
        (4.0, "dense", "adaptive", 2.0),
        (4.0, "head", "adaptive", 2.0),
        (0.25, "pretrained", "adaptive", 0.5),
        (16.0, "adapter", "adaptive", 4.0),
        (64.0, "embedding", "adaptive", 1.0),
        (4.0, "dense", "linear", 4.0),
        (4.0, "embedding", "linear", 4.0),
        (4.0, "dense", "none", 1.0),
        (1.0, "dense", "linear", 1.0),
    ],
)
def test_factors(growth: float, role: str, rule: str, expected: float):
    assert rate_factor(growth, role=role, rule=rule) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("growth", [0.0, -1.0, math.nan, math.inf])
def test_growth_must_be_positive(growth: float):
    with pytest.raises(InvalidArgumentError, match="`growth` must be positive"):
        rate_factor(growth, role="dense", rule="linear")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (torch.optim.AdamW, "adaptive"),
        (torch.optim.Adagrad, "adaptive"),
        (torch.optim.SparseAdam, "adaptive"),
        (torch.optim.SGD, "linear"),
        (torch.optim.Rprop, "none"),
    ],
)
def test_rules_by_optimizer(make: type[torch.optim.Optimizer], rule: str):
    assert rate_rule(make([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)) == rule  # type: ignore[call-arg]


def distance(make: type[torch.optim.Optimizer], role: str, growth: int) -> float:
    """Return how far a row that every 32nd sample knows goes in an epoch of 1024, with the rate that the rule gives."""
    table = torch.nn.Embedding(2, 1)
    torch.nn.init.zeros_(table.weight)
    optimizer = make(table.parameters(), lr=1e-3)  # type: ignore[call-arg]
    factor = rate_factor(growth, role=role, rule=rate_rule(optimizer))
    optimizer.param_groups[0]["lr"] = 1e-3 * factor
    rows = torch.tensor([int(i % 32 == 0) for i in range(1024)])
    for batch in rows.split(4 * growth):
        table(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return table.weight[1].abs().item()


def test_a_rare_row_goes_as_far_in_an_epoch_whatever_the_batch():
    # SGD: of k times the samples a row's share of the mean is a k-th. So the rule is linear for embeddings too.
    assert distance(torch.optim.SGD, "embedding", 8) == pytest.approx(distance(torch.optim.SGD, "embedding", 1))
    # Divided by its own size a gradient's share does not matter, and up to a batch of 32 there are 32 steps an epoch.
    for growth in (2, 8):
        assert distance(torch.optim.Adagrad, "embedding", growth) == pytest.approx(
            distance(torch.optim.Adagrad, "embedding", 1), rel=1e-3
        )
    assert distance(torch.optim.Adagrad, "dense", 8) == pytest.approx(
        math.sqrt(8) * distance(torch.optim.Adagrad, "embedding", 1), rel=1e-3
    )


def test_accumulation_changes_between_steps_only():
    accumulation = Accumulation(2)
    course = []
    for micro_batch in range(9):
        if micro_batch == 1:
            accumulation.write(4)
        course.append((accumulation.count, accumulation.completes_step()))
    assert course == [(2, False), (2, True), *[(4, False)] * 3, (4, True), *[(4, False)] * 3]
    assert accumulation.read() == 4
    accumulation.load_state_dict({})  # gradients of the three are gone
    assert [accumulation.completes_step() for _ in range(4)] == [False, False, False, True]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    weight, samples = torch.nn.Parameter(torch.randn(3)), torch.randn(8, 3)
    (samples @ weight).square().mean().backward()
    assert weight.grad is not None
    whole, weight.grad = weight.grad, None
    accumulation = Accumulation(4)
    for part in samples.split(2):
        ((part @ weight).square().mean() / accumulation.count).backward()
    torch.testing.assert_close(weight.grad, whole)


def test_accumulation_is_checked():
    with pytest.raises(InvalidArgumentError, match=r"`accumulation` must be one of .*, got 3"):
        Accumulation(3)
