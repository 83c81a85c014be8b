"""A run killed at any moment and resumed from files decides the same, and trains the same, to the bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.audit import read_decisions
from metalearn.errors import SessionError
from tests.torch.runs import Run, start

STEPS, INTERVAL = 20, 6
OPTIONS = {
    "known horizon": {"horizon": STEPS, "interval": INTERVAL},
    "unknown horizon": {"interval": INTERVAL},
    "probes only": {"interval": 2},
}


def save(run: Run, other: Any) -> bytes:
    """Write a checkpoint as a training script would."""
    assert run.scheduler is not None
    buffer = io.BytesIO()
    parts = {"model": run.model, "optimizer": run.optimizer, "sampler": run.sampler, "scheduler": run.scheduler}
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**states, "other": other.state_dict(), "random": torch.get_rng_state()}, buffer)
    return buffer.getvalue()


def load(content: bytes, run: Run, other: Any) -> None:
    """Read a checkpoint; nothing in it is executed."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    assert run.scheduler is not None
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.sampler.load_state_dict(state["sampler"])
    run.scheduler.load_state_dict(state["scheduler"])
    other.load_state_dict(state["other"])
    torch.set_rng_state(state["random"])


def decay(run: Run) -> Any:
    return torch.optim.lr_scheduler.StepLR(run.optimizer, 5, gamma=0.7)


def advance(run: Run, other: Any, first: int, last: int) -> None:
    """Go from one event to another: even events take a step, odd ones report if it is time."""
    for event in range(first, last):
        if event % 2 == 0:
            run.step()
            other.step()
        elif (event // 2) % 7:  # some intervals get no report, so that decisions are made inside `step` as well
            run.report()


def outcome(run: Run) -> list[Any]:
    assert run.scheduler is not None
    with run.scheduler.averaged_parameters():
        averaged = [p.detach().clone() for p in run.model.parameters()]
    return [*(p.detach().clone() for p in run.model.parameters()), *averaged]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_killed_anywhere_and_resumed(domain: Domain, controller: Controller, options: dict[str, int]):
    whole = start(domain, controller=controller, **options)
    schedule = decay(whole)
    checkpoints = []
    for event in range(2 * STEPS):
        checkpoints.append(save(whole, schedule))
        advance(whole, schedule, event, event + 1)
    assert whole.scheduler is not None
    expected = outcome(whole)
    for event, content in enumerate(checkpoints):
        resumed = start(domain, controller=controller, seed=99, **options)
        schedule = decay(resumed)
        load(content, resumed, schedule)
        advance(resumed, schedule, event, 2 * STEPS)
        assert resumed.scheduler is not None
        assert resumed.scheduler.decisions == whole.scheduler.decisions, event
        assert resumed.losses == whole.losses[(event + 1) // 2 :], event
        assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
        assert all(torch.equal(mine, other) for mine, other in zip(outcome(resumed), expected, strict=True)), event


def test_a_scheduler_made_after_the_optimizer_was_loaded_goes_on_alike(domain: Domain, controller: Controller):
    whole = start(domain, controller=controller, **OPTIONS["known horizon"])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(whole.optimizer, patience=0)
    whole.advance(8)
    plateau.step(1.0)
    plateau.step(2.0)  # worse: a tenth of the rate from here on, and no `initial_lr` says so
    content = save(whole, plateau)
    whole.advance(STEPS - 8)

    def loaded(model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameter_groups())
        optimizer.load_state_dict(torch.load(io.BytesIO(content), weights_only=True)["optimizer"])
        return optimizer

    resumed = start(domain, controller=controller, optimizer=loaded, seed=99, **OPTIONS["known horizon"])
    load(content, resumed, torch.optim.lr_scheduler.ReduceLROnPlateau(resumed.optimizer, patience=0))
    resumed.advance(STEPS - 8)
    assert resumed.scheduler is not None and whole.scheduler is not None
    assert resumed.scheduler.decisions == whole.scheduler.decisions
    assert torch.equal(resumed.model.user.weight, whole.model.user.weight)


@pytest.mark.parametrize("options", [OPTIONS["known horizon"], OPTIONS["unknown horizon"]])
def test_a_state_is_shared_with_nobody(domain: Domain, controller: Controller, options: dict[str, int]):
    """Roll back twice to one snapshot in memory, going on between: both times the same follows."""
    run = start(domain, controller=controller, **options)
    schedule = decay(run)
    run.advance(2 * INTERVAL - 1)  # between the two steps of a probe
    content = save(run, schedule)
    assert run.scheduler is not None
    snapshot = run.scheduler.state_dict()
    outcomes = []
    for _ in range(3):
        load(content, run, schedule)
        run.scheduler.load_state_dict(snapshot)
        run.advance(INTERVAL)
        outcomes.append((outcome(run), run.scheduler.decisions))
    for tensors, decisions in outcomes[1:]:
        assert decisions == outcomes[0][1]
        assert all(torch.equal(mine, other) for mine, other in zip(tensors, outcomes[0][0], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 2 * STEPS}, "horizon=20, this session 40"),
        ({"horizon": None}, "horizon=20, this session None"),
        ({"interval": 5}, "interval=6, this session 5"),
        ({"family": "two_tower"}, "family=None, this session 'two_tower'"),
        ({"optimizer": lambda model: torch.optim.AdamW(model.parameters())}, "num_groups=2, this session 1"),
    ],
)
def test_a_state_of_another_run_is_refused(
    domain: Domain, controller: Controller, changes: dict[str, Any], message: str
):
    run = start(domain, controller=controller, horizon=STEPS, interval=INTERVAL)
    run.advance(3)
    assert run.scheduler is not None
    other = start(domain, controller=controller, **{"horizon": STEPS, "interval": INTERVAL, **changes})
    assert other.scheduler is not None
    with pytest.raises(SessionError, match=message):
        other.scheduler.load_state_dict(run.scheduler.state_dict())


def test_a_resumed_run_logs_every_decision_once(domain: Domain, controller: Controller, tmp_path: Path):
    log = tmp_path / "decisions.jsonl"
    first = start(domain, controller=controller, horizon=60, interval=10, decision_log=log)
    for _ in range(25):
        first.backward()
        first.optimizer.step()
        first.optimizer.zero_grad()
        first.scheduler.step(0.5)
    state = first.scheduler.state_dict()
    second = start(domain, controller=controller, horizon=60, interval=10, decision_log=log)
    second.scheduler.load_state_dict(state)
    for _ in range(20):
        second.backward()
        second.optimizer.step()
        second.optimizer.zero_grad()
        second.scheduler.step(0.5)
    assert [record["index"] for record in read_decisions(log)] == [0, 1, 2, 3, 4]
