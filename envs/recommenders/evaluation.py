"""Full-ranking evaluation of a PyTorch recommender."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from envs.domains import Domain
from envs.evaluation_sets import evaluation_set
from envs.metrics import RankingMetrics, ranking_metrics, ranking_report

_BATCH = 512
"""Users scored at a time."""


class Scorer(Protocol):
    """A model that scores every item for a batch of users."""

    training: bool

    def score(self, user: torch.Tensor) -> torch.Tensor: ...

    def train(self, mode: bool = True) -> object: ...


class Evaluator:
    """Ranks all items that a user has not met, for every user with a target in a split.

    Args:
      domain: the domain.
      split: "validation" or "test".
      k: length of the list.
      max_users: evaluates a seeded sample of at most so many users; None for all.
      device: of the model.
    """

    def __init__(
        self,
        domain: Domain,
        split: str,
        *,
        k: int = 10,
        max_users: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._domain = domain
        self._evaluation = evaluation_set(domain, split, max_users=max_users)  # type: ignore[arg-type]
        self._k = min(k, domain.num_items)
        self._device = device
        self._users = torch.as_tensor(self._evaluation.users, dtype=torch.int64, device=device)
        seen = self._evaluation.seen
        self._seen_row = torch.as_tensor(seen.rows, dtype=torch.int64, device=device)
        self._seen_item = torch.as_tensor(seen.indices, dtype=torch.int64, device=device)
        self._indptr = seen.indptr

    def __call__(self, model: Scorer) -> RankingMetrics:
        """Returns NDCG, recall, MRR and hits of each user; a user with a score that is not finite gets 0."""
        return ranking_metrics(self.lists(model), self._evaluation.targets, k=self._k)

    def report(self, model: Scorer) -> dict[str, float]:
        """Returns every metric of a model's lists, over all and by cohort; see `ranking_report`."""
        return ranking_report(self.lists(model), self._evaluation, self._domain, self._k)

    @torch.no_grad()
    def lists(self, model: Scorer) -> np.ndarray:
        """Returns the best items of each user, int32 [E, k], -1 where there are none to rank."""
        training = model.training
        model.train(False)
        lists = np.full((len(self._users), self._k), -1, np.int32)
        for first in range(0, len(self._users), _BATCH):
            last = min(first + _BATCH, len(self._users))
            scores = model.score(self._users[first:last])
            finite = torch.isfinite(scores).all(1, keepdim=True)
            entries = slice(int(self._indptr[first]), int(self._indptr[last]))
            scores[self._seen_row[entries] - first, self._seen_item[entries]] = -torch.inf
            best = scores.topk(self._k, dim=1)
            hidden = best.values == -torch.inf  # fewer candidates than k
            lists[first:last] = torch.where(finite & ~hidden, best.indices, -1).cpu().numpy()
        model.train(training)
        return lists
