"""What a session has to decide with: what is fixed for a run, and what one decision sees.

Shape legend: G parameter group, A controlled group hyperparameter, B controlled global one, S = A + B, V = G · A + B
every value in one vector, F feature, H hidden unit, D descriptor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metalearn.controller.actions import Position, confidence, start_position
from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED, ROLES, ControllerConfig
from metalearn.controller.cues import Cue, CuePolicy, cues_of
from metalearn.controller.observation import Normalizer, budget_descriptors, profile_descriptors
from metalearn.controller.outcome import OutcomeModel
from metalearn.controller.runtime import NumpyNetwork
from metalearn.signals import GLOBAL_FEATURES, SignalFeatures, out_of_range, percentile_scale
from metalearn.spaces import HyperparameterSpace

if TYPE_CHECKING:
    from metalearn.controller.controller import Controller
    from metalearn.profiles import DomainProfile

_VALIDATION_CHANGE = GLOBAL_FEATURES.index("validation_change")


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """Holds what a session reads of its controller, its domain and its loop: fixed for a run.

    Args:
      network: the policy.
      outcome: the outcome model; None if there is none.
      config: of the controller.
      descriptors: [D] scaled.
      family: index of the model family.
      horizon_known: whether the run's length is.
      code: of descriptors and family.
      base: [S] base configuration, in unit ranges.
      roles: int [G].
      bound: bool [G, A] and [B], what the loop lets be changed.
      knots: percentile knots of group and run features.
    """

    network: NumpyNetwork
    outcome: OutcomeModel | None
    config: ControllerConfig
    descriptors: np.ndarray
    family: int
    horizon_known: bool
    code: np.ndarray
    base: np.ndarray
    roles: np.ndarray
    bound: tuple[np.ndarray, np.ndarray]
    knots: tuple[np.ndarray, np.ndarray]

    @cached_property
    def context(self) -> np.ndarray:
        """[G, H] of code and roles, for the policy."""
        return self.network.context(self.code, self.roles)

    @property
    def num_groups(self) -> int:
        """Parameter groups."""
        return len(self.roles)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the values [V], as "learning_rate[0]"."""
        return tuple(f"{n}[{g}]" for g in range(self.num_groups) for n in GROUP_CONTROLLED) + GLOBAL_CONTROLLED

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Of each value [V] the hyperparameter that it is of."""
        return GROUP_CONTROLLED * self.num_groups + GLOBAL_CONTROLLED

    @property
    def free(self) -> np.ndarray:
        """bool [V]: what may be changed."""
        return flat(*self.bound)

    @property
    def cues(self) -> tuple[Cue, ...]:
        """What models of this family go by in mid-run, beside which all is the base; empty where there is a policy."""
        return cues_of(self.config, self.config.rows[self.family], held=not self.horizon_known)

    @property
    def at_rest(self) -> bool:
        """Whether the controller has nothing but the base for models of this family."""
        return self.config.rows[self.family] in self.config.at_rest and not self.cues

    @property
    def confidence(self) -> float:
        """Share of its reach that the controller may use here: 1 in the meta-training range, 0 far outside.

        A cue is of the run and not of the domain: what goes by one has all of its reach everywhere.
        """
        if self.at_rest or self.cues:
            return float(bool(self.cues))
        return float(confidence(out_of_range(self.descriptors, np), np))

    @cached_property
    def names(self) -> tuple[list[list[str]], list[str]]:
        """Of each group, and of the run, what may be changed."""
        in_group, in_run = self.bound
        return [chosen(GROUP_CONTROLLED, row) for row in in_group], chosen(GLOBAL_CONTROLLED, in_run)

    @property
    def max_step(self) -> np.ndarray:
        """[V] largest change in one decision."""
        return self.spread(np.array([h.max_step for h in self.config.space]))

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Lays [S] out as [V], the same for each group; [..., S] likewise."""
        split, lead = len(GROUP_CONTROLLED), values.shape[:-1]
        return flat(np.broadcast_to(values[..., None, :split], (*lead, self.num_groups, split)), values[..., split:])

    def factor(self, hyperparameter: str, shift: float) -> float | None:
        """Returns the factor that a shift in the unit range is; None where the scale is not logarithmic."""
        known = self.config.space[hyperparameter]
        return float((known.high / known.low) ** shift) if known.scale == "log" else None

    def described_by(self, descriptors: np.ndarray) -> Setting:
        """Returns the setting of a domain with other descriptors [D]."""
        return replace(self, descriptors=descriptors, code=self.network.code(descriptors, self.family))


