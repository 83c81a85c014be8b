"""DriftMonitor: one place that watches streams, profiles of windows and samples, and shares one budget among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.profiles.domain_profile import DomainProfile
from metalearn.safety.drift import detector
from metalearn.safety.drift.baseline import Baseline, Harmful
from metalearn.safety.drift.detector import DetectorConfig, DetectorState, DetectorVerdict
from metalearn.safety.drift.look import look
from metalearn.safety.drift.multiple_testing import level_of_look
from metalearn.safety.drift.profile_watch import (
    ProfileVerdict,
    ProfileWatchConfig,
    ProfileWatchState,
    profile_row,
    watch_profile,
)
from metalearn.safety.drift.report import DriftReport, worst
from metalearn.safety.drift.response import Loosening

KEPT_SAMPLES = 2000
"""Rows of a reference window that are kept; the first look chooses them by the seed."""
MOVED_MUCH = 0.25
"""Population stability index from which samples have moved severely (Siddiqi, "Credit risk scorecards", 2006)."""
OUTLYING = 3.0
"""Standard deviations by which a value must lie to the worse to be outlying."""


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """How a monitor watches.

    Args:
      false_alarms_per_1000: alarms to accept, over all that is watched, per 1000 points (of every stream, window or
        look) at which nothing changed, in (0, 100]. Each of n gets the n-th part: rates add up, however much the
        streams depend on each other (Bonferroni).
      detector: of streams; direction and rate are set by the monitor.
      profiles: of profiles; the rate is set by the monitor.
      loosening: the lead that a policy gets where that is the response.
      seed: of permutations and of the reference's sample.
    """

    false_alarms_per_1000: float = 1.0
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    profiles: ProfileWatchConfig = field(default_factory=ProfileWatchConfig)
    loosening: Loosening = field(default_factory=Loosening)
    seed: int = 0


class DriftMonitor:
    """Watch named streams, profiles of successive windows, and windows of samples.

    Args:
      streams: name to the way that is harm: `down` for a validation metric, `up` for a loss, `both` for other signals.
      profiles: names of domains whose windows are profiled, one `DomainProfile` a window.
      samples: names of tables, one window of rows a look; the first window is the reference.
      config: the budget of false alarms, and how each is watched.

    Raises:
      InvalidArgumentError: nothing to watch, a name twice, or a value out of its range.

    Example:
      >>> monitor = DriftMonitor(streams={"ndcg": "down"})
      >>> rng = np.random.default_rng(0)
      >>> for step in range(120):
      ...     report = monitor.observe({"ndcg": (0.2 if step < 100 else 0.18) + 0.002 * rng.standard_normal()})
      ...     if report.new:
      ...         print(step, report.degree, report.kind, report.response)
      101 severe abrupt roll_back
    """

    def __init__(
        self,
        *,
        streams: Mapping[str, Harmful] | None = None,
        profiles: Iterable[str] = (),
        samples: Iterable[str] = (),
        config: DriftConfig | None = None,
    ) -> None:
        self.config = config or DriftConfig()
        ways, profiled, sampled = dict(streams or {}), tuple(profiles), tuple(samples)
        names = [*ways, *profiled, *sampled]
        if not names or len(set(names)) < len(names):
            raise InvalidArgumentError(
                f"a monitor needs something to watch, each under a name of its own, got {names}; name a stream"
            )
        share = self.config.false_alarms_per_1000 / len(names)
        self._level = level_of_look(share)
        self._detectors = {
            name: replace(self.config.detector, harmful=way, false_alarms_per_1000=share) for name, way in ways.items()
        }
        self._watch = replace(self.config.profiles, false_alarms_per_1000=share, seed=self.config.seed)
        self._streams = {name: detector.init(config) for name, config in self._detectors.items()}
        self._profiles = {name: ProfileWatchState() for name in profiled}
        self._samples: dict[str, tuple[int, np.ndarray | None]] = {name: (0, None) for name in sampled}
        self.outlying: frozenset[str] = frozenset()
        """Streams whose last value lay far to the worse: no alarm yet, but no state to call good and go back to."""

    def observe(self, values: Mapping[str, float]) -> DriftReport:
        """Take the next value of some streams; return the worst that they say.

        Args:
          values: name to value; NaN for what was not measured. A stream left out is not moved at all.

        Raises:
          InvalidArgumentError: a name that is not a stream of this monitor.
        """
        reports = []
        for name, value in values.items():
            _known(name, self._streams, "stream")
            config, before = self._detectors[name], self._streams[name]
            self._streams[name], verdict = detector.update(before, float(value), config)
            lies_out = (
                _rise(before, self._streams[name], config.harmful) >= min(OUTLYING, config.clip) - config.reference
            )
            self.outlying = self.outlying | {name} if lies_out else self.outlying - {name}
            reports.append(_of_stream(name, verdict, config.harmful))
        return worst(reports)

    def observe_profile(self, name: str, profile: DomainProfile) -> DriftReport:
        """Take the profile of the next window of interactions.

        Raises:
          InvalidArgumentError: a name that is not a profile of this monitor.
        """
        _known(name, self._profiles, "profile")
        self._profiles[name], verdict = watch_profile(self._profiles[name], profile_row(profile), self._watch)
        return _of_profile(name, verdict, profile.names, self._watch.severe_size)

    def observe_samples(self, name: str, rows: np.ndarray, features: Sequence[str]) -> DriftReport:
        """Take a window of samples; compare it with the first one, or with that of the last alarm.

        Args:
          name: of the table.
          rows: [N, F], at least 4 of them; numbers that describe an interaction, such as the rank of its item, never
            ids. They are kept in the state.
          features: [F] names.

        Raises:
          InvalidArgumentError: a name that is not a table of this monitor, or rows that do not match the features.
        """
        _known(name, self._samples, "table of samples")
        rows = np.asarray(rows, np.float64)
        count, reference = self._samples[name]
        if rows.ndim != 2 or len(rows) < 4 or rows.shape[1] != len(features):
            raise InvalidArgumentError(
                f"`rows` must be at least 4 rows of {len(features)} features, got shape {rows.shape}"
            )
        if reference is None:
            self._samples[name] = (1, self._thinned(rows))
            return DriftReport()
        found = look(reference, rows, level=self._level, marginal="stability", seed=self.config.seed + count)
        self._samples[name] = (count + 1, self._thinned(rows) if found.significant else reference)
        if not found.significant:
            return DriftReport()
        size = float(found.size.max())
        order = [str(features[index]) for index in np.argsort(-found.size).tolist() if found.rejected[index]]
        return DriftReport(
            degree="severe" if size >= MOVED_MUCH and order else "drift",
            harmful=True,
            stream=name,
            since=count,
            size=size,
            new=True,
            sentence=f"{name}: window {count} differs from the reference {_named(order)} (stability index {size:.2f})",
        )

    def _thinned(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) <= KEPT_SAMPLES:
            return rows.copy()
        return rows[np.random.default_rng(self.config.seed).choice(len(rows), KEPT_SAMPLES, replace=False)]

    def state_dict(self) -> dict[str, Any]:
        """Return all that the monitor knows, as plain numbers, lists and dicts; it shares nothing with the monitor."""
        return {
            "config": asdict(self.config),
            "streams": {name: _plain(state) for name, state in self._streams.items()},
            "profiles": {
                name: {"clock": state.clock, "rows": [[*row] for row in state.rows]}
                | {"period": state.period, "unconfirmed": state.unconfirmed}
                for name, state in self._profiles.items()
            },
            "samples": {
                name: {"clock": count, "reference": None if rows is None else rows.tolist()}
                for name, (count, rows) in self._samples.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the monitor that gave the state was: the same values then give the same reports to the bit.

        Raises:
          SessionError: the state is of a monitor that watches something else, or with another configuration.
        """
        mine = self.state_dict()
        for part in ("config", "streams", "profiles", "samples"):
            given, own = state.get(part), mine[part]
            same = given == own if part == "config" else isinstance(given, Mapping) and set(given) == set(own)
            if not same:
                raise SessionError(
                    f"the state's `{part}` are {given if part == 'config' else sorted(given or ())}, this monitor's "
                    f"{own if part == 'config' else sorted(own)}; make the monitor as it was when the state was saved"
                )
        self._streams = {name: _detector_state(state["streams"][name]) for name in self._streams}
        self._profiles = {
            name: ProfileWatchState(**{**saved, "rows": tuple(map(tuple, saved["rows"]))})
            for name, saved in ((name, state["profiles"][name]) for name in self._profiles)
        }
        self._samples = {
            name: (int(saved["clock"]), None if saved["reference"] is None else np.array(saved["reference"]))
            for name, saved in ((name, state["samples"][name]) for name in self._samples)
        }


