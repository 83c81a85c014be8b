"""Dropout by buffer: as torch's in distribution, one graph whatever the rate, found by the bindings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from metalearn.errors import InvalidArgumentError
from metalearn.torch import BufferedDropout
from metalearn.torch.bindings import Bindings, dropout_modules


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_and_scales_as_torch_does(rate: float, dtype: torch.dtype):
    torch.manual_seed(0)
    values = torch.ones(200_000, dtype=dtype, requires_grad=True)
    dropped = BufferedDropout(rate)(values)
    assert dropped.dtype == dtype
    share = (dropped == 0).double().mean().item()
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / 200_000) ** 0.5
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=4e-3, atol=0)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_nothing_is_dropped_in_evaluation():
    values = torch.randn(5)
    assert BufferedDropout(0.5).eval()(values) is values


def compiled_frames(dropout: torch.nn.Module) -> int:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), dropout, torch.nn.Linear(4, 1))
    forward = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(6):
        dropout.p = 0.1 * (step + 1)  # type: ignore[assignment]
        forward(torch.ones(64, 4)).mean().backward()
    return counter.frame_count


def test_a_compiled_model_is_compiled_once():
    assert compiled_frames(BufferedDropout(0.1)) == 1
    assert compiled_frames(torch.nn.Dropout(0.1)) > 3  # what it is for: should this fail, torch needs it no more


def test_a_compiled_model_sees_the_new_rate():
    torch._dynamo.reset()
    dropout = BufferedDropout(0.0)
    forward = torch.compile(dropout, backend="eager", fullgraph=True)
    shares = []
    for rate in (0.0, 0.6, 0.2):
        dropout.p = rate
        shares.append((forward(torch.ones(20_000)) == 0).double().mean().item())
    assert shares == pytest.approx([0.0, 0.6, 0.2], abs=0.03)


def test_bindings_find_it_and_give_it_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), BufferedDropout(0.25), torch.nn.Dropout(0.5))
    assert len(dropout_modules(model)) == 2
    bindings = Bindings(torch.optim.AdamW(model.parameters()), model)
    bindings.set_dropout(0.1)
    assert [module.p for module in dropout_modules(model)] == [0.1, 0.1]
    assert model[1].rate.item() == pytest.approx(0.1)
    bindings.release_dropout()
    assert [module.p for module in dropout_modules(model)] == [0.25, 0.5]


def test_checkpoints_of_a_model_with_torchs_dropout_fit():
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    ours = torch.nn.Sequential(torch.nn.Linear(2, 2), BufferedDropout(0.25))
    ours.load_state_dict(theirs.state_dict())
    assert copy.deepcopy(ours)[1].p == 0.25
    assert "p=0.25" in repr(ours)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_are_checked(rate: float):
    with pytest.raises(InvalidArgumentError, match=r"`p` must be in \[0, 1\)"):
        BufferedDropout(rate)
