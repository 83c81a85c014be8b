"""What turns rollouts into a better policy: the loop knows this protocol, and neither estimator behind it.

Both take the same groups of episodes in an iteration, so that iterations, budgets and logs of the two compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from metalearn.controller.config import ControllerConfig
from metalearn.meta_training.es import ESConfig, EvolutionStrategies
from metalearn.meta_training.ppo import PPO, PPOConfig
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import Chunk, Ended, RolloutRunner


class Estimator(Protocol):
    """Improves a policy, an iteration at a time; a function of its arguments alone."""

    def init(self, *, key: jax.Array) -> PolicyParams:
        """Makes the parameters of an untrained policy; the same for every estimator."""
        ...

    def start(self, runner: RolloutRunner, params: PolicyParams, prior: Prior, chunks: Sequence[Chunk]) -> Any:
        """Makes the estimator's own state before the first iteration, a pytree of arrays that can be saved.

        Args:
          chunks: groups of any iteration; only their pools and shapes count.
        """
        ...

    def step(
        self,
        runner: RolloutRunner,
        params: PolicyParams,
        state: Any,
        prior: Prior,
        chunks: Sequence[Chunk],
        *,
        key: jax.Array,
        label: str | None = None,
    ) -> tuple[PolicyParams, Any, dict[str, Any], list[Ended]]:
        """Runs one iteration's episodes and updates the policy.

        Args:
          chunks: groups of CHUNK episodes that share task and initialisation; their pools are, in order, those of every
            other iteration.
          key: of this iteration.
          label: of a progress bar; None shows none.

        Returns:
          Parameters, state, figures for the log, and the groups that ended. Figures are at least `return`, `score`,
          `inner_steps` (optimizer steps that the episodes took), `rollout_seconds` and `update_seconds`; lists are
          histograms of values from -1 to 1.
        """
        ...


def make_estimator(config: ControllerConfig, settings: PPOConfig | ESConfig) -> Estimator:
    """Makes the estimator that settings are for."""
    return PPO(config, settings) if isinstance(settings, PPOConfig) else EvolutionStrategies(config, settings)
