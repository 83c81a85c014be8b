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


def is_safe(interval: int, position: int, length: int) -> bool:
    """Says whether guard, audit log and snapshots are in the loop in a step of the run that measures what they cost.

    They act at the ends of intervals: every second of those is safe. Of the other steps every second is, in every
    interval, so that a step is compared with its neighbours.

    Args:
      interval: index.
      position: of the step in it.
      length: of it, in steps.
    """
    return (interval if position in (0, length - 1) else position) % 2 == 0


def safety_overhead(
    steps: Sequence[Step], saved: frozenset[int], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Returns the overhead of guard, audit log and snapshots in percent, and its 95 % interval.

    Args:
      steps: of a run of which those are safe that `is_safe` says.
      saved: indices of the steps in which a snapshot was taken.
      rng: of the bootstrap.
    """
    length = steps[-1].length
    rows: dict[int, dict[int, float]] = {}
    for step in steps:
        if step.interval >= 2:
            rows.setdefault(step.interval, {})[step.position] = step.figures[0]
    whole = {interval: np.array([*row.values()]) for interval, row in rows.items() if len(row) == length}
    snapshots = {steps[index].interval for index in saved} & {*whole}
    ordinary = {i: (row[2:-2:2], row[1:-2:2]) for i, row in whole.items()}
    level = {i: float(middle(unsafe)) for i, (_, unsafe) in ordinary.items()}
    usual = np.array([float(middle(safe)) / level[i] - 1.0 for i, (safe, _) in ordinary.items()])

    def ends(*, safe: bool) -> np.ndarray:
        chosen = [i for i in whole if is_safe(i, 0, length) == safe and i not in snapshots]
        return np.array([(whole[i][0] + whole[i][-1]) / level[i] for i in chosen])

    taken = np.array([(whole[i][0] + whole[i][-1]) / level[i] for i in snapshots])

    def percent(usual: np.ndarray, safe: np.ndarray, unsafe: np.ndarray, taken: np.ndarray) -> float:
        ended = float(np.median(safe))
        once = (float(np.median(taken)) - ended) / SNAPSHOTS_EVERY if len(taken) else 0.0
        return 100.0 * ((length - 2) * float(middle(usual)) + ended - float(np.median(unsafe)) + once) / length

    parts = (usual, ends(safe=True), ends(safe=False), taken)
    resampled = [percent(*(rng.choice(part, len(part)) if len(part) else part for part in parts)) for _ in range(1000)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return percent(*parts), float(low), float(high)
