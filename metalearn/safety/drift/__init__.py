"""Drift: of validation metrics and signals, of the meta-features of incoming data, and of samples of it."""

from metalearn.safety.drift.change import Change, Kind, tell_apart
from metalearn.safety.drift.detector import (
    Degree,
    DetectorConfig,
    DetectorState,
    DetectorVerdict,
    Direction,
    init,
    update,
)
from metalearn.safety.drift.look import Look, look
from metalearn.safety.drift.monitor import DriftConfig, DriftMonitor
from metalearn.safety.drift.multiple_testing import benjamini_hochberg, level_of_look
from metalearn.safety.drift.profile_watch import (
    ProfileVerdict,
    ProfileWatchConfig,
    ProfileWatchState,
    profile_row,
    watch_profile,
)
from metalearn.safety.drift.report import DriftReport, Response
from metalearn.safety.drift.response import RESPONSES, Chosen, Loosening, choose_response
from metalearn.safety.drift.seasons import find_period, seasonal_profile
from metalearn.safety.drift.thresholds import cusum_run_length, cusum_threshold
from metalearn.safety.drift.windows import Discrepancy, Stability, mean_discrepancy, population_stability

__all__ = [
    "RESPONSES",
    "Change",
    "Chosen",
    "Degree",
    "DetectorConfig",
    "DetectorState",
    "DetectorVerdict",
    "Direction",
    "Discrepancy",
    "DriftConfig",
    "DriftMonitor",
    "DriftReport",
    "Kind",
    "Look",
    "Loosening",
    "ProfileVerdict",
    "ProfileWatchConfig",
    "ProfileWatchState",
    "Response",
    "Stability",
    "benjamini_hochberg",
    "choose_response",
    "cusum_run_length",
    "cusum_threshold",
    "find_period",
    "init",
    "level_of_look",
    "look",
    "mean_discrepancy",
    "population_stability",
    "profile_row",
    "seasonal_profile",
    "tell_apart",
    "update",
    "watch_profile",
]
