"""Two towers with item content, trained by a sampled softmax within the batch (Yi et al., 2019), in PyTorch.

The twin of `envs.learners.two_tower`.

Shape legend: U user, I item, C content, D embedding dimension, B batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from envs.domains import Domain
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import Sampler
from metalearn.interactions import Interactions

TEMPERATURE = 0.2
EPSILON = 1e-6
"""Added to the square of a vector's length."""


class PositiveSampler(Sampler):
    """Draws (user, item, log share) batches, two int64 [B] and float32 [B]; the share is the item's of all rows.

    Args:
      interactions, batch_size, seed, device: as in `Sampler`.
    """

    def __init__(
        self, interactions: Interactions, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(interactions, batch_size, seed=seed, device=device)
        counts = torch.bincount(self._item, minlength=interactions.num_items).float()
        self._log_share = torch.log(counts / len(interactions))

    def _batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        item = self._item[rows]
        return self._user[rows], item, self._log_share[item]


class TwoTower(Recommender):
    """Scores <user vector, item vector> / TEMPERATURE, vectors of unit length, with dropout on the hidden layers.

    Args:
      num_users, num_items: rows of the tables.
      dim: D.
      content: float32 [I, C], or None; a buffer, not trained.
      dropout: share of hidden units dropped in training.
      sparse: whether the tables get sparse gradients.
      generator: of the initial weights, Xavier's normal rule.
    """

    content: torch.Tensor | None
    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding", "dense")

    def __init__(
        self,
        num_users: int,
        num_items: int,
        dim: int = 32,
        *,
        content: torch.Tensor | None = None,
        dropout: float = 0.0,
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if content is not None and content.shape[1] == 0:
            content = None
        self.user = nn.Embedding(num_users, dim, sparse=sparse)
        self.item = nn.Embedding(num_items, dim, sparse=sparse)
        self.register_buffer("content", content)
        self.projection = None if content is None else nn.Linear(content.shape[1], dim, bias=False)
        self.user_tower = _tower(dim, dropout)
        self.item_tower = _tower(dim, dropout)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    @classmethod
    def for_domain(
        cls, domain: Domain, *, dim: int = 32, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> Self:
        """Returns an untrained model for a domain, with its item content."""
        content = None if domain.item_content is None else torch.tensor(domain.item_content, dtype=torch.float32)
        return cls(domain.num_users, domain.num_items, dim, content=content, dropout=dropout, generator=generator)

    def sampler(
        self, domain: Domain, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> PositiveSampler:
        """Returns a sampler of positives and their log shares."""
        return PositiveSampler(domain.train, batch_size, seed=seed, device=device)

    def forward(self, user: torch.Tensor, item: torch.Tensor, log_share: torch.Tensor) -> torch.Tensor:
        """Returns the mean softmax loss within the batch.

        Args:
          user, item: int64 [B], pairs that were taken.
          log_share: float32 [B], log of the items' shares of the training rows.
        """
        logits = self._user_vectors(user) @ self._item_vectors(item).T
        logits = logits.float() / TEMPERATURE - log_share
        row = torch.arange(len(item), device=item.device)
        hit = (item[:, None] == item) & (row[:, None] != row)
        return F.cross_entropy(logits.masked_fill(hit, -torch.inf), row)

    def _user_vectors(self, user: torch.Tensor) -> torch.Tensor:
        return _unit_length(self.user_tower(self.user(user)))

    def _item_vectors(self, item: torch.Tensor) -> torch.Tensor:
        inputs = self.item(item)
        if self.projection is not None and self.content is not None:
            inputs = inputs + self.projection(self.content[item])
        return _unit_length(self.item_tower(inputs))

    @torch.no_grad()
    def score(self, user: torch.Tensor) -> torch.Tensor:
        """Returns scores of every item, [B, I]; in training mode with dropout."""
        every = torch.arange(self.item.num_embeddings, device=user.device)
        return self._user_vectors(user) @ self._item_vectors(every).T / TEMPERATURE

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns three groups for an optimizer: the user table, the item table, and the dense layers."""
        layers = (self.projection, self.user_tower, self.item_tower)
        dense = [parameter for layer in layers if layer is not None for parameter in layer.parameters()]
        return [
            {"params": [self.user.weight], "role": "embedding"},
            {"params": [self.item.weight], "role": "embedding"},
            {"params": dense, "role": "dense"},
        ]


def _tower(dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))


def _unit_length(vector: torch.Tensor) -> torch.Tensor:
    vector = vector.float()  # lengths of bfloat16 vectors would be off by a percent
    return vector * torch.rsqrt(vector.square().sum(-1, keepdim=True) + EPSILON)
