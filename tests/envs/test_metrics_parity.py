"""Metrics, over all and by cohort, against scikit-learn, SciPy or the textbook definition in plain loops, to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import sklearn.calibration
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cohorts import ITEM_COHORTS, USER_COHORTS, cohorts
from envs.domains import Domain
from envs.evaluation_sets import EvaluationSet, evaluation_set
from envs.metrics import (
    area_under_curve,
    calibration_error,
    exposure_gini,
    intra_list_diversity,
    log_loss,
    pointwise_report,
    ranking_report,
    top_k,
)
from metalearn.interactions import Interactions

USERS, ITEMS, K = 150, 90, 10
COHORTS = [("user", name) for name in USER_COHORTS] + [("item", name) for name in ITEM_COHORTS]


def close(value: float) -> object:
    return pytest.approx(value, abs=1e-6, rel=0)


def make_domain(*, targets: int | None = None) -> Domain:
    """Users of 4 to 40 items, some of them more popular; the last ones are the test: one to six, or a fixed number."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[tuple[int, int]]] = {"train": [], "validation": [], "test": []}
    for user in range(USERS):
        chosen = rng.choice(ITEMS, size=int(rng.integers(12, 48)), replace=False, p=popularity())
        held = targets or int(rng.integers(1, 7))
        parts = (chosen[:held], chosen[held : held + 2], chosen[held + 2 :])
        for name, items in zip(("test", "validation", "train"), parts, strict=True):
            rows[name] += [(user, int(item)) for item in items]
    content = rng.standard_normal((ITEMS, 6)).astype(np.float32)
    content[::9] = 0.0
    parts = {name: np.array(pairs, dtype=np.int32).T for name, pairs in rows.items()}
    tables = {
        name: Interactions(user=user, item=item, num_users=USERS, num_items=ITEMS)
        for name, (user, item) in parts.items()
    }
    return Domain(name="hand-made", split="leave-last-out", item_content=content, **tables)


def popularity() -> np.ndarray:
    weights = 1.0 / np.arange(1, ITEMS + 1) ** 0.7
    return weights / weights.sum()


