"""Metrics of predictions for single events, such as clicks.

Shape legend: N events.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from metalearn.errors import InvalidArgumentError


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive is scored above a negative, a tie counting half: the area under the ROC curve.

    With ranks r from 1 in order of score, tied ones sharing their mean, of P positives and Q negatives:

        (sum over positives of r - P (P + 1) / 2) / (P Q)

    Args:
        scores: float [N], finite; higher is more likely.
        labels: [N], 0 or 1.

    Returns:
        The area in [0, 1]; NaN if all labels are equal.

    Example:
        >>> area_under_curve(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))  # 3.5 of 4 pairs
        0.875

    Source: Hanley and McNeil (1982), The meaning and use of the area under a ROC curve, Radiology 143(1).
    """
    values, positive = _check(scores, labels, "scores", bounds=(-np.inf, np.inf))
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log of the probability given to what happened; probabilities are clipped at the float64 epsilon.

    Args:
        probabilities: float [N] in [0, 1], of label 1.
        labels: [N], 0 or 1.

    Example:
        >>> round(log_loss(np.array([0.5, 0.25]), np.array([1, 0])), 6)  # (log 2 + log 4/3) / 2
        0.490415
    """
    predicted, positive = _check(probabilities, labels, "probabilities", bounds=(0.0, 1.0))
    clipped = np.clip(predicted, np.finfo(np.float64).eps, 1.0 - np.finfo(np.float64).eps)
    return float(-np.mean(np.log(np.where(positive, clipped, 1.0 - clipped))))


def calibration_error(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    """Expected calibration error: how far predicted shares are from actual ones, over bins of similar predictions.

        sum over bins of n_b / N |mean prediction in b - share of positives in b|

    Args:
        probabilities: float [N] in [0, 1], of label 1.
        labels: [N], 0 or 1.
        bins: number of bins; a prediction on an edge belongs to the bin below.
        binning: "width" for bins of equal width, "mass" for edges at quantiles of the predictions; predictions that are
            equal stay together.

    Raises:
        InvalidArgumentError: bad arguments; the message names them.

    Example:
        >>> labels = np.array([0, 0, 1, 1])  # bins [.1, .2] and [.7, .9]: (2 |.15 - 0| + 2 |.8 - 1|) / 4
        >>> round(calibration_error(np.array([0.1, 0.2, 0.7, 0.9]), labels, bins=2), 6)
        0.175

    Source: Guo et al. (2017), On calibration of modern neural networks, ICML, equation 3.
    """
    predicted, positive = _check(probabilities, labels, "probabilities", bounds=(0.0, 1.0))
    if bins < 1:
        raise InvalidArgumentError(f"`bins` must be a positive int, got {bins}; the usual value is 15")
    if binning not in ("width", "mass"):
        raise InvalidArgumentError(f"`binning` must be 'width' or 'mass', got {binning!r}")
    inner = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    # A percentile can be a prediction itself; scikit-learn rounds it the same way.
    edges = inner if binning == "width" else np.percentile(predicted, 100.0 * inner)
    which = np.searchsorted(edges, predicted, side="left")
    gaps = np.bincount(which, weights=predicted - positive)
    return float(np.abs(gaps).sum() / len(predicted))


def _check(
    values: np.ndarray, labels: np.ndarray, name: str, *, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    numbers, classes = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if numbers.ndim != 1 or numbers.shape != classes.shape or len(numbers) == 0:
        raise InvalidArgumentError(
            f"`{name}` and `labels` must be of one length, at least 1, in one dimension, got {list(numbers.shape)} and "
            f"{list(classes.shape)}"
        )
    if not (np.isfinite(numbers) & (numbers >= bounds[0]) & (numbers <= bounds[1])).all():
        raise InvalidArgumentError(
            f"`{name}` must be finite and within {bounds[0]:g}..{bounds[1]:g}, got {numbers.min()}..{numbers.max()}"
        )
    if not np.isin(classes, (0, 1)).all():
        raise InvalidArgumentError(f"`labels` must be 0 or 1, got {np.unique(classes)[:5].tolist()}")
    return numbers, classes.astype(bool)
