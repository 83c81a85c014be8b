"""Wrong uses: each gets an error that says what to do, and what looks like one but is none does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.torch import MetaScheduler
from metalearn.torch.calls import MAX_CHANGES, MAX_IDLE_CALLS
from tests.torch.runs import Run, start

INTERVAL = 6


def begun(domain: Domain, controller: Controller, **options: Any) -> tuple[Run, MetaScheduler]:
    run = start(domain, controller=controller, horizon=120, interval=INTERVAL, **options)
    assert run.scheduler is not None
    return run, run.scheduler


def hooks(run: Run) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in run.model.parameters())


def test_the_scheduler_before_backward(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    loss = run.model(*run.sampler.next())
    with pytest.raises(SessionError, match=r"before any gradient was computed; call it last, after loss\.backward\(\)"):
        scheduler.step(loss)


def test_the_scheduler_between_backward_and_step(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    scheduler.step(run.backward())
    before = run.model.item.weight.detach().clone()
    with pytest.raises(SessionError, match=r"between loss\.backward\(\) and optimizer\.step\(\); call it after"):
        run.optimizer.step()
    assert torch.equal(run.model.item.weight, before)


def test_accumulation_is_no_wrong_order(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    assert hooks(run) == 3
    for micro in range(9):
        loss = run.backward()
        if micro % 3 == 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
        scheduler.step(loss)
    assert scheduler.steps == 3
    assert hooks(run) == 0  # nothing is left of what watched


def test_a_skipped_first_step_is_no_wrong_order(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for index in range(3):
        loss = run.model(*run.sampler.next())
        scaler.scale(loss).backward()
        if index == 0:
            run.model.bias.weight.grad[0] = math.inf
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        scheduler.step(loss)
    assert scheduler.steps == 2


def test_a_closure_is_no_wrong_order(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    for _ in range(2):
        scheduler.step(run.optimizer.step(run.backward))  # type: ignore[arg-type]
        run.optimizer.zero_grad()
    assert scheduler.steps == 2


def test_detaching_takes_all_hooks_along(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    scheduler.detach()
    assert hooks(run) == 0
    assert not run.optimizer._optimizer_step_pre_hooks and not run.optimizer._optimizer_step_post_hooks


def test_two_schedulers_on_one_optimizer(domain: Domain, controller: Controller):
    run, _ = begun(domain, controller)
    with pytest.raises(InvalidArgumentError, match=r"already has a MetaScheduler; call its detach\(\) first"):
        MetaScheduler(run.optimizer, domain=domain.profile, controller=controller)


def test_a_group_that_was_added_later(domain: Domain, controller: Controller):
    run, _ = begun(domain, controller)
    run.step()
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(SessionError, match=r"has 3 parameter groups and had 2 .*make a new one after add_param_group"):
        run.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_an_optimizer_that_was_swapped(domain: Domain, controller: Controller, options: dict[str, Any]):
    run, scheduler = begun(domain, controller)
    run.step()
    run.optimizer = torch.optim.AdamW(run.model.parameters(), **options)
    with pytest.raises(
        SessionError, match=r"does not step: another one does; call detach\(\) and make a MetaScheduler"
    ):
        for _ in range(MAX_CHANGES + 2):
            run.step()
    assert scheduler.steps == 1


def test_an_optimizer_that_never_steps(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    with pytest.raises(SessionError, match=r"without an optimizer\.step\(\) in between; call it once after each step"):
        for _ in range(MAX_IDLE_CALLS):
            scheduler.step(run.backward())


def test_weights_that_are_swapped_are_no_swapped_optimizer(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    for _ in range(3):
        run.step()
        for _ in range(MAX_CHANGES - 1):
            scheduler.step(run.backward())
            with torch.no_grad():
                run.model.user.weight.mul_(1.0)
    assert scheduler.steps == 3


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "`metrics` is empty; report at least one number"),
        ({"loss": 1.0, "time": 2.0}, r"cannot tell which of \['loss', 'time'\] .*pass `metric`"),
        ("0.3 or so", "must hold numbers, got '0.3 or so'; report math.nan for what was not measured"),
    ],
)
def test_a_report_without_a_metric(domain: Domain, controller: Controller, metrics: Any, message: str):
    _, scheduler = begun(domain, controller)
    with pytest.raises(InvalidArgumentError, match=message):
        scheduler.report(metrics)


def test_a_loss_that_was_not_reduced(domain: Domain, controller: Controller):
    run, scheduler = begun(domain, controller)
    run.backward()
    run.optimizer.step()
    with pytest.raises(InvalidArgumentError, match=r"`loss` must be a scalar, got shape \(3,\); pass the batch's mean"):
        scheduler.step(torch.ones(3))


def on_meta() -> tuple[torch.optim.Optimizer, Any]:
    model = torch.nn.Linear(2, 2, device="meta")
    return torch.optim.AdamW(model.parameters()), model


def partly_on_meta() -> tuple[torch.optim.Optimizer, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    return torch.optim.AdamW(model[0].parameters()), model


def empty() -> tuple[torch.optim.Optimizer, Any]:
    return torch.optim.AdamW([{"params": []}, {"params": []}]), None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (on_meta, r"`optimizer` has parameters on the meta device.* model\.to_empty\(device=\"cuda\"\)"),
        (partly_on_meta, r"`model` has its parameter '1\.weight' on the meta device.* model\.to_empty"),
        (empty, "`optimizer` has parameter groups without any parameters; make it from those"),
        (lambda: (torch.optim.AdamW([torch.ones(2)]), "mine"), r"`model` must be a torch\.nn\.Module, got str"),
        (lambda: (torch.nn.Linear(2, 2), None), "`optimizer` must be a torch optimizer, got Linear"),
    ],
)
def test_what_cannot_be_trained(domain: Domain, controller: Controller, make: Any, message: str):
    optimizer, model = make()
    with pytest.raises(InvalidArgumentError, match=message):
        MetaScheduler(optimizer, model=model, domain=domain.profile, controller=controller)


def test_an_empty_group_among_others_is_none(domain: Domain, controller: Controller):
    table = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = torch.optim.AdamW([{"params": [table]}, {"params": []}])
    scheduler = MetaScheduler(optimizer, domain=domain.profile, controller=controller, horizon=20, interval=2)
    for _ in range(8):
        loss = table.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        if scheduler.should_validate:
            scheduler.report(0.1)
    assert scheduler.decision.index == 4
    assert all(math.isfinite(value) for group in scheduler.decision.groups for value in group.values())
