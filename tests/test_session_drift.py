"""What a session does about drift: how far it goes, what it asks for, and that no response leaves the guard."""

from __future__ import annotations

import json

import numpy as np
import pytest

from metalearn import Controller, Decision, Session, load_controller
from metalearn.controller import CONTROLLED
from metalearn.errors import InvalidArgumentError
from metalearn.safety import GuardConfig
from metalearn.safety.drift import DriftReport, Loosening
from tests.controllers import acting_controller
from tests.intervals import make_profile, random_intervals

INTERVALS = random_intervals(11, count=60)
NAMES = (*CONTROLLED[:3] * 2, CONTROLLED[3])
NOW = make_profile(2, size=14.0)
"""The domain as it is after the drift."""
FELL = {"stream": "ndcg", "direction": "down", "harmful": True, "sentence": "ndcg: down"}
WATCH = DriftReport(degree="watch", **FELL)
SLOW = DriftReport(degree="drift", kind="gradual", **FELL)
ABRUPT = DriftReport(degree="drift", kind="abrupt", **FELL)
SEVERE = DriftReport(degree="severe", kind="abrupt", **FELL)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return load_controller(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors"))


@pytest.fixture(scope="module")
def max_step(controller: Controller) -> np.ndarray:
    return np.array([controller.config.space[name].max_step for name in NAMES])


class Quiet:
    """A network whose policy never moves anything."""

    def __init__(self, network) -> None:
        self._network = network

    def __getattr__(self, name):
        return getattr(self._network, name)

    def act(self, hidden, group, run, context):
        return np.zeros((len(hidden), 3)), np.zeros(1), hidden


@pytest.fixture(scope="module")
def quiet(controller: Controller) -> Controller:
    made = Controller(controller.checkpoint)
    made.network = Quiet(controller.network)  # type: ignore[assignment]
    return made


def start(controller: Controller, **changes) -> Session:
    arguments = {"profile": make_profile(), "roles": ("embedding", "dense"), "horizon": 5000, "batch_size": 64}
    return controller.start(**(arguments | changes))


def saved(session: Session) -> dict:
    return json.loads(json.dumps(session.state_dict()))


def parts(session: Session) -> tuple[np.ndarray, np.ndarray]:
    """Return start and residuals, each [V] in unit ranges."""
    position = session.state_dict()["position"]
    return tuple(
        np.concatenate([np.ravel(position[f"group_{part}"]), position[f"global_{part}"]])
        for part in ("start", "residual")
    )


def units(session: Session) -> np.ndarray:
    return np.add(*parts(session))


def in_force(decision: Decision) -> tuple:
    return decision.groups, decision.run


@pytest.mark.parametrize(
    ("report", "profile", "response", "told"),
    [
        (WATCH, None, "re_profile", "asks for a profile of the data as it is now"),
        (WATCH, NOW, "re_profile", "goes by the profile of the data as it is now, at confidence"),
        (SLOW, None, "loosen", "loosened: largest step and trust region 1.5 times as wide for 5 decisions"),
        (SLOW, NOW, "loosen", "loosened"),
        (ABRUPT, None, "loosen", "no start is proposed anew without a profile"),
        (ABRUPT, NOW, "re_propose", "start proposed anew, on the way there for"),
        (SEVERE, None, "loosen", "not rolled back, since rollback is off"),
        (SEVERE, NOW, "re_propose", "not rolled back, since rollback is off"),
    ],
)
def test_the_response_is_of_its_degree_and_moves_nothing_at_once(
    controller: Controller, report: DriftReport, profile, response: str, told: str
):
    session = start(controller)
    before = session.tell(INTERVALS[0])
    decision = session.adapt(report, profile, step=77)
    assert session.ask() is decision
    assert (decision.response, decision.status, decision.index, decision.step) == (response, "applied", 2, 77)
    assert in_force(decision) == in_force(before)
    assert decision.reasons[0] == "drift: ndcg: down"
    assert any(told in reason for reason in decision.reasons)
    assert told in decision.explain().sentence
    assert Decision.from_dict(json.loads(json.dumps(decision.as_dict()))).response == response
    # Only what was done is done: the next decision differs exactly where the response lets it.
    twin = start(controller)
    twin.tell(INTERVALS[0])
    after, undrifted = session.tell(INTERVALS[1]), twin.tell(INTERVALS[1])
    assert (in_force(after) == in_force(undrifted)) == (response == "re_profile" and profile is None)


def test_the_caller_is_told_to_roll_back(controller: Controller):
    session = start(controller)
    before = saved(session)
    decision = session.adapt(SEVERE, NOW, no_way_back=None)
    assert (decision.response, decision.reasons[1]) == ("roll_back", "goes back to the last good snapshot")
    assert {**saved(session), "decision": None} == {**before, "decision": None}


@pytest.mark.parametrize(
    "report",
    [
        DriftReport(),
        DriftReport(degree="watch", kind="seasonal"),
        DriftReport(degree="severe", kind="abrupt", direction="up", new=True),
    ],
)
def test_seasons_and_gains_get_no_response(controller: Controller, report: DriftReport):
    session = start(controller)
    before, decision = saved(session), session.ask()
    assert session.adapt(report, NOW) is decision
    assert saved(session) == before


def test_a_loosened_policy_goes_further_for_a_while_and_comes_back(controller: Controller, max_step: np.ndarray):
    session, twin = start(controller), start(controller)
    loosening = Loosening(decisions=4, factor=2.0)
    session.adapt(SLOW, loosening=loosening)
    frame = session._frame
    assert frame.deviation is not None
    leads = [2.0] * 5 + [max(1.0, 2.0 / 1.1**count) for count in range(1, 56)]
    beyond, before = 0.0, units(session)
    for index, statistics in enumerate(INTERVALS):
        now = session.state_dict()["guard_state"]["lead"]
        assert now == pytest.approx(leads[index])
        session.tell(statistics)
        where, lead = units(session), leads[index]
        if index == 0:
            # The same signals and the same policy: twice its move, wherever no bound is met.
            origin = units(twin)
            twin.tell(statistics)
            assert where - before == pytest.approx(2.0 * (units(twin) - origin))
        assert (np.abs(where - before) <= lead * max_step + 1e-9).all()
        shift = parts(session)[1]
        assert (frame.low * lead - 1e-9 <= shift).all() and (shift <= frame.high * lead + 1e-9).all()
        assert (frame.deviation.low - 1e-9 <= where).all() and (where <= frame.deviation.high + 1e-9).all()
        assert ((where >= -1e-9) & (where <= 1 + 1e-9)).all()
        beyond = max(beyond, float((shift / np.where(shift < 0, frame.low, frame.high)).max()))
        before = where
    assert beyond > 1.05  # it did leave the usual trust region
    assert session.state_dict()["guard_state"]["lead"] == 1.0


def test_a_lead_is_neither_multiplied_nor_made_of_no_confidence(controller: Controller):
    session = start(controller)
    session.adapt(SLOW)
    session.tell(INTERVALS[0])
    session.adapt(SLOW, loosening=Loosening(factor=1.2, decisions=2))
    assert session.state_dict()["guard_state"] | {"bars": []} == {
        "bars": [],
        "step_scale": 1.0,
        "rollbacks": 0,
        "lead": 1.5,
        "lead_for": 4,
    }
    far = start(controller, profile=make_profile(size=1e6))
    assert far.confidence == 0.0
    decision = far.adapt(SLOW)
    assert (decision.response, decision.status) == (None, "fallback")
    assert "nothing to loosen" in decision.reasons[1]
    assert far.adapt(ABRUPT).response == "re_profile"  # in range or not, the data as it is now will show


def test_a_start_proposed_anew_is_that_of_a_fresh_session(quiet: Controller, max_step: np.ndarray):
    fresh = start(quiet, profile=NOW)
    session = start(quiet)
    session.adapt(ABRUPT, NOW)
    assert session.confidence == fresh.confidence
    distance = np.abs(units(fresh) - units(session))
    count = int(np.ceil((distance / max_step).max() - 1e-9))
    assert count > 1
    before = units(session)
    for left in reversed(range(count)):
        decision = session.tell(INTERVALS[left])
        assert any("on the way to the start proposed anew" in r for r in decision.reasons)
        assert (np.abs(units(session) - before) <= max_step + 1e-12).all()
        before = units(session)
    assert in_force(decision) == in_force(fresh.ask())
    np.testing.assert_array_equal(parts(session)[0], parts(fresh)[0])
    assert not any("on the way" in reason for reason in session.tell(INTERVALS[0]).reasons)
    assert in_force(session.ask()) == in_force(fresh.ask())


def test_the_policy_acts_on_the_way_and_around_the_new_start(controller: Controller, max_step: np.ndarray):
    session, fresh = start(controller), start(controller, profile=NOW)
    for statistics in INTERVALS[:6]:
        session.tell(statistics)
    session.adapt(ABRUPT, NOW)
    target, before = parts(fresh)[0], units(session)
    frame = fresh._frame
    arrived = 0
    for statistics in INTERVALS[6:30]:
        session.tell(statistics)
        where, (begin, shift) = units(session), parts(session)
        assert (np.abs(where - before) <= max_step + 1e-9).all()
        assert (frame.low - 1e-9 <= shift).all() and (shift <= frame.high + 1e-9).all()
        arrived += bool(np.array_equal(begin, target))
        before = where
    assert arrived > 10
    assert not np.array_equal(units(session), target)


def test_the_way_is_a_share_of_the_explanation(controller: Controller):
    session = start(controller)
    session.tell(INTERVALS[0])
    session.adapt(ABRUPT, NOW)
    before = units(session)
    decision = session.tell(INTERVALS[1])
    moved, begun = units(session) - before, parts(session)[0] - before
    free = session._setting.free
    for one, action, way in zip(decision.explain().attributions, moved[free], begun[free], strict=True):
        assert one.action == pytest.approx(action)
        assert sum(one.contributions.values()) == pytest.approx(action)
        assert one.contributions["new start"] == pytest.approx(way)


def test_out_of_range_the_run_goes_to_its_base(controller: Controller):
    session = start(controller)
    for statistics in INTERVALS[:3]:
        session.tell(statistics)
    decision = session.adapt(WATCH, make_profile(size=1e6))
    assert (decision.response, decision.status, session.confidence) == ("re_propose", "fallback", 0.0)
    for statistics in INTERVALS[3:20]:
        decision = session.tell(statistics)
    base = controller.checkpoint.base[0, 1].astype(float)
    np.testing.assert_array_equal(units(session), [*base[:3], *base[:3], base[3]])
    assert decision.status == "fallback"


def test_a_profile_alone_keeps_the_start(controller: Controller):
    session = start(controller)
    begun = parts(session)[0]
    session.adapt(WATCH, NOW)
    assert session.confidence == start(controller, profile=NOW).confidence
    for statistics in INTERVALS[:5]:
        session.tell(statistics)
    np.testing.assert_array_equal(parts(session)[0], begun)
    np.testing.assert_array_equal(session._setting.descriptors, start(controller, profile=NOW)._setting.descriptors)


def test_own_values_stay_the_start(controller: Controller):
    initial = [{"learning_rate": 0.5, "weight_decay": 0.1, "beta1": 0.6}, {"learning_rate": 0.001}]
    session = start(controller, initial=initial)
    state = saved(session)
    resumed = start(controller)
    resumed.load_state_dict(state)
    fresh = start(controller, initial=initial, profile=NOW)
    for one in (session, resumed):
        for statistics in INTERVALS[:4]:
            one.tell(statistics)
        one.adapt(ABRUPT, NOW)
        for statistics in INTERVALS[4:30]:
            one.tell(statistics)
        np.testing.assert_array_equal(parts(one)[0], parts(fresh)[0])


def test_what_may_not_be_moved_is_not(controller: Controller):
    space = controller.config.space.subset(["learning_rate", "weight_decay"])
    changes = {"space": space, "withheld": [["weight_decay"], []]}
    session = start(controller, **changes)
    before = units(session)
    session.adapt(ABRUPT, NOW)
    for statistics in INTERVALS[:20]:
        assert not any("not to be moved" in reason for reason in session.tell(statistics).reasons)
    free = session._setting.free
    np.testing.assert_array_equal(units(session)[~free], before[~free])
    np.testing.assert_array_equal(parts(session)[0][free], parts(start(controller, profile=NOW, **changes))[0][free])


def test_the_user_s_limits_hold_for_a_new_start(controller: Controller):
    rate = start(controller, profile=NOW).ask().groups[0]["learning_rate"]
    guard = GuardConfig(caps={"learning_rate": (1e-5, 0.5 * rate)}, deviation={"beta1": 0.01})
    session, fresh = start(controller, guard=guard), start(controller, guard=guard, profile=NOW)
    session.adapt(ABRUPT, NOW)
    for statistics in INTERVALS[:20]:
        assert session.tell(statistics).groups[0]["learning_rate"] <= 0.5 * rate * (1 + 1e-9)
    np.testing.assert_array_equal(parts(session)[0], parts(fresh)[0])


def test_a_nonfinite_interval_holds_on_the_way(controller: Controller):
    session = start(controller)
    session.adapt(ABRUPT, NOW)
    session.tell(INTERVALS[0])
    before = units(session)
    assert session.tell(INTERVALS[1]._replace(nonfinite=np.float64(2))).status == "held"
    np.testing.assert_array_equal(units(session), before)


@pytest.mark.parametrize("cut", [0, 1, 3, 9])
@pytest.mark.parametrize("horizon", [None, 5000])
def test_a_resumed_session_responds_the_same_to_the_bit(controller: Controller, cut: int, horizon: int | None):
    session = start(controller, horizon=horizon)
    session.tell(INTERVALS[0])
    session.adapt(SLOW)
    session.adapt(ABRUPT, NOW)
    for statistics in INTERVALS[1 : 1 + cut]:
        session.tell(statistics)
    resumed = start(controller, horizon=horizon)
    resumed.adapt(ABRUPT, make_profile(3))  # whatever it did before is forgotten
    resumed.load_state_dict(saved(session))
    assert saved(resumed) == saved(session)
    for statistics in INTERVALS[1 + cut : 24]:
        assert resumed.tell(statistics) == session.tell(statistics)
    for one in (session, resumed):
        one.adapt(WATCH, make_profile(5))
    assert resumed.tell(INTERVALS[24]) == session.tell(INTERVALS[24])
    assert saved(resumed) == saved(session)


def test_a_state_of_before_is_read(controller: Controller):
    session = start(controller)
    session.tell(INTERVALS[0])
    state = saved(session)
    old = {name: value for name, value in state.items() if name not in ("initial", "given_up", "renewal")}
    old["guard_state"] = {name: state["guard_state"][name] for name in ("bars", "step_scale", "rollbacks")}
    resumed = start(controller)
    resumed.load_state_dict(old)
    assert saved(resumed) == state


def test_a_rollback_does_not_undo_what_is_known_of_the_data(controller: Controller, max_step: np.ndarray):
    session, fresh = start(controller), start(controller, profile=NOW)
    for statistics in INTERVALS[:3]:
        session.tell(statistics)
    snapshot, there = saved(session), units(session)
    session.adapt(SLOW, loosening=Loosening(decisions=9))
    session.adapt(ABRUPT, NOW)
    for statistics in INTERVALS[3:5]:
        session.tell(statistics)
    session.load_state_dict(snapshot)
    decision = session.bar("diverged")
    assert decision.status == "rolled back"
    np.testing.assert_array_equal(units(session), there)
    state = session.state_dict()["guard_state"]
    assert (state["lead"], state["lead_for"], state["step_scale"]) == (1.5, 7, 0.5)
    assert session.confidence == fresh.confidence
    barred = {(bar[0], bar[1]) for bar in state["bars"]}
    assert barred
    before = units(session)
    session.tell(INTERVALS[3])
    for value, direction in barred:
        assert (parts(session)[0][value] - before[value]) * direction <= 1e-12
    for statistics in INTERVALS[4:40]:
        session.tell(statistics)
    np.testing.assert_array_equal(parts(session)[0], parts(fresh)[0])


def test_a_run_that_was_given_up_stays_so(controller: Controller):
    session = start(controller)
    session.tell(INTERVALS[0])
    base = session.fall_back("three rollbacks in a row")
    resumed = start(controller)
    resumed.load_state_dict(saved(session))
    for one in (session, resumed):
        for report in (WATCH, SLOW, ABRUPT):
            decision = one.adapt(report, NOW)
            assert (decision.response, decision.status) == (None, "fallback")
            assert "given up to the base schedule" in decision.reasons[1]
        assert in_force(one.tell(INTERVALS[1])) == in_force(base)


def test_a_fallback_on_the_way_ends_the_journey(controller: Controller):
    session = start(controller)
    session.adapt(ABRUPT, NOW)
    session.tell(INTERVALS[0])
    base = session.fall_back("enough")
    for statistics in INTERVALS[1:4]:
        assert in_force(session.tell(statistics)) == in_force(base)


def test_frozen_holds(controller: Controller):
    session = start(controller, mode="frozen")
    before = saved(session)
    for report in (WATCH, SLOW, ABRUPT, SEVERE):
        decision = session.adapt(report, NOW, no_way_back=None)
        assert (decision.status, decision.response) == ("held", None)
        assert decision.reasons[-1] == "held: the session is frozen"
    assert {**saved(session), "decision": None} == {**before, "decision": None}


def test_a_shadow_says_what_it_would_do(controller: Controller):
    shadow, control = start(controller, mode="shadow"), start(controller)
    for session in (shadow, control):
        session.adapt(ABRUPT, NOW)
    assert in_force(shadow.ask()) == (({}, {}), {})
    assert (shadow.ask().response, shadow.ask().reasons[0]) == ("re_propose", "shadow: nothing of it is in force")
    for statistics in INTERVALS[:3]:
        decision = shadow.tell(statistics)
        assert in_force(decision) == (({}, {}), {})
        assert decision.proposed is not None
    own = [{"learning_rate": 0.003, "weight_decay": 0.02, "beta1": 0.9}] * 2
    decision = shadow.switch("control", initial=own)
    assert decision.groups[0] == pytest.approx(own[0])
    for statistics in INTERVALS[3:6]:  # it goes on from what is in force, not to a start for the shadow
        assert not any("on the way" in reason for reason in shadow.tell(statistics).reasons)


def test_an_advisor_is_asked_before_anything_changes(controller: Controller):
    asked: list[Decision] = []
    answers: list[object] = [False, True, False]

    def advise(decision: Decision) -> object:
        asked.append(decision)
        return answers[len(asked) - 1]

    session = start(controller, mode="advise", advisor=advise)
    before = saved(session)
    refused = session.adapt(ABRUPT, NOW)
    assert (refused.status, refused.advice, refused.response) == ("rejected", "rejected", None)
    assert {**saved(session), "decision": None} == {**before, "decision": None}
    assert session.adapt(WATCH).response == "re_profile"  # to ask for a profile changes nothing
    assert len(asked) == 1 and asked[0].response == "re_propose"
    accepted = session.adapt(ABRUPT, NOW)
    assert (accepted.response, accepted.reasons[-1]) == ("re_propose", "accepted by the advisor")
    held = units(session)
    assert session.tell(INTERVALS[0]).status == "rejected"  # each step of the way is asked about too
    np.testing.assert_array_equal(units(session), held)
    answers += [None]
    state = saved(session)
    with pytest.raises(InvalidArgumentError, match="`advisor` must return True, False"):
        session.adapt(SLOW)
    assert saved(session) == state


def test_dry_runs_on_the_way_change_nothing(controller: Controller, capsys: pytest.CaptureFixture[str]):
    session = start(controller)
    session.adapt(ABRUPT, NOW)
    before = saved(session)
    expected = session.dry_run(INTERVALS[0])
    assert saved(session) == before
    assert session.tell(INTERVALS[0]) == expected
    assert "on the way to the start proposed anew" in capsys.readouterr().out
