"""The monitor: one budget, one worst report, what it asks for, and a state that goes on to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.interactions import Interactions
from metalearn.profiles import profile_domain
from metalearn.safety.drift import DriftConfig, DriftMonitor, DriftReport


def make_monitor(**changes) -> DriftMonitor:
    watched = {"streams": {"ndcg": "down", "loss": "up"}, "profiles": ["shop"], "samples": ["clicks"]}
    return DriftMonitor(**{**watched, **changes})


def values_at(step: int, rng: np.random.Generator, fall: float = 0.0) -> dict[str, float]:
    noise = 0.002 * rng.standard_normal(2)
    return {"ndcg": 0.3 - 0.2 / (1 + step / 10) + noise[0] - fall, "loss": 1.0 / (1 + step / 10) + noise[1]}


def profile(rng: np.random.Generator, skew: float = 1.5):
    item = (60 * rng.random(400) ** skew).astype(int)
    return profile_domain(Interactions.from_arrays(rng.integers(0, 80, 400), item))


@pytest.mark.parametrize(
    ("report", "response"),
    [
        (DriftReport(), "none"),
        (DriftReport(degree="watch", direction="down", harmful=True), "re_profile"),
        (DriftReport(degree="watch", kind="seasonal"), "re_profile"),
        (DriftReport(degree="drift", kind="gradual", direction="down", harmful=True), "loosen"),
        (DriftReport(degree="drift", kind="abrupt", direction="down", harmful=True), "re_propose"),
        (DriftReport(degree="severe", kind="abrupt", direction="down", harmful=True), "roll_back"),
        (DriftReport(degree="severe", kind="gradual", direction="down", harmful=True), "re_propose"),
        (DriftReport(degree="severe", kind="abrupt", direction="up", harmful=False), "re_profile"),
        (DriftReport(degree="severe", kind="abrupt", harmful=True), "re_propose"),
    ],
)
def test_response_by_degree(report: DriftReport, response: str):
    assert report.response == response


def test_budget_is_shared():
    alone, many = DriftMonitor(streams={"ndcg": "down"}), make_monitor()
    assert alone._detectors["ndcg"].false_alarms_per_1000 == 1.0
    shares = [many._detectors[name].false_alarms_per_1000 for name in ("ndcg", "loss")]
    shares += [many._watch.false_alarms_per_1000, 1000 * many._level]
    assert shares == [0.25] * 4
    assert many._detectors["loss"].harmful == "up"


def test_the_worst_stream_is_reported_once_with_its_time():
    monitor, rng, new = make_monitor(), np.random.default_rng(0), []
    for step in range(160):
        report = monitor.observe(values_at(step, rng, fall=0.02 * (step >= 120)))
        if report.new:
            new.append((step, report))
    (step, report), *more = new
    assert not more
    assert 120 <= step <= 124
    assert (report.stream, report.direction, report.harmful) == ("ndcg", "down", True)
    assert (report.degree, report.kind, report.response) == ("severe", "abrupt", "roll_back")
    assert 117 <= report.since <= 120
    assert report.sentence.startswith("ndcg: down at once since update 1")


def test_a_gain_is_drift_but_no_harm():
    monitor, rng = make_monitor(), np.random.default_rng(0)
    reports = [monitor.observe(values_at(step, rng, fall=-0.02 * (step >= 120))) for step in range(130)]
    found = next(report for report in reports if report.new)
    assert (found.direction, found.harmful, found.response) == ("up", False, "re_profile")


def test_profiles_name_the_meta_features_that_moved():
    monitor, rng = make_monitor(), np.random.default_rng(1)
    reports = [monitor.observe_profile("shop", profile(rng, 3.0 if day >= 30 else 1.5)) for day in range(42)]
    found, confirmed = (report for report in reports if report.kind)
    assert (found.new, confirmed.new) == (True, False)
    assert (confirmed.stream, confirmed.kind, confirmed.since) == ("shop", "abrupt", 30)
    assert (confirmed.harmful, confirmed.direction, confirmed.response) == (True, None, "re_propose")
    assert "item_" in confirmed.sentence


def test_samples_are_compared_with_the_first_window_then_with_the_new_one():
    monitor, rng = make_monitor(), np.random.default_rng(0)
    names = ("hour", "rank")

    def rows(shift: float) -> np.ndarray:
        return rng.standard_normal((400, 2)) + np.array([0.0, shift])

    degrees = [monitor.observe_samples("clicks", rows(shift), names).degree for shift in (0, 0, 0, 2, 2, 2)]
    assert degrees == ["none", "none", "none", "severe", "none", "none"]


def exercise(monitor: DriftMonitor, rng: np.random.Generator, first: int, last: int) -> list[DriftReport]:
    reports = []
    for step in range(first, last):
        reports.append(monitor.observe(values_at(step, rng, fall=0.02 * (step >= 60))))
        if step % 2 == 0:
            reports.append(monitor.observe_profile("shop", profile(rng, 3.0 if step >= 56 else 1.5)))
        if step % 10 == 0:
            reports.append(monitor.observe_samples("clicks", rng.standard_normal((50, 2)), ("hour", "rank")))
    return reports


def test_a_resumed_monitor_reports_the_same_to_the_bit():
    first, rng = make_monitor(), np.random.default_rng(0)
    exercise(first, rng, 0, 50)
    saved = json.loads(json.dumps(first.state_dict()))
    second = make_monitor()
    second.load_state_dict(saved)
    assert json.dumps(second.state_dict()) == json.dumps(first.state_dict())
    position = rng.bit_generator.state
    went_on = exercise(first, rng, 50, 75)
    rng.bit_generator.state = position
    assert exercise(second, rng, 50, 75) == went_on
    assert any(report.new for report in went_on)
    assert json.dumps(second.state_dict()) == json.dumps(first.state_dict())


def test_a_state_shares_nothing_with_its_monitor():
    monitor, rng = make_monitor(), np.random.default_rng(0)
    exercise(monitor, rng, 0, 12)
    saved = monitor.state_dict()
    before = json.dumps(saved)
    exercise(monitor, rng, 12, 24)
    assert json.dumps(saved) == before
    other = make_monitor()
    other.load_state_dict(saved)
    exercise(other, rng, 12, 24)
    assert json.dumps(saved) == before


def test_a_state_of_another_monitor_is_refused():
    state = make_monitor().state_dict()
    with pytest.raises(SessionError, match="`streams` are"):
        make_monitor(streams={"auc": "down", "loss": "up"}).load_state_dict(state)
    with pytest.raises(SessionError, match="`config` are"):
        make_monitor(config=DriftConfig(false_alarms_per_1000=2.0)).load_state_dict(state)


def test_names_are_checked():
    monitor = make_monitor()
    with pytest.raises(InvalidArgumentError, match="'auc' is not a stream"):
        monitor.observe({"auc": 0.5})
    with pytest.raises(InvalidArgumentError, match="under a name of its own"):
        DriftMonitor(streams={"a": "down"}, profiles=["a"])
    with pytest.raises(InvalidArgumentError, match="needs something to watch"):
        DriftMonitor()
    with pytest.raises(InvalidArgumentError, match="at least 4 rows of 2 features"):
        monitor.observe_samples("clicks", np.zeros((3, 2)), ("a", "b"))


def test_not_measured_is_no_drift():
    monitor = make_monitor()
    assert monitor.observe({"ndcg": float("nan")}) == DriftReport()
    assert monitor.observe({}) == DriftReport()
