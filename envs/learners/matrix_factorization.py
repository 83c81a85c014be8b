"""Matrix factorisation with the BPR loss (Rendle et al., 2009).

score(u, i) = <p_u, q_i> + b_i, loss = -mean log σ(score(u, i) - score(u, j)), j a uniformly drawn item. Dropout acts on
p_u. Two parameter groups: the user table, and the item table with its biases. `envs.recommenders.matrix_factorization`
is the PyTorch twin; a test holds the two together step by step.

Shape legend: U user, I item, D embedding dimension, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.learners.learner import TrainingData, xavier_normal
from envs.learners.triples import TripleLearner, Triples


class Params(NamedTuple):
    """Embedding tables."""

    user: jax.Array
    """[U, D]"""
    item: jax.Array
    """[I, D]"""
    bias: jax.Array
    """[I]"""


@dataclass(frozen=True, kw_only=True)
class MatrixFactorization(TripleLearner):
    """BPR matrix factorisation; see the module."""

    def init(self, data: TrainingData, *, key: jax.Array) -> Params:
        """Initialises the tables by Xavier's normal rule, biases by zero."""
        key_user, key_item = jax.random.split(key)
        return Params(
            xavier_normal(key_user, self.shape.users, data.num_users, self.dim),
            xavier_normal(key_item, self.shape.items, data.num_items, self.dim),
            jnp.zeros(self.shape.items),
        )

    def groups(self, params: Params) -> Params:
        """The user table is group 0, item table and biases are group 1."""
        return Params(0, 1, 1)  # type: ignore[arg-type]

    def rows(self, data: TrainingData, params: Params) -> Params:
        """Users and items; a column of biases has no rows to speak of."""
        return Params(data.num_users, data.num_items, 0)  # type: ignore[arg-type]

    def _margin(self, params: Params, batch: Triples) -> tuple[jax.Array, jax.Array, jax.Array]:
        user = params.user[batch.user] * batch.keep
        difference = params.item[batch.positive] - params.item[batch.negative]
        margin = (user * difference).sum(-1) + params.bias[batch.positive] - params.bias[batch.negative]
        return margin, user, difference

    def loss(self, params: Params, data: TrainingData, batch: Triples) -> jax.Array:
        """Computes the BPR loss."""
        return jax.nn.softplus(-self._margin(params, batch)[0]).mean()

    def loss_and_gradient(self, params: Params, data: TrainingData, batch: Triples) -> tuple[jax.Array, Params]:
        """Computes the loss and its gradient by hand: positives and negatives share one scatter."""
        margin, user, difference = self._margin(params, batch)
        slope = (-jax.nn.sigmoid(-margin) / margin.shape[0])[:, None]
        items = jnp.concatenate([batch.positive, batch.negative])
        to_positive = slope * user
        gradient = Params(
            jnp.zeros_like(params.user).at[batch.user].add(slope * difference * batch.keep),
            jnp.zeros_like(params.item).at[items].add(jnp.concatenate([to_positive, -to_positive])),
            jnp.zeros_like(params.bias).at[items].add(jnp.concatenate([slope[:, 0], -slope[:, 0]])),
        )
        return jax.nn.softplus(-margin).mean(), gradient

    def scores(self, params: Params, data: TrainingData, users: jax.Array) -> jax.Array:
        """Computes <p_u, q_i> + b_i."""
        return params.user[users] @ params.item.T + params.bias
