"""The detector of drift on learning curves: hand-worked sums, rates by simulation, and whatever comes in."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.errors import InvalidArgumentError
from metalearn.safety.drift import (
    DetectorConfig,
    DetectorState,
    DetectorVerdict,
    cusum_run_length,
    cusum_threshold,
    find_period,
    init,
    seasonal_profile,
    tell_apart,
    update,
)
from metalearn.safety.drift.baseline import Baseline, follow, log_time, predict, slope
from metalearn.safety.drift.detector import _accumulate

QUICK = DetectorConfig(longest_period=0)


def run(values, config: DetectorConfig = QUICK, state: DetectorState | None = None):
    """Return the last state and every verdict."""
    state, verdicts = state or init(config), []
    for value in values:
        state, verdict = update(state, float(value), config)
        verdicts.append(verdict)
    return state, verdicts


def alarms(verdicts: list[DetectorVerdict], direction: str | None = None) -> list[int]:
    return [i for i, said in enumerate(verdicts) if said.alarm and direction in (None, said.direction)]


def learning_curve(seed: int, length: int = 300, noise: float = 0.01, correlation: float = 0.0) -> np.ndarray:
    """Return a metric that rises from 0.05 to 0.35."""
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal(length)
    for index in range(1, length):
        draws[index] = correlation * draws[index - 1] + math.sqrt(1 - correlation**2) * draws[index]
    return 0.35 - 0.3 / (1 + np.arange(length) / 10) + noise * draws


def test_cusum_by_hand():
    # k = 0.5. Up: 1-.5=.5; .5+2-.5=2; 2-3-.5<0 -> 0; 0+.4-.5<0 -> 0. Down: -1-.5 -> 0; 0; 3-.5=2.5; 2.5-.4-.5=1.6.
    state, seen = DetectorState(), []
    for clock, z in enumerate((1.0, 2.0, -3.0, 0.4)):
        state = _accumulate(state._replace(clock=float(clock)), z, DetectorConfig(reference=0.5))
        seen.append((state.up, state.down, state.up_since, state.down_since))
    assert np.allclose([each[:2] for each in seen], [(0.5, 0), (2.0, 0), (0, 2.5), (0, 1.6)])
    assert seen[1][2] == 0.0, "S⁺ left 0 with the first point"
    assert seen[3][3] == 2.0, "S⁻ left 0 with the third point"


@pytest.mark.parametrize(("threshold", "reference"), [(2.5, 0.5), (2.0, 0.75)])
def test_run_length_is_that_of_simulation(threshold: float, reference: float):
    rng, lengths = np.random.default_rng(0), []
    sums, age = np.zeros(2000), np.zeros(2000)
    for _ in range(2500):
        sums = np.maximum(0.0, sums + rng.standard_normal(2000) - reference)
        age += 1
        done = sums > threshold
        lengths.extend(age[done])
        sums[done], age[done] = 0.0, 0.0
    assert np.mean(lengths) == pytest.approx(cusum_run_length(threshold, reference), rel=0.1)


def test_threshold_solves_the_formula_and_grows_with_the_margin():
    for rate in (0.01, 1.0, 30.0):
        assert 2000.0 / cusum_run_length(cusum_threshold(rate, 0.5), 0.5) == pytest.approx(rate)
    # With a margin m the rate holds for points 1 + m times as wide: h / (1 + m) is the threshold at k / (1 + m).
    assert cusum_threshold(1.0, 0.5, 0.25) / 1.25 == pytest.approx(cusum_threshold(1.0, 0.4))


def test_baseline_is_weighted_least_squares():
    rng, memory = np.random.default_rng(0), 8.0
    values, baseline = rng.standard_normal(30), Baseline()
    for count, value in enumerate(values):
        baseline = follow(baseline, count, value, memory)
    time = np.array([log_time(count) for count in range(30)])
    weight = (1 - 1 / memory) ** np.arange(29, -1, -1.0)
    trend, level = np.polyfit(time, values, 1, w=np.sqrt(weight))
    assert slope(baseline, "both") == pytest.approx(trend)
    assert predict(baseline, 30, "both")[0] == pytest.approx(level + trend * log_time(30))


def test_trend_never_points_to_harm():
    baseline = Baseline()
    for count in range(20):
        baseline = follow(baseline, count, -0.1 * count, 20.0)
    assert slope(baseline, "down") == 0.0
    assert slope(baseline, "up") < 0.0
    assert predict(baseline, 20, "down")[0] == pytest.approx(baseline.mean_value)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_false_alarms_stay_below_the_rate(correlation: float):
    found = sum(len(alarms(run(learning_curve(seed, 400, 0.01, correlation))[1])) for seed in range(25))
    # 10 000 points at 1 per 1000: 10 expected at most; 18 is beyond the 99th percentile of Poisson(10).
    assert found <= 18


def test_more_alarms_are_allowed_more_are_raised():
    strict, lenient = (
        sum(
            len(alarms(run(learning_curve(seed), dataclasses.replace(QUICK, false_alarms_per_1000=rate))[1]))
            for seed in range(15)
        )
        for rate in (0.3, 60.0)
    )
    assert strict < 8 < lenient


@pytest.mark.parametrize(("sign", "direction"), [(-1, "down"), (1, "up")])
def test_a_step_is_found_soon_with_its_direction_size_and_time(sign: int, direction: str):
    delays, kinds = [], []
    for seed in range(10):
        values = learning_curve(seed)
        values[200:] += sign * 0.06
        _, verdicts = run(values)
        first = next(i for i in alarms(verdicts, direction) if i >= 200)
        delays.append(first - 200)
        kinds.append(next(said.kind for said in verdicts[first + 1 :] if said.kind is not None and not said.alarm))
        assert verdicts[first].shift * sign == pytest.approx(6.0, abs=3.5)
        assert abs(verdicts[first].since - 200) <= 15
    assert np.median(delays) <= 3
    assert kinds.count("abrupt") >= 9, "as confirmed, 40 points after the alarm"


def test_one_outlier_is_no_alarm():
    values = learning_curve(3)
    values[150] -= 1.0
    _, verdicts = run(values)
    assert not any(140 <= i < 170 for i in alarms(verdicts))


def test_a_slow_decline_is_found_and_called_gradual_in_the_end():
    kinds = []
    for seed in range(8):
        values = learning_curve(seed, 350)
        values[150:] -= 0.12 * np.minimum(np.arange(200) / 120, 1.0)
        _, verdicts = run(values)
        kinds.append(next(said.kind for said in verdicts[150:] if said.kind is not None and not said.alarm))
    assert kinds.count("gradual") >= 6


def test_watch_comes_before_the_alarm():
    values = learning_curve(0)
    values[200:] -= 0.025
    _, verdicts = run(values)
    first = alarms(verdicts, "down")[0]
    assert verdicts[first - 1].degree == "watch"
    assert verdicts[first - 1].direction == "down"
    assert 0.0 < verdicts[first - 1].statistic <= 1.0


def test_a_season_is_learnt_and_raises_no_further_alarm():
    config, before, after = DetectorConfig(), 0, 0
    for seed in range(6):
        week = 0.02 * np.array([1.0, 0.5, 0.0, 0.0, 0.5, -1.0, -1.0])
        values = learning_curve(seed, 400) + week[np.arange(400) % 7]
        state, verdicts = run(values, config)
        learnt = next(i for i, said in enumerate(verdicts) if said.kind == "seasonal")
        assert len(state.season) == 7
        assert np.corrcoef(state.season, week)[0, 1] > 0.9
        before, after = before + learnt, after + len([i for i in alarms(verdicts) if i > learnt])
    assert before < 6 * 60
    assert after <= 3, "2 expected of 2000 points at 1 per 1000"


def test_a_fall_is_found_through_a_season():
    values = learning_curve(1, 300) + 0.02 * np.sin(2 * np.pi * np.arange(300) / 7)
    values[200:] -= 0.06
    _, verdicts = run(values, DetectorConfig())
    assert any(200 <= i < 208 for i in alarms(verdicts, "down"))


def test_find_period_prefers_the_shortest_and_holds_its_level():
    rng, clock = np.random.default_rng(0), np.arange(84)
    found = [
        find_period(clock, np.sin(2 * np.pi * clock / 6) + 0.5 * rng.standard_normal(84), longest=24, level=1e-3)
        for _ in range(10)
    ]
    assert found.count(6) >= 9
    false = 0
    for _ in range(100):
        noise = rng.standard_normal(84)
        for index in range(1, 84):
            noise[index] += 0.5 * noise[index - 1]
        false += find_period(clock, noise, longest=24, level=0.05) is not None
    assert false <= 12, "5 expected, 12 is beyond the 99.5th percentile"


def test_seasonal_profile_by_hand():
    clock = np.arange(30)
    profile = seasonal_profile(clock, np.tile([2.0, -1.0, -1.0], 10) + 0.5, 3)
    assert profile == pytest.approx((2.0, -1.0, -1.0), abs=0.1)


def test_kinds_by_least_squares_against_a_direct_search():
    rng, time = np.random.default_rng(0), np.arange(40.0)
    values = np.where(time < 25, 0.0, -1.0) + 0.3 * rng.standard_normal(40)
    errors = {}
    for kind in ("abrupt", "gradual"):
        for begin in range(2, 39):
            shape = (time >= begin) * 1.0 if kind == "abrupt" else np.maximum(time - begin + 1, 0.0)
            basis = np.stack([np.ones(40), time, shape], 1)
            errors[kind, begin] = np.linalg.lstsq(basis, values, rcond=None)[1][0]
    kind, begin = min(errors, key=errors.__getitem__)
    change = tell_apart(time, values)
    assert (change.kind, change.index) == (kind, begin)


def test_not_measured_is_skipped():
    values = learning_curve(0)
    values[200:] -= 0.06
    gaps = np.full(3 * len(values), np.nan)
    gaps[1::3] = values
    plain, sparse = run(values)[1], run(gaps)[1]
    assert [3 * i + 1 for i in alarms(plain)] == alarms(sparse)
    state, _ = run(values[:50])
    for missing in (math.nan, math.inf, -math.inf):
        after, verdict = update(state, missing, QUICK)
        assert after == state._replace(clock=state.clock + 1)
        assert verdict == DetectorVerdict()


@pytest.mark.parametrize("value", [0.0, 0.5, -1e30, 1e-200])
def test_a_constant_stream_is_quiet_and_its_fall_is_found(value: float):
    state, verdicts = run([value] * 100, DetectorConfig())
    assert not alarms(verdicts)
    _, verdicts = run([value - max(abs(value), 1.0)] * 10, DetectorConfig(), state)
    assert alarms(verdicts)[0] <= 4


def test_scale_of_the_stream_does_not_matter():
    values = learning_curve(5)
    values[200:] -= 0.05
    for factor in (2.0**-40, 2.0**40):
        assert alarms(run(values * factor)[1]) == alarms(run(values)[1])


def test_a_mirrored_stream_alarms_the_other_way():
    values = learning_curve(5)
    values[200:] -= 0.05
    up = dataclasses.replace(QUICK, harmful="up")
    assert alarms(run(values)[1], "down") == alarms(run(-values, up)[1], "up")


def test_state_goes_through_json_to_the_bit():
    config = DetectorConfig()
    values = learning_curve(2, 200) + 0.03 * (np.arange(200) % 7 == 0)
    values[150:] -= 0.05
    state, _ = run(values[:120], config)
    saved = json.loads(json.dumps(state))
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in zip(state._fields, saved, strict=True)}
    restored = DetectorState(**{**fields, "baseline": Baseline(*fields["baseline"])})
    assert restored == state
    assert run(values[120:], config, restored) == run(values[120:], config, state)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), max_size=80),
    repeats=st.integers(1, 3),
    harmful=st.sampled_from(["down", "up", "both"]),
)
def test_nothing_that_comes_in_breaks_it(values: list[float], repeats: int, harmful):
    config = DetectorConfig(harmful=harmful, longest_period=4, warm_up=5, confirmation=4)
    state, verdicts = run(values * repeats, config)
    flat = [number for part in state for number in (part if isinstance(part, tuple) else (part,))]
    assert all(isinstance(number, float) and math.isfinite(number) for number in flat)
    assert all(math.isfinite(said.shift) and math.isfinite(said.statistic) for said in verdicts)
    assert len(state.values) <= config.num_kept


@pytest.mark.parametrize(
    "change",
    [{"harmful": "sideways"}, {"false_alarms_per_1000": 0.0}, {"warm_up": 1}, {"clip": 0.2}, {"memory": math.nan}],
)
def test_what_is_not_allowed_is_named(change: dict):
    with pytest.raises(InvalidArgumentError, match=f"`{next(iter(change))}` must be"):
        DetectorConfig(**change)


def test_beats_adwin_on_its_own_residuals():
    drift = pytest.importorskip("river.drift")
    delays: dict[str, list[float]] = {"ours": [], "adwin": []}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        values = 0.01 * rng.standard_normal(300)
        values[200:] -= 0.03
        ours = [i for i in alarms(run(values)[1], "down") if i >= 200]
        adwin, theirs = drift.ADWIN(delta=0.002, clock=1), []
        for index, value in enumerate(values / 0.01):
            adwin.update(value)
            if adwin.drift_detected and index >= 200:
                theirs.append(index)
        delays["ours"].append(ours[0] - 199 if ours else math.inf)
        delays["adwin"].append(theirs[0] - 199 if theirs else math.inf)
    assert np.median(delays["ours"]) < np.median(delays["adwin"]) < math.inf
