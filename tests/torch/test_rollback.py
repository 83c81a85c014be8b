"""A run that is rolled back equals one that never took the bad action, to the bit; and what happens around it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.audit import read_decisions
from metalearn.torch import Constraints, RollbackConfig
from tests.torch.tracked_runs import HORIZON, INTERVAL, Loop, adamw, assert_same, momentum, spoil_weights


@pytest.mark.parametrize("reports", [True, False], ids=["reports", "none"])
@pytest.mark.parametrize("horizon", [HORIZON, None], ids=["horizon", "averaging"])
@pytest.mark.parametrize("optimizer", [adamw, momentum])
def test_it_equals_a_run_that_never_took_the_bad_action(
    domain: Domain, controller: Controller, optimizer: Any, horizon: int | None, reports: bool
):
    """The twin's session is barred, by hand, from the move that the other made after its snapshot."""
    options: dict[str, Any] = {"optimizer": optimizer, "horizon": horizon}

    def go(loop: Loop, steps: int) -> None:
        for _ in range(steps):
            loop.step()
            if reports:
                loop.report()

    bad = Loop(domain, controller, **options)
    go(bad, 3 * INTERVAL)
    for index in range(INTERVAL):
        bad.step(spoil_weights if index == 3 else lambda run: None)
        if reports:
            bad.report()
    if not reports:
        bad.step()  # the interval is judged when the next one begins
    assert bad.scheduler.rolled_back
    (record,) = bad.scheduler.rollbacks
    judged_late = not reports
    assert (record.step, record.to_step) == (4 * INTERVAL + judged_late, 3 * INTERVAL + judged_late)
    assert "not finite" in record.reason and not record.fallback
    assert [d.status for d in bad.scheduler.decisions].count("rolled back") == 1
    after_rollback = bad.contents()
    go(bad, 2 * INTERVAL)
    at_the_end = bad.contents()

    twin = Loop(domain, controller, **options)
    go(twin, 3 * INTERVAL - (1 if reports else 0))
    session, tell = twin.scheduler._run.session, twin.scheduler._run.session.tell

    def barred_first(statistics: Any, **about: Any) -> Any:
        before = session.state_dict()
        tell(statistics, **about)
        session.load_state_dict(before)
        session.bar("as if it had been tried")
        return tell(statistics, **about)

    session.tell = barred_first
    go(twin, 1)
    session.tell = tell
    assert_same(after_rollback, twin.contents())
    go(twin, 2 * INTERVAL)
    assert_same(at_the_end, twin.contents())


def test_a_second_rollback_finds_the_same_snapshot(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON)
    loop.advance(2 * INTERVAL)
    outcomes = []
    for _ in range(2):
        for _ in range(INTERVAL):
            loop.step(spoil_weights)
        loop.report()
        outcomes.append([p.detach().clone() for p in loop.run.model.parameters()])
    assert [record.to_step for record in loop.scheduler.rollbacks] == [2 * INTERVAL] * 2
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_repeated_rollbacks_end_in_the_base_schedule_and_pass_the_data_by(
    domain: Domain, controller: Controller, tmp_path: Path
):
    log = tmp_path / "log.jsonl"
    loop = Loop(domain, controller, horizon=HORIZON, decision_log=log)
    loop.advance(2 * INTERVAL)
    samplers = []
    for turn in range(4):
        for _ in range(INTERVAL):
            loop.step(spoil_weights)
        samplers.append(loop.run.sampler.state_dict())
        loop.report()
        assert loop.scheduler.rolled_back and loop.scheduler.steps == 2 * INTERVAL
        assert loop.scheduler.rollbacks[-1].fallback == (turn >= 2)
        rewound = str(loop.run.sampler.state_dict()) != str(samplers[-1])
        assert rewound == (turn < 2)  # a batch that nothing survives would come again for ever
    assert loop.scheduler.decision.status == "fallback"
    assert all(torch.isfinite(p).all() for p in loop.run.model.parameters())
    loop.advance(2 * INTERVAL)
    assert not loop.scheduler.rolled_back
    assert loop.scheduler.decision.status == "fallback"
    statuses = [record["status"] for record in read_decisions(log)]
    assert statuses.count("rolled back") == 2
    assert '"rollback"' in log.read_text(encoding="utf-8")


