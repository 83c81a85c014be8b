"""Nothing is read back to the host between decisions, and one transfer feeds a decision."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs.domains import Domain
from metalearn import Controller
from metalearn.torch import RollbackConfig, monitor
from tests.torch.runs import start

INTERVAL = 6


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    """Tensors of the CPU are treated as if reading them had to wait for a device."""
    monkeypatch.setattr(monitor, "HOST_DEVICES", ())


class Operations(TorchDispatchMode):
    """Counts what is dispatched; `reads` are scalars handed to Python, and what must wait for the device's answer."""

    waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> dict[str, int]:
        return {name: self.counts[name] for name in self.waiting if self.counts[name]}


@pytest.mark.parametrize("horizon", [120, None])
def test_hooks_and_step_read_nothing_back(domain: Domain, controller: Controller, horizon: int | None):
    run = start(domain, controller=controller, horizon=horizon, interval=INTERVAL)
    scheduler, optimizer = run.scheduler, run.optimizer
    assert scheduler is not None
    for index in range(4 * INTERVAL):
        loss = run.backward()
        with Operations() as before:
            for hook in list(optimizer._optimizer_step_pre_hooks.values()):
                hook(optimizer, (), {})
        with torch.no_grad():  # in place of the optimizer's own arithmetic, which does read its step count on a CPU
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.sub_(param.grad, alpha=group["lr"])
        with Operations() as after:
            for hook in list(optimizer._optimizer_step_post_hooks.values()):
                hook(optimizer, (), {})
        optimizer.zero_grad()
        with Operations() as recording:
            scheduler.step(loss)
        assert before.reads == after.reads == recording.reads == {}
        assert sum(recording.counts.values()) <= 3  # the loss is copied, and little else
        probing = index % INTERVAL >= INTERVAL - 2
        assert bool(before.counts) == probing
        assert bool(after.counts) == (horizon is None and (index + 1) % 8 == 0)
        if scheduler.should_validate:
            with scheduler.averaged_parameters():
                metric = 0.1
            with Operations() as deciding:
                scheduler.report(metric)
            assert deciding.reads == {}  # `cpu` brings all of it over at once: see the monitor's tests
            assert sum(deciding.counts.values()) <= 8
    assert scheduler.decision.index == 4


def test_a_whole_step_reads_no_more_than_without(domain: Domain, controller: Controller):
    counts = []
    for options in ({}, {"controller": controller, "horizon": 120, "interval": INTERVAL}):
        run = start(domain, **options)
        with Operations() as operations:
            for _ in range(INTERVAL):
                loss = run.backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
                if run.scheduler is not None:
                    run.scheduler.step(loss)
        counts.append(operations.reads)
    assert counts[0] == counts[1]


def test_rollback_reads_once_a_decision_whether_all_is_finite(domain: Domain, controller: Controller):
    run = start(domain, controller=controller, horizon=120, interval=INTERVAL, rollback=RollbackConfig())
    scheduler, optimizer = run.scheduler, run.optimizer
    assert scheduler is not None
    for _ in range(3 * INTERVAL):
        loss = run.backward()
        with Operations() as hooked:
            for hook in list(optimizer._optimizer_step_pre_hooks.values()):
                hook(optimizer, (), {})
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})
        with Operations() as recording:
            scheduler.step(loss)
        assert hooked.reads == recording.reads == {}
        if scheduler.should_validate:
            with Operations() as deciding:
                scheduler.report(0.1)
            assert deciding.reads == {"_local_scalar_dense": 1}
