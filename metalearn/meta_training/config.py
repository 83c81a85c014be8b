"""Settings of a meta-training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.es import ESConfig
from metalearn.meta_training.outcome import OutcomeFitConfig
from metalearn.meta_training.ppo import PPOConfig

ChosenBase = tuple[str, bool, tuple[float, ...]]
"""Of a family, with the horizon known or not, values of `CONTROLLED` that real runs on whole domains have chosen."""
KNOWN = 0.25
"""Weight of runs that know their horizon in what validation says, and their share of the episodes: loops that evaluate
averaged weights, as the README recommends, run as if they knew none."""


@dataclass(frozen=True, kw_only=True)
class MetaTrainConfig:
    """Settings of a meta-training run; written into the checkpoint.

    Args:
      seed: of everything.
      num_iterations: policy updates.
      groups_per_pool: groups of rollouts of each pool in an iteration.
      epochs_range: the log-uniform range of a run's epochs.
      steps_range: of each pool, the fewest and the most optimizer steps per interval, whatever the epochs.
      search_tasks, search_configurations: of each pool, the size of the search for the base.
      bases: of some families, in place of what the search predicts.
      resting_bases: of families that are trained, for when validation puts them at rest.
      told_share: share of episodes whose horizon the controller knows.
      family_told_share: share of episodes whose model family it knows.
      single_group_share: share of episodes with all parameters in one group.
      wrong_horizon_share: share of the horizons told that are wrong, by up to a factor of two.
      progress_share: share of groups that are drawn by learning progress (`metalearn.meta_training.curriculum`); the
        others let domains take turns. 0 is no curriculum.
      kept_share: share of episodes in which the loop keeps a hyperparameter to itself, at the optimizer's own value; of
        each but the learning rate.
      validate_every: iterations between evaluations on the validation pools.
      validation_episodes: of each validation pool.
      patience: evaluations without improvement before the run stops.
      ppo: of proximal policy optimisation.
      es: of evolution strategies, which then are the estimator in place of PPO; None for PPO.
      outcome_rounds: iterations' worth of episodes that the outcome model is fitted on.
      outcome: of its fit.
    """

    seed: int = 0
    num_iterations: int = 80
    groups_per_pool: tuple[int, ...]
    epochs_range: tuple[float, float] = (1.0, 32.0)
    steps_range: tuple[tuple[int, int], ...]
    search_tasks: tuple[int, ...]
    search_configurations: tuple[int, ...]
    bases: tuple[ChosenBase, ...] = ()
    resting_bases: tuple[ChosenBase, ...] = ()
    told_share: float = KNOWN
    family_told_share: float = 0.85
    single_group_share: float = 0.3
    wrong_horizon_share: float = 0.15
    progress_share: float = 0.5
    kept_share: float = 0.1
    validate_every: int = 10
    validation_episodes: int = 16
    patience: int = 8
    ppo: PPOConfig = field(default_factory=PPOConfig)
    es: ESConfig | None = None
    outcome_rounds: int = 6
    outcome: OutcomeFitConfig = field(default_factory=OutcomeFitConfig)

    def __post_init__(self) -> None:
        for name in ("num_iterations", "validate_every", "validation_episodes", "patience", "outcome_rounds"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"`{name}` must be a positive int, got {getattr(self, name)}")
        if not 0.0 <= self.progress_share <= 1.0:
            raise InvalidArgumentError(f"`progress_share` must be between 0 and 1, got {self.progress_share}")
        if not 0.0 < self.epochs_range[0] <= self.epochs_range[1] < np.inf:
            raise InvalidArgumentError(f"`epochs_range` must be low and high, both above 0, got {self.epochs_range}")
        if self.es is None and sum(self.groups_per_pool) % self.ppo.num_minibatches:
            raise InvalidArgumentError(
                f"`groups_per_pool` must sum to a multiple of {self.ppo.num_minibatches} minibatches, "
                f"got {self.groups_per_pool}"
            )

    @property
    def estimator(self) -> PPOConfig | ESConfig:
        """Settings of the estimator in use."""
        return self.ppo if self.es is None else self.es

    def identity(self) -> dict[str, Any]:
        """Returns what a run must share with another to be taken up.

        Not its length, nor the estimator not in use, nor what comes after the last iteration.
        """
        free = {"num_iterations", "patience", "resting_bases", "outcome_rounds", "outcome"}
        free.add("es" if self.es is None else "ppo")
        return {name: value for name, value in asdict(self).items() if name not in free}
