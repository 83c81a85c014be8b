"""Samples per optimizer step: accumulation of micro-batches, and how learning rates follow when the number changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from metalearn.errors import InvalidArgumentError
from metalearn.spaces import CANONICAL_SPACE
from metalearn.torch.handles import Handle, checked

RateRule = Literal["adaptive", "linear", "none"]

_ADAPTIVE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SparseAdam,
)


def rate_rule(optimizer: torch.optim.Optimizer) -> RateRule:
    """Returns how an optimizer's learning rates follow the batch: see `rate_factor`."""
    if isinstance(optimizer, (*_ADAPTIVE, torch.optim.AdamW)):
        return "adaptive"
    return "linear" if isinstance(optimizer, torch.optim.SGD) else "none"


def rate_factor(growth: float, *, role: str, rule: RateRule) -> float:
    """Returns what a learning rate is multiplied by when an optimizer step takes `growth` times as many samples.

    With k the growth:

    - `linear`, SGD on the batch's mean loss: k for every role. The mean gives each sample a k-th of its weight, and k
      times the rate gives it back (Goyal et al. 2017, arXiv 1706.02677); a row of an embedding is no exception.
    - `adaptive`, optimizers that divide by the gradient's size: sqrt(k), which keeps the noise of the limiting
      stochastic differential equation (Malladi et al. 2022, arXiv 2205.10287; they move betas and epsilon too, which is
      not done here). For the role `embedding` 1: of k times the samples a rare row is in k times as large a share of
      the batches, so that it takes as many steps an epoch as before, of the same length (CowClip: Zheng et al. 2022,
      arXiv 2204.06240; their column-wise clipping is not done here).
    - `none`: 1, for optimizers that neither speaks of.

    Args:
      growth: k, above 0.
      role: of the parameter group.
      rule: from `rate_rule`.

    Raises:
      InvalidArgumentError: the growth is not a positive number.

    >>> rate_factor(4.0, role="dense", rule="adaptive"), rate_factor(4.0, role="embedding", rule="adaptive")
    (2.0, 1.0)
    >>> rate_factor(0.25, role="embedding", rule="linear")
    0.25
    """
    if not (math.isfinite(growth) and growth > 0):
        raise InvalidArgumentError(f"`growth` must be positive, got {growth!r}; pass new samples per step over old")
    if rule == "linear":
        return growth
    return math.sqrt(growth) if rule == "adaptive" and role != "embedding" else 1.0


class Accumulation(Handle):
    """Micro-batches whose gradients add up to one optimizer step.

    A new number counts from the next optimizer step on, never within one. Gradients are in no checkpoint: micro-batches
    that a step was still to come of are lost from training when a run resumes or goes back, so save after a step.

    Args:
      count: micro-batches per step, one of 1, 2, 4, 8, 16, 32.

    Example:
      >>> accumulation = Accumulation(2)
      >>> def train(loader, loss_of, optimizer, scheduler):
      ...     for batch in loader:
      ...         loss = loss_of(batch)
      ...         (loss / accumulation.count).backward()
      ...         if accumulation.completes_step():
      ...             optimizer.step()
      ...             optimizer.zero_grad()
      ...         scheduler.step(loss)
      >>> [accumulation.completes_step() for _ in range(4)]
      [False, True, False, True]
    """

    hyperparameter = CANONICAL_SPACE["accumulation"]

    def __init__(self, count: int = 1) -> None:
        self._next = self._count = checked(self.hyperparameter, count, whole=True)
        self._done = 0

    @property
    def count(self) -> int:
        """Micro-batches of the step that is being made; divide each one's mean loss by it."""
        return self._count

    def completes_step(self) -> bool:
        """Counts a micro-batch whose gradient was added; returns whether the optimizer is to step now."""
        self._done += 1
        if self._done < self._count:
            return False
        self._done, self._count = 0, self._next
        return True

    def read(self) -> int:
        """Returns micro-batches per step, from the next step on."""
        return self._next

    def write(self, value: int) -> None:
        """Sets micro-batches per step."""
        self._next = value
        if not self._done:
            self._count = value

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begins a step anew: its gradients are not there."""
        self._done, self._count = 0, self._next
