"""Clipping against torch's own, and frozen groups: no step, no decay, state kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from metalearn.torch import GradientClip, Trainable
from metalearn.torch.bindings import Bindings
from metalearn.torch.overrides import Overrides
from tests.torch.test_host_syncs import Operations


def held(optimizer: torch.optim.Optimizer, *handles: Any) -> Overrides:
    roles = ["dense"] * len(optimizer.param_groups)
    overrides = Overrides(handles, Bindings(optimizer, None), roles=roles, optimizer=optimizer)
    overrides.attach(optimizer)
    return overrides


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(4, 3)),
        torch.nn.Parameter(torch.randn(3)),
        torch.nn.Parameter(torch.ones(2)),
    ]


def fill(params: list[torch.nn.Parameter], scale: float = 1.0) -> None:
    """Gives all but the last a gradient."""
    generator = torch.Generator().manual_seed(1)
    for param in params[:-1]:
        param.grad = scale * torch.randn(param.shape, generator=generator)


class Recorded(torch.optim.SGD):
    """Keeps the gradients that a step finds."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        params = [p for group in self.param_groups for p in group["params"]]
        self.found = [None if p.grad is None else p.grad.clone() for p in params]
        super().step()
        return loss


@pytest.mark.parametrize("limit", [0.05, 1.0, 50.0])
def test_clips_as_torch_does(limit: float):
    ours, theirs = parameters(), parameters()
    fill(ours)
    fill(theirs)
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    optimizer = Recorded(ours, lr=0.1)
    held(optimizer, GradientClip(limit))
    optimizer.step()
    for found, param in zip(optimizer.found, theirs, strict=True):
        torch.testing.assert_close(found, param.grad)


def test_at_its_upper_bound_nothing_is_clipped_and_the_limit_may_change():
    params = parameters()
    optimizer, clip = Recorded(params, lr=0.1), GradientClip()
    overrides = held(optimizer, clip)
    norms = []
    for limit in (None, 0.5, 2.0):
        if limit is not None:
            overrides.impose({"grad_clip": limit})
        fill(params, 1000.0)
        optimizer.step()
        norms.append(torch.nn.utils.get_total_norm([g for g in optimizer.found if g is not None]).item())
    assert norms[0] > 1000.0
    assert norms[1:] == pytest.approx([0.5, 2.0], rel=1e-4)


def test_sparse_gradients_are_clipped_with_the_dense_ones():
    def model(sparse: bool) -> tuple[torch.nn.Embedding, torch.nn.Parameter]:
        torch.manual_seed(0)
        table, weight = torch.nn.Embedding(5, 2, sparse=sparse), torch.nn.Parameter(torch.randn(2))
        (table(torch.tensor([1, 1, 3])) @ weight).sum().backward()  # row 1 twice: the gradient is not coalesced
        return table, weight

    table, weight = model(sparse=True)
    assert table.weight.grad is not None and not table.weight.grad.is_coalesced()
    optimizer = Recorded([table.weight, weight], lr=0.1)
    held(optimizer, GradientClip(0.3))
    optimizer.step()
    dense = model(sparse=False)
    torch.nn.utils.clip_grad_norm_([dense[0].weight, dense[1]], 0.3)
    assert optimizer.found[0].layout is torch.sparse_coo  # never densified
    torch.testing.assert_close(optimizer.found[0].to_dense(), dense[0].weight.grad)
    torch.testing.assert_close(optimizer.found[1], dense[1].grad)


