"""What kind of change a stream went through: at once, or little by little.

Shape legend: N points, C candidate times of the change.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from metalearn.safety.drift.baseline import Harmful

Kind = Literal["abrupt", "gradual", "seasonal"]


class Change(NamedTuple):
    """The change that explains a stream best."""

    kind: Kind
    index: int
    """of the first point after it began"""
    shift: float
    """what it added by the last point, in the stream's own unit"""


def tell_apart(
    time: np.ndarray,
    values: np.ndarray,
    *,
    harmful: Harmful = "both",
    trend: bool = True,
) -> Change:
    """Tells an abrupt change from a gradual one, by least squares.

    Fits y = a + b·time + c·g(t) for every time of change: g is a step (abrupt), or a line that leaves 0 there
    (gradual). Both cost the same parameters, so the smaller residual is the likelier; ties are abrupt. As in the
    baseline, b never points to harm: otherwise a long decline would be taken for the trend. Noise is taken for
    independent: its correlation, as estimated online, is inflated by the very change, and whitening by it told gradual
    changes less often.

    Args:
      time: [N] ascending, in the unit in which the trend is a line.
      values: [N], finite, N at least 4.
      harmful: which way of the stream is harm.
      trend: whether the stream has one (b) when nothing changes.

    >>> time = np.arange(20.0)
    >>> tell_apart(time, np.where(time < 12, 0.0, -3.0)).kind
    'abrupt'
    >>> tell_apart(time, np.where(time < 12, 0.0, 12 - time)).kind
    'gradual'
    """
    position = np.arange(len(values))
    begins = np.arange(2, len(values) - 1)
    steps = (position[:, None] >= begins).astype(np.float64)
    lines = np.maximum(position[:, None] - begins + 1.0, 0.0)
    middle, unit = values.mean(), max(float(np.abs(values - values.mean()).max()), 1e-300)
    columns = [np.ones(len(time)), (time - time[0]) / max(time[-1] - time[0], 1e-300)]
    basis = np.stack(columns[: 1 + trend], axis=1)
    fits = []
    for shapes in (steps, lines):
        error, size = _fit(basis, (values - middle) / unit, shapes, harmful if trend else "both")
        best = int(np.argmin(error))
        fits.append((float(error[best]), int(begins[best]), float(size[best] * shapes[-1, best] * unit)))
    kind: Kind = "gradual" if fits[1][0] < fits[0][0] else "abrupt"
    _, index, shift = fits[kind == "gradual"]
    return Change(kind, index, shift)


def _fit(trend: np.ndarray, values: np.ndarray, shapes: np.ndarray, harmful: Harmful) -> tuple[np.ndarray, np.ndarray]:
    """Returns [C] the residual sum of squares and the size of each shape [N, C] beside the trend [N, 2]."""
    error, size, slope = _beside(trend, values, shapes)
    if harmful == "both":
        return error, size
    flat_error, flat_size, _ = _beside(trend[:, :1], values, shapes)
    bad = slope < 0.0 if harmful == "down" else slope > 0.0
    return np.where(bad, flat_error, error), np.where(bad, flat_size, size)


def _beside(trend: np.ndarray, values: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Frisch, Waugh and Lovell: with the trend taken out of values and shapes, each shape is a regression of its own.
    inverse = np.linalg.pinv(trend)
    rest, free = values - trend @ (inverse @ values), shapes - trend @ (inverse @ shapes)
    square = (free * free).sum(0)
    size = np.where(square > 1e-12, free.T @ rest / np.maximum(square, 1e-12), 0.0)
    slope = (inverse @ values)[-1] - (inverse @ shapes)[-1] * size
    return rest @ rest - size * size * square, size, slope
