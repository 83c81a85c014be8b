"""A collapse that comes again whatever the values: the run is taken back once, then goes on; it is not given up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envs.domains import Domain
from metalearn import Controller
from metalearn.audit import read_records
from metalearn.safety.drift.attribution import EXCUSE
from metalearn.safety.rollback import RollbackConfig
from metalearn.torch import MetaScheduler
from tests.torch.runs import Run, start

INTERVAL, HORIZON = 4, 120


def train(run: Run, validation: Callable[[MetaScheduler], float], intervals: int) -> MetaScheduler:
    """Train so many intervals, those that are taken back counted in."""
    scheduler = run.scheduler
    assert scheduler is not None
    for _ in range(intervals):
        while not scheduler.should_validate:
            run.step()
        scheduler.report(validation(scheduler))
    return scheduler


def collapse_from(step: int) -> Callable[[MetaScheduler], float]:
    return lambda scheduler: (0.1 if scheduler.steps < step else 0.02) + 0.001 * (scheduler.steps % 3)


def options(folder: Path) -> dict[str, Any]:
    log = folder / "run.log"
    return {"horizon": HORIZON, "interval": INTERVAL, "rollback": RollbackConfig(every=1), "decision_log": log}


def test_with_the_same_values_it_is_gone_back_from_once(domain: Domain, controller: Controller, tmp_path: Path):
    run = start(domain, controller=controller, steering="frozen", **options(tmp_path))
    scheduler = train(run, collapse_from(40), 20)
    assert [record.fallback for record in scheduler.rollbacks] == [False]
    assert scheduler.steps == 19 * INTERVAL
    assert scheduler.decision.status != "fallback"
    excused = [r.content for r in read_records(tmp_path / "run.log") if r.content and EXCUSE in str(r.content)]
    assert len(excused) == 1 and "validation collapsed" in str(excused[0]["reasons"])


def test_the_level_after_it_is_watched_again(domain: Domain, controller: Controller, tmp_path: Path):
    run = start(domain, controller=controller, steering="frozen", **options(tmp_path))
    train(run, collapse_from(40), 16)
    scheduler = train(run, lambda scheduler: -0.2, 3)
    assert len(scheduler.rollbacks) >= 2


def test_with_other_values_each_time_the_run_is_given_up(
    domain: Domain, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compared = []
    monkeypatch.setattr("metalearn.torch.run.same_values", lambda *both: bool(compared.append(both)))
    run = start(domain, controller=controller, **options(tmp_path))
    scheduler = train(run, collapse_from(40), 20)
    assert [record.fallback for record in scheduler.rollbacks] == [False, False, True]
    assert scheduler.decision.status == "fallback"
    # What is compared: the decision in force in the last good interval, and the one made anew.
    assert [(before.step, after.step) for before, after in compared[:2]] == [(32, 36), (32, 36)]


def test_a_loss_that_is_not_finite_is_never_excused(domain: Domain, controller: Controller, tmp_path: Path):
    run = start(domain, controller=controller, steering="frozen", **options(tmp_path))
    scheduler = train(run, collapse_from(10**6), 8)
    for _ in range(3):
        loss = run.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        scheduler.step(loss * float("nan"))
        while not scheduler.should_validate and not scheduler.rolled_back:
            run.step()
        if scheduler.should_validate:
            scheduler.report(0.02)
    assert scheduler.rollbacks and all("finite" in record.reason for record in scheduler.rollbacks)
    assert scheduler.rollbacks[-1].fallback
