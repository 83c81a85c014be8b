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
    if getattr(optimizer, "_metalearn_attached", False):
        raise InvalidArgumentError("`optimizer` already has a MetaScheduler; call its detach() first")


def check_profile(name: str, profile: Any) -> None:
    """Refuses what is no profile, by the argument's name."""
    if not isinstance(profile, DomainProfile):
        raise InvalidArgumentError(
            f"`{name}` must be a DomainProfile, got {type(profile).__name__}; "
            "pass metalearn.profile_domain(interactions)"
        )
