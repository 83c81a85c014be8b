"""Intervals and domains for tests: made from a seed, plausible in size, with gaps where a loop measures nothing."""

from __future__ import annotations

import numpy as np

from metalearn.profiles import META_FEATURE_NAMES, DomainProfile
from metalearn.signals import Controls, IntervalStatistics


def make_interval(num_groups: int = 2, **changes) -> IntervalStatistics:
    """Return one interval with everything measured; `changes` replace fields."""
    ones = np.ones(num_groups)
    fields = {
        "steps": 50.0,
        "samples": 3200.0,
        "seconds": 0.5,
        "loss_sum": 30.0,
        "loss_square_sum": 19.0,
        "gradient_norm": 0.2 * ones,
        "gradient_cosine": 0.3 * ones,
        "update_ratio": 0.01 * ones,
        "curvature": 0.5 * ones,
        "weight_norm": 4.0 * ones,
        "displacement": 0.2 * ones,
        "touched": 0.6 * ones,
        "nonfinite": 0.0,
        "validation": 0.1,
        "validation_loss": 0.6,
        "training_sample_loss": 0.5,
    }
    return IntervalStatistics(**{name: np.asarray(value, np.float64) for name, value in (fields | changes).items()})


def make_controls(index: int, num_groups: int = 2, **changes) -> Controls:
    """Return what is in force during interval `index` of a run of twenty."""
    ones = np.ones(num_groups)
    controls = Controls(
        learning_rate=0.02 * ones,
        weight_decay=0.3 * ones,
        group_residual=np.full((num_groups, 3), 0.1 * (index % 5) - 0.2),
        dropout=np.float64(0.1),
        dropout_residual=np.float64(-0.05),
        progress=np.float64((index + 1) / 20),
        epochs=np.float64(0.3 * (index + 1)),
    )
    return controls._replace(**changes)


def random_intervals(
    seed: int, *, num_groups: int = 2, count: int = 20, missing: float = 0.15
) -> list[IntervalStatistics]:
    """Return the intervals of a run that learns; each measurement is NaN with probability `missing`."""
    rng, of_losses = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    intervals = []
    for index in range(count):
        steps = float(rng.integers(20, 60))
        losses = 0.7 * 0.95**index * rng.uniform(0.5, 1.5, int(steps))
        values = {
            "gradient_norm": np.exp(rng.normal(-2.0, 1.0, num_groups)),
            "gradient_cosine": rng.uniform(-1.0, 1.0, num_groups),
            "update_ratio": np.exp(rng.normal(-4.0, 0.5, num_groups)),
            "curvature": rng.normal(0.0, 20.0, num_groups),
            "weight_norm": 4.0 * (1.0 + 0.1 * index) * rng.uniform(0.9, 1.1, num_groups),
            "displacement": rng.uniform(0.01, 0.4, num_groups),
            "touched": rng.uniform(0.1, 1.0, num_groups),
            "loss_sum": losses.sum(),
            "loss_square_sum": np.square(losses).sum(),
            "validation": 0.1 + 0.01 * index + rng.normal(0.0, 0.01),
            "samples": steps * 64,
        }
        for name in values:
            if name != "loss_square_sum":
                gaps = rng.random(np.shape(values[name])) < missing
                values[name] = np.where(gaps, np.nan, values[name])
        values["training_sample_loss"] = 0.7 * 0.95**index if of_losses.random() >= missing else np.nan
        values["validation_loss"] = 0.7 * 0.97**index
        intervals.append(make_interval(num_groups, steps=steps, seconds=rng.random(), **values))
    return intervals


def make_profile(seed: int = 0, *, size: float = 3.0) -> DomainProfile:
    """Return the profile of a made-up domain whose meta-features are of about `size`."""
    rng = np.random.default_rng(seed)
    return DomainProfile(
        values=rng.uniform(-size, size, len(META_FEATURE_NAMES)),
        mask=rng.random(len(META_FEATURE_NAMES)) < 0.9,
        fingerprint=f"{seed:064d}",
        num_users=1000,
        num_items=400,
        num_interactions=20_000,
    )
