"""Statistics of a comparison over several tasks, each with several seeds, and their bootstrap intervals.

Everything takes leading axes, so that one call serves all resamples at once. Values of a task that has fewer seeds than
another are padded with NaN, which counts nowhere. Nobody's figures are paired by seed.
Shape legend: T task, S seed or replicate, B resample, K threshold.

Source: Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical Precipice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metalearn.errors import InvalidArgumentError

PRECISION = 1e-6
"""A mean of less is taken as this much, so that ratios stay finite where all runs collapsed."""
BEYOND_NOISE = 2.0
"""Standard errors from which a difference counts."""


class Estimate(NamedTuple):
    """A statistic and the bounds of its confidence interval; the bounds are NaN where nothing could be resampled."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def pad(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks vectors of different lengths to [T, S], filled up with NaN.

    >>> pad([np.array([1.0]), np.array([2.0, 3.0])])
    array([[ 1., nan],
           [ 2.,  3.]])
    """
    padded = np.full((len(vectors), max(map(len, vectors))), np.nan)
    for row, vector in zip(padded, vectors, strict=True):
        row[: len(vector)] = vector
    return padded


def seed_means(values: np.ndarray) -> np.ndarray:
    """Averages over the last axis; NaN does not count.

    >>> seed_means(np.array([[1.0, 3.0], [5.0, np.nan]]))
    array([2., 5.])
    """
    known = np.isfinite(values)
    if known.all():
        return values.mean(axis=-1)
    return np.where(known, values, 0.0).sum(axis=-1) / known.sum(axis=-1)


def mean_ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Divides mean by mean, task by task.

    Args:
      ours: [..., T, S].
      theirs: [..., T, S'].

    Returns:
      [..., T], positive.
    """
    means = [np.maximum(seed_means(values), PRECISION) for values in (ours, theirs)]
    return means[0] / means[1]


