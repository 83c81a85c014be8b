"""What `bench_overhead.py` trains: four kinds of recommender, steps between 1.5 and some tens of milliseconds.

Shape legend: B batch, C categorical field, D embedding dimension, N dense feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from envs.domains import Domain
from envs.recommenders import MatrixFactorization, SelfAttention, TwoTower
from envs.recommenders.recommender import Recommender

DIM = 32
BATCH_SIZE = 512
SEQUENCES = 128
"""Sequences of a batch, of up to fifty items."""
ROWS, ROW_DIM, FIELDS, DENSE = 20_000_000, 8, 26, 13
"""Of the DLRM-like model: its table in float32 takes 640 MB, and the optimizer's state as much again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A model in training.

    Args:
      model: its `forward` takes a batch and returns the loss.
      optimizer: over its parameters.
      batch: draws the next one.
      batch_size: samples of one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[], tuple[torch.Tensor, ...]]
    batch_size: int


class ClickModel(nn.Module):
    """Predicts clicks from categorical and dense features, after DLRM (Naumov et al., 2019).

    One table holds the rows of all fields and gets sparse gradients; the pairwise dot products of the fields' rows and
    of what the lower layers make of the dense features go through the upper layers.
    """

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.empty(ROWS, ROW_DIM).uniform_(-0.01, 0.01)  # normal draws, its own, take four times as long
        self.table = nn.Embedding(ROWS, ROW_DIM, sparse=True, _weight=drawn)
        self.lower = nn.Sequential(nn.Linear(DENSE, 64), nn.ReLU(), nn.Linear(64, ROW_DIM))
        self.upper = nn.Sequential(nn.Linear(ROW_DIM + FIELDS * (FIELDS + 1) // 2, 64), nn.ReLU(), nn.Linear(64, 1))
        row, column = torch.tril_indices(FIELDS + 1, FIELDS + 1, -1)
        self.register_buffer("pairs", row * (FIELDS + 1) + column)

    def forward(self, rows: torch.Tensor, dense: torch.Tensor, clicked: torch.Tensor) -> torch.Tensor:
        """Returns the mean log loss; rows int64 [B, C], dense float32 [B, N], clicked float32 [B]."""
        lower = self.lower(dense)
        vectors = torch.cat([lower.unsqueeze(1), self.table(rows)], dim=1)
        products = (vectors @ vectors.transpose(1, 2)).flatten(1)[:, self.pairs]
        logit = self.upper(torch.cat([lower, products], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logit, clicked)


def _recommender(kind: type[Recommender], batch_size: int) -> Callable[[Domain], Workload]:
    def make(domain: Domain) -> Workload:
        model = kind.for_domain(domain, dim=DIM, generator=torch.Generator().manual_seed(0))
        return Workload(
            model=model,
            optimizer=torch.optim.AdamW(model.parameter_groups()),
            batch=model.sampler(domain, batch_size, seed=0).next,
            batch_size=batch_size,
        )

    return make


def _click_model(domain: Domain) -> Workload:
    model, draws = ClickModel(), torch.Generator().manual_seed(0)
    dense = [*model.lower.parameters(), *model.upper.parameters()]
    optimizer = torch.optim.Adagrad([{"params": [model.table.weight]}, {"params": dense}], lr=0.01)
    size = ROWS // FIELDS
    first = torch.arange(FIELDS) * size

    def batch() -> tuple[torch.Tensor, ...]:
        popular = torch.rand(BATCH_SIZE, FIELDS, generator=draws) ** 4
        clicked = torch.rand(BATCH_SIZE, generator=draws) < 0.2
        return (popular * size).long() + first, torch.rand(BATCH_SIZE, DENSE, generator=draws), clicked.float()

    return Workload(model=model, optimizer=optimizer, batch=batch, batch_size=BATCH_SIZE)


WORKLOADS: dict[str, Callable[[Domain], Workload]] = {
    "bpr_mf": _recommender(MatrixFactorization, BATCH_SIZE),
    "two_tower": _recommender(TwoTower, BATCH_SIZE),
    "sasrec": _recommender(SelfAttention, SEQUENCES),
    "dlrm": _click_model,
}
"""By name, what makes one; the domain is that of the first three."""
