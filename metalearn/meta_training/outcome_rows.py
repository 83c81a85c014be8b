"""Lays episodes out as the outcome model reads them.

Shape legend: N episode, T decision, I input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from metalearn.controller.actions import Position
from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED, ControllerConfig
from metalearn.controller.outcome import (
    FLOOR_KNOWN,
    METRIC_OFFSET,
    VALIDATION,
    Situation,
    outcome_inputs,
    relative_metric,
)
from metalearn.meta_training.rollout import NONFINITE_PENALTY, Episode, Prior
from metalearn.meta_training.runner import Chunk, RolloutRunner, relative_scores
from metalearn.signals import GLOBAL_FEATURES, percentile_scale


class OutcomeRows(NamedTuple):
    """Episodes as the outcome model reads them."""

    inputs: np.ndarray
    """float32 [N, T, I] before the interval of each decision"""
    outcome: np.ndarray
    """[N]"""
    task: np.ndarray
    """int [N], episodes of one task and budget have the same"""


def episode_domains(runner: RolloutRunner, chunks: Sequence[Chunk]) -> list[str]:
    """Names the domain of each episode of these chunks; simulated ones, which share a name, by pool and task."""
    labels = []
    for chunk in chunks:
        for task in chunk.spec.task.tolist():
            name = runner.pools[chunk.pool].names[task]
            labels.append(f"{name}/{chunk.pool}/{task}" if name.startswith("simulated") else name)
    return labels


def validation_floor(episodes: Episode) -> np.ndarray:
    """Works out the validation metric of popularity from the rewards, [N]; NaN where they are not finite.

    They sum to log((floor + c) / c) + log((score + c) / (test floor + c)), less the penalties. Whether the last
    interval had a penalty is not in an episode: if it had, floor + c comes out a tenth too low.
    """
    penalized = episodes.run[:, :, GLOBAL_FEATURES.index("loss_not_finite")] > 0
    penalty = NONFINITE_PENALTY * penalized.sum(1)
    score = relative_metric(np.asarray(episodes.score, np.float64), np.asarray(episodes.floor, np.float64), np)
    total = np.asarray(episodes.reward, np.float64).sum(1) + penalty
    return METRIC_OFFSET * np.expm1(total - score)


def outcome_rows(episodes: Episode, controller: ControllerConfig, prior: Prior) -> OutcomeRows:
    """Lays episodes out, a row for every decision: the start, before any signal, and each in-run one.

    The configuration of row t is in force in interval t; signals are those up to interval t - 1.

    Args:
      episodes: NumPy, concatenated.
      controller: architecture that the episodes were run with.
      prior: base and normalizer of the controller.
    """
    floor = validation_floor(episodes)
    parts = [
        _inputs(
            jax.tree.map(lambda leaf, rows=slice(first, first + 256): leaf[rows], episodes),
            floor[first:],
            controller,
            prior,
        )
        for first in range(0, len(floor), 256)
    ]
    columns = np.nan_to_num(np.column_stack([episodes.descriptors, episodes.floor, episodes.family]), nan=1e9)
    task = np.unique(columns, axis=0, return_inverse=True)[1].ravel()
    return OutcomeRows(np.concatenate(parts), relative_scores(episodes).astype(np.float32), task)


def _inputs(episodes: Episode, floor: np.ndarray, controller: ControllerConfig, prior: Prior) -> np.ndarray:
    """Makes the inputs of some episodes, [N, T, I]."""
    told = np.isfinite(episodes.descriptors[:, controller.descriptors.index("log_horizon_epochs")])
    encoded = []
    for name in GROUP_CONTROLLED + GLOBAL_CONTROLLED:
        hyperparameter, value = controller.space[name], np.asarray(getattr(episodes.values, name), np.float64)
        ours = np.isfinite(value)
        encoded.append(np.where(ours, hyperparameter.encode(np.where(ours, value, hyperparameter.low)), np.nan))
    split = len(GROUP_CONTROLLED)
    group, run = np.stack(encoded[:split], -1), np.stack(encoded[split:], -1)
    normalizer = jax.tree.map(np.asarray, prior.normalizer)

    def since_start(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(values[:, :1]), values], axis=1)

    reported = episodes.run[:, :, GLOBAL_FEATURES.index("validation_missing")] == 0
    best = np.maximum.accumulate(episodes.validation[:, :-1], axis=1)
    known = np.logical_or.accumulate(reported, axis=1)
    relative = relative_metric(best, floor[: len(best), None], np)
    situation = Situation(
        descriptors=percentile_scale(episodes.descriptors, normalizer.descriptors, np)[:, None],
        family=episodes.family[:, None],
        horizon_known=told[:, None],
        base=np.asarray(prior.base)[episodes.family, told.astype(int)][:, None],
        position=Position(group[:, :1], run[:, :1], group - group[:, :1], run - run[:, :1]),
        group_mask=episodes.group_mask[:, None],
        curve_known=np.arange(group.shape[1]) > 0,
        group=since_start(percentile_scale(episodes.group, normalizer.group, np)),
        run=since_start(percentile_scale(episodes.run, normalizer.run, np)),
        validation=since_start(np.where(known, relative, np.nan)),
    )
    return np.asarray(outcome_inputs(situation, controller, np), np.float32)


def withhold_floor(inputs: Any) -> Any:
    """Returns inputs [..., I] as if the floor of popularity were unknown."""
    keep = np.ones(inputs.shape[-1], np.float32)
    keep[[FLOOR_KNOWN, VALIDATION]] = 0.0
    return inputs * keep
