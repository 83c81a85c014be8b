"""Measures a training run on its own device: no host sync per step, one transfer an interval.

Shape legend: G parameter group, n sampled element.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metalearn.errors import InvalidArgumentError
from metalearn.signals import IntervalStatistics, ProbeSums, interval_statistics

MAX_PROBED = 2**16
"""Elements of a group that a probe looks at; of larger groups evenly strided rows. Every feature is a ratio, so it does
not matter that norms are of a sample."""
HOST_DEVICES = ("cpu",)
"""Where a tensor's memory is the host's, so that reading it waits for nothing."""
RING = 64
"""Losses that are kept one by one before they are moved on together."""


class _GroupSample:
    """Measures the same sample of a group's weights and gradients every time, in buffers made once, float32 [n]."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.params = [p for p in params if p.requires_grad]
        self._stride = max(1, -(-sum(p.numel() for p in self.params) // MAX_PROBED))
        self.device = self.params[0].device if self.params else torch.device("cpu")
        sizes = [self._rows(p).numel() for p in self.params]
        self._buffers = {
            name: torch.zeros(sum(sizes), device=self.device)
            for name in ("weights", "gradient", "next_weights", "next_gradient", "anchor")
        }
        self._views = {name: buffer.split(sizes) for name, buffer in self._buffers.items()}
        self.has_gradient = self.has_anchor = False

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:: self._stride] if tensor.ndim else tensor[None]

    def _copy(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        rows = [self._rows(tensor).reshape(-1) for tensor in tensors]
        torch._foreach_copy_(self._views[name], rows)  # pyright: ignore[reportPrivateImportUsage]

    def _copy_gradients(self, name: str) -> bool:
        """Copies the sampled gradients, if there are any; sparse ones count as none, and stay sparse."""
        gradients = [p.grad for p in self.params]
        if all(g is None for g in gradients) or any(g is not None and g.layout != torch.strided for g in gradients):
            return False
        pairs = zip(gradients, self.params, strict=True)
        self._copy(name, [torch.zeros_like(p) if g is None else g for g, p in pairs])
        return True

    def first(self) -> None:
        """Copies weights and gradients before the first step of a probe."""
        if self.params:
            self._copy("weights", self.params)
            self.has_gradient = self._copy_gradients("gradient")

    def second(self) -> torch.Tensor:
        """Returns the `ProbeSums` before the second step of a probe, [9]; NaN where there is nothing to measure."""
        missing = torch.full((), torch.nan, device=self.device)
        sums = ProbeSums(*[missing] * len(ProbeSums._fields))
        if self.params:
            self._copy("next_weights", self.params)
            sums = self._sums_of_weights(sums)
            if self._copy_gradients("next_gradient") and self.has_gradient:
                sums = self._sums_of_gradients(sums)
            buffers, views = self._buffers, self._views
            buffers["anchor"], buffers["next_weights"] = buffers["next_weights"], buffers["anchor"]
            views["anchor"], views["next_weights"] = views["next_weights"], views["anchor"]
            self.has_anchor = True
        return torch.stack([value.float() for value in sums])

    def _sums_of_weights(self, sums: ProbeSums) -> ProbeSums:
        before, after, anchor = (self._buffers[name] for name in ("weights", "next_weights", "anchor"))
        update = torch.sub(after, before, out=before)
        touched, rows = self._touched(sums.rows_touched)
        sums = sums._replace(
            update_square=torch.dot(update, update),
            weight_square=torch.dot(after, after),
            rows_touched=touched,
            rows=torch.full((), float(max(rows, 1)), device=self.device),
        )
        if not self.has_anchor:
            return sums
        moved = torch.sub(after, anchor, out=anchor)
        return sums._replace(displacement_square=torch.dot(moved, moved))

    def _sums_of_gradients(self, sums: ProbeSums) -> ProbeSums:
        gradient, after, update = (self._buffers[name] for name in ("gradient", "next_gradient", "weights"))
        return sums._replace(
            gradient_square=torch.dot(gradient, gradient),
            next_gradient_square=torch.dot(after, after),
            gradient_dot=torch.dot(gradient, after),
            curvature_dot=torch.dot(torch.sub(after, gradient, out=gradient), update),
        )

    def _touched(self, missing: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Returns how many sampled rows of matrices have a gradient, and how many there are.

        A matrix of one column holds biases and does not count.
        """
        count, rows = missing, 0
        for p in self.params:
            if p.ndim > 1 and p.numel() > len(p) and p.grad is not None and p.grad.layout == torch.strided:
                sample = self._rows(p.grad).flatten(1)
                nonzero = (sample.abs().amax(1) != 0).sum()  # several times faster than any(1) of booleans
                count, rows = count + nonzero if rows else nonzero, rows + len(sample)
        return count, rows

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of what is in use: the anchor, and during a probe its first copies."""
        return {
            "anchor": self._buffers["anchor"].clone() if self.has_anchor else None,
            "weights": self._buffers["weights"].clone(),
            "gradient": self._buffers["gradient"].clone() if self.has_gradient else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores buffers, by copying."""
        self.has_anchor, self.has_gradient = state["anchor"] is not None, state["gradient"] is not None
        for name, tensor in state.items():
            if tensor is not None:
                self._buffers[name].copy_(tensor)


class Monitor:
    """Accumulates the statistics of one interval.

    Per step it keeps one scalar, the loss; an accelerator's is copied within its memory. The last two optimizer steps
    of an interval are a probe: sums over a sample of each group's weights and gradients. Everything that lies on an
    accelerator is read back at once by `statistics`.

    Args:
      optimizer: whose parameter groups are measured.
      interval: optimizer steps of an interval.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, interval: int) -> None:
        self._groups = [_GroupSample(group["params"]) for group in optimizer.param_groups]
        self._device = next((g.device for g in self._groups if g.params), torch.device("cpu"))
        self._read: list[float] | None = [] if self._device.type in HOST_DEVICES else None
        """losses of the interval so far, where reading them is no transfer"""
        self._losses = torch.zeros(interval, device=self._device)
        self._ring = torch.zeros(RING, device=self._device)
        self._slots = self._ring.unbind()  # writing to a view made once takes half the time of indexing
        self._probing = False
        self._sums: torch.Tensor | None = None
        self.steps = 0
        self._began = time.monotonic()

    @torch.no_grad()
    def before_step(self, remaining: int) -> None:
        """Takes the probe; call it in the optimizer's pre-step hook.

        Args:
          remaining: optimizer steps left in the interval, this one included. Above 2 nothing is done.
        """
        if remaining == 2:
            for group in self._groups:
                group.first()
            self._probing = True
        elif remaining == 1 and self._probing:
            self._sums = torch.stack([group.second().to(self._device) for group in self._groups], dim=1)
            self._probing = False

    def record(self, loss: torch.Tensor | float) -> None:
        """Stores one step's loss, without a host sync.

        Raises:
          InvalidArgumentError: the loss is not a scalar.
        """
        if self._read is not None:
            if isinstance(loss, torch.Tensor):
                loss = loss.item() if loss.numel() == 1 else _scalar(loss).item()
            self._read.append(loss)
            self.steps += 1
            return
        index = self.steps % RING
        if not isinstance(loss, torch.Tensor):
            self._slots[index].fill_(loss)
        elif loss.ndim:
            self._slots[index].copy_(_scalar(loss).detach())
        else:
            self._slots[index].copy_(loss.data)  # for a read as good as `detach`, at half its price
        self.steps += 1
        if index == RING - 1:
            self._losses[self.steps - RING : self.steps] = self._ring

    def _measured(self) -> torch.Tensor:
        """Returns the losses of the interval so far."""
        if self._read is not None:
            return torch.tensor(self._read, dtype=torch.float32)
        rest = self.steps % RING
        if rest:
            self._losses[self.steps - rest : self.steps] = self._ring[:rest]
        return self._losses[: self.steps]

    def statistics(self, *, validation: float, batch_size: int | None) -> IntervalStatistics:
        """Reads everything back, in one transfer, and starts the next interval.

        Args:
          validation: the metric, higher is better; NaN if there is none.
          batch_size: samples per step, None if unknown.
        """
        shape = len(ProbeSums._fields), len(self._groups)
        sums = torch.full(shape, torch.nan, device=self._device) if self._sums is None else self._sums
        host = torch.cat([sums.reshape(-1), self._measured()]).cpu().numpy().astype(np.float64)
        losses = host[sums.numel() :]
        now = time.monotonic()
        with np.errstate(all="ignore"):
            result = interval_statistics(
                ProbeSums(*host[: sums.numel()].reshape(shape)),
                steps=float(self.steps),
                loss_sum=losses.sum(),
                loss_square_sum=np.square(losses).sum(),
                nonfinite=float((~np.isfinite(losses)).sum()),
                validation=validation,
                samples=float("nan") if batch_size is None else float(self.steps * batch_size),
                seconds=now - self._began,
                xp=np,
            )
        self.steps, self._sums, self._began = 0, None, now
        if self._read is not None:
            self._read = []
        return result

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of all buffers, mid-interval or mid-probe as they may be."""
        return {
            "steps": self.steps,
            "losses": self._measured().clone(),
            "probing": self._probing,
            "groups": [group.state_dict() for group in self._groups],
            "sums": None if self._sums is None else self._sums.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores buffers; nothing of `state` is kept by reference."""
        self.steps, self._probing = int(state["steps"]), bool(state["probing"])
        losses, rest = state["losses"].to(self._device), self.steps % RING
        if self._read is not None:
            self._read = losses.tolist()
        self._losses[: self.steps] = losses
        self._ring[:rest] = losses[self.steps - rest :]
        for group, stored in zip(self._groups, state["groups"], strict=True):
            group.load_state_dict(stored)
        self._sums = None if state["sums"] is None else state["sums"].clone().to(self._device)
        self._began = time.monotonic()


def _scalar(loss: torch.Tensor) -> torch.Tensor:
    if loss.numel() != 1:
        raise InvalidArgumentError(f"`loss` must be a scalar, got shape {tuple(loss.shape)}; pass the batch's mean")
    return loss.reshape(())
