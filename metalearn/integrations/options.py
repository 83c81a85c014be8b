"""What every adapter takes: the arguments of a MetaScheduler, and what of them a framework knows by itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from metalearn.errors import InvalidArgumentError
from metalearn.torch import MetaScheduler

if TYPE_CHECKING:
    from metalearn.audit import AuditLog
    from metalearn.controller.controller import Controller
    from metalearn.controller.decision import Mode
    from metalearn.controller.modes import Advisor
    from metalearn.profiles import DomainProfile
    from metalearn.safety.constraints import Constraints
    from metalearn.safety.drift import DriftConfig
    from metalearn.safety.guard import GuardConfig
    from metalearn.torch import Handle, RollbackConfig

OPTIONS = tuple(name for name in inspect.signature(MetaScheduler).parameters if name not in ("optimizer", "model"))
"""Keyword arguments of a MetaScheduler that an adapter passes on; optimizer and model are the framework's."""


class SchedulerOptions(TypedDict, total=False):
    """Keyword arguments of `metalearn.torch.MetaScheduler`, which says what each means; `domain` is needed.

    What is left out the framework is asked for: `horizon="auto"` (the default; None is an unknown one), `batch_size`,
    `metric` with its `mode`.
    """

    domain: DomainProfile
    family: str | None
    horizon: int | Literal["auto"] | None
    averaging: bool | None
    batch_size: int | None
    interval: int | None
    overhead_budget: float | None
    controller: Controller | str | Path | None
    metric: str | None
    mode: Literal["max", "min"]
    decision_log: AuditLog | str | Path | None
    name: str
    rollback: RollbackConfig | None
    drift: DriftConfig | None
    tracked: Sequence[Any]
    steering: Mode
    advisor: Advisor | None
    guard: GuardConfig | None
    constraints: Constraints | None
    process_group: Any
    bindings: Sequence[Handle]


class Found(NamedTuple):
    """What a framework knows of its run."""

    steps: float | None = None
    """optimizer steps from here to the end; None, infinite or not positive if nobody knows"""
    batch_size: int | None = None
    """training samples of an optimizer step"""
    metric: str | None = None
    """that the framework itself chooses models by"""
    mode: Literal["max", "min"] = "max"
    tracked: Sequence[Any] = ()
    """what of the framework has to go back in a rollback"""


def check_options(options: Mapping[str, Any], *, needs_domain: bool = True) -> dict[str, Any]:
    """Returns a copy of an adapter's keyword arguments; values are checked when the MetaScheduler is made.

    Raises:
      InvalidArgumentError: one is unknown, or `domain` is missing.
    """
    for name in options:
        if name in ("optimizer", "model"):
            raise InvalidArgumentError(f"`{name}` is the framework's own; leave it out")
        if name not in OPTIONS:
            raise InvalidArgumentError(f"`{name}` is no argument of MetaScheduler; pass some of {list(OPTIONS)}")
    if needs_domain and options.get("domain") is None:
        raise InvalidArgumentError("`domain` is missing; pass metalearn.profile_domain(interactions)")
    return dict(options)


def complete_options(options: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """Fills what a user left open with what the framework knows; returns a MetaScheduler's keyword arguments.

    Args:
      options: of the user.
      found: of the framework.
    """
    completed = {"horizon": "auto", "batch_size": None, "metric": None, **options}
    if completed["horizon"] == "auto":
        known = found.steps is not None and 0 < found.steps < math.inf
        completed["horizon"] = int(found.steps) if known and found.steps is not None else None
    if completed["batch_size"] is None:
        completed["batch_size"] = found.batch_size
    if completed["metric"] is None:
        completed["metric"] = found.metric
    if completed["metric"] is not None and completed["metric"] == found.metric:
        completed.setdefault("mode", found.mode)
    if completed.get("rollback") is not None:
        completed["tracked"] = (*found.tracked, *completed.get("tracked", ()))
    return completed
