"""What every adapter must do, as checks over one training job that each framework runs in its own way.

A framework's test file says how it runs a `Job`; `plain.run` does the same without any framework, and is the oracle:
same batches, same dropout, so the same weights to the bit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.domains import Domain
from envs.recommenders import MatrixFactorization, TripleSampler
from metalearn import Controller
from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError
from metalearn.torch import MetaScheduler, monitor
from tests.torch.crew import Crew
from tests.torch.test_host_syncs import Operations

BATCH_SIZE, EPOCH, EPOCHS = 32, 12, 2
"""samples; batches of an epoch; epochs"""
INTERVAL, VALIDATE_EVERY = 5, 6
"""Optimizer steps. Reports come between the ends of intervals, checkpoints within one."""
DECAY_EVERY = 4
SCORED = torch.arange(8)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of 24 micro-batches: two epochs of twelve, validated every six, beside a learning-rate schedule."""

    domain: Domain
    controller: Controller | None
    folder: Path
    accumulate: int = 1
    save: bool = False
    """the framework's own checkpoint, after the first epoch, into `folder`"""
    resume: bool = False
    """from there"""
    attached_before: bool = False
    """whether the optimizer has a MetaScheduler already"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the MetaScheduler"""

    @property
    def scheduler_options(self) -> dict[str, Any]:
        """Arguments of the MetaScheduler."""
        return {"domain": self.domain.profile, "controller": self.controller, "interval": INTERVAL, **self.options}


@dataclass(kw_only=True)
class Outcome:
    """What a run came to."""

    weights: list[torch.Tensor]
    scheduler: MetaScheduler | None
    steps: list[Step]
    other_rates: list[list[float]]
    """of the learning-rate schedule, after each of its own steps"""
    dropout: float
    """of the model, when all is over"""
    epoch: int = EPOCH
    """optimizer steps of an epoch"""

    @property
    def decisions(self) -> list[Decision]:
        assert self.scheduler is not None
        return self.scheduler.decisions


@dataclass(kw_only=True)
class Step:
    """One optimizer step."""

    own: list[dict[str, Any]]
    """what the groups held before it"""
    in_force: list[dict[str, Any]]
    """while it ran"""
    decision: Decision | None
    multiplier: float
    dropout: float


Run = Callable[[Job], Outcome]


def values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what the groups hold, parameters left out."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


class Triples(torch.utils.data.Dataset):
    """Rows of twelve batches, in order; the first row of a batch numbers it."""

    def __init__(self, domain: Domain) -> None:
        sampler = TripleSampler(domain.train, BATCH_SIZE, seed=0)
        batches = [sampler.next() for _ in range(EPOCH)]
        self.user, self.positive, self.negative = (torch.cat(column) for column in zip(*batches, strict=True))

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {
            "user": self.user[row],
            "positive": self.positive[row],
            "negative": self.negative[row],
            "row": torch.tensor(row),
        }


class Model(torch.nn.Module):
    """Matrix factorisation whose dropout depends on nothing but the batch, so that every framework draws the same."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.factors = MatrixFactorization(domain.num_users, domain.num_items, 4, dropout=0.2, generator=generator)
        self.own: list[list[dict[str, Any]]] = []
        self.optimizer: Any = None

    def forward(
        self, user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, row: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self.training:
            torch.manual_seed(int(row[0]))
            self.own.append(values(self.optimizer))
        return {"loss": self.factors(user, positive, negative), "score": self.score()}

    def score(self) -> torch.Tensor:
        """Return a metric that follows the weights."""
        return self.factors.score(SCORED).std().detach()


class Decay(torch.optim.lr_scheduler.StepLR):
    """Notes in its optimizer, which is not in its state, what it has set."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch) if epoch is not None else super().step()
        self.optimizer.rates.append([group["lr"] for group in self.optimizer.param_groups])  # type: ignore[attr-defined]


