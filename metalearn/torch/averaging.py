"""Averaged weights: what replaces a decaying rate, and does not need to know the horizon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from metalearn.torch.sharding import local

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
        self._average = [part.clone() for part in self._parts()]
        self._count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Folds in the current weights."""
        self._count += 1
        weight = (AVERAGE_POWER + 1.0) / (self._count + AVERAGE_POWER)
        torch._foreach_lerp_(self._average, self._parts(), weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the average into the model for the time of the block, and the weights back after it."""
        with torch.no_grad():
            weights = [part.clone() for part in self._parts()]
            torch._foreach_copy_(self._parts(), self._average)  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parts(), weights)  # pyright: ignore[reportPrivateImportUsage]

    def _parts(self) -> list[torch.Tensor]:
        """Returns this process's part of each parameter."""
        return [local(p).detach() for p in self._params]

    def state_dict(self) -> dict[str, Any]:
        """Returns copies."""
        return {"count": self._count, "average": [a.clone() for a in self._average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores, copying into the buffers held."""
        self._count = int(state["count"])
        for mine, theirs in zip(self._average, state["average"], strict=True):
            mine.copy_(theirs)
