"""What a parameter group holds: numbers or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def own_values(group: Mapping[str, Any], rate: float) -> dict[str, float]:
    """Returns what a parameter group has of the controlled hyperparameters, under canonical names."""
    own = {"learning_rate": rate}
    if "betas" in group or group.get("momentum"):
        own["beta1"] = float(group["betas"][0] if "betas" in group else group["momentum"])
    if "weight_decay" in group:
        own["weight_decay"] = float(group["weight_decay"])
    return own


def alike(value: float | None, own: Any) -> Any:
    """Returns a value in the form of the group's own: a number, or a tensor on its device."""
    return torch.full_like(own, value) if value is not None and isinstance(own, torch.Tensor) else value


def as_tensor(value: Any, group: Mapping[str, Any]) -> Any:
    """Returns a number as a tensor beside a group's parameters; as it is where the optimizer takes no tensors."""
    if value is None or isinstance(value, torch.Tensor) or (group.get("foreach") and not group.get("capturable")):
        return value
    return torch.full((), value, dtype=torch.float32, device=next((p.device for p in group["params"]), None))
