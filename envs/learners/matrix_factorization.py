"""Matrix factorisation with the BPR loss (Rendle et al., 2009) and AdamW, in JAX: pure, hyperparameters traced.

score(u, i) = <p_u, q_i> + b_i, loss = -mean log σ(score(u, i) - score(u, j)), j a uniformly drawn item. Dropout acts on
p_u. Two parameter groups: the user table, and the item table with its biases. `envs.recommenders.matrix_factorization`
is the PyTorch twin; a test holds the two together step by step.

Shape legend: U user, I item, D embedding dimension, B batch, G = 2 parameter group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metalearn.signals import ProbeSums

NUM_GROUPS = 2
BETA2 = 0.999
EPSILON = 1e-8


class Params(NamedTuple):
    """Embedding tables."""

    user: jax.Array
    """[U, D]"""
    item: jax.Array
    """[I, D]"""
    bias: jax.Array
    """[I]"""


class Hyperparameters(NamedTuple):
    """Traced values of one step."""

    learning_rate: jax.Array
    """[G], schedule included"""
    weight_decay: jax.Array
    """[G], decoupled: w -= rate · decay · w"""
    beta1: jax.Array
    """[G]"""


class LearnerState(NamedTuple):
    """Parameters and AdamW's moments."""

    params: Params
    mu: Params
    nu: Params
    count: jax.Array
    """steps done, float32"""


class Batch(NamedTuple):
    """Triples of one step; `keep` [B, D] is the dropout mask, scaled so that its mean is 1."""

    user: jax.Array
    positive: jax.Array
    negative: jax.Array
    keep: jax.Array


