"""How a training loop calls: steps that are none, and steps that run out of memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from metalearn.errors import SessionError

MAX_IDLE_CALLS = 1000
"""Calls without an optimizer step that are put down to gradient accumulation or a GradScaler finding its scale."""


class IdleCalls:
    """Counts calls without an optimizer step in between."""

    def __init__(self) -> None:
        self._count, self._since = 0, -1

    def count(self, steps: int) -> None:
        """Takes note of one.

        Args:
          steps: optimizer steps done.

        Raises:
          SessionError: there are so many that the loop cannot be meant so.
        """
        self._count = self._count + 1 if self._since == steps else 1
        self._since = steps
        if self._count >= MAX_IDLE_CALLS:
            raise SessionError(
                f"scheduler.step() was called {MAX_IDLE_CALLS} times without an optimizer.step() in between; call it "
                "once after each step of the optimizer that this MetaScheduler was made for"
            )


@contextmanager
def out_of_memory(
    optimizer: torch.optim.Optimizer, *, can_roll_back: Callable[[], bool], roll_back: Callable[[str], None]
) -> Iterator[None]:
    """Frees the memory and rolls back when the block runs out of it.

    Args:
      optimizer: whose gradients are dropped.
      can_roll_back: asked then; if not, the error is raised.
      roll_back: takes the reason.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not can_roll_back():
            raise
        reason = f"out of memory: {error}"
        traceback.clear_frames(error.__traceback__)  # they hold the batch's activations
    else:
        return
    optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    roll_back(reason)
