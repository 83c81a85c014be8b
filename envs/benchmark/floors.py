"""Floors: what a domain gives without training steps. Popularity, item-based neighbours, EASE.

Shape legend: U user, I item, B users of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import linalg, sparse

from envs.benchmark.store import Identity, round_trial
from envs.benchmark.trials import configuration_of
from envs.domains import Domain
from envs.evaluation_sets import evaluation_set
from envs.metrics import RankingMetrics, popularity_baseline, ranking_metrics, top_k
from metalearn.trials import Measurement, Trial, TrialStatus

NEIGHBOURS = (20, 100, 500)
"""Neighbours of an item, the best of these on validation."""
PENALTIES = (10.0, 100.0, 1000.0)
"""Of EASE, the best of these on validation."""
MAX_ITEMS = 12_000
"""Above so many items EASE's matrix of items by items takes too much memory and time."""
_CHUNK = 1024
"""Items whose similarities are held at once."""

Weights = np.ndarray | sparse.csr_array


def user_item_matrix(domain: Domain) -> sparse.csr_array:
    """Returns who took what in training, float64 [U, I] of ones."""
    shape = (domain.num_users, domain.num_items)
    return sparse.csr_array((np.ones(len(domain.train)), (domain.train.user, domain.train.item)), shape=shape)


def item_neighbours(matrix: sparse.csr_array, num_neighbours: int) -> sparse.csr_array:
    """Returns cosine similarities to each item's nearest others: [I, I], entry (j, i) where j is a neighbour of i.

    Args:
      matrix: [U, I].
      num_neighbours: kept of each item i; the others are 0.

    Source: Deshpande and Karypis (2004), Item-based top-N recommendation algorithms.
    """
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=0))
    unit: Any = sparse.csc_array(matrix / norms)
    num_items = unit.shape[1]
    kept = min(num_neighbours, num_items - 1)
    columns = []
    for first in range(0, num_items, _CHUNK):
        similarity = (unit.T @ unit[:, first : first + _CHUNK]).toarray()
        here = np.arange(similarity.shape[1])
        similarity[first + here, here] = 0.0
        smallest = np.argpartition(similarity, num_items - kept, axis=0)[: num_items - kept]
        np.put_along_axis(similarity, smallest, 0.0, axis=0)
        columns.append(sparse.csr_array(similarity))
    return sparse.csr_array(sparse.hstack(columns))


def ease(matrix: sparse.csr_array, penalty: float) -> np.ndarray:
    """Returns the linear autoencoder with zero diagonal that fits X best: B = I - P diag(1 / diag P), [I, I].

    P = (XᵀX + penalty I)⁻¹.

    Source: Steck (2019), Embarrassingly shallow autoencoders for sparse data, equation 8.
    """
    gram = (matrix.T @ matrix).toarray()
    gram[np.diag_indices_from(gram)] += penalty
    inverse = linalg.inv(gram, overwrite_a=True, assume_a="pos", check_finite=False)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


FLOORS: Mapping[str, tuple[str, tuple[Any, ...], Callable[[sparse.csr_array, Any], Weights]] | None] = {
    "popularity": None,
    "item_knn": ("num_neighbours", NEIGHBOURS, item_neighbours),
    "ease": ("penalty", PENALTIES, ease),
}
"""By name: the hyperparameter, its values, and what gives the weights of items on items."""


def run_floor(identity: Identity, domain: Domain, *, k: int = 10) -> Trial:
    """Fits a floor, chooses its one hyperparameter on all validation users, and tests it.

    Returns:
      Its trial, at step 0, with seconds of fitting as the cost; EASE's is invalid, with a note in its configuration,
      where there are more than 12 000 items.
    """
    floor = FLOORS[identity.method]
    if floor is None:
        validation, test = (popularity_baseline(domain, split, k) for split in ("validation", "test"))
        return _record(identity, {}, validation, test, 0.0)
    if identity.method == "ease" and domain.num_items > MAX_ITEMS:
        note = f"skipped: {domain.num_items} items, more than {MAX_ITEMS}"
        trial = Trial(task=identity.task, configuration=configuration_of(identity, {"note": note}), seed=identity.seed)
        return trial.moved(TrialStatus.INVALID)
    name, values, fit = floor
    matrix, seconds = user_item_matrix(domain), 0.0
    best: tuple[RankingMetrics, Any, Weights] | None = None
    for value in values:
        began = time.perf_counter()
        weights = fit(matrix, value)
        seconds += time.perf_counter() - began
        validation = _ranked(matrix, weights, domain, "validation", k)
        if best is None or validation.mean_ndcg > best[0].mean_ndcg:
            best = validation, value, weights
    assert best is not None
    validation, value, weights = best
    return _record(identity, {name: value}, validation, _ranked(matrix, weights, domain, "test", k), seconds)


def _ranked(matrix: sparse.csr_array, weights: Weights, domain: Domain, split: Any, k: int) -> RankingMetrics:
    def score(users: np.ndarray) -> np.ndarray:
        scores = matrix[users] @ weights
        return scores.toarray() if sparse.issparse(scores) else scores

    evaluation = evaluation_set(domain, split)
    return ranking_metrics(top_k(score, evaluation, domain.num_items, k), evaluation.targets, k=k)


def _record(
    identity: Identity,
    hyperparameters: Mapping[str, Any],
    validation: RankingMetrics,
    test: RankingMetrics,
    seconds: float,
) -> Trial:
    measurements = (
        Measurement(0, f"selection_ndcg@{test.k}", validation.mean_ndcg),
        Measurement(0, f"test_ndcg@{test.k}", test.mean_ndcg),
        Measurement(0, f"test_recall@{test.k}", test.mean_recall),
    )
    trial = Trial(task=identity.task, configuration=configuration_of(identity, hyperparameters), seed=identity.seed)
    return round_trial(trial.record(*measurements).complete(cost=seconds))