def init(num_users: jax.Array, num_items: jax.Array, *, shape: tuple[int, int, int], key: jax.Array) -> LearnerState:
    """Initialises tables by Xavier's normal rule, std = sqrt(2 / (rows + D)); padding rows are zero.

    Args:
      num_users, num_items: true sizes (traced).
      shape: padded (U, I, D).
    """
    padded_users, padded_items, dim = shape
    key_user, key_item = jax.random.split(key)

    def table(key, padded, rows):
        std = jnp.sqrt(2.0 / (rows.astype(jnp.float32) + dim))
        return jnp.where(jnp.arange(padded)[:, None] < rows, jax.random.normal(key, (padded, dim)) * std, 0.0)

    params = Params(
        table(key_user, padded_users, num_users), table(key_item, padded_items, num_items), jnp.zeros(padded_items)
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    return LearnerState(params, zeros, zeros, jnp.zeros(()))


def loss_and_gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    """Computes the BPR loss and its dense gradient."""
    user = params.user[batch.user] * batch.keep
    positive, negative = params.item[batch.positive], params.item[batch.negative]
    difference = positive - negative
    margin = (user * difference).sum(-1) + params.bias[batch.positive] - params.bias[batch.negative]
    loss = jax.nn.softplus(-margin).mean()
    slope = (-jax.nn.sigmoid(-margin) / margin.shape[0])[:, None]
    items = jnp.concatenate([batch.positive, batch.negative])
    to_positive = slope * user
    gradient = Params(
        jnp.zeros_like(params.user).at[batch.user].add(slope * difference * batch.keep),
        jnp.zeros_like(params.item).at[items].add(jnp.concatenate([to_positive, -to_positive])),
        jnp.zeros_like(params.bias).at[items].add(jnp.concatenate([slope[:, 0], -slope[:, 0]])),
    )
    return loss, gradient


def per_table(group_values: jax.Array) -> Params:
    """Spreads [G] values over the tables: the user table is group 0, item table and biases are group 1."""
    return Params(group_values[0], group_values[1], group_values[1])


def apply_gradient(state: LearnerState, gradient: Params, hyperparameters: Hyperparameters) -> LearnerState:
    """Takes one AdamW step with decoupled weight decay, in the operation order of torch.optim.AdamW."""
    count = state.count + 1.0
    correction2 = jnp.sqrt(1.0 - BETA2**count)

    def leaf(w, m, v, g, rate, decay, beta1):
        m = m + (1.0 - beta1) * (g - m)
        v = BETA2 * v + (1.0 - BETA2) * g * g
        denominator = jnp.sqrt(v) / correction2 + EPSILON
        w = w * (1.0 - rate * decay) - (rate / (1.0 - beta1**count)) * (m / denominator)
        return w, m, v

    leaves = [
        leaf(*arguments)
        for arguments in zip(
            state.params, state.mu, state.nu, gradient, *(per_table(value) for value in hyperparameters), strict=True
        )
    ]
    params, mu, nu = (Params(*column) for column in zip(*leaves, strict=True))
    return LearnerState(params, mu, nu, count)


def step(state: LearnerState, batch: Batch, hyperparameters: Hyperparameters) -> tuple[LearnerState, jax.Array, Params]:
    """Takes one training step; returns the next state, the loss and the gradient."""
    loss, gradient = loss_and_gradient(state.params, batch)
    return apply_gradient(state, gradient, hyperparameters), loss, gradient


def by_group(tables: Params) -> jax.Array:
    """Sums per-table scalars to [G]."""
    return jnp.stack([tables.user, tables.item + tables.bias])


def probe_sums(
    before: Params, gradient: Params, after: Params, next_gradient: Params, anchor: Params, rows: jax.Array
) -> ProbeSums:
    """Measures one pair of successive steps, per group; see `ProbeSums`.

    Args:
      before, gradient: weights and gradient at the first step.
      after, next_gradient: at the second.
      anchor: weights at the previous interval's probe.
      rows: [G] true rows of the tables.
    """

    def total(function, *trees):
        return by_group(jax.tree.map(lambda *leaves: function(*leaves).sum(), *trees))

    update = jax.tree.map(jnp.subtract, after, before)
    touched = [(table != 0).any(-1).sum().astype(jnp.float32) for table in (next_gradient.user, next_gradient.item)]
    return ProbeSums(
        gradient_square=total(jnp.square, gradient),
        next_gradient_square=total(jnp.square, next_gradient),
        gradient_dot=total(jnp.multiply, gradient, next_gradient),
        update_square=total(jnp.square, update),
        weight_square=total(jnp.square, after),
        curvature_dot=total(lambda g, h, u: (h - g) * u, gradient, next_gradient, update),
        displacement_square=total(lambda a, b: jnp.square(a - b), after, anchor),
        rows_touched=jnp.stack(touched),
        rows=rows,
    )


def ndcg(params: Params, users: jax.Array, targets: jax.Array, seen: jax.Array, k: int = 10) -> jax.Array:
    """Computes mean NDCG@k over users, ranking every item that is not hidden.

    A target's rank counts items whose score is not below its own: a NaN score therefore counts as ranked above, and a
    diverged model gets 0. (Counting scores *above* the target would rank everything first.)

    Args:
      users: int [E], -1 for padding.
      targets: int [E, T], -1 for padding.
      seen: bool [E, I], items to hide; padding items must be hidden.
    """
    scores = params.user[users] @ params.item.T + params.bias
    scores = jnp.where(seen, -jnp.inf, scores)
    at_target = jnp.take_along_axis(scores, jnp.maximum(targets, 0), axis=1)
    not_below = jnp.stack(
        [(~(scores < at_target[:, t : t + 1]) & ~seen).sum(1) for t in range(targets.shape[1])], axis=1
    )
    rank = not_below - 1
    exists = targets >= 0
    gain = jnp.where(exists & (rank < k), 1.0 / jnp.log2(rank.astype(jnp.float32) + 2.0), 0.0)
    ideal = jnp.cumsum(1.0 / jnp.log2(jnp.arange(targets.shape[1], dtype=jnp.float32) + 2.0))
    num_targets = exists.sum(1)
    per_user = gain.sum(1) / ideal[jnp.clip(jnp.minimum(num_targets, k) - 1, 0)]
    valid = num_targets > 0
    return jnp.where(valid, per_user, 0.0).sum() / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
