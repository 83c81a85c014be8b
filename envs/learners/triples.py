"""What learners share whose step compares, for a user, an item taken with one drawn uniformly (Rendle et al., 2009).

Shape legend: D embedding dimension, B batch.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax

from envs.learners.learner import Learner, TrainingData, draw_items


class Triples(NamedTuple):
    """Triples of one step, int32 [B] each; `keep` [B, D] is the dropout mask, scaled so that its mean is 1."""

    user: jax.Array
    positive: jax.Array
    negative: jax.Array
    keep: jax.Array


class TripleLearner(Learner):
    """Learns a user table and an item table, a parameter group each, from triples; dropout acts on users' vectors."""

    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding")

    @property
    def num_uniforms(self) -> int:
        """A row and a negative for every triple."""
        return 2 * self.batch

    @property
    def num_keep(self) -> int:
        """One for every entry of the users' vectors."""
        return self.batch * self.dim

    def make_batch(
        self, data: TrainingData, user: jax.Array, item: jax.Array, uniforms: jax.Array, keep: jax.Array
    ) -> Triples:
        """Draws negatives from all items."""
        return Triples(user, item, draw_items(data, uniforms), keep.reshape(self.batch, self.dim))