def test_gradients_that_are_still_scaled_are_clipped_as_if_they_were_not():
    params, scaled = parameters(), parameters()
    fill(params)
    fill(scaled, 64.0)
    optimizers = [torch.optim.SGD(params, lr=0.1), torch.optim.SGD(scaled, lr=0.1, fused=True)]
    optimizers[1].grad_scale = torch.tensor(64.0)  # as GradScaler does for fused ones
    optimizers[1].found_inf = torch.tensor(0.0)
    for optimizer in optimizers:
        held(optimizer, GradientClip(0.5))
        optimizer.step()
    for one, other in zip(params, scaled, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(params[0], parameters()[0])


def test_no_gradient_is_no_error_and_values_that_are_not_finite_stay_so():
    params = parameters()
    optimizer = Recorded(params, lr=0.1)
    held(optimizer, GradientClip(0.5))
    optimizer.step()
    params[0].grad = torch.full((4, 3), torch.inf)
    optimizer.step()
    assert not optimizer.found[0].isfinite().any()


def test_nothing_is_read_back():
    params = parameters()
    fill(params, 100.0)
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    overrides = held(optimizer, GradientClip(0.5), Trainable())
    with Operations() as operations:
        for limit, trains in ((0.5, True), (0.25, False)):
            overrides.impose({"grad_clip": limit, "trainable[0]": trains})
            for hook in optimizer._optimizer_step_pre_hooks.values():
                hook(optimizer, (optimizer,), {})
    assert operations.counts["_foreach_mul_"] == 2
    assert operations.reads == {}


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_closures_gradients_are_clipped(by_keyword: bool):
    params = parameters()
    optimizer = Recorded(params, lr=0.1)
    held(optimizer, GradientClip(0.5))

    def closure() -> float:
        fill(params, 100.0)
        return 7.0

    assert (optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)) == 7.0
    assert torch.nn.utils.get_total_norm([g for g in optimizer.found if g is not None]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_a_frozen_group_neither_steps_nor_decays_and_goes_on_from_its_state(make: Any):
    def trained(frozen: range) -> tuple[list[torch.Tensor], dict[str, Any]]:
        params = parameters()
        optimizer = make([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, weight_decay=0.1)
        overrides = held(optimizer, Trainable())
        for step in range(8):
            if step == frozen.start:
                overrides.impose({"trainable[0]": False})
            if step == frozen.stop:
                overrides.release([])
            before = copy.deepcopy((params[0].data, optimizer.state[params[0]]))
            fill(params, 3.0 if step in frozen else 1.0)
            optimizer.step()
            if step in frozen:
                assert torch.equal(params[0], before[0])
                assert str(optimizer.state[params[0]]) == str(before[1])
            else:
                assert not torch.equal(params[0], before[0])
        return [param.detach().clone() for param in params], copy.deepcopy(dict(optimizer.state[params[0]]))

    whole, state = trained(range(90, 91))
    paused, later = trained(range(3, 5))
    assert not torch.equal(paused[0], whole[0])
    assert not torch.equal(paused[1], whole[1])
    # Six steps of the same gradients, wherever the pause was, come to the same.
    other, same = trained(range(1, 3))
    assert torch.equal(other[0], paused[0])
    assert str(same) == str(later)
    assert str(same) != str(state) or not state or make is torch.optim.SGD


def test_the_norm_is_of_groups_that_train():
    params = parameters()
    optimizer = Recorded([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    overrides = held(optimizer, GradientClip(0.5), Trainable())  # in this order too
    overrides.impose({"trainable[0]": False})
    fill(params, 100.0)
    optimizer.step()
    assert optimizer.found[0] is None
    assert optimizer.found[1].norm().item() == pytest.approx(0.5)
    assert overrides.values == {"trainable[0]": False}


@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_and_freezing_change_nothing_that_a_compiled_model_sees(compiled: bool):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in model])
    overrides = held(optimizer, GradientClip(1.0), Trainable())
    for step in range(6):
        forward(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        overrides.impose({"grad_clip": 1.0 + step, "trainable[1]": step % 2 == 0})
    assert counter.frame_count == compiled


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_is_compiled_once_whatever_the_limit_and_once_for_each_set_of_groups():
    torch._dynamo.reset()
    counter = CompileCounter()
    params = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD([{"params": [param]} for param in params], lr=0.1)
    overrides = held(optimizer, GradientClip(1.0), Trainable())
    step = torch.compile(optimizer.step, backend=counter)
    frames = []
    for limit in (1.0, 0.5, 0.25, 0.75):
        overrides.impose({"grad_clip": limit})
        before = torch.cat([param.detach().reshape(-1) for param in params])
        fill([*params, params[0]], 100.0)
        step()
        moved = before - torch.cat([param.detach().reshape(-1) for param in params])
        assert moved.norm().item() == pytest.approx(0.1 * limit, rel=1e-4)
        frames.append(counter.frame_count)
    assert frames[2:] == frames[1:2] * 2  # the second call may compile anew: torch makes inputs of numbers then
    for trains in (False, True, False, True):
        overrides.impose({"trainable[0]": trains})
        before = params[0].detach().clone()
        fill([*params, params[0]], 100.0)
        step()
        assert torch.equal(params[0], before) == (not trains)
        frames.append(counter.frame_count)
    assert frames[5:] == frames[4:5] * 3
