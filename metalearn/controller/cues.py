"""A policy that goes by one cue, for model families that no policy was meta-trained for.

While the validation metric rises by much from interval to interval the model is learning too slowly for its run, and
the learning rate is raised, within the trust region; nothing lowers it again. The cue is the feature
`validation_trend`: the distance between a fast and a slow average of the metric, as a share of the best so far. On
most domains it never gets as far as the threshold, and the run is the base; docs/evidence.md says on which it does, and
what that is worth.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED
from metalearn.controller.runtime import NumpyNetwork
from metalearn.signals import GLOBAL_FEATURES, percentile_scale

CUE = "validation_trend"
RAISE = 1.0
"""Action before tanh: a factor of 1.7 on the rate in one decision."""


class CuePolicy(NumpyNetwork):
    """Decides by the cue; the start is the base.

    Args:
      params: of the controller's network, whose domain code sessions keep.
      knots: percentile knots of the run features, which the cue is scaled by before any policy sees it.
      above: of the cue, before it is scaled; see `ControllerConfig.cue_above`.
    """

    def __init__(self, params: Mapping[str, np.ndarray], knots: np.ndarray, above: float) -> None:
        super().__init__(params)
        self._column = GLOBAL_FEATURES.index(CUE)
        scaled = percentile_scale(np.full(len(GLOBAL_FEATURES), above), np.asarray(knots, np.float64), np)
        self._threshold = max(0.0, float(scaled[self._column]))  # what was not measured is scaled to 0

    def start(self, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leaves the start where it is."""
        gate, modifier = super().start(code)
        return np.zeros_like(gate), np.zeros_like(modifier)

    def act(
        self, hidden: np.ndarray, group: np.ndarray, run: np.ndarray, context: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raises the learning rates of all groups, or does nothing; arguments as of `NumpyNetwork.act`."""
        rises = run[..., self._column] > self._threshold
        groups = np.zeros((*group.shape[:-1], len(GROUP_CONTROLLED)))
        groups[..., GROUP_CONTROLLED.index("learning_rate")] = RAISE * rises[..., None]
        return groups, np.zeros((*run.shape[:-1], len(GLOBAL_CONTROLLED))), hidden
