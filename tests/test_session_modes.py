"""Modes of a session: what is in force, what is only proposed, what an advisor may do, and limits of the user."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn import Controller, Decision, Session, load_controller
from metalearn.controller.outcome import PREFIX, OutcomeConfig, input_names
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.safety import Acceptance, GuardConfig
from metalearn.signals import GROUP_STATISTICS
from tests.controllers import acting_controller
from tests.intervals import make_interval, make_profile, random_intervals

INTERVALS = random_intervals(11)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    """Return one whose rates go up and down."""
    return load_controller(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors", seed=1))


def start(controller: Controller, **changes) -> Session:
    arguments = {"profile": make_profile(), "roles": ("embedding", "dense"), "horizon": 1000, "batch_size": 64}
    return controller.start(**(arguments | changes))


def in_force(decision: Decision) -> tuple:
    return decision.groups, decision.run


def test_shadow_changes_nothing_and_says_what_it_would_do(controller: Controller):
    shadow, control = start(controller, mode="shadow"), start(controller)
    decisions = [shadow.ask(), *(shadow.tell(statistics) for statistics in INTERVALS)]
    assert all(in_force(decision) == (({}, {}), {}) for decision in decisions)
    assert all(decision.mode == "shadow" and decision.proposed is not None for decision in decisions)
    assert decisions[0].proposed == control.ask().in_force
    assert len({decision.proposed.groups[0]["learning_rate"] for decision in decisions}) > 3
    assert decisions[3].reasons[0] == "shadow: nothing of it is in force"
    assert any("learning_rate of group 0: " in reason for reason in decisions[3].reasons)
    assert Decision.from_dict(json.loads(json.dumps(decisions[3].as_dict()))) == Decision.from_dict(
        decisions[3].as_dict()
    )


def test_leaving_shadow_mode_goes_on_from_the_values_in_force(controller: Controller):
    session = start(controller, mode="shadow")
    for statistics in INTERVALS[:3]:
        session.tell(statistics)
    before = json.dumps(session.state_dict())
    with pytest.raises(SessionError, match="does not know what is in force; pass `initial`, the values of each of 2"):
        session.switch("control")
    assert json.dumps(session.state_dict()) == before
    own = [{"learning_rate": 0.003, "weight_decay": 0.02, "beta1": 0.9}] * 2
    decision = session.switch("control", initial=own)
    assert decision.index == 4 and decision.reasons == ("mode: control, after shadow",)
    assert decision.groups[1] == pytest.approx(own[1])
    after = session.tell(INTERVALS[3])
    step = controller.config.space["learning_rate"]
    for old, new in zip(decision.groups, after.groups, strict=True):
        moved = abs(step.encode(new["learning_rate"]) - step.encode(old["learning_rate"]))
        assert 0 < moved <= step.max_step + 1e-9


def test_frozen_values_stay_to_the_bit_and_thaw(controller: Controller):
    session = start(controller)
    for statistics in INTERVALS[:4]:
        session.tell(statistics)
    held, position = in_force(session.ask()), session.state_dict()["position"]
    session.switch("frozen")
    for statistics in INTERVALS[4:8]:
        decision = session.tell(statistics)
        assert (decision.status, decision.mode, in_force(decision)) == ("held", "frozen", held)
        assert decision.reasons[0] == "held: the session is frozen"
        assert decision.proposed is not None and decision.proposed != decision.in_force
        assert session.state_dict()["position"] == position
    resumed = start(controller)
    resumed.load_state_dict(json.loads(json.dumps(session.state_dict())))
    assert resumed.mode == "frozen"
    for one in (session, resumed):
        assert one.switch("control").mode == "control"
    assert session.tell(INTERVALS[8]) == resumed.tell(INTERVALS[8])
    assert in_force(session.ask()) != held


def test_an_advisor_that_agrees_changes_nothing(controller: Controller):
    asked = []

    def agree(decision: Decision) -> bool:
        asked.append(decision)
        return True

    session, control = start(controller, mode="advise", advisor=agree), start(controller)
    for statistics in INTERVALS:
        advised, decided = session.tell(statistics), control.tell(statistics)
        assert in_force(advised) == in_force(decided)
        assert advised.advice == ("accepted" if "accepted by the advisor" in advised.reasons else None)
    assert len(asked) == len(INTERVALS)
    assert [decision.index for decision in asked] == list(range(1, len(INTERVALS) + 1))


def test_an_advisor_that_refuses_keeps_the_values(controller: Controller):
    session = start(controller, mode="advise", advisor=lambda decision: False)
    held, position = in_force(session.ask()), session.state_dict()["position"]
    for statistics in INTERVALS[:3]:
        decision = session.tell(statistics)
        assert (decision.status, decision.advice, in_force(decision)) == ("rejected", "rejected", held)
        assert decision.proposed is not None
        assert Decision.from_dict(decision.as_dict()) == decision
        assert session.state_dict()["position"] == position


def test_an_override_is_recorded_and_guarded(controller: Controller):
    def override(decision: Decision) -> Decision:
        groups = tuple(dict(group) for group in session.ask().groups)
        groups[0]["learning_rate"] *= 1.1
        groups[1]["weight_decay"] = math.nan
        return replace(decision, groups=(groups[0], {**groups[1], "learning_rate": 1e9}), run={})

    session = start(controller, mode="advise", advisor=override)
    before = session.ask()
    decision = session.tell(INTERVALS[0])
    assert (decision.advice, decision.status) == ("overridden", "limited")
    assert decision.groups[0]["learning_rate"] == pytest.approx(1.1 * before.groups[0]["learning_rate"])
    for name in ("weight_decay", "beta1"):
        assert decision.groups[0][name] == pytest.approx(before.groups[0][name], rel=1e-9)
    assert decision.groups[1]["weight_decay"] == pytest.approx(before.groups[1]["weight_decay"], rel=1e-9)
    # Ten orders of magnitude are limited to the largest step, 0.06 of five decades.
    assert decision.groups[1]["learning_rate"] == pytest.approx(before.groups[1]["learning_rate"] * 10 ** (0.06 * 5))
    assert decision.run == pytest.approx(before.run)
    assert decision.reasons[0] == (
        "overridden by the advisor; held weight_decay[1]: proposal was not finite; "
        "limited learning_rate[1]: largest step of one decision"
    )
    assert decision.proposed is not None and decision.proposed != decision.in_force
    resumed = start(controller, mode="advise", advisor=override)
    resumed.load_state_dict(json.loads(json.dumps(session.state_dict())))
    assert resumed.ask() == decision


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "`advisor` must return True, False, or an object with `groups` and `run`"),
        (SimpleNamespace(groups=({},), run={}), "values for 2 groups, got 1"),
        (SimpleNamespace(groups=({"momentum": 1.0}, {}), run={}), r"returned a value for 'momentum\[0\]'; allowed are"),
    ],
)
def test_an_advisor_s_bad_answer_changes_nothing(controller: Controller, answer: object, message: str):
    session = start(controller, mode="advise", advisor=lambda decision: answer)
    before = json.dumps(session.state_dict())
    with pytest.raises(InvalidArgumentError, match=message):
        session.tell(INTERVALS[0])
    assert json.dumps(session.state_dict()) == before


def test_modes_are_checked(controller: Controller):
    with pytest.raises(InvalidArgumentError, match=r"`mode` must be one of .*, got 'auto'"):
        start(controller, mode="auto")
    with pytest.raises(InvalidArgumentError, match="`advisor` must be given in mode 'advise'"):
        start(controller, mode="advise")
    advised = start(controller, mode="advise", advisor=lambda decision: True)
    with pytest.raises(SessionError, match="mode='advise', this session no advisor; start it with `advisor`"):
        start(controller).load_state_dict(advised.state_dict())


@pytest.mark.parametrize("mode", ["control", "shadow", "frozen", "advise"])
def test_a_dry_run_prints_and_changes_nothing(controller: Controller, mode: str, capsys: pytest.CaptureFixture[str]):
    def never(decision: Decision) -> bool:
        raise AssertionError("asked in a dry run")

    session = start(controller, mode=mode, advisor=never)
    before = json.dumps(session.state_dict())
    decision = session.dry_run(INTERVALS[0])
    assert json.dumps(session.state_dict()) == before
    printed = capsys.readouterr().out
    assert printed.startswith(f"decision 1 at step {decision.step}: {decision.status}")
    assert f"learning_rate[0] = {decision.intended.groups[0]['learning_rate']:.4g}" in printed
    assert all(reason in printed for reason in decision.reasons)
    if mode != "advise":
        assert session.tell(INTERVALS[0]) == decision


def test_caps_and_deviation_hold_from_the_start_on(controller: Controller):
    free = start(controller)
    rates = [free.ask(), *(free.tell(statistics) for statistics in INTERVALS)]
    highest = max(group["learning_rate"] for decision in rates for group in decision.groups)
    guard = GuardConfig(caps={"learning_rate": (1e-5, 0.9 * highest)}, deviation={"beta1": 0.01})
    session = start(controller, guard=guard)
    base = controller.checkpoint.base[0, 1].astype(float)
    beta1 = controller.config.space["beta1"]
    for decision in [session.ask(), *(session.tell(statistics) for statistics in INTERVALS)]:
        for group in decision.groups:
            assert group["learning_rate"] <= 0.9 * highest * (1 + 1e-9)
            assert abs(beta1.encode(group["beta1"]) - base[2]) <= 0.01 + 1e-9
    with pytest.raises(SessionError, match="state_dict has guard="):
        start(controller).load_state_dict(session.state_dict())
    with pytest.raises(InvalidArgumentError, match="no hyperparameter 'momentum'"):
        start(controller, guard=GuardConfig(caps={"momentum": (0.0, 1.0)}))


def with_outcome(controller: Controller, sign: float) -> Controller:
    """Return a controller whose outcome model says that a higher learning rate is better (1) or worse (-1)."""
    config = controller.config
    shapes = OutcomeConfig(num_members=1, hidden_sizes=(2,)).shapes(config)
    outcome = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    outcome |= {f"{PREFIX}target": np.float32([0, 1]), f"{PREFIX}temperature": np.float32([1, 1])}
    # The head reads the hidden units, then the inputs themselves.
    outcome[f"{PREFIX}head/kernel"][0, 2 + input_names(config).index("residual_learning_rate"), 0] = 50 * sign
    outcome[f"{PREFIX}head/bias"][0, 1:] = -9.0
    return Controller(replace(controller.checkpoint, outcome=outcome))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_acceptance_rejects_what_the_outcome_model_fears(controller: Controller, sign: float):
    only_rate = controller.config.space.subset(["learning_rate"])
    believer = with_outcome(controller, sign)
    changes = {"guard": GuardConfig(acceptance=Acceptance()), "space": only_rate, "roles": ("embedding",)}
    session, statuses = start(believer, **changes), set()
    for statistics in random_intervals(3, num_groups=1, count=30):
        before = session.ask()
        decision = session.tell(statistics)
        statuses.add(decision.status)
        rose = decision.intended.groups[0]["learning_rate"] - before.groups[0]["learning_rate"]
        if decision.status == "rejected":
            assert rose * sign < 0
            assert in_force(decision) == in_force(before)
            assert decision.improvement is not None and decision.improvement.probability < 0.5
            assert decision.reasons[0].startswith("rejected: with probability 1.00 it ends over 1 % worse")
        elif abs(rose) > 1e-3 * before.groups[0]["learning_rate"]:
            assert rose * sign > 0
    assert {"rejected", "applied"} <= statuses
    assert start(controller, **changes).tell(random_intervals(3, num_groups=1)[0]).status == "applied"


class Garbage:
    """A network that answers what it is told to."""

    def __init__(self, network, answer) -> None:
        self._network, self._answer = network, answer

    def __getattr__(self, name):
        return getattr(self._network, name)

    def act(self, hidden, group, run, context):
        return self._answer(hidden)


ARRAYS = st.sampled_from(
    [
        np.full((2, 3), 1e300),
        np.full((2, 3), -np.inf),
        np.full((2, 3), np.nan),
        np.zeros((3, 2)),
        np.zeros(0),
        np.full((2, 3), 1j),
        np.full((2, 3), "x"),
        np.array([[1e9, -1e9, np.nan], [np.inf, 0.0, -5.0]]),
        None,
    ]
)


@given(
    group=ARRAYS,
    run=st.sampled_from([np.array([np.nan]), np.array([1e300]), np.zeros(2), None]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_a_garbage_policy_does_no_harm(controller: Controller, group, run, seed: int):
    broken = Controller(controller.checkpoint)
    broken.network = Garbage(controller.network, lambda hidden: (group, run, np.full_like(hidden, np.nan)))  # type: ignore[assignment]
    session, space = start(broken), controller.config.space
    previous = session.ask()
    for statistics in random_intervals(seed, count=4):
        decision = session.tell(statistics)
        for old, new in zip((*previous.groups, previous.run), (*decision.groups, decision.run), strict=True):
            for name, value in new.items():
                assert math.isfinite(value) and space[name].low <= value <= space[name].high
                assert abs(space[name].encode(value) - space[name].encode(old[name])) <= space[name].max_step + 1e-9
        assert decision.reasons
        json.dumps(session.state_dict(), allow_nan=True)
        previous = decision
    assert np.isfinite(session.state_dict()["hidden"]).all()


def test_a_policy_that_comes_to_its_senses_goes_on(controller: Controller):
    session, twin = start(controller), start(controller)
    before = session.tell(INTERVALS[0])
    twin.tell(INTERVALS[0])
    bad = make_interval(**{name: [math.inf] * 2 for name in GROUP_STATISTICS}, loss_sum=math.inf, validation=math.nan)
    session.tell(bad)
    assert math.isfinite(session.tell(INTERVALS[1]).groups[0]["learning_rate"])
    assert before == twin.ask()
