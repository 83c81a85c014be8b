"""What a learner is: one family of recommenders in JAX, pure, with hyperparameters as traced values.

Shape legend: U user, I item, N interaction, X exposure, L history, C content, D embedding dimension, B batch,
E evaluated user, G parameter group. Dense weights are stored as torch stores them, [out, in], so that both count the
same rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.errors import InvalidArgumentError
from metalearn.signals import ProbeSums


class TrainingData(NamedTuple):
    """What a learner may learn from: one domain's training part, padded. Stacked along a leading axis it is a batch."""

    user: Any
    """int32 [N], in order of time where there are times"""
    item: Any
    """int32 [N]"""
    first_row: Any
    """float32, first row of the window that batches are drawn from"""
    num_rows: Any
    """float32, rows of the window"""
    num_users: Any
    """int32, true rows of the user table"""
    num_items: Any
    history: Any
    """int32 [U, L], each user's last training items in order, -1 before the first"""
    content: Any
    """float32 [I, C], what each item is; zeros where unknown"""
    exposed_user: Any
    """int32 [X], pairs that were shown and not taken"""
    exposed_item: Any
    num_exposures: Any
    """float32; 0 if none were recorded"""


class Shape(NamedTuple):
    """Static sizes of padded `TrainingData`."""

    users: int
    items: int
    history: int
    content: int


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """A family of recommenders: initialise, draw a batch, compute a loss, score items.

    Params are any pytree of arrays. The environment draws `num_uniforms` uniform numbers and a dropout mask of
    `num_keep` entries for every step: drawing each where it is needed would cost more than half of a small step.

    Args:
      shape: padded sizes.
      dim: D.
      batch: B.
    """

    shape: Shape
    dim: int = 32
    batch: int = 256

    roles: ClassVar[tuple[str, ...]]
    """Role of each parameter group, among `metalearn.controller.config.ROLES`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Sizes of `Shape`, of "history" and "content", that must be positive."""
    learns_pairs: ClassVar[bool] = True
    """Whether a batch is of single interactions, so that those of validation have a loss as well."""

    def __post_init__(self) -> None:
        for name in ("dim", "batch"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"`{name}` must be a positive int, got {getattr(self, name)}")
        for name in self.needs:
            if getattr(self.shape, name) < 1:
                raise InvalidArgumentError(
                    f"`{name}` must be positive for {type(self).__name__}, got {getattr(self.shape, name)}; "
                    "give the bucket room for it"
                )

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.roles)

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Uniform numbers that `draw` needs."""

    @property
    @abstractmethod
    def num_keep(self) -> int:
        """Entries of the dropout mask that `draw` needs."""

    @abstractmethod
    def init(self, data: TrainingData, *, key: jax.Array) -> Any:
        """Returns initial params; rows of padding are zero."""

    @abstractmethod
    def groups(self, params: Any) -> Any:
        """Returns the parameter group of every leaf: a pytree of ints shaped like params."""

    @abstractmethod
    def rows(self, data: TrainingData, params: Any) -> Any:
        """Returns the true rows of every leaf that is a matrix of two columns or more, and 0 for others."""

    def draw(self, data: TrainingData, uniforms: jax.Array, keep: jax.Array) -> Any:
        """Draws a batch from the window.

        Args:
          data: one domain.
          uniforms: [num_uniforms] in [0, 1); the first B choose the rows.
          keep: [num_keep] dropout mask, 0 or 1 / (1 - rate).
        """
        row = draw_rows(data, uniforms[: self.batch])
        return self.make_batch(data, data.user[row], data.item[row], uniforms[self.batch :], keep)

    @abstractmethod
    def make_batch(
        self, data: TrainingData, user: jax.Array, item: jax.Array, uniforms: jax.Array, keep: jax.Array
    ) -> Any:
        """Makes a batch of interactions, of the training rows or others of the same users and items.

        Args:
          data: what else a batch has is taken from.
          user, item: int32 [B].
          uniforms: [num_uniforms - B] in [0, 1).
          keep: as of `draw`.
        """

    @abstractmethod
    def loss(self, params: Any, data: TrainingData, batch: Any) -> jax.Array:
        """Computes the mean loss of a batch."""

    @abstractmethod
    def scores(self, params: Any, data: TrainingData, users: jax.Array) -> jax.Array:
        """Scores every item for users int32 [E], without dropout: float32 [E, I], higher is better."""

    def mean_loss(self, params: Any, data: TrainingData, user: jax.Array, item: jax.Array) -> jax.Array:
        """Computes the mean loss of interactions int32 [K B], without dropout; what is drawn is the same each time."""
        keep = jnp.ones(self.num_keep)

        def of_batch(batch: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            key, users, items = batch
            uniforms = jax.random.uniform(key, (self.num_uniforms - self.batch,))
            return self.loss(params, data, self.make_batch(data, users, items, uniforms, keep))

        user, item = user.reshape(-1, self.batch), item.reshape(-1, self.batch)
        return jax.lax.map(of_batch, (jax.random.split(jax.random.key(0), len(user)), user, item)).mean()

    def loss_and_gradient(self, params: Any, data: TrainingData, batch: Any) -> tuple[jax.Array, Any]:
        """Computes loss and gradient, by automatic differentiation unless a family knows a cheaper way."""
        return jax.value_and_grad(self.loss)(params, data, batch)


def draw_rows(data: TrainingData, uniforms: jax.Array) -> jax.Array:
    """Turns uniform numbers into rows of the data's window, int32 of the same shape."""
    return (data.first_row + uniforms * data.num_rows).astype(jnp.int32)


