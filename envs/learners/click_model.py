"""A neural click model: embeddings and a dense network under the log loss, as in CTR prediction (He et al., 2017).

    logit(u, i) = <w, silu(W [p_u, q_i, p_u q_i] + b)> + c + b_i, with one hidden layer of 2 D units

loss = mean cross-entropy of sigmoid(logit) and the label. A batch holds B training rows, label 1, and as many pairs of
label 0: random recorded exposures where there are any, else the users of the rows with uniformly drawn items. Dropout
acts on the hidden layer. Four parameter groups: the user table, the item table with its biases, the hidden layer, and
the output layer. `envs.recommenders.click_model` is the PyTorch twin; a test holds the two together step by step.

Source: He et al. (2017), Neural collaborative filtering, WWW.

Shape legend: U user, I item, D embedding dimension, H = 2 D hidden unit, B batch, E evaluated user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from envs.learners.learner import Learner, TrainingData, draw_items, xavier_normal


class Params(NamedTuple):
    """Embedding tables and two dense layers."""

    user: jax.Array
    """[U, D]"""
    item: jax.Array
    """[I, D]"""
    bias: jax.Array
    """[I]"""
    hidden_weight: jax.Array
    """[H, 3 D], for users, items and products in this order"""
    hidden_bias: jax.Array
    output_weight: jax.Array
    """[1, H]"""
    output_bias: jax.Array


class Batch(NamedTuple):
    """Pairs of one step, first those taken; `keep` [2 B, H] is the dropout mask of the hidden layer."""

    user: jax.Array
    item: jax.Array
    label: jax.Array
    """float32 [2 B]"""
    keep: jax.Array


@dataclass(frozen=True, kw_only=True)
class ClickModel(Learner):
    """Embeddings and a dense network under the log loss; see the module."""

    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding", "dense", "head")

    @property
    def num_uniforms(self) -> int:
        """A row and a negative for every positive."""
        return 2 * self.batch

    @property
    def num_keep(self) -> int:
        """One for every hidden unit of every pair."""
        return 2 * self.batch * 2 * self.dim

    def init(self, data: TrainingData, *, key: jax.Array) -> Params:
        """Initialises every matrix by Xavier's normal rule, biases by zero."""
        key_user, key_item, key_hidden, key_output = jax.random.split(key, 4)
        hidden = 2 * self.dim
        return Params(
            xavier_normal(key_user, self.shape.users, data.num_users, self.dim),
            xavier_normal(key_item, self.shape.items, data.num_items, self.dim),
            jnp.zeros(self.shape.items),
            xavier_normal(key_hidden, hidden, jnp.int32(hidden), 3 * self.dim),
            jnp.zeros(hidden),
            xavier_normal(key_output, 1, jnp.int32(1), hidden),
            jnp.zeros(1),
        )

    def groups(self, params: Params) -> Params:
        """The user table is group 0, item table and biases 1, the hidden layer 2, the output layer 3."""
        return Params(0, 1, 1, 2, 2, 3, 3)  # type: ignore[arg-type]

    def rows(self, data: TrainingData, params: Params) -> Params:
        """Users, items, and the output units of dense layers."""
        return Params(data.num_users, data.num_items, 0, 2 * self.dim, 0, 1, 0)  # type: ignore[arg-type]

    def make_batch(
        self, data: TrainingData, user: jax.Array, item: jax.Array, uniforms: jax.Array, keep: jax.Array
    ) -> Batch:
        """Draws negatives from the exposures, or from all items for the same users."""
        shown = (uniforms * data.num_exposures).astype(jnp.int32)
        recorded = data.num_exposures > 0
        negative_user = jnp.where(recorded, data.exposed_user[shown], user)
        negative_item = jnp.where(recorded, data.exposed_item[shown], draw_items(data, uniforms))
        return Batch(
            jnp.concatenate([user, negative_user]),
            jnp.concatenate([item, negative_item]),
            jnp.repeat(jnp.array([1.0, 0.0]), self.batch, total_repeat_length=2 * self.batch),
            keep.reshape(2 * self.batch, 2 * self.dim),
        )

    def loss(self, params: Params, data: TrainingData, batch: Batch) -> jax.Array:
        """Computes the log loss."""
        user, item = params.user[batch.user], params.item[batch.item]
        inputs = jnp.concatenate([user, item, user * item], axis=-1)
        hidden = jax.nn.silu(inputs @ params.hidden_weight.T + params.hidden_bias) * batch.keep
        logit = hidden @ params.output_weight[0] + params.output_bias + params.bias[batch.item]
        return (jax.nn.softplus(logit) - batch.label * logit).mean()

    def scores(self, params: Params, data: TrainingData, users: jax.Array) -> jax.Array:
        """Computes the logits of every item, user by user, so that [I, H] is the most that is held at once."""
        of_user, of_item, of_product = jnp.split(params.hidden_weight, 3, axis=1)
        from_items = params.item @ of_item.T + params.hidden_bias

        def score(user: jax.Array) -> jax.Array:
            vector = params.user[user]
            hidden = jax.nn.silu(from_items + of_user @ vector + params.item @ (of_product * vector).T)
            return hidden @ params.output_weight[0] + params.output_bias + params.bias

        return jax.lax.map(score, users)
