"""Hyperparameters and the spaces they form: bounds, scales, encoding to the unit cube, JSON.

The canonical vocabulary, `CANONICAL_SPACE`, is what a controller checkpoint speaks. A training loop binds the subset it
has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import ModuleType
from typing import Any, Literal

import numpy as np

from metalearn.errors import InvalidArgumentError, SchemaMismatchError

SPACE_VERSION = 1

Scale = Literal["log", "linear", "logit", "choice"]


@dataclass(frozen=True, kw_only=True)
class Hyperparameter:
    """Describes one hyperparameter: its range, its scale, where it applies and when it may change.

    `encode` maps a value to [0, 1], evenly in the hyperparameter's scale; `decode` is its inverse.

    Args:
      name: the canonical name, as in `learning_rate`.
      low, high: the inclusive range; for `choice` they are 0 and the number of choices less one.
      scale: `log` (low > 0), `linear`, `logit` (0 < low, high < 1) or `choice`.
      default: what a framework uses when nobody chooses.
      scope: `group`, one value per parameter group, or `global`, one for the run.
      when: `start`, fixed once training begins, or `run`, may change at every decision.
      max_step: largest change in one decision, as a share of the unit range.
      choices: the values of a `choice`, in order.

    Raises:
      InvalidArgumentError: bounds, scale and default do not fit each other.

    >>> rate = Hyperparameter(name="learning_rate", low=1e-4, high=1.0, scale="log", default=1e-3, scope="group")
    >>> rate.encode(0.01), rate.decode(0.5)
    (0.5, 0.01)
    """

    name: str
    low: float
    high: float
    scale: Scale
    default: Any
    scope: Literal["group", "global"]
    when: Literal["start", "run"] = "run"
    max_step: float = 0.1
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.scale == "choice":
            if len(self.choices) < 2:
                raise InvalidArgumentError(f"`choices` of {self.name} must hold at least 2 values, got {self.choices}")
            if self.default not in self.choices:
                raise InvalidArgumentError(
                    f"`default` of {self.name} must be one of {self.choices}, got {self.default}"
                )
            return
        ok = {"log": self.low > 0, "logit": self.low > 0 and self.high < 1, "linear": True}.get(self.scale)
        if ok is None:
            raise InvalidArgumentError(
                f"`scale` of {self.name} must be log, linear, logit or choice, got {self.scale!r}"
            )
        if not ok or not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InvalidArgumentError(
                f"bounds of {self.name} must be finite, ordered and fit scale {self.scale!r}, "
                f"got [{self.low}, {self.high}]"
            )
        if not self.low <= self.default <= self.high:
            raise InvalidArgumentError(
                f"`default` of {self.name} must be in [{self.low}, {self.high}], got {self.default}"
            )

    def _forward(self, value: Any, xp: ModuleType) -> Any:
        if self.scale == "log":
            return xp.log(value)
        if self.scale == "logit":
            return xp.log(value) - xp.log1p(-value)
        return value

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """The bounds on the scale."""
        return float(self._forward(self.low, np)), float(self._forward(self.high, np))

    def _inverse(self, value: Any, xp: ModuleType) -> Any:
        if self.scale == "log":
            return xp.exp(value)
        if self.scale == "logit":
            return 1 / (1 + xp.exp(-value))
        return value

    def encode(self, value: Any, xp: ModuleType = np) -> Any:
        """Maps a value, or an array of values, to the unit interval; values out of range are clipped.

        Args:
          value: a number, an array, or for `choice` one of the choices.
          xp: `numpy` or `jax.numpy`.

        Raises:
          InvalidArgumentError: the value is NaN, or not among the choices.
        """
        if self.scale == "choice":
            if value not in self.choices:
                raise InvalidArgumentError(f"{self.name} must be one of {self.choices}, got {value!r}")
            return (self.choices.index(value) + 0.5) / len(self.choices)
        if xp is np and np.isnan(value).any():
            raise InvalidArgumentError(f"{self.name} must be a number in [{self.low}, {self.high}], got {value!r}")
        low, high = self._ends
        unit = (self._forward(xp.clip(value, self.low, self.high), xp) - low) / (high - low)
        return float(unit) if xp is np and np.ndim(unit) == 0 else unit

    def decode(self, unit: Any, xp: ModuleType = np) -> Any:
        """Maps the unit interval back to a value, clipped to the bounds; for `choice` to the nearest choice."""
        if self.scale == "choice":
            return self.choices[int(np.clip(float(unit) * len(self.choices), 0, len(self.choices) - 1))]
        low, high = self._ends
        value = self._inverse(low + xp.minimum(xp.maximum(unit, 0.0), 1.0) * (high - low), xp)
        value = xp.minimum(xp.maximum(value, self.low), self.high)
        return float(f"{float(value):.12g}") if xp is np and np.ndim(value) == 0 else value

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"choices": list(self.choices)}


@dataclass(frozen=True)
class HyperparameterSpace:
    """Orders hyperparameters into an immutable, versioned space.

    Args:
      hyperparameters: in the order of the encoding.
      version: the vocabulary's version; checkpoints refuse another one.

    Raises:
      InvalidArgumentError: two hyperparameters share a name, or there are none.

    >>> space = CANONICAL_SPACE.subset(["learning_rate", "dropout"])
    >>> space.names
    ('learning_rate', 'dropout')
    >>> HyperparameterSpace.from_json(space.to_json()) == space
    True
    """

    hyperparameters: tuple[Hyperparameter, ...]
    version: int = SPACE_VERSION

    def __post_init__(self) -> None:
        if not self.hyperparameters:
            raise InvalidArgumentError("`hyperparameters` is empty; a space needs at least one")
        repeated = {name for name in self.names if self.names.count(name) > 1}
        if repeated:
            raise InvalidArgumentError(
                f"`hyperparameters` holds {sorted(repeated)} more than once; names must be unique"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of the encoding."""
        return tuple(h.name for h in self.hyperparameters)

    def __len__(self) -> int:
        return len(self.hyperparameters)

    def __iter__(self):
        return iter(self.hyperparameters)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Hyperparameter:
        for hyperparameter in self.hyperparameters:
            if hyperparameter.name == name:
                return hyperparameter
        raise InvalidArgumentError(f"no hyperparameter {name!r} in this space; it has {list(self.names)}")

    def subset(self, names: Iterable[str]) -> HyperparameterSpace:
        """Returns the space of the named hyperparameters, in this space's order."""
        wanted = {name: self[name] for name in names}
        return HyperparameterSpace(tuple(h for h in self if h.name in wanted), self.version)

    def mask(self, bound: Iterable[str]) -> np.ndarray:
        """Returns bool [H], true where a hyperparameter is among the names `bound`."""
        names = set(bound)
        return np.array([h.name in names for h in self])

    def encode(self, configuration: Mapping[str, Any]) -> np.ndarray:
        """Encodes a configuration to float64 [H] in the unit cube; every hyperparameter must be present."""
        missing = [name for name in self.names if name not in configuration]
        unknown = [name for name in configuration if name not in self]
        if missing or unknown:
            raise InvalidArgumentError(
                f"`configuration` lacks {missing} and has unknown {unknown}; pass exactly {list(self.names)}"
            )
        return np.array([h.encode(configuration[h.name]) for h in self], dtype=np.float64)

    def decode(self, unit: np.ndarray) -> dict[str, Any]:
        """Decodes float [H] in the unit cube to a configuration."""
        unit = np.asarray(unit, dtype=np.float64)
        if unit.shape != (len(self),):
            raise InvalidArgumentError(f"`unit` must have shape ({len(self)},), got {unit.shape}")
        if not np.isfinite(unit).all():
            raise InvalidArgumentError(f"`unit` must be finite, got {unit}")
        return {h.name: h.decode(value) for h, value in zip(self, unit, strict=True)}

    def defaults(self) -> dict[str, Any]:
        """Returns what frameworks use when nobody chooses."""
        return {h.name: h.default for h in self}

    def to_json(self) -> str:
        """Serialises the space, bounds and all."""
        return json.dumps({"version": self.version, "hyperparameters": [h.as_dict() for h in self]})

    @classmethod
    def from_json(cls, text: str) -> HyperparameterSpace:
        """Rebuilds a space written by `to_json`.

        Raises:
          SchemaMismatchError: the text is of another version, or not a space.
        """
        try:
            content = json.loads(text)
            version = content["version"]
            if version == SPACE_VERSION:
                rows = [{**row, "choices": tuple(row["choices"])} for row in content["hyperparameters"]]
                return cls(tuple(Hyperparameter(**row) for row in rows), version)
        except (ValueError, KeyError, TypeError) as error:
            raise SchemaMismatchError(f"not a hyperparameter space: {error}") from error
        raise SchemaMismatchError(
            f"space version must be {SPACE_VERSION}, got {version}; use a metalearn that wrote it"
        )


