"""One small training run, the same in a single process, under DDP and under FSDP2; jobs for ranks."""

from __future__ import annotations

import copy
import math
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed
from torch.nn import functional as F

from metalearn.profiles import DomainProfile
from metalearn.torch import MetaScheduler, monitor
from metalearn.torch.sharding import local, reshard

USERS, ITEMS, DIM, OUT = 13, 11, 4, 3
"""Not one of which is a multiple of 2 or 4: shards are of different sizes, and some are empty."""
GLOBAL_BATCH = 32
INTERVAL = 6

ASKED: list[int] = []
"""decisions that this process's advisor was asked about"""

Kind = Literal["alone", "ddp", "fsdp", "hsdp"]
"""The last: shards within halves of the ranks, copies of them in both."""


class Net(torch.nn.Module):
    """Two tables and a layer over both; beside them, unless gradients are sparse, a layer that nothing uses."""

    def __init__(self, dropout: float, *, sparse: bool = False) -> None:
        super().__init__()
        self.user = torch.nn.Embedding(USERS, DIM, sparse=sparse)
        self.item = torch.nn.Embedding(ITEMS, DIM, sparse=sparse)
        self.dropout = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()  # which a controller would set
        self.out = torch.nn.Linear(DIM, OUT)
        self.unused = torch.nn.Identity() if sparse else torch.nn.Linear(2, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        user, positive, negative = rows
        vector = self.out(self.dropout(self.user(user)))
        return F.softplus(-(vector * self.out(self.item(positive) - self.item(negative))).sum(-1)).mean()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run."""

    profile: DomainProfile
    controller: Path
    kind: Kind
    steps: int = 5 * INTERVAL
    horizon: int | None = 8 * INTERVAL
    dropout: float = 0.0
    sparse: bool = False
    device: str = "cpu"
    optimizer: str = "AdamW"
    max_probed: int = monitor.MAX_PROBED
    options: dict[str, Any] = field(default_factory=dict)
    spoil: Literal["loss", "weights"] | None = None
    """what of rank 1 alone becomes NaN in the third interval, the first time"""


def batch(step: int, rank: int, size: int) -> torch.Tensor:
    """Return one rank's share of the batch of a step, int64 [3, B]."""
    generator = torch.Generator().manual_seed(1000 + step)
    user = torch.randint(USERS, (1, GLOBAL_BATCH), generator=generator)
    items = torch.randint(ITEMS, (2, GLOBAL_BATCH), generator=generator)
    return torch.cat([user, items]).chunk(size, 1)[rank]


class Loop:
    """A rank's side of a run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rank, self.size = 0, 1
        if job.kind != "alone":
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        torch.manual_seed(0)
        self.net = Net(job.dropout, sparse=job.sparse).to(job.device)
        self.model: torch.nn.Module = self.net
        if job.kind in ("fsdp", "hsdp"):
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            shape = (self.size,) if job.kind == "fsdp" else (2, self.size // 2)
            mesh = init_device_mesh(job.device, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
            fully_shard(self.net.out, mesh=mesh)
            self.model = fully_shard(self.net, mesh=mesh)
        elif job.kind == "ddp":
            # With torch 2.13, looking for unused parameters beside sparse gradients corrupts memory over gloo, once in
            # some thousand steps: in a loop without a MetaScheduler as well.
            self.model = torch.nn.parallel.DistributedDataParallel(self.net, find_unused_parameters=not job.sparse)
        tables = [self.net.user.weight, self.net.item.weight]
        rest = [*self.net.out.parameters(), *self.net.unused.parameters()]
        groups: Any = [{"params": tables, "role": "embedding"}, {"params": rest}]
        self.optimizer = getattr(torch.optim, job.optimizer)(tables if job.sparse else groups)
        monitor.MAX_PROBED = job.max_probed
        self.statistics: list[dict[str, Any]] = []
        arguments = {
            "model": self.model,
            "domain": job.profile,
            "controller": job.controller,
            "horizon": job.horizon,
            "interval": INTERVAL,
            "batch_size": GLOBAL_BATCH // self.size,
        }
        self.scheduler = MetaScheduler(self.optimizer, **{**arguments, **job.options})
        self._to_spoil = job.spoil is not None
        self._spy()

    def _spy(self) -> None:
        measure = self.scheduler._run.monitor.statistics

        def noted(**arguments: Any) -> Any:
            result = measure(**arguments)
            self.statistics.append({k: v for k, v in result._asdict().items() if k != "seconds"})
            return result

        self.scheduler._run.monitor.statistics = noted  # type: ignore[method-assign]

    def step(self) -> None:
        """Take one step; its batch and its dropout depend on nothing but its number and the rank."""
        step = self.scheduler.steps
        torch.manual_seed(7919 * step + self.rank)
        loss = self.model(batch(step, self.rank, self.size).to(self.job.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._to_spoil and step == 2 * INTERVAL + 2:
            self._to_spoil = False
            if self.rank == 1 and self.job.spoil == "loss":
                loss = loss * math.nan
            elif self.rank == 1:
                local(self.net.out.weight).data.fill_(math.nan)
        self.scheduler.step(loss)

    def score(self) -> float:
        """Return a metric that follows the weights; of a sharded model in all ranks."""
        self.model.eval()
        with torch.no_grad(), self.scheduler.averaged_parameters():
            model = self.net if self.job.kind == "ddp" else self.model
            value = -model(batch(10**6, 0, 1).to(self.job.device)).item()
        self.model.train()
        return value

    def report(self) -> None:
        """Report if it is time, in rank 0; the others have nothing to say."""
        if not self.scheduler.should_validate:
            return
        value = self.score() if self.rank == 0 or self.job.kind != "ddp" else math.nan
        losses = {"validation_loss": -value, "training_sample_loss": -0.5 * value}
        self.scheduler.report({"ndcg": value, **losses} if self.rank == 0 else None)

    def advance(self) -> None:
        """Go on to the end of the run."""
        while self.scheduler.steps < self.job.steps:
            self.step()
            self.report()

    @torch.no_grad()
    def outcome(self) -> dict[str, Any]:
        """Return what it came to, with whole weights."""
        with self.scheduler.averaged_parameters():
            averaged = [_whole(p).clone() for p in self.net.parameters()]
        return {
            "weights": [_whole(p).clone() for p in self.net.parameters()],
            "averaged": averaged,
            "decisions": [decision.as_dict() for decision in self.scheduler.decisions],
            "statistics": self.statistics,
            "rollbacks": self.scheduler.rollbacks,
            "steps": self.scheduler.steps,
            "rates": self.scheduler.get_last_lr(),
            "logs": self.scheduler._run.log._log is not None,
            "asked": len(ASKED),
        }


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()).cpu()


def advise(decision: Any) -> bool:
    """Accept every other decision."""
    ASKED.append(decision.index)
    return len(ASKED) % 2 == 0


def train(job: Job) -> dict[str, Any]:
    """Run a job from its beginning to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loop = Loop(job)
        loop.advance()
        return loop.outcome()


def save(loop: Loop, *, of_all_ranks: bool) -> dict[str, Any]:
    """Return a checkpoint of this rank: its shards, and what a MetaScheduler saves."""
    reshard(loop.model)  # after an evaluation FSDP2 holds whole parameters
    return {
        "weights": [local(p).detach().clone() for p in loop.net.parameters()],
        "optimizer": copy.deepcopy(loop.optimizer.state_dict()),
        "scheduler": loop.scheduler.state_dict(of_all_ranks=of_all_ranks),
    }


def load(loop: Loop, state: dict[str, Any]) -> None:
    """Restore one."""
    with torch.no_grad():
        for parameter, saved in zip(loop.net.parameters(), state["weights"], strict=True):
            local(parameter).copy_(saved)
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])


