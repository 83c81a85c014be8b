"""Hyperparameters that act on gradients just before a step: clipping, and which parameter groups train."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metalearn.spaces import CANONICAL_SPACE
from metalearn.torch.handles import Handle, checked


class Trainable(Handle):
    """Which parameter groups train; the others neither step nor decay, and their optimizer state waits for them.

    A frozen group's gradients are dropped just before each step, which every optimizer takes for a parameter that had
    none. They are computed all the same: the model's graph stays as it is, so that nothing is compiled again and DDP
    finds every gradient it waits for. Where that computation is to be saved, set `requires_grad` by hand, at the price
    of one compilation. A compiled step of the optimizer is compiled once for each set of groups that trains.
    """

    hyperparameter = CANONICAL_SPACE["trainable"]
    acts_on_gradients = True

    def __init__(self) -> None:
        self._trainable: list[bool] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets every group train."""
        self._trainable = [True] * len(optimizer.param_groups)

    def read(self) -> list[bool]:
        """Returns whether each group trains."""
        return list(self._trainable)

    def write(self, value: Sequence[bool]) -> None:
        """Freezes and unfreezes groups."""
        self._trainable = list(value)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops gradients of frozen groups."""
        if all(self._trainable):
            return
        for group, trains in zip(optimizer.param_groups, self._trainable):  # noqa: B905 (a group may be new)
            if not trains:
                for parameter in group["params"]:
                    parameter.grad = None


class GradientClip(Handle):
    """The largest norm of all gradients together; larger ones are scaled down to it, as `clip_grad_norm_` does.

    Norm and scaling are fused over all gradients of a device, and nothing is read back to the host. Sparse gradients
    are coalesced, as their optimizers would, and clipped by their values. Gradients that a GradScaler has not unscaled
    yet, as with fused optimizers, are clipped as if it had.

    Args:
      limit: at 100, the upper bound, nothing is clipped.
    """

    hyperparameter = CANONICAL_SPACE["grad_clip"]
    acts_on_gradients = True

    def __init__(self, limit: float = 100.0) -> None:
        self._limit: float = checked(self.hyperparameter, limit)
        self._tensor: torch.Tensor | None = None
        """the limit where the gradients are: a captured or compiled step does not have its value built in"""

    def read(self) -> float:
        """Returns the limit."""
        return self._limit

    def write(self, value: float) -> None:
        """Sets the limit."""
        self._limit = value
        if self._tensor is not None:
            self._tensor.fill_(value)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips."""
        if self._limit >= self.hyperparameter.high:
            return
        dense: list[torch.Tensor] = []
        sparse: list[torch.Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout is torch.sparse_coo:
                    parameter.grad = parameter.grad.coalesce()
                    sparse.append(parameter.grad._values())
                else:
                    dense.append(parameter)
        if not dense and not sparse:
            return
        norm = torch.nn.utils.get_total_norm([*(p.grad for p in dense if p.grad is not None), *sparse])
        if self._tensor is None or self._tensor.device != norm.device:
            self._tensor = torch.full((), self._limit, device=norm.device)
        excess = norm / self._tensor
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            excess = excess / scale
        torch.nn.utils.clip_grads_with_norm_(dense, 1.0, excess)
        if sparse:
            factor = torch.clamp(1.0 / (excess + 1e-6), max=1.0)
            for values in sparse:
                values.mul_(factor.to(values.device))
