"""What moved the policy: shares of an action that sum to it.

Shape legend as in `metalearn.controller.setting`, and N contributor, M segment of the path.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from metalearn.controller.setting import Moment, Setting, flat
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES

SEGMENTS = 16
USUAL_MOVE = "usual move"
"""What the network does at the median of everything it sees."""
WENT_BEFORE = "what went before"
"""The recurrent state."""
FAMILY = "model family"


def path_shares(function: Callable[[np.ndarray], np.ndarray], count: int, segments: int = SEGMENTS) -> np.ndarray:
    """Shares f(1, ..., 1) - f(0, ..., 0) out among the arguments: Aumann-Shapley values along the straight line.

    The line is cut into segments. In each the arguments move on one after the other, once in their order and once in
    the reverse, and each gets the mean of the two changes that it makes. These sums telescope: the shares add up to the
    whole whatever the number of segments. As it grows they tend to integrated gradients.

    Args:
      function: [..., N] levels between 0 and 1 to [..., V].
      count: N.
      segments: M.

    Returns:
      [N, V].

    Source: Aumann and Shapley, Values of Non-Atomic Games, 1974; Sundararajan, Taly and Yan, Axiomatic Attribution for
    Deep Networks, ICML 2017.

    >>> path_shares(lambda x: x[..., :1] * x[..., 1:] + 3 * x[..., 1:], 2).ravel().tolist()
    [0.5, 3.5]
    """
    if count == 0:
        return np.zeros((0, function(np.zeros((1, 0))).shape[-1]))
    moved = np.tri(count + 1, count, -1)  # row j: the first j arguments have moved on
    both = np.stack([moved, moved[:, ::-1]])
    levels = (np.arange(segments)[:, None, None, None] + both) / segments  # [M, 2, N + 1, N]
    values = function(levels.reshape(-1, count)).reshape(segments, 2, count + 1, -1)
    changes = np.diff(values, axis=2)
    return 0.5 * (changes[:, 0] + changes[:, 1, ::-1]).sum(0)


def attribute_step(setting: Setting, moment: Moment) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Attributes the policy's step to signals, meta-features and what went before.

    The path leads from the median observation of a median domain, nothing having gone before, to this one.

    Returns:
      Contributions [V] by name, in unit ranges, and the step [V] that they sum to, before any limit.
    """
    descriptors, family = np.flatnonzero(setting.descriptors), int(setting.family > 0)
    columns, run_columns = np.flatnonzero(moment.group.any(0)), np.flatnonzero(moment.run)
    names = [
        *(setting.config.descriptors[i] for i in descriptors),
        *[FAMILY] * family,
        *[WENT_BEFORE] * bool(moment.hidden.any()),
        *(GLOBAL_FEATURES[i] for i in run_columns),
        *(GROUP_FEATURES[i] for i in columns),
    ]
    ends = np.cumsum([len(descriptors), family, bool(moment.hidden.any()), len(run_columns)])

    def step(levels: np.ndarray) -> np.ndarray:
        """Returns the step for each row of levels, one an input: 0 sets it to its median, 1 leaves it as it was."""
        of_domain, of_family, of_past, of_run, of_group = np.split(levels, ends, axis=-1)
        share = np.ones((len(levels), 1))
        group = np.zeros((len(levels), *moment.group.shape))
        group[..., columns] = moment.group[:, columns] * of_group[:, None]
        run = np.zeros((len(levels), len(moment.run)))
        run[:, run_columns] = moment.run[run_columns] * of_run
        hidden = moment.hidden * (of_past if of_past.size else share)[..., None]
        context = setting.network.context(_code(setting, descriptors, of_domain, of_family), setting.roles)
        return _step(setting, moment, setting.network.act(hidden, group, run, context)[:2])

    return _attributed(step, names)


def attribute_start(setting: Setting, trust: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Attributes the start's shift from the base to the meta-features.

    Returns:
      Contributions [V] by name, in unit ranges, and the shift [V] that they sum to, before any limit.
    """
    descriptors, family = np.flatnonzero(setting.descriptors), int(setting.family > 0)
    reach = np.array([reach.start for reach in setting.config.reach])

    def shift(levels: np.ndarray) -> np.ndarray:
        of_domain, of_family = np.split(levels, [len(descriptors)], axis=-1)
        gate, modifier = setting.network.start(_code(setting, descriptors, of_domain, of_family))
        return setting.spread(gate * np.tanh(modifier) * reach * trust)

    return _attributed(shift, [*(setting.config.descriptors[i] for i in descriptors), *[FAMILY] * family])


def _attributed(
    function: Callable[[np.ndarray], np.ndarray], names: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rest, whole = function(np.stack([np.zeros(len(names)), np.ones(len(names))]))
    shares = path_shares(function, len(names))
    return {USUAL_MOVE: rest, **dict(zip(names, shares, strict=True))}, whole


def _code(setting: Setting, descriptors: np.ndarray, of_domain: np.ndarray, of_family: np.ndarray) -> np.ndarray:
    scaled = np.zeros((len(of_domain), len(setting.descriptors)))
    scaled[:, descriptors] = setting.descriptors[descriptors] * of_domain
    share = of_family[:, 0] if of_family.size else np.ones(len(scaled))
    return setting.network.code_towards(scaled, setting.family, share)


def _step(setting: Setting, moment: Moment, action: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return setting.max_step * np.tanh(flat(*action)) * setting.free * moment.trust
