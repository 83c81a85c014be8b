"""What a session does after a rollback: bars the move, shortens its steps, and in the end gives up to the base."""

from __future__ import annotations

import json

import numpy as np
import pytest

from metalearn import Controller, Session, load_controller
from metalearn.controller import CONTROLLED
from metalearn.safety import GuardConfig
from tests.controllers import acting_controller
from tests.intervals import make_profile, random_intervals

INTERVALS = random_intervals(11)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return load_controller(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors"))


def start(controller: Controller, **changes) -> Session:
    arguments = {"profile": make_profile(), "roles": ("embedding", "dense"), "horizon": 1000, "batch_size": 64}
    return controller.start(**(arguments | changes))


def units(session: Session) -> np.ndarray:
    """Return the values in force, [V] in unit ranges."""
    position = session.state_dict()["position"]
    group = np.add(position["group_start"], position["group_residual"])
    return np.concatenate([group.ravel(), np.add(position["global_start"], position["global_residual"])])


def test_the_move_since_the_snapshot_is_barred_and_the_step_halved(controller: Controller):
    session = start(controller)
    session.tell(INTERVALS[0])
    snapshot, good = json.loads(json.dumps(session.state_dict())), units(session)
    in_force = session.ask().in_force
    session.tell(INTERVALS[1])
    moved = units(session) - good
    assert np.abs(moved).max() > 0.01
    session.load_state_dict(snapshot)
    decision = session.bar("the loss was not finite")
    assert (decision.status, decision.index, decision.in_force) == ("rolled back", 2, in_force)
    assert session.ask() is decision and session.rollbacks == 1
    assert decision.reasons[0] == "rolled back: the loss was not finite"
    assert "barred for up to 5 decisions: learning_rate[0]" in decision.reasons[1]
    assert decision.reasons[2] == "largest step: 0.5 of the usual one"
    assert "rolled back: the loss was not finite" in decision.explain().sentence
    widest = np.array([controller.config.space[name].max_step for name in (*CONTROLLED[:3] * 2, CONTROLLED[3])])
    scale, before = 0.5, good
    for statistics in INTERVALS[1:6]:
        session.tell(statistics)
        now = units(session)
        assert (np.abs(now - before) <= scale * widest + 1e-9).all()
        assert ((now - before) * np.sign(moved) * (np.abs(moved) > 1e-9) <= 1e-12).all()
        scale, before = min(1.0, 1.1 * scale), now
    assert session.state_dict()["guard_state"]["bars"] == []


def test_without_a_bar_the_same_move_comes_again(controller: Controller):
    session = start(controller)
    snapshot = session.state_dict()
    bad = session.tell(INTERVALS[0])
    session.load_state_dict(snapshot)
    assert session.tell(INTERVALS[0]) == bad


def test_repeated_rollbacks_to_one_snapshot_add_up(controller: Controller):
    session = start(controller)
    snapshot = session.state_dict()
    for count, scale in ((1, 0.5), (2, 0.275), (3, 0.15125)):  # half, a decision's recovery, half of that
        session.tell(INTERVALS[count])
        session.load_state_dict(snapshot)
        session.bar("diverged")
        state = session.state_dict()["guard_state"]
        assert state["rollbacks"] == session.rollbacks == count
        assert state["step_scale"] == pytest.approx(scale)


def test_a_barred_session_resumes_to_the_bit(controller: Controller):
    session = start(controller)
    snapshot = session.state_dict()
    session.tell(INTERVALS[0])
    session.load_state_dict(snapshot)
    session.bar("diverged")
    for statistics in INTERVALS[:2]:
        session.tell(statistics)
    state = json.loads(json.dumps(session.state_dict()))
    resumed = start(controller)
    resumed.load_state_dict(state)
    assert json.dumps(resumed.state_dict()) == json.dumps(session.state_dict())
    for statistics in INTERVALS[2:]:
        assert session.tell(statistics) == resumed.tell(statistics)


def test_a_resumed_session_that_moved_nothing_has_nothing_to_bar(controller: Controller):
    session = start(controller)
    session.tell(INTERVALS[0])
    fresh = start(controller)
    fresh.load_state_dict(session.state_dict())
    decision = fresh.bar("killed")
    assert decision.reasons[1] == "no move to bar"
    assert decision.in_force == session.ask().in_force


def test_a_frozen_session_stays_frozen_through_a_rollback(controller: Controller):
    session = start(controller)
    snapshot = session.state_dict()
    session.tell(INTERVALS[0])
    session.switch("frozen")
    session.load_state_dict(snapshot)
    assert session.bar("diverged").mode == session.mode == "frozen"


@pytest.mark.parametrize("cool_down", [0, 2])
def test_how_long_a_move_is_barred_is_the_user_s(controller: Controller, cool_down: int):
    session = start(controller, guard=GuardConfig(cool_down=cool_down))
    snapshot = session.state_dict()
    session.tell(INTERVALS[0])
    session.load_state_dict(snapshot)
    session.bar("diverged")
    for left in range(cool_down, -1, -1):
        assert {bar[2] for bar in session.state_dict()["guard_state"]["bars"]} == ({left} if left else set())
        session.tell(INTERVALS[0])


def test_fall_back_is_the_base_for_good(controller: Controller):
    session = start(controller)
    snapshot = session.state_dict()
    for statistics in INTERVALS[:3]:
        session.tell(statistics)
    decision = session.fall_back("three rollbacks in a row")
    base = controller.checkpoint.base[0, 1].astype(float)
    assert (decision.status, decision.index, decision.confidence, session.confidence) == ("fallback", 4, 0.0, 0.0)
    assert decision.reasons == ("base schedule from here on: three rollbacks in a row",)
    np.testing.assert_array_equal(units(session), [*base[:3], *base[:3], base[3]])
    resumed = start(controller)
    resumed.load_state_dict(json.loads(json.dumps(session.state_dict())))
    for statistics in INTERVALS[3:]:
        after = session.tell(statistics)
        assert after == resumed.tell(statistics)
        assert (after.status, after.in_force) == ("fallback", decision.in_force)
    # An even earlier snapshot does not bring the controller back.
    session.load_state_dict(snapshot)
    assert session.bar("diverged again").in_force == decision.in_force
    assert session.tell(INTERVALS[0]).in_force == decision.in_force


def test_fall_back_of_a_run_with_its_own_values_goes_to_those(controller: Controller):
    initial = [{"learning_rate": 0.5, "weight_decay": 0.1, "beta1": 0.6}, {"learning_rate": 0.001}]
    session = start(controller, initial=initial)
    first = session.ask()
    for statistics in INTERVALS[:3]:
        session.tell(statistics)
    state = session.state_dict()
    assert session.fall_back("enough").groups == first.groups
    resumed = start(controller)
    resumed.load_state_dict(state)
    assert resumed.fall_back("enough").groups == first.groups
