"""Watches the profiles of successive windows of interactions: which meta-features moved, since when, and how.

A window is what came in during a day, say; `profile_domain` makes a row of meta-features of it. The last
`current_windows` rows are compared with those before, season removed; where they differ, the rows are projected on the
direction in which they moved, and that one series tells a step from a slope from a season.

Shape legend: W windows, F meta-features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.profiles.domain_profile import DomainProfile
from metalearn.safety.drift.change import Kind, tell_apart
from metalearn.safety.drift.look import Look, look
from metalearn.safety.drift.multiple_testing import level_of_look
from metalearn.safety.drift.seasons import CYCLES, find_period, phase_means

_SEASON_LEVEL = 1e-3
"""Chance of a season that is none, at each look for one."""
SIZES = frozenset({"log_num_users", "log_num_items", "log_num_interactions"})


@dataclass(frozen=True, kw_only=True)
class ProfileWatchConfig:
    """How the profiles of windows are compared.

    Args:
      false_alarms_per_1000: alarms to accept per 1000 windows in which nothing changed, in (0, 100].
      reference_windows: windows before the first look, at least 8; the joint test needs some twenty for a level of one
        in a thousand, as it can only permute whole windows.
      current_windows: windows that are compared with those before, at least 2.
      kept_windows: most to remember, at least reference and current ones together.
      confirmation: windows after an alarm at which its kind is judged again, at least 2.
      severe_size: standard deviations from window to window from which a meta-feature has moved severely.
      longest_period: longest season to look for, in windows; 0 looks for none.
      seed: of the permutations.

    Raises:
      InvalidArgumentError: a value out of its range.
    """

    false_alarms_per_1000: float = 1.0
    reference_windows: int = 20
    current_windows: int = 4
    kept_windows: int = 64
    confirmation: int = 8
    severe_size: float = 6.0
    longest_period: int = 14
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("false_alarms_per_1000", 1e-6, 100.0),
            ("reference_windows", 8, 10_000),
            ("current_windows", 2, 10_000),
            ("kept_windows", self.reference_windows + self.current_windows, 100_000),
            ("confirmation", 2, self.kept_windows - self.current_windows - 4),
            ("severe_size", 0.0, 1e9),
            ("longest_period", 0, 1000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidArgumentError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r}")


class ProfileWatchState(NamedTuple):
    """What is remembered of the windows so far."""

    clock: int = 0
    """windows so far"""
    rows: tuple[tuple[float, ...], ...] = ()
    """the last windows of this regime; NaN where a meta-feature is undefined"""
    period: int = 0
    """of the season that is removed, 0 for none"""
    unconfirmed: int = 0
    """windows still to come before the kind of the last change is judged again"""


class ProfileVerdict(NamedTuple):
    """What the last window says."""

    alarm: bool = False
    """a change is reported, now and only now"""
    kind: Kind | None = None
    since: int | None = None
    """clock of the first window after the change"""
    size: float = 0.0
    """median of the moved meta-features' differences, in standard deviations from window to window"""
    moved: tuple[int, ...] = ()
    """meta-features that moved, the furthest first; empty where only the joint test saw it"""
    period: int = 0


def profile_row(profile: DomainProfile) -> tuple[float, ...]:
    """Returns [F] the meta-features of one window, NaN where undefined.

    Sizes are left out (NaN): a window holds more or less for reasons that are not drift, such as where it was cut.
    """
    names = np.array([name in SIZES for name in profile.names])
    return tuple(np.where(profile.mask & ~names, profile.values, np.nan).tolist())


