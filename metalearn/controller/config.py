"""The shape of a controller: what it controls, how far, and how big its networks are."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

from metalearn.errors import InvalidArgumentError, SchemaMismatchError
from metalearn.spaces import CANONICAL_SPACE, HyperparameterSpace

ROLES = ("embedding", "dense", "pretrained", "adapter", "head")
"""Roles of parameter groups, in the order of the role embedding."""

GROUP_CONTROLLED = ("learning_rate", "weight_decay", "beta1")
GLOBAL_CONTROLLED = ("dropout",)
CONTROLLED = GROUP_CONTROLLED + GLOBAL_CONTROLLED
"""The part of the canonical vocabulary that this generation of controllers acts on; the rest keeps its default."""
_CONTROLLED_SPACE = CANONICAL_SPACE.subset(CONTROLLED)

OTHER = "other"
"""What stands for a model of none of a controller's families, and for one of which nobody says what it is."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Bounds what may be done to one hyperparameter, in units of its unit range.

    Args:
      start: largest shift of the start configuration from the base prior.
      low, high: trust region of the in-run residual around the start configuration, low < 0 < high.
    """

    start: float
    low: float
    high: float


def _log_units(name: str, factor: float) -> float:
    """The share of a log-scaled hyperparameter's unit range that a factor spans."""
    hyperparameter = CANONICAL_SPACE[name]
    return math.log(factor) / math.log(hyperparameter.high / hyperparameter.low)


DEFAULT_REACH = {
    # The study measured that an unbounded residual saturates at full size: the rate stays within x[1/5, 3] of the base
    # and the decay within x[1/4, 4]; the best decay differs most between domains, so the start may shift it furthest.
    "learning_rate": Reach(
        start=_log_units("learning_rate", 6), low=-_log_units("learning_rate", 5), high=_log_units("learning_rate", 3)
    ),
    "weight_decay": Reach(
        start=_log_units("weight_decay", 12), low=-_log_units("weight_decay", 4), high=_log_units("weight_decay", 4)
    ),
    "beta1": Reach(start=0.3, low=-0.3, high=0.3),
    "dropout": Reach(start=0.4, low=-0.4, high=0.4),
}


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Fixes the architecture of a controller; written into its checkpoint.

    Args:
      hidden_size: units of the recurrent policy, per parameter group.
      code_size: units of the domain code, made of the descriptors.
      num_decisions: decisions in a run whose horizon is known; the interval is the horizon over this.
      descriptors: the meta-features, and after them the budget descriptors, that the controller reads.
      families: model families that have a base of their own.
      decay_to: share of the learning rate that is left at a known horizon. Runs of few epochs over whole domains lose
        by the last part of a full decay: they learn too little in it, and their weights, whose decay goes with the
        rate, shrink too little.
      at_rest: those of them on which the policy does not act: it was not trained on them, or did no good.
      cued: those at rest whose learning rate goes by a cue (`metalearn.controller.cues`); of the others the base is all
        there is.
      cue_above: of the cue, where the rate is raised.
      decay_cued: those at rest whose weight decay goes by another cue, the generalisation gap.
      decay_cue_at: of that cue, where the weight decay is left as it is: raised above, lowered below.
      reach: per controlled hyperparameter.
    """

    hidden_size: int = 32
    code_size: int = 16
    num_decisions: int = 20
    decay_to: float = 0.3
    descriptors: tuple[str, ...]
    families: tuple[str, ...] = ()
    at_rest: tuple[str, ...] = ()
    cued: tuple[str, ...] = ()
    cue_above: float = 1 / 3
    decay_cued: tuple[str, ...] = ()
    decay_cue_at: float = 0.7
    reach: tuple[Reach, ...] = tuple(DEFAULT_REACH[name] for name in CONTROLLED)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "code_size", "num_decisions"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"`{name}` must be a positive int, got {getattr(self, name)}")
        if not 0.0 <= self.decay_to <= 1.0:
            raise InvalidArgumentError(f"`decay_to` must be a share between 0 and 1, got {self.decay_to}")
        if len(set(self.families)) < len(self.families):
            raise InvalidArgumentError(f"`families` must not repeat, got {self.families}")
        if OTHER in self.families:
            raise InvalidArgumentError(f"`families` must not have {OTHER!r}, which stands for any that is not in them")
        if not set(self.at_rest) <= set(self.families):
            raise InvalidArgumentError(f"`at_rest` must be among the families {self.families}, got {self.at_rest}")
        if not 0.0 < self.cue_above < math.inf:
            raise InvalidArgumentError(f"`cue_above` must be a positive number, got {self.cue_above}")
        if not 0.0 < self.decay_cue_at < math.inf:
            raise InvalidArgumentError(f"`decay_cue_at` must be a positive number, got {self.decay_cue_at}")
        for name in ("cued", "decay_cued"):
            if not set(getattr(self, name)) <= set(self.at_rest):
                raise InvalidArgumentError(
                    f"`{name}` must be among those at rest, {self.at_rest}, got {getattr(self, name)}"
                )
        if len(self.reach) != len(CONTROLLED):
            raise InvalidArgumentError(f"`reach` must have one entry for each of {CONTROLLED}, got {len(self.reach)}")

    @property
    def space(self) -> HyperparameterSpace:
        """The controlled hyperparameters, group-scoped ones first."""
        return _CONTROLLED_SPACE

    @property
    def rows(self) -> tuple[str, ...]:
        """The families in the order of the base's and of the family embedding's rows, `OTHER` first."""
        return (OTHER, *self.families)

    def known_family(self, family: str | None) -> str | None:
        """Returns a family if there is a base for it, None for any other."""
        return family if family in self.families else None

    def family_index(self, family: str | None) -> int:
        """Returns a family's row in the base and in the family embedding; 0 is for whatever is in none of them.

        Raises:
          InvalidArgumentError: the family is not one of `families`.
        """
        if family is None:
            return 0
        if family not in self.families:
            raise InvalidArgumentError(
                f"`family` must be one of {list(self.families)}, which this controller has a base for, or None "
                f"for any other, got {family!r}"
            )
        return 1 + self.families.index(family)

    def to_json(self) -> str:
        """Serialises the config, for a checkpoint's header."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ControllerConfig:
        """Rebuilds a config; unknown or missing keys are refused by name.

        Raises:
          SchemaMismatchError: the text is no config of this version.
        """
        names = {field.name for field in fields(cls)}
        try:
            content = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise SchemaMismatchError(f"not a controller config: {error}") from error
        if set(content) != names:
            raise SchemaMismatchError(
                f"controller config has keys {sorted(content)}, this version expects {sorted(names)}; "
                "use the metalearn version named in the checkpoint's header"
            )
        try:
            content["descriptors"] = tuple(content["descriptors"])
            content["families"] = tuple(content["families"])
            content["at_rest"] = tuple(content["at_rest"])
            content["cued"] = tuple(content["cued"])
            content["decay_cued"] = tuple(content["decay_cued"])
            content["reach"] = tuple(Reach(**reach) for reach in content["reach"])
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise SchemaMismatchError(f"not a controller config: {error}") from error
