"""Metrics: hand-worked numbers, parity with a literal version, and no reward for diverged or constant models."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from envs.domains import Domain, make_domain
from envs.evaluation_sets import CSR, EvaluationSet, evaluation_set
from envs.metrics import mean_interval, popularity_baseline, ranking_metrics, top_k
from envs.simulated import SimulatedPrior, simulate
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions


def csr(rows: list[list[int]]) -> CSR:
    lengths = [len(row) for row in rows]
    return CSR(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        indices=np.array([item for row in rows for item in row], dtype=np.int32),
    )


def literal_metrics(ranked: list[int], targets: list[int], k: int) -> dict[str, float]:
    gain = ideal = hits = first = 0.0
    for place in range(1, k + 1):
        if ranked[place - 1] in targets:
            gain += 1 / math.log2(place + 1)
            hits += 1
            first = first or 1 / place
        if place <= len(targets):
            ideal += 1 / math.log2(place + 1)
    return {"ndcg": gain / ideal, "recall": hits / len(targets), "mrr": first, "hit": float(hits > 0)}


def literal_top_k(scores: np.ndarray, seen: set[int], k: int) -> list[int]:
    ranked = sorted((item for item in range(len(scores)) if item not in seen), key=lambda item: -scores[item])[:k]
    return ranked + [-1] * (k - len(ranked))


def evaluation(seen: list[list[int]], targets: list[list[int]], num_items: int) -> EvaluationSet:
    users = np.arange(len(seen), dtype=np.int32)
    return EvaluationSet(users=users, seen=csr(seen), targets=csr(targets), num_items=num_items)


def test_hand_worked_lists() -> None:
    lists = np.array([[7, 3, 5], [1, 2, 3], [4, -1, -1], [9, 8, 0]], dtype=np.int32)
    metrics = ranking_metrics(lists, csr([[3, 5, 7, 9], [3], [4, 6], [2]]), k=3)
    # User 0: hits at 1, 2, 3 of an ideal of three places: 1. Four targets: recall 3/4.
    # User 1: one target at rank 3: (1 / log2 4) / (1 / log2 2) = 0.5.
    # User 2: one of two targets at rank 1: 1 / (1 + 1 / log2 3) = 1 / 1.6309298 = 0.6131472; empty places miss.
    # User 3: nothing.
    np.testing.assert_allclose(metrics.ndcg, [1.0, 0.5, 0.6131471927654584, 0.0], rtol=1e-12)
    np.testing.assert_allclose(metrics.recall, [0.75, 1.0, 0.5, 0.0])
    np.testing.assert_allclose(metrics.mrr, [1.0, 1 / 3, 1.0, 0.0])
    np.testing.assert_allclose(metrics.hit, [1.0, 1.0, 1.0, 0.0])
    assert metrics.means()["recall@3"] == metrics.mean_recall == 0.5625
    assert metrics.mean_ndcg == pytest.approx((1 + 0.5 + 0.6131471927654584) / 4)


def test_only_the_first_k_places_count() -> None:
    metrics = ranking_metrics(np.array([[1, 2, 3]]), csr([[3]]), k=2)
    assert metrics.means() == {"ndcg@2": 0.0, "recall@2": 0.0, "mrr@2": 0.0, "hit@2": 0.0}


@given(seed=st.integers(0, 1 << 30), k=st.integers(1, 12))
@settings(max_examples=60)
def test_parity_with_the_literal_version(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    num_users, num_items = 9, 15
    scores = rng.standard_normal((num_users, num_items))
    seen, targets = [], []
    for _ in range(num_users):
        items = rng.permutation(num_items).tolist()
        cut = int(rng.integers(0, num_items - 1))
        seen.append(sorted(items[:cut]))
        targets.append(sorted(items[cut : cut + int(rng.integers(1, num_items - cut + 1))]))
    lists = top_k(lambda users: scores[users], evaluation(seen, targets, num_items), num_items, k=k, batch=4)
    metrics = ranking_metrics(lists, csr(targets), k=k)
    for user in range(num_users):
        expected = literal_top_k(scores[user], set(seen[user]), k)
        assert lists[user].tolist() == expected
        for name, value in literal_metrics(expected, targets[user], k).items():
            assert getattr(metrics, name)[user] == pytest.approx(value, abs=1e-12), name


def test_a_perfect_ranking_scores_one_and_metrics_stay_in_range() -> None:
    rng = np.random.default_rng(0)
    targets = [sorted(rng.choice(30, size=n, replace=False).tolist()) for n in (1, 5, 10, 25)]
    perfect = np.full((4, 10), -1)
    for row, wanted in enumerate(targets):
        perfect[row, : min(10, len(wanted))] = wanted[:10]
    metrics = ranking_metrics(perfect, csr(targets))
    np.testing.assert_allclose(metrics.ndcg, 1.0)
    np.testing.assert_allclose(metrics.recall, [1.0, 1.0, 1.0, 0.4])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_never_looks_good(bad: float) -> None:
    scores = np.tile(np.arange(6.0), (3, 1))
    scores[1, 5] = bad  # the target itself
    scores[2, 0] = bad  # an item that is hidden anyway
    case = evaluation([[0], [0], [0]], [[5], [5], [5]], 6)
    lists = top_k(lambda users: scores[users], case, 6, k=3)
    assert lists.tolist() == [[5, 4, 3], [-1, -1, -1], [-1, -1, -1]]
    assert ranking_metrics(lists, case.targets, k=3).ndcg.tolist() == [1.0, 0.0, 0.0]


def test_a_constant_model_scores_like_chance_and_not_by_code() -> None:
    num_users, num_items = 400, 200
    rng = np.random.default_rng(0)
    # Targets have the lowest codes, as they would if codes followed popularity.
    targets = [[int(rng.integers(0, 10))] for _ in range(num_users)]
    case = evaluation([[] for _ in range(num_users)], targets, num_items)
    lists = top_k(lambda users: np.zeros((len(users), num_items), dtype=np.float32), case, num_items)
    assert ranking_metrics(lists, case.targets).mean_recall < 0.25
    assert not set(lists[0].tolist()) & {0, 1, 2, 3, 4}


def test_ties_across_the_boundary_fill_the_list_once() -> None:
    scores = np.array([[2.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    lists = top_k(lambda users: scores[users], evaluation([[]], [[0]], 6), 6, k=3)
    assert lists[0, 0] == 0 and len(set(lists[0].tolist())) == 3 and set(lists[0, 1:].tolist()) <= {1, 2, 3, 4}


def test_short_lists_are_filled_with_minus_one() -> None:
    scores = np.arange(4.0)[None]
    lists = top_k(lambda users: scores[users], evaluation([[1, 3]], [[0]], 4), 4, k=6)
    assert lists.tolist() == [[2, 0, -1, -1, -1, -1]] and lists.dtype == np.int32


def test_scores_are_left_as_they_were_and_may_be_integers() -> None:
    scores = np.array([[5, 1, 3]])
    assert top_k(lambda users: scores, evaluation([[0]], [[1]], 3), 3, k=2).tolist() == [[2, 1]]
    assert scores.tolist() == [[5, 1, 3]]


def test_popularity_baseline_by_hand() -> None:
    # Training counts of items 0..4: 3, 2, 1, 1, 0. User 3 has seen 0, so the list is 1, then 2 or 3.
    def part(*rows: tuple[int, int]) -> Interactions:
        user, item = np.array(rows, dtype=np.int32).T
        return Interactions(user=user, item=item, num_users=4, num_items=5)

    domain = Domain(
        name="hand-made",
        train=part((0, 0), (1, 0), (3, 0), (0, 1), (1, 1), (2, 2), (2, 3)),
        validation=part((2, 1)),
        test=part((3, 1), (2, 0)),
        split="leave-last-out",
    )
    metrics = popularity_baseline(domain, "test", k=1)
    assert metrics.recall.tolist() == [1.0, 1.0]  # user 2 has seen 1, 2, 3: list 0; user 3: list 1
    assert popularity_baseline(domain, "validation", k=2).ndcg.tolist() == [pytest.approx(1 / math.log2(3))]


def test_popularity_baseline_beats_chance_on_a_simulated_domain() -> None:
    log = simulate(SimulatedPrior(users=(300, 300), items=(300, 300), popularity_std=(1.2, 1.2)), seed=3)
    domain = make_domain(log, name="simulated")
    popular = popularity_baseline(domain, "test")
    case = evaluation_set(domain, "test")
    noise = np.random.default_rng(0).standard_normal((domain.num_users, domain.num_items))
    chance = ranking_metrics(top_k(lambda users: noise[users], case, domain.num_items), case.targets)
    assert popular.mean_ndcg > 1.5 * chance.mean_ndcg


@pytest.mark.parametrize(
    ("lists", "targets", "k", "message"),
    [
        (np.zeros((2, 3), dtype=int), [[1]], 1, r"shape \[1, at least 1\]"),
        (np.zeros((1, 3)), [[1]], 3, "integers"),
        (np.array([[1, 2]]), [[1]], 3, "at least 3"),
        (np.array([[1, 2]]), [[]], 2, "one target of each"),
        (np.array([[4, 2, 4]]), [[1]], 3, "row 0 names an item twice"),
        (np.array([[4, 2, 4]]), [[1]], 0, "`k`"),
    ],
)
def test_bad_lists_are_named(lists: np.ndarray, targets: list[list[int]], k: int, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ranking_metrics(lists, csr(targets), k=k)


def test_bad_scores_are_named() -> None:
    case = evaluation([[]], [[0]], 4)
    with pytest.raises(InvalidArgumentError, match=r"shape \[1, 4\], got \[1, 3\]"):
        top_k(lambda users: np.zeros((1, 3)), case, 4)
    with pytest.raises(InvalidArgumentError, match="`k` and `batch`"):
        top_k(lambda users: np.zeros((1, 4)), case, 4, k=0)


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = mean_interval(rng.exponential(size=60), level=0.9, seed=trial, num_resamples=300)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.8 <= covered / 200 <= 0.96  # percentile intervals of skewed data fall a little short of 0.9


def test_intervals_repeat_by_seed_and_refuse_what_is_not_finite() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert mean_interval(np.array([0.3])) == pytest.approx((0.3, 0.3, 0.3))
    for bad in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(InvalidArgumentError, match="`values`"):
            mean_interval(np.array(bad))
    with pytest.raises(InvalidArgumentError, match="`level`"):
        mean_interval(values, level=95)
