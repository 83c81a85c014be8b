"""The budget: intervals as long as hand-worked costs ask for, settled once, and the same in a resumed run."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.errors import InvalidArgumentError
from metalearn.torch import RollbackConfig, budget
from metalearn.torch.budget import Budget
from tests.torch.runs import Run, start


class Clock:
    """A clock that goes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(budget, "perf_counter", made)
    return made


def run_intervals(
    it: Budget, clock: Clock, *, step: float, decision: float, hook: float = 0.0, count: int = 2, hooks: float = 0.0
) -> list[bool]:
    """Let a run take some intervals; a tenth of what a decision costs is its probe."""
    changed = []
    for _ in range(count):
        clock.now += it.interval * step
        it.probed(99.0, 0.1 * decision)
        it.end_interval()
        clock.now += 1000.0  # validation
        hooks += it.interval * hook
        changed.append(it.decided(0.9 * decision, 0.9 * decision, hooks))
    return changed


def test_it_doubles_until_the_budget_is_kept(clock: Clock):
    it = Budget(0.01, interval=10, horizon=None, given=False)
    # 1 % of 10 ms is 0.1 ms, of which hooks take 0.02: a decision of 4 ms needs 50 steps, and 80 = 10 · 2³ are enough
    assert run_intervals(it, clock, step=0.01, decision=0.004, hook=0.00002) == [False, True]
    assert it.interval == 80 and it.settled
    assert it.reason == (
        "interval lengthened from 10 to 80 steps: a decision takes 4 ms, a step 10 ms, the budget is 1.00%"
    )
    assert run_intervals(it, clock, step=0.001, decision=1.0, count=5) == [False] * 5  # it is settled


def test_what_keeps_the_budget_stays(clock: Clock):
    it = Budget(0.01, interval=50, horizon=None, given=False)
    assert run_intervals(it, clock, step=0.01, decision=0.004, hook=0.00002) == [False, False]
    assert it.settled and it.reason is None


def test_the_first_decision_of_a_process_does_not_count_if_it_is_slow(clock: Clock):
    it = Budget(0.01, interval=50, horizon=None, given=False)
    run_intervals(it, clock, step=0.01, decision=0.5, count=1)
    run_intervals(it, clock, step=0.01, decision=0.004, count=1)
    assert it.settled and it.interval == 50


@pytest.mark.parametrize(("horizon", "expected"), [(None, 80), (200, 40)])
def test_it_leaves_a_quarter_of_the_decisions_and_warns(clock: Clock, horizon: int | None, expected: int):
    it = Budget(0.01, interval=10, horizon=horizon, given=False)
    message = r"`overhead_budget` of 1.00% cannot be kept: a training step takes 100 us, of which the hooks are 20, and"
    with pytest.warns(RuntimeWarning, match=message):
        run_intervals(it, clock, step=0.0001, decision=0.001, hook=0.00002)
    assert it.interval == expected


def test_a_given_interval_stays_and_warns(clock: Clock):
    it = Budget(0.01, interval=10, horizon=None, given=True)
    with pytest.warns(RuntimeWarning, match="a decision 4000 us every 10 steps"):
        run_intervals(it, clock, step=0.01, decision=0.004)
    assert it.interval == 10


def test_by_default_a_second_in_all_does_not_count_and_nothing_warns(clock: Clock):
    short = Budget(None, interval=10, horizon=200, given=False)  # 20 decisions of 40 ms are 0.8 s
    long = Budget(None, interval=10, horizon=300, given=False)  # 30 are 1.2 s
    for it in (short, long):
        run_intervals(it, clock, step=0.0001, decision=0.04)
    assert (short.interval, long.interval) == (10, 40)


def test_its_share_is_of_what_was_trained(clock: Clock):
    it = Budget(None, interval=10, horizon=None, given=True)
    assert str(it.overhead(1.0)) == "nan"
    run_intervals(it, clock, step=0.01, decision=0.1, count=3)  # 3 · (0.1 + 0.09) s
    assert it.overhead(0.057) == pytest.approx(0.1)


def test_a_resumed_interval_is_not_measured(clock: Clock):
    it = Budget(0.01, interval=10, horizon=None, given=False)
    run_intervals(it, clock, step=0.01, decision=0.004, count=1)
    resumed = Budget(0.01, interval=10, horizon=None, given=False)
    resumed.load_state_dict(copy.deepcopy(it.state_dict()))
    assert not resumed.decided(0.004, 0.004, 0.0) and not resumed.settled  # its end was seen, its beginning not
    run_intervals(resumed, clock, step=0.01, decision=0.005, count=1)
    assert resumed.settled and resumed.interval == 40  # by 4 ms


def test_shares_that_are_none_are_refused():
    for share in (0.0, 1.0, -0.01, float("nan")):
        with pytest.raises(InvalidArgumentError, match="`overhead_budget` must be a share"):
            Budget(share, interval=10, horizon=None, given=False)


def started(domain: Domain, controller: Controller, **options: Any) -> Run:
    return start(domain, controller=controller, horizon=400, **options)


@pytest.mark.filterwarnings("ignore:.*cannot be kept:RuntimeWarning")
@pytest.mark.parametrize("cut", [41, 50, 123])
def test_a_run_resumed_after_its_interval_is_settled_decides_the_same(domain: Domain, controller: Controller, cut: int):
    options = {"overhead_budget": 1e-6, "rollback": RollbackConfig(every=1)}
    whole = started(domain, controller, **options)
    whole.advance(cut)
    assert whole.scheduler is not None
    parts = [whole.scheduler, whole.model, whole.optimizer, whole.sampler]
    state = copy.deepcopy([part.state_dict() for part in parts])
    random_state = torch.get_rng_state()
    whole.advance(250 - cut)
    # 20 a decision, and after two of them 80
    assert [decision.step for decision in whole.scheduler.decisions] == [0, 20, 40, 120, 200]
    assert whole.scheduler.interval == 80 and whole.scheduler.interval_reason is not None
    assert 0.0 < whole.scheduler.overhead < 1.0

    resumed = started(domain, controller, **options)
    parts = [resumed.scheduler, resumed.model, resumed.optimizer, resumed.sampler]
    for part, saved in zip(parts, state, strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(random_state)
    resumed.advance(250 - cut)
    assert resumed.scheduler is not None
    assert resumed.scheduler.decisions == whole.scheduler.decisions
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_by_default_a_short_run_is_not_touched(domain: Domain, controller: Controller):
    run = started(domain, controller)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.advance(100)
    assert run.scheduler is not None
    assert [decision.step for decision in run.scheduler.decisions] == [0, 20, 40, 60, 80, 100]
    assert run.scheduler.interval_reason is None
