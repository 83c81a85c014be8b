"""How much memory a scheduler holds beside the run that it steers."""

from __future__ import annotations

import functools
import os
import types
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead_workloads import Workload

NOT_HELD = (type, types.ModuleType, str, bytes, int, float, torch.nn.Module, torch.optim.Optimizer)


def trained_bytes(workload: Workload) -> int:
    """Returns the bytes of weights, of as many gradients where they are dense, and of the optimizer's state."""
    tables = {m.weight for m in workload.model.modules() if isinstance(m, torch.nn.Embedding) and m.sparse}
    parameters = list(workload.model.parameters())
    dense = [p for p in parameters if p not in tables]
    return sum(t.nbytes for t in (*parameters, *_moments(workload), *dense))


def resident_bytes() -> int:
    """Returns the resident memory of the process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held_bytes(holder: Any, workload: Workload) -> int:
    """Returns the bytes of tensors and arrays that are reachable from an object.

    The workload's own are left out, and so is what only a module or an optimizer leads to: a framework's Trainer, say.
    """
    seen: set[int] = set()
    own = (*workload.model.parameters(), *workload.model.buffers(), *_moments(workload))
    storages = {_storage(tensor)[0] for tensor in own}
    total, waiting = 0, deque([holder])
    while waiting:
        item = waiting.popleft()
        if id(item) in seen or isinstance(item, NOT_HELD):
            continue
        seen.add(id(item))
        if isinstance(item, (torch.Tensor, np.ndarray)):
            where, size = _storage(item)
            total += 0 if where in storages else size
            storages.add(where)
        else:
            waiting.extend(_parts(item))
    return total


def _moments(workload: Workload) -> list[torch.Tensor]:
    return [v for state in workload.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def _storage(array: torch.Tensor | np.ndarray) -> tuple[int, int]:
    if isinstance(array, torch.Tensor):
        return array.untyped_storage().data_ptr(), array.untyped_storage().nbytes()
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.__array_interface__["data"][0], array.nbytes


def _parts(item: Any) -> Iterable[Any]:
    """Returns what an object holds."""
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return item
    if isinstance(item, types.FunctionType):
        return [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, item.args, item.keywords]
    slots = [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
    return [*slots, *vars(item).values()] if hasattr(item, "__dict__") else slots


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
