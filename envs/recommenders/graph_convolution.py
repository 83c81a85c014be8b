"""Graph convolution of the light kind (LightGCN; He et al., 2020) with the BPR loss in PyTorch.

The twin of `envs.learners.graph_convolution`, which gives the formula.

Shape legend: U user, I item, N interaction, V = U + I vertex, D embedding dimension, B batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from envs.domains import Domain
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import TripleSampler
from metalearn.interactions import Interactions

NUM_LAYERS = 2
"""Rounds of propagation."""


class GraphConvolution(Recommender):
    """Scores <p_u, q_i> with tables propagated over the training graph, with dropout on p_u.

    A forward costs O(N · D), whatever its batch. The graph is a buffer that `state_dict` leaves out.

    Args:
      interactions: training positives, the edges of the graph.
      dim: D.
      dropout: share of p_u's entries dropped in training.
      generator: of the initial weights, Xavier's normal rule.
    """

    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding")

    neighbour: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor

    def __init__(
        self,
        interactions: Interactions,
        dim: int = 32,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(interactions.num_users, dim)
        self.item = nn.Embedding(interactions.num_items, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_normal_(self.user.weight, generator=generator)
        nn.init.xavier_normal_(self.item.weight, generator=generator)
        for name, buffer in zip(("neighbour", "offset", "weight"), _adjacency(interactions), strict=True):
            self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def for_domain(
        cls, domain: Domain, *, dim: int = 32, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> Self:
        """Returns an untrained model for a domain."""
        return cls(domain.train, dim, dropout=dropout, generator=generator)

    def sampler(
        self, domain: Domain, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> TripleSampler:
        """Returns a sampler of triples."""
        return TripleSampler(domain.train, batch_size, seed=seed, device=device)

    def propagate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the means over the layers, [U, D] and [I, D]."""
        layer = total = torch.cat([self.user.weight, self.item.weight])
        for _ in range(NUM_LAYERS):
            layer = _NeighbourSum.apply(layer, self.neighbour, self.offset, self.weight)
            total = total + layer
        user, item = (total / (NUM_LAYERS + 1)).split([self.user.num_embeddings, self.item.num_embeddings])
        return user, item

    def forward(self, user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Returns the mean BPR loss of triples, each int64 [B]."""
        users, items = self.propagate()
        margin = (self.dropout(users[user]) * (items[positive] - items[negative])).sum(-1)
        return F.softplus(-margin).mean()

    @torch.no_grad()
    def score(self, user: torch.Tensor) -> torch.Tensor:
        """Propagates, and returns scores of every item, [B, I]."""
        users, items = self.propagate()
        return users[user] @ items.T

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns two groups for an optimizer: the user table and the item table."""
        return [
            {"params": [self.user.weight], "role": "embedding"},
            {"params": [self.item.weight], "role": "embedding"},
        ]


class _NeighbourSum(torch.autograd.Function):
    """Multiplies by the normalised adjacency, a symmetric matrix: the gradient is the same product.

    As sums of embedding bags it costs what a product with a CSR matrix costs, an order of magnitude less than
    `index_add`; and unlike sparse tensors, bags compile and are left in float32 by autocast.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *graph: torch.Tensor) -> torch.Tensor:
        """Sums weighted neighbours, [V, D] -> [V, D]."""
        ctx.save_for_backward(*graph)
        neighbour, offset, weight = graph
        return F.embedding_bag(neighbour, x, offset, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Sums the neighbours' gradients."""
        neighbour, offset, weight = ctx.saved_tensors
        product = F.embedding_bag(neighbour, gradient.contiguous(), offset, mode="sum", per_sample_weights=weight)
        return product, None, None, None


def _adjacency(interactions: Interactions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns neighbours [2 N] ordered by vertex, each vertex's first entry [V], and weights 1 / √(d_u d_i) [2 N]."""
    user = torch.as_tensor(interactions.user, dtype=torch.int64)
    item = torch.as_tensor(interactions.item, dtype=torch.int64) + interactions.num_users
    vertex, order = torch.cat([user, item]).sort(stable=True)
    neighbour = torch.cat([item, user])[order]
    degree = torch.bincount(vertex, minlength=interactions.num_users + interactions.num_items)
    weight = (degree[vertex] * degree[neighbour]).float().rsqrt()
    return neighbour, degree.cumsum(0) - degree, weight
