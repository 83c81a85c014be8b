"""Ranking metrics of top-k lists, the lists themselves, and the popularity baseline.

Shape legend: E evaluated users, I items, B users of a batch, k length of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from envs.domains import Domain
from envs.evaluation_sets import CSR, EvaluationSet, evaluation_set
from metalearn.errors import InvalidArgumentError

_TIE_SEED = 20_113
"""Ties are broken by a fixed random order of items: by code they could follow popularity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingMetrics:
    """Metrics of each evaluated user, float64 [E] in [0, 1], and their means.

    With hits at ranks r (from 1) within the first k places and n targets:

        ndcg   = sum over hits of 1 / log2(r + 1), divided by sum for i = 1 .. min(n, k) of 1 / log2(i + 1)
        recall = number of hits / n          (so it cannot reach 1 if n > k)
        mrr    = 1 / (rank of the first hit), 0 without one
        hit    = 1 if there is a hit
    """

    k: int
    ndcg: np.ndarray
    recall: np.ndarray
    mrr: np.ndarray
    hit: np.ndarray

    def means(self) -> dict[str, float]:
        """Mean over users of each metric, by names such as "ndcg@10"."""
        return {f"{name}@{self.k}": float(getattr(self, name).mean()) for name in ("ndcg", "recall", "mrr", "hit")}

    @property
    def mean_ndcg(self) -> float:
        """Mean NDCG@k over users."""
        return float(self.ndcg.mean())

    @property
    def mean_recall(self) -> float:
        """Mean recall@k over users."""
        return float(self.recall.mean())


def ranking_metrics(top_items: np.ndarray, targets: CSR, *, k: int = 10) -> RankingMetrics:
    """Score top-k lists against target items.

    Args:
        top_items: int [E, >= k], item codes in order of rank; -1 is an empty place and counts as a miss.
        targets: relevant items, E rows of at least one.
        k: places that count.

    Returns:
        Metrics of each user; see `RankingMetrics` for the formulas.

    Raises:
        InvalidArgumentError: if shapes do not fit, a user has no target, or a list names an item twice.

    Example:
        >>> targets = CSR(indptr=np.array([0, 1]), indices=np.array([7], dtype=np.int32))
        >>> ranking_metrics(np.array([[4, 7, 9]]), targets, k=3).means()  # one hit at rank 2: 1 / log2(3)
        {'ndcg@3': 0.6309297535714575, 'recall@3': 1.0, 'mrr@3': 0.5, 'hit@3': 1.0}

    Source: Järvelin and Kekäläinen (2002), Cumulated gain-based evaluation of IR techniques, ACM TOIS 20(4).
    """
    lists = _check_lists(top_items, targets, k)
    hits = _find_hits(lists, targets)
    num_targets = targets.lengths
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discount)[np.minimum(num_targets, k) - 1]
    any_hit = np.asarray(hits.any(axis=1))
    return RankingMetrics(
        k=k,
        ndcg=(hits * discount).sum(axis=1) / ideal,
        recall=hits.sum(axis=1) / num_targets,
        mrr=np.where(any_hit, 1.0 / (hits.argmax(axis=1) + 1.0), 0.0),
        hit=any_hit.astype(np.float64),
    )


