"""What a training loop measures in one interval, before any feature is made of it.

Shape legend: G parameter group.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple


class ProbeSums(NamedTuple):
    """Sums over one pair of successive optimizer steps, per parameter group; each is [G].

    With w, g the weights and gradient before the first step, w', g' before the second, and w₀ the weights at the
    previous interval's probe.
    """

    gradient_square: Any
    """‖g‖²"""
    next_gradient_square: Any
    """‖g'‖²"""
    gradient_dot: Any
    """g·g'"""
    update_square: Any
    """‖w' - w‖²"""
    weight_square: Any
    """‖w'‖²"""
    curvature_dot: Any
    """(g' - g)·(w' - w)"""
    displacement_square: Any
    """‖w' - w₀‖²; NaN at the first probe"""
    rows_touched: Any
    """rows of matrices whose gradient g' is not zero"""
    rows: Any
    """rows of matrices"""


class IntervalStatistics(NamedTuple):
    """Raw measurements of one interval between decisions. NaN stands for "not measured".

    Scalars unless [G] is said. `seconds` is for throughput and the log; no feature depends on it, so that a resumed run
    decides the same to the bit.
    """

    steps: Any
    """optimizer steps applied"""
    samples: Any
    """training samples seen; NaN if the loop does not say"""
    seconds: Any
    loss_sum: Any
    loss_square_sum: Any
    gradient_norm: Any
    """[G] ‖g'‖"""
    gradient_cosine: Any
    """[G] cosine of successive gradients, in [-1, 1]"""
    update_ratio: Any
    """[G] ‖w' - w‖ / ‖w'‖"""
    curvature: Any
    """[G] secant curvature (g' - g)·(w' - w) / ‖w' - w‖²"""
    weight_norm: Any
    """[G] ‖w'‖"""
    displacement: Any
    """[G] ‖w' - w₀‖ / ‖w'‖ since the previous interval"""
    touched: Any
    """[G] share of rows that one step's gradient touches"""
    nonfinite: Any
    """steps whose loss was not finite"""
    validation: Any
    """validation metric, higher is better"""
    validation_loss: Any = math.nan
    """mean loss of validation data"""
    training_sample_loss: Any = math.nan
    """mean loss of training data, of the same weights and in the same way as `validation_loss`"""


GROUP_STATISTICS = (
    "gradient_norm",
    "gradient_cosine",
    "update_ratio",
    "curvature",
    "weight_norm",
    "displacement",
    "touched",
)
"""Statistics with a value for each parameter group; the others are numbers."""


def interval_statistics(
    sums: ProbeSums,
    *,
    steps: Any,
    loss_sum: Any,
    loss_square_sum: Any,
    nonfinite: Any,
    validation: Any,
    samples: Any,
    seconds: Any,
    xp: ModuleType,
    validation_loss: Any = math.nan,
    training_sample_loss: Any = math.nan,
) -> IntervalStatistics:
    """Turns sums into ratios, the same way wherever they were measured.

    Args:
      sums: of one probe, each [G].
      steps, loss_sum, loss_square_sum, nonfinite, validation, samples, seconds: as in `IntervalStatistics`.
      xp: `numpy` or `jax.numpy`.
      validation_loss, training_sample_loss: as in `IntervalStatistics`.
    """
    tiny = 1e-30
    weight_norm = xp.sqrt(sums.weight_square)
    return IntervalStatistics(
        steps=steps,
        samples=samples,
        seconds=seconds,
        loss_sum=loss_sum,
        loss_square_sum=loss_square_sum,
        gradient_norm=xp.sqrt(sums.next_gradient_square),
        gradient_cosine=sums.gradient_dot / (xp.sqrt(sums.gradient_square) * xp.sqrt(sums.next_gradient_square) + tiny),
        update_ratio=xp.sqrt(sums.update_square / (sums.weight_square + tiny)),
        curvature=sums.curvature_dot / (sums.update_square + tiny),
        weight_norm=weight_norm,
        displacement=xp.sqrt(sums.displacement_square / (sums.weight_square + tiny)),
        touched=sums.rows_touched / xp.maximum(sums.rows, 1.0),
        nonfinite=nonfinite,
        validation=validation,
        validation_loss=validation_loss,
        training_sample_loss=training_sample_loss,
    )
