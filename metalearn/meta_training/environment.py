"""The protocol between meta-training and whatever trains a model: simulated, JAX or PyTorch."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from metalearn.controller.actions import Values
from metalearn.signals import IntervalStatistics


class Plan(NamedTuple):
    """The steps of one interval."""

    num_steps: Any
    """optimizer steps to take, at least 2 (a probe needs a pair)"""
    first_step: Any
    """steps taken before this interval"""
    horizon: Any
    """steps of the whole run, NaN if the controller is not told"""
    single_group: Any
    """whether the loop put all parameters into one group: the first [G] value then holds, the others are NaN"""
    decay_to: Any = 0.0
    """share of the learning rate that is left at the horizon, see `schedule_multiplier`"""


DIVERGED_RATIO = 1.5
"""An interval whose mean loss is so many times the first step's is diverged."""


class Status(IntEnum):
    """What has become of a run; a value, since nothing can be raised under jit."""

    RUNNING = 0
    DIVERGED = 1
    """finite, but the last interval's mean loss is `DIVERGED_RATIO` times the first step's: lower the learning rate"""
    NONFINITE = 2
    """a loss or a weight was not finite: the run is lost, go back to an earlier state"""


@runtime_checkable
class Environment(Protocol):
    """Trains a model on a task, an interval at a time.

    `reset` and `step` are pure where the environment is jitted; a PyTorch one hands the same (mutated) state back.
    """

    @property
    def num_groups(self) -> int:
        """Parameter groups, the G of every [G] value."""
        ...

    @property
    def roles(self) -> tuple[str, ...]:
        """Role of every parameter group, among `metalearn.controller.config.ROLES`."""
        ...

    @property
    def family(self) -> str | None:
        """Model family, or None if it has no name; see `ControllerConfig.families`."""
        ...

    @property
    def samples_per_step(self) -> int:
        """Training samples that one step consumes."""
        ...

    def reset(self, task: Any, *, key: Any) -> Any:
        """Returns the state of a freshly initialised model."""
        ...

    def step(self, task: Any, state: Any, values: Values, plan: Plan, *, key: Any) -> tuple[Any, IntervalStatistics]:
        """Trains one interval under `values` times the base schedule, validates, and measures."""
        ...

    def score(self, task: Any, state: Any) -> Any:
        """Returns the test metric of the weights that validated best; 0 if none of them was ever finite."""
        ...

    def status(self, state: Any) -> Any:
        """Returns the `Status` of the run."""
        ...
