"""The outcome model in NumPy: what a run will end at, as a distribution, before its first step and at every decision.

What is predicted is the score of meta-training, y = log((NDCG + c) / (popularity + c)) at the end of the run, and not
the run's advantage over the base schedule. It was weighed against the three uses:

- Candidates are ranked, and a change in mid-run judged, by *differences* of outcomes on one domain. In a difference the
  floor of popularity cancels: log((NDCG + c) / (NDCG' + c)) is left, so that serving never needs to know the floor, and
  the base is one more configuration to predict. A target relative to the base would say the same at twice the price,
  a base run for every task, and would carry that run's noise.
- Domains differ by more than configurations do, which would drown the differences. So a prediction has two deviations:
  what runs of one task *share* (how hard the domain is) and what each run has of its *own*. They are fitted by the
  joint likelihood of the runs of a task, y_j = mean_j + shared_j · u + own_j · v_j with u, v_j standard normal, which
  weighs contrasts within a task as they deserve; in a difference what is shared cancels.
- An explanation says "expected to end 40 % above popularity", exp(y) - 1, which means something on its own.

Where the floor is known (the loop reports the metric of popularity on its validation set) the best validation so far is
read relative to it; where it is not, a mask says so.

Shape legend: G parameter group, F feature, D descriptor, S start value, K ensemble member, I input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Position, relative_residual
from metalearn.controller.config import CONTROLLED, GROUP_CONTROLLED, ControllerConfig
from metalearn.errors import InvalidArgumentError
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES

METRIC_OFFSET = 0.02
"""c of the score log((NDCG + c) / (popularity + c)), also meta-training's reward: keeps low NDCG from ruling."""

PREFIX = "outcome/"
CURVE_KNOWN, FLOOR_KNOWN, HORIZON_KNOWN, VALIDATION = range(4)
"""Columns of the inputs that others rely on."""
FIRST_DESCRIPTOR = 4
MIN_STD = 1e-3
"""Of each part of a member's deviation, as a share of the training outcomes' deviation."""
_PRECISION, _MOST_STEPS = 1e-8, 100
"""Of a quantile, as a share of its bracket, and within how many steps: mostly four, where a finer one takes thirteen,
since it lies in the noise of rounding."""
_ROOT_HALF, _DENSITY_AT_MEAN = math.sqrt(0.5), 1.0 / math.sqrt(2.0 * math.pi)
_erf = np.frompyfunc(math.erf, 1, 1)