def _known(name: str, watched: Mapping[str, Any], what: str) -> None:
    if name not in watched:
        raise InvalidArgumentError(f"{name!r} is not a {what} of this monitor, which watches {sorted(watched)}")


def _rise(before: DetectorState, after: DetectorState, harmful: Harmful) -> float:
    """Returns by how much the harmful side's CUSUM rose: the last value's distance, less the reference."""
    rises = {"up": after.up - before.up, "down": after.down - before.down}
    return max(rises.values()) if harmful == "both" else rises[harmful]


def _plain(state: DetectorState) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in state._asdict().items()}


def _detector_state(saved: Mapping[str, Any]) -> DetectorState:
    fields = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in saved.items()}
    return DetectorState(**{**fields, "baseline": Baseline(*fields["baseline"])})


def _of_stream(name: str, verdict: DetectorVerdict, harmful: Harmful) -> DriftReport:
    if verdict.degree == "none":
        return DriftReport()
    since = None if verdict.since is None else int(verdict.since)
    harm = verdict.kind != "seasonal" and (harmful == "both" or verdict.direction == harmful)
    if verdict.kind == "seasonal":
        sentence = f"{name}: repeats itself; the season is learnt and removed from now on"
    elif verdict.kind is None:
        sentence = f"{name}: {verdict.direction} since update {since} more than noise often is"
    else:
        how = "at once" if verdict.kind == "abrupt" else "gradually"
        sentence = f"{name}: {verdict.direction} {how} since update {since}, by {abs(verdict.shift):.1f} σ of its noise"
    return DriftReport(
        degree=verdict.degree,
        kind=verdict.kind,
        direction=verdict.direction,
        harmful=harm,
        stream=name,
        since=since,
        size=verdict.shift if math.isfinite(verdict.shift) else 0.0,
        new=verdict.alarm,
        sentence=sentence,
    )


def _of_profile(name: str, verdict: ProfileVerdict, features: Sequence[str], severe_size: float) -> DriftReport:
    if verdict.kind == "seasonal":
        sentence = f"{name}: repeats itself every {verdict.period} windows; the season is removed from now on"
        return DriftReport(degree="watch", kind="seasonal", stream=name, sentence=sentence)
    if verdict.kind is None:
        return DriftReport()
    how = "at once" if verdict.kind == "abrupt" else "gradually"
    moved = _named([features[index] for index in verdict.moved])
    return DriftReport(
        degree="severe" if verdict.size >= severe_size else "drift",
        kind=verdict.kind,
        harmful=True,
        stream=name,
        since=verdict.since,
        size=verdict.size,
        new=verdict.alarm,
        sentence=f"{name}: moved {how} since window {verdict.since} {moved}",
    )


def _named(features: Sequence[str]) -> str:
    more = f" and {len(features) - 3} more" if len(features) > 3 else ""
    return f"in {', '.join(features[:3])}{more}" if features else "as a whole, no feature by itself"
