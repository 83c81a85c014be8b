"""Landmark: how much a cheap personalised recommender gains over popularity, with one item hidden per user.

Shapes: U users of the block, I items of the block, E evaluated users.
"""

from __future__ import annotations

import math

import numpy as np

from metalearn.profiles.meta_features.co_occurrence import degree_normalised

NAMES = ("landmark_log_gain", "landmark_log_popularity")

EVALUATED_USERS = 256
_FEWEST_USERS = 8
_SMOOTHING = 0.02
_CUTOFF = 10


def landmark_features(block: np.ndarray, *, seed: int) -> dict[str, float]:
    """Compute log((g + .02) / (p + .02)) and log(p + .02), g and p being NDCG@10 of the graph filter and popularity.

    Args:
      block: 0/1 matrix [U, I] whose rows have two ones or more.
      seed: seed of the evaluated users and their hidden items.

    Returns:
      The two values; NaN with fewer than 8 users.
    """
    if len(block) < _FEWEST_USERS:
        return dict.fromkeys(NAMES, math.nan)
    rng = np.random.default_rng([seed, 1])
    users = np.sort(rng.choice(len(block), min(EVALUATED_USERS, len(block)), replace=False))
    hidden = np.argmax(block[users] * (1.0 - rng.random((len(users), block.shape[1]))), axis=1)
    train = block.copy()
    train[users, hidden] = 0.0
    seen = train[users] > 0
    popularity = np.broadcast_to(train.sum(axis=0), seen.shape)
    filtered = ndcg(graph_filter_scores(train, users), hidden, seen)
    popular = ndcg(popularity, hidden, seen)
    gain = math.log((filtered + _SMOOTHING) / (popular + _SMOOTHING))
    return dict(zip(NAMES, (gain, math.log(popular + _SMOOTHING)), strict=True))


def graph_filter_scores(train: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Score items by the linear graph filter R D_i^(-1/2) (R̃ᵀ R̃) D_i^(1/2), R̃ being degree-normalised; [E, I].

    (Shen et al., "How powerful is graph convolution for recommendation?", CIKM 2021, the linear part of eq. 14.)
    """
    root = np.sqrt(train.sum(axis=0))
    normalised = degree_normalised(train)
    return ((train[users] / np.maximum(root, 1.0)) @ normalised.T) @ normalised * root


def ndcg(scores: np.ndarray, hidden: np.ndarray, seen: np.ndarray) -> float:
    """Mean NDCG@10 of one hidden item per user among the unseen ones; tied items share their mean rank."""
    target = np.take_along_axis(scores, hidden[:, None], axis=1)
    # Products in different order leave equal scores apart by rounding; they count as ties.
    margin = 1e-9 * np.maximum(np.abs(target), 1.0)
    above = np.sum((scores > target + margin) & ~seen, axis=1)
    tied = np.sum((np.abs(scores - target) <= margin) & ~seen, axis=1) - 1
    rank = 1.0 + above + tied / 2.0
    return float(np.mean(np.where(rank <= _CUTOFF, 1.0 / np.log2(1.0 + rank), 0.0)))
