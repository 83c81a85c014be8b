"""A detector of drift on a learning curve: detrended, standardised, whitened, and summed up by a two-sided CUSUM.

A learning curve rises and saturates, and its noise is correlated and shrinks; a detector that expects a constant mean
fires on every one. So each value y is compared with what a line in log time expected (`baseline`):

    e = (y - season - ŷ) / √(1 + leverage)          recursive residual
    z = clip((e - ρ e') / (σ √(1 - ρ²)), ±c)        whitened and standardised; σ², ρ are running, bounded estimates
    S⁺ ← max(0, S⁺ + z - k),  S⁻ ← max(0, S⁻ - z - k),  alarm where either exceeds h

(Page, "Continuous inspection schemes", 1954; recursive residuals are those of Brown, Durbin & Evans, "Techniques for
testing the constancy of regression relationships over time", 1975.) A change began where the sum last was 0.

`init` and `update` are pure; the state is plain floats and tuples of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.safety.drift.baseline import Baseline, Harmful, follow, log_time, predict
from metalearn.safety.drift.change import Kind, tell_apart
from metalearn.safety.drift.seasons import CYCLES, find_period, seasonal_profile
from metalearn.safety.drift.thresholds import cusum_threshold

Degree = Literal["none", "watch", "drift", "severe"]
Direction = Literal["up", "down"]

WATCH_RATE = 10.0
"""`watch` begins at the threshold that noise alone passes so many times as often as that of an alarm."""
_LARGEST = 1e100
"""Larger values are cut to it, so that no square of one is infinite."""
_SMALLEST_SHARE = 1e-6
"""Least noise, as a share of the level: metrics computed in float32 differ that much for no reason."""
_BOUND = 2.0
"""Residuals count in the running estimates up to so many standard deviations: a change must not hide itself."""
_BOUNDED_SQUARE = 0.9205
"""E min(z², 2²) of a standard normal z."""
_SMALLEST_MEMORY = 4.0
_AT_ONCE = 6.0
"""A change that needs so few points to an alarm is abrupt until more are known: no fit tells on so few."""
_SMALLEST_REGIME = 12
"""Points of a regime before a season is looked for."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What a detector expects of its stream.

    The defaults were chosen on simulated learning curves (`scripts/bench_drift.py`, the seeds it calls tuning).

    Args:
      harmful: which way of the stream is harm: `down` (a validation metric), `up` (a loss) or `both`. The trend is not
        allowed to follow that way, which is what makes slow harm visible; alarms are raised both ways.
      false_alarms_per_1000: alarms to accept per 1000 points at which nothing changed, in (0, 100].
      reference: k of the CUSUM, above 0, in standard deviations: shifts beyond 2k are found fastest.
      margin: by which share noise may be wider than estimated before false alarms exceed the rate, at least 0.
      warm_up: points before the first verdict, at least 4.
      memory: points that the baseline remembers at most, at least 4. It remembers fewer early on: the `growth`-th part
        of those seen, because early parts of a curve say little about later ones.
      growth: at least 1; see `memory`.
      scale_memory: points that the estimates of noise remember, at least 4.
      clip: c, above k: most that one point adds, so that one outlier is no alarm.
      severe_shift: standard deviations from which a shift is severe.
      confirmation: points after an alarm at which its kind is judged again, at least 4.
      longest_period: longest season to look for, in updates (a week of days is 7); 0 looks for none.
      season_rate: share of a residual that the season learns, in [0, 1].
      season_level: chance of a season that is none, at each of the looks for one, in (0, 1).

    Raises:
      InvalidArgumentError: a value out of its range.
    """

    harmful: Harmful = "down"
    false_alarms_per_1000: float = 1.0
    reference: float = 0.5
    margin: float = 0.15
    warm_up: int = 10
    memory: float = 120.0
    growth: float = 8.0
    scale_memory: float = 120.0
    clip: float = 3.5
    severe_shift: float = 6.0
    confirmation: int = 40
    longest_period: int = 28
    season_rate: float = 0.15
    season_level: float = 1e-3

    def __post_init__(self) -> None:
        if self.harmful not in get_args(Harmful):
            raise InvalidArgumentError(f"`harmful` must be one of {get_args(Harmful)}, got {self.harmful!r}")
        for name, low, high in (
            ("false_alarms_per_1000", 1e-6, 100.0),
            ("reference", 0.01, 3.0),
            ("margin", 0.0, 5.0),
            ("warm_up", 4, 10_000),
            ("memory", _SMALLEST_MEMORY, 1e9),
            ("growth", 1.0, 1e9),
            ("scale_memory", _SMALLEST_MEMORY, 1e9),
            ("clip", self.reference + 0.1, 100.0),
            ("severe_shift", 0.0, 1e9),
            ("confirmation", 4, 10_000),
            ("longest_period", 0, 1000),
            ("season_rate", 0.0, 1.0),
            ("season_level", 1e-12, 0.5),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidArgumentError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r}")

    @property
    def num_kept(self) -> int:
        """Values that a state keeps, to find seasons and to tell kinds of change apart."""
        return max((CYCLES + 1) * self.longest_period, 4 * self.confirmation)


class DetectorState(NamedTuple):
    """All that a detector knows; plain floats."""

    clock: float = 0.0
    """updates so far, those without a measurement included"""
    count: float = 0.0
    """values measured so far"""
    fresh: float = 0.0
    """values measured since the baseline began"""
    baseline: Baseline = Baseline()
    square: float = 0.0
    """σ², running mean of bounded squares of residuals"""
    product: float = 0.0
    """ρσ², of products of successive ones"""
    scale_weight: float = 0.0
    residual: float = 0.0
    """the last one, bounded"""
    up: float = 0.0
    """S⁺"""
    down: float = 0.0
    """S⁻"""
    up_since: float = 0.0
    """clock at which S⁺ last left 0"""
    down_since: float = 0.0
    regime: float = 0.0
    """clock at which what the baseline describes began"""
    before: float = 0.0
    """clock at which the regime before the last change began"""
    unconfirmed: float = 0.0
    """values still to come before the kind of the last change is judged again"""
    ticks: tuple[float, ...] = ()
    """clock of each of the `values`"""
    values: tuple[float, ...] = ()
    """the last `DetectorConfig.num_kept`"""
    season: tuple[float, ...] = ()
    """what is subtracted at each phase of the clock; empty without a season"""


class DetectorVerdict(NamedTuple):
    """What a detector says after one value."""

    degree: Degree = "none"
    alarm: bool = False
    """a change is reported, now and only now"""
    kind: Kind | None = None
    """of a change that is reported or confirmed, or of a season just learnt"""
    direction: Direction | None = None
    since: float | None = None
    """clock of the first point after the change, where the CUSUM left 0"""
    shift: float = 0.0
    """size of the change, in standard deviations of the noise"""
    statistic: float = 0.0
    """CUSUM relative to the threshold of an alarm"""


def init(config: DetectorConfig) -> DetectorState:
    """Return the state before the first value.

    >>> config = DetectorConfig()
    >>> state, rng = init(config), np.random.default_rng(2)
    >>> for step in range(120):
    ...     rising = 0.3 - 0.2 / (1 + step / 10) + 0.002 * rng.standard_normal()
    ...     state, verdict = update(state, rising - 0.01 * (step >= 100), config)
    ...     if verdict.alarm:
    ...         print(step, verdict.direction, verdict.kind, int(verdict.since))
    102 down abrupt 100
    """
    return DetectorState()


def noise_scale(state: DetectorState) -> float:
    """Return σ, the standard deviation of the noise of one point, in the unit of the stream."""
    return max(math.sqrt(state.square), _SMALLEST_SHARE * abs(state.baseline.mean_value), 1e-150)


def noise_correlation(state: DetectorState) -> float:
    """Return ρ, the correlation of the noise of successive points, in [0, 0.9]."""
    return min(max(state.product / state.square, 0.0), 0.9) if state.square > 1e-290 else 0.0


def update(state: DetectorState, value: float, config: DetectorConfig) -> tuple[DetectorState, DetectorVerdict]:
    """Take one value of the stream.

    Args:
      state: from `init` or from the update before.
      value: the next; NaN was not measured, and moves nothing but the clock. So does an infinite one: that a run
        diverged is not for statistics to find out.
      config: the same at each update.

    Returns:
      The next state, and the verdict. After an alarm the baseline begins anew from the points after the change, so
      that a change is reported once; `confirmation` points later its kind is reported again, from more evidence.
    """
    if not math.isfinite(value):
        return state._replace(clock=state.clock + 1.0), DetectorVerdict()
    value = min(max(float(value), -_LARGEST), _LARGEST)
    kept = config.num_kept
    state = state._replace(ticks=(*state.ticks, state.clock)[-kept:], values=(*state.values, value)[-kept:])
    phase = int(state.clock) % len(state.season) if state.season else 0
    state, residual, z = _absorb(state, value - (state.season[phase] if state.season else 0.0), config)
    state = _learn_season(state, phase, residual, config)._replace(count=state.count + 1.0)
    state = _accumulate(state, z, config)._replace(clock=state.clock + 1.0)

    threshold = cusum_threshold(config.false_alarms_per_1000, config.reference, config.margin)
    statistic = max(state.up, state.down) / max(threshold, 1e-9)
    looks = config.longest_period >= 2 and (statistic > 1.0 or state.count % config.longest_period == 0)
    seasonal = _with_new_season(state, config) if looks else None
    if seasonal is not None:
        return seasonal, DetectorVerdict("watch", kind="seasonal", since=seasonal.regime, statistic=statistic)
    if statistic > 1.0:
        return _alarm(state, statistic, config)
    if state.unconfirmed > 0.0:
        state = state._replace(unconfirmed=state.unconfirmed - 1.0)
        if state.unconfirmed == 0.0:
            return state, _confirmation(state, statistic, config)
    return state, _quiet(state, statistic, threshold, config)


def _absorb(state: DetectorState, value: float, config: DetectorConfig) -> tuple[DetectorState, float, float]:
    """Compares a value with the baseline, then lets baseline and noise follow; returns also e, bounded, and z."""
    expected, width = predict(state.baseline, state.count, config.harmful)
    started = state.baseline.weight > 0.0
    residual = (value - expected) / width if started else 0.0
    sigma, rho = noise_scale(state), noise_correlation(state)
    z, bounded, expectation = 0.0, residual, 1.0
    if state.fresh >= config.warm_up:
        z = (residual - rho * state.residual) / (sigma * math.sqrt(1.0 - rho * rho))
        z = min(max(z, -config.clip), config.clip)
        bounded = min(max(residual, -_BOUND * sigma), _BOUND * sigma)
        expectation = _BOUNDED_SQUARE
    memory = min(max(state.count / config.growth, _SMALLEST_MEMORY), config.memory)
    followed = expected + bounded * width if started else value
    square, product, weight = state.square, state.product, state.scale_weight
    if state.fresh >= 2.0:  # the line has no residual at its first two points
        weight = min(weight + 1.0, config.scale_memory)
        square += (bounded * bounded / expectation - square) / weight
        product += (bounded * state.residual / expectation - product) / weight
    state = state._replace(
        baseline=follow(state.baseline, state.count, followed, memory),
        square=square,
        product=product,
        scale_weight=weight,
        residual=bounded,
        fresh=state.fresh + 1.0,
    )
    return state, bounded, z


def _learn_season(state: DetectorState, phase: int, residual: float, config: DetectorConfig) -> DetectorState:
    if not state.season:
        return state
    learnt = state.season[phase] + config.season_rate * residual
    return state._replace(season=(*state.season[:phase], learnt, *state.season[phase + 1 :]))


def _accumulate(state: DetectorState, z: float, config: DetectorConfig) -> DetectorState:
    return state._replace(
        up=max(0.0, state.up + z - config.reference),
        down=max(0.0, state.down - z - config.reference),
        up_since=state.up_since if state.up > 0.0 else state.clock,
        down_since=state.down_since if state.down > 0.0 else state.clock,
    )


def _points_since(state: DetectorState, clock: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns clock and value, less the season, of the kept points from a clock on."""
    ticks, values = np.array(state.ticks), np.array(state.values)
    if state.season:
        values = values - np.array(state.season)[ticks.astype(np.int64) % len(state.season)]
    inside = ticks >= clock
    return ticks[inside], values[inside]


