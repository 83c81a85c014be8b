"""Self-attentive sequential recommendation (SASRec): the items so far predict the next one.

With a user's last items s_1 … s_T, e the item table and x_t = √D · e[s_t] + position_t, a block computes

  x = x + out · attention(norm(x)),  x = x + outer · gelu(inner · norm(x)),

attention being causal, of one head, and blind to padding. The state h_t = norm(x_t) scores item i by <h_t, e_i>, and

  loss = mean over t of softplus(-<h_t, e[s_{t+1}]>) + softplus(<h_t, e[n_t]>), n_t a uniformly drawn item.

Normalisation comes first in each branch, the later usage; the paper normalises after. Dropout acts on x and on what
each branch adds. Two parameter groups: the item table, which serves as input and output, and all the rest.
`envs.recommenders.self_attention` is the PyTorch twin.

A step takes `batch` rows of the training window, and of each row its user's sequence: users are drawn in proportion to
their activity, and an epoch is as many sequences as there are rows.

Source: Kang and McAuley (2018), Self-attentive sequential recommendation, ICDM.

Shape legend: I item, L history, T = L - 1 position, D embedding dimension, B batch, E evaluated user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from envs.learners.learner import Learner, TrainingData, draw_items, xavier_normal
from metalearn.errors import InvalidArgumentError

NUM_BLOCKS = 1
POSITION_STD = 0.02
"""Of the initial positions."""
_EPSILON = 1e-5
"""Added to the variance, as torch does."""


class Norm(NamedTuple):
    """A layer norm."""

    scale: jax.Array
    """[D]"""
    shift: jax.Array
    """[D]"""


class Block(NamedTuple):
    """Attention and a feed-forward layer, each behind a norm."""

    attention_norm: Norm
    project: jax.Array
    """[3 D, D], to queries, keys and values; without shifts, as the softmax does not see that of a key"""
    out: jax.Array
    """[D, D]"""
    feedforward_norm: Norm
    inner: jax.Array
    """[D, D]"""
    inner_shift: jax.Array
    """[D]"""
    outer: jax.Array
    """[D, D]"""
    outer_shift: jax.Array
    """[D]"""


class Params(NamedTuple):
    """Item table, and what reads sequences."""

    item: jax.Array
    """[I, D]"""
    position: jax.Array
    """[T, D]"""
    blocks: tuple[Block, ...]
    norm: Norm


class Batch(NamedTuple):
    """Sequences of one step; `keep` [1 + 2 blocks, B, T, D] is the dropout mask, scaled so that its mean is 1."""

    sequence: jax.Array
    """int32 [B, L], -1 before the first item"""
    negative: jax.Array
    """int32 [B, T]"""
    keep: jax.Array


@dataclass(frozen=True, kw_only=True)
class SelfAttention(Learner):
    """SASRec; see the module."""

    roles: ClassVar[tuple[str, ...]] = ("embedding", "dense")
    needs: ClassVar[tuple[str, ...]] = ("history",)
    learns_pairs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape.history < 2:
            raise InvalidArgumentError(
                f"`history` must be at least 2, got {self.shape.history}; an item and the one after it are needed"
            )

    @property
    def positions(self) -> int:
        """T: the last item of a history is only predicted in training, and the first is left out in scoring."""
        return self.shape.history - 1

    @property
    def num_uniforms(self) -> int:
        """A row for every sequence, and a negative for every position."""
        return self.batch * (1 + self.positions)

    @property
    def num_keep(self) -> int:
        """One for every entry of the embedded sequences and of each branch."""
        return (1 + 2 * NUM_BLOCKS) * self.batch * self.positions * self.dim

    def init(self, data: TrainingData, *, key: jax.Array) -> Params:
        """Initialises matrices by Xavier's normal rule, positions by a narrow normal, shifts by zero."""
        key_item, key_position, key_blocks = jax.random.split(key, 3)
        return Params(
            xavier_normal(key_item, self.shape.items, data.num_items, self.dim),
            jax.random.normal(key_position, (self.positions, self.dim)) * POSITION_STD,
            tuple(self._init_block(block_key) for block_key in jax.random.split(key_blocks, NUM_BLOCKS)),
            self._init_norm(),
        )

    def _init_norm(self) -> Norm:
        return Norm(jnp.ones(self.dim), jnp.zeros(self.dim))

    def _init_block(self, key: jax.Array) -> Block:
        def dense(key: jax.Array, rows: int) -> jax.Array:
            return xavier_normal(key, rows, jnp.int32(rows), self.dim)

        key_project, key_out, key_inner, key_outer = jax.random.split(key, 4)
        return Block(
            self._init_norm(),
            dense(key_project, 3 * self.dim),
            dense(key_out, self.dim),
            self._init_norm(),
            dense(key_inner, self.dim),
            jnp.zeros(self.dim),
            dense(key_outer, self.dim),
            jnp.zeros(self.dim),
        )

    def groups(self, params: Params) -> Params:
        """The item table is group 0, everything else is group 1."""
        return jax.tree.map(lambda leaf: 1, params)._replace(item=0)

    def rows(self, data: TrainingData, params: Params) -> Params:
        """Items, positions, and the outputs of dense layers; norms and shifts have no rows to speak of."""
        counts = jax.tree.map(lambda leaf: len(leaf) if leaf.ndim > 1 else 0, params)
        return counts._replace(item=data.num_items)

    def make_batch(
        self, data: TrainingData, user: jax.Array, item: jax.Array, uniforms: jax.Array, keep: jax.Array
    ) -> Batch:
        """Takes the users' sequences, which the items are in; negatives are of all items."""
        negative = draw_items(data, uniforms).reshape(self.batch, self.positions)
        keep = keep.reshape(-1, self.batch, self.positions, self.dim)
        return Batch(data.history[user], negative, keep)

    def loss(self, params: Params, data: TrainingData, batch: Batch) -> jax.Array:
        """Computes the mean loss over all positions that have an item and a next one."""
        vectors = params.item[jnp.maximum(batch.sequence, 0)]
        valid = batch.sequence[:, :-1] >= 0
        state = encode(params, vectors[:, :-1], valid, batch.keep)
        positive = (state * vectors[:, 1:]).sum(-1)
        negative = (state * params.item[batch.negative]).sum(-1)
        losses = jnp.where(valid, jax.nn.softplus(-positive) + jax.nn.softplus(negative), 0.0)
        return losses.sum() / jnp.maximum(valid.sum(), 1).astype(jnp.float32)

    def scores(self, params: Params, data: TrainingData, users: jax.Array) -> jax.Array:
        """Computes <h_T, e_i>, h_T the state after each user's last item."""
        sequence = data.history[users][:, 1:]
        state = encode(params, params.item[jnp.maximum(sequence, 0)], sequence >= 0)
        return state[:, -1] @ params.item.T


