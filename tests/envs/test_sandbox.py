"""Episodes of the sandbox on a tiny domain: what strikes, what the guard makes of it, and what the twin suffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from envs.recommenders import MatrixFactorization
from envs.sandbox import (
    Budget,
    Cell,
    Episode,
    Incident,
    Outcome,
    run_episode,
    run_fallback,
    run_killed,
    simulated_cells,
)
from envs.sandbox.faults import Faults, Feed
from envs.sandbox.policies import Unguarded
from metalearn.controller.controller import Controller, load_controller
from tests.controllers import acting_controller

STEPS, INTERVAL = 32, 4


@pytest.fixture(scope="module")
def cell() -> Cell:
    return simulated_cells(1, Budget(steps=STEPS, interval=INTERVAL, batch_size=64, dim=4))[0]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return load_controller(acting_controller(tmp_path_factory.mktemp("controller") / "acting.safetensors"))


def episode(*incidents: Incident, rewinds: bool = True) -> Episode:
    return Episode(index=0, incidents=incidents, seed=3, draw=0.0, rewinds=rewinds)


def both(which: Episode, cell: Cell, controller: Controller) -> tuple[Outcome, Outcome]:
    return (
        run_episode(which, cell, controller, guarded=True, others=[cell.domain.profile]),
        run_episode(which, cell, controller, guarded=False, others=[cell.domain.profile]),
    )


@pytest.mark.parametrize("name", ["nonfinite_loss", "nonfinite_gradient"])
@pytest.mark.parametrize("recurs", [True, False])
def test_what_is_not_finite_is_rolled_back_and_ruins_the_twin(
    cell: Cell, controller: Controller, name: str, recurs: bool
) -> None:
    guarded, unguarded = both(episode(Incident(name=name, variant="nan", recurs=recurs)), cell, controller)
    assert guarded.finite and not guarded.lost and guarded.metric is not None
    # In the data it comes again until the third rollback, which leaves the position where it is.
    assert (guarded.rollbacks, guarded.fallen_back) == ((3, True) if recurs else (1, False))
    assert 0 < guarded.most_lost <= guarded.allowed_loss == INTERVAL + 1
    assert not unguarded.finite


def test_memory_that_does_not_suffice_is_survived_by_one_arm_only(cell: Cell, controller: Controller) -> None:
    for variant in ("forward", "step", "batch_size"):
        guarded, unguarded = both(episode(Incident(name="out_of_memory", variant=variant)), cell, controller)
        assert guarded.rollbacks == 1 and not guarded.lost, variant
        assert unguarded.lost and "OutOfMemoryError" in (unguarded.error or ""), variant


def test_hostile_policies_leave_a_guarded_run_finite(cell: Cell, controller: Controller) -> None:
    for variant in ("random", "nan", "inf", "shape"):
        guarded, _ = both(episode(Incident(name="garbage_policy", variant=variant)), cell, controller)
        assert guarded.finite and not guarded.lost, (variant, guarded)
    for variant in ("high", "low", "alternating"):
        guarded, _ = both(episode(Incident(name="adversarial_policy", variant=variant)), cell, controller)
        assert guarded.finite and not guarded.lost, (variant, guarded)


def test_the_twin_does_what_it_is_told(cell: Cell, controller: Controller) -> None:
    nan = run_episode(episode(Incident(name="garbage_policy", variant="nan")), cell, controller, guarded=False)
    assert nan.lost and "got nan" in (nan.error or "")  # torch refuses the dropout before the weights are spoilt
    shape = run_episode(episode(Incident(name="garbage_policy", variant="shape")), cell, controller, guarded=False)
    assert shape.lost and "shapes" in (shape.error or "")


def test_the_twin_takes_a_thousandfold_learning_rate(cell: Cell, controller: Controller) -> None:
    told = episode(Incident(name="learning_rate_proposal", at=0.5, lasts=STEPS, size=1000.0))
    model = MatrixFactorization.for_domain(cell.domain, dim=4)
    optimizer = torch.optim.AdamW(model.parameter_groups())
    start = controller.start(cell.domain.profile, roles=["embedding"] * 2, horizon=STEPS, interval=INTERVAL).ask()
    twin = Unguarded(optimizer, model, cell=cell, start=start, controller=controller, episode=told)
    before = optimizer.param_groups[0]["lr"]
    assert before == pytest.approx(start.groups[0]["learning_rate"])
    twin.steps = STEPS // 2
    twin.step(torch.zeros(()))
    left = controller.config.decay_to
    halfway = 0.5 * (1.0 + left)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1000 * before * halfway)


def test_a_reckless_advisor_is_held_to_the_guards_limits(cell: Cell, controller: Controller) -> None:
    told = episode(Incident(name="learning_rate_proposal", at=0.2, lasts=STEPS, size=1000.0))
    guarded, unguarded = both(told, cell, controller)
    assert guarded.finite and not guarded.lost
    assert guarded.metric is not None and unguarded.metric is not None and guarded.metric > unguarded.metric


def test_lost_and_absurd_metrics_do_not_end_a_run(cell: Cell, controller: Controller) -> None:
    incidents = [Incident(name="lost_validation", at=0.2, lasts=STEPS)]
    incidents += [
        Incident(name="absurd_metric", at=0.2, lasts=12, variant=variant) for variant in ("nan", "inf", "-1e30", "1e30")
    ]
    for incident in incidents:
        outcome = run_episode(episode(incident), cell, controller, guarded=True)
        assert outcome.finite and not outcome.lost, (incident, outcome)


def test_the_fallback_is_the_base_whatever_the_policy(cell: Cell, controller: Controller) -> None:
    shipped = run_fallback(cell, controller, seed=5)
    assert shipped == run_fallback(cell, controller, seed=5)
    assert shipped != run_fallback(cell, controller, seed=6)


def test_drift_changes_the_rows_of_a_stage(cell: Cell) -> None:
    model = MatrixFactorization.for_domain(cell.domain, dim=4)
    feed = Feed(cell, model, 0, Incident(name="drift", variant="abrupt"))
    times = cell.domain.train.timestamp
    assert times is not None
    middle = np.median(times)
    late = {
        (int(u), int(i))
        for u, i, t in zip(cell.domain.train.user, cell.domain.train.item, times, strict=True)
        if t > middle
    }

    def share_late() -> float:
        user, item, _ = feed.next()
        pairs = list(zip(user.tolist(), item.tolist(), strict=True))
        return sum(pair in late for pair in pairs) / len(pairs)

    shares = [share_late() for _ in range(STEPS)]
    assert max(shares[: STEPS // 2]) < 0.1 and min(shares[STEPS // 2 :]) > 0.9


def test_what_recurs_follows_the_data_and_the_rest_follows_the_tries(cell: Cell) -> None:
    model = MatrixFactorization.for_domain(cell.domain, dim=4)
    for recurs in (True, False):
        struck = episode(Incident(name="loss_spike", at=0.25, size=10.0, recurs=recurs))
        feed = Feed(cell, model, 0, None)
        faults = Faults(struck, feed, STEPS)
        first, losses = feed.state_dict(), []
        for step in range(STEPS):
            if step == STEPS // 2:
                feed.load_state_dict(first)
            faults.before_batch()
            feed.next()
            losses.append(float(faults.loss(torch.ones(()))))
        spikes = [step for step, loss in enumerate(losses) if loss > 1]
        assert spikes == ([8, 24] if recurs else [8])


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["training", "report", "snapshot", "state"])
def test_a_killed_run_resumes_and_loses_an_interval_at_most(
    cell: Cell, controller: Controller, phase: str, tmp_path: Path
) -> None:
    told = episode(Incident(name="kill", variant=phase, at=0.5))
    outcome = run_killed(told, cell, controller, guarded=True, others=[], folder=tmp_path)
    assert outcome.error is None and outcome.finite and outcome.metric is not None
    assert 0 <= outcome.most_lost <= INTERVAL + 1
