"""Shape of the distributions of interactions per user and per item: inequality, tails, variation, singletons."""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.totals import DomainTotals

_SHAPES = (
    "gini",
    "entropy",
    "tail_share",
    "head_share_1",
    "head_share_10",
    "log_variation",
    "log_median_to_mean",
    "log_count_skewness",
    "singleton_share",
)
NAMES = (*(f"user_{shape}" for shape in _SHAPES), *(f"item_{shape}" for shape in _SHAPES), "item_tail_index")

_TAIL_ITEMS = 20


def distribution_features(totals: DomainTotals) -> dict[str, float]:
    """Compute the shapes of the user and the item counts, and the power-law tail of the item counts."""
    users, items = np.sort(totals.user_counts), np.sort(totals.item_counts)
    values = (*_shapes(users), *_shapes(items), hill_tail_index(items))
    return dict(zip(NAMES, values, strict=True))


def _shapes(counts: np.ndarray) -> tuple[float, ...]:
    total, size = counts.sum(), len(counts)
    mean = total / size
    return (
        gini(counts),
        normalised_entropy(counts),
        float(counts[: int(0.8 * size)].sum() / total),
        float(counts[size - math.ceil(0.01 * size) :].sum() / total),
        float(counts[size - math.ceil(0.1 * size) :].sum() / total),
        math.log1p(counts.std() / mean),
        math.log(np.median(counts) / mean),
        skewness(np.log(counts)),
        float(np.mean(counts == 1)),
    )


def gini(ascending: np.ndarray) -> float:
    """Gini coefficient of ascending counts: 2 Σ i x_i / (n Σ x) - (n + 1) / n with i from 1; 0 when all are equal."""
    size = len(ascending)
    return float(2 * np.dot(np.arange(1, size + 1), ascending) / (size * ascending.sum()) - (size + 1) / size)


def normalised_entropy(counts: np.ndarray) -> float:
    """Entropy of counts as shares, divided by the logarithm of their number: 1 when all are equal; NaN for one."""
    if len(counts) < 2:
        return math.nan
    positive = counts[counts > 0]
    shares = positive / positive.sum()
    return float(-np.dot(shares, np.log(shares)) / math.log(len(counts)))


def skewness(values: np.ndarray) -> float:
    """Third standardised moment; NaN when all values are equal."""
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    return float(np.mean(centred**3)) / variance**1.5 if variance > 1e-12 else math.nan


def hill_tail_index(ascending: np.ndarray) -> float:
    """Hill's estimate of 1/alpha, alpha the power-law exponent, on the top tenth of ascending counts.

    Mean of log(x_i / x_k) over the counts above the k-th largest, k = ceil(n / 10) + 1. Zero means no tail; NaN below
    20 counts. (Hill, "A simple general approach to inference about the tail of a distribution", 1975.)
    """
    if len(ascending) < _TAIL_ITEMS:
        return math.nan
    top = ascending[len(ascending) - math.ceil(len(ascending) / 10) - 1 :]
    return float(np.mean(np.log(top[1:] / top[0])))
