"""Trials: the state machine, measurements and the JSON round trip."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.trials import Measurement, Trial, TrialStatus

ALLOWED = {
    *((TrialStatus.RUNNING, after) for after in TrialStatus if after is not TrialStatus.RUNNING),
    *itertools.product((TrialStatus.PAUSED, TrialStatus.PREEMPTED), (TrialStatus.RUNNING, TrialStatus.INVALID)),
}


def make_trial(**changes) -> Trial:
    return Trial(**({"task": "movies", "configuration": {"learning_rate": 0.01}, "seed": 3} | changes))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(TrialStatus, TrialStatus)))
def test_transitions(before: TrialStatus, after: TrialStatus):
    trial = make_trial(status=before, cost=1.0)
    if (before, after) in ALLOWED:
        moved = trial.moved(after, cost=0.5)
        assert (moved.status, moved.cost) == (after, 1.5)
    else:
        with pytest.raises(SessionError, match=rf"cannot go from {before} to {after}"):
            trial.moved(after)
    assert (trial.status, trial.cost) == (before, 1.0)


def test_shortcuts_end_a_trial_and_add_its_cost():
    assert make_trial().complete(cost=2.0) == make_trial(status=TrialStatus.COMPLETE, cost=2.0)
    assert make_trial().diverge() == make_trial(status=TrialStatus.DIVERGED)
    with pytest.raises(
        SessionError, match="from complete to diverged; from complete it can go to nothing, it is final"
    ):
        make_trial().complete().diverge()


@pytest.mark.parametrize("status", [status for status in TrialStatus if status is not TrialStatus.RUNNING])
def test_only_a_running_trial_is_measured(status: TrialStatus):
    with pytest.raises(SessionError, match=f"a trial that is {status} cannot be measured"):
        make_trial(status=status).record(Measurement(1, "ndcg", 0.1))


def test_record_appends_and_leaves_the_old_trial_alone():
    first = make_trial().record(Measurement(10, "ndcg", 0.1))
    second = first.record(Measurement(10, "loss", 0.6), Measurement(20, "ndcg", 0.2))
    assert [m.step for m in first.measurements] == [10]
    assert [(m.step, m.metric) for m in second.measurements] == [(10, "ndcg"), (10, "loss"), (20, "ndcg")]


def test_configuration_is_copied():
    configuration = {"learning_rate": 0.01}
    trial = make_trial(configuration=configuration)
    configuration["learning_rate"] = 1.0
    assert trial.configuration == {"learning_rate": 0.01}


def test_best_takes_the_earliest_of_equals_and_leaves_out_what_is_not_finite():
    values = (math.nan, 0.2, 0.3, math.inf, 0.3, 0.1)
    trial = make_trial(measurements=tuple(Measurement(step, "ndcg", value) for step, value in enumerate(values)))
    assert trial.best("ndcg") == Measurement(2, "ndcg", 0.3)
    assert trial.best("ndcg", mode="min") == Measurement(5, "ndcg", 0.1)
    assert trial.best("recall") is None
    assert make_trial(measurements=(Measurement(0, "ndcg", math.nan),)).best("ndcg") is None
    with pytest.raises(InvalidArgumentError, match="`mode` must be 'max' or 'min', got 'most'"):
        trial.best("ndcg", mode="most")  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_bad_step_is_named(step: object):
    with pytest.raises(InvalidArgumentError, match="`step` must be an int of at least 0, got"):
        Measurement(step, "ndcg", 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_bad_cost_is_named(cost: float):
    with pytest.raises(InvalidArgumentError, match="`cost` must be finite and not negative"):
        make_trial(cost=cost)


@pytest.mark.parametrize("steps", [(5, 5), (5, 4)])
def test_steps_of_a_metric_increase(steps: tuple[int, int]):
    with pytest.raises(InvalidArgumentError, match=rf"`measurements` of ndcg .* got {steps[1]} after 5"):
        make_trial().record(*(Measurement(step, "ndcg", 0.1) for step in steps))


@given(
    st.sampled_from(sorted(TrialStatus)),
    st.dictionaries(st.integers(0, 10**6), st.floats(allow_nan=False, allow_infinity=False)),
    st.dictionaries(st.text(), st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())),
    st.floats(0, 1e9),
)
def test_json_round_trip(status, values, configuration, cost):
    trial = make_trial(
        status=status,
        configuration=configuration,
        cost=cost,
        measurements=tuple(Measurement(step, "ndcg", values[step]) for step in sorted(values)),
    )
    again = Trial.from_json(trial.to_json())
    assert again == trial
    assert type(again.status) is TrialStatus
    assert Trial.from_dict(json.loads(json.dumps(trial.as_dict(), allow_nan=False))) == trial


def test_values_that_are_not_finite_are_null_in_json():
    trial = make_trial().record(Measurement(1, "ndcg", math.inf)).diverge()
    assert json.loads(trial.to_json())["measurements"] == [[1, "ndcg", None]]
    assert math.isnan(Trial.from_json(trial.to_json()).measurements[0].value)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "sleeping"},
        {"measurements": [[1, "ndcg"]]},
        {"measurements": [[-1, "ndcg", 0.0]]},
        {"measurements": 3},
        {"cost": "much"},
        {"extra": 1},
    ],
)
def test_malformed_content_is_refused(change: dict):
    with pytest.raises(InvalidArgumentError, match="not a trial"):
        Trial.from_dict({**make_trial().as_dict(), **change})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"trial"', "{}"])
def test_text_that_is_no_trial_is_refused(text: str):
    with pytest.raises(InvalidArgumentError, match="not a trial"):
        Trial.from_json(text)
