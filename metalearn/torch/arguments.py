"""What a MetaScheduler accepts."""

from __future__ import annotations

from typing import Any

import torch

from metalearn.errors import InvalidArgumentError
from metalearn.profiles import DomainProfile


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is no optimizer, and one that is steered already."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise InvalidArgumentError(
            f"`optimizer` is a {type(optimizer).__name__}, a wrapper that runs no step hooks; pass the optimizer "
            "inside, or use metalearn.integrations.accelerate.prepare_scheduler if it is Accelerate's"
        )
    hooked = getattr(type(optimizer).step, "hooked", False)
    if not hooked or not hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):
        raise InvalidArgumentError(
            f"`optimizer` is a {type(optimizer).__name__}, which does not run the hooks of a torch optimizer, as "
            "TorchRec's keyed, combined and fused ones; pass the torch optimizer of the dense parameters inside, and "
            "go on stepping the one around it"
        )
    if getattr(optimizer, "_metalearn_attached", False):
        raise InvalidArgumentError("`optimizer` already has a MetaScheduler; call its detach() first")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not params:
        raise InvalidArgumentError(
            "`optimizer` has parameter groups without any parameters; make it from those that are to be trained"
        )
    if any(p.is_meta for p in params):
        raise InvalidArgumentError(
            "`optimizer` has parameters on the meta device, which hold no weights; give the model memory first, as in "
            'model.to_empty(device="cuda"), load or initialise its weights, and make the optimizer from those'
        )


def check_model(model: Any) -> None:
    """Refuses what is no model, and one that has no weights yet."""
    if model is None:
        return
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgumentError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}; without one dropout is left alone"
        )
    name = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if name is not None:
        raise InvalidArgumentError(
            f"`model` has its parameter {name!r} on the meta device, where it holds no weights; give it memory first, "
            'as in model.to_empty(device="cuda"), and make optimizer and MetaScheduler after that'
        )


def check_profile(name: str, profile: Any) -> None:
    """Refuses what is no profile, by the argument's name."""
    if not isinstance(profile, DomainProfile):
        raise InvalidArgumentError(
            f"`{name}` must be a DomainProfile, got {type(profile).__name__}; "
            "pass metalearn.profile_domain(interactions)"
        )


def check_averaging(averaging: Any, horizon: int | None) -> bool:
    """Returns whether averaged weights are evaluated; where nobody has said so, only if the horizon is unknown."""
    if averaging is None:
        return horizon is None
    if not isinstance(averaging, bool):
        raise InvalidArgumentError(f"`averaging` must be True, False or None, got {averaging!r}")
    if horizon is None and not averaging:
        raise InvalidArgumentError(
            "`averaging` must be True where the horizon is unknown: a rate that is held needs averaged weights; pass a "
            "`horizon` for it to decay over, or evaluate inside `averaged_parameters`"
        )
    return averaging
