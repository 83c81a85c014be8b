"""Percentile scaling: maps any feature to [-1, 1] by where it stands among the meta-training distribution.

Shape legend: F feature, K knot.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

NUM_KNOTS = 17
TAIL = 0.6
"""How far beyond ±1 a value outside the training range is told apart before it is clipped."""


def fit_knots(samples: np.ndarray, num_knots: int = NUM_KNOTS) -> np.ndarray:
    """Fits knots at evenly spaced percentiles, from the 0.5th to the 99.5th.

    Args:
      samples: [N, F] raw features; NaN entries are left out, a feature never seen gets knots 0..1.

    Returns:
      float32 [F, K], strictly increasing in K.
    """
    levels = np.linspace(0.5, 99.5, num_knots)
    knots = np.empty((samples.shape[1], num_knots))
    for index, column in enumerate(np.asarray(samples, np.float64).T):
        column = column[np.isfinite(column)]
        knots[index] = np.percentile(column, levels) if column.size else np.linspace(0.0, 1.0, num_knots)
    # Ties (a feature that is mostly one value) are spread by a hair of the range so that every segment has a width; of
    # a constant one by a hair of its size, or float32 would close the gaps again.
    size = np.abs(knots).max(axis=1, keepdims=True)
    width = np.maximum(knots[:, -1:] - knots[:, :1], np.maximum(1e-2 * size, 1e-3)) * 1e-4
    return (np.maximum.accumulate(knots, axis=1) + np.arange(num_knots) * width).astype(np.float32)


def percentile_scale(values: Any, knots: Any, xp: ModuleType) -> Any:
    """Maps features to [-1 - TAIL, 1 + TAIL]: piecewise linear between knots, a short linear tail beyond; NaN to 0.

    Args:
      values: [..., F].
      knots: [F, K] from `fit_knots`.
      xp: `numpy` or `jax.numpy`.

    >>> knots = np.linspace(0.0, 8.0, 17, dtype=np.float32)[None]
    >>> [float(percentile_scale(np.array([x]), knots, np)[0]) for x in (4.0, 8.0, 1e9, float("nan"))]
    [0.0, 1.0, 1.6, 0.0]
    """
    low, high = knots[:, :-1], knots[:, 1:]
    inside = xp.minimum(xp.maximum((values[..., None] - low) / (high - low), 0.0), 1.0)
    span = knots[:, -1] - knots[:, 0]
    above = xp.minimum(xp.maximum((values - knots[:, -1]) / span, 0.0), TAIL)
    below = xp.minimum(xp.maximum((knots[:, 0] - values) / span, 0.0), TAIL)
    scaled = -1.0 + inside.sum(-1) * (2.0 / (knots.shape[1] - 1)) + above - below
    return xp.where(xp.isfinite(values), scaled, 0.0)


def out_of_range(scaled: Any, xp: ModuleType) -> Any:
    """Measures how far features lie outside the meta-training distribution.

    Args:
      scaled: [..., F] from `percentile_scale`.

    Returns:
      [...] mean excess over the range, 0 (all inside) to 1 (all far outside).
    """
    return (xp.maximum(xp.abs(scaled) - 1.0, 0.0) / TAIL).mean(-1)
