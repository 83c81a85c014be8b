"""Matrix factorisation with the BPR loss (Rendle et al., 2009) in PyTorch.

The twin of `envs.learners.matrix_factorization`.

Shape legend: U user, I item, D embedding dimension, B batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from envs.domains import Domain
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import TripleSampler


class MatrixFactorization(Recommender):
    """Scores <p_u, q_i> + b_i, with dropout on p_u.

    Args:
      num_users, num_items: rows of the tables.
      dim: D.
      dropout: share of p_u's entries dropped in training.
      sparse: whether the tables get sparse gradients (for SparseAdam, say).
      generator: of the initial weights, Xavier's normal rule.
    """

    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding")

    def __init__(
        self,
        num_users: int,
        num_items: int,
        dim: int = 32,
        *,
        dropout: float = 0.0,
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(num_users, dim, sparse=sparse)
        self.item = nn.Embedding(num_items, dim, sparse=sparse)
        self.bias = nn.Embedding(num_items, 1, sparse=sparse)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_normal_(self.user.weight, generator=generator)
        nn.init.xavier_normal_(self.item.weight, generator=generator)
        nn.init.zeros_(self.bias.weight)

    @classmethod
    def for_domain(
        cls, domain: Domain, *, dim: int = 32, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> Self:
        """Returns an untrained model for a domain."""
        return cls(domain.num_users, domain.num_items, dim, dropout=dropout, generator=generator)

    def sampler(
        self, domain: Domain, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> TripleSampler:
        """Returns a sampler of triples."""
        return TripleSampler(domain.train, batch_size, seed=seed, device=device)

    def forward(self, user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Returns the mean BPR loss of triples, each int64 [B]."""
        vector = self.dropout(self.user(user))
        margin = (vector * (self.item(positive) - self.item(negative))).sum(-1)
        margin = margin + (self.bias(positive) - self.bias(negative)).squeeze(-1)
        return F.softplus(-margin).mean()

    @torch.no_grad()
    def score(self, user: torch.Tensor) -> torch.Tensor:
        """Returns scores of every item, [B, I]."""
        return self.user(user) @ self.item.weight.T + self.bias.weight.T

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns two groups for an optimizer: the user table, and the item table with its biases."""
        return [
            {"params": [self.user.weight], "role": "embedding"},
            {"params": [self.item.weight, self.bias.weight], "role": "embedding"},
        ]
