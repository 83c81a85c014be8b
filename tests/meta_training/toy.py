"""A toy environment whose best dropout is known: quality grows at every interval, the faster the nearer to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metalearn.controller.actions import Values
from metalearn.controller.observation import PROFILE_DESCRIPTORS
from metalearn.meta_training.environment import Plan, Status
from metalearn.signals import IntervalStatistics


class ToyTask(NamedTuple):
    """Stacked along a leading axis it is a batch."""

    rows: Any
    """[1], stands for the training table"""
    optimum: Any
    """the best dropout"""
    num_interactions: Any
    num_users: Any
    num_items: Any
    validation_floor: Any
    test_floor: Any


@dataclass(frozen=True)
class ToyEnvironment:
    """Fulfils `metalearn.meta_training.environment.Environment`; its state is the quality reached."""

    num_groups: int = 2
    family: str | None = None
    samples_per_step: int = 32

    @property
    def roles(self) -> tuple[str, ...]:
        return ("embedding",) * self.num_groups

    def reset(self, task: ToyTask, *, key: Any) -> Any:
        return jnp.zeros(())

    def step(
        self, task: ToyTask, state: Any, values: Values, plan: Plan, *, key: Any
    ) -> tuple[Any, IntervalStatistics]:
        quality = state + 0.1 * jnp.exp(-(((values.dropout - task.optimum) / 0.25) ** 2))
        ones, steps = jnp.ones(self.num_groups), plan.num_steps.astype(jnp.float32)
        statistics = IntervalStatistics(
            steps=steps,
            samples=steps * self.samples_per_step,
            seconds=jnp.nan,
            loss_sum=steps * (1.0 - quality),
            loss_square_sum=steps * (1.0 - quality) ** 2,
            gradient_norm=ones,
            gradient_cosine=0.5 * ones,
            update_ratio=0.01 * ones,
            curvature=ones,
            weight_norm=ones,
            displacement=0.1 * ones,
            touched=0.5 * ones,
            nonfinite=jnp.zeros((), jnp.int32),
            validation=quality,
        )
        return quality, statistics

    def score(self, task: ToyTask, state: Any) -> Any:
        return state

    def status(self, state: Any) -> Any:
        return jnp.int32(Status.RUNNING)


@dataclass(frozen=True)
class ToyPool:
    """Two tasks; the first meta-feature tells them apart, by which side of the base the optimum lies."""

    optima: tuple[float, float] = (0.05, 0.35)
    family: str | None = None
    num_groups: int = 2

    @property
    def environment(self) -> ToyEnvironment:
        return ToyEnvironment(self.num_groups, self.family)

    @property
    def label(self) -> str:
        return self.family or "toy"

    @property
    def names(self) -> tuple[str, ...]:
        return ("low", "high")

    @property
    def profiles(self) -> np.ndarray:
        profiles = np.zeros((2, len(PROFILE_DESCRIPTORS)), np.float32)
        profiles[:, 0] = (-10.0, 10.0)
        return profiles

    @property
    def tasks(self) -> ToyTask:
        def column(*values: float) -> np.ndarray:
            return np.array(values, np.float32)

        floors = column(0.05, 0.05)
        return ToyTask(
            np.zeros((2, 1), np.float32),
            column(*self.optima),
            column(1e4, 1e4),
            np.array([500, 500], np.int32),
            np.array([200, 200], np.int32),
            floors,
            floors,
        )

    def __len__(self) -> int:
        return 2