def geometric_mean(ratios: np.ndarray) -> np.ndarray:
    """Averages positive ratios over the last axis: exp(mean(log ratio)).

    >>> float(geometric_mean(np.array([0.5, 2.0])))
    1.0
    """
    return np.exp(np.mean(np.log(ratios), axis=-1))


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Averages the last axis without its lowest and highest quarter (each rounded down).

    Args:
      values: [..., N]; NaN does not count.

    >>> float(interquartile_mean(np.array([100.0, 1.0, 3.0, -50.0, np.nan])))
    2.0
    """
    ordered = np.sort(values, axis=-1)
    count = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    cut = count // 4
    position = np.arange(values.shape[-1])
    kept = (position >= cut) & (position < count - cut)
    return np.where(kept, ordered, 0.0).sum(axis=-1) / kept.sum(axis=-1)


def normalised(values: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Rescales values so that the mean of `zero` becomes 0 and the mean of `one` becomes 1.

    Args:
      values: [..., T, S].
      zero: [..., T, S'].
      one: [..., T, S''].

    Returns:
      [..., T, S]; NaN where both means are equal.
    """
    low = seed_means(zero)[..., None]
    reach = seed_means(one)[..., None] - low
    return (values - low) / np.where(reach == 0.0, np.nan, reach)


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Estimates how often one of ours is better than one of theirs; a tie is half a win.

    P = U / (n m), where U is the Mann-Whitney statistic.

    Args:
      ours: [..., T, S].
      theirs: [..., T, S'].

    Returns:
      [..., T] in [0, 1].

    >>> float(probability_of_improvement(np.array([1.0, 3.0]), np.array([1.0, 2.0])))
    0.625
    """
    difference = ours[..., :, None] - theirs[..., None, :]
    won = 0.5 + 0.5 * np.sign(difference)
    return seed_means(won.reshape(*won.shape[:-2], -1))


def relative_noise(methods: Sequence[np.ndarray]) -> float:
    """Pools the standard deviation over seeds of several methods on one task, each relative to its mean.

    sqrt(Σ_m (n_m - 1) (s_m / mean_m)² / Σ_m (n_m - 1)), over the methods with two seeds or more.

    Args:
      methods: vectors over seeds.

    Returns:
      A share of the mean; NaN where no method has two seeds and a positive mean.

    >>> round(relative_noise([np.array([0.9, 1.1]), np.array([5.0])]), 4)
    0.1414
    """
    repeated = [values for values in methods if len(values) > 1 and values.mean() > 0]
    if not repeated:
        return float("nan")
    freedom = np.array([len(values) - 1 for values in repeated])
    relative = np.array([values.std(ddof=1) / values.mean() for values in repeated])
    return float(np.sqrt((freedom * relative**2).sum() / freedom.sum()))


def standard_error(ours: np.ndarray, theirs: np.ndarray, noise: float) -> float:
    """Estimates the standard error of the difference of two means: sqrt(s² / n + s'² / n').

    Args:
      ours: [S].
      theirs: [S'].
      noise: relative standard deviation that stands in for that of a vector of one value; NaN if unknown.

    Returns:
      In units of the values; NaN if a single value has no noise to go by.
    """
    deviations = [v.std(ddof=1) if len(v) > 1 else noise * abs(float(v[0])) for v in (ours, theirs)]
    return float(np.sqrt(deviations[0] ** 2 / len(ours) + deviations[1] ** 2 / len(theirs)))


def lost(ours: np.ndarray, theirs: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Tells on which tasks our mean is below theirs by more than `BEYOND_NOISE` standard errors.

    Args:
      ours: [..., T, S].
      theirs: [..., T, S'].
      error: [..., T, 1] standard errors of the difference.

    Returns:
      bool [..., T].
    """
    difference = seed_means(ours) - seed_means(theirs)
    return difference < -BEYOND_NOISE * error[..., 0]


def worst_loss(ratios: np.ndarray) -> np.ndarray:
    """Returns the lowest ratio less 1 over the last axis; 0 where none is below 1.

    >>> round(float(worst_loss(np.array([1.2, 0.9]))), 6), float(worst_loss(np.array([1.2, 1.0])))
    (-0.1, 0.0)
    """
    return np.minimum(ratios.min(axis=-1) - 1.0, 0.0)


def performance_profile(ratios: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Returns the share of tasks whose ratio is at least each threshold.

    Args:
      ratios: [..., T].
      thresholds: [K].

    Returns:
      [..., K] in [0, 1], falling.

    Source: Dolan and Moré (2002), Benchmarking optimization software with performance profiles.

    >>> performance_profile(np.array([0.8, 1.0]), np.array([0.7, 0.9, 1.1]))
    array([1. , 0.5, 0. ])
    """
    return np.stack([(ratios >= threshold).mean(axis=-1) for threshold in thresholds], axis=-1)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    samples: Sequence[np.ndarray],
    strata: Sequence[str],
    *,
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = 2000,
) -> Estimate:
    """Bounds a statistic by the stratified percentile bootstrap.

    Tasks are drawn with replacement within their stratum, then seeds within each drawn task, of each sample on its own.
    A stratum of one task has no spread over tasks: there the interval is over seeds alone.

    Args:
      statistic: of the samples, in their order, with leading axes kept: [..., T, S] each to [...] or [..., K].
      samples: [T, S] each, padded with NaN at the end of rows; S may differ between samples, 1 for a constant.
      strata: [T] names.
      level: confidence, in (0, 1).
      seed: of the resampling.
      num_resamples: bootstrap samples.

    Returns:
      The statistic of the samples as they are, and its bounds; NaN bounds where no stratum has two tasks and no task
      two values.

    Raises:
      InvalidArgumentError: samples and strata are not of one length, or a task has no value in a sample.

    Source: Agarwal et al. (2021), section 4.1, with tasks resampled too.

    >>> estimate = bootstrap(lambda a: a.mean(axis=(-2, -1)), [np.array([[1.0, 2.0], [3.0, 4.0]])], ["a", "a"])
    >>> float(estimate.value), bool(estimate.low < 2.5 < estimate.high)
    (2.5, True)
    """
    if not samples or any(len(sample) != len(strata) for sample in samples):
        raise InvalidArgumentError(
            f"`samples` and `strata` must be of one length, got {[len(s) for s in samples]} and {len(strata)}"
        )
    if not len(strata) or not all(np.isfinite(sample[:, 0]).all() for sample in samples):
        raise InvalidArgumentError(
            "`samples` must have a finite first value for each task; leave out tasks that lack one"
        )
    if not 0.0 < level < 1.0:
        raise InvalidArgumentError(f"`level` must lie in (0, 1), got {level}; the usual value is 0.95")
    value = statistic(*samples)
    names, stratum = np.unique(np.asarray(strata), return_inverse=True)
    members = [np.flatnonzero(stratum == index) for index in range(len(names))]
    if all(len(m) == 1 for m in members) and all(np.isfinite(sample).sum(axis=1).max() == 1 for sample in samples):
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    rng = np.random.default_rng(seed)
    rows = np.concatenate([m[rng.integers(0, len(m), (num_resamples, len(m)))] for m in members], axis=1)
    drawn = statistic(*(_resample(sample, rows, rng) for sample in samples))
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0)
    return Estimate(value, low, high)


def _resample(sample: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws seeds of the drawn tasks: [T, S] and [B, T] to [B, T, S]; a task keeps its number of values."""
    width = sample.shape[1]
    if width == 1:
        return sample[rows]
    counts = np.isfinite(sample).sum(axis=1)[rows][..., None]
    picks = (rng.random((*rows.shape, width)) * counts).astype(np.intp)
    drawn = sample.ravel()[rows[..., None] * width + picks]
    return drawn if np.isfinite(sample).all() else np.where(np.arange(width) < counts, drawn, np.nan)
