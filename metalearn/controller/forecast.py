"""What a session expects of a change: the outcome model asked about two positions of one run."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from metalearn.controller.actions import Position
from metalearn.controller.outcome import OutcomeDistribution, OutcomeModel, Situation, outcome_inputs
from metalearn.controller.setting import Moment, Setting
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES


class Improvement(NamedTuple):
    """What the outcome model expects of a decision: relative change of the final metric against not taking it.

    The metric is NDCG@10 plus 0.02, as in meta-training. The luck of two runs is in the interval.
    """

    expected: float
    """0.03 is 3 % above"""
    low: float
    """of the central 90 % interval"""
    high: float
    probability: float
    """that it is above 0"""


def forecast_improvement(
    setting: Setting, chosen: Position, otherwise: Position, moment: Moment | None
) -> Improvement | None:
    """Returns what one position is expected to bring over another; None without an outcome model.

    Args:
      setting: of the run.
      chosen, otherwise: what is compared.
      moment: of the decision; None before the first interval.
    """
    if setting.outcome is None:
        return None
    change = _change(setting, setting.outcome, chosen, otherwise, moment)
    expected, low, high = (math.expm1(float(value)) for value in (change.mean, *change.interval(0.9)))
    return Improvement(expected, low, high, float(change.probability_above(0.0)))


def forecast_risk(
    setting: Setting, model: OutcomeModel, chosen: Position, otherwise: Position, moment: Moment, tolerance: float
) -> float:
    """Returns the probability that a run ends worse than the other way by more than a share of its metric."""
    change = _change(setting, model, chosen, otherwise, moment)
    return 1.0 - float(change.probability_above(math.log1p(-tolerance)))


def _change(
    setting: Setting, model: OutcomeModel, chosen: Position, otherwise: Position, moment: Moment | None
) -> OutcomeDistribution:
    in_group, in_run = (np.where(bound, 1.0, math.nan) for bound in setting.bound)
    if moment is None:
        group, run = np.zeros((setting.num_groups, len(GROUP_FEATURES))), np.zeros(len(GLOBAL_FEATURES))
    else:
        group, run = moment.group, moment.run

    masks = Position(in_group, in_run, in_group, in_run)
    situation = Situation(
        descriptors=setting.descriptors,
        family=setting.family,
        horizon_known=setting.horizon_known,
        base=setting.base,
        position=Position(*(np.stack(both) * mask for *both, mask in zip(chosen, otherwise, masks, strict=True))),
        group_mask=np.ones(setting.num_groups),
        curve_known=moment is not None,
        group=group,
        run=run,
        validation=math.nan,
    )
    return model.improvement(*outcome_inputs(situation, setting.config, np))
