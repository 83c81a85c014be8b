"""The session: what it accepts, what it decides, and that a resumed one decides the same to the bit."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from metalearn import Controller, Session, load_controller
from metalearn.controller import CONTROLLED
from metalearn.controller.actions import trust_region
from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.session import decision_interval
from metalearn.signals import GROUP_STATISTICS, IntervalStatistics
from metalearn.spaces import CANONICAL_SPACE
from tests.controllers import acting_controller
from tests.intervals import make_interval, make_profile, random_intervals
from tests.recorded_run import BATCH_SIZE, NUM_DECISIONS, STEPS, load_recorded_run

ROLES = ("embedding", "dense")
INTERVALS = random_intervals(11)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return load_controller(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors"))


def start(controller: Controller, **changes) -> Session:
    arguments = {"profile": make_profile(), "roles": ROLES, "horizon": 1000, "batch_size": 64}
    return controller.start(**(arguments | changes))


def test_first_decision_is_the_start_configuration(controller: Controller):
    session = start(controller)
    decision = session.ask()
    assert (decision.index, decision.step, decision.status, decision.schedule) == (0, 0, "applied", 1.0)
    assert decision.confidence == session.confidence
    assert "start: base configuration shifted for this domain" in decision.reasons[0]
    assert decision.groups[0] == decision.groups[1]
    assert session.ask() is decision


@pytest.mark.parametrize("horizon", [None, 1000])
def test_a_start_that_is_not_finite_gives_way_to_the_base(controller: Controller, horizon: int | None):
    poisoned = np.full_like(controller.checkpoint.network["modifier/bias"], math.nan)
    checkpoint = controller.checkpoint
    network = {**checkpoint.network, "modifier/bias": poisoned}
    session = start(Controller(dataclasses.replace(checkpoint, network=network)), horizon=horizon)
    decision = session.ask()
    base = [
        controller.config.space[name].decode(float(unit))
        for name, unit in zip(CONTROLLED, checkpoint.base[0, int(horizon is not None)], strict=True)
    ]
    assert [{**decision.groups[0], **decision.run}[name] for name in CONTROLLED] == pytest.approx(base, rel=1e-5)
    assert decision.reasons == ("start: base configuration where the controller's own is not finite",)


def test_decisions_follow_one_another(controller: Controller):
    session, steps = start(controller), 0
    for index, statistics in enumerate(INTERVALS, 1):
        decision = session.tell(statistics)
        steps += int(statistics.steps)
        assert session.ask() is decision
        assert (decision.index, decision.step) == (index, steps)
        assert decision.schedule == session.multiplier(steps)
        assert decision.reasons


@pytest.mark.parametrize("horizon", [None, 1000])
def test_values_stay_finite_in_bounds_within_step_and_trust_region(controller: Controller, horizon: int | None):
    session, space = start(controller, horizon=horizon), controller.config.space
    low, high = trust_region(controller.config, np, np.float64)
    origin = previous = session.ask()
    for statistics in random_intervals(1, count=40, missing=0.3):
        decision = session.tell(statistics)
        rows = [
            *zip(origin.groups, previous.groups, decision.groups, strict=True),
            (origin.run, previous.run, decision.run),
        ]
        for first, before, now in rows:
            for name, value in now.items():
                unit = {
                    key: space[name].encode(row[name]) for key, row in zip("fbn", (first, before, now), strict=True)
                }
                assert space[name].low <= value <= space[name].high
                assert abs(unit["n"] - unit["b"]) <= space[name].max_step + 1e-9
                shift = unit["n"] - unit["f"]
                assert low[CONTROLLED.index(name)] - 1e-9 <= shift <= high[CONTROLLED.index(name)] + 1e-9
        previous = decision
    assert previous.groups != origin.groups


def test_a_recorded_run_is_steered(controller: Controller):
    run = load_recorded_run()
    session = start(controller, profile=run.profile, horizon=NUM_DECISIONS * STEPS, batch_size=BATCH_SIZE)
    decisions = [session.tell(statistics) for statistics in run.intervals]
    assert session.interval == STEPS
    assert decisions[-1].step == NUM_DECISIONS * STEPS
    assert {decision.status for decision in decisions} <= {"applied", "limited"}
    assert any("validation: best so far" in decision.reasons for decision in decisions)
    assert any("moved the learning rate's step by" in reason for d in decisions for reason in d.reasons)


def same_to_the_bit(one: Session, other: Session, intervals: list[IntervalStatistics]) -> bool:
    return all(one.tell(statistics) == other.tell(statistics) for statistics in intervals)


@pytest.mark.parametrize("cut", range(len(INTERVALS) + 1))
@pytest.mark.parametrize(("horizon", "family"), [(None, None), (1000, "two_tower")])
def test_a_resumed_session_decides_the_same_to_the_bit(
    controller: Controller, horizon: int | None, family: str | None, cut: int
):
    session = start(controller, horizon=horizon, family=family)
    for statistics in INTERVALS[:cut]:
        session.tell(statistics)
    state = json.loads(json.dumps(session.state_dict()))
    resumed = start(controller, horizon=horizon, family=family)
    for statistics in INTERVALS[: cut // 2]:  # whatever it did before is forgotten
        resumed.tell(statistics)
    resumed.load_state_dict(state)
    assert resumed.ask() == session.ask()
    assert same_to_the_bit(session, resumed, INTERVALS[cut:])
    assert json.dumps(resumed.state_dict()) == json.dumps(session.state_dict())


def test_a_state_is_a_copy(controller: Controller):
    session = start(controller)
    session.tell(INTERVALS[0])
    state = session.state_dict()
    before = json.dumps(state)
    resumed = start(controller)
    resumed.load_state_dict(state)
    assert same_to_the_bit(session, resumed, INTERVALS[1:])
    assert json.dumps(state) == before


def test_resuming_keeps_initial_values(controller: Controller):
    initial = [{"learning_rate": 0.5, "beta1": 0.6}, {"learning_rate": 0.001}]
    session, resumed = (start(controller, initial=values) for values in (initial, None))
    session.tell(INTERVALS[0])
    resumed.load_state_dict(session.state_dict())
    assert same_to_the_bit(session, resumed, INTERVALS[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": ("embedding",)}, "num_groups=2, this session 1"),
        ({"roles": ("embedding", "head")}, r"roles=\['embedding', 'dense'\], this session \['embedding', 'head'\]"),
        ({"horizon": None}, "horizon=1000, this session None"),
        ({"horizon": 2000, "interval": 50}, "horizon=1000, this session 2000"),
        ({"family": "two_tower"}, "family=None, this session 'two_tower'"),
        ({"batch_size": 128}, "batch_size=64, this session 128"),
        ({"interval": 10}, "interval=50, this session 10"),
        (
            {"space": CANONICAL_SPACE.subset(["dropout", "batch_size"])},
            r"hyperparameters=.*, this session \[\[\], \[\], \['dropout'\]\]",
        ),
        ({"profile": make_profile(1)}, "domain='0+', this session '0+1'; start it with the arguments of the saved run"),
    ],
)
def test_a_state_of_other_arguments_is_refused(controller: Controller, changes: dict, message: str):
    state = start(controller).state_dict()
    other = start(controller, **changes)
    before = json.dumps(other.state_dict())
    with pytest.raises(SessionError, match=message):
        other.load_state_dict(state)
    assert json.dumps(other.state_dict()) == before


@pytest.mark.parametrize("version", [None, 3, "4"])
def test_a_state_of_another_version_is_refused(controller: Controller, version: object):
    session = start(controller)
    with pytest.raises(SessionError, match=f"state_dict has version={version!r}, this session 4"):
        session.load_state_dict({**session.state_dict(), "version": version})
    with pytest.raises(SessionError, match="version=None"):
        session.load_state_dict({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": ()}, "`roles` is empty"),
        ({"roles": ("embedding", "tower")}, r"`roles` must be among \('embedding', .*\), got 'tower'"),
        ({"roles": "embedding"}, "`roles` must be among .*, got 'e'"),
        ({"family": "gru4rec"}, "`family` must be one of .*'two_tower'.* or None for any other, got 'gru4rec'"),
        ({"horizon": 1}, "`horizon` must be an int of at least 2, got 1; pass the optimizer steps of the whole run"),
        ({"horizon": 100.0}, "`horizon` must be an int"),
        ({"horizon": True}, "`horizon` must be an int"),
        ({"batch_size": 0}, "`batch_size` must be an int of at least 1, got 0"),
        ({"batch_size": "64"}, "`batch_size` must be an int"),
        ({"interval": 1}, "`interval` must be an int of at least 2, got 1; pass the optimizer steps between decisions"),
        ({"interval": 0}, "`interval` must be an int of at least 2, got 0"),
        ({"initial": [{}]}, "`initial` must have one entry for each of 2 groups, got 1"),
        ({"initial": [{"learning_rate": math.nan}, {}]}, "learning_rate must be a number"),
    ],
)
def test_bad_arguments_are_named(controller: Controller, changes: dict, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        start(controller, **changes)


@pytest.mark.parametrize("name", IntervalStatistics._fields)
def test_statistics_of_the_wrong_shape_are_named(controller: Controller, name: str):
    session = start(controller)
    grouped = name in GROUP_STATISTICS
    before = json.dumps(session.state_dict())
    for value in (np.ones(3), np.ones((2, 1)), np.float64(1.0) if grouped else np.ones(1)):
        expected = "one value for each group" if grouped else "a number"
        with pytest.raises(
            InvalidArgumentError, match=rf"`statistics\.{name}` must have shape \(.*\), {expected}, got"
        ):
            session.tell(make_interval()._replace(**{name: value}))
    assert json.dumps(session.state_dict()) == before


@pytest.mark.parametrize("steps", [0.0, -1.0, math.nan, math.inf])
def test_intervals_without_steps_are_refused(controller: Controller, steps: float):
    session = start(controller)
    with pytest.raises(
        InvalidArgumentError, match=r"`statistics\.steps` must be positive, got .*; tell after training"
    ):
        session.tell(make_interval(steps=steps))
    assert session.ask().index == 0


def test_past_the_horizon_it_goes_on_with_what_is_left_of_the_rate(controller: Controller):
    session = start(controller, horizon=100)
    for _ in range(6):
        decision = session.tell(make_interval(steps=50.0))
    assert decision.step == 300
    left = controller.config.decay_to
    assert left < session.multiplier(99) < left + 0.001
    assert decision.schedule == session.multiplier(100) == session.multiplier(10**6) == left
    assert all(math.isfinite(value) for group in decision.groups for value in group.values())


def test_without_horizon_nor_batch_size_it_decides_all_the_same(controller: Controller):
    session = start(controller, horizon=None, batch_size=None)
    assert session.interval == 100
    for statistics in INTERVALS:
        decision = session.tell(statistics)
        assert decision.schedule == 1.0
        assert all(math.isfinite(value) for group in decision.groups for value in group.values())
    told = start(controller, batch_size=None)
    assert told.ask().groups != session.ask().groups


def test_interval_lengths():
    assert decision_interval(20, 1000, None) == 50
    assert decision_interval(20, 1001, 5.0) == 51  # the last interval is short, never a 21st
    assert decision_interval(20, 10, None) == 2  # a probe takes two steps
    assert decision_interval(20, None, None) == 100
    assert [decision_interval(20, None, epoch) for epoch in (3.0, 300.0, 1e6)] == [10, 150, 1000]


def test_batch_size_gives_the_epoch_that_the_interval_follows(controller: Controller):
    # 20 000 interactions in batches of 50: 400 steps an epoch, two decisions in it.
    assert start(controller, horizon=None, batch_size=50).interval == 200
    assert start(controller, interval=33).interval == 33


@pytest.mark.parametrize(("family", "row", "rate"), [(None, 0, 0.03), ("two_tower", 2, 0.006)])
def test_a_far_domain_gets_the_base_of_its_family_exactly(
    controller: Controller, family: str | None, row: int, rate: float
):
    session = start(controller, profile=make_profile(size=1e4), family=family)
    assert session.confidence == 0.0
    base = controller.checkpoint.base[row, 1].tolist()
    decisions = [session.ask(), *(session.tell(statistics) for statistics in INTERVALS)]
    for decision in decisions:
        assert decision.status == "fallback"
        assert decision.confidence == 0.0
        assert (decision.groups, decision.run) == (decisions[0].groups, decisions[0].run)
    position = session.state_dict()["position"]
    assert position["group_start"] == [base[: len(GROUP_CONTROLLED)]] * 2
    assert position["global_start"] == base[len(GROUP_CONTROLLED) :]
    assert not np.any(position["group_residual"])
    assert decisions[0].groups[0]["learning_rate"] == pytest.approx(rate)
    assert "base configuration, since the domain lies outside" in decisions[0].reasons[0]
    assert session.tell(make_interval(nonfinite=1.0)).status == "held"


def test_confidence_falls_with_distance(controller: Controller):
    confidences = [start(controller, profile=make_profile(size=size)).confidence for size in (3.0, 14.0, 18.0, 1e4)]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > 0.8


def test_a_diverged_interval_is_held(controller: Controller):
    session = start(controller)
    before = session.tell(INTERVALS[0])
    bad = make_interval(loss_sum=math.nan, loss_square_sum=math.inf, gradient_norm=[math.inf, math.nan], nonfinite=4.0)
    held = session.tell(bad)
    assert held.status == "held"
    assert (held.groups, held.run) == (before.groups, before.run)
    assert held.reasons[0] == "held: 4 steps of the interval had a loss that was not finite"
    after = session.tell(INTERVALS[1])
    assert after.status in ("applied", "limited")
    assert after.groups != held.groups


def test_what_a_loop_does_not_measure_is_no_hindrance(controller: Controller):
    session = start(controller)
    gaps = {name: [math.nan] * 2 for name in GROUP_STATISTICS}
    decision = session.tell(make_interval(**gaps, loss_sum=math.nan, loss_square_sum=math.nan, validation=math.nan))
    assert decision.status == "applied"
    assert "validation: not reported for this interval" in decision.reasons


@pytest.mark.parametrize("bound", [(), ("learning_rate",), ("weight_decay", "dropout"), ("dropout",)])
def test_unbound_hyperparameters_never_appear(controller: Controller, bound: tuple[str, ...]):
    space = CANONICAL_SPACE.subset(["batch_size", *bound])
    session = start(controller, space=space)
    unbound = set(CONTROLLED) - set(bound)
    decisions = [session.ask(), *(session.tell(statistics) for statistics in INTERVALS)]
    for decision in decisions:
        assert [set(group) for group in decision.groups] == [set(bound) & set(GROUP_CONTROLLED)] * 2
        assert set(decision.run) == set(bound) & set(GLOBAL_CONTROLLED)
        changes = [reason for reason in decision.reasons[1:] if "->" in reason or reason.startswith("limited")]
        assert not any(name in reason for reason in changes for name in unbound)
    residual = session.state_dict()["position"]["group_residual"]
    for column, name in enumerate(GROUP_CONTROLLED):
        assert np.any(np.array(residual)[:, column]) == (name in bound)


def test_initial_values_are_where_it_starts(controller: Controller):
    initial = [{"learning_rate": 0.5, "beta1": 0.6}, {"learning_rate": 0.002, "weight_decay": 0.01, "beta1": 0.9}]
    session, own = start(controller, initial=initial), start(controller).ask()
    decision = session.ask()
    for group, given in zip(decision.groups, initial, strict=True):
        for name, value in group.items():
            assert value == pytest.approx(given.get(name, own.groups[0][name]), rel=1e-9)
    assert decision.run == own.run
    assert "the optimizer's own values" in decision.reasons[0]


def test_initial_values_out_of_bounds_are_clipped(controller: Controller):
    initial = [{"learning_rate": 30.0, "weight_decay": 0.0, "beta1": 0.0}] * 2
    group = start(controller, initial=initial).ask().groups[0]
    assert group == pytest.approx({"learning_rate": 1.0, "weight_decay": 1e-4, "beta1": 0.5})


def test_decisions_do_not_depend_on_wall_clock_time(controller: Controller):
    one, other = start(controller), start(controller)
    for statistics in INTERVALS:
        assert one.tell(statistics) == other.tell(statistics._replace(seconds=np.float64(1e9)))


def test_what_a_group_keeps_to_itself_is_not_decided(controller: Controller):
    session = start(controller, withheld=[("weight_decay",), ()])
    for interval in INTERVALS[:5]:
        decision = session.tell(interval)
        assert set(decision.groups[0]) == {"learning_rate", "beta1"}
        assert set(decision.groups[1]) == {"learning_rate", "weight_decay", "beta1"}
    with pytest.raises(InvalidArgumentError, match="`withheld` must have one entry for each of 2 groups, got 1"):
        start(controller, withheld=[()])