class Watched:
    """A model with its optimizer and learning-rate schedule, and what happens to them."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(0)
        self.job = job
        self.model = Model(job.domain)
        self.optimizer = torch.optim.AdamW(self.model.factors.parameter_groups(), lr=2e-3)
        self.model.optimizer = self.optimizer
        if job.attached_before:
            MetaScheduler(self.optimizer, **job.scheduler_options)
        self.optimizer.rates = []  # type: ignore[attr-defined]
        self.decay = Decay(self.optimizer, DECAY_EVERY, gamma=0.5)
        self.steps: list[Step] = []

    def watch(self, scheduler: Callable[[], MetaScheduler] | None) -> None:
        """Begin to note steps; call it when the scheduler is there, so that its hook comes first."""

        def note(*_: Any) -> None:
            made = None if scheduler is None else scheduler()
            self.steps.append(
                Step(
                    own=self.model.own[-1],
                    in_force=values(self.optimizer),
                    decision=None if made is None else made.decision,
                    multiplier=1.0 if made is None else made.multiplier(made.steps),
                    dropout=self.model.factors.dropout.p,
                )
            )

        self.optimizer.register_step_pre_hook(note)

    def outcome(self, scheduler: MetaScheduler | None) -> Outcome:
        """Collect everything."""
        return Outcome(
            weights=[parameter.detach().clone() for parameter in self.model.parameters()],
            scheduler=scheduler,
            steps=self.steps,
            other_rates=self.optimizer.rates,  # type: ignore[attr-defined]
            dropout=self.model.factors.dropout.p,
        )


def assert_same(one: Outcome, other: Outcome) -> None:
    """Compare weights, decisions and what was in force, to the bit."""
    assert one.decisions == other.decisions
    assert [step.in_force for step in one.steps] == [step.in_force for step in other.steps]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.weights, other.weights, strict=True))


def applied_actions_are_the_decided_ones(run: Run, plain: Run, job: Job) -> None:
    """Decided values are in force at each optimizer step"""
    outcome = run(job)
    assert len(outcome.steps) == outcome.epoch * EPOCHS
    assert len({step.decision.index for step in outcome.steps if step.decision}) >= 4
    for step in outcome.steps:
        assert step.decision is not None
        initial = outcome.steps[0].own
        for decided, held, own, first in zip(step.decision.groups, step.in_force, step.own, initial, strict=True):
            expected = decided["learning_rate"] * step.multiplier * (own["lr"] / first["lr"])
            assert held["lr"] == pytest.approx(expected, rel=1e-12)
            assert held["betas"] == (decided["beta1"], 0.999)
            assert held["weight_decay"] == decided["weight_decay"]
        assert step.dropout == step.decision.run.get("dropout", step.dropout)


def runs_as_a_plain_loop_does(run: Run, plain: Run, job: Job) -> None:
    """Weights and decisions equal a plain loop's to the bit; horizon and validation metric inferred"""
    outcome, expected = run(job), plain(job)
    assert_same(outcome, expected)
    assert any("validation: " in " ".join(decision.reasons) for decision in outcome.decisions[1:])
    assert not all("validation: not reported" in " ".join(decision.reasons) for decision in outcome.decisions[1:])


def other_schedules_keep_their_values(run: Run, plain: Run, job: Job) -> None:
    """Another scheduler's values stay as they are without the controller, to the bit"""
    steered, free = run(job), run(replace(job, controller=None))
    assert steered.other_rates == free.other_rates
    assert len({tuple(rates) for rates in free.other_rates}) > 2
    assert [step.own for step in steered.steps] == [step.own for step in free.steps]
    assert len({step.own[0]["lr"] for step in free.steps}) > 2
    assert steered.dropout == free.dropout


def a_resumed_run_is_the_same_run(run: Run, plain: Run, job: Job) -> None:
    """Resume from the framework's own checkpoint is exact, mid-interval"""
    whole = run(replace(job, save=True))
    resumed = run(replace(job, resume=True))
    assert len(resumed.steps) == len(whole.steps) - whole.epoch
    assert whole.epoch % INTERVAL
    assert_same(resumed, replace(whole, steps=whole.steps[whole.epoch :]))


def nothing_more_is_read_from_the_device(run: Run, plain: Run, job: Job) -> None:
    """No host sync per step more than without the controller (a metric on the device is read when it is reported)"""
    reads, reports = [], EPOCH * EPOCHS // VALIDATE_EVERY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "HOST_DEVICES", ())
        for which in (job, replace(job, controller=None)):
            with Operations() as operations:
                run(which)
            reads.append(sum(operations.reads.values()))
    assert 0 <= reads[0] - reads[1] <= reports


def accumulated_micro_batches_are_one_step(run: Run, plain: Run, job: Job) -> None:
    """Gradient accumulation counts optimizer steps"""
    outcome = run(replace(job, accumulate=2))
    assert outcome.scheduler is not None
    assert outcome.scheduler.steps == len(outcome.steps) == EPOCH * EPOCHS // 2
    assert [decision.step for decision in outcome.decisions] == [0, 5, 10]


def a_second_scheduler_is_refused(run: Run, plain: Run, job: Job) -> None:
    """Two schedulers on one optimizer are refused"""
    with pytest.raises(InvalidArgumentError, match=r"already has a MetaScheduler; call its detach\(\) first"):
        run(replace(job, attached_before=True))


def unknown_options_are_refused(run: Run, plain: Run, job: Job) -> None:
    """Unknown arguments and unclear metrics are refused by name"""
    with pytest.raises(InvalidArgumentError, match="`horizont` is no argument of MetaScheduler; pass some of"):
        run(replace(job, options={"horizont": 3}))
    with pytest.raises(InvalidArgumentError, match=r"cannot tell which of .* to follow; pass `metric`"):
        run(replace(job, options={"metric": "no such"}))


CHECKS = (
    applied_actions_are_the_decided_ones,
    runs_as_a_plain_loop_does,
    other_schedules_keep_their_values,
    a_resumed_run_is_the_same_run,
    nothing_more_is_read_from_the_device,
    accumulated_micro_batches_are_one_step,
    a_second_scheduler_is_refused,
    unknown_options_are_refused,
)
over_the_contract = pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])


def decided_as_one(run_in_rank: Callable[[Job, int], list[dict[str, Any]]], job: Job) -> dict[str, Any]:
    """Run a job in two processes, whole and resumed, and check that all decide and end alike; return one outcome.

    Args:
      run_in_rank: of a module; takes the job and a free port, returns both outcomes with `decisions` and `weights`.
      job: to run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    crew = Crew(2, job.folder)
    try:
        results = crew.run(run_in_rank, job, port, group=False)
    finally:
        crew.close()
    for result in results:
        assert isinstance(result, list), result
    whole = results[0][0]
    for outcome in (outcome for result in results for outcome in result):  # of both ranks, whole and resumed
        assert outcome["decisions"] == whole["decisions"]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(outcome["weights"], whole["weights"], strict=True))
    return whole
