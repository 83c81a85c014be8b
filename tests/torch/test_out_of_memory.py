"""A step that runs out of memory goes back to the last snapshot, and the run goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.torch import RollbackConfig
from tests.torch.tracked_runs import HORIZON, INTERVAL, Loop


def test_running_out_of_memory_is_survived_a_few_times(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON)
    loop.advance(2 * INTERVAL + 2)
    own = [group["betas"] for group in loop.run.optimizer.param_groups]

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = loop.run.optimizer.register_step_pre_hook(run_out)  # after the values in force have been set
    for _ in range(2 * 3):
        with loop.scheduler.survive_out_of_memory():
            loop.step()
        assert loop.scheduler.rolled_back
        assert loop.scheduler.steps == 2 * INTERVAL
        assert loop.scheduler.rollbacks[-1].reason.startswith("out of memory: CUDA out of memory")
        assert all(p.grad is None for p in loop.run.model.parameters())
        assert [group["betas"] for group in loop.run.optimizer.param_groups] == own
    with pytest.raises(torch.OutOfMemoryError), loop.scheduler.survive_out_of_memory():
        loop.step()
    hook.remove()
    with loop.scheduler.survive_out_of_memory():
        loop.step()
    assert not loop.scheduler.rolled_back and loop.scheduler.steps == 2 * INTERVAL + 1
    with pytest.raises(ZeroDivisionError), loop.scheduler.survive_out_of_memory():
        raise ZeroDivisionError


def test_running_out_of_memory_after_the_fallback_is_survived_too(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON, rollback=RollbackConfig(every=1, max_rollbacks=1))
    loop.advance(2 * INTERVAL + 2)
    with loop.scheduler.survive_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert loop.scheduler.rollbacks[-1].fallback
    with loop.scheduler.survive_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert loop.scheduler.rolled_back
    with pytest.raises(torch.OutOfMemoryError), loop.scheduler.survive_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")  # without a good interval in between
    loop.advance(3 * INTERVAL)
    with loop.scheduler.survive_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert loop.scheduler.rolled_back and len(loop.scheduler.rollbacks) == 3


def test_after_the_fallback_a_batch_size_that_does_not_fit_is_taken_back_and_a_batch_that_does_not_is_passed_by(
    domain: Domain, controller: Controller
):
    def exhaust(raising: int) -> list[bool]:
        """Run out of memory so many times, and return whether the position in the data was taken back each time."""
        rewound = []
        for _ in range(raising):
            loop.step()
            before = str(loop.run.sampler.state_dict())
            with loop.scheduler.survive_out_of_memory():
                raise torch.OutOfMemoryError("CUDA out of memory")
            rewound.append(str(loop.run.sampler.state_dict()) != before)
        return rewound

    loop = Loop(domain, controller, horizon=HORIZON)
    loop.advance(2 * INTERVAL + 1)
    assert exhaust(4) == [True, True, False, False] and loop.scheduler.rollbacks[-1].fallback
    loop.advance(INTERVAL + 1)  # with a new snapshot
    assert exhaust(3) == [True, False, False]
