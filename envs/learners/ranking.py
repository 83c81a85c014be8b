"""The ranking metric of the JAX environment.

Shape legend: E evaluated user, T target, I item.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ndcg(scores: jax.Array, targets: jax.Array, hidden: jax.Array, k: int = 10) -> jax.Array:
    """Computes mean NDCG@k over users, ranking every item that is not hidden.

    A target's rank counts items whose score is not below its own: a NaN score therefore counts as ranked above, and a
    diverged model gets 0. (Counting scores *above* the target would rank everything first.)

    Args:
      scores: float32 [E, I].
      targets: int [E, T], -1 for padding; a user without any does not count.
      hidden: bool [E, I], items that are no candidates; padding items must be hidden.
      k: length of the list.

    Source: Järvelin and Kekäläinen (2002), Cumulated gain-based evaluation of IR techniques, ACM TOIS 20(4).
    """
    scores = jnp.where(hidden, -jnp.inf, scores)
    at_target = jnp.take_along_axis(scores, jnp.maximum(targets, 0), axis=1)
    not_below = jnp.stack(
        [(~(scores < at_target[:, t : t + 1]) & ~hidden).sum(1) for t in range(targets.shape[1])], axis=1
    )
    rank = not_below - 1
    exists = targets >= 0
    gain = jnp.where(exists & (rank < k), 1.0 / jnp.log2(rank.astype(jnp.float32) + 2.0), 0.0)
    ideal = jnp.cumsum(1.0 / jnp.log2(jnp.arange(targets.shape[1], dtype=jnp.float32) + 2.0))
    num_targets = exists.sum(1)
    per_user = gain.sum(1) / ideal[jnp.clip(jnp.minimum(num_targets, k) - 1, 0)]
    valid = num_targets > 0
    return jnp.where(valid, per_user, 0.0).sum() / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