def _restart(state: DetectorState, since: float, config: DetectorConfig) -> DetectorState:
    """Begins a regime with the points that are already from it; what is known of the noise counts as a warm-up."""
    _, values = _points_since(state, since)
    begun = state._replace(
        baseline=Baseline(),
        fresh=0.0,
        residual=0.0,
        up=0.0,
        down=0.0,
        regime=since,
        scale_weight=min(state.scale_weight, float(config.warm_up)),
    )
    for index, value in enumerate(values.tolist()):
        begun, _, _ = _absorb(begun._replace(count=state.count - len(values) + index), value, config)
    return begun._replace(count=state.count)


def _with_new_season(state: DetectorState, config: DetectorConfig) -> DetectorState | None:
    """Returns the state that has learnt a season, None if there is none, or none but that already known."""
    inside = np.array(state.ticks) >= state.regime
    ticks, values = np.array(state.ticks)[inside], np.array(state.values)[inside]
    if len(ticks) < _SMALLEST_REGIME:
        return None
    period = find_period(ticks, values, longest=config.longest_period, level=config.season_level)
    if period is None or period == len(state.season):
        return None
    season = seasonal_profile(ticks, values, period)
    # The season was taken for noise until now: what was known of the noise is forgotten.
    state = state._replace(season=season, square=0.0, product=0.0, scale_weight=0.0)
    return _restart(state, float(ticks[0]), config)


