"""Floors against independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity

from envs.benchmark import floors
from envs.benchmark.floors import FLOORS, ease, item_neighbours, run_floor, user_item_matrix
from envs.benchmark.store import Identity
from envs.domains import Domain, make_domain
from envs.evaluation_sets import evaluation_set
from envs.metrics import popularity_baseline, ranking_metrics, top_k
from envs.simulated import SimulatedPrior, simulate
from metalearn.trials import TrialStatus


@pytest.fixture(scope="module")
def domain() -> Domain:
    prior = SimulatedPrior(users=(120, 120), items=(60, 60), history=(12.0, 12.0))
    return make_domain(simulate(prior, seed=1), name="simulated", split="leave-last-out")


@pytest.fixture(scope="module")
def matrix(domain: Domain) -> sparse.csr_array:
    return user_item_matrix(domain)


def of(method: str) -> Identity:
    return Identity("simulated/floor/0x0", method, 0, 0, 0)


def test_ease_is_a_ridge_regression_of_each_item_on_the_others(matrix: sparse.csr_array):
    weights, dense = ease(matrix, 10.0), matrix.toarray()
    for item in range(0, matrix.shape[1], 7):
        others = np.delete(np.arange(matrix.shape[1]), item)
        ridge = Ridge(alpha=10.0, fit_intercept=False).fit(dense[:, others], dense[:, item])
        np.testing.assert_allclose(weights[others, item], ridge.coef_, atol=1e-8)
        assert weights[item, item] == 0.0


@pytest.mark.parametrize("chunk", [7, 1024])
def test_neighbours_are_the_most_similar_others(chunk: int, matrix: sparse.csr_array, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(floors, "_CHUNK", chunk)
    similarity = cosine_similarity(matrix.toarray().T)
    np.fill_diagonal(similarity, 0.0)
    for kept in (5, 10_000):
        found = item_neighbours(matrix, kept).toarray()
        expected = np.sort(similarity, axis=0)[::-1][:kept]
        np.testing.assert_allclose(np.sort(found, axis=0)[::-1][: len(expected)], expected, atol=1e-12)
        np.testing.assert_allclose(found[found > 0], similarity[found > 0])
        assert (np.count_nonzero(found, axis=0) <= kept).all()


@pytest.mark.parametrize("method", FLOORS)
def test_a_floor_is_tested_on_all_users(method: str, domain: Domain, matrix: sparse.csr_array):
    trial = run_floor(of(method), domain)
    values = {m.metric: m.value for m in trial.measurements}
    if method == "popularity":
        expected = popularity_baseline(domain)
    else:
        name, candidates, fit = FLOORS[method]

        def ranked(value, split):
            scores = matrix.toarray() @ np.asarray(sparse.csr_array(fit(matrix, value)).toarray())
            evaluation = evaluation_set(domain, split)
            lists = top_k(lambda users: scores[users], evaluation, domain.num_items, 10)
            return ranking_metrics(lists, evaluation.targets)

        best = max(candidates, key=lambda value: ranked(value, "validation").mean_ndcg)
        assert trial.configuration[name] == best
        expected = ranked(best, "test")
    assert values["test_ndcg@10"] == pytest.approx(expected.mean_ndcg, rel=1e-5)
    assert values["test_recall@10"] == pytest.approx(expected.mean_recall, rel=1e-5)
    assert set(values) == {"selection_ndcg@10", "test_ndcg@10", "test_recall@10"}
    assert trial.status is TrialStatus.COMPLETE


def test_ease_is_skipped_on_many_items(domain: Domain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(floors, "MAX_ITEMS", domain.num_items - 1)
    trial = run_floor(of("ease"), domain)
    assert trial.status is TrialStatus.INVALID
    assert trial.measurements == ()
    assert trial.configuration["note"] == f"skipped: {domain.num_items} items, more than {domain.num_items - 1}"
