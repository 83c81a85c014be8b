"""Averaged weights: what replaces a decaying rate when nobody knows the horizon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

AVERAGE_EVERY = 8
"""Optimizer steps between updates of the average."""
AVERAGE_POWER = 8.0
"""Update t has weight (p + 1) / (t + p): the last 1 / (p + 1) of the run counts most, however long it is."""


class WeightAverage:
    """Keeps a polynomial average of weights (Shamir and Zhang, 2013).

    Args:
      params: what is averaged; frozen parameters are left out.
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self._params = [p for p in params if p.requires_grad]
        self._average = [p.detach().clone() for p in self._params]
        self._count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Folds in the current weights."""
        self._count += 1
        weight = (AVERAGE_POWER + 1.0) / (self._count + AVERAGE_POWER)
        current = [p.detach() for p in self._params]
        torch._foreach_lerp_(self._average, current, weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the average into the model for the time of the block, and the weights back after it."""
        with torch.no_grad():
            weights = [p.detach().clone() for p in self._params]
            torch._foreach_copy_(self._params, self._average)  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._params, weights)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """Returns copies."""
        return {"count": self._count, "average": [a.clone() for a in self._average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores, copying into the buffers held."""
        self._count = int(state["count"])
        for mine, theirs in zip(self._average, state["average"], strict=True):
            mine.copy_(theirs)