def interrupt(job: Job, at: tuple[int, ...], how: Literal["all", "own", "first"]) -> list[dict[str, Any]]:
    """Run a job to its end, then anew from checkpoints taken at some steps; `how` says whose state is loaded.

    Returns:
      Outcomes, and in each the warnings that it took to load.
    """
    whole, states = Loop(job), []
    while whole.scheduler.steps < job.steps:
        whole.step()
        if whole.scheduler.steps in at and not whole.scheduler.should_validate:
            states.append(save(whole, of_all_ranks=how == "all"))
        whole.report()
        if whole.scheduler.steps in at and len(states) < at.index(whole.scheduler.steps) + 1:
            states.append(save(whole, of_all_ranks=how == "all"))
    outcomes = [whole.outcome() | {"warned": 0}]
    for state in states:
        whole.scheduler.detach()
        resumed = Loop(job)
        if how != "own":
            shared = [state["scheduler"]]
            distributed.broadcast_object_list(shared, src=0)
            state["scheduler"] = shared[0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(resumed, state)
        resumed.advance()
        told = [one for one in caught if "resumes from a state of rank" in str(one.message)]
        outcomes.append(resumed.outcome() | {"warned": len(told)})
    return outcomes


def forget_to_report(job: Job, late: float) -> None:
    """Report in rank 0 only, some seconds late, while the others train on."""
    loop = Loop(job)
    while True:
        loop.step()
        if loop.scheduler.should_validate and loop.rank == 0:
            time.sleep(late)
            loop.scheduler.report(0.5)


def report_to_none(job: Job) -> dict[str, Any]:
    """Never report, so that decisions are made at the next step; some gradients of another loss come in between."""
    loop = Loop(job)
    while loop.scheduler.steps < job.steps:
        loop.step()
        if loop.scheduler.should_validate:
            loop.net.out.weight.square().sum().backward()
            loop.optimizer.zero_grad()
            if loop.scheduler.steps % (2 * INTERVAL) == 0:
                loop.scheduler.report(None)
    return loop.outcome()


def differ(job: Job, options: list[dict[str, Any]]) -> None:
    """Make a MetaScheduler with different arguments in each rank."""
    Loop(replace(job, options={**job.options, **options[distributed.get_rank()]}))


def steer(job: Job, window: DomainProfile) -> dict[str, Any]:
    """Call what changes the session from outside."""
    loop = Loop(job)
    for index in range(5 * INTERVAL):
        loop.step()
        loop.report()
        if index == 2:
            loop.scheduler.override({"weight_decay[0]": 0.02})
        elif index == INTERVAL:
            loop.scheduler.switch("shadow")
        elif index == 2 * INTERVAL:
            loop.scheduler.switch("control")
        elif index == 3 * INTERVAL:
            loop.scheduler.observe_profile(window)
    return loop.outcome()


def switch_in_one_rank(job: Job) -> None:
    """Leave one rank at another point of the run than the others."""
    loop = Loop(job)
    for index in range(2 * INTERVAL):
        loop.step()
        if index == 1 and loop.rank == 1:
            loop.scheduler.override({"weight_decay": 0.01})
        loop.report()


def run_out_of_memory(job: Job) -> None:
    """Have rank 1 run out of memory."""
    loop = Loop(job)
    with loop.scheduler.survive_out_of_memory():
        if loop.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        loop.step()
