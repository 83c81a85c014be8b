"""Metrics of recommenders: of ranked lists, of what they show of the catalogue, of predictions; all by cohort."""

from envs.metrics.catalogue import catalogue_coverage, exposure_gini, exposures, intra_list_diversity
from envs.metrics.intervals import Interval, mean_interval
from envs.metrics.pointwise import area_under_curve, calibration_error, log_loss
from envs.metrics.ranking import RankingMetrics, popularity_baseline, ranking_metrics, top_k
from envs.metrics.reports import pointwise_report, ranking_report

__all__ = [
    "Interval",
    "RankingMetrics",
    "area_under_curve",
    "calibration_error",
    "catalogue_coverage",
    "exposure_gini",
    "exposures",
    "intra_list_diversity",
    "log_loss",
    "mean_interval",
    "pointwise_report",
    "popularity_baseline",
    "ranking_metrics",
    "ranking_report",
    "top_k",
]
