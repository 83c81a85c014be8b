"""Live signals of a training run: raw interval statistics and the scale-free features made of them."""

from metalearn.signals.features import (
    FEATURE_SCHEMA_VERSION,
    GLOBAL_FEATURES,
    GROUP_FEATURES,
    Controls,
    SignalFeatures,
    SignalHistory,
    featurize,
    initial_history,
)
from metalearn.signals.normalizer import fit_knots, out_of_range, percentile_scale
from metalearn.signals.statistics import GROUP_STATISTICS, IntervalStatistics, ProbeSums, interval_statistics

__all__ = [
    "FEATURE_SCHEMA_VERSION",
    "GLOBAL_FEATURES",
    "GROUP_FEATURES",
    "GROUP_STATISTICS",
    "Controls",
    "IntervalStatistics",
    "ProbeSums",
    "SignalFeatures",
    "SignalHistory",
    "featurize",
    "fit_knots",
    "initial_history",
    "interval_statistics",
    "out_of_range",
    "percentile_scale",
]
