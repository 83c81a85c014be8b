"""Methods: what is run on a task. From a configuration to a model, its optimizer and what steers it.

A configuration has learning_rate, weight_decay, beta1, dropout and schedule, or a fingerprint of what the controller
has for the task's family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from envs.benchmark.store import rounded
from envs.benchmark.tasks import Task
from envs.domains import Domain
from envs.recommenders import RECOMMENDERS
from envs.recommenders.training import PlainSchedule, Steering, TrainingRun
from metalearn import Controller, load_controller
from metalearn.controller.checkpoint import fingerprint
from metalearn.controller.config import CONTROLLED
from metalearn.controller.cues import FIELDS
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.warm_start import family_box
from metalearn.spaces import CANONICAL_SPACE
from metalearn.torch import MetaScheduler

NUM_SAMPLED = 64
"""Configurations of a replicate."""
WARMUP = {"one_cycle": 0.3, "warmup_cosine": 0.1}
"""Share of the run in which the rate rises."""


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _one_cycle(progress: float) -> float:
    """From 1/25 by a half cosine to 1, and by another to 4e-6: `torch.optim.lr_scheduler.OneCycleLR`."""
    warmup, first, last = WARMUP["one_cycle"], 1 / 25, 1 / 25e4
    if progress < warmup:
        return 1.0 - (1.0 - first) * _cosine(progress / warmup)
    return last + (1.0 - last) * _cosine((progress - warmup) / (1.0 - warmup))


def _warmup_cosine(progress: float) -> float:
    warmup = WARMUP["warmup_cosine"]
    return progress / warmup if progress < warmup else _cosine((progress - warmup) / (1.0 - warmup))


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "linear": lambda progress: 1.0 - progress,
    "one_cycle": _one_cycle,
    "warmup_cosine": _warmup_cosine,
}
"""By name, the factor on the learning rate at a share of the run in [0, 1]."""

SHIPPED = {**{name: CANONICAL_SPACE[name].default for name in CONTROLLED}, "schedule": "constant"}
"""AdamW as PyTorch ships it, which are the canonical space's defaults."""

CONFIGURED: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "default": (SHIPPED,),
    "schedule_free": (
        {**SHIPPED, "learning_rate": 0.03, "weight_decay": 0.34},
        {**SHIPPED, "learning_rate": 0.0025, "weight_decay": 0.0},
    ),
    "prodigy": ({**SHIPPED, "learning_rate": 1.0, "weight_decay": 0.0, "schedule": "cosine"},),
}
"""Methods whose configurations are given: these, by index. Those with weight decay 0 are the packages' defaults."""


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A method that is steered by a controller.

    Args:
      trained: whether by the trained policy, or by the untrained one, which keeps to the base.
      decays: whether the rate decays, over a share of the true horizon; None holds it, and averaged weights count,
        whatever is told of the horizon.
      length: steps, as a multiple of the task's.
      familiar: whether it is told the model's family; if not, it has for the model what it has for any.
    """

    trained: bool
    decays: float | None = None
    length: int = 1
    familiar: bool = True

    def family(self, controller: Controller, family: str) -> str | None:
        """Returns what a controller is told of a task's family."""
        return controller.config.known_family(family) if self.familiar else None


STEERED: Mapping[str, Steered] = {
    "controller": Steered(trained=True),
    "controller_decaying": Steered(trained=True, decays=1.0),
    "controller_half": Steered(trained=True, decays=0.5),
    "controller_double": Steered(trained=True, decays=2.0),
    "controller_long": Steered(trained=True, length=10),
    "controller_unfamiliar": Steered(trained=True, familiar=False),
    "base": Steered(trained=False),
    "base_decaying": Steered(trained=False, decays=1.0),
    "base_long": Steered(trained=False, length=10),
    "base_unfamiliar": Steered(trained=False, familiar=False),
}


class Controllers:
    """The trained controller and the untrained one, loaded when first asked for.

    Args:
      checkpoint: as in `load_controller`.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def trained(self) -> Controller:
        """The checkpoint's controller."""
        return load_controller(self._checkpoint)

    @cached_property
    def untrained(self) -> Controller:
        """The same without what it has learnt, so that it keeps to its base: output layers are zero, as they start, and
        no family goes by a cue."""
        checkpoint = self.trained.checkpoint
        heads = ("modifier/", "group_head/", "run_head/")
        network = {
            name: np.zeros_like(tensor) if name.startswith(heads) else tensor
            for name, tensor in checkpoint.network.items()
        }
        config = replace(checkpoint.config, **{field: () for field, _ in FIELDS.values()})
        return Controller(replace(checkpoint, config=config, network=network))

    def of(self, method: str) -> Controller:
        """Returns the controller that steers a method."""
        return self.trained if STEERED[method].trained else self.untrained

    def fingerprint(self, method: str, family: str) -> str:
        """Returns a fingerprint of what may steer a method on a family: without bases and cues that others have."""
        checkpoint = self.of(method).checkpoint
        config = checkpoint.config
        cues = {field: tuple(name for name in getattr(config, field) if name == family) for field, _ in FIELDS.values()}
        told = config.family_index(config.known_family(family))
        base = np.zeros_like(checkpoint.base)
        for row in (told, config.family_index(None)):
            base[row] = checkpoint.base[row]
        return fingerprint(replace(checkpoint, config=replace(config, **cues), base=base))


