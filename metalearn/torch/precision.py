"""Precision of a training step: fp32, tf32, bf16, fp16 with a GradScaler; switched between steps only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from metalearn.errors import InvalidArgumentError
from metalearn.spaces import CANONICAL_SPACE
from metalearn.torch.handles import Handle, checked

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(Handle):
    """Runs steps in the precision of the moment: the loop uses its `autocast`, `scale` and `step`.

    A switch in the middle of a step, or of its micro-batches, waits for the end of that step. The GradScaler is made
    when fp16 is first in force and keeps its scale from then on, through other precisions, resume and rollback; do not
    put it among `tracked`. TF32 is a setting of the process (`torch.set_float32_matmul_precision`). A compiled model is
    compiled once for each precision that it meets.

    Args:
      value: "fp32", "tf32", "bf16" or "fp16".
      device: on which the model computes.

    Raises:
      InvalidArgumentError: the device has not got it.

    Example:
      >>> precision = Precision("bf16")
      >>> def train(loader, loss_of, optimizer, scheduler):
      ...     for batch in loader:
      ...         with precision.autocast():
      ...             loss = loss_of(batch)
      ...         precision.scale(loss).backward()
      ...         precision.step(optimizer)
      ...         optimizer.zero_grad()
      ...         scheduler.step(loss)
      >>> with precision.autocast():
      ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
      torch.bfloat16
    """

    hyperparameter = CANONICAL_SPACE["precision"]

    def __init__(self, value: str = "fp32", *, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._masks = _masks(self._device)
        self._own_matmul = torch.get_float32_matmul_precision()
        self._scaler: torch.amp.GradScaler | None = None
        self._is_open = False
        """whether a step has begun"""
        reason = self._masks.get(f"precision={checked(self.hyperparameter, value)}")
        if reason is not None:
            raise InvalidArgumentError(f"`value` cannot be {value!r}: {reason}")
        self._next = self._value = value
        self._take()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler, for what else a loop does with gradients, such as `unscale_`; None before fp16 was used."""
        return self._scaler

    def autocast(self) -> torch.autocast:
        """Returns the context for forward pass and loss."""
        self._is_open = True
        dtype = _DTYPES.get(self._value)
        return torch.autocast(self._device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns what to call `backward` on."""
        self._is_open = True
        return loss if self._value != "fp16" or self._scaler is None else self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps the optimizer; in fp16 not if a gradient is not finite."""
        if self._value == "fp16" and self._scaler is not None:
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            optimizer.step()
        self._is_open = False
        if self._next != self._value:
            self._take()

    def read(self) -> str:
        """Returns the precision, from the next step on."""
        return self._next

    def write(self, value: str) -> None:
        """Sets the precision of the steps to come."""
        self._next = value
        if not self._is_open:
            self._take()

    def masks(self) -> Mapping[str, str]:
        """Returns which precisions the device has not got, and why."""
        return dict(self._masks)

    def release(self) -> None:
        """Puts the process's setting for float32 back."""
        if self._value == "tf32":
            torch.set_float32_matmul_precision(self._own_matmul)

    def state_dict(self) -> dict[str, Any]:
        """Returns the scaler's state."""
        return {"scaler": None if self._scaler is None else self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the scaler, and begins a step anew: its gradients are not there."""
        self._is_open = False
        self._take()
        scaled: dict[str, Any] | None = state["scaler"]
        self._scaler = None if scaled is None else torch.amp.GradScaler(self._device.type)
        if self._scaler is not None and scaled is not None:
            self._scaler.load_state_dict(dict(scaled))

    def _take(self) -> None:
        """Puts the precision in force that was asked for."""
        if "tf32" in (self._value, self._next):
            torch.set_float32_matmul_precision("high" if self._next == "tf32" else self._own_matmul)
        self._value = self._next
        if self._value == "fp16" and self._scaler is None:
            self._scaler = torch.amp.GradScaler(self._device.type)


def _masks(device: torch.device) -> dict[str, str]:
    """Returns which precisions a device has not got, and why."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return {"precision=tf32": "AMD's devices have no TF32"}
        missing: dict[str, str] = {}
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            missing["precision=tf32"] = f"{name} has no TF32, which came with compute capability 8.0"
            missing["precision=bf16"] = f"{name} only emulates bfloat16, which came with compute capability 8.0"
        return missing
    missing = {"precision=tf32": f"TF32 is a format of NVIDIA's GPUs, and the device is {device.type!r}"}
    if device.type == "cpu":
        missing["precision=fp16"] = "a CPU has no float16 arithmetic worth its narrow range; use bf16"
    elif not torch.amp.is_autocast_available(device.type):
        missing |= {f"precision={name}": f"torch has no autocast for {device.type!r}" for name in _DTYPES}
    return missing
