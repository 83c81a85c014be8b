"""Before a controller is released: the base it stands on is chosen again, with the trained policy, on whole domains.

The search that settles the first base is made of many short trials on slices, and slices want a weight decay far too
strong for whole domains. Here a few neighbours of that base are run to the full length on the largest validation pool.

Shape legend: K candidate, S start value, M episode.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, RolloutRunner, concatenate, make_chunk, relative_scores

RATE_FACTORS = (1 / 3, 1.0, 3.0)
DECAY_FACTORS = (1 / 2, 1.0, 2.0)
SIGNIFICANCE = 2.5
"""Standard errors of the paired difference over tasks; the best of many candidates beats two by luck."""
NUM_TASKS = 2 * CHUNK
"""Tasks that decide, spread evenly over the pool's."""


class BaseChoice(NamedTuple):
    """What the candidates did; the one whose controlled runs scored best is chosen, if it is better beyond noise."""

    candidates: np.ndarray
    """[K, S] in unit ranges; the middle one is the base as it was"""
    fixed: np.ndarray
    """[K, M] log-ratio to popularity under the base schedule alone"""
    controlled: np.ndarray
    """[K, M] with the policy on top"""

    @property
    def chosen(self) -> int:
        """Index of the candidate that is taken: the base as it was, unless another beats it beyond noise."""
        before, best = len(self.candidates) // 2, int(self.controlled.mean(1).argmax())
        gain = self.controlled[best] - self.controlled[before]
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
        return best if gain.mean() > SIGNIFICANCE * error else before

    @property
    def best_fixed(self) -> int:
        """Index of the candidate that is best without a policy: what a controller is to be compared with."""
        return int(smoothed(self.fixed.mean(1)).argmax())

    def values(self, config: ControllerConfig, index: int) -> dict[str, float]:
        """Returns a candidate's hyperparameters by name."""
        pairs = zip(CONTROLLED, self.candidates[index].tolist(), strict=True)
        return {name: config.space[name].decode(value) for name, value in pairs}

    def record(self, config: ControllerConfig, label: str) -> dict[str, float]:
        """Returns figures for logs and provenance."""
        before, chosen, best_fixed = len(self.candidates) // 2, self.chosen, self.best_fixed
        fixed, controlled = self.fixed.mean(1).tolist(), self.controlled.mean(1).tolist()
        return {
            **{f"{label}/{name}": value for name, value in self.values(config, chosen).items()},
            **{f"{label}/best_fixed/{name}": value for name, value in self.values(config, best_fixed).items()},
            f"{label}/fixed": fixed[chosen],
            f"{label}/fixed_before": fixed[before],
            f"{label}/fixed_best": fixed[best_fixed],
            f"{label}/controlled": controlled[chosen],
            f"{label}/controlled_before": controlled[before],
        }

    def rows(self, config: ControllerConfig) -> list[dict[str, float]]:
        """Returns every candidate with its mean scores."""
        scores = zip(self.fixed.mean(1).tolist(), self.controlled.mean(1).tolist(), strict=True)
        return [
            {**self.values(config, index), "fixed": fixed, "controlled": controlled}
            for index, (fixed, controlled) in enumerate(scores)
        ]


def smoothed(scores: np.ndarray) -> np.ndarray:
    """Averages each candidate's score [K] with its neighbours' in rate and decay, weights 1, 2, 1 along either.

    A few tasks of one seed each are noise: neighbouring candidates were found to differ by more than distant ones.

    >>> lone, broad = np.zeros(9), np.zeros(9)
    >>> lone[0], broad[5:9] = 1.0, 0.9
    >>> int(smoothed(lone + broad).argmax())
    8
    """
    shape = len(RATE_FACTORS), len(DECAY_FACTORS)
    grid, weight = np.zeros(shape), np.zeros(shape)
    for row, column in np.ndindex(shape):
        for other in np.ndindex(shape):
            steps = abs(other[0] - row), abs(other[1] - column)
            if max(steps) <= 1:
                share = 0.5 ** sum(steps)
                grid[row, column] += share * scores.reshape(shape)[other]
                weight[row, column] += share
    return (grid / weight).ravel()


