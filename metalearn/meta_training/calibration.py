"""How far an outcome model's intervals are to be believed: measured, and put right by a temperature.

Shape legend: N episode, T decision, I input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from metalearn.controller.config import ControllerConfig
from metalearn.controller.outcome import OutcomeDistribution, OutcomeModel
from metalearn.meta_training.outcome_rows import OutcomeRows, outcome_rows, withhold_floor
from metalearn.meta_training.rollout import Episode, Prior

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Of the central intervals whose coverage is measured."""
TEMPERATURES = np.geomspace(0.25, 4.0, 81)
TEMPERATURE_PRIOR = 8
"""Validation domains that a temperature of 1 counts as: runs of a domain err together, so that n domains tell log T to
within 1 / √(2n), and it is not expected beyond 1/4. (Two domains asked for 0.5, and unseen ones were covered badly.)"""


def equal_weight(names: np.ndarray) -> np.ndarray:
    """Returns weights that sum to 1, and to the same over every domain."""
    _, domain, count = np.unique(names, return_inverse=True, return_counts=True)
    return 1.0 / count[domain] / len(count)


def _situations(rows: OutcomeRows) -> dict[str, np.ndarray]:
    """Returns the inputs [N, T', I] of the start, of the run, and of the run where the floor is unknown."""
    return {
        "start": rows.inputs[:, :1],
        "run": rows.inputs[:, 1:],
        "run_without_floor": withhold_floor(rows.inputs[:, 1:]),
    }


def choose_temperatures(model: OutcomeModel, rows: OutcomeRows, names: np.ndarray) -> np.ndarray:
    """Chooses the factors that make central intervals cover what they say, domains weighed alike: start and run.

    They are drawn to 1, by `TEMPERATURE_PRIOR`.

    Args:
      model: fitted, without temperatures.
      rows: of the validation domains.
      names: [N] domain of each episode.
    """
    weight, num_domains = equal_weight(names), len(np.unique(names))
    inputs = _situations(rows)
    run = np.concatenate([inputs["run"], inputs["run_without_floor"]], axis=1)
    chosen = []
    for part in (inputs["start"], run):
        predicted = model.predict(part)
        # Outcomes drawn to the centre instead of the mixture widened about it: the same to the mixture's CDF.
        deviation = rows.outcome[:, None] - predicted.mean
        errors = []
        for temperature in TEMPERATURES:
            level = np.abs(1.0 - 2.0 * predicted.probability_above(predicted.mean + deviation / temperature))
            covered = np.array([((level <= wanted).mean(1) * weight).sum() for wanted in LEVELS])
            errors.append(np.square(covered - LEVELS).sum())
        chosen.append(TEMPERATURES[int(np.argmin(errors))])
    return np.power(chosen, num_domains / (num_domains + TEMPERATURE_PRIOR)).astype(np.float32)


def measure_calibration(
    model: OutcomeModel, episodes: Episode, controller: ControllerConfig, prior: Prior
) -> dict[str, Any]:
    """Measures how good an outcome model is on episodes of domains that it has not seen.

    Args:
      model: fitted.
      episodes: NumPy, concatenated.
      controller: architecture that the episodes were run with.
      prior: base and normalizer of the controller.

    Returns:
      For `start`, `run` and `run_without_floor`: `coverage` of central intervals by level; `crps`, the continuous
      ranked probability score; `rmse`; `rmse_of_mean`, that of always predicting the mean of the training episodes;
      `spearman`, the rank correlation of predicted and real among the episodes of one task at one decision, averaged;
      `improvement_coverage`, of the intervals of differences between two episodes of one task. NaN where no task has
      enough episodes.
    """
    return calibration_of(model, outcome_rows(episodes, controller, prior))


def calibration_of(model: OutcomeModel, rows: OutcomeRows) -> dict[str, Any]:
    """Returns what `measure_calibration` does, of episodes that are laid out already."""
    tasks = [np.flatnonzero(rows.task == task) for task in np.unique(rows.task)]
    one = np.concatenate([task[:-1] for task in tasks])
    other = np.concatenate([task[1:] for task in tasks])
    outcome = rows.outcome[:, None].astype(np.float64)
    record = {}
    for situation, inputs in _situations(rows).items():
        predicted = model.predict(inputs)
        difference = model.improvement(inputs[one], inputs[other])
        record[situation] = {
            "coverage": _coverage(predicted, outcome),
            "improvement_coverage": _coverage(difference, outcome[one] - outcome[other]),
            "crps": float(crps(predicted, outcome).mean()),
            "rmse": float(np.sqrt(np.square(predicted.mean - outcome).mean())),
            "rmse_of_mean": float(np.sqrt(np.square(model.training_mean - outcome).mean())),
            "spearman": _spearman(predicted.mean, rows.outcome, tasks),
        }
    return record


def _coverage(predicted: OutcomeDistribution, outcome: np.ndarray) -> dict[str, float]:
    """Returns the share of outcomes inside the central interval of each level."""
    level = np.abs(1.0 - 2.0 * predicted.probability_above(outcome))
    return {f"{100 * wanted:.0f}": float((level <= wanted).mean()) if level.size else np.nan for wanted in LEVELS}


def _spearman(predicted: np.ndarray, outcome: np.ndarray, tasks: Sequence[np.ndarray]) -> float:
    """Returns the mean rank correlation within a task at a decision, of those where neither side ties throughout."""
    found = []
    for task in tasks:
        apart = predicted[task][:, np.ptp(predicted[task], axis=0) > 0]
        if len(task) > 2 and np.ptp(outcome[task]) > 0 and apart.size:
            ranks = stats.rankdata(np.column_stack([outcome[task], apart]), axis=0)
            found.extend(np.corrcoef(ranks.T)[0, 1:])
    return float(np.mean(found)) if found else np.nan


def crps(predicted: OutcomeDistribution, outcome: np.ndarray) -> np.ndarray:
    """Returns the continuous ranked probability score of normal mixtures (Grimit et al., 2006).

    E|Y - y| - E|Y - Y'| / 2, with Y and Y' drawn from the mixture.

    Args:
      predicted: [...].
      outcome: broadcasts against [...].
    """

    def mean_absolute(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        z = mean / std
        return std * 2.0 * stats.norm.pdf(z) + mean * (2.0 * stats.norm.cdf(z) - 1.0)

    mean, std = predicted.component_mean, predicted.component_std
    apart = mean_absolute(mean - outcome[..., None], std).mean(-1)
    among = mean_absolute(mean[..., :, None] - mean[..., None, :], np.hypot(std[..., :, None], std[..., None, :]))
    return apart - 0.5 * among.mean((-2, -1))