def _alarm(state: DetectorState, statistic: float, config: DetectorConfig) -> tuple[DetectorState, DetectorVerdict]:
    rising = state.up > state.down
    since = state.up_since if rising else state.down_since
    # Alarms that follow before the first is confirmed are of one change: a slow one passes several thresholds.
    before = state.before if state.unconfirmed > 0.0 else state.regime
    kind, shift = _kind_of_change(state, before, since, config)
    if state.clock - since <= _AT_ONCE:
        kind = "abrupt"
    state = _restart(state, since, config)._replace(before=before, unconfirmed=float(config.confirmation))
    degree: Degree = "severe" if abs(shift) >= config.severe_shift else "drift"
    return state, DetectorVerdict(degree, True, kind, "up" if rising else "down", since, shift, statistic)


def _confirmation(state: DetectorState, statistic: float, config: DetectorConfig) -> DetectorVerdict:
    kind, shift = _kind_of_change(state, state.before, state.regime, config)
    direction: Direction = "up" if shift > 0.0 else "down"
    degree: Degree = "severe" if abs(shift) >= config.severe_shift else "drift"
    return DetectorVerdict(degree, False, kind, direction, state.regime, shift, statistic)


def _kind_of_change(state: DetectorState, before: float, since: float, config: DetectorConfig) -> tuple[Kind, float]:
    # Near the change a learning curve is a line in log time; far from it, its bend would pass for a gradual change.
    ticks, values = _points_since(state, max(before, since - 2.0 * config.confirmation))
    if len(ticks) < 4:
        return "abrupt", 0.0
    time = np.array([log_time(tick) for tick in ticks])
    change = tell_apart(time, values, harmful=config.harmful)
    return change.kind, change.shift / noise_scale(state)


def _quiet(state: DetectorState, statistic: float, threshold: float, config: DetectorConfig) -> DetectorVerdict:
    rate = min(WATCH_RATE * config.false_alarms_per_1000, 500.0)
    if statistic * threshold <= cusum_threshold(rate, config.reference, config.margin):
        return DetectorVerdict(statistic=statistic)
    rising = state.up > state.down
    since = state.up_since if rising else state.down_since
    return DetectorVerdict("watch", direction="up" if rising else "down", since=since, statistic=statistic)
