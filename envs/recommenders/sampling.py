"""Batches of training data: rows in a new random order every epoch, and what a family draws beside them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Self

import torch

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions


class Sampler(ABC):
    """Draws batches without end; every row once an epoch.

    The last batch of an epoch is filled from the next one. The position is in `state_dict`, so that a resumed run sees
    the same batches.

    Args:
      interactions: training positives, the rows of an epoch.
      batch_size: rows per batch.
      seed: of order and draws.
      device: where batches are wanted.
    """

    def __init__(
        self, interactions: Interactions, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        if batch_size < 1 or batch_size > len(interactions):
            raise InvalidArgumentError(
                f"`batch_size` must be in [1, {len(interactions)}], the interactions, got {batch_size}"
            )
        self._batch_size, self._device = batch_size, device
        self._user, self._item = pairs(interactions, device)
        self._num_items = interactions.num_items
        self._generator = torch.Generator(device).manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64, device=device)

    def next(self) -> tuple[torch.Tensor, ...]:
        """Returns the next batch."""
        if len(self._order) < self._batch_size:
            fresh = torch.randperm(len(self._user), generator=self._generator, device=self._device)
            self._order = torch.cat([self._order, fresh])
        rows, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        return self._batch(rows)

    def over(self, interactions: Interactions, *, seed: int) -> Self | None:
        """Returns a sampler that draws the same kind of batches from other rows, in an order of its own.

        What is known of the items, their shares of the training rows for instance, stays. None if there are no rows, or
        they are not what a batch is made of.

        Args:
          interactions: positives of the same users and items.
          seed: of order and draws.
        """
        if len(interactions) == 0:
            return None
        other = copy.copy(self)
        other._user, other._item = pairs(interactions, self._device)
        other._batch_size = min(self._batch_size, len(interactions))
        other._generator = torch.Generator(self._device).manual_seed(seed)
        other._order = torch.empty(0, dtype=torch.int64, device=self._device)
        return other

    @abstractmethod
    def _batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Makes a batch of rows int64 [B]."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what is left of the epoch and the generator's state."""
        return {"order": self._order.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position."""
        self._order = state["order"].clone().to(self._device)
        self._generator.set_state(state["generator"])


def pairs(interactions: Interactions, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns users and items, two int64 [N]."""
    return (
        torch.as_tensor(interactions.user, dtype=torch.int64, device=device),
        torch.as_tensor(interactions.item, dtype=torch.int64, device=device),
    )


class TripleSampler(Sampler):
    """Draws (user, positive, negative) batches, three int64 [B]; negatives uniformly."""

    def _batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        negative = torch.randint(self._num_items, (len(rows),), generator=self._generator, device=self._device)
        return self._user[rows], self._item[rows], negative
