"""Whose doing a collapse of validation is: the values' that the run was trained with, or the data's.

A rollback is an experiment. The interval is trained again, and what the bad one had changed is barred. If validation
collapses again, though the values are now those of the last good interval, then they are not to blame: going back once
more would lose more work, and giving the run up to the base schedule would leave it to repair the damage at a rate that
was never meant for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from metalearn.controller.decision import Decision
from metalearn.safety import rollback as rules
from metalearn.safety.rollback import LEVEL_OF, Health, RollbackConfig, RollbackState

SAME_VALUES = 0.1
"""Relative difference up to which a value counts as the one that was in force before."""
EXCUSE = "the data changed, not what the run does; it goes on from here"


def collapsed_alone(config: RollbackConfig, state: RollbackState, health: Health) -> bool:
    """Returns whether a fall of validation is all that is wrong with an interval.

    >>> good = Health(50, 0.6, 0, True, 0.1)
    >>> state = rules.init()._replace(validations=(0.1, 0.101, 0.1, 0.099, 0.1))
    >>> collapsed_alone(RollbackConfig(), state, good._replace(validation=0.02))
    True
    >>> collapsed_alone(RollbackConfig(), state, good._replace(validation=0.02, state_finite=False))
    False
    """
    found = rules.update(config, state, health)[1]
    return bool(found) and not rules.update(config, state, health._replace(validation=math.nan))[1]


def same_values(before: Decision, after: Decision) -> bool:
    """Returns whether a run goes on with the values that it had."""

    def close(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        return one.keys() == other.keys() and all(
            math.isclose(one[name], other[name], rel_tol=SAME_VALUES, abs_tol=1e-9) for name in one
        )

    groups = zip(before.groups, after.groups, strict=True)
    return close(before.run, after.run) and all(close(one, other) for one, other in groups)


def at_new_level(config: RollbackConfig, state: RollbackState, health: Health) -> RollbackState:
    """Returns the state that takes a collapsed validation for the level from here on; its noise stays as it was."""
    state, _ = rules.update(config, state, health._replace(validation=math.nan))
    fall = health.validation - median(state.validations[-LEVEL_OF:])
    return state._replace(validations=tuple(validation + fall for validation in state.validations))
