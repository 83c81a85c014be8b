"""Reports: every metric of a model, over all and by cohort of users and of items.

Names: "ndcg@10" is over all, "ndcg@10/user:light" over the lists of light users, "ndcg@10/item:tail" over tail items:
only targets in the tail count there, of the users who have one. What is undefined for a cohort is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from envs.cohorts import ITEM_COHORTS, USER_COHORTS, cohorts
from envs.domains import Domain
from envs.evaluation_sets import CSR, EvaluationSet
from envs.metrics.catalogue import catalogue_coverage, exposure_gini, exposures, intra_list_diversity
from envs.metrics.pointwise import area_under_curve, calibration_error, log_loss
from envs.metrics.ranking import ranking_metrics
from metalearn.errors import InvalidArgumentError


def ranking_report(lists: np.ndarray, evaluation: EvaluationSet, domain: Domain, k: int = 10) -> dict[str, float]:
    """Report what a model's top-k lists are worth: to users, and to the catalogue.

    Over all, by cohort of users and by cohort of items:
        ndcg, recall, mrr, hit: see `RankingMetrics`.
        num_users: users that these are means over.
        coverage: share of the items (of the cohort) that are in at least one list.
        exposure_gini: inequality of the number of lists that each of these items is in; see `exposure_gini`.
    Over all and by cohort of users:
        diversity: mean of `intra_list_diversity` over lists; only where the domain has item content.
    By cohort of items:
        exposure: share of all filled places that show items of the cohort.

    Args:
        lists: int [E, >= k], the lists of `evaluation.users`; -1 is an empty place.
        evaluation: users and their targets.
        domain: for its cohorts and its item content.
        k: places that count.

    Returns:
        Values by name, such as "ndcg@10/user:light"; all finite.

    Raises:
        InvalidArgumentError: as `ranking_metrics`.
    """
    groups = cohorts(domain)
    shown = np.asarray(lists)[:, :k]
    targets = evaluation.targets
    counts = exposures(shown, domain.num_items)
    report = _accuracy(lists, targets, k, "") | _shown(counts, k, "")
    diversity = None if domain.item_content is None else intra_list_diversity(shown, domain.item_content)
    if diversity is not None:
        report[f"diversity@{k}"] = _mean(diversity)
    for suffix, members in _members(groups.user[evaluation.users], USER_COHORTS, "user"):
        report |= _accuracy(lists[members], _select(targets, members[targets.rows]), k, suffix)
        report |= _shown(exposures(shown[members], domain.num_items), k, suffix)
        if diversity is not None:
            report[f"diversity@{k}{suffix}"] = _mean(diversity[members])
    for suffix, members in _members(groups.item, ITEM_COHORTS, "item"):
        wanted = _select(targets, members[targets.indices])
        having = np.bincount(targets.rows[members[targets.indices]], minlength=len(evaluation)) > 0
        report |= _accuracy(lists[having], wanted, k, suffix) | _shown(counts[members], k, suffix)
        report[f"exposure@{k}{suffix}"] = float(counts[members].sum() / counts.sum()) if counts.any() else math.nan
    return _defined(report)


def pointwise_report(
    probabilities: np.ndarray, labels: np.ndarray, *, user: np.ndarray, item: np.ndarray, domain: Domain
) -> dict[str, float]:
    """Report how well predicted probabilities of single events fit, over all and by cohort of their users and items.

    Args:
        probabilities: float [N] in [0, 1], of label 1.
        labels: [N], 0 or 1.
        user: int [N], user codes of the domain.
        item: int [N], item codes of the domain.
        domain: for its cohorts.

    Returns:
        "auc", "log_loss", "calibration_error" (15 bins of equal width), "calibration_error_mass" (of equal mass) and
        "num_events", by names such as "auc/item:tail".

    Raises:
        InvalidArgumentError: lengths differ, or as `log_loss`.
    """
    if not len(probabilities) == len(labels) == len(user) == len(item):
        raise InvalidArgumentError(
            f"`probabilities`, `labels`, `user` and `item` must be of one length, got {len(probabilities)}, "
            f"{len(labels)}, {len(user)} and {len(item)}"
        )
    groups = cohorts(domain)
    members = [("", np.ones(len(labels), dtype=bool))]
    members += [*_members(groups.user[user], USER_COHORTS, "user"), *_members(groups.item[item], ITEM_COHORTS, "item")]
    report = {}
    for suffix, chosen in members:
        predicted, happened = np.asarray(probabilities)[chosen], np.asarray(labels)[chosen]
        report[f"auc{suffix}"] = area_under_curve(predicted, happened)
        report[f"log_loss{suffix}"] = log_loss(predicted, happened)
        report[f"calibration_error{suffix}"] = calibration_error(predicted, happened)
        report[f"calibration_error_mass{suffix}"] = calibration_error(predicted, happened, binning="mass")
        report[f"num_events{suffix}"] = float(chosen.sum())
    return _defined(report)


def _members(cohort_of: np.ndarray, names: tuple[str, ...], side: str) -> Iterator[tuple[str, np.ndarray]]:
    """Suffix and membership of each cohort that has members."""
    for index, name in enumerate(names):
        members = cohort_of == index
        if members.any():
            yield f"/{side}:{name}", members


def _accuracy(lists: np.ndarray, targets: CSR, k: int, suffix: str) -> dict[str, float]:
    if len(lists) == 0:
        return {}
    means = ranking_metrics(lists, targets, k=k).means()
    return {f"{name}{suffix}": value for name, value in (means | {"num_users": float(len(lists))}).items()}


def _shown(counts: np.ndarray, k: int, suffix: str) -> dict[str, float]:
    return {f"coverage@{k}{suffix}": catalogue_coverage(counts), f"exposure_gini@{k}{suffix}": exposure_gini(counts)}


def _select(targets: CSR, entries: np.ndarray) -> CSR:
    """Keep some entries, and of the rows those that have any left."""
    lengths = np.bincount(targets.rows[entries], minlength=len(targets.lengths))
    return CSR(indptr=np.concatenate([[0], np.cumsum(lengths[lengths > 0])]), indices=targets.indices[entries])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _defined(report: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in report.items() if math.isfinite(value)}
