"""Measures a training run on its own device: no host sync per step, one transfer an interval.

Shape legend: G parameter group, n sampled element.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from metalearn.errors import InvalidArgumentError
from metalearn.signals import IntervalStatistics, ProbeSums, interval_statistics
from metalearn.torch.metric import Losses
from metalearn.torch.sharding import first_row, local, measured_here

MAX_PROBED = 2**14
"""Elements of a group that a probe looks at; of larger groups evenly strided rows. Every feature is a ratio, so it does
not matter that norms are of a sample."""
MAX_SAMPLED = 2**20
"""Elements of all groups together that a probe looks at, so that a thousand groups cost no more than sixty-four."""
HOST_DEVICES = ("cpu",)
"""Where a tensor's memory is the host's, so that reading it waits for nothing."""
NUM_SUMS = 10
"""Sums of a probe."""
_NO_LOSSES = Losses()
RING = 64
"""Losses that are kept one by one before they are moved on together."""


class Measured(NamedTuple):
    """What one process has measured in an interval, on the host."""

    losses: np.ndarray
    """float64 [steps]"""
    sums: np.ndarray
    """of the probe, float64 [10, G], which add up over processes: squares of `_Sample.ROWS`, two dot products, rows
    touched, rows; NaN is not measured"""
    seconds: float
    validation: float
    """higher is better; NaN if there is none"""
    losses_reported: Losses


class _Sample:
    """Measures the same sample of every group's weights and gradients, in buffers made once, float32 [G, n].

    A probe is a handful of operations on one tensor for all groups: on a small model calls cost more than numbers.

    Args:
      groups: the parameters of each. Of sharded ones this process's part is measured, of those that all processes hold
        the first measures.
      device: where the buffers are.
      rank: of this process.
    """

    ROWS: ClassVar[tuple[str, ...]] = (
        "update",
        "displacement",
        "difference",
        "next_weights",
        "next_gradient",
        "gradient",
    )
    """First axis of the buffer; `update` holds the weights before the first step until the second."""

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]], device: torch.device, *, rank: int) -> None:
        trained = [[p for p in params if p.requires_grad] for params in groups]
        self._empty = [not params for params in trained]
        self._groups = [[p for p in params if measured_here(p, rank)] for params in trained]
        most = max(1, min(MAX_PROBED, MAX_SAMPLED // len(groups)))
        strides = [max(1, -(-sum(p.numel() for p in params) // most)) for params in trained]
        self._slices = [
            [slice(-first_row(p) % stride, None, stride) for p in params]
            for params, stride in zip(self._groups, strides, strict=True)
        ]
        sizes = [[rows.numel() for rows in self._rows(params, g)] for g, params in enumerate(self._groups)]
        longest = max(sum(row) for row in sizes)
        self._all = torch.zeros(len(self.ROWS), len(self._groups), longest, device=device)
        self._at = dict(zip(self.ROWS, self._all.unbind(), strict=True))
        self._parts = {
            name: [list(row[: sum(size)].split(size)) for row, size in zip(buffer, sizes, strict=True)]
            for name, buffer in self._at.items()
        }
        self._anchor = torch.zeros_like(self._at["update"])
        self._has_anchor = False
        self._num_rows = [0] * len(self._groups)
        """sampled rows of matrices with a gradient, at the last probe"""

    def _rows(self, tensors: Sequence[torch.Tensor], group: int) -> list[torch.Tensor]:
        return [_picked(tensor, rows) for tensor, rows in zip(tensors, self._slices[group], strict=True)]

    def _copy(self, name: str, groups: Sequence[Sequence[torch.Tensor] | None]) -> None:
        """Copies the sample of each group's tensors; a group without any becomes NaN."""
        into, values = [], []
        for index, tensors in enumerate(groups):
            if tensors is None:
                self._at[name][index].fill_(torch.nan)
            else:
                into += self._parts[name][index]
                values += [rows.reshape(-1) for rows in self._rows(tensors, index)]
        if into:
            torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateImportUsage]

    @staticmethod
    def _gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Returns a group's gradients, None if it has none of which rows can be picked."""
        gradients = [p.grad for p in params]
        missing = params and all(g is None for g in gradients)
        if missing or any(g is not None and not _has_rows(g) for g in gradients):
            return None
        return [torch.zeros_like(local(p)) if g is None else g for g, p in zip(gradients, params, strict=True)]

    def first(self) -> None:
        """Copies weights and gradients before the first step of a probe."""
        self._copy("update", self._groups)
        self._copy("gradient", [self._gradients(params) for params in self._groups])

    def second(self) -> torch.Tensor:
        """Returns, before the second step of a probe, what `probe_sums` makes sums of: [9, G], NaN if not measured."""
        at = self._at
        self._copy("next_weights", self._groups)
        self._copy("next_gradient", [self._gradients(params) for params in self._groups])
        torch.sub(at["next_weights"], at["update"], out=at["update"])
        torch.sub(at["next_gradient"], at["gradient"], out=at["difference"])
        if self._has_anchor:
            torch.sub(at["next_weights"], self._anchor, out=at["displacement"])
        else:
            at["displacement"].fill_(torch.nan)
        self._anchor.copy_(at["next_weights"])
        self._has_anchor = True
        dots = (
            torch.linalg.vecdot(at["gradient"], at["next_gradient"]),
            torch.linalg.vecdot(at["difference"], at["update"]),
            torch.stack([self._count_touched(index) for index in range(len(self._groups))]),
        )
        return torch.cat([torch.linalg.vector_norm(self._all, dim=2), torch.stack(dots)])

    def _count_touched(self, group: int) -> torch.Tensor:
        """Counts sampled rows of matrices whose gradient is not zero; a matrix of one column holds biases."""
        counts, self._num_rows[group] = [], 0
        for p, rows in zip(self._groups[group], self._slices[group], strict=True):
            if p.ndim > 1 and p.numel() > len(p) and p.grad is not None and _has_rows(p.grad):
                largest = _picked(p.grad, rows).flatten(1).abs().amax(1)  # ten times faster than the maximum norm
                counts.append(torch.count_nonzero(largest).to(self._anchor))
                self._num_rows[group] += len(largest)
        return sum(counts[1:], counts[0]) if counts else self._anchor.new_zeros(())

    def additive(self, measured: np.ndarray | None) -> np.ndarray:
        """Turns what `second` returned, once it is on the host, into sums that add up over processes."""
        rows = np.array(self._num_rows, np.float64)
        if measured is None:
            missing = np.where([bool(params) for params in self._groups], np.nan, 0.0)
            return np.tile(missing, (NUM_SUMS, 1))
        squares = len(self.ROWS)
        return np.vstack([np.square(measured[:squares]), measured[squares:], rows])

    def probe_sums(self, sums: np.ndarray) -> ProbeSums:
        """Names the sums of all processes."""
        update, displacement, _, weights, next_gradient, gradient, gradient_dot, curvature_dot, touched, rows = (
            np.where(self._empty, np.nan, sums) if any(self._empty) else sums
        )
        return ProbeSums(
            gradient_square=gradient,
            next_gradient_square=next_gradient,
            gradient_dot=gradient_dot,
            update_square=update,
            weight_square=weights,
            curvature_dot=curvature_dot,
            displacement_square=displacement,
            rows_touched=np.where(rows > 0, touched, np.nan),
            rows=np.maximum(rows, 1.0),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of what is in use: the anchor, and during a probe its first copies."""
        return {
            "anchor": self._anchor.clone() if self._has_anchor else None,
            "update": self._at["update"].clone(),
            "gradient": self._at["gradient"].clone(),
            "num_rows": list(self._num_rows),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores buffers, by copying; None forgets what was measured before."""
        if state is None:
            self._has_anchor, self._num_rows = False, [0] * len(self._groups)
            return
        self._has_anchor, self._num_rows = state["anchor"] is not None, list(state["num_rows"])
        if self._has_anchor:
            self._anchor.copy_(state["anchor"])
        for name in ("update", "gradient"):
            self._at[name].copy_(state[name])


class Monitor:
    """Accumulates the statistics of one interval.

    Per step it keeps one scalar, the loss; an accelerator's is copied within its memory. The last two optimizer steps
    of an interval are a probe: sums over a sample of each group's weights and gradients. Everything that lies on an
    accelerator is read back at once by `statistics`.

    Args:
      optimizer: whose parameter groups are measured.
      interval: optimizer steps of an interval.
      rank: of this process, where several measure together.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, interval: int, *, rank: int = 0) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        self._device = next((p.device for params in groups for p in params), torch.device("cpu"))
        self._num_groups = len(groups)
        self._sample = _Sample(groups, self._device, rank=rank)
        self._read: list[float] | None = [] if self._device.type in HOST_DEVICES else None
        """losses of the interval so far, where reading them is no transfer"""
        self._losses = torch.zeros(interval, device=self._device)
        self._ring = torch.zeros(RING, device=self._device)
        self._slots = self._ring.unbind()  # writing to a view made once takes half the time of indexing
        self._probing = False
        self._sums: torch.Tensor | None = None
        self.steps = 0
        self._began = time.monotonic()

    def resize(self, interval: int) -> None:
        """Makes room for the losses of intervals of another length; call it between intervals."""
        self._losses = torch.zeros(interval, device=self._device)

    @torch.no_grad()
    def before_step(self, remaining: int) -> None:
        """Takes the probe; call it in the optimizer's pre-step hook.

        Args:
          remaining: optimizer steps left in the interval, this one included. Above 2 nothing is done.
        """
        if remaining == 2:
            self._sample.first()
            self._probing = True
        elif remaining == 1 and self._probing:
            self._sums = self._sample.second()
            self._probing = False

    def record(self, loss: torch.Tensor | float) -> None:
        """Stores one step's loss, without a host sync.

        Raises:
          InvalidArgumentError: the loss is not a scalar.
        """
        if self._read is not None:
            try:
                self._read.append(loss.item())  # type: ignore[union-attr]
            except AttributeError:
                self._read.append(float(loss))
            except RuntimeError:
                _scalar(loss)
                raise
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

    def _to_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads losses, float64 [steps], and the probe's sums, float64 [10, G]; of an accelerator in one transfer."""
        if self._sums is None:
            return self._losses_on_host(), self._sample.additive(None)
        if self._read is not None:
            losses, rows = self._losses_on_host(), self._sums.numpy().astype(np.float64)
        else:
            host = torch.cat([self._sums.reshape(-1), self._measured()]).cpu().numpy().astype(np.float64)
            rows, losses = np.split(host, [self._sums.numel()])
            rows = rows.reshape(-1, self._num_groups)
        return losses, self._sample.additive(rows)

    def _losses_on_host(self) -> np.ndarray:
        losses = np.array(self._read, np.float32) if self._read is not None else self._measured().cpu().numpy()
        return losses.astype(np.float64)

    def statistics(
        self,
        *,
        validation: float,
        losses: Losses = _NO_LOSSES,
        batch_size: int | None,
        merge: Callable[[Measured], Measured] | None = None,
    ) -> IntervalStatistics:
        """Reads everything back, in one transfer, and starts the next interval.

        Args:
          validation: the metric, higher is better; NaN if there is none.
          losses: that were reported beside it.
          batch_size: samples per step, of all processes; None if unknown.
          merge: makes of what this process has measured what all have; None if there are no others.
        """
        now = time.monotonic()
        measured = Measured(*self._to_host(), now - self._began, validation, losses)
        if merge is not None:
            measured = merge(measured)
        of_steps = measured.losses
        with np.errstate(all="ignore"):
            result = interval_statistics(
                self._sample.probe_sums(measured.sums),
                steps=float(self.steps),
                loss_sum=of_steps.sum(),
                loss_square_sum=np.square(of_steps).sum(),
                nonfinite=float((~np.isfinite(of_steps)).sum()),
                validation=measured.validation,
                **measured.losses_reported._asdict(),
                samples=float("nan") if batch_size is None else float(self.steps * batch_size),
                seconds=measured.seconds,
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
            "sample": self._sample.state_dict(),
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
        self._sample.load_state_dict(state["sample"])
        self._sums = None if state["sums"] is None else state["sums"].clone().to(self._device)
        self._began = time.monotonic()


def _has_rows(gradient: torch.Tensor) -> bool:
    """Says whether rows of a gradient can be picked: it is dense, or sparse in its rows only, as an embedding's is."""
    return gradient.layout == torch.strided or (gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1)


def _picked(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Returns some rows of this process's part of a tensor, dense."""
    part = local(tensor)
    if part.layout == torch.sparse_coo:
        return _picked_sparse(part, rows.start, rows.step)
    return part[rows] if part.ndim else part[None]


def _picked_sparse(gradient: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    """Returns every so many-th row of a sparse gradient, dense.

    It is neither coalesced nor made dense as a whole: entries of one row are added up here. Those of rows that are not
    wanted are added up in as many rows that are cut off: in one they would wait for one another on an accelerator.
    """
    count = len(range(first, gradient.shape[0], stride))
    row, values = gradient._indices()[0] - first, gradient._values().float()
    wanted = (row % stride == 0) & (row >= 0)
    where = torch.where(wanted, row.div(stride, rounding_mode="floor"), count + row % count)
    return values.new_zeros(2 * count, *values.shape[1:]).index_add_(0, where, values)[:count]


def _scalar(loss: Any) -> torch.Tensor:
    if loss.numel() != 1:
        raise InvalidArgumentError(f"`loss` must be a scalar, got shape {tuple(loss.shape)}; pass the batch's mean")
    return loss.reshape(())