class Case:
    """A domain, scores that know a little of the targets, and what follows from them in plain arrays."""

    def __init__(self, *, targets: int | None = None) -> None:
        self.domain = make_domain(targets=targets)
        self.evaluation: EvaluationSet = evaluation_set(self.domain, "test")
        wanted, seen = self.evaluation.targets, self.evaluation.seen
        self.relevant = np.zeros((USERS, ITEMS), dtype=int)
        self.relevant[wanted.rows, wanted.indices] = 1
        self.scores = np.random.default_rng(1).standard_normal((USERS, ITEMS)) + 2 * self.relevant
        raw = self.scores.copy()
        self.scores[seen.rows, seen.indices] = -1e3  # what is hidden comes last
        self.lists = top_k(lambda users: raw[users], self.evaluation, ITEMS, K)
        self.report = ranking_report(self.lists, self.evaluation, self.domain, K)
        self.shown = np.zeros((USERS, ITEMS), dtype=int)
        np.put_along_axis(self.shown, self.lists.astype(np.int64), 1, axis=1)

    def cohort(self, side: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Users of a cohort who can be judged, and the targets that count, 0/1 [E, I]."""
        groups = cohorts(self.domain)
        if side == "user":
            rows = np.flatnonzero(groups.user == USER_COHORTS.index(name))
            return rows, self.relevant[rows]
        relevant = self.relevant * (groups.item == ITEM_COHORTS.index(name))
        rows = np.flatnonzero(relevant.any(axis=1))
        return rows, relevant[rows]

    def items(self, side: str, name: str) -> np.ndarray:
        return cohorts(self.domain).item == ITEM_COHORTS.index(name) if side == "item" else np.ones(ITEMS, dtype=bool)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def single() -> Case:
    return Case(targets=1)


def gini_by_pairs(counts: list[int]) -> float:
    """Half the relative mean absolute difference."""
    differences = sum(abs(a - b) for a in counts for b in counts)
    return differences / (2 * len(counts) ** 2 * (sum(counts) / len(counts)))


class TestRanking:
    def test_ndcg_and_recall(self, case: Case):
        assert len(case.evaluation) == USERS and set(case.relevant.sum(axis=1)) == set(range(1, 7))
        assert case.report["ndcg@10"] == close(sklearn.metrics.ndcg_score(case.relevant, case.scores, k=K))
        expected = sklearn.metrics.recall_score(case.relevant, case.shown, average="samples")
        assert case.report["recall@10"] == close(expected)

    @pytest.mark.parametrize(("side", "name"), COHORTS)
    def test_ndcg_and_recall_by_cohort(self, case: Case, side: str, name: str):
        rows, relevant = case.cohort(side, name)
        assert 0 < len(rows) == case.report[f"num_users/{side}:{name}"]
        expected = sklearn.metrics.ndcg_score(relevant, case.scores[rows], k=K)
        assert case.report[f"ndcg@10/{side}:{name}"] == close(expected)
        expected = sklearn.metrics.recall_score(relevant, case.shown[rows], average="samples")
        assert case.report[f"recall@10/{side}:{name}"] == close(expected)

    def test_reciprocal_rank_and_hits_of_one_target(self, single: Case):
        # With one target, the reciprocal rank is the average precision, here among all items.
        lists = top_k(lambda users: single.scores[users], single.evaluation, ITEMS, ITEMS)
        report = ranking_report(lists, single.evaluation, single.domain, ITEMS)
        average_precision = sklearn.metrics.label_ranking_average_precision_score
        assert report[f"mrr@{ITEMS}"] == close(average_precision(single.relevant, single.scores))
        for side, name in COHORTS:
            rows, relevant = single.cohort(side, name)
            assert report[f"mrr@{ITEMS}/{side}:{name}"] == close(average_precision(relevant, single.scores[rows]))
        target, labels = single.relevant.argmax(axis=1), np.arange(ITEMS)
        expected = sklearn.metrics.top_k_accuracy_score(target, single.scores, k=K, labels=labels)
        assert single.report["hit@10"] == close(expected)


class TestCatalogue:
    @pytest.mark.parametrize(("side", "name"), [("", ""), *COHORTS])
    def test_coverage_and_gini(self, case: Case, side: str, name: str):
        rows = case.cohort(side, name)[0] if side == "user" else np.arange(USERS)
        counts = [0] * ITEMS
        for user in rows:
            for item in case.lists[user]:
                counts[item] += 1
        kept = [count for count, inside in zip(counts, case.items(side, name), strict=True) if inside]
        suffix = f"/{side}:{name}" if side else ""
        assert case.report[f"coverage@10{suffix}"] == close(sum(count > 0 for count in kept) / len(kept))
        assert case.report[f"exposure_gini@10{suffix}"] == close(gini_by_pairs(kept))
        if side == "item":
            assert case.report[f"exposure@10{suffix}"] == close(sum(kept) / (USERS * K))

    @pytest.mark.parametrize(("side", "name"), [("", ""), *COHORTS[:3]])
    def test_diversity(self, case: Case, side: str, name: str):
        content = np.asarray(case.domain.item_content, dtype=np.float64)
        rows = case.cohort(side, name)[0] if side else np.arange(USERS)
        diversities = []
        for user in rows:
            described = [item for item in case.lists[user] if content[item].any()]
            if len(described) > 1:
                diversities.append(scipy.spatial.distance.pdist(content[described], "cosine").mean())
        suffix = f"/{side}:{name}" if side else ""
        assert case.report[f"diversity@10{suffix}"] == close(float(np.mean(diversities)))

    @given(st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(any))
    def test_gini_of_any_counts(self, counts: list[int]):
        assert exposure_gini(np.array(counts)) == pytest.approx(gini_by_pairs(counts), abs=1e-12)

    @given(st.integers(0, 1 << 30))
    @settings(max_examples=30)
    def test_diversity_of_any_lists(self, seed: int):
        rng = np.random.default_rng(seed)
        content = rng.standard_normal((12, 3)) * rng.uniform(0.01, 100.0, (12, 1))
        size = int(rng.integers(2, 7))
        items = rng.permutation(12)[:size]
        found = intra_list_diversity(np.concatenate([items, [-1, -1]])[None], content)
        assert found[0] == pytest.approx(scipy.spatial.distance.pdist(content[items], "cosine").mean(), abs=1e-9)


def events(seed: int, size: int = 400, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that are too sure, and what happened."""
    rng = np.random.default_rng(seed)
    logit = 1.5 * rng.standard_normal(size)
    predicted = 1 / (1 + np.exp(-2 * logit))
    labels = (rng.random(size) < 1 / (1 + np.exp(-logit))).astype(int)
    labels[:2] = 0, 1
    return (np.round(predicted, 1) if ties else predicted), labels


def calibration_by_curve(predicted: np.ndarray, labels: np.ndarray, bins: int, strategy: str) -> float:
    """Weigh scikit-learn's calibration curve by the sizes of its bins, counted in a loop."""
    actual, mean = sklearn.calibration.calibration_curve(labels, predicted, n_bins=bins, strategy=strategy)
    edges = np.linspace(0.0, 1.0, bins + 1).tolist()
    if strategy == "quantile":
        edges = [float(np.percentile(predicted, 100 * edge)) for edge in edges]
    sizes = [0] * bins
    for value in predicted:
        sizes[sum(value > edge for edge in edges[1:-1])] += 1
    filled = [size for size in sizes if size]
    return sum(size * abs(a - b) for size, a, b in zip(filled, actual, mean, strict=True)) / len(predicted)


class TestPointwise:
    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_area_and_loss(self, seed: int, ties: bool):
        predicted, labels = events(seed, ties=ties)
        assert area_under_curve(predicted, labels) == close(sklearn.metrics.roc_auc_score(labels, predicted))
        assert log_loss(predicted, labels) == close(sklearn.metrics.log_loss(labels, predicted))

    @pytest.mark.parametrize("bins", [1, 7, 15])
    @pytest.mark.parametrize("seed", range(3))
    def test_calibration(self, seed: int, bins: int):
        predicted, labels = events(seed)
        for binning, strategy in (("width", "uniform"), ("mass", "quantile")):
            expected = calibration_by_curve(predicted, labels, bins, strategy)
            assert calibration_error(predicted, labels, bins=bins, binning=binning) == close(expected)

    def test_by_cohort(self, case: Case):
        rng = np.random.default_rng(3)
        predicted, labels = events(4, 3000)
        user, item = rng.integers(0, USERS, 3000), rng.integers(0, ITEMS, 3000)
        report = pointwise_report(predicted, labels, user=user, item=item, domain=case.domain)
        groups = cohorts(case.domain)
        chosen = {"": np.ones(3000, dtype=bool)}
        chosen |= {f"/user:{name}": groups.user[user] == index for index, name in enumerate(USER_COHORTS)}
        chosen |= {f"/item:{name}": groups.item[item] == index for index, name in enumerate(ITEM_COHORTS)}
        for suffix, rows in chosen.items():
            p, y = predicted[rows], labels[rows]
            assert report[f"num_events{suffix}"] == rows.sum() > 0
            assert report[f"auc{suffix}"] == close(sklearn.metrics.roc_auc_score(y, p))
            assert report[f"log_loss{suffix}"] == close(sklearn.metrics.log_loss(y, p))
            assert report[f"calibration_error{suffix}"] == close(calibration_by_curve(p, y, 15, "uniform"))
            assert report[f"calibration_error_mass{suffix}"] == close(calibration_by_curve(p, y, 15, "quantile"))
        assert len(report) == 5 * len(chosen)