def encode(params: Params, vectors: jax.Array, valid: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Computes the state at every position.

    Args:
      params: of the model.
      vectors: [B, T, D] rows of the item table, anything where there is no item.
      valid: bool [B, T], where there is an item.
      keep: dropout masks [1 + 2 blocks, B, T, D]; None for no dropout.

    Returns:
      [B, T, D]; finite, and of no meaning, where there is no item.
    """
    masks = iter([1.0] * (1 + 2 * NUM_BLOCKS) if keep is None else keep)
    length, dim = vectors.shape[1:]
    x = jnp.where(valid[..., None], vectors * dim**0.5 + params.position, 0.0) * next(masks)
    causal = jnp.tril(jnp.ones((length, length), bool))
    # a position without an item attends to itself: a softmax over nothing is NaN
    visible = causal & valid[:, None, :] | jnp.eye(length, dtype=bool)
    for block in params.blocks:
        x = x + _attend(block, _normalise(block.attention_norm, x), visible) * next(masks)
        hidden = _normalise(block.feedforward_norm, x) @ block.inner.T + block.inner_shift
        x = x + (jax.nn.gelu(hidden, approximate=False) @ block.outer.T + block.outer_shift) * next(masks)
    return _normalise(params.norm, x)


def _normalise(norm: Norm, x: jax.Array) -> jax.Array:
    """Computes a layer norm over the last axis (Ba, Kiros and Hinton, 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON) * norm.scale + norm.shift


def _attend(block: Block, x: jax.Array, visible: jax.Array) -> jax.Array:
    """Computes single-head attention, [B, T, D]; `visible` is bool [B, T, T], query by key."""
    query, key, value = jnp.split(x @ block.project.T, 3, axis=-1)
    logits = jnp.einsum("bqd,bkd->bqk", query, key) / x.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bqk,bkd->bqd", weights, value) @ block.out.T
