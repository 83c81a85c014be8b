"""A policy that goes by cues, for model families that no policy was meta-trained for: the start is the base.

- **Slow learning**: while the validation metric rises by much from interval to interval the model learns too slowly for
  its run, and the learning rate is raised; nothing lowers it again. The cue is the feature `validation_trend`: the
  distance between a fast and a slow average of the metric, as a share of the best so far.
- **Memorising**: of what the training loss has fallen by, the validation loss has not followed in a share, the feature
  `generalization_gap`. Where that is large the weight decay is raised, where it is small it is lowered. A loop that
  does not report both losses, or whose rate decays, keeps the base's.

Both stay within the trust region. docs/evidence.md says on which domains they act, and what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED, ControllerConfig
from metalearn.controller.runtime import NumpyNetwork
from metalearn.signals import GLOBAL_FEATURES, percentile_scale

ACTION = 1.0
"""Before tanh: a factor of 1.7 in one decision."""
DEAD_BAND = 0.05
"""Within this of `ControllerConfig.decay_cue_at` the weight decay stays where it is."""


class Cue(NamedTuple):
    """A feature that moves a hyperparameter of all parameter groups."""

    feature: str
    """of the run"""
    hyperparameter: str
    raised_above: float
    """of the feature, before it is scaled"""
    lowered_below: float = -math.inf


FIELDS = {"learning_rate": ("cued", "cue_above"), "weight_decay": ("decay_cued", "decay_cue_at")}
"""Of each hyperparameter that a cue moves: where a `ControllerConfig` says for which families, and from where on."""


def cues_of(config: ControllerConfig, family: str, *, held: bool) -> tuple[Cue, ...]:
    """Returns what models of a family go by in mid-run; nothing where they have a policy, or their base alone.

    Args:
      config: of the controller.
      family: of the model.
      held: whether the learning rate is, and does not decay over a horizon: the weight decay is left alone where it
        does, since what it comes to there goes with the rate, and was not measured.
    """
    found = []
    if family in config.cued:
        found.append(Cue("validation_trend", "learning_rate", config.cue_above))
    if held and family in config.decay_cued:
        at = config.decay_cue_at
        found.append(Cue("generalization_gap", "weight_decay", at + DEAD_BAND, at - DEAD_BAND))
    return tuple(found)


class CuePolicy(NumpyNetwork):
    """Decides by cues; the start is the base.

    Args:
      params: of the controller's network, whose domain code sessions keep.
      knots: percentile knots of the run features, which cues are scaled by before any policy sees them.
      cues: from `cues_of`.
    """

    def __init__(self, params: Mapping[str, np.ndarray], knots: np.ndarray, cues: Sequence[Cue]) -> None:
        super().__init__(params)
        knots = np.asarray(knots, np.float64)
        self._cues = []
        for cue in cues:
            column = GLOBAL_FEATURES.index(cue.feature)
            bounds = np.array([[cue.raised_above], [cue.lowered_below]])
            above, below = np.where(
                np.isfinite(bounds), percentile_scale(bounds, knots[column : column + 1], np), bounds
            )[:, 0]
            # What was not measured is scaled to 0, and moves nothing.
            self._cues.append((column, GROUP_CONTROLLED.index(cue.hyperparameter), max(0.0, above), below))

    def start(self, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leaves the start where it is."""
        gate, modifier = super().start(code)
        return np.zeros_like(gate), np.zeros_like(modifier)

    def reads(self, feature: str) -> bool:
        """Says whether it goes by a run feature."""
        return GLOBAL_FEATURES.index(feature) in [column for column, *_ in self._cues]

    def act(
        self, hidden: np.ndarray, group: np.ndarray, run: np.ndarray, context: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves the same hyperparameters of all groups, or does nothing; arguments as of `NumpyNetwork.act`."""
        groups = np.zeros((*group.shape[:-1], len(GROUP_CONTROLLED)))
        for column, moved, above, below in self._cues:
            value = run[..., column]
            direction = (value > above) * 1.0 - ((value < below) & (value != 0.0))
            groups[..., moved] = ACTION * direction[..., None]
        return groups, np.zeros((*run.shape[:-1], len(GLOBAL_CONTROLLED))), hidden
