"""How a training loop calls: in the wrong order, for steps that are none, and in steps that run out of memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from metalearn.errors import SessionError

MAX_IDLE_CALLS = 1000
"""Calls without an optimizer step that are put down to gradient accumulation or a GradScaler finding its scale."""
MAX_CHANGES = 20
"""Those of them between which the weights have changed, that are put down to weights being loaded or swapped."""


class IdleCalls:
    """Counts calls without an optimizer step in between.

    Args:
      optimizer: of whose parameters one a group is looked at, at such calls: whether something else changes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._watched = [group["params"][0] for group in optimizer.param_groups if group["params"]]
        self._count, self._since = 0, -1
        self._changes, self._version = 0, 0

    def count(self, steps: int) -> None:
        """Takes note of one.

        Args:
          steps: optimizer steps done.

        Raises:
          SessionError: there are so many that the loop cannot be meant so.
        """
        version = sum(p._version for p in self._watched)
        if self._since != steps:
            self._count, self._changes, self._since = 0, 0, steps
        elif version != self._version:
            self._changes += 1
        self._version = version
        self._count += 1
        if self._changes >= MAX_CHANGES:
            raise SessionError(
                "the weights change, but the optimizer that this MetaScheduler was made for does not step: another one "
                "does; call detach() and make a MetaScheduler for that, or step this one's"
            )
        if self._count >= MAX_IDLE_CALLS:
            raise SessionError(
                f"scheduler.step() was called {MAX_IDLE_CALLS} times without an optimizer.step() in between; call it "
                "once after each step of the optimizer that this MetaScheduler was made for"
            )


class CallOrder:
    """Watches a loop until its first optimizer step: whether it calls the scheduler when that has happened.

    Hooks on the parameters say when gradients are computed; they are gone after that step.

    Args:
      optimizer: whose parameters they are. Those that are sharded get gradients in other ways, and are left alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._params = params if all(type(p) in (torch.Tensor, torch.nn.Parameter) for p in params) else []
        self._backwards = 0
        self._called_after: int | None = None
        """gradients there were at the last call"""
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in self._params if p.requires_grad]

    def _note(self, _: torch.Tensor) -> None:
        self._backwards += 1

    def call(self, loss: Any) -> None:
        """Takes note of a call of the scheduler without an optimizer step.

        Raises:
          SessionError: no gradient has been computed yet.
        """
        if not self._hooks:
            return
        self._called_after = self._backwards
        waits = isinstance(loss, torch.Tensor) and loss.requires_grad
        if waits and not self._backwards and all(p.grad is None for p in self._params):
            raise SessionError(
                "scheduler.step(loss) was called before any gradient was computed; call it last, after loss.backward() "
                "and optimizer.step()"
            )

    def first_step(self) -> None:
        """Takes note of an optimizer step, before it.

        Raises:
          SessionError: the scheduler was called after its gradients had been computed.
        """
        if not self._hooks:
            return
        early = self._backwards and self._called_after == self._backwards
        self.release()
        if early:
            raise SessionError(
                "scheduler.step(loss) was called between loss.backward() and optimizer.step(); call it after "
                "optimizer.step()"
            )

    def release(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def refuse_capture(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    """Is a step pre-hook: refuses steps that are captured in a CUDA graph.

    Raises:
      SessionError: this one is.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise SessionError(
            "the optimizer's step is being captured in a CUDA graph, which replays it without its hooks: the values of "
            "this step would stay in force forever; capture forward and backward only and step outside of the graph, "
            'or compile the step with torch.compile(mode="reduce-overhead")'
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