@dataclass(frozen=True, kw_only=True)
class OutcomeConfig:
    """Fixes the architecture of an outcome model.

    Args:
      num_members: networks in the ensemble.
      hidden_sizes: units of each hidden layer.
    """

    num_members: int = 5
    hidden_sizes: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        if self.num_members < 1:
            raise InvalidArgumentError(f"`num_members` must be a positive int, got {self.num_members}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise InvalidArgumentError(f"`hidden_sizes` must be positive ints, at least one, got {self.hidden_sizes}")

    def shapes(self, controller: ControllerConfig) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter by name, for whoever reads them from a file."""
        sizes = (len(input_names(controller)), *self.hidden_sizes, 3)
        names = [f"hidden_{index}" for index in range(len(self.hidden_sizes))] + ["head"]
        shapes: dict[str, tuple[int, ...]] = {f"{PREFIX}target": (2,), f"{PREFIX}temperature": (2,)}
        for name, fan_in, fan_out in zip(names, (*sizes[:-2], sizes[-2] + sizes[0]), sizes[1:], strict=True):
            shapes[f"{PREFIX}{name}/kernel"] = (self.num_members, fan_in, fan_out)
            shapes[f"{PREFIX}{name}/bias"] = (self.num_members, fan_out)
        return shapes


def outcome_config(tensors: Mapping[str, np.ndarray]) -> OutcomeConfig:
    """Reads the architecture off the tensors of a file; tensors that are not those of any give one they do not fit."""
    widths = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(f"{PREFIX}hidden_")}
    biases = [widths.get(f"{PREFIX}hidden_{index}/bias", ()) for index in range(len(widths) // 2)]
    shapes = [shape for shape in biases if len(shape) == 2 and min(shape) > 0]
    if not shapes:
        return OutcomeConfig()
    return OutcomeConfig(num_members=shapes[0][0], hidden_sizes=tuple(shape[1] for shape in shapes))


class Situation(NamedTuple):
    """Where a run stands and with what it goes on; leading axes (candidates, say) broadcast against each other."""

    descriptors: Any
    """[..., D] percentile-scaled"""
    family: Any
    """int [...], see `ControllerConfig.family_index`"""
    horizon_known: Any
    """bool [...]"""
    base: Any
    """[..., S] base configuration in unit ranges of this family and knowledge of the horizon"""
    position: Position
    """[..., G, A] and [..., B]: the configuration in force from now on; NaN for what is not ours to set"""
    group_mask: Any
    """[..., G], 1 for groups that exist, 0 for padding"""
    curve_known: Any
    """bool [...], False before the first interval: then the fields below are not read"""
    group: Any
    """[..., G, F] percentile-scaled group features of the interval that ended just now"""
    run: Any
    """[..., F] percentile-scaled run features"""
    validation: Any
    """[...] from `relative_metric` of the best validation so far; NaN if it or the floor is unknown"""


def relative_metric(metric: Any, floor: Any, xp: ModuleType) -> Any:
    """Returns log((metric + c) / (floor + c)), the scale of outcomes.

    >>> round(float(relative_metric(0.10, 0.04, np)), 4)
    0.6931
    """
    return xp.log((metric + METRIC_OFFSET) / (floor + METRIC_OFFSET))


def input_names(config: ControllerConfig) -> tuple[str, ...]:
    """Returns the names of the inputs, in order."""
    return (
        "curve_known",
        "floor_known",
        "horizon_known",
        "validation_above_popularity",
        *config.descriptors,
        *(f"family_{name}" for name in config.rows),
        *(f"start_{name}" for name in CONTROLLED),
        *(f"residual_{name}" for name in CONTROLLED),
        *(f"run_{name}" for name in GLOBAL_FEATURES),
        *(f"group_{name}" for name in GROUP_FEATURES),
    )


def outcome_inputs(situation: Situation, config: ControllerConfig, xp: ModuleType) -> Any:
    """Lays a situation out as the vector that the outcome model reads; one code path for fitting and serving.

    Starts count from the base in units of their reach, residuals as shares of the trust region; values and features of
    parameter groups are averaged over the groups that have them. What is unknown is 0, with a mask where that could be
    taken for a value.

    Args:
      situation: what is known.
      config: of the controller.
      xp: `numpy` or `jax.numpy`.

    Returns:
      [..., I], in the order of `input_names`.
    """
    dtype = situation.descriptors.dtype
    mask = xp.asarray(situation.group_mask, dtype)[..., None]
    reach = xp.asarray([reach.start for reach in config.reach], dtype)
    split = len(GROUP_CONTROLLED)

    def known(values: Any) -> Any:
        return xp.where(xp.isfinite(values), values, xp.zeros((), dtype))

    def pooled(values: Any) -> Any:
        weight = mask * xp.asarray(xp.isfinite(values), dtype)
        return (weight * known(values)).sum(-2) / xp.maximum(weight.sum(-2), 1.0)

    position, base = situation.position, situation.base
    group_start = position.group_start - base[..., None, :split]
    group_residual, global_residual = relative_residual(position, config, xp)
    curve = xp.asarray(situation.curve_known, dtype)
    floor = curve * xp.asarray(xp.isfinite(situation.validation), dtype)
    masks = (curve, floor, xp.asarray(situation.horizon_known, dtype), floor * known(situation.validation))
    rows = xp.arange(1 + len(config.families))
    parts = (
        *(column[..., None] for column in masks),
        situation.descriptors,
        xp.asarray(xp.asarray(situation.family)[..., None] == rows, dtype),
        pooled(group_start) / reach[:split],
        known(position.global_start - base[..., split:]) / reach[split:],
        pooled(group_residual),
        known(global_residual),
        curve[..., None] * known(situation.run),
        curve[..., None] * pooled(situation.group),
    )
    shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    zeros = xp.zeros((*shape, 1), dtype)  # to add them takes a fraction of the time of `broadcast_to`
    return xp.concatenate([part if part.shape[:-1] == shape else part + zeros for part in parts], axis=-1)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.asarray(_erf(z * math.sqrt(0.5)), np.float64))


@dataclass(frozen=True, eq=False)
class OutcomeDistribution:
    """An even mixture of normal distributions, one an ensemble member.

    Args:
      component_mean: [..., K].
      component_std: [..., K].

    >>> outcome = OutcomeDistribution(np.array([0.0, 2.0]), np.array([1.0, 1.0]))
    >>> float(outcome.mean), round(float(outcome.std), 4), round(float(outcome.quantile(0.5)), 4)
    (1.0, 1.4142, 1.0)
    >>> round(float(outcome.probability_above(1.0)), 4)
    0.5
    """

    component_mean: np.ndarray
    component_std: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Expected outcome, [...]."""
        return self.component_mean.mean(-1)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, [...]: of outcomes by each member, and of the members among each other."""
        return np.sqrt(np.square(self.component_std).mean(-1) + self.component_mean.var(-1))

    def probability_above(self, x: Any) -> np.ndarray:
        """Returns the probability that the outcome exceeds `x`, which broadcasts against [...]."""
        z = (self.component_mean - np.asarray(x, np.float64)[..., None]) / self.component_std
        return _normal_cdf(z).mean(-1)

    def quantile(self, p: float) -> np.ndarray:
        """Returns what the outcome stays below with probability `p`, [...].

        Raises:
          InvalidArgumentError: `p` is not strictly between 0 and 1.
        """
        if not 0.0 < p < 1.0:
            raise InvalidArgumentError(f"`p` must be strictly between 0 and 1, got {p}; pass 0.5 for the median")
        return self._quantiles(p)[..., 0]

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the central interval that holds the outcome with probability `level`.

        Raises:
          InvalidArgumentError: `level` is not strictly between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise InvalidArgumentError(f"`level` must be strictly between 0 and 1, got {level}; pass 0.9 for 90 %")
        both = self._quantiles(0.5 - 0.5 * level, 0.5 + 0.5 * level)
        return both[..., 0], both[..., 1]

    def _quantiles(self, *levels: float) -> np.ndarray:
        """Returns quantiles [..., P]."""
        normals = [NormalDist().inv_cdf(level) for level in levels]
        both = np.broadcast_arrays(self.component_mean, self.component_std)
        means, stds = (part.reshape(-1, part.shape[-1]).tolist() for part in both)
        found = [
            [_mixture_quantile(mean, std, level, z) for level, z in zip(levels, normals, strict=True)]
            for mean, std in zip(means, stds, strict=True)
        ]
        return np.array(found).reshape(*self.component_mean.shape[:-1], len(levels))


def _mixture_quantile(mean: list[float], std: list[float], level: float, z: float) -> float:
    """Returns a quantile of an even mixture of normal distributions, by Newton's method inside a bracket.

    In plain Python: a mixture of five takes a tenth of the time that it takes NumPy.

    Args:
      mean, std: of the components.
      level: probability below the quantile.
      z: that quantile of the standard normal distribution.
    """
    of_components = [m + z * s for m, s in zip(mean, std, strict=True)]
    low, high = min(of_components), max(of_components)
    if not low < high:  # also where one is not a number
        return low
    closest = _PRECISION * (high - low)
    x, target = sum(of_components) / len(mean), level * len(mean)
    for _ in range(_MOST_STEPS):
        excess, slope = -target, 0.0
        for m, s in zip(mean, std, strict=True):
            deviation = (x - m) / s
            excess += 0.5 * math.erfc(-_ROOT_HALF * deviation)
            slope += math.exp(-0.5 * deviation * deviation) / s
        low, high = (x, high) if excess < 0.0 else (low, x)
        slope *= _DENSITY_AT_MEAN
        after = x - excess / slope if slope > 0.0 else low
        if not low < after < high:
            after = 0.5 * (low + high)
        if abs(after - x) <= closest:
            return after
        x = after
    return x


class OutcomeModel:
    """Predicts a run's outcome, log((NDCG + c) / (popularity + c)) at its end, in float64.

    Args:
      params: flat mapping "outcome/<module>/<parameter>" -> array, from `metalearn.meta_training.outcome.fit_outcome`
        or a file; other names are left alone.

    Raises:
      InvalidArgumentError: a parameter is missing.
    """

    def __init__(self, params: Mapping[str, np.ndarray]) -> None:
        self._params = {
            name.removeprefix(PREFIX): np.asarray(value, np.float64)
            for name, value in params.items()
            if name.startswith(PREFIX)
        }
        depth = sum(name.startswith("hidden_") and name.endswith("/kernel") for name in self._params)
        self._layers = [*(f"hidden_{index}" for index in range(depth)), "head"]
        needed = {f"{layer}/{part}" for layer in self._layers for part in ("kernel", "bias")}
        missing = (needed | {"target", "temperature"}) - set(self._params)
        if missing:
            raise InvalidArgumentError(
                f"`params` has no {[PREFIX + name for name in sorted(missing)]}; pass what fit_outcome returned"
            )

    @property
    def training_mean(self) -> float:
        """Mean outcome of the episodes that it was fitted on."""
        return float(self._params["target"][0])

    def predict(self, inputs: np.ndarray) -> OutcomeDistribution:
        """Predicts the outcome of one run in each situation.

        Args:
          inputs: [..., I] from `outcome_inputs`.
        """
        mean, own, shared = self.members(inputs)
        return self._tempered(mean, np.hypot(own, shared), inputs)

    def improvement(self, inputs: np.ndarray, reference: np.ndarray) -> OutcomeDistribution:
        """Predicts by how much a run ends above another one of the same task.

        Above 0 it is better; x stands for a metric, the offset added, exp(x) times as high. Members are compared with
        themselves and what runs of a task share cancels, so that this is far more certain than two predictions are. The
        luck of both runs is in it. That of a run with itself, gone on with another way, is less: a probability of harm
        in mid-run errs to the careful side.

        Args:
          inputs: [..., I] from `outcome_inputs`.
          reference: [..., I] for the base, or for going on without a change.
        """
        pair = (inputs, reference) if inputs.shape == reference.shape else np.broadcast_arrays(inputs, reference)
        both = self.members(np.stack(pair))
        (mean, other_mean), (own, other_own), (shared, other_shared) = both
        std = np.sqrt(own**2 + other_own**2 + (shared - other_shared) ** 2)
        return self._tempered(mean - other_mean, std, inputs)

    def members(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns each member's mean, own and shared standard deviation before the temperature, each [..., K]."""
        inputs = np.asarray(inputs, np.float64)
        x = inputs.reshape(1, -1, inputs.shape[-1])
        hidden = x
        for layer in self._layers[:-1]:
            hidden = self._dense(layer, hidden)
            hidden = hidden * 0.5 * (1.0 + np.tanh(0.5 * hidden))
        skip = np.broadcast_to(x, (*hidden.shape[:-1], x.shape[-1]))
        output = self._dense("head", np.concatenate([hidden, skip], axis=-1))
        location, scale = self._params["target"]
        mean, own, shared = output.T.reshape(3, *inputs.shape[:-1], -1)
        return location + scale * mean, scale * _positive(own), scale * _positive(shared)

    def _dense(self, layer: str, x: np.ndarray) -> np.ndarray:
        return x @ self._params[f"{layer}/kernel"] + self._params[f"{layer}/bias"][:, None]

    def _tempered(self, mean: np.ndarray, std: np.ndarray, inputs: np.ndarray) -> OutcomeDistribution:
        """Widens the mixture about its mean by the temperature of the start, or of the run."""
        in_run = np.asarray(inputs)[..., CURVE_KNOWN] > 0
        temperature = np.where(in_run, self._params["temperature"][1], self._params["temperature"][0])[..., None]
        centre = mean.mean(-1, keepdims=True)
        return OutcomeDistribution(centre + temperature * (mean - centre), temperature * std)


def _positive(x: np.ndarray) -> np.ndarray:
    return MIN_STD + np.logaddexp(0.0, x)
