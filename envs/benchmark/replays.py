"""Searches replayed from recorded random draws ("sampled" trials), so that none has to be run anew.

A pool is one task's draws: one run for each (replicate, index), the one whose seed is the replicate. Reruns with other
seeds never choose anything; they only say what a chosen configuration is worth.
Shape legend: N configuration, V validation, P task to learn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from envs.benchmark.outcomes import (
    Missing,
    Outcome,
    Records,
    Run,
    TaskName,
    best_selected,
    by_replicate,
    originals,
    repeated,
)
from envs.benchmark.statistics import PRECISION

Pool = Mapping[tuple[int, int], Run]
"""Original runs of one task by (replicate, index)."""
ETA, RUNGS = 3, 3
"""Successive halving keeps one in ETA at each rung; the rungs are at 1, 1/ETA and 1/ETA² of the validations."""
SPENT = 0.9
"""Share of its budget that successive halving must be able to spend."""


def random_search(runs: Sequence[Run], budget: int) -> Outcome | Missing:
    """Returns the outcome of random search: of each replicate, the expected test score of the draw that is selected.

    Expected over all subsets of `budget` of the replicate's draws, which has less variance than its first draws alone.

    Args:
      runs: of method "sampled" on one task.
      budget: draws, each a full training run.
    """
    pools = [pool for pool in by_replicate(runs).values() if len(pool) >= budget]
    if not pools:
        most = max(map(len, by_replicate(runs).values()), default=0)
        return Missing(f"{budget} draws of one replicate are needed, {most} are recorded")
    expected = [
        expected_best(np.array([r.selection for r in pool]), np.array([r.test for r in pool]), budget) for pool in pools
    ]
    seconds = budget * float(np.mean([np.mean([run.seconds for run in pool]) for pool in pools]))
    return Outcome(test=np.array(expected), runs=float(budget), seconds=seconds)


def expected_best(selection: np.ndarray, test: np.ndarray, budget: int) -> float:
    """Returns the expected test score of the best by selection among `budget` of N draws, without replacement.

    Σ_k C(N-1-k, n-1) / C(N, n) test_(k), where test_(k) is that of the draw with k better ones.

    Args:
      selection: [N]; the earliest of equals counts as better.
      test: [N].
      budget: n, from 1 to N.

    >>> expected_best(np.array([0.1, 0.3, 0.2]), np.array([1.0, 2.0, 6.0]), 2)  # 2 wins 2 of 3 pairs, 6 one
    3.333...
    """
    count = len(selection)
    better = np.arange(count - 1)
    ratios = np.maximum(count - better - budget, 0) / (count - better - 1)
    weights = budget / count * np.concatenate([[1.0], np.cumprod(ratios)])
    return float(weights @ test[np.argsort(-selection, kind="stable")])


def successive_halving(runs: Sequence[Run], budget: float = 16.0) -> Outcome | Missing:
    """Replays successive halving on each replicate's draws, as many of the first ones as the budget pays for.

    At a rung the third with the best validation so far goes on; of those that reach the end the best selection score
    wins. Steps are counted, not validations; a run that goes on is not started again.

    Args:
      runs: of method "sampled" on one task.
      budget: in full training runs.

    Source: Jamieson and Talwalkar (2016), Non-stochastic Best Arm Identification and Hyperparameter Optimization.
    """
    tests, costs, seconds = [], [], []
    for pool in by_replicate(runs).values():
        curves = best_so_far(pool)
        cost, size = halving_cost(len(pool), curves.shape[1]), len(pool)
        while size > 1 and cost > budget + 1e-9:
            size -= 1
            cost = halving_cost(size, curves.shape[1])
        if cost < SPENT * budget:
            continue
        winner, shares = halve(curves[:size], np.array([run.selection for run in pool[:size]]))
        tests.append(pool[winner].test)
        costs.append(cost)
        seconds.append(float(shares @ np.array([run.seconds for run in pool[:size]])))
    if not tests:
        most = max(map(len, by_replicate(runs).values()), default=0)
        return Missing(f"{most} recorded draws of one replicate cannot spend {SPENT:g} of {budget:g} full runs")
    return Outcome(test=np.array(tests), runs=float(np.mean(costs)), seconds=float(np.mean(seconds)))


def halving_rungs(num_validations: int) -> list[int]:
    """Returns the validations after which runs are compared, the last one included.

    >>> halving_rungs(20)
    [2, 6, 20]
    """
    return sorted({max(1, num_validations // ETA**rung) for rung in range(RUNGS)})


def halving_cost(size: int, num_validations: int) -> float:
    """Returns what halving costs that starts with `size` configurations, in full runs.

    >>> halving_cost(64, 20)  # 64 to 2/20, 21 on to 6/20, 7 on to the end: 6.4 + 4.2 + 4.9
    15.5
    """
    cost, reached = 0, 0
    for rung in halving_rungs(num_validations):
        cost, reached, size = cost + size * (rung - reached), rung, max(1, size // ETA)
    return cost / num_validations


def halve(curves: np.ndarray, selection: np.ndarray) -> tuple[int, np.ndarray]:
    """Replays one successive halving.

    Args:
      curves: [N, V] best validation score so far.
      selection: [N] score at the end.

    Returns:
      The winner, and of each configuration the share of a full run that it was trained for, [N].
    """
    num_validations = curves.shape[1]
    shares = np.zeros(len(curves))
    alive = np.arange(len(curves))
    for rung in halving_rungs(num_validations):
        shares[alive] = rung / num_validations
        if rung < num_validations:
            order = np.argsort(-curves[alive, rung - 1], kind="stable")
            alive = alive[order[: max(1, len(alive) // ETA)]]
    alive = np.sort(alive)
    return int(alive[np.argmax(selection[alive])]), shares


def best_so_far(runs: Sequence[Run]) -> np.ndarray:
    """Returns running maxima of the runs' validation scores, [N, V]; -inf where nothing finite was measured.

    A run that ended early keeps its last value.
    """
    table = np.full((len(runs), max(1, *(len(run.curve) for run in runs))), -np.inf)
    for row, run in zip(table, runs, strict=True):
        row[: len(run.curve)] = np.where(np.isfinite(run.curve), run.curve, -np.inf)
    return np.maximum.accumulate(table, axis=1)


def leave_one_domain_out(
    pools: Mapping[TaskName, Pool], task: TaskName, *, size: int = 1, schedule: str | None = None
) -> list[tuple[int, int]] | Missing:
    """Chooses a task's portfolio of configurations on the other domains' tasks of its family and budget, greedily.

    Each configuration added maximises the mean over those tasks of log(best selection score in the portfolio); the
    first is the best fixed one. It chooses among the configurations recorded on the task itself (the draws are shared
    by all tasks, so on a full record these are all) and on every other task, but for those with less than half the
    draws of the one that has most.

    Args:
      pools: of every task.
      task: to choose for; its own scores are not looked at.
      size: configurations.
      schedule: only configurations with this one; None for any.

    Returns:
      (replicate, index) of each, in the order of choice.

    Source: Feurer et al. (2022), Auto-Sklearn 2.0, section 3.1.
    """
    others = [pool for other, pool in pools.items() if pool and other.domain != task.domain and other[1:] == task[1:]]
    if not others:
        return Missing("no draws are recorded on another domain with this family and budget")
    most = max(map(len, others))
    others = [pool for pool in others if 2 * len(pool) >= most]
    candidates = [
        key
        for key, run in pools.get(task, {}).items()
        if all(key in pool for pool in others) and schedule in (None, run.configuration.get("schedule"))
    ]
    if len(candidates) < size:
        kind = f" with a {schedule} schedule" if schedule else ""
        return Missing(
            f"{size} configurations{kind} must be recorded here and on other domains alike, {len(candidates)} are"
        )
    scores = np.array([[pool[key].selection for pool in others] for key in candidates])
    return [candidates[row] for row in greedy_portfolio(np.log(np.maximum(scores, PRECISION)), size)]


def greedy_portfolio(scores: np.ndarray, size: int) -> list[int]:
    """Adds, one by one, the configuration that raises the mean over tasks of the portfolio's best score most.

    Args:
      scores: [N, P], finite.
      size: from 1 to N.

    Returns:
      Rows, in the order of choice; the earliest of equals, and none twice.
    """
    chosen: list[int] = []
    best = np.full(scores.shape[1], -np.inf)
    for _ in range(size):
        gains = np.maximum(scores, best).mean(axis=1)
        gains[chosen] = -np.inf
        chosen.append(int(np.argmax(gains)))
        best = np.maximum(best, scores[chosen[-1]])
    return chosen


def portfolio(
    runs: Sequence[Run], pools: Mapping[TaskName, Pool], task: TaskName, *, size: int = 1, schedule: str | None = None
) -> Outcome | Missing:
    """Returns what a portfolio learnt on other domains comes to: the run of it that is selected on this task.

    A value for each seed that all its configurations were run with; if there is none, one value of the original runs.

    Args:
      runs: of method "sampled" on the task, reruns included.
      pools: as `leave_one_domain_out`, and the other arguments too.
    """
    keys = leave_one_domain_out(pools, task, size=size, schedule=schedule)
    if isinstance(keys, Missing):
        return keys
    seeds: dict[tuple[int, int], dict[int, Run]] = {key: {} for key in keys}
    for run in runs:
        if run.key in seeds:
            seeds[run.key][run.seed] = run
    shared = sorted(set.intersection(*(set(found) for found in seeds.values())))
    searches = [[seeds[key][seed] for key in keys] for seed in shared] or [[pools[task][key] for key in keys]]
    if size == 1:
        first = pools[task][keys[0]]
        return repeated([search[0] for search in searches], **dict(first.configuration))
    return best_selected(searches, cost=float(size))


def pools_of(records: Records) -> dict[TaskName, Pool]:
    """Returns the pool of each task that has draws."""
    return {task: originals(methods["sampled"]) for task, methods in records.items() if "sampled" in methods}