def describe(
    normalizer: Normalizer, profile: DomainProfile, *, horizon: int | None, batch_size: int | None
) -> np.ndarray:
    """Returns [D] the scaled descriptors of a domain and a budget."""
    epoch = profile.num_interactions / batch_size if batch_size else math.nan
    budget = budget_descriptors(
        np.float64(math.nan if horizon is None else horizon / epoch),
        np.float64(math.nan if batch_size is None else batch_size),
        np.float64(profile.num_users),
        np.float64(profile.num_items),
        np,
    )
    raw = np.concatenate([profile_descriptors(profile), budget])
    return percentile_scale(raw, normalizer.descriptors.astype(np.float64), np)


def make_setting(
    controller: Controller,
    profile: DomainProfile,
    space: HyperparameterSpace,
    *,
    roles: Sequence[str],
    withheld: Sequence[Collection[str]] | None,
    family: str | None,
    horizon: int | None,
    batch_size: int | None,
) -> Setting:
    """Reads off a controller, a domain and a loop what a session needs; arguments as of `Controller.start`."""
    config, normalizer, row = (
        controller.config,
        controller.checkpoint.normalizer,
        controller.config.family_index(family),
    )
    descriptors = describe(normalizer, profile, horizon=horizon, batch_size=batch_size)
    kept = withheld if withheld is not None else [()] * len(roles)
    cues = cues_of(config, config.rows[row], held=horizon is None)
    return Setting(
        network=CuePolicy(controller.checkpoint.network, normalizer.run, cues) if cues else controller.network,
        outcome=controller.outcome,
        config=config,
        descriptors=descriptors,
        family=row,
        horizon_known=horizon is not None,
        code=controller.network.code(descriptors, row),
        base=controller.checkpoint.base[row, int(horizon is not None)].astype(np.float64),
        roles=np.array([ROLES.index(role) for role in roles]),
        bound=(
            np.array([[name in space and name not in names for name in GROUP_CONTROLLED] for names in kept]),
            np.array([name in space for name in GLOBAL_CONTROLLED]),
        ),
        knots=(normalizer.group.astype(np.float64), normalizer.run.astype(np.float64)),
    )


def base_position(setting: Setting) -> Position:
    """Returns the base configuration, the same for each group."""
    split = len(GROUP_CONTROLLED)
    group = np.tile(setting.base[:split], (setting.num_groups, 1))
    return Position(group, setting.base[split:], np.zeros_like(group), np.zeros_like(setting.base[split:]))


def starts(setting: Setting, trust: float, initial: Sequence[Mapping[str, float]] | None) -> tuple[Position, Position]:
    """Returns the start configuration, and what to fall back to.

    Args:
      setting: of the run.
      trust: share of its reach that the controller uses.
      initial: per group, values to start from instead of the controller's own, and to fall back to.
    """
    gate, modifier = setting.network.start(setting.code)
    position = start_position(setting.base, gate, np.tanh(modifier), trust, setting.config, setting.num_groups, np)
    base = base_position(setting)
    if initial is None:
        return position, base
    own = np.array(position.group_start)
    for index, given in enumerate(initial):
        for column, name in enumerate(GROUP_CONTROLLED):
            if name in given:
                own[index, column] = setting.config.space[name].encode(given[name])
    return position._replace(group_start=own), base._replace(group_start=own)


class Moment(NamedTuple):
    """What one decision saw, and what the policy made of it."""

    hidden: np.ndarray
    """[G, H] before"""
    group: np.ndarray
    """[G, F] scaled"""
    run: np.ndarray
    """[F] scaled"""
    raw: SignalFeatures
    """the same, unscaled"""
    group_action: np.ndarray
    """[G, A] before tanh"""
    run_action: np.ndarray
    """[B]"""
    trust: float
    """share of its reach that the controller uses"""

    @property
    def validation_change(self) -> float:
        """Relative change of the metric in the interval that ended just now."""
        return float(self.raw.run[_VALIDATION_CHANGE])


class Past(NamedTuple):
    """An earlier decision of the same run, for comparison."""

    index: int
    step: int
    group: np.ndarray
    """[G, F] scaled"""
    run: np.ndarray
    """[F] scaled"""
    move: np.ndarray
    """[V] what it changed, in unit ranges"""
    validation_change: float
    """relative change of the metric in the interval before it, NaN if not measured"""


def flat(group: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Joins [..., G, A] and [..., B] values to [..., V]."""
    return np.concatenate([group.reshape(*group.shape[:-2], -1), run], axis=-1)


def flat_values(position: Position) -> np.ndarray:
    """Returns where a position is, [V] in unit ranges."""
    return flat(position.group_start + position.group_residual, position.global_start + position.global_residual)


def widened(config: ControllerConfig, lead: float) -> ControllerConfig:
    """Returns a config whose trust region is wider by a factor; the start's reach stays."""
    if lead == 1.0:
        return config
    return replace(config, reach=tuple(replace(r, low=r.low * lead, high=r.high * lead) for r in config.reach))


def chosen(names: Sequence[str], mask: np.ndarray) -> list[str]:
    """Returns the names that a mask lets through."""
    return [name for name, on in zip(names, mask.tolist(), strict=True) if on]
