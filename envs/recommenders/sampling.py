"""Batches of training triples: positives in a new random order every epoch, negatives drawn uniformly."""

from __future__ import annotations

from typing import Any

import torch

from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions


class TripleSampler:
    """Draws (user, positive, negative) batches without end; every positive once an epoch.

    The last batch of an epoch is filled from the next one. Its position is in `state_dict`, so that a resumed run sees
    the same batches.

    Args:
      interactions: training positives.
      batch_size: triples per batch.
      seed: of order and negatives.
      device: where batches are wanted.
    """

    def __init__(
        self, interactions: Interactions, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        if batch_size < 1 or batch_size > len(interactions):
            raise InvalidArgumentError(
                f"`batch_size` must be in [1, {len(interactions)}], the interactions, got {batch_size}"
            )
        self._user = torch.as_tensor(interactions.user, dtype=torch.int64, device=device)
        self._item = torch.as_tensor(interactions.item, dtype=torch.int64, device=device)
        self._num_items = interactions.num_items
        self._batch_size, self._device = batch_size, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64, device=device)

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the next batch, three int64 [B]."""
        if len(self._order) < self._batch_size:
            fresh = torch.randperm(len(self._user), generator=self._generator, device=self._device)
            self._order = torch.cat([self._order, fresh])
        rows, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        negative = torch.randint(self._num_items, (self._batch_size,), generator=self._generator, device=self._device)
        return self._user[rows], self._item[rows], negative

    def state_dict(self) -> dict[str, Any]:
        """Returns what is left of the epoch and the generator's state."""
        return {"order": self._order.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position."""
        self._order = state["order"].clone().to(self._device)
        self._generator.set_state(state["generator"])
