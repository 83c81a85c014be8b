"""A neural click model under the log loss (He et al., 2017) in PyTorch.

The twin of `envs.learners.click_model`.

Shape legend: U user, I item, D embedding dimension, H = 2 D hidden unit, B batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from envs.domains import Domain
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import Sampler, pairs
from metalearn.interactions import Interactions

_CHUNK_ENTRIES = 1 << 22
"""Hidden units held at once while scoring."""


class LabelledSampler(Sampler):
    """Draws (user, item, label) batches, two int64 [2 B] and float32 [2 B]: B rows with label 1, B pairs with label 0.

    Args:
      interactions: training positives; an epoch is once through them.
      batch_size: B.
      exposures: pairs shown and not taken, drawn at random for label 0; where there are none, the users of the rows get
        uniformly drawn items.
      seed, device: as in `Sampler`.
    """

    def __init__(
        self,
        interactions: Interactions,
        batch_size: int,
        *,
        exposures: Interactions | None = None,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(interactions, batch_size, seed=seed, device=device)
        self._exposed = pairs(exposures, device) if exposures is not None and len(exposures) else None

    def _batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def draw(high: int) -> torch.Tensor:
            return torch.randint(high, (len(rows),), generator=self._generator, device=self._device)

        if self._exposed is None:
            negative = self._user[rows], draw(self._num_items)
        else:
            shown = draw(len(self._exposed[0]))
            negative = self._exposed[0][shown], self._exposed[1][shown]
        label = torch.zeros(2 * len(rows), device=self._device)
        label[: len(rows)] = 1.0
        return torch.cat([self._user[rows], negative[0]]), torch.cat([self._item[rows], negative[1]]), label


class ClickModel(Recommender):
    """Scores logits <w, silu(W [p_u, q_i, p_u q_i] + b)> + c + b_i, with dropout on the hidden layer.

    Args:
      num_users, num_items: rows of the tables.
      dim: D.
      dropout: share of hidden units dropped in training.
      sparse: whether tables and biases get sparse gradients.
      generator: of the initial weights, Xavier's normal rule.
    """

    roles: ClassVar[tuple[str, ...]] = ("embedding", "embedding", "dense", "head")

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
        self.hidden = nn.Linear(3 * dim, 2 * dim)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * dim, 1)
        for module in (self.user, self.item, self.hidden, self.output):
            nn.init.xavier_normal_(module.weight, generator=generator)
        for parameter in (self.bias.weight, self.hidden.bias, self.output.bias):
            nn.init.zeros_(parameter)

    @classmethod
    def for_domain(
        cls, domain: Domain, *, dim: int = 32, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> Self:
        """Returns an untrained model for a domain."""
        return cls(domain.num_users, domain.num_items, dim, dropout=dropout, generator=generator)

    def sampler(
        self, domain: Domain, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> LabelledSampler:
        """Returns a sampler of labelled pairs, from the domain's exposures where it has any."""
        return LabelledSampler(domain.train, batch_size, exposures=domain.exposures, seed=seed, device=device)

    def forward(self, user: torch.Tensor, item: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Returns the mean log loss of pairs.

        Args:
          user, item: int64 [B].
          label: float32 [B], 1 if the item was taken, 0 if not.
        """
        return F.binary_cross_entropy_with_logits(self.logits(user, item), label)

    def logits(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Returns the logits of pairs, float32 [B]."""
        user_vector, item_vector = self.user(user), self.item(item)
        inputs = torch.cat([user_vector, item_vector, user_vector * item_vector], dim=-1)
        hidden = self.dropout(F.silu(self.hidden(inputs)))
        return (self.output(hidden) + self.bias(item)).squeeze(-1).float()

    @torch.no_grad()
    def score(self, user: torch.Tensor) -> torch.Tensor:
        """Returns the logits of every item without dropout, [B, I].

        The hidden layer is split into its parts of user, item and product, so that only the last is computed per pair.
        """
        of_user, of_item, of_product = self.hidden.weight.chunk(3, dim=1)
        items = self.item.weight
        from_items = items @ of_item.T + self.hidden.bias
        chunk = max(_CHUNK_ENTRIES // from_items.numel(), 1)

        def score(vectors: torch.Tensor) -> torch.Tensor:
            from_products = items @ (vectors[:, None] * of_product).mT
            hidden = F.silu((vectors @ of_user.T)[:, None] + from_items + from_products)
            return (self.output(hidden) + self.bias.weight).squeeze(-1).float()

        return torch.cat([score(vectors) for vectors in self.user(user).split(chunk)])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns four groups for an optimizer: user table, item table with biases, hidden layer, output layer."""
        return [
            {"params": [self.user.weight], "role": "embedding"},
            {"params": [self.item.weight, self.bias.weight], "role": "embedding"},
            {"params": list(self.hidden.parameters()), "role": "dense"},
            {"params": list(self.output.parameters()), "role": "head"},
        ]
