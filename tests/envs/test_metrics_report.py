"""Reports and the metrics in them: hand-worked numbers, undefined cases, and bad arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from envs.domains import Domain
from envs.evaluation_sets import evaluation_set
from envs.metrics import (
    area_under_curve,
    calibration_error,
    exposure_gini,
    exposures,
    intra_list_diversity,
    log_loss,
    pointwise_report,
    ranking_report,
)
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions


def part(*rows: tuple[int, int]) -> Interactions:
    user, item = np.array(rows, dtype=np.int32).T
    return Interactions(user=user, item=item, num_users=3, num_items=6)


def make_domain(**columns: np.ndarray) -> Domain:
    """Users with 1, 2 and 3 training items: one of each cohort.

    Counts of items 0..5 are 2, 2, 1, 1, 0, 0 of 6: before them come 0, 2, 4, 5, 6, 6, so thirds begin at items 0, 1, 2.
    """
    return Domain(
        name="hand-made",
        train=part((0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (2, 3)),
        validation=part((0, 5), (1, 5), (2, 5)),
        test=part((0, 1), (0, 2), (1, 3), (2, 4)),
        split="leave-last-out",
        **columns,
    )


LISTS = np.array([[1, 3], [2, 3], [0, -1]], dtype=np.int32)


def test_a_report_by_hand() -> None:
    domain = make_domain()
    report = ranking_report(LISTS, evaluation_set(domain, "test"), domain, k=2)
    # User 0 (light) finds 1 of 2 targets, at rank 1; user 1 (medium) its one at rank 2; user 2 (heavy) none.
    expected = {
        "num_users": 3.0,
        "recall@2": (1 / 2 + 1 + 0) / 3,
        "mrr@2": (1 + 1 / 2 + 0) / 3,
        "hit@2": 2 / 3,
        "ndcg@2/user:light": 1 / (1 + 1 / math.log2(3)),
        "ndcg@2/user:medium": 1 / math.log2(3),
        "ndcg@2/user:heavy": 0.0,
        # Items 0, 1, 2, 3 of six are shown, 3 twice.
        "coverage@2": 4 / 6,
        # Ascending 0 0 1 1 1 2: 2 (3 + 4 + 5 + 12) / (6 * 5) - 7 / 6.
        "exposure_gini@2": 48 / 30 - 7 / 6,
        "coverage@2/user:light": 2 / 6,
        # 0 0 0 0 1 1: 2 (5 + 6) / (6 * 2) - 7 / 6.
        "exposure_gini@2/user:light": 22 / 12 - 7 / 6,
        # The head is item 0: nobody's target. The middle is item 1, a target of user 0 alone, at rank 1.
        "exposure@2/item:head": 1 / 5,
        "coverage@2/item:head": 1.0,
        "num_users/item:mid": 1.0,
        "ndcg@2/item:mid": 1.0,
        # The tail are items 2 to 5: targets of user 0 (not found), of user 1 (at rank 2), of user 2 (not found).
        "num_users/item:tail": 3.0,
        "recall@2/item:tail": 1 / 3,
        "mrr@2/item:tail": 1 / 6,
        "exposure@2/item:tail": 3 / 5,
        "coverage@2/item:tail": 2 / 4,
        # 0 0 1 2: 2 (3 + 8) / (4 * 3) - 5 / 4.
        "exposure_gini@2/item:tail": 22 / 12 - 5 / 4,
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected)
    assert "ndcg@2/item:head" not in report and "diversity@2" not in report
    assert all(math.isfinite(value) for value in report.values())


def test_only_the_first_k_places_are_reported() -> None:
    domain = make_domain()
    report = ranking_report(LISTS, evaluation_set(domain, "test"), domain, k=1)
    assert report["coverage@1"] == 3 / 6 and report["hit@1/user:medium"] == 0.0


def test_diversity_is_reported_where_there_is_content() -> None:
    # 1 and 3 are at right angles, 2 and 3 opposite; item 0 is alone in its list.
    content = np.array([[1, 0], [2, 0], [0, 1], [0, -3], [1, 1], [1, 1]], dtype=np.float32)
    domain = make_domain(item_content=content)
    report = ranking_report(LISTS, evaluation_set(domain, "test"), domain, k=2)
    assert report["diversity@2/user:light"] == pytest.approx(1.0)
    assert report["diversity@2/user:medium"] == pytest.approx(2.0)
    assert report["diversity@2"] == pytest.approx(1.5)
    assert "diversity@2/user:heavy" not in report


def test_a_diverged_model_is_reported_without_what_is_undefined() -> None:
    domain = make_domain(item_content=np.eye(6, dtype=np.float32))
    report = ranking_report(np.full((3, 2), -1), evaluation_set(domain, "test"), domain, k=2)
    assert report["ndcg@2"] == report["coverage@2"] == report["coverage@2/item:tail"] == 0.0
    assert not [name for name in report if name.startswith(("exposure", "diversity"))]


def test_pointwise_report_by_hand() -> None:
    predicted, labels = np.array([0.9, 0.2, 0.6, 0.6]), np.array([1, 0, 1, 0])
    report = pointwise_report(predicted, labels, user=[0, 0, 1, 2], item=[0, 0, 1, 1], domain=make_domain())
    # The light user's click is above the other; medium and heavy users have one event each, so no area.
    assert report["auc/user:light"] == 1.0 and "auc/user:heavy" not in report
    # Pairs of the middle item: one, tied. Its bin: |0.6 - 0.5|.
    assert report["auc/item:mid"] == 0.5
    assert report["calibration_error/item:mid"] == pytest.approx(0.1)
    # Positives 0.9 and 0.6 against 0.2 and 0.6: three and a half of four pairs.
    assert report["auc"] == 0.875
    assert report["log_loss/user:heavy"] == pytest.approx(-math.log(0.4))
    assert report["num_events/item:head"] == 2.0 and "num_events/item:tail" not in report


def test_extremes() -> None:
    labels = np.array([0, 1, 1])
    assert area_under_curve(np.array([-3.0, 5.0, 9.0]), labels) == 1.0
    assert area_under_curve(np.array([1.0, 1.0, 1.0]), labels) == 0.5
    assert math.isnan(area_under_curve(np.array([1.0, 2.0]), np.array([1, 1])))
    # A certain prediction that is wrong costs the logarithm of the clip, not infinity.
    assert log_loss(np.array([1.0]), np.array([0])) == pytest.approx(-math.log(np.finfo(np.float64).eps))
    assert calibration_error(np.array([0.0, 1.0, 1.0]), labels) == 0.0
    assert calibration_error(np.array([1.0, 0.0, 0.0]), labels) == 1.0
    assert exposure_gini(np.array([0, 0, 0, 5])) == 0.75  # 1 - 1 / 4
    assert exposure_gini(np.array([3, 3, 3])) == 0.0
    assert math.isnan(exposure_gini(np.zeros(3, dtype=int)))


def test_equal_predictions_share_a_bin_of_equal_mass() -> None:
    # Nine equal predictions and one above: the quartiles are all 0.2, so the bins are 0.2 (9 rows) and 0.8 (1 row).
    predicted, labels = np.array([0.2] * 9 + [0.8]), np.array([1] * 3 + [0] * 6 + [1])
    error = calibration_error(predicted, labels, bins=4, binning="mass")
    assert error == pytest.approx((9 * abs(0.2 - 1 / 3) + 1 * 0.2) / 10)


def test_items_without_content_and_empty_places_have_no_diversity() -> None:
    content = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    diversity = intra_list_diversity(np.array([[0, 1, 2], [0, 2, -1], [-1, -1, -1]]), content)
    assert diversity[0] == pytest.approx(1.0) and np.isnan(diversity[1:]).all()


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ([0.5, 1.5], [0, 1], r"`probabilities` must be finite and within 0..1, got 0.5..1.5"),
        ([0.5, np.nan], [0, 1], "`probabilities` must be finite"),
        ([0.5], [0, 1], r"`probabilities` and `labels` must be of one length.* got \[1\] and \[2\]"),
        ([], [], "at least 1"),
        ([0.5, 0.5], [0, 2], r"`labels` must be 0 or 1, got \[0, 2\]"),
    ],
)
def test_bad_events_are_named(predicted: list[float], labels: list[int], message: str) -> None:
    for metric in (log_loss, calibration_error):
        with pytest.raises(InvalidArgumentError, match=message):
            metric(np.array(predicted), np.array(labels))


def test_other_bad_arguments_are_named() -> None:
    one = np.array([0.5]), np.array([1])
    with pytest.raises(InvalidArgumentError, match="`bins` must be a positive int, got 0"):
        calibration_error(*one, bins=0)
    with pytest.raises(InvalidArgumentError, match="`binning` must be 'width' or 'mass', got 'equal'"):
        calibration_error(*one, binning="equal")
    with pytest.raises(InvalidArgumentError, match="`scores` must be finite"):
        area_under_curve(np.array([np.inf]), np.array([1]))
    with pytest.raises(InvalidArgumentError, match="item code 7, but `num_items` is 6"):
        exposures(np.array([[7, 0]]), 6)
    with pytest.raises(InvalidArgumentError, match="must be of one length, got 1, 1, 2 and 1"):
        pointwise_report(*one, user=[0, 1], item=[0], domain=make_domain())
