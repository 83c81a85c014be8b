"""What a training step costs on a machine: seconds, memory and energy, by a model fitted to measured steps.

    seconds = overhead + bytes · seconds_per_byte + flops · seconds_per_flop + samples · seconds_per_sample

A sum rather than a roofline's maximum: the optimizer goes through the tables after the batch is done, not beside it.

Shape legend: P parameter, B sample of a batch, D embedding dimension, K = 4 term, M measurement.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from envs.recommenders import MatrixFactorization
from metalearn.errors import InvalidArgumentError

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by precision, of weights and moments alike."""
PASSES = 8
"""Times that a dense AdamW step goes through the parameters: gradient cleared; weight, gradient and both moments read;
weight and both moments written."""
FLOPS = 12
"""Operations by sample and dimension of BPR: difference, product, sum and dropout, and twice as many backward."""


class Workload(NamedTuple):
    """What a step does; numbers may be arrays, traced ones too."""

    num_parameters: Any
    batch_size: Any
    dim: Any
    precision: str = "float32"


class StepMeasurement(NamedTuple):
    """One measured step."""

    workload: Workload
    seconds: float
    memory: float
    """bytes of weights, gradients, optimizer state and what is kept for the backward pass"""


class StepCost(NamedTuple):
    """Coefficients of one precision, none negative; the term that each belongs to is in `terms`."""

    overhead: float
    """seconds of launching kernels, whatever their size"""
    seconds_per_byte: float
    """1 / bandwidth"""
    seconds_per_flop: float
    """1 / rate"""
    seconds_per_sample: float
    """of gathering and scattering a sample's rows"""
    base_bytes: float
    bytes_per_parameter_byte: float
    """copies of the weights that are held, gradient and moments included"""
    bytes_per_flop: float
    """of what is kept for the backward pass, likewise below"""
    bytes_per_sample: float


def terms(workload: Workload) -> tuple[Any, Any, Any, Any]:
    """Returns the terms of time and memory: 1, bytes moved, flops and samples of a step.

    >>> terms(Workload(num_parameters=1000, batch_size=10, dim=8))
    (1.0, 32000, 960, 10)
    """
    moved = PASSES * ITEM_BYTES[workload.precision] * workload.num_parameters
    return 1.0, moved, FLOPS * workload.batch_size * workload.dim, workload.batch_size


@dataclass(frozen=True, kw_only=True)
class HardwareModel:
    """Predicts what a step costs on one device.

    Args:
      device: name, for the record.
      costs: coefficients by precision.
      power: watts drawn in training; None if unknown.

    Example:
      >>> cost = StepCost(1e-3, 1e-9, 0.0, 0.0, 0.0, 4.0, 0.0, 8.0)
      >>> model = HardwareModel(device="cpu", costs={"float32": cost}, power=20.0)
      >>> workload = Workload(num_parameters=1_000_000, batch_size=512, dim=32)
      >>> round(model.seconds(workload), 6), model.memory(workload), round(model.energy(workload), 3)
      (0.033, 16004096.0, 0.66)
    """

    device: str
    costs: Mapping[str, StepCost]
    power: float | None = None

    def __post_init__(self) -> None:
        for precision, cost in self.costs.items():
            if min(cost) < 0.0:
                raise InvalidArgumentError(f"`costs` must not be negative, got {cost} for {precision}")
        if self.power is not None and self.power <= 0.0:
            raise InvalidArgumentError(f"`power` must be above 0 watts, got {self.power}; leave it out if unknown")

    def seconds(self, workload: Workload) -> Any:
        """Returns the seconds of a step."""
        return _dot(terms(workload), self._cost(workload)[:4])

    def memory(self, workload: Workload) -> Any:
        """Returns the bytes that a step needs."""
        one, moved, flops, samples = terms(workload)
        return _dot((one, moved / PASSES, flops, samples), self._cost(workload)[4:])

    def energy(self, workload: Workload) -> Any:
        """Returns the joules of a step: power · seconds.

        Raises:
          InvalidArgumentError: the model has no power.
        """
        if self.power is None:
            raise InvalidArgumentError("`power` is not known; give the model the watts that the device draws")
        return self.power * self.seconds(workload)

    def _cost(self, workload: Workload) -> StepCost:
        if workload.precision not in self.costs:
            raise InvalidArgumentError(
                f"`precision` must be one of {sorted(self.costs)}, got {workload.precision!r}; measure it first"
            )
        return self.costs[workload.precision]


def fit_hardware(
    measurements: Iterable[StepMeasurement], *, device: str = "cpu", power: float | None = None
) -> HardwareModel:
    """Fits a model by non-negative least squares on relative error, each precision apart.

    min over w ≥ 0 of Σ_m (terms_m · w / measured_m - 1)², for seconds and for memory.

    Args:
      measurements: at least four of each precision, over several sizes.
      device, power: as in `HardwareModel`.

    Raises:
      InvalidArgumentError: fewer than four measurements of a precision, or one that is not positive.
    """
    by_precision: dict[str, list[StepMeasurement]] = {}
    for measurement in measurements:
        if not (measurement.seconds > 0.0 and measurement.memory > 0.0):
            raise InvalidArgumentError(f"`measurements` must be of positive seconds and memory, got {measurement}")
        by_precision.setdefault(measurement.workload.precision, []).append(measurement)
    if not by_precision:
        raise InvalidArgumentError("`measurements` must not be empty; take them with `measure_steps`")
    costs = {}
    for precision, rows in by_precision.items():
        if len(rows) < 4:
            raise InvalidArgumentError(
                f"`measurements` must be 4 or more of each precision, got {len(rows)} of {precision}"
            )
        matrix = np.array([terms(row.workload) for row in rows], np.float64)
        seconds = _fit_relative(matrix, np.array([row.seconds for row in rows]))
        memory = _fit_relative(matrix / (1.0, PASSES, 1.0, 1.0), np.array([row.memory for row in rows]))
        costs[precision] = StepCost(*seconds.tolist(), *memory.tolist())
    return HardwareModel(device=device, costs=costs, power=power)