def test_losses_that_spike_over_two_intervals_of_the_data_are_passed_by(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON)
    loop.advance(2 * INTERVAL)
    good = loop.contents()[0]
    drawn, next_batch = 0, loop.run.sampler.next
    places: dict[str, int] = {}

    def numbered() -> Any:
        """Draw a batch, and know its number again when the position is set back."""
        nonlocal drawn
        drawn = places.setdefault(str(loop.run.sampler.state_dict()), len(places))
        return next_batch()

    loop.run.sampler.next = numbered  # type: ignore[method-assign]
    for _ in range(5 * INTERVAL):
        loss = loop.run.backward()
        spike = 1e4 if INTERVAL - 2 <= drawn < INTERVAL + 2 else 1.0
        for p in loop.run.model.parameters():
            p.grad *= spike
        loop.run.optimizer.step()
        loop.run.optimizer.zero_grad()
        loop.schedule.step()
        loop.scheduler.step(spike * loss.detach())
        if loop.scheduler.should_validate:
            loop.report()
            if loop.scheduler.rolled_back:
                assert torch.equal(loop.contents()[0], good)
    assert [record.fallback for record in loop.scheduler.rollbacks] == [False, False, True, True]
    assert loop.scheduler.steps == 3 * INTERVAL  # of five intervals one is left, in which nothing of the spike is
    assert loop.run.optimizer.state[next(loop.run.model.parameters())]["exp_avg_sq"].max() < 1.0


@pytest.mark.parametrize("where", ["loss", "validation", "throughput", "memory"])
def test_each_trigger_reaches_the_run(domain: Domain, controller: Controller, where: str):
    constraints = {
        "throughput": Constraints(min_samples_per_second=1e12),
        "memory": Constraints(max_memory_bytes=1000),
    }
    config = RollbackConfig(every=1)
    loop = Loop(domain, controller, horizon=120, rollback=config, constraints=constraints.get(where))
    for _ in range(6):
        for _ in range(INTERVAL):
            loop.step()
        loop.report(0.5)
    if where == "loss":
        for _ in range(INTERVAL):
            loop.run.backward()
            loop.run.optimizer.step()
            loop.scheduler.step(50.0)
        loop.report(0.5)
    elif where == "validation":
        for _ in range(INTERVAL):
            loop.step()
        loop.report(0.1)
    reasons = {"loss": "mean loss", "validation": "collapsed", "throughput": "samples per second", "memory": "bytes"}
    assert reasons[where] in loop.scheduler.rollbacks[0].reason
    assert loop.scheduler.rolled_back == (where in ("loss", "validation"))


def test_a_report_inside_averaged_parameters_saves_the_weights_themselves(domain: Domain, controller: Controller):
    outcomes = []
    for inside in (False, True):
        loop = Loop(domain, controller)
        for spoil in (lambda run: None, lambda run: None, spoil_weights):
            for _ in range(INTERVAL):
                loop.step(spoil)
            with loop.scheduler.averaged_parameters():
                loop.scheduler.report(0.3) if inside else None
            None if inside else loop.scheduler.report(0.3)
        assert loop.scheduler.rolled_back
        outcomes.append(loop.contents())
    assert_same(*outcomes)


def test_without_a_tracked_sampler_the_data_goes_on(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON, tracked=False)
    loop.advance(INTERVAL)
    for _ in range(INTERVAL):
        loop.step(spoil_weights)
    sampler, epochs = str(loop.run.sampler.state_dict()), loop.schedule.last_epoch
    rates = [group["lr"] for group in loop.run.optimizer.param_groups]
    loop.report()
    assert loop.scheduler.rolled_back
    assert (str(loop.run.sampler.state_dict()), loop.schedule.last_epoch) == (sampler, epochs)
    assert [group["lr"] for group in loop.run.optimizer.param_groups] == rates