def sampled_configurations(replicate: int, family: str) -> list[dict[str, Any]]:
    """Returns the configurations that random search draws, the same for every task of a family: uniform in its box.

    Uniform on the canonical space's scales: the rate and the decay on a logarithmic one, beta1 on the logit's.
    """
    rng = np.random.default_rng([replicate, 64])
    names = list(SCHEDULES)
    configurations = []
    for _ in range(NUM_SAMPLED):
        shares = zip(CONTROLLED, rng.random(4), strict=True)
        values = {name: from_box(name, share, family) for name, share in shares}
        configurations.append({**values, "schedule": names[rng.integers(len(names))]})
    return configurations


def from_box(name: str, share: float, family: str) -> float:
    """Returns the value at a share of a hyperparameter's side of a family's box, on its canonical scale."""
    hyperparameter = CANONICAL_SPACE[name]
    low, high = (hyperparameter.encode(corner) for corner in family_box(family)[name])
    return rounded(hyperparameter.decode(low + share * (high - low)))


def start_run(
    method: str, configuration: Mapping[str, Any], task: Task, domain: Domain, controllers: Controllers, *, seed: int
) -> TrainingRun:
    """Returns a run that has not begun; one seed gives one family's runs the same initial weights and batches.

    Args:
      method: its name.
      configuration: its hyperparameters.
      task: its steps are the run's.
      domain: of the task.
      controllers: for the methods that are steered.
      seed: of initial weights, batches and dropout.
    """
    model = RECOMMENDERS[task.family].for_domain(
        domain,
        dim=task.settings.dim,
        dropout=configuration.get("dropout", 0.0),
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer: torch.optim.Optimizer
    steering: Steering
    if method in STEERED:
        optimizer = torch.optim.AdamW(model.parameter_groups(), fused=True)
        steered, controller = STEERED[method], controllers.of(method)
        steering = MetaScheduler(
            optimizer,
            model=model,
            domain=domain.profile,
            family=steered.family(controller, task.family),
            horizon=None if steered.decays is None else round(steered.decays * task.settings.steps),
            batch_size=task.settings.batch_size,
            interval=task.settings.interval,
            controller=controller,
        )
    else:
        optimizer = _optimizer(method, configuration, model)
        steering = _steering(method, configuration, optimizer, task)
    return TrainingRun(model, optimizer, steering, domain, task.settings, seed=seed)


class ScheduleFree(PlainSchedule):
    """No schedule: validates at the averaged point that the optimizer keeps beside the one that it trains.

    Args:
      interval: steps between validations.
      optimizer: of `schedulefree`.
    """

    def __init__(self, interval: int, optimizer: Any) -> None:
        super().__init__(interval)
        self._optimizer = optimizer
        optimizer.train()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Puts the averaged weights into the model for the time of the block."""
        self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()


def _optimizer(method: str, configuration: Mapping[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    values: dict[str, Any] = {
        "lr": configuration["learning_rate"],
        "weight_decay": configuration["weight_decay"],
        "betas": (configuration["beta1"], 0.999),
    }
    if method == "schedule_free":
        return benchmark_package("schedulefree").AdamWScheduleFree(model.parameters(), **values)
    if method == "prodigy":
        return benchmark_package("prodigyopt").Prodigy(model.parameters(), **values)
    return torch.optim.AdamW(model.parameters(), **values, fused=True)


def _steering(
    method: str, configuration: Mapping[str, Any], optimizer: torch.optim.Optimizer, task: Task
) -> PlainSchedule:
    if method == "schedule_free":
        return ScheduleFree(task.settings.interval, optimizer)
    if configuration["schedule"] == "constant":
        return PlainSchedule(task.settings.interval)
    steps, schedule = task.settings.steps, SCHEDULES[configuration["schedule"]]
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(min(step / steps, 1.0)))
    return PlainSchedule(task.settings.interval, decay)


def benchmark_package(name: str) -> ModuleType:
    """Imports a package of the `benchmark` extra.

    Raises:
      InvalidArgumentError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InvalidArgumentError(
            f"`methods` has one that needs the package {name}; install the `benchmark` extra: "
            "pip install 'metalearn[benchmark]'"
        ) from error
