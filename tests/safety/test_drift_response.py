"""What is done about a report, the lead of a loosened policy, and how a start travels."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.controller.actions import Position
from metalearn.errors import InvalidArgumentError
from metalearn.safety import Bar, GuardConfig, GuardState, Proposal, Region, after_rollback, judge
from metalearn.safety.adaptation import decisions_left, travelled
from metalearn.safety.drift import RESPONSES, DriftMonitor, DriftReport, Loosening, choose_response
from metalearn.safety.frame import as_it_stands
from metalearn.safety.guard import after_decision, after_loosening


def fell(degree: str, kind: str | None = "abrupt", **changes) -> DriftReport:
    return DriftReport(**({"degree": degree, "kind": kind, "direction": "down", "harmful": True} | changes))


@pytest.mark.parametrize(
    ("report", "has_profile", "barrier", "response", "awaits"),
    [
        (fell("none"), False, None, "none", False),
        (fell("severe", harmful=False), False, None, "none", False),
        (fell("watch", "seasonal", harmful=False), False, None, "none", False),
        (fell("watch", None), False, None, "re_profile", True),
        (fell("watch", None), True, None, "re_profile", False),
        (fell("drift", "gradual"), False, None, "loosen", False),
        (fell("drift"), True, None, "re_propose", False),
        (fell("drift"), False, None, "loosen", True),
        (fell("severe"), False, None, "roll_back", False),
        (fell("severe"), True, "it is off", "re_propose", False),
        (fell("severe"), False, "it is off", "loosen", True),
        (fell("severe", "gradual"), False, None, "loosen", True),
    ],
)
def test_the_next_milder_where_something_is_missing(report, has_profile, barrier, response, awaits):
    choice = choose_response(report, has_profile=has_profile, no_way_back=barrier)
    assert (choice.response, choice.awaits_profile) == (response, awaits)
    # A milder one says why, once for each degree that it is milder by.
    milder = RESPONSES.index(report.response) - RESPONSES.index(response) if report.harmful else 0
    assert len(choice.reasons) == milder
    assert RESPONSES[0] == "none"


@pytest.mark.parametrize("arguments", [{"decisions": 0}, {"decisions": 1.5}, {"factor": 0.9}, {"factor": 5.0}])
def test_a_loosening_out_of_range_is_refused(arguments: dict):
    name = next(iter(arguments))
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must be"):
        Loosening(**arguments)


def frame(**changes) -> Proposal:
    two = np.array([0.5, 0.5])
    fields = {
        "labels": ("a", "b"),
        "current": two,
        "proposed": two,
        "start": two,
        "low": np.array([-0.2, -0.2]),
        "high": np.array([0.1, 0.3]),
        "max_step": np.array([0.1, 0.1]),
        "nonfinite_steps": 0.0,
        "deviation": Region(two - 0.25, two + 0.25),
    }
    return Proposal(**(fields | changes))


def test_a_lead_widens_step_and_region_but_not_the_deviation():
    state = after_loosening(GuardState(step_scale=0.5, bars=(Bar(0, 1, 2),)), 2.0, 3)
    wide = as_it_stands(frame(), state)
    assert (wide.low.tolist(), wide.high.tolist()) == ([-0.4, -0.4], [0.2, 0.6])
    assert wide.max_step.tolist() == [0.1, 0.1]  # half of twice as much
    assert wide.bars == state.bars
    assert wide.deviation is not None and wide.deviation.high.tolist() == [0.75, 0.75]
    unchanged = frame()
    assert as_it_stands(unchanged, GuardState()) is unchanged


def test_a_lead_runs_down_when_its_decisions_are_over_and_steps_are_whole():
    state, still, seen = after_loosening(GuardState(step_scale=0.9), 1.5, 2), frame(), []
    for _ in range(8):
        state = after_decision(state, still, judge(still), GuardConfig())
        seen.append((state.lead_for, round(state.lead, 4)))
    assert seen == [(1, 1.5), (0, 1.5), (0, 1.3636), (0, 1.2397), (0, 1.127), (0, 1.0245), (0, 1.0), (0, 1.0)]
    halved = after_loosening(GuardState(step_scale=0.5), 1.5, 1)
    for _ in range(7):
        halved = after_decision(halved, still, judge(still), GuardConfig())
    assert (halved.lead, halved.step_scale < 1.0) == (1.5, True)
    assert GuardState.from_dict(json.loads(json.dumps(halved.as_dict()))) == halved


def test_a_lead_outlives_a_rollback():
    left = after_loosening(GuardState(), 1.5, 4)
    state = after_rollback(GuardState(), np.zeros(2), GuardConfig(), erased=left)
    assert (state.lead, state.lead_for) == (1.5, 4)


def position(start, residual) -> Position:
    """Return one of a single group without a global value."""
    return Position(np.array([start]), np.zeros(0), np.array([residual]), np.zeros(0))


UNIT = st.floats(0.0, 1.0)
PAIR = st.tuples(UNIT, UNIT)


@given(begin=PAIR, target=PAIR, share=PAIR, bars=st.lists(st.sampled_from([Bar(0, 1, 1), Bar(1, -1, 3)]), max_size=2))
@settings(max_examples=60)
def test_a_start_travels_within_the_largest_step_and_arrives(begin, target, share, bars):
    limits = frame(bars=tuple(bars), deviation=None)
    where = np.clip(np.array(begin) + limits.low + np.array(share) * (limits.high - limits.low), 0.0, 1.0)
    before, target = np.array(begin), np.array(target)
    for _ in range(11):
        here = position(before, where - before)
        start = travelled(here, target, limits).group_start[0]
        assert (np.abs(start - before) <= limits.max_step + 1e-12).all()
        assert (np.abs(target - start) <= np.abs(target - before) + 1e-12).all()
        for bar in bars:
            assert bar.direction * (start - before)[bar.value] <= 1e-12
        # What rides on it stays within the guard: no rule pulls it further than a step.
        riding = start + (where - before)
        asked = judge(replace(limits, current=where, proposed=riding, start=start)).values
        if not bars:
            assert (np.abs(asked - where) <= limits.max_step + 1e-9).all()
        before, where = start, asked
    if not bars:
        np.testing.assert_array_equal(before, target)


def test_a_start_waits_for_values_that_lie_outside_a_region_that_has_narrowed():
    narrow = frame(high=np.array([0.1, 0.1]))
    here = position([0.5, 0.5], [0.15, 0.0])  # 0.05 outside: from a lead that has run down
    there = travelled(here, np.array([0.0, 0.0]), narrow)
    # The value, 0.65, may fall to 0.55 at once; so its start may fall to 0.45, although a step would lead to 0.4.
    np.testing.assert_allclose(there.group_start[0], [0.45, 0.4])


def test_decisions_left_is_the_furthest_value_s():
    here = position([0.5, 0.5], [0.0, 0.0])
    assert decisions_left(here, np.array([0.55, 0.81]), np.array([0.1, 0.1])) == 4
    assert decisions_left(here, np.array([0.6, 0.5]), np.array([0.1, 0.1])) == 1


def test_an_outlying_value_is_known_as_such_before_there_is_an_alarm():
    monitor, rng = DriftMonitor(streams={"ndcg": "down", "loss": "up"}), np.random.default_rng(0)
    seen = []
    for step in range(60):
        value = 0.3 + 0.002 * rng.standard_normal() - 0.02 * (step == 50) + 0.02 * (step == 55)
        report = monitor.observe({"ndcg": value})
        seen.append(monitor.outlying)
        assert not report.new
        monitor.observe({"loss": 1.0 + 0.002 * rng.standard_normal()})
    assert [step for step, names in enumerate(seen) if names] == [50]  # not where it rises
    assert seen[50] == {"ndcg"}