def watch_profile(
    state: ProfileWatchState, row: tuple[float, ...], config: ProfileWatchConfig
) -> tuple[ProfileWatchState, ProfileVerdict]:
    """Take the meta-features of the next window.

    Args:
      state: `ProfileWatchState()`, or from the window before.
      row: [F] from `profile_row`; the same meta-features at each window.
      config: the same at each window.

    Returns:
      The next state, and the verdict. A season, once found, is removed from then on and raises no alarm. After an alarm
      there is no look for `confirmation` windows; then kind, time and size are reported again, from more evidence, and
      the windows since the change become the reference.

    Raises:
      InvalidArgumentError: the row has another length than those before.
    """
    if state.rows and len(row) != len(state.rows[0]):
        raise InvalidArgumentError(f"`row` must have {len(state.rows[0])} meta-features as before, got {len(row)}")
    rows = (*state.rows, tuple(map(float, row)))[-config.kept_windows :]
    state = state._replace(clock=state.clock + 1, rows=rows)
    if state.unconfirmed:
        state = state._replace(unconfirmed=state.unconfirmed - 1)
        return _confirm(state, config) if state.unconfirmed == 0 else (state, ProfileVerdict())
    if len(rows) < config.reference_windows + config.current_windows:
        return state, ProfileVerdict()
    if not state.period and config.longest_period >= 2 and state.clock % config.longest_period == 0:
        period = _period(_main_direction(np.array(rows)), state, config)
        if period:
            return state._replace(period=period), ProfileVerdict(kind="seasonal", period=period)
    found = _compare(state, config.current_windows, config)
    if not found.significant:
        return state, ProfileVerdict()
    series = _along_change(state, len(rows) - config.current_windows)
    period = 0 if state.period else _period(series, state, config)
    if period:
        # Whether something moved besides is for the next window to say, with the season removed.
        return state._replace(period=period), ProfileVerdict(kind="seasonal", period=period)
    kind, since = _change(series, state)
    return state._replace(unconfirmed=config.confirmation), ProfileVerdict(True, kind, since, *_moved(found))


def _moved(found: Look) -> tuple[float, tuple[int, ...]]:
    order = np.argsort(-np.nan_to_num(np.abs(found.size)))
    moved = tuple(int(index) for index in order if found.rejected[index])
    return (float(np.median(np.abs(found.size[list(moved)]))) if moved else 0.0), moved


def _compare(state: ProfileWatchState, num_current: int, config: ProfileWatchConfig) -> Look:
    rows = _without_season(state, num_current)
    return look(
        rows[:-num_current],
        rows[-num_current:],
        level=level_of_look(config.false_alarms_per_1000),
        marginal="mean",
        seed=config.seed + state.clock,
    )


def _confirm(state: ProfileWatchState, config: ProfileWatchConfig) -> tuple[ProfileWatchState, ProfileVerdict]:
    split = len(state.rows) - config.confirmation - config.current_windows // 2
    kind, since = _change(_along_change(state, split), state)
    size, moved = _moved(_compare(state, state.clock - since, config))
    state = state._replace(rows=state.rows[since - state.clock :])
    return state, ProfileVerdict(False, kind, since, size, moved)


def _change(series: np.ndarray, state: ProfileWatchState) -> tuple[Kind, int]:
    change = tell_apart(np.arange(len(series), dtype=np.float64), series, trend=False)
    return change.kind, state.clock - len(series) + change.index


def _without_season(state: ProfileWatchState, num_current: int) -> np.ndarray:
    """Returns [W, F] rows less the season, which is that of all but the current windows."""
    rows = np.array(state.rows)
    known = slice(0, len(rows) - num_current)
    if not state.period or known.stop < CYCLES * state.period:
        return rows
    phase = (state.clock - len(rows) + np.arange(len(rows))) % state.period
    seasons = np.stack([phase_means(phase[known], column[known], state.period) for column in rows.T], axis=1)
    return rows - seasons[phase] + rows[known].mean(0)


def _along_change(state: ProfileWatchState, split: int) -> np.ndarray:
    """Returns [W] how far each window lies in the direction in which those after the split moved."""
    rows = _standard(_without_season(state, len(state.rows) - split), split)
    return rows @ rows[split:].mean(0)


def _main_direction(rows: np.ndarray) -> np.ndarray:
    """Returns [W] how far each window lies along the first principal component: a strong season is most of it."""
    standard = _standard(rows, len(rows))
    if standard.shape[1] == 0:
        return np.zeros(len(rows))
    left, size, _ = np.linalg.svd(standard, full_matrices=False)
    return left[:, 0] * size[0]


def _standard(rows: np.ndarray, num_reference: int) -> np.ndarray:
    """Returns the defined, varying meta-features in deviations of the first rows from their mean."""
    rows = rows[:, np.isfinite(rows).all(0)]
    middle, spread = rows[:num_reference].mean(0), rows[:num_reference].std(0)
    varying = spread > 1e-9 * np.maximum(np.abs(middle), 1e-300)
    return (rows[:, varying] - middle[varying]) / spread[varying]


def _period(series: np.ndarray, state: ProfileWatchState, config: ProfileWatchConfig) -> int:
    if config.longest_period < 2:
        return 0
    clock = np.arange(state.clock - len(series), state.clock)
    return find_period(clock, series, longest=config.longest_period, level=_SEASON_LEVEL) or 0