def test_a_bad_first_interval_goes_back_to_the_first_step(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON)
    before = [p.detach().clone() for p in loop.run.model.parameters()]
    for _ in range(INTERVAL):
        loop.step(spoil_weights)
    loop.report()
    assert loop.scheduler.steps == 0 and loop.scheduler.decision.status == "rolled back"
    assert all(torch.equal(a, b) for a, b in zip(before, loop.run.model.parameters(), strict=True))
    loop.advance(INTERVAL)
    assert loop.scheduler.steps == INTERVAL and loop.scheduler.decision.step == INTERVAL


def test_a_loaded_state_is_what_it_goes_back_to(domain: Domain, controller: Controller):
    first = Loop(domain, controller, horizon=HORIZON)
    first.advance(INTERVAL + 2)
    second = Loop(domain, controller, horizon=HORIZON, seed=9)
    second.run.model.load_state_dict(first.run.model.state_dict())
    second.run.optimizer.load_state_dict(first.run.optimizer.state_dict())
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    for _ in range(INTERVAL - 2):
        second.step(spoil_weights)
    second.report()
    assert second.scheduler.rolled_back and second.scheduler.steps == INTERVAL + 2
    assert torch.equal(second.run.model.user.weight, first.run.model.user.weight)


def test_what_was_rolled_back_is_in_the_state(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON)
    loop.advance(INTERVAL)
    for _ in range(INTERVAL):
        loop.step(spoil_weights)
    loop.report()
    other = Loop(domain, controller, horizon=HORIZON)
    other.scheduler.load_state_dict(loop.scheduler.state_dict())
    assert other.scheduler.rollbacks == loop.scheduler.rollbacks != ()
    assert other.scheduler.decisions == loop.scheduler.decisions


def test_without_room_it_warns_and_goes_on_unprotected(domain: Domain, controller: Controller):
    loop = Loop(domain, controller, horizon=HORIZON, rollback=RollbackConfig(limit_bytes=10))
    with pytest.warns(RuntimeWarning, match="this run cannot be rolled back: snapshots need"):
        loop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(INTERVAL - 1):
            loop.step(spoil_weights)
        loop.report()
    assert not loop.scheduler.rolled_back
    assert math.isnan(loop.run.model.user.weight.detach().sum())


def test_snapshots_come_as_often_as_they_may_cost(domain: Domain, controller: Controller):
    def count(config: RollbackConfig, cost: float) -> list[int]:
        loop = Loop(domain, controller, horizon=400, rollback=config)
        recovery, saved = loop.scheduler._run.recovery, []
        assert recovery is not None
        snapshots = recovery._snapshots
        keep = snapshots.save

        def save(step: int, extra: Any) -> None:
            keep(step, extra)
            recovery._spent += cost
            saved.append(step // INTERVAL)

        snapshots.save = save  # type: ignore[method-assign]
        loop.advance(24 * INTERVAL)
        return saved

    assert count(RollbackConfig(every=4), 0.0) == [0, 4, 8, 12, 16, 20, 24]
    dear = count(RollbackConfig(), 1e3)
    assert dear[-2:] == [dear[-1] - 10, dear[-1]] and len(dear) <= 6
    assert count(RollbackConfig(), -1e3) == list(range(25))


def test_weights_are_looked_at_as_often_as_that_may_cost_and_before_each_snapshot(
    domain: Domain, controller: Controller, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    monkeypatch.setattr("metalearn.torch.recovery.perf_counter", lambda: now)

    def looks(*costs: float) -> list[int]:
        loop = Loop(domain, controller, horizon=400, rollback=RollbackConfig(every=6))
        recovery, looked = loop.scheduler._run.recovery, []
        assert recovery is not None
        snapshots = recovery._snapshots
        look = snapshots.all_finite

        def all_finite(*, copying: bool = False) -> bool:
            nonlocal now
            now += costs[min(len(looked), len(costs) - 1)]
            looked.append(loop.scheduler.steps // INTERVAL)
            assert copying == (looked[-1] % 6 == 0)
            return look(copying=copying)

        snapshots.all_finite = all_finite  # type: ignore[method-assign]
        loop.advance(13 * INTERVAL)
        return looked

    always = list(range(1, 14))
    assert looks(0.0) == looks(1.0, 1.0, 0.0) == looks(0.0, 1.0, 0.0) == always  # an interruption or two is no cost
    assert looks(1.0) == [1, 2, 3, 6, 12]
