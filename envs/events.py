"""What befalls a training run from outside, as an environment around an environment: signals that are missing or late,
a machine that changes its speed, and data that drift.

Everything is drawn from the keys, traced, and none of it changes the draws of the environment inside: with every
probability 0 the program is that of the inner environment, to the bit.

Shape legend: G parameter group, T interval of an episode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.controller.actions import Values
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import Environment, Plan
from metalearn.signals import IntervalStatistics

GRADIENT_STATISTICS = ("gradient_norm", "gradient_cosine", "curvature", "touched")
"""What a loop does not see whose gradients are sparse, or gone when it could look at them."""

HELD_OUT_LOSSES = ("validation_loss", "training_sample_loss")
"""What a loop reports beside the metric if it likes."""
REPORTED = ("validation", *HELD_OUT_LOSSES)
"""What a report tells: it is missing or late as a whole."""

_STREAM = 0x6576656E
"""Folded into keys; large, since children of a split are those of the first folds."""


@dataclass(frozen=True, kw_only=True)
class EventConfig:
    """How likely events are, and how large. An episode draws each event apart; with the defaults there are none.

    Args:
      missing_validation: probability that an episode is validated only in part of its intervals; all of
        `REPORTED` is missing then, as it is late with `delayed_validation`.
      missing_validation_share: range of the share of its intervals that go without, uniform; each is drawn apart.
      missing_gradients: probability that an episode lacks `GRADIENT_STATISTICS`.
      missing_gradients_share: range of the share of its intervals that do, uniform; at (1, 1) all of them.
      delayed_validation: probability that an episode hears of a validation one interval late.
      missing_losses: probability that an episode's loop reports no losses beside the metric.
      hardware_change: probability that steps take longer or shorter from some interval on.
      slowdown: range of the factor on their seconds, log-uniform.
      drift: probability that from some interval on batches are drawn from the later rows only, before it from the
        earlier ones only.
      drift_share: range of the share of rows that are the earlier ones, uniform.
      onset: first and last interval, counted from 0, at which hardware change and drift may begin; uniform.

    Raises:
      InvalidArgumentError: a value out of range.
    """

    missing_validation: float = 0.0
    missing_validation_share: tuple[float, float] = (0.1, 0.9)
    missing_gradients: float = 0.0
    missing_gradients_share: tuple[float, float] = (1.0, 1.0)
    delayed_validation: float = 0.0
    missing_losses: float = 0.0
    hardware_change: float = 0.0
    slowdown: tuple[float, float] = (0.25, 4.0)
    drift: float = 0.0
    drift_share: tuple[float, float] = (0.3, 0.7)
    onset: tuple[int, int] = (4, 15)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                low, high = _LIMITS[field.name]
                if not low <= value[0] <= value[1] <= high:
                    raise InvalidArgumentError(
                        f"`{field.name}` must be (low, high) with {low:g} <= low <= high <= {high:g}, got {value}"
                    )
            elif not 0.0 <= value <= 1.0:
                raise InvalidArgumentError(f"`{field.name}` must be a probability in [0, 1], got {value}")


_LIMITS = {
    "missing_validation_share": (0.0, 1.0),
    "missing_gradients_share": (0.0, 1.0),
    "slowdown": (1e-3, 1e3),
    "drift_share": (0.0, 1.0),
    "onset": (0, 2**30),
}


class Events(NamedTuple):
    """What one episode has drawn; an event that does not happen has share 0, or an onset that never comes."""

    missing_validation: Any
    """share of intervals"""
    missing_gradients: Any
    delayed: Any
    """bool"""
    silent: Any
    """bool, whether no losses are reported"""
    change_at: Any
    """int32, interval"""
    slowdown: Any
    drifts: Any
    """bool"""
    drift_at: Any
    """int32, interval"""
    drift_share: Any


class EventfulState(NamedTuple):
    """The inner state, and where the events stand."""

    inner: Any
    events: Events
    interval: Any
    """int32, intervals done"""
    pending: Any
    """what was measured of `REPORTED` in the last interval, by name, for those that hear of it late"""


@dataclass(frozen=True)
class EventfulEnvironment:
    """Fulfils `metalearn.meta_training.environment.Environment` around a jitted environment, under jit.

    What is hidden from the statistics is not hidden from the run: status and score are those of the inner environment,
    and the best weights are kept by validations that nobody heard of.

    Args:
      environment: pure and traced. For drift its tasks need `data` with `first_row` and `num_rows`, float32, the window
        of rows in order of time that batches are drawn from.
      events: what may happen.
      step_seconds: seconds of one step on a task, by a `HardwareModel`; None leaves `seconds` to the environment.

    Example:
      A step of matrix factorisation (dimension 32) on the measured machine:

        def step_seconds(task):
            parameters = (task.num_users + task.num_items) * 32 + task.num_items
            return model.seconds(Workload(parameters.astype(jnp.float32), environment.samples_per_step, 32))
    """

    environment: Environment
    events: EventConfig
    step_seconds: Callable[[Any], Any] | None = None

    @property
    def num_groups(self) -> int:
        """Parameter groups of the inner environment."""
        return self.environment.num_groups

    @property
    def family(self) -> str | None:
        """Model family, or None."""
        return self.environment.family

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the inner environment."""
        return self.environment.roles

    @property
    def samples_per_step(self) -> int:
        """Samples of the inner environment."""
        return self.environment.samples_per_step

    def reset(self, task: Any, *, key: Any) -> EventfulState:
        """Initialises the model, and draws what will happen."""
        if self.events.drift > 0.0 and not hasattr(task, "data"):
            raise InvalidArgumentError(
                f"`drift` must be 0 for tasks without `data` and its row window, got {self.events.drift} for "
                f"{type(task).__name__}"
            )
        events = draw_events(self.events, key=jax.random.fold_in(key, _STREAM))
        inner = self.environment.reset(task, key=key)
        nothing = dict.fromkeys(REPORTED, jnp.full((), jnp.nan, jnp.float32))
        return EventfulState(inner, events, jnp.int32(0), nothing)

    def step(
        self, task: Any, state: EventfulState, values: Values, plan: Plan, *, key: Any
    ) -> tuple[EventfulState, IntervalStatistics]:
        """Trains one interval on the rows of its time, and hides what is not to be seen."""
        config, events = self.events, state.events
        current = _in_window(task, events, state.interval) if config.drift > 0.0 else task
        inner, statistics = self.environment.step(current, state.inner, values, plan, key=key)
        measured = {name: jnp.asarray(getattr(statistics, name), jnp.float32) for name in REPORTED}
        draws = jax.random.uniform(jax.random.fold_in(key, _STREAM), (2,))
        if config.delayed_validation > 0.0:
            late = {name: jnp.where(events.delayed, state.pending[name], measured[name]) for name in REPORTED}
            statistics = statistics._replace(**late)
        if config.missing_validation > 0.0:
            missing = draws[0] < events.missing_validation
            heard = {name: jnp.where(missing, jnp.nan, getattr(statistics, name)) for name in REPORTED}
            statistics = statistics._replace(**heard)
        if config.missing_gradients > 0.0:
            missing = draws[1] < events.missing_gradients
            seen = {name: jnp.where(missing, jnp.nan, getattr(statistics, name)) for name in GRADIENT_STATISTICS}
            statistics = statistics._replace(**seen)
        if config.missing_losses > 0.0:
            told = {name: jnp.where(events.silent, jnp.nan, getattr(statistics, name)) for name in HELD_OUT_LOSSES}
            statistics = statistics._replace(**told)
        if self.step_seconds is not None:
            seconds = jnp.asarray(plan.num_steps, jnp.float32) * self.step_seconds(task)
            statistics = statistics._replace(seconds=seconds)
        if config.hardware_change > 0.0:
            factor = jnp.where(state.interval >= events.change_at, events.slowdown, 1.0)
            statistics = statistics._replace(seconds=statistics.seconds * factor)
        state = EventfulState(inner, events, state.interval + 1, measured)
        return state, statistics

    def score(self, task: Any, state: EventfulState) -> Any:
        """Returns the inner environment's score."""
        return self.environment.score(task, state.inner)

    def status(self, state: EventfulState) -> Any:
        """Returns the inner environment's status."""
        return self.environment.status(state.inner)


