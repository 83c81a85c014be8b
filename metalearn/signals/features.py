"""Scale-free features of a training run: one code path for NumPy (in use) and jax.numpy (in meta-training).

Shape legend: G parameter group, F feature, K half-life.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from metalearn.signals.statistics import IntervalStatistics

FEATURE_SCHEMA_VERSION = 2

HALF_LIVES = (1.0, 3.0, 9.0)
"""Half-lives of the moving averages, in intervals: from one decision to about half a run of twenty."""

LEAST_FALL = 0.03
"""Of the training loss, as a share of what it was at first, before the generalisation gap can be told from noise."""

GROUP_FEATURES = (
    "gradient_cosine",
    "gradient_fast_trend",
    "gradient_slow_trend",
    "gradient_below_peak",
    "update_ratio",
    "update_trend",
    "shrinkage",
    "scaled_curvature",
    "straightness",
    "touched",
    "weight_growth",
    "learning_rate_residual",
    "weight_decay_residual",
    "beta1_residual",
)
GLOBAL_FEATURES = (
    "loss_fast_trend",
    "loss_slow_trend",
    "loss_above_best",
    "loss_noise",
    "validation_below_best",
    "validation_change",
    "validation_z_score",
    "validation_trend",
    "validation_gain",
    "plateau_share",
    "plateau_length",
    "progress",
    "epochs",
    "epochs_per_interval",
    "decisions",
    "dropout_residual",
    "dropout",
    "horizon_known",
    "validation_missing",
    "loss_not_finite",
    "generalization_gap",
)


class Controls(NamedTuple):
    """What the controller had set during the interval that the statistics describe."""

    learning_rate: Any
    """[G] rate in force at the interval's end, schedule included"""
    weight_decay: Any
    """[G]"""
    group_residual: Any
    """[G, 3] position in the trust region of learning rate, weight decay, beta1; -1 to 1"""
    dropout: Any
    dropout_residual: Any
    progress: Any
    """share of the horizon done, NaN when the horizon is unknown"""
    epochs: Any
    """passes over the training data so far, NaN when unknown"""


class SignalHistory(NamedTuple):
    """What `featurize` remembers between intervals; NaN where nothing was measured yet."""

    count: Any
    loss: Any
    """[K] moving averages of the mean loss"""
    loss_best: Any
    validation: Any
    """[K] moving averages of the metric"""
    validation_first: Any
    validation_best: Any
    validation_last: Any
    validation_noise: Any
    """moving average of the absolute change of the metric"""
    since_best: Any
    """decisions since the best validation"""
    log_gradient: Any
    """[K, G] moving averages of log gradient norm"""
    log_gradient_peak: Any
    """[G]"""
    log_update: Any
    """[K, G] moving averages of log update ratio"""
    weight_norm_first: Any
    """[G]"""
    training_sample_loss_first: Any
    """the first that was reported"""


class SignalFeatures(NamedTuple):
    """Features of one decision; NaN where the loop did not measure what a feature needs."""

    group: Any
    """[G, len(GROUP_FEATURES)]"""
    run: Any
    """[len(GLOBAL_FEATURES)]"""


def initial_history(num_groups: int, xp: ModuleType, dtype: Any) -> SignalHistory:
    """Returns the history of a run that has measured nothing yet."""
    nan = xp.full((), float("nan"), dtype)
    per_half_life = xp.full((len(HALF_LIVES),), float("nan"), dtype)
    per_group = xp.full((num_groups,), float("nan"), dtype)
    both = xp.full((len(HALF_LIVES), num_groups), float("nan"), dtype)
    zero = xp.zeros((), dtype)
    return SignalHistory(
        zero, per_half_life, nan, per_half_life, nan, nan, nan, nan, zero, both, per_group, both, per_group, nan
    )


