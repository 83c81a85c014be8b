"""Activity: how much each user does, when each comes and goes, and the stages of a lifetime.

Shape legend: U users, P stages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.simulated.calendar import draw_times
from envs.simulated.prior import SimulatedParams

_FEWEST = 3


class Activity(NamedTuple):
    """What users do when, before it is known what they take."""

    counts: np.ndarray
    """int64 [U], distinct items wanted."""
    edges: np.ndarray
    """float64 [U, P + 1], share of the time span at which the stages of a lifetime begin, and the last one ends."""


def draw_activity(params: SimulatedParams, drift_time: float, rng: np.random.Generator) -> Activity:
    """Draw counts and lifetimes.

    Args:
        params: of the domain.
        drift_time: share of the time span at which an abrupt drift happens, NaN for none; a stage of each lifetime that
            it falls into ends there.
        rng: generator.
    """
    cold = rng.random(params.users) < params.cold_users
    counts = np.where(cold, max(params.min_history, _FEWEST), _counts(params, rng))
    life = np.exp(np.log(params.lifetime) + params.lifetime_std * rng.standard_normal(params.users))
    life = np.where(cold, np.minimum(life, 0.05), np.minimum(life, 1.0))
    arrival = rng.random(params.users) ** np.exp(-params.growth)
    first = np.where(cold, 0.9 + (0.1 - life) * arrival, (1.0 - life) * arrival)
    # Seasons of arrivals: a user whose whole life is an evening must be able to come in the evening.
    reach = np.minimum(0.01, 1.0 - life - first).clip(0.0)
    start = draw_times(first, first + reach, params, rng)
    stages = max(params.periods, 2) if np.isfinite(drift_time) else params.periods
    edges = start[:, None] + life[:, None] * np.linspace(0.0, 1.0, stages + 1)
    if np.isfinite(drift_time):
        _cut(edges, drift_time)
    return Activity(counts=counts, edges=edges)


def _counts(params: SimulatedParams, rng: np.random.Generator) -> np.ndarray:
    """Pairs of each user: the minimum and log-normal more, at most 80 % of the items that a user sees."""
    seen = params.exposure * params.items
    mean = min(params.history * (1.0 - params.repeats), 0.4 * seen)
    least = min(params.min_history, 0.8 * mean)
    excess = np.exp(rng.normal(-0.5 * params.activity_std**2, params.activity_std, params.users))
    counts = np.round(least + (mean - least) * excess)
    return np.clip(counts, _FEWEST, max(0.8 * seen, _FEWEST)).astype(np.int64)


def _cut(edges: np.ndarray, when: float) -> None:
    """Move the inner edge nearest to a time that falls into a lifetime onto it, in place."""
    rows = np.flatnonzero((edges[:, 0] < when) & (edges[:, -1] > when))
    nearest = 1 + np.argmin(np.abs(edges[rows, 1:-1] - when), axis=1)
    edges[rows, nearest] = when
