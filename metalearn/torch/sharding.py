"""What of a model lies in this process: sharded parameters (DTensor, as FSDP2 makes them), and who measures which."""

from __future__ import annotations

import sys
from typing import Any

import torch


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        return to_local()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is spread over a mesh of processes."""
    return hasattr(tensor, "to_local")


def measured_here(tensor: torch.Tensor, rank: int) -> bool:
    """Returns whether this process is the one that measures its part of a parameter.

    Of parts that several processes hold it is the first of them, so that sums over processes count each number once.

    Args:
      tensor: the parameter.
      rank: of this process in the run.
    """
    if not is_sharded(tensor):
        return rank == 0
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    at = zip(mesh.get_coordinate(), tensor.placements, strict=True)  # type: ignore[attr-defined]
    return all(coordinate == 0 for coordinate, placement in at if placement.is_replicate())


def first_row(tensor: torch.Tensor) -> int:
    """Returns which row of the whole is the first of this process's part."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    of: Any = tensor
    return compute_local_shape_and_global_offset(of.shape, of.device_mesh, of.placements)[1][0]


def reshard(model: torch.nn.Module | None) -> None:
    """Drops whole parameters that FSDP2 keeps after an evaluation: they would outlive a change of the shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is None or fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # type: ignore[operator]
