"""Graph convolution of the light kind (LightGCN) with the BPR loss.

With the bipartite graph of the training rows, d_u and d_i the degrees, p⁰ and q⁰ the tables:

  p_u^{l+1} = Σ_{i of u} q_i^l / √(d_u d_i),  q_i^{l+1} = Σ_{u of i} p_u^l / √(d_u d_i),

p and q are the means over the layers 0 to 2, score(u, i) = <p_u, q_i>, and the loss is that of matrix factorisation,
without biases. Dropout acts on p_u. Two parameter groups: the user table and the item table.
`envs.recommenders.graph_convolution` is the PyTorch twin.

Source: He, Deng, Wang, Li, Zhang and Wang (2020), LightGCN: simplifying and powering graph convolution network for
recommendation, eq. 3, 4 and 11.

Shape legend: U user, I item, N interaction, D embedding dimension, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.learners.learner import TrainingData, xavier_normal
from envs.learners.triples import TripleLearner, Triples

NUM_LAYERS = 2
"""Rounds of propagation."""


class Params(NamedTuple):
    """Embedding tables before propagation."""

    user: jax.Array
    """[U, D]"""
    item: jax.Array
    """[I, D]"""


@dataclass(frozen=True, kw_only=True)
class GraphConvolution(TripleLearner):
    """LightGCN; see the module. A step costs O(N · D), whatever its batch."""

    def init(self, data: TrainingData, *, key: jax.Array) -> Params:
        """Initialises the tables by Xavier's normal rule."""
        key_user, key_item = jax.random.split(key)
        return Params(
            xavier_normal(key_user, self.shape.users, data.num_users, self.dim),
            xavier_normal(key_item, self.shape.items, data.num_items, self.dim),
        )

    def groups(self, params: Params) -> Params:
        """The user table is group 0, the item table is group 1."""
        return Params(0, 1)  # type: ignore[arg-type]

    def rows(self, data: TrainingData, params: Params) -> Params:
        """Users and items."""
        return Params(data.num_users, data.num_items)  # type: ignore[arg-type]

    def loss(self, params: Params, data: TrainingData, batch: Triples) -> jax.Array:
        """Computes the BPR loss of the propagated tables."""
        user, item = propagate(params, data)
        difference = item[batch.positive] - item[batch.negative]
        return jax.nn.softplus(-(user[batch.user] * batch.keep * difference).sum(-1)).mean()

    def scores(self, params: Params, data: TrainingData, users: jax.Array) -> jax.Array:
        """Propagates once and computes <p_u, q_i>."""
        user, item = propagate(params, data)
        return user[users] @ item.T


def propagate(params: Params, data: TrainingData) -> Params:
    """Computes the means over the layers; the graph is the window that batches are drawn from."""
    weight = _edge_weights(params, data)[:, None]
    layer = total = params
    for _ in range(NUM_LAYERS):
        layer = Params(
            jnp.zeros_like(params.user).at[data.user].add(weight * layer.item[data.item]),
            jnp.zeros_like(params.item).at[data.item].add(weight * layer.user[data.user]),
        )
        total = Params(total.user + layer.user, total.item + layer.item)
    return Params(total.user / (NUM_LAYERS + 1), total.item / (NUM_LAYERS + 1))


def _edge_weights(params: Params, data: TrainingData) -> jax.Array:
    """Returns 1 / √(d_u d_i) of every row [N], 0 outside the window.

    It is the same in every step, but counting again is a small part of one: the scatters of vectors are the cost.
    """
    row = jnp.arange(len(data.user), dtype=jnp.float32)
    inside = jnp.where((row >= data.first_row) & (row < data.first_row + data.num_rows), 1.0, 0.0)
    degree_user = jnp.zeros(len(params.user)).at[data.user].add(inside)
    degree_item = jnp.zeros(len(params.item)).at[data.item].add(inside)
    return inside * jax.lax.rsqrt(jnp.maximum(degree_user[data.user] * degree_item[data.item], 1.0))
