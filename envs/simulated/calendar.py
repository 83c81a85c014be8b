"""The calendar: times of day and of the week, sessions, the order of what is taken in them, and repeats.

Shape legend: N interactions, K clusters. Times are shares of the time span.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.simulated.prior import SimulatedParams

START = 1_500_000_000.0
"""Seconds since the epoch at which every simulated log starts."""
_DAY = 86_400.0
_ATTEMPTS = 24


def draw_times(low: np.ndarray, high: np.ndarray, params: SimulatedParams, rng: np.random.Generator) -> np.ndarray:
    """Draw a time within each [low, high], with a density that follows the day and the week, float64 [N].

    Density ∝ exp(d (cos(day) - 1) + w (cos(week) - 1)), by rejection; what is still rejected after some attempts is
    kept, so intervals without a good time cost no more.
    """
    times = low + (high - low) * rng.random(len(low))
    open_rows = np.arange(len(low)) if params.daily_season + params.weekly_season > 0 else np.arange(0)
    for _ in range(_ATTEMPTS):
        days = times[open_rows] * params.span_days
        log_density = params.daily_season * (np.cos(2.0 * np.pi * days) - 1.0)
        log_density += params.weekly_season * (np.cos(2.0 * np.pi * days / 7.0) - 1.0)
        open_rows = open_rows[np.log(rng.random(len(open_rows)) + 1e-300) > log_density]
        if len(open_rows) == 0:
            break
        width = high[open_rows] - low[open_rows]
        times[open_rows] = low[open_rows] + width * rng.random(len(open_rows))
    return times


def schedule(
    owner: np.ndarray,
    cluster: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    params: SimulatedParams,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw the time of each interaction, float64 [N]: sessions within [low, high], related items next to each other.

    Sizes of sessions are geometric with mean session_length. Coherent users go through their items cluster by cluster:
    the order is that of (1 - coherence) uniform + coherence (the user's rank of the cluster), and the earliest time
    goes to the first.

    Args:
        owner: [N] row of the user, ascending; interactions of one owner share `low` and `high`.
        cluster: [N] cluster of the item.
        low, high: [N] bounds, shares of the time span.
        params: of the domain.
        rng: generator.
    """
    if len(owner) == 0:
        return np.zeros(0)
    begins = rng.random(len(owner)) < 1.0 / params.session_length
    begins |= np.diff(owner, prepend=-1) != 0
    session = np.cumsum(begins) - 1
    opening = draw_times(low[begins], high[begins], params, rng)[session]
    # Sessions are cut short where the stage ends: nothing of it may happen after.
    length = params.pause_seconds * np.bincount(session)[session] / (_DAY * params.span_days)
    times = opening + np.minimum(length, high - opening) * rng.random(len(owner))
    together = rng.random((int(owner.max()) + 1, params.clusters), dtype=np.float32)[owner, cluster]
    rank = (1.0 - params.coherence) * rng.random(len(owner)) + params.coherence * together
    ordered = np.empty(len(owner))
    ordered[np.lexsort((rank, owner))] = times[np.lexsort((times, owner))]
    return ordered


def repeat_rows(
    row: np.ndarray, high: np.ndarray, times: np.ndarray, params: SimulatedParams, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Repeat some interactions later on: a share `repeats` of all rows then repeats an earlier pair.

    Numbers of repeats are gamma-Poisson with shape 1/3, so few pairs are repeated often; each falls between the first
    time and the end of the user's stage, earlier ones likelier.

    Args:
        row: [N] numbers of the interactions.
        high: [N] ends of their stages.
        times: [N] their times.
        params: of the domain.
        rng: generator.

    Returns:
        Number and time of every interaction, the first ones before the repeats.
    """
    if params.repeats == 0.0:
        return row, times
    mean = params.repeats / (1.0 - params.repeats)
    extra = rng.poisson(rng.gamma(1.0 / 3.0, 3.0 * mean, len(row)))
    again = np.repeat(np.arange(len(row)), extra)
    later = times[again] + (high[again] - times[again]) * rng.random(len(again)) ** 2
    return np.concatenate([row, row[again]]), np.concatenate([times, later])


def to_seconds(times: Any, params: SimulatedParams) -> Any:
    """Turn shares of the time span into whole seconds since the epoch."""
    return np.round(START + _DAY * params.span_days * times)