def draw_events(config: EventConfig, *, key: Any) -> Events:
    """Draws what happens in one episode."""
    happens, sizes = jax.random.uniform(key, (2, 7))

    def between(index: int, bounds: tuple[float, float]) -> Any:
        return bounds[0] + sizes[index] * (bounds[1] - bounds[0])

    def share(index: int, probability: float, bounds: tuple[float, float]) -> Any:
        return jnp.where(happens[index] < probability, between(index, bounds), 0.0)

    def onset(index: int) -> Any:
        first, last = config.onset
        return first + (sizes[index] * (last - first + 1)).astype(jnp.int32)

    low, high = config.slowdown
    changes, drifts = happens[3] < config.hardware_change, happens[4] < config.drift
    return Events(
        missing_validation=share(0, config.missing_validation, config.missing_validation_share),
        missing_gradients=share(1, config.missing_gradients, config.missing_gradients_share),
        delayed=happens[2] < config.delayed_validation,
        silent=happens[5] < config.missing_losses,
        change_at=jnp.where(changes, onset(3), jnp.iinfo(jnp.int32).max),
        slowdown=low * jnp.power(high / low, sizes[5]),
        drifts=drifts,
        drift_at=jnp.where(drifts, onset(4), jnp.iinfo(jnp.int32).max),
        drift_share=between(6, config.drift_share),
    )


def _in_window(task: Any, events: Events, interval: Any) -> Any:
    """Narrows the window of a task that drifts: to its earlier rows before the drift, to its later ones after."""
    data = task.data
    earlier = jnp.clip(jnp.floor(events.drift_share * data.num_rows), 1.0, data.num_rows - 1.0)
    late = interval >= events.drift_at
    first_row = jnp.where(late, data.first_row + earlier, data.first_row)
    num_rows = jnp.where(late, data.num_rows - earlier, earlier)
    return task._replace(
        data=data._replace(
            first_row=jnp.where(events.drifts, first_row, data.first_row),
            num_rows=jnp.where(events.drifts, num_rows, data.num_rows),
        )
    )
