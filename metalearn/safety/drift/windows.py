"""Whether two windows of data are from one distribution: population stability, and maximum mean discrepancy.

Shape legend: N rows of the reference, M rows of the current window, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from metalearn.errors import InvalidArgumentError

_PSEUDO_COUNT = 0.5
"""Added to each bin, so that an empty one has a logarithm."""


class Stability(NamedTuple):
    """How far a feature's distribution has moved."""

    index: float
    """population stability index; below 0.1 little, above 0.25 much, by custom (Siddiqi, 2006)"""
    p_value: float
    """chance of an index as large where nothing moved"""


class Discrepancy(NamedTuple):
    """How far the distributions of two windows are apart."""

    square: float
    """unbiased estimate of MMD²; may be below 0"""
    p_value: float
    """share of permutations with as large an estimate"""
    bandwidth: float
    """σ of the kernel exp(-‖x - y‖² / 2σ²)"""


def population_stability(reference: np.ndarray, current: np.ndarray, *, num_bins: int = 10) -> Stability:
    """Measure PSI = Σ (p - q) log(p / q) over bins at the reference's quantiles.

    Where nothing moved, PSI is about (1/N + 1/M) χ² with one degree of freedom less than bins; so a rate of false
    alarms sets the threshold, which the customary 0.1 and 0.25 do not: with few rows they are passed by chance alone
    (Yurdakul & Naranjo, "Statistical properties of the population stability index", Journal of Risk Model Validation
    14, 2020).

    Args:
      reference: [N], N at least 2; NaN (not measured) has a bin of its own.
      current: [M], M at least 2.
      num_bins: at least 2; bins that ties make equal are merged.

    Raises:
      InvalidArgumentError: fewer than 2 rows, or fewer than 2 bins.

    >>> rows = np.arange(1000.0)
    >>> round(population_stability(rows, rows).index, 6), population_stability(rows, rows + 300).index > 0.25
    (0.0, True)
    """
    from scipy.special import chdtrc

    if num_bins < 2:
        raise InvalidArgumentError(f"`num_bins` must be at least 2, got {num_bins!r}")
    known = reference[np.isfinite(reference)]
    if min(len(reference), len(current)) < 2:
        raise InvalidArgumentError(f"two rows a window are needed, got {len(reference)} and {len(current)}")
    edges = np.unique(np.quantile(known, np.linspace(0.0, 1.0, num_bins + 1)[1:-1])) if known.size else np.zeros(0)
    counts = [_counts(window, edges) for window in (reference, current)]
    used = counts[0] + counts[1] > 0.0
    num_used = int(used.sum())
    if num_used < 2:
        return Stability(0.0, 1.0)
    p, q = ((count[used] + _PSEUDO_COUNT) / (count.sum() + _PSEUDO_COUNT * num_used) for count in counts)
    index = float(((p - q) * np.log(p / q)).sum())
    scale = 1.0 / len(reference) + 1.0 / len(current)
    return Stability(index, float(chdtrc(num_used - 1, index / scale)))


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    inside = np.bincount(np.searchsorted(edges, values[finite], side="left"), minlength=len(edges) + 1)
    return np.append(inside, (~finite).sum()).astype(np.float64)


def mean_discrepancy(
    reference: np.ndarray,
    current: np.ndarray,
    *,
    seed: int,
    num_permutations: int = 1000,
    bandwidth: float | None = None,
) -> Discrepancy:
    """Estimate the squared maximum mean discrepancy, with the p-value of a permutation test.

    MMD² = mean k(x, x') + mean k(y, y') - 2 mean k(x, y), over pairs of different rows: unbiased (Gretton, Borgwardt,
    Rasch, Schölkopf & Smola, "A kernel two-sample test", JMLR 13, 2012, equation 3), k a Gaussian whose width is the
    median distance between rows of both windows (their section 8). Permutations give an exact p-value where rows are
    exchangeable: (1 + as large) / (1 + permutations).

    Args:
      reference: [N, F], finite, N at least 2; features on like scales.
      current: [M, F], M at least 2.
      seed: of the permutations.
      num_permutations: at least 1; the smallest p-value is 1 / (1 + num_permutations).
      bandwidth: above 0; the median distance by default.

    Raises:
      InvalidArgumentError: fewer than 2 rows, or features that do not match.

    >>> rng = np.random.default_rng(0)
    >>> rows = rng.standard_normal((60, 3))
    >>> mean_discrepancy(rows[:30], rows[30:], seed=0).p_value > 0.05
    True
    >>> mean_discrepancy(rows[:30], rows[30:] + 1.0, seed=0).p_value
    0.000999000999000999
    """
    if reference.ndim != 2 or current.ndim != 2 or reference.shape[1] != current.shape[1]:
        raise InvalidArgumentError(
            f"windows must be [rows, features] with the same features, got {reference.shape} and {current.shape}"
        )
    num_reference, num_current = len(reference), len(current)
    if min(num_reference, num_current) < 2:
        raise InvalidArgumentError(f"two rows a window are needed, got {num_reference} and {num_current}")
    rows = np.concatenate([reference, current])
    square = (rows * rows).sum(1)
    distance = np.maximum(square[:, None] + square - 2.0 * rows @ rows.T, 0.0)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(distance[np.triu_indices(len(rows), 1)]))) or 1.0
    kernel = np.exp(-distance / (2.0 * bandwidth**2))
    np.fill_diagonal(kernel, 0.0)
    first = np.zeros((num_permutations + 1, len(rows)))
    first[0, :num_reference] = 1.0
    rng = np.random.default_rng(seed)
    first[1:] = rng.permuted(np.broadcast_to(first[0], (num_permutations, len(rows))), axis=1)
    # With a the indicator of the first window: Σ k(x, x') = a'Ka, Σ k(x, y) = a'K1 - a'Ka, Σ k(y, y') the rest.
    within, reach, total = ((first @ kernel) * first).sum(1), first @ kernel.sum(1), kernel.sum()
    estimates = within / (num_reference * (num_reference - 1))
    estimates += (total - 2.0 * reach + within) / (num_current * (num_current - 1))
    estimates -= 2.0 * (reach - within) / (num_reference * num_current)
    # A permutation that is the split itself must count as large in spite of rounding.
    as_large = int((estimates[1:] >= estimates[0] - 1e-12).sum())
    return Discrepancy(float(estimates[0]), (1 + as_large) / (1 + num_permutations), bandwidth)
