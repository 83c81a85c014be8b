"""A training loop with every kind of binding, for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch

from envs.domains import Domain
from metalearn import Controller
from metalearn.spaces import Hyperparameter
from metalearn.torch import (
    Accumulation,
    BatchSize,
    BufferedDropout,
    Custom,
    GradientClip,
    MetaScheduler,
    Precision,
    ResizableBatchSampler,
    Trainable,
)

SAMPLES = 200
MARGIN = Hyperparameter(name="margin", low=0.1, high=10.0, scale="log", default=1.0, scope="global")


class Model(torch.nn.Module):
    """A table and a tower, with dropout by buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(SAMPLES, 4)
        self.tower = torch.nn.Sequential(torch.nn.Linear(4, 4), BufferedDropout(0.1), torch.nn.Linear(4, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.tower(self.table(rows))


class BoundLoop:
    """A steered run with all bindings; `settings` is what it keeps of its own."""

    def __init__(
        self,
        domain: Domain,
        controller: Controller,
        *,
        optimizer: Any = torch.optim.AdamW,
        size: int = 16,
        **options: Any,
    ):
        torch.manual_seed(0)
        self.model = Model()
        self.settings: dict[str, Any] = {"num_negatives": 4, "margin": 1.0}
        self.optimizer = optimizer(
            [{"params": self.model.table.parameters()}, {"params": self.model.tower.parameters()}], lr=0.01
        )
        self.sampler = ResizableBatchSampler(SAMPLES, size, seed=1)
        self.accumulation, self.precision = Accumulation(), Precision()
        self.trainable = Trainable()
        own = self.settings
        self.scheduler = MetaScheduler(
            self.optimizer,
            model=self.model,
            domain=domain.profile,
            controller=controller,
            tracked=[self.sampler],
            **{"interval": 6, "batch_size": 16, "horizon": 60, **options},
            bindings=[
                BatchSize(self.sampler),
                self.accumulation,
                GradientClip(),
                self.trainable,
                self.precision,
                Custom("num_negatives", lambda: own["num_negatives"], lambda n: own.update(num_negatives=n)),
                Custom(MARGIN, lambda: own["margin"], lambda m: own.update(margin=m)),
            ],
        )
        self.batches: list[list[int]] = []
        self.rates: list[list[float]] = []
        self.losses: list[float] = []
        self._source = iter(self.sampler)

    def micro_batch(self) -> bool:
        """Trains on one batch; returns whether the optimizer stepped."""
        batch = next(self._source, None)
        if batch is None:
            self._source = iter(self.sampler)
            batch = next(self._source)
        self.batches.append(batch)
        rows = torch.tensor(batch)
        with self.precision.autocast():
            loss = (self.model(rows).float() - self.settings["margin"]).square().mean() / self.settings["num_negatives"]
        self.precision.scale(loss / self.accumulation.count).backward()
        if not self.accumulation.completes_step():
            return False
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()
        self.rates.append(self.scheduler.get_last_lr())
        self.losses.append(loss.item())
        self.scheduler.step(loss)
        if self.scheduler.should_validate:
            self.scheduler.report(self.model.table.weight.std().item())
        return True

    def advance(self, steps: int) -> None:
        """Takes optimizer steps."""
        for _ in range(steps):
            while not self.micro_batch():
                pass

    def weights(self) -> list[torch.Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]

    def save(self) -> dict[str, Any]:
        """Returns a checkpoint as a training script writes it."""
        parts = (self.model, self.optimizer, self.sampler, self.scheduler)
        return copy.deepcopy({"parts": [part.state_dict() for part in parts], "random": torch.get_rng_state()})

    def load(self, state: dict[str, Any]) -> None:
        for part, content in zip(
            (self.model, self.optimizer, self.sampler, self.scheduler), state["parts"], strict=True
        ):
            part.load_state_dict(content)
        torch.set_rng_state(state["random"])