def relative_errors(model: HardwareModel, measurements: Sequence[StepMeasurement]) -> tuple[np.ndarray, np.ndarray]:
    """Returns |predicted / measured - 1| of seconds and of memory, each [M]."""
    seconds = [model.seconds(row.workload) / row.seconds for row in measurements]
    memory = [model.memory(row.workload) / row.memory for row in measurements]
    return np.abs(np.array(seconds) - 1.0), np.abs(np.array(memory) - 1.0)


def measure_steps(
    *,
    entities: Sequence[int],
    dims: Sequence[int],
    batch_sizes: Sequence[int],
    precisions: Sequence[str] = ("float32",),
    device: str = "cpu",
    rounds: int = 5,
    seed: int = 0,
    on_round: Callable[[int], object] | None = None,
) -> list[StepMeasurement]:
    """Times training steps of BPR matrix factorisation with AdamW over a grid: forward, backward, update.

    Of each grid point the fastest of `rounds` medians counts, the rounds spread over the whole measurement: what else
    the machine does can only slow a step. Drawing the batch is not part of the step.

    Args:
      entities: users and items together.
      dims: embedding dimensions.
      batch_sizes: triples per step.
      precisions: names of torch dtypes, of weights and moments alike.
      device: of torch.
      rounds: times that the grid is gone through.
      seed: of weights and batches.
      on_round: called with the number of rounds done.

    Raises:
      InvalidArgumentError: a precision that is not in `ITEM_BYTES`.
    """
    if unknown := set(precisions) - ITEM_BYTES.keys():
        raise InvalidArgumentError(f"`precisions` must be among {sorted(ITEM_BYTES)}, got {sorted(unknown)}")
    grid = list(itertools.product(precisions, entities, dims, batch_sizes))
    fastest: dict[int, StepMeasurement] = {}
    for index in range(rounds):
        for point, (precision, size, dim, batch_size) in enumerate(grid):
            steps = _Steps(size, dim, batch_size, precision, device, seed)
            row = StepMeasurement(steps.workload, steps.time(), steps.memory())
            if point not in fastest or row.seconds < fastest[point].seconds:
                fastest[point] = row
        if on_round is not None:
            on_round(index + 1)
    return [fastest[point] for point in range(len(grid))]


class _Steps:
    """A model in training on random triples, for the clock."""

    def __init__(self, entities: int, dim: int, batch_size: int, precision: str, device: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        users, items = entities // 2, entities - entities // 2
        model = MatrixFactorization(users, items, dim, dropout=0.1, generator=generator)
        self._model = model.to(device, getattr(torch, precision))
        self._optimizer = torch.optim.AdamW(self._model.parameter_groups())
        self._sizes, self._batch_size, self._generator, self._device = (
            (users, items, items),
            batch_size,
            generator,
            device,
        )
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.workload = Workload(parameters, batch_size, dim, precision)

    def _batch(self) -> list[torch.Tensor]:
        shape = (self._batch_size,)
        return [torch.randint(size, shape, generator=self._generator).to(self._device) for size in self._sizes]

    def _synchronize(self) -> None:
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize(self._device)

    def time(self, steps: int = 5, warm_up: int = 2) -> float:
        """Returns the median seconds of some steps."""
        seconds = []
        for _ in range(warm_up + steps):
            batch = self._batch()
            self._synchronize()
            began = time.perf_counter()
            self._model(*batch).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._synchronize()
            seconds.append(time.perf_counter() - began)
        return float(np.median(seconds[warm_up:]))

    def memory(self) -> float:
        """Returns the bytes of weights, gradients, optimizer state, and tensors kept for the backward pass."""
        held = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._model(*self._batch())
        loss.backward()
        tensors = [tensor for parameter in self._model.parameters() for tensor in (parameter, parameter.grad)]
        tensors += [value for state in self._optimizer.state.values() for value in state.values()]
        self._optimizer.zero_grad()
        return float(sum(tensor.nbytes for tensor in tensors if tensor is not None) + sum(kept.values()))


def _dot(numbers: Sequence[Any], weights: Sequence[float]) -> Any:
    return sum(number * weight for number, weight in zip(numbers, weights, strict=True))


def _fit_relative(matrix: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Solves min over w ≥ 0 of |diag(1 / measured) matrix w - 1|, [K], exactly: by going through all sets of terms."""
    rows = matrix / measured[:, None]
    scale = np.linalg.norm(rows, axis=0)
    rows = rows / np.where(scale > 0.0, scale, 1.0)
    best, best_error = np.zeros(rows.shape[1]), float(len(rows))
    for chosen in itertools.product((False, True), repeat=rows.shape[1]):
        weights = np.zeros(rows.shape[1])
        if any(chosen):
            weights[np.array(chosen)] = np.linalg.lstsq(rows[:, np.array(chosen)], np.ones(len(rows)), rcond=None)[0]
        error = float(np.square(rows @ weights - 1.0).sum())
        if (weights >= 0.0).all() and error < best_error:
            best, best_error = weights, error
    return best / np.where(scale > 0.0, scale, 1.0)
