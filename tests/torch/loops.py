"""A plain training loop that has everything a snapshot is to hold, and a comparison to the bit."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch

from metalearn.torch.snapshots import Snapshots

OPTIMIZERS = {
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "AdamW, one by one": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False, amsgrad=True),
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
}


class Net(torch.nn.Module):
    """Dropout, batch statistics, a buffer that is not persistent, and a matrix that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.dropout = torch.nn.Dropout(0.4)
        self.out = torch.nn.Linear(3, 5)
        self.out.weight = self.table.weight
        self.register_buffer("seen", torch.zeros(5, dtype=torch.int64), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen[rows] += 1
        return self.out(self.dropout(self.norm(self.table(rows))))


class Loop:
    """A training loop with everything that a snapshot is to hold."""

    def __init__(self, kind: str, snapshots: type[Snapshots] = Snapshots, **options: Any) -> None:
        torch.manual_seed(0)
        random.seed(3)
        np.random.seed(4)  # noqa: NPY002
        self.net = Net()
        self.optimizer = OPTIMIZERS[kind]([{"params": [self.net.table.weight]}, {"params": self.net.norm.parameters()}])
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], gamma=0.5)
        self.order = torch.Generator().manual_seed(1)
        self.draws = np.random.default_rng(2)
        self.extra = {"table": torch.zeros(2), "count": 0, "nested": [1.5, {"a": (1, "b")}]}
        self.snapshots = snapshots(
            modules=[self.net],
            optimizers=[self.optimizer],
            tracked=[self.schedule, self.order, self.draws],
            **options,
        )

    def train(self) -> None:
        rows = torch.randint(5, (4,), generator=self.order)
        scale = random.random() + np.random.random() + self.draws.random()  # noqa: NPY002
        (self.net(rows).square().mean() * scale).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.extra["table"] += 1.0
        self.extra["count"] += 1

    def contents(self) -> dict[str, Any]:
        """Return a deep copy of everything, made without a line of what is tested."""
        net = {name: tensor for name, tensor in (*self.net.named_parameters(), *self.net.named_buffers())}
        return copy.deepcopy(
            {
                "net": {name: tensor.detach() for name, tensor in net.items()},
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "order": self.order.get_state(),
                "draws": self.draws.bit_generator.state,
                "python": random.getstate(),
                "numpy": np.random.get_state(),  # noqa: NPY002
                "torch": torch.get_rng_state(),
                "extra": self.extra,
            }
        )


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Compare to the bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif isinstance(one, dict):
        assert list(map(str, sorted(one, key=str))) == list(map(str, sorted(other, key=str))), where
        for key, value in one.items():
            assert_equal(value, other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(mine, theirs, f"{where}[{index}]")
    else:
        assert one == other, where