def neighbours(base: np.ndarray, config: ControllerConfig) -> np.ndarray:
    """Returns [K, S] configurations with the base's rate and decay times some factors, the base in the middle."""
    rows = []
    for rate in RATE_FACTORS:
        for decay in DECAY_FACTORS:
            values = {n: config.space[n].decode(float(v)) for n, v in zip(CONTROLLED, base, strict=True)}
            values["learning_rate"] *= rate
            values["weight_decay"] *= decay
            bounds = {n: (config.space[n].low, config.space[n].high) for n in CONTROLLED}
            rows.append([config.space[n].encode(float(np.clip(values[n], *bounds[n]))) for n in CONTROLLED])
    return np.array(rows, np.float32)


def choose_release_base(
    runner: RolloutRunner,
    params: PolicyParams,
    prior: Prior,
    *,
    horizon_told: bool,
    num_steps: int,
    tasks: Sequence[int],
    seed: int,
) -> BaseChoice:
    """Runs the neighbours of a base on tasks of the last (largest) pool, with and without the policy.

    Args:
      runner: of validation pools; the last is the largest.
      params, prior: the trained controller.
      horizon_told: whether to choose the base for a known horizon.
      num_steps: optimizer steps of an interval.
      tasks: indices into the pool; every candidate runs on each, from the same initial weights.
      seed: of those.
    """
    pool, told = len(runner.pools) - 1, int(horizon_told)
    candidates = neighbours(np.asarray(prior.base)[told], runner.config)
    padded = (list(tasks) * CHUNK)[: -(-len(tasks) // CHUNK) * CHUNK]
    seeds = np.random.default_rng([seed, 21]).integers(2**31, size=len(padded))

    def score(runner: RolloutRunner, candidate: np.ndarray, act: bool) -> np.ndarray:
        base = np.array(prior.base, np.float32)
        base[told] = candidate
        chunks = [
            make_chunk(
                pool,
                num_steps,
                task=padded[first : first + CHUNK],
                initialization=seeds[first : first + CHUNK],
                horizon_told=horizon_told,
                start=None if act else candidate,
                num_start=len(CONTROLLED),
            )
            for first in range(0, len(padded), CHUNK)
        ]
        episodes: Any = runner.run(chunks, params, prior._replace(base=base), act=act)
        return relative_scores(concatenate(episodes))[: len(tasks)]

    # A candidate is one chunk, which keeps one device busy: so every device gets candidates of its own.
    free: queue.SimpleQueue[RolloutRunner] = queue.SimpleQueue()
    for device in runner.devices:
        free.put(RolloutRunner(runner.pools, runner.config, [device]))

    def both(candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mine = free.get()
        scores = score(mine, candidate, False), score(mine, candidate, True)
        free.put(mine)
        return scores

    with ThreadPoolExecutor(len(runner.devices)) as threads:
        results = list(tqdm(threads.map(both, candidates), total=len(candidates), desc="base", disable=None))
    fixed, controlled = zip(*results, strict=True)
    return BaseChoice(candidates, np.stack(fixed), np.stack(controlled))


def released_prior(
    runner: RolloutRunner,
    params: PolicyParams,
    prior: Prior,
    *,
    num_steps: int,
    seed: int,
    log: Callable[[dict[str, Any]], None],
) -> tuple[Prior, dict[str, float]]:
    """Chooses both bases, for an unknown and for a known horizon.

    Args:
      runner, params, prior, num_steps, seed: as in `choose_release_base`.
      log: called once for each.

    Returns:
      The prior with the chosen bases, and their figures by name.
    """
    size = len(runner.pools[-1])
    tasks = np.unique(np.linspace(0, size - 1, min(NUM_TASKS, size)).round().astype(int)).tolist()
    base, records = np.array(prior.base, np.float32), {}
    for told, label in ((False, "unknown"), (True, "known")):
        choice = choose_release_base(
            runner, params, prior, horizon_told=told, num_steps=num_steps, tasks=tasks, seed=seed
        )
        base[int(told)] = choice.candidates[choice.chosen]
        record = choice.record(runner.config, label)
        log({"phase": "release base", **record, f"{label}/candidates": choice.rows(runner.config)})
        records |= record
    return prior._replace(base=base), records
