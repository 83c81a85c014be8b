"""What of a run has a state beside its tensors: optimizers, schedulers, samplers, scalers, random generators."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns groups and state by reference; of optimizers that save themselves in another way what they save."""
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return {"own": optimizer.state_dict()}
    groups, state = optimizer.param_groups, optimizer.state
    return {
        "groups": [{name: value for name, value in group.items() if name != "params"} for group in groups],
        "state": [state.get(p) for group in groups for p in group["params"]],
    }


def reader(thing: Any) -> Callable[[], Any] | None:
    """Returns what reads the state of a tracked object."""
    if isinstance(thing, torch.Generator):
        return thing.get_state
    if isinstance(thing, np.random.Generator):
        return lambda: thing.bit_generator.state
    if isinstance(thing, random.Random):
        return thing.getstate
    stateful = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    return thing.state_dict if stateful else None


def restore_tracked(thing: Any, state: Any) -> None:
    """Inverts what `reader` reads."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, np.random.Generator):
        thing.bit_generator.state = state
    elif isinstance(thing, random.Random):
        thing.setstate(state)
    else:
        thing.load_state_dict(state)
    if isinstance(thing, torch.amp.GradScaler):
        # What a step that raised has left: the scaler would refuse to unscale the gradients of the next.
        thing._per_optimizer_states.clear()


def is_data(thing: Any) -> bool:
    """Returns whether a tracked object is a position in the data: it scales and schedules nothing."""
    return not isinstance(thing, torch.amp.GradScaler) and not hasattr(thing, "optimizer")


def random_state() -> dict[str, Any]:
    """Returns the state of the global generators of Python, NumPy and torch."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverts `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
