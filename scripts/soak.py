"""Trains a small model for 100 000 steps while every binding is overridden at random: nothing may leak or be lost.

    python scripts/soak.py           # 100 000 steps, 10 minutes and more on one busy core
    python scripts/soak.py --quick   # 5 000 steps, under a minute

The model is compiled (`--backend`, eager by default: graphs are captured and guarded, and no code is generated). At
the end of each interval a random set of hyperparameters is set to random values within their bounds, or given back:
learning rate, weight decay, beta1 and trainable of either group, dropout, batch size, accumulation, clipping, precision
(fp32 and bf16, what a CPU has), number of negatives, and a margin of the loop's own. Now and then the sampler's state
is saved, and loaded some batches later, in mid-epoch; what was trained on in between is struck from the count.

It fails if an epoch does not hold each sample exactly once, if a graph is compiled after the warm-up (which meets each
precision once), or if the memory of the process grows by more than MEMORY_PERCENT from the third quarter of the run to
the last. (`scheduler.decisions` keeps every decision, about 10 kB each, a thousand in the end.) The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

import metalearn
from metalearn.audit import verify
from metalearn.spaces import CANONICAL_SPACE, Hyperparameter
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
from provenance import provenance

USERS, ITEMS, SAMPLES = 300, 200, 5_003
INTERVAL = 100
MEMORY_PERCENT = 2.0
MARGIN = Hyperparameter(name="margin", low=0.1, high=10.0, scale="log", default=1.0, scope="global")
REWIND_EVERY, REWIND_AFTER = 1000, 7
"""Steps between states of the sampler that are loaded, and batches until they are."""
CEILINGS = {"batch_size": 96, "num_negatives": 3, "accumulation": 2}
"""What is legal goes further; these keep a step short."""


class Model(torch.nn.Module):
    """Two tables and a tower over pairs of user and item; rows are flat, so that one graph fits all numbers of them."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = torch.nn.Embedding(USERS, 8), torch.nn.Embedding(ITEMS, 8)
        self.tower = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.ReLU(), BufferedDropout(0.1), torch.nn.Linear(8, 1)
        )

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return self.tower(self.users(users) * self.items(items)).squeeze(1)

    def groups(self) -> list[dict[str, Any]]:
        tables = [*self.users.parameters(), *self.items.parameters()]
        return [{"params": tables}, {"params": list(self.tower.parameters())}]