def draw_items(data: TrainingData, uniforms: jax.Array) -> jax.Array:
    """Turns uniform numbers into items, int32 of the same shape."""
    return (uniforms * data.num_items.astype(jnp.float32)).astype(jnp.int32)


def xavier_normal(key: jax.Array, padded: int, rows: jax.Array, dim: int) -> jax.Array:
    """Draws an embedding table by Xavier's normal rule, std = sqrt(2 / (rows + D)); padding rows are zero.

    Source: Glorot and Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, eq. 16.
    """
    std = jnp.sqrt(2.0 / (rows.astype(jnp.float32) + dim))
    return jnp.where(jnp.arange(padded)[:, None] < rows, jax.random.normal(key, (padded, dim)) * std, 0.0)


def probe_sums(
    learner: Learner, data: TrainingData, before: Any, gradient: Any, after: Any, next_gradient: Any, anchor: Any
) -> ProbeSums:
    """Measures one pair of successive steps, per group; see `ProbeSums`.

    Args:
      before, gradient: weights and gradient at the first step.
      after, next_gradient: at the second.
      anchor: weights at the previous interval's probe.
    """
    group = jax.tree.leaves(learner.groups(before))

    def by_group(leaves: list[Any]) -> jax.Array:
        totals = [jnp.zeros(())] * learner.num_groups
        for index, leaf in zip(group, leaves, strict=True):
            totals[index] = totals[index] + leaf
        return jnp.stack(totals)

    def total(function: Any, *trees: Any) -> jax.Array:
        return by_group([function(*leaves).sum() for leaves in zip(*map(jax.tree.leaves, trees), strict=True)])

    update = jax.tree.map(jnp.subtract, after, before)
    rows = jax.tree.leaves(learner.rows(data, before))
    touched = [
        (leaf != 0).any(-1).sum().astype(jnp.float32) if leaf.ndim > 1 and leaf.shape[-1] > 1 else jnp.zeros(())
        for leaf in jax.tree.leaves(next_gradient)
    ]
    return ProbeSums(
        gradient_square=total(jnp.square, gradient),
        next_gradient_square=total(jnp.square, next_gradient),
        gradient_dot=total(jnp.multiply, gradient, next_gradient),
        update_square=total(jnp.square, update),
        weight_square=total(jnp.square, after),
        curvature_dot=total(lambda g, h, u: (h - g) * u, gradient, next_gradient, update),
        displacement_square=total(lambda a, b: jnp.square(a - b), after, anchor),
        rows_touched=by_group(touched),
        rows=by_group([jnp.asarray(count, jnp.float32) for count in rows]),
    )
