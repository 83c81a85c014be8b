"""Tastes: latent factors of users and items in clusters of clusters, how they turn, and content that shows them.

Shape legend: U users, I items, D latent dimensions, K clusters, C content dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from envs.simulated.prior import SimulatedParams


class Tastes(NamedTuple):
    """Latent factors; inner products of a user's with an item's have about unit variance over all pairs, and more where
    both sides share few centres."""

    user: np.ndarray
    """float32 [U, D], at the start of a lifetime."""
    turned: np.ndarray
    """float32 [U, D], what a taste turned by a right angle becomes."""
    item: np.ndarray
    """float32 [I, D]."""
    item_cluster: np.ndarray
    """int64 [I], in 0..K-1."""

    def at(self, users: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """Turn the tastes of some users by an angle each: cos(angle) x + sin(angle) x'; float32 [B, D]."""
        angle = angle[:, None].astype(np.float32)
        return np.cos(angle) * self.user[users] + np.sin(angle) * self.turned[users]


def draw_tastes(params: SimulatedParams, rng: np.random.Generator) -> Tastes:
    """Draw factors from two mixtures, of users and of items, with shared centres that are a mixture themselves.

    centre = sqrt(hierarchy) parent + sqrt(1 - hierarchy) own; factor = sqrt(cluster_share) centre + sqrt(1 -
    cluster_share) own; all parts standard normal, the result divided by D^(1/4).
    """
    shape = (params.clusters, params.latent_dim)
    parents = max(round(math.sqrt(params.clusters)), 1)
    above = rng.standard_normal((parents, params.latent_dim), dtype=np.float32)[rng.integers(parents, size=shape[0])]
    centres = _mix(above, rng.standard_normal(shape, dtype=np.float32), params.hierarchy)
    weights = rng.dirichlet(np.full(params.clusters, 2.0))
    scale = np.float32(params.latent_dim**-0.25)

    def draw(count: int, cluster: np.ndarray) -> np.ndarray:
        own = rng.standard_normal((count, params.latent_dim), dtype=np.float32)
        return scale * _mix(centres[cluster], own, params.cluster_share)

    user_cluster, later_cluster = (rng.choice(params.clusters, size=params.users, p=weights) for _ in range(2))
    item_cluster = rng.choice(params.clusters, size=params.items, p=weights)
    user, turned = draw(params.users, user_cluster), draw(params.users, later_cluster)
    return Tastes(user=user, turned=turned, item=draw(params.items, item_cluster), item_cluster=item_cluster)


def draw_content(item_factor: np.ndarray, params: SimulatedParams, rng: np.random.Generator) -> np.ndarray | None:
    """Draw content vectors, float32 [I, C]: a random linear image of taste and noise, each of unit variance.

    content = sqrt(content_share) y W + sqrt(1 - content_share) noise. None where `content_dim` is 0.
    """
    if params.content_dim == 0:
        return None
    projection = rng.standard_normal((item_factor.shape[1], params.content_dim), dtype=np.float32)
    image = item_factor @ projection
    image = (image - image.mean(axis=0)) / np.maximum(image.std(axis=0), 1e-6)
    own = rng.standard_normal((len(item_factor), params.content_dim), dtype=np.float32)
    return _mix(image, own, params.content_share)


def _mix(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Blend two arrays of unit variance so that the first makes up a share of the variance; float32."""
    return (math.sqrt(share) * first + math.sqrt(1.0 - share) * second).astype(np.float32)