class Pairs(torch.utils.data.Dataset[torch.Tensor]):
    """Simulated interactions: a batch is [sample, user, item]."""

    def __init__(self, rng: np.random.Generator) -> None:
        columns = [
            np.arange(SAMPLES),
            rng.integers(USERS, size=SAMPLES),
            (ITEMS * rng.random(SAMPLES) ** 2).astype(int),
        ]
        self.rows = torch.from_numpy(np.stack(columns, 1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.rows[indices]


class Soak:
    """The run, and what is counted of it.

    Args:
      steps: of the optimizer.
      backend: of torch.compile.
      log: path of the decision log.
      seed: of everything.
    """

    def __init__(self, steps: int, backend: str, log: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.steps, self.random = steps, random.Random(seed)
        rng = np.random.default_rng(seed)
        self.pairs = Pairs(rng)
        self.model = Model()
        self.counter = CompileCounterWithBackend(backend)
        self.forward = torch.compile(self.model, backend=self.counter, dynamic=True, fullgraph=True)
        self.optimizer = torch.optim.AdamW(self.model.groups(), fused=True)
        self.sampler = ResizableBatchSampler(SAMPLES, 32, seed=seed)
        self.loader = DataLoader(self.pairs, batch_sampler=self.sampler, collate_fn=lambda rows: rows)
        self.accumulation, self.precision = Accumulation(), Precision()
        self.settings: dict[str, Any] = {"num_negatives": 1, "margin": 1.0}
        own = self.settings
        rows = self.pairs.rows.numpy()
        self.scheduler = MetaScheduler(
            self.optimizer,
            model=self.model,
            domain=metalearn.profile_domain(metalearn.Interactions.from_arrays(rows[:, 1], rows[:, 2])),
            horizon=steps,
            interval=INTERVAL,
            batch_size=32,
            decision_log=log,
            bindings=[
                BatchSize(self.sampler),
                self.accumulation,
                GradientClip(),
                Trainable(),
                self.precision,
                Custom("num_negatives", lambda: own["num_negatives"], lambda value: own.update(num_negatives=value)),
                Custom(MARGIN, lambda: own["margin"], lambda value: own.update(margin=value)),
            ],
        )
        self.seen = np.zeros(SAMPLES, np.int64)
        self.lost = self.repeated = self.overrides = self.rewinds = 0
        self.recent: list[float] = []
        self.memory: list[float] = []
        self.warm_up()
        self.compiled = self.counter.frame_count

    def warm_up(self) -> None:
        """Meets each precision once, in training and validation, with several sizes; nothing is stepped."""
        for precision in ("fp32", "bf16"):
            self.precision.write(precision)
            self.precision.load_state_dict({"scaler": None})  # the step that has begun is none: the next begins anew
            for size in (32, 5, 1):
                self.loss(self.pairs.rows[:size]).backward()
            self.optimizer.zero_grad()
        self.precision.write("fp32")
        self.precision.load_state_dict({"scaler": None})

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Returns the BPR loss against sampled negatives."""
        count = self.settings["num_negatives"]
        users, items = batch[:, 1], batch[:, 2]
        negatives = torch.randint(ITEMS, (len(users) * count,))
        with self.precision.autocast():
            scores = self.forward(torch.cat([users, users.repeat_interleave(count)]), torch.cat([items, negatives]))
            ahead = scores[: len(users)].repeat_interleave(count) - scores[len(users) :]
        return -torch.nn.functional.logsigmoid(self.settings["margin"] * ahead.float()).mean()

    def train(self) -> None:
        """Takes all steps."""
        while self.scheduler.steps < self.steps:
            self.epoch()

    def epoch(self) -> None:
        """Trains on what is left of an epoch, and counts its samples if it comes to an end."""
        saved: dict[str, Any] | None = None
        since: list[torch.Tensor] = []
        for batch in self.sampler.track(self.loader):
            np.add.at(self.seen, batch[:, 0].numpy(), 1)
            since.append(batch[:, 0])
            stepped = self.step(batch)
            if saved is None and self.scheduler.steps % REWIND_EVERY == 0:
                saved, since = self.sampler.state_dict(), []
            elif saved is not None and len(since) >= REWIND_AFTER:
                # The size in force stays: a loaded state would otherwise undo an override.
                saved["batch_size"] = self.sampler.batch_size
                self.sampler.load_state_dict(saved)
                np.subtract.at(self.seen, torch.cat(since).numpy(), 1)
                saved, self.rewinds = None, self.rewinds + 1
            if saved is None:
                since = []
            if stepped and self.scheduler.steps >= self.steps:
                return
        self.lost += int((self.seen == 0).sum())
        self.repeated += int(np.maximum(self.seen - 1, 0).sum())
        self.seen[:] = 0

    def step(self, batch: torch.Tensor) -> bool:
        """Trains on a batch; returns whether the optimizer stepped."""
        loss = self.loss(batch)
        self.precision.scale(loss / self.accumulation.count).backward()
        if not self.accumulation.completes_step():
            return False
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad()
        self.recent.append(loss.item())
        self.scheduler.step(loss)
        if self.scheduler.should_validate:
            self.scheduler.report(-float(np.mean(self.recent)))
            self.recent.clear()
            self.change()
            if self.scheduler.steps % max(self.steps // 100, INTERVAL) == 0:
                self.note()
        return True

    def change(self) -> None:
        """Overrides a random set of hyperparameters, or gives some back."""
        overridden = list(self.scheduler.overrides)
        if overridden and self.random.random() < 0.3:
            self.scheduler.release_override(*self.random.sample(overridden, self.random.randint(1, len(overridden))))
            return
        names = {name: CANONICAL_SPACE[name] for name in CANONICAL_SPACE.names} | {"margin": MARGIN}
        for name in ("embedding_dim", "early_stop"):
            del names[name]
        chosen = self.random.sample(sorted(names), self.random.randint(1, 4))
        values: dict[str, Any] = {}
        for name in chosen:
            known = names[name]
            label = f"{name}[{self.random.randint(0, 1)}]" if known.scope == "group" else name
            values[label] = self.value(known)
        self.scheduler.override(values, "soak")
        self.overrides += 1

    def value(self, known: Hyperparameter) -> Any:
        """Draws a legal value."""
        if known.name == "precision":
            return self.random.choice(["fp32", "bf16"])
        ceiling = CEILINGS.get(known.name)
        if known.scale == "choice":
            return self.random.choice([c for c in known.choices if ceiling is None or c <= ceiling])
        if ceiling is not None:
            return self.random.randint(int(known.low), ceiling)
        return known.decode(self.random.random())

    def note(self) -> None:
        """Takes down the memory of the process, and says how far the run is."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        print(
            f"{self.scheduler.steps:>7} steps, {self.sampler.epoch:>5} epochs, {self.memory[-1]:.1f} MiB, "
            f"{self.counter.frame_count - self.compiled} recompilations, {self.lost} lost, {self.repeated} repeated",
            flush=True,
        )

    def memory_growth(self) -> float:
        """Returns by how many percent the median memory of the last quarter exceeds that of the third."""
        quarter = max(len(self.memory) // 4, 1)
        third, last = np.median(self.memory[-2 * quarter : -quarter]), np.median(self.memory[-quarter:])
        return float(100 * (last / third - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 000 steps")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--backend", default="eager", help="of torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for all figures and where they are from")
    arguments = parser.parse_args()

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        log = Path(folder) / "run.jsonl"
        soak = Soak(5_000 if arguments.quick else arguments.steps, arguments.backend, log, arguments.seed)
        soak.train()
        verify(log)
    record = {
        "steps": soak.scheduler.steps,
        "epochs": soak.sampler.epoch,
        "samples_lost": soak.lost,
        "samples_repeated": soak.repeated,
        "recompilations": soak.counter.frame_count - soak.compiled,
        "memory_growth_percent": round(soak.memory_growth(), 3),
        "overrides": soak.overrides,
        "rewinds": soak.rewinds,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if arguments.output is not None:
        about = provenance(seed=arguments.seed, backend=arguments.backend)
        memory = [round(value, 1) for value in soak.memory]
        arguments.output.write_text(json.dumps({**record, "memory_mib": memory, "provenance": about}, indent=1) + "\n")
    print(json.dumps(record))
    failed = [name for name in ("samples_lost", "samples_repeated", "recompilations") if record[name]]
    if record["memory_growth_percent"] > MEMORY_PERCENT:
        failed.append("memory_growth_percent")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
