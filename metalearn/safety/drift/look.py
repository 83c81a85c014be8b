"""One look at incoming data: a current window against a reference, feature by feature and all together.

Shape legend: N rows of the reference, M rows of the current window, F features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from metalearn.safety.drift.multiple_testing import benjamini_hochberg
from metalearn.safety.drift.windows import mean_discrepancy, population_stability

Marginal = Literal["stability", "mean"]
"""What is tested of each feature: its distribution, which takes hundreds of rows, or its mean, which takes a few."""

LARGEST_WINDOW = 128
"""Rows of a window that the joint test takes at most; it is quadratic in them."""
_FIRST_PERMUTATIONS = 199
_HOPELESS = 0.1
"""A p-value as large after the first permutations is left at that: more would not make it small."""


class Look(NamedTuple):
    """What a look found."""

    significant: bool
    p_value: float
    """of the joint test, NaN if it could not be made"""
    rejected: np.ndarray
    """bool [F], features that moved"""
    size: np.ndarray
    """[F] population stability index, or difference of means in standard deviations; NaN where not tested"""


def look(reference: np.ndarray, current: np.ndarray, *, level: float, marginal: Marginal, seed: int) -> Look:
    """Test whether a window of data is from the distribution of the reference.

    Half of the level goes to the features, one by one, which says what moved; the other half to the maximum mean
    discrepancy of all together, which sees what no feature shows by itself. Many features are tested at once:

    - `stability`: Benjamini-Hochberg over the p-values of their stability indices.
    - `mean`: by how often a random split of the rows moves *any* feature as far (single-step maxT of Westfall & Young,
      "Resampling-based multiple testing", 1993). Meta-features of windows are few rows, not normal, and depend on each
      other. For Benjamini-Hochberg over 50 of them, a p-value of 1e-5 would be needed: no test without a distribution
      gives one from 24 rows, and Student's t raised ten false alarms for each that it promised. The maximum needs one
      p-value for all, and no distribution.

    Args:
      reference: [N, F], N at least 4; NaN where not measured.
      current: [M, F], M at least 2.
      level: chance of finding something where nothing moved, in (0, 1). Splits of few rows are few: nothing can be
        found where there are fewer than 2 / level ways to choose M of N + M.
      marginal: `stability` for rows that are samples, `mean` for rows that are meta-features of a window each.
      seed: of the permutations.
    """
    if marginal == "stability":
        tests = [population_stability(old, new) for old, new in zip(reference.T, current.T, strict=True)]
        size, p_values = (np.array(column) for column in zip(*tests, strict=True))
        rejected = benjamini_hochberg(p_values, level / 2.0)
    else:
        size, p_values = _mean_shift(reference, current, level / 2.0, seed)
        rejected = p_values <= level / 2.0
    joint = _joint_test(reference, current, level / 2.0, seed)
    return Look(bool(rejected.any() or joint <= level / 2.0), joint, rejected, size)


def _mean_shift(reference: np.ndarray, current: np.ndarray, level: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns [F] differences in standard deviations of the reference, and p-values adjusted for all features."""
    rows, usable = _scaled(np.concatenate([reference, current]))
    size, p_values = np.full(len(usable), np.nan), np.ones(len(usable))
    if not usable.any():
        return size, p_values
    old, new = len(reference), len(current)
    spread = np.maximum(rows[:old].std(0, ddof=1), 1e-3)
    difference = rows[old:].mean(0) - rows[:old].mean(0)
    size[usable] = difference / spread
    reached = np.zeros(len(difference))
    wanted = int(np.ceil(2.0 / level))
    total = 0
    for number in (_FIRST_PERMUTATIONS, wanted):
        rng = np.random.default_rng([seed, total])
        chosen = rng.permuted(np.broadcast_to(np.arange(old + new) < new, (number, old + new)), axis=1)
        # Rows are centred: the mean of the rest follows from that of the chosen.
        moves = np.abs(chosen @ rows) * (1.0 / new + 1.0 / old)
        furthest = moves.max(1)
        reached += (furthest[:, None] >= np.abs(difference) - 1e-9).sum(0)
        total += number
        if ((1.0 + reached) / (1.0 + total) > _HOPELESS).all():
            break
    p_values[usable] = (1.0 + reached) / (1.0 + total)
    return size, p_values


def _joint_test(reference: np.ndarray, current: np.ndarray, level: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    old, new = (
        window if len(window) <= LARGEST_WINDOW else window[rng.choice(len(window), LARGEST_WINDOW, replace=False)]
        for window in (reference, current)
    )
    rows, usable = _scaled(np.concatenate([old, new]))
    if not usable.any():
        return float("nan")
    windows = rows[: len(old)], rows[len(old) :]
    first = mean_discrepancy(*windows, seed=seed, num_permutations=_FIRST_PERMUTATIONS)
    if first.p_value > _HOPELESS:
        return first.p_value
    return mean_discrepancy(*windows, seed=seed, num_permutations=int(np.ceil(2.0 / level))).p_value


def _scaled(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features that can be compared, centred and scaled, and bool [F] which they are.

    The scale is that of all rows, so that it stays as it is when they are permuted.
    """
    usable = np.isfinite(rows).all(0)
    known = np.where(usable, rows, 0.0)
    known = known / np.maximum(np.abs(known).max(0), 1e-300)
    known = known - known.mean(0)
    spread = known.std(0)
    usable &= spread > 1e-9
    return known[:, usable] / spread[usable], usable
