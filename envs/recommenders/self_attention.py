"""Self-attentive sequential recommendation (SASRec; Kang and McAuley, 2018) in PyTorch.

The twin of `envs.learners.self_attention`, which gives the formula.

Shape legend: U user, I item, L history, T = L - 1 position, D embedding dimension, B batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from envs.domains import Domain
from envs.histories import histories
from envs.recommenders.recommender import Recommender
from envs.recommenders.sampling import Sampler
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

NUM_BLOCKS = 1
POSITION_STD = 0.02
"""Of the initial positions."""


class SelfAttention(Recommender):
    """Scores the next item by the state that causal self-attention reaches after a user's last items.

    Evaluate it in eval mode. The histories are a buffer that `state_dict` leaves out.

    Args:
      interactions: training positives in order, which the histories are made of.
      dim: D.
      history: L, items of a user that are kept, the last ones; at least 2.
      dropout: share of entries dropped from the embedded sequence and from what each branch adds.
      generator: of the initial weights: Xavier's normal rule, a narrow normal for positions.
    """

    roles: ClassVar[tuple[str, ...]] = ("embedding", "dense")

    history: torch.Tensor
    causal: torch.Tensor
    diagonal: torch.Tensor

    def __init__(
        self,
        interactions: Interactions,
        dim: int = 32,
        *,
        history: int = 50,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if history < 2:
            raise InvalidArgumentError(
                f"`history` must be at least 2, got {history}; an item and the one after it are needed"
            )
        self.item = nn.Embedding(interactions.num_items, dim)
        self.position = nn.Embedding(history - 1, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, dropout, generator) for _ in range(NUM_BLOCKS))
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_normal_(self.item.weight, generator=generator)
        nn.init.normal_(self.position.weight, std=POSITION_STD, generator=generator)
        table = histories(interactions.user, interactions.item, num_users=interactions.num_users, length=history)
        self.register_buffer("history", torch.from_numpy(table), persistent=False)
        self.register_buffer("causal", torch.ones(history - 1, history - 1).tril().bool(), persistent=False)
        self.register_buffer("diagonal", torch.eye(history - 1).bool(), persistent=False)

    @classmethod
    def for_domain(
        cls,
        domain: Domain,
        *,
        dim: int = 32,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        history: int = 50,
    ) -> Self:
        """Returns an untrained model for a domain."""
        return cls(domain.train, dim, history=history, dropout=dropout, generator=generator)

    def sampler(
        self, domain: Domain, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> SequenceSampler:
        """Returns a sampler of the model's histories."""
        return SequenceSampler(domain.train, self.history, batch_size, seed=seed, device=device)

    def encode(self, sequence: torch.Tensor) -> torch.Tensor:
        """Returns the state after every position, [B, T, D], of sequences int [B, T] with -1 before the first item.

        Where there is no item the state is finite and of no meaning.
        """
        valid = sequence >= 0
        x = self.item(sequence.clamp(min=0)) * self.item.embedding_dim**0.5 + self.position.weight
        x = self.dropout(x * valid.unsqueeze(-1))
        # a position without an item attends to itself: some kernels give NaN for a query without keys
        visible = (self.causal & valid.unsqueeze(1) | self.diagonal).unsqueeze(1)
        for block in self.blocks:
            x = block(x, visible)
        return self.norm(x)

    def forward(self, sequence: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss over all positions that have an item and a next one.

        Args:
          sequence: int [B, L], -1 before the first item.
          negative: int [B, T].
        """
        inputs, targets = sequence[:, :-1], sequence[:, 1:]
        state = self.encode(inputs).float()
        positive = (state * self.item(targets.clamp(min=0))).sum(-1)
        losses = F.softplus(-positive) + F.softplus((state * self.item(negative)).sum(-1))
        valid = inputs >= 0
        return (losses * valid).sum() / valid.sum().clamp(min=1)

    @torch.no_grad()
    def score(self, user: torch.Tensor) -> torch.Tensor:
        """Returns scores of every item as the next one, [B, I]."""
        return self.encode(self.history[user][:, 1:])[:, -1] @ self.item.weight.T

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns two groups for an optimizer: the item table, and everything else."""
        rest = [self.position.weight, *self.blocks.parameters(), *self.norm.parameters()]
        return [{"params": [self.item.weight], "role": "embedding"}, {"params": rest, "role": "dense"}]


class _Block(nn.Module):
    """Causal attention of one head and a feed-forward layer, each behind a norm and added to its input."""

    def __init__(self, dim: int, dropout: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.project, self.out, self.inner, self.outer):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Returns [B, T, D]; `visible` is bool [B, 1, T, T], query by key."""
        projected = self.project(self.attention_norm(x)).unsqueeze(1)  # one head
        attended = F.scaled_dot_product_attention(*projected.chunk(3, dim=-1), attn_mask=visible)
        x = x + self.dropout(self.out(attended.squeeze(1)))
        return x + self.dropout(self.outer(F.gelu(self.inner(self.feedforward_norm(x)))))


class SequenceSampler(Sampler):
    """Draws (sequence, negative) batches, int [B, L] and int64 [B, T]; negatives uniformly.

    A row stands for its user's sequence: users come in proportion to their activity, and an epoch is as many sequences
    as there are rows.

    Args:
      interactions: training positives.
      history: int [U, L], -1 before the first item.
      batch_size, seed, device: as in `Sampler`.
    """

    def __init__(
        self,
        interactions: Interactions,
        history: torch.Tensor,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(interactions, batch_size, seed=seed, device=device)
        self._history = history.to(device)

    def over(self, interactions: Interactions, *, seed: int) -> None:
        """Returns None: a batch is of whole histories, which end before validation begins."""

    def _batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = len(rows), self._history.shape[1] - 1
        negative = torch.randint(self._num_items, shape, generator=self._generator, device=self._device)
        return self._history[self._user[rows]], negative
