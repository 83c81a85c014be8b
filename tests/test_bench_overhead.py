"""The figures of scripts/bench_overhead.py: a known overhead is found, whatever else disturbs the clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

LENGTH, TURN = 50, 10


@pytest.fixture(scope="module")
def bench(scripts: Any) -> Any:
    return scripts("bench_overhead")


def steps_of(bench: Any, *, usual: float, decision: float, noise: float, intervals: int = 40) -> list[Any]:
    """Make a run that grows slower, is interrupted now and then, and takes so much more per step and per decision."""
    rng, steps, done = np.random.default_rng(0), [], 0
    turn = interval = position = 0
    while interval < intervals:
        turn += 1
        for _ in range(TURN):
            seconds = 1e-3 * (1.0 + 1e-5 * done) * (1.0 + noise * rng.standard_normal())
            seconds *= 10.0 if noise and rng.random() < 0.02 else 1.0
            if turn % 2:
                seconds *= 1.0 + usual
                seconds += 1e-3 * decision * (position == LENGTH - 1)
            steps.append(bench.Step(turn, interval, position, LENGTH, (seconds,)))
            done += 1
            position += turn % 2
            if position == LENGTH:
                interval, position = interval + 1, 0
    return steps


@pytest.mark.parametrize(("usual", "decision"), [(0.0, 0.0), (0.01, 0.0), (0.01, 2.0), (0.0, 1.0)])
def test_a_known_overhead_is_found(bench: Any, usual: float, decision: float):
    expected = 100.0 * (usual + decision / LENGTH)
    rng = np.random.default_rng(1)
    percent, low, high = bench.overhead(steps_of(bench, usual=usual, decision=decision, noise=0.0), 0, rng)
    assert percent == pytest.approx(expected, abs=0.08)
    percent, low, high = bench.overhead(steps_of(bench, usual=usual, decision=decision, noise=0.05), 0, rng)
    assert low < percent < high
    assert low - 0.2 < expected < high + 0.2
    assert high - low < 2.5


def test_snapshots_are_counted_once_in_ten_intervals(bench: Any):
    steps, saved = [], set()
    for interval in range(60):
        for position in range(LENGTH):
            seconds = 1e-3 * 1.01**interval  # the machine gets slower all the time
            if position not in (0, LENGTH - 1) and position % 2 == 0:
                seconds *= 1.02
            if interval % 2 == 0 and position == LENGTH - 1:
                seconds += 1e-4 * 1.01**interval  # audit log and guard
                if interval % 20 == 0:
                    seconds += 5e-3 * 1.01**interval
                    saved.add(len(steps))
            steps.append(bench.Step(1, interval, position, LENGTH, (seconds,)))
    percent, low, high = bench.safety_overhead(steps, frozenset(saved), np.random.default_rng(0))
    # two hundredths of each ordinary step, a tenth of one at an end, and once in ten of these five more
    assert percent == pytest.approx(100.0 * (0.02 * (LENGTH - 2) + 0.1 + 5 / 10) / LENGTH, rel=1e-6)
    assert low <= percent <= high


def test_memory_is_counted_once_and_the_workload_not(bench: Any):
    import overhead_memory
    import torch
    from overhead_workloads import Workload

    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    workload = Workload(model=model, optimizer=optimizer, batch=tuple, batch_size=1)
    buffer, array = torch.zeros(10), np.zeros(7)

    class Holder:
        __slots__ = ("parts", "way")

        def __init__(self) -> None:
            self.parts = [
                buffer,
                buffer[:3],
                {"model": model, "weight": model.weight},
                (array, array[2:]),
                optimizer.state,
            ]
            self.way = lambda: buffer

    assert overhead_memory.held_bytes(Holder(), workload) == 40 + 56
    assert overhead_memory.trained_bytes(workload) == 4 * 4 * 20 + 2 * 4  # weights, gradients, moments, step counts
