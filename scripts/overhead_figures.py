"""From timed steps to what the controller costs: for `bench_overhead.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from overhead_loops import Step

SNAPSHOTS_EVERY = 10
"""Intervals."""


def middle(values: np.ndarray) -> np.ndarray:
    """Returns interquartile means over the last axis."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1)


def is_special(step: Step) -> bool:
    """Says whether a step holds a decision or a half of a probe."""
    return step.position == 0 or step.position >= step.length - 2


def overhead(steps: Sequence[Step], clock: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Returns the overhead in percent, and the bounds of its 95 % bootstrap interval.

    Args:
      steps: of a run, in order.
      clock: index of the figure.
      rng: of the bootstrap.
    """
    turns: dict[int, list[float]] = {}
    special: list[tuple[int, int, float]] = []
    for step in steps:
        if step.turn % 2 and is_special(step):
            special.append((step.turn, min(step.position, step.position - step.length, key=abs), step.figures[clock]))
        else:
            turns.setdefault(step.turn, []).append(step.figures[clock])
    level = {turn: float(np.median(row)) for turn, row in turns.items()}
    beside = {turn: math.sqrt(level[turn - 1] * level[turn + 1]) for turn in level if {turn - 1, turn + 1} <= {*level}}
    usual = np.array([level[turn] / beside[turn] - 1.0 for turn in beside if turn % 2])
    extra = {
        place: np.array(
            [value / beside[turn] - 1.0 for turn, where, value in special if where == place and turn in beside]
        )
        for place in (-2, -1, 0)
    }
    length = steps[-1].length

    def percent(ratios: np.ndarray, dearer: Sequence[np.ndarray]) -> float:
        return 100.0 * float((length - 3) * middle(ratios) + sum(np.median(row) for row in dearer)) / length

    places = list(extra.values())
    resampled = [
        percent(rng.choice(usual, len(usual)), [rng.choice(row, len(row)) for row in places]) for _ in range(1000)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return percent(usual, places), float(low), float(high)


def safety_overhead(
    steps: Sequence[Step], saved: frozenset[int], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Returns the overhead of safe intervals in percent, its 95 % interval, and what the median one took more.

    Args:
      steps: of a run whose even intervals are safe.
      saved: indices of the steps in which a snapshot was taken.
      rng: of the bootstrap.
    """
    length = steps[-1].length
    rows: dict[int, list[float]] = {}
    snapshots = []
    for index, step in enumerate(steps):
        if step.interval >= 2:
            rows.setdefault(step.interval, []).append(step.figures[0])
            if index in saved:
                snapshots.append((step.interval, step.figures[0]))
    whole = {interval: row for interval, row in rows.items() if len(row) == length}
    level = {interval: float(middle(np.array(row[1:-2]))) for interval, row in whole.items()}
    safe = [i for i in level if i % 2 == 0 and {i - 1, i + 1} <= {*level}]
    beside = {i: 0.5 * (level[i - 1] + level[i + 1]) for i in safe}
    usual = np.array([level[i] / beside[i] - 1.0 for i in safe])
    last = np.array(
        [
            (whole[i][-1] - 0.5 * (whole[i - 1][-1] + whole[i + 1][-1])) / beside[i]
            for i in safe
            if not saved_in(i, snapshots)
        ]
    )
    snapshot = np.array([(value - level[i]) / level[i] for i, value in snapshots if i in level])

    def percent(usual: np.ndarray, last: np.ndarray) -> float:
        once = float(np.median(snapshot)) / SNAPSHOTS_EVERY if len(snapshot) else 0.0
        return 100.0 * ((length - 1) * float(middle(usual)) + float(np.median(last)) + once) / length

    resampled = [percent(rng.choice(usual, len(usual)), rng.choice(last, len(last))) for _ in range(1000)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    whole_percent = 100.0 * float(
        np.median([sum(whole[i]) / (0.5 * sum(whole[i - 1] + whole[i + 1])) - 1.0 for i in safe])
    )
    return percent(usual, last), float(low), float(high), whole_percent


def saved_in(interval: int, snapshots: Sequence[tuple[int, float]]) -> bool:
    """Says whether a snapshot was taken in an interval."""
    return any(interval == one for one, _ in snapshots)
