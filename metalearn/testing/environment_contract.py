"""An environment under test: how the checks drive it, jitted or not.

Shape legend: G parameter group, T interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Values
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.environment import Environment, Plan
from metalearn.signals import GROUP_STATISTICS, IntervalStatistics

ORDINARY_VALUES = Values(learning_rate=0.02, weight_decay=0.1, beta1=0.9, dropout=0.1)


class Run(NamedTuple):
    """What some intervals of training gave."""

    state: Any
    statistics: IntervalStatistics
    """NumPy arrays, stacked over intervals: [T] or [T, G]"""
    status: int
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class EnvironmentContract:
    """An environment, and what is ordinary for it; the checks of `metalearn.testing` run on it.

    The whole of a third party's test file:

        @pytest.fixture(scope="module")
        def contract():
            return EnvironmentContract(environment=MyEnvironment(), tasks=[first_task, second_task])

        @pytest.mark.parametrize("check", ENVIRONMENT_CHECKS + JITTED_ENVIRONMENT_CHECKS)
        def test_environment(check, contract):
            check(contract)

    A check that fails raises AssertionError, and says what the contract is. One contract serves all checks, so that a
    jitted environment is compiled once.

    Args:
      environment: fulfils `metalearn.meta_training.environment.Environment`.
      tasks: two or more; of a jitted environment, with equal shapes.
      jitted: whether the environment is pure and traced by JAX: it then gets JAX arrays and typed keys, under jit. If
        not, it gets NumPy arrays, Python numbers and ints as keys, and `JITTED_ENVIRONMENT_CHECKS` are not for it.
      values: a configuration under which every task trains soundly; each number holds for all groups. Dropout above 0.
      inert: names of `Values` that the model has no use for, such as "dropout".
      steps: optimizer steps of an interval, 4 or more.

    Raises:
      InvalidArgumentError: fewer than two tasks or four steps, no dropout to halve, or an unknown name in `inert`.
    """

    environment: Environment
    tasks: Sequence[Any]
    jitted: bool = True
    values: Values = ORDINARY_VALUES
    inert: tuple[str, ...] = ()
    steps: int = 20
    traces: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    """how often each method of a jitted environment was traced"""

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise InvalidArgumentError(f"`tasks` must be two or more, got {len(self.tasks)}; pass another small task")
        if self.steps < 4:
            raise InvalidArgumentError(f"`steps` must be 4 or more, got {self.steps}")
        if not 0.0 < self.values.dropout < 1.0 and "dropout" not in self.inert:
            raise InvalidArgumentError(
                f"`dropout` in `values` must be above 0 and below 1, got {self.values.dropout}; name it in `inert` "
                "if the model has none"
            )
        if unknown := set(self.inert) - set(Values._fields):
            raise InvalidArgumentError(f"`inert` must name some of {Values._fields}, got {sorted(unknown)}")

    def run(
        self,
        *,
        task: int = 0,
        seed: int = 0,
        intervals: int = 3,
        steps: int | None = None,
        first_step: int = 0,
        horizon: float = math.nan,
        single_group: bool = False,
        decay_to: float = 0.0,
        look: bool = False,
        **values: Any,
    ) -> Run:
        """Trains from a fresh state.

        Args:
          task: index of the task.
          seed: of model and steps.
          intervals: T.
          steps: of an interval, None for the contract's.
          first_step: steps said to be taken before the first interval.
          horizon: steps of the whole run, NaN if unknown.
          single_group: whether all parameters are one group.
          decay_to: share of the rate that is left at the horizon.
          look: whether score and status are asked for after every interval, not only at the end.
          **values: instead of those in `values`; a number for all groups, or [G].
        """
        state = self.reset(task=task, seed=seed)
        rows = []
        for index in range(intervals):
            plan = self.plan(
                index,
                steps=steps,
                first_step=first_step,
                horizon=horizon,
                single_group=single_group,
                decay_to=decay_to,
            )
            state, statistics = self.step(state, plan, index, task=task, seed=seed, **values)
            rows.append(statistics)
            if look:
                self.call("score", self.converted_tasks[task], state)
                self.call("status", state)
        return Run(
            state,
            IntervalStatistics(*(np.stack(column) for column in zip(*rows, strict=True))),
            int(self.call("status", state)),
            float(self.call("score", self.converted_tasks[task], state)),
        )

    def reset(self, *, task: int = 0, seed: int = 0) -> Any:
        """Returns a fresh state."""
        return self.call("reset", self.converted_tasks[task], key=self.key(seed, 0))

    def step(
        self, state: Any, plan: Plan, index: int, *, task: int = 0, seed: int = 0, **values: Any
    ) -> tuple[Any, IntervalStatistics]:
        """Trains interval `index` of a run, and returns statistics as NumPy arrays.

        Raises:
          AssertionError: a statistic does not have its shape.
        """
        state, statistics = self.call(
            "step", self.converted_tasks[task], state, self.group_values(**values), plan, key=self.key(seed, index + 1)
        )
        statistics = IntervalStatistics(*(np.asarray(value) for value in statistics))
        for name, value in statistics._asdict().items():
            expected = (self.environment.num_groups,) if name in GROUP_STATISTICS else ()
            if value.shape != expected:
                raise AssertionError(f"`{name}` must have shape {expected}, got {value.shape}")
        return state, statistics

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Calls a method of the environment, jitted if that is what it is.

        Raises:
          AssertionError: the method raised.
        """
        try:
            return self._methods[name](*arguments, **keywords)
        except Exception as error:
            how = "run under jax.jit" if self.jitted else "run"
            raise AssertionError(
                f"`{name}` must {how} without an exception: a lost run is a status, not an error. It raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def group_values(self, **changes: Any) -> Values:
        """Returns `values` with changes, each but dropout spread over the groups."""
        numbers = self.values._replace(**changes)
        wide = [np.broadcast_to(value, self.environment.num_groups) for value in numbers[:-1]]
        if not self.jitted:
            return Values(*[np.array(value, np.float64) for value in wide], dropout=float(numbers.dropout))
        import jax.numpy as jnp

        return Values(*(jnp.asarray(value, jnp.float32) for value in (*wide, numbers.dropout)))

    def plan(
        self,
        index: int,
        *,
        steps: int | None = None,
        first_step: int = 0,
        horizon: float = math.nan,
        single_group: bool = False,
        decay_to: float = 0.0,
    ) -> Plan:
        """Returns the plan of interval `index`; arguments as in `run`."""
        steps = steps or self.steps
        first_step += index * steps
        if not self.jitted:
            return Plan(steps, first_step, horizon, single_group, decay_to)
        import jax.numpy as jnp

        return Plan(
            jnp.int32(steps),
            jnp.int32(first_step),
            jnp.float32(horizon),
            jnp.bool_(single_group),
            jnp.float32(decay_to),
        )

    def key(self, seed: Any, index: Any) -> Any:
        """Returns the key of one call: 0 of reset, above 0 of the intervals."""
        if not self.jitted:
            return 1000 * seed + index
        import jax

        return jax.random.fold_in(jax.random.key(seed), index)

    @cached_property
    def converted_tasks(self) -> list[Any]:
        """The tasks as the environment gets them."""
        if not self.jitted:
            return list(self.tasks)
        import jax
        import jax.numpy as jnp

        return [jax.tree.map(jnp.asarray, task) for task in self.tasks]

    @cached_property
    def _methods(self) -> dict[str, Callable[..., Any]]:
        methods = {name: getattr(self.environment, name) for name in ("reset", "step", "score", "status")}
        if not self.jitted:
            return methods
        import jax

        return {name: jax.jit(self._counted(name, method)) for name, method in methods.items()}

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Counts the calls of a method; of a jitted one, these are its traces."""

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.traces[name] += 1
            return method(*arguments, **keywords)

        return counted