def featurize(
    statistics: IntervalStatistics, controls: Controls, history: SignalHistory, xp: ModuleType
) -> tuple[SignalFeatures, SignalHistory]:
    """Turns one interval's statistics into scale-free features and the next history.

    Every feature is a ratio, a relative change or a share: none changes when the mean loss, the metric, the gradient
    norms or the weight norms are multiplied by a constant, and none depends on sizes or on wall-clock time. One keeps a
    unit, the loss's: `scaled_curvature`, the rate times the curvature.

    `generalization_gap` is the share of what the training loss has fallen by, since it was first reported, that the
    validation loss has not followed it in: 0 where nothing is memorised, 1 where the rest is. It tells whether a model
    wants more weight decay or less (docs/evidence.md).

    Args:
      statistics: raw measurements, NaN where not measured.
      controls: the hyperparameters in force.
      history: from `initial_history` or the previous call.
      xp: `numpy` or `jax.numpy`.

    Returns:
      The features and the next history; pure, no argument is changed.
    """
    dtype = history.loss.dtype
    decay = 0.5 ** (1.0 / xp.asarray(HALF_LIVES, dtype))
    steps = xp.maximum(xp.asarray(statistics.steps, dtype), 1.0)
    tiny = 1e-12
    nan = xp.full((), float("nan"), dtype)

    def log(value):
        return xp.log(xp.maximum(value, tiny))

    def average(old, new, rate):
        blended = xp.where(xp.isfinite(old), rate * old + (1.0 - rate) * new, new)
        return xp.where(xp.isfinite(new), blended, old)

    def best(old, new, pick):
        return xp.where(xp.isfinite(old) & xp.isfinite(new), pick(old, new), xp.where(xp.isfinite(new), new, old))

    mean_loss = statistics.loss_sum / steps
    variance = xp.maximum(statistics.loss_square_sum / steps - mean_loss * mean_loss, 0.0)
    loss = average(history.loss, mean_loss, decay)
    loss_best = best(history.loss_best, mean_loss, xp.minimum)
    loss_scale = xp.abs(loss[-1]) + xp.sqrt(variance) + tiny

    value = statistics.validation
    validation = average(history.validation, value, decay)
    validation_first = xp.where(xp.isfinite(history.validation_first), history.validation_first, value)
    validation_best = best(history.validation_best, value, xp.maximum)
    improved = xp.isfinite(value) & ~(value <= history.validation_best)
    since_best = xp.where(improved, 0.0, history.since_best + 1.0)
    change = value - history.validation_last
    scale = xp.abs(validation_best) + tiny
    noise = average(history.validation_noise, xp.abs(change), decay[1])

    log_gradient_now = log(statistics.gradient_norm)
    log_gradient = average(history.log_gradient, log_gradient_now, decay[:, None])
    log_gradient_peak = best(history.log_gradient_peak, log_gradient_now, xp.maximum)
    log_update_now = log(statistics.update_ratio)
    log_update = average(history.log_update, log_update_now, decay[:, None])
    weight_norm_first = xp.where(
        xp.isfinite(history.weight_norm_first), history.weight_norm_first, statistics.weight_norm
    )

    training_sample_loss = xp.asarray(statistics.training_sample_loss, dtype)
    training_sample_loss_first = xp.where(
        xp.isfinite(history.training_sample_loss_first), history.training_sample_loss_first, training_sample_loss
    )
    fallen = training_sample_loss_first - training_sample_loss
    gap = (statistics.validation_loss - training_sample_loss) / xp.maximum(fallen, tiny)
    gap = xp.where(fallen >= LEAST_FALL * xp.abs(training_sample_loss_first), gap, nan)

    count = history.count + 1.0
    group = xp.stack(
        [
            statistics.gradient_cosine,
            log_gradient[0] - log_gradient[1],
            log_gradient[1] - log_gradient[2],
            log_gradient_now - log_gradient_peak,
            log_update_now,
            log_update[0] - log_update[1],
            log(controls.learning_rate * controls.weight_decay * steps),
            xp.arcsinh(statistics.curvature * controls.learning_rate),
            log(statistics.displacement / (steps * statistics.update_ratio + tiny)),
            log(statistics.touched),
            log(statistics.weight_norm / (weight_norm_first + tiny)),
            controls.group_residual[:, 0],
            controls.group_residual[:, 1],
            controls.group_residual[:, 2],
        ],
        -1,
    )
    epochs = xp.asarray(controls.epochs, dtype)
    progress = xp.asarray(controls.progress, dtype)
    run = xp.stack(
        [
            (loss[0] - loss[1]) / loss_scale,
            (loss[1] - loss[2]) / loss_scale,
            (mean_loss - loss_best) / loss_scale,
            log(xp.sqrt(variance) / loss_scale),
            (value - validation_best) / scale,
            change / scale,
            change / (noise + tiny * scale),
            (validation[0] - validation[2]) / scale,
            (validation_best - validation_first) / scale,
            since_best / count,
            xp.log1p(since_best),
            progress,
            log(epochs),
            log(epochs / count),
            xp.log(count),
            xp.asarray(controls.dropout_residual, dtype),
            xp.asarray(controls.dropout, dtype),
            xp.where(xp.isfinite(progress), xp.ones((), dtype), xp.zeros((), dtype)),
            xp.where(xp.isfinite(value), xp.zeros((), dtype), xp.ones((), dtype)),
            xp.where(xp.asarray(statistics.nonfinite, dtype) > 0, xp.ones((), dtype), xp.zeros((), dtype)),
            gap,
        ]
    )
    history = SignalHistory(
        count,
        loss,
        loss_best,
        validation,
        validation_first,
        validation_best,
        xp.where(xp.isfinite(value), value, history.validation_last),
        noise,
        since_best,
        log_gradient,
        log_gradient_peak,
        log_update,
        weight_norm_first,
        training_sample_loss_first,
    )
    return SignalFeatures(group, run), history
