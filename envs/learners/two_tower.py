"""Two towers with item content, trained by a sampled softmax within the batch (Yi et al., 2019).

user vector = tower(p_u), item vector = tower(q_i + W c_i), each tower one hidden layer of 2 D units, each vector scaled
to unit length. score(u, i) = <user vector, item vector> / TEMPERATURE. The items of a batch are each other's negatives:

    loss = -mean_a log softmax_b(score(u_a, i_b) - log P(i_b)) [a]

where P(i) is the item's share of the training rows, and another row b of the same item as a is left out. Dropout acts
on the hidden layers. Three parameter groups: the user table, the item table, and the dense layers. Without content
there is no W. `envs.recommenders.two_tower` is the PyTorch twin; a test holds the two together step by step.

Source: Yi et al. (2019), Sampling-bias-corrected neural modeling for large corpus item recommendations, RecSys.

Shape legend: U user, I item, C content, D embedding dimension, B batch, E evaluated user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from envs.learners.learner import Learner, TrainingData, xavier_normal

TEMPERATURE = 0.2
"""Scores lie within ± 1 / TEMPERATURE."""
EPSILON = 1e-6
"""Added to the square of a vector's length: a vector whose hidden units were all dropped may be zero."""


class Tower(NamedTuple):
    """Two dense layers with SiLU between."""

    hidden_weight: jax.Array
    """[2 D, D]"""
    hidden_bias: jax.Array
    output_weight: jax.Array
    """[D, 2 D]"""
    output_bias: jax.Array


class Params(NamedTuple):
    """Embedding tables, the projection W of content, and the towers."""

    user: jax.Array
    """[U, D]"""
    item: jax.Array
    """[I, D]"""
    projection: jax.Array | None
    """[D, C], None without content"""
    user_tower: Tower
    item_tower: Tower


class Batch(NamedTuple):
    """Positives of one step; `keep` [2, B, 2 D] are the dropout masks of the users' and items' hidden layers."""

    user: jax.Array
    item: jax.Array
    log_share: jax.Array
    """float32 [B], log P of the items"""
    keep: jax.Array


@dataclass(frozen=True, kw_only=True)
class TwoTower(Learner):
    """Two towers under a softmax within the batch; see the module."""

    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding", "dense")

    @property
    def num_uniforms(self) -> int:
        """A row for every positive."""
        return self.batch

    @property
    def num_keep(self) -> int:
        """One for every hidden unit of both towers."""
        return 2 * self.batch * 2 * self.dim

    def init(self, data: TrainingData, *, key: jax.Array) -> Params:
        """Initialises every matrix by Xavier's normal rule, biases by zero."""
        key_user, key_item, key_projection, key_users, key_items = jax.random.split(key, 5)
        projection = None
        if self.shape.content:
            projection = xavier_normal(key_projection, self.dim, jnp.int32(self.dim), self.shape.content)
        return Params(
            xavier_normal(key_user, self.shape.users, data.num_users, self.dim),
            xavier_normal(key_item, self.shape.items, data.num_items, self.dim),
            projection,
            self._tower(key_users),
            self._tower(key_items),
        )

    def _tower(self, key: jax.Array) -> Tower:
        key_hidden, key_output = jax.random.split(key)
        hidden = 2 * self.dim
        return Tower(
            xavier_normal(key_hidden, hidden, jnp.int32(hidden), self.dim),
            jnp.zeros(hidden),
            xavier_normal(key_output, self.dim, jnp.int32(self.dim), hidden),
            jnp.zeros(self.dim),
        )

    def groups(self, params: Params) -> Params:
        """The user table is group 0, the item table group 1, everything dense group 2."""
        return jax.tree.map(lambda _: 2, params)._replace(user=0, item=1)

    def rows(self, data: TrainingData, params: Params) -> Params:
        """Users, items, and the output units of dense layers."""
        dense = jax.tree.map(lambda leaf: len(leaf) if leaf.ndim > 1 and leaf.shape[1] > 1 else 0, params)
        return dense._replace(user=data.num_users, item=data.num_items)

    def make_batch(
        self, data: TrainingData, user: jax.Array, item: jax.Array, uniforms: jax.Array, keep: jax.Array
    ) -> Batch:
        """Looks up the items' shares of the window; there is nothing to draw."""
        keep = keep.reshape(2, self.batch, 2 * self.dim)
        return Batch(user, item, log_shares(data, self.shape.items)[item], keep)

    def loss(self, params: Params, data: TrainingData, batch: Batch) -> jax.Array:
        """Computes the softmax loss within the batch."""
        users = _vectors(params.user_tower, params.user[batch.user], batch.keep[0])
        inputs = _item_inputs(params, batch.item, data.content)
        items = _vectors(params.item_tower, inputs, batch.keep[1])
        logits = users @ items.T / TEMPERATURE - batch.log_share
        hit = (batch.item[:, None] == batch.item) & ~jnp.eye(self.batch, dtype=bool)
        logits = jnp.where(hit, -jnp.inf, logits)
        return (jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)).mean()

    def scores(self, params: Params, data: TrainingData, users: jax.Array) -> jax.Array:
        """Computes <user vector, item vector> / TEMPERATURE."""
        every = jnp.arange(self.shape.items)
        items = _vectors(params.item_tower, _item_inputs(params, every, data.content))
        return _vectors(params.user_tower, params.user[users]) @ items.T / TEMPERATURE


def log_shares(data: TrainingData, num_items: int) -> jax.Array:
    """Returns the log of each item's share of the window's rows, float32 [I]; that of one row where there is none.

    It depends on the data alone, so the compiler computes it once an interval, not every step.
    """
    row = jnp.arange(len(data.item), dtype=jnp.float32)
    inside = (row >= data.first_row) & (row < data.first_row + data.num_rows)
    counts = jnp.zeros(num_items).at[data.item].add(inside.astype(jnp.float32))
    return jnp.log(jnp.maximum(counts, 1.0) / data.num_rows)


def _item_inputs(params: Params, item: jax.Array, content: jax.Array) -> jax.Array:
    """Returns q_i + W c_i, [..., D]."""
    if params.projection is None:
        return params.item[item]
    return params.item[item] + content[item] @ params.projection.T


def _vectors(tower: Tower, inputs: jax.Array, keep: jax.Array | float = 1.0) -> jax.Array:
    """Applies a tower and scales its vectors to unit length, [..., D]."""
    hidden = jax.nn.silu(inputs @ tower.hidden_weight.T + tower.hidden_bias) * keep
    output = hidden @ tower.output_weight.T + tower.output_bias
    return output * jax.lax.rsqrt(jnp.square(output).sum(-1, keepdims=True) + EPSILON)