def _check_lists(top_items: np.ndarray, targets: CSR, k: int) -> np.ndarray:
    lists = np.asarray(top_items)
    num_users = len(targets.indptr) - 1
    if k < 1:
        raise InvalidArgumentError(f"`k` must be a positive int, got {k}")
    if lists.ndim != 2 or lists.shape[0] != num_users or lists.shape[1] < k or lists.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"`top_items` must be integers of shape [{num_users}, at least {k}], got {lists.dtype} "
            f"{list(lists.shape)}; fill empty places with -1"
        )
    if num_users == 0 or not (targets.lengths > 0).all():
        raise InvalidArgumentError("`targets` must hold at least one user, and one target of each; see evaluation_set")
    lists = lists[:, :k].astype(np.int64)
    ordered = np.sort(lists, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise InvalidArgumentError(
            f"`top_items` row {int(repeated.argmax())} names an item twice; a list has no repeats"
        )
    return lists


def _find_hits(lists: np.ndarray, targets: CSR) -> np.ndarray:
    """Whether each place holds a target of its row, bool [E, k]."""
    width = int(max(lists.max(initial=0), targets.indices.max(initial=0))) + 1
    wanted = np.sort(targets.rows * width + targets.indices)
    offered = np.arange(len(lists))[:, None] * width + lists
    position = np.minimum(np.searchsorted(wanted, offered), len(wanted) - 1)
    return (wanted[position] == offered) & (lists >= 0)


def top_k(
    score_fn: Callable[[np.ndarray], np.ndarray],
    evaluation: EvaluationSet,
    num_items: int,
    k: int = 10,
    batch: int = 256,
) -> np.ndarray:
    """Rank all unseen items of each user by score and keep the first k.

    A user with a score that is NaN or infinite, of any item, gets an empty list: a diverged model must not look good.
    Equal scores are ranked in a fixed random order of items, so a constant model scores like chance.

    Args:
        score_fn: maps int32 user codes [B] to float scores [B, I], higher is better.
        evaluation: users to rank for and items to hide from them.
        num_items: I.
        k: length of a list.
        batch: users scored at once.

    Returns:
        int32 [E, k], -1 where a user has fewer than k unseen items or a score that is not finite.

    Raises:
        InvalidArgumentError: if `score_fn` returns another shape, or `k` or `batch` is not positive.
    """
    if k < 1 or batch < 1:
        raise InvalidArgumentError(f"`k` and `batch` must be positive ints, got {k} and {batch}")
    shuffle = np.random.default_rng(_TIE_SEED).permutation(num_items)
    lists = np.full((len(evaluation), k), -1, dtype=np.int32)
    for low in range(0, len(evaluation), batch):
        users = evaluation.users[low : low + batch]
        scores = np.asarray(score_fn(users))
        if scores.shape != (len(users), num_items):
            raise InvalidArgumentError(
                f"`score_fn` must return scores of shape {[len(users), num_items]}, got {list(scores.shape)}"
            )
        finite = np.isfinite(scores).all(axis=1, keepdims=True)
        # int scores could not be hidden by -inf, and a view could be the model's own memory.
        scores = scores.astype(np.result_type(scores.dtype, np.float32), copy=True)
        low_seen, high_seen = evaluation.seen.indptr[low], evaluation.seen.indptr[low + len(users)]
        rows = np.repeat(np.arange(len(users)), evaluation.seen.lengths[low : low + len(users)])
        scores[rows, evaluation.seen.indices[low_seen:high_seen]] = -np.inf
        best = _largest(scores[:, shuffle], k)
        chosen = np.where(best >= 0, shuffle[best], -1)
        lists[low : low + len(users), : chosen.shape[1]] = np.where(finite, chosen, -1)
    return lists


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest finite scores of each row, best first, ties by column; -1 where there are fewer."""
    k = min(k, scores.shape[1])
    kth = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k, None]
    candidates = (scores >= kth) & (scores > -np.inf)
    row, column = np.nonzero(candidates)
    order = np.lexsort((column, -scores[row, column], row))
    counts = np.bincount(row, minlength=len(scores))
    rank = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = rank < k
    best = np.full((len(scores), k), -1, dtype=np.int64)
    best[row[kept], rank[kept]] = column[order][kept]
    return best


def popularity_baseline(
    domain: Domain,
    split: Literal["validation", "test"] = "test",
    k: int = 10,
    *,
    max_users: int | None = None,
    seed: int = 0,
) -> RankingMetrics:
    """Score what offers everyone the items with most training users that they have not seen.

    Args:
        domain: the domain.
        split: "validation" or "test".
        k: places that count.
        max_users: evaluate a random sample of at most this many users, the one of `evaluation_set`.
        seed: of that sample.
    """
    popularity = np.bincount(domain.train.item, minlength=domain.num_items).astype(np.float32)
    evaluation = evaluation_set(domain, split, max_users=max_users, seed=seed)
    lists = top_k(
        lambda users: np.broadcast_to(popularity, (len(users), domain.num_items)), evaluation, domain.num_items, k
    )
    return ranking_metrics(lists, evaluation.targets, k=k)