def _group(name: str, low: float, high: float, scale: Scale, default: Any, **options: Any) -> Hyperparameter:
    return Hyperparameter(name=name, low=low, high=high, scale=scale, default=default, scope="group", **options)


def _global(name: str, low: float, high: float, scale: Scale, default: Any, **options: Any) -> Hyperparameter:
    return Hyperparameter(name=name, low=low, high=high, scale=scale, default=default, scope="global", **options)


def _choice(name: str, choices: tuple[Any, ...], default: Any, scope: Literal["group", "global"]) -> Hyperparameter:
    return Hyperparameter(
        name=name, low=0, high=len(choices) - 1, scale="choice", default=default, scope=scope, choices=choices
    )


CANONICAL_SPACE = HyperparameterSpace(
    (
        _group("learning_rate", 1e-5, 1.0, "log", 1e-3, max_step=0.06),
        _group("weight_decay", 1e-4, 10.0, "log", 1e-2, max_step=0.06),
        _group("beta1", 0.5, 0.99, "logit", 0.9, max_step=0.06),
        _choice("trainable", (False, True), True, "group"),
        _global("dropout", 0.0, 0.7, "linear", 0.0, max_step=0.06),
        _global("batch_size", 16, 65536, "log", 256),
        _global("num_negatives", 1, 1024, "log", 1),
        _global("grad_clip", 1e-2, 1e2, "log", 1e2),
        _choice("accumulation", (1, 2, 4, 8, 16, 32), 1, "global"),
        _choice("precision", ("fp32", "tf32", "bf16", "fp16"), "fp32", "global"),
        _global("embedding_dim", 4, 1024, "log", 64, when="start"),
        _choice("early_stop", (False, True), False, "global"),
    )
)
"""The vocabulary that checkpoints speak; weight decay is decoupled (AdamW's), its lower bound stands for none."""
