"""The arms of an episode: a guarded run, its unguarded twin, and the fallback configuration that both are held against.

A run ends with its last weights, in a run of unknown length with the averaged ones: best-validation weights would
forgive whatever happened after the best validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from envs.recommenders import RECOMMENDERS
from envs.sandbox.cells import Cell
from envs.sandbox.faults import Faults, Feed
from envs.sandbox.incidents import Episode, Incident
from envs.sandbox.policies import HOSTILE, RecklessAdvisor, Unguarded, hostile_controller, wrong_profile
from metalearn.controller.config import CONTROLLED
from metalearn.controller.controller import Controller
from metalearn.errors import InvalidArgumentError
from metalearn.profiles import DomainProfile
from metalearn.safety import GuardConfig
from metalearn.safety.drift import DriftConfig
from metalearn.torch import Constraints, MetaScheduler, RollbackConfig
from metalearn.torch.recovery import MOST_INTERVALS

LEAST_THROUGHPUT = 50.0
"""Steps per second that a constrained run must keep to."""
MOST_TRIES = 8
"""Times the steps of a run after which it counts as one that does not end."""


@dataclass(frozen=True, kw_only=True)
class Guarding:
    """How the guarded arm is set up beyond what an episode draws.

    Args:
      guard: of the MetaScheduler.
      folder: for snapshots on disk; None keeps them in memory.
    """

    guard: GuardConfig | None = None
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run.

    Args:
      metric: test NDCG@10 at its end; None if it did not get there.
      finite: whether every weight is, at its end or where it broke.
      error: what it was lost by; None if it was not.
      rollbacks: of the run.
      fallen_back: whether it ended on the base schedule.
      most_lost: most steps that one rollback, or a restart, took back.
      allowed_loss: steps that it may lose at once.
    """

    metric: float | None
    finite: bool
    error: str | None = None
    rollbacks: int = 0
    fallen_back: bool = False
    most_lost: int = 0
    allowed_loss: int = 0

    @property
    def lost(self) -> bool:
        """Whether it raised, did not end, could not be resumed, or lost more work than it may."""
        return self.error is not None or self.most_lost > self.allowed_loss


def run_fallback(cell: Cell, controller: Controller, seed: int, drift: Incident | None = None) -> float:
    """Trains with the fallback configuration: the controller's base and its schedule, held throughout.

    Args:
      cell: where.
      controller: whose base.
      seed: of weights and batches.
      drift: in the data, which the fallback sees as well; nothing else strikes it.

    Returns:
      Test NDCG@10.
    """
    episode = Episode(index=-1, incidents=() if drift is None else (drift,), seed=seed, draw=0.0)

    def steer(optimizer: torch.optim.Optimizer, model: torch.nn.Module, feed: Feed) -> MetaScheduler:
        at_base = GuardConfig(deviation=dict.fromkeys(CONTROLLED, 0.0))
        return _scheduler(optimizer, model, cell, controller, guard=at_base, steering="frozen")

    run = Run(cell, episode, steer, survives=False)
    run.train()
    return run.test()


def run_episode(
    episode: Episode,
    cell: Cell,
    controller: Controller,
    *,
    guarded: bool,
    others: Sequence[DomainProfile] = (),
    guarding: Guarding | None = None,
) -> Outcome:
    """Trains one arm of an episode, and says what became of it.

    Args:
      episode: what befalls it.
      cell: where.
      controller: sound.
      guarded: which arm.
      others: profiles that may be told instead of the cell's.
      guarding: of the guarded arm.
    """
    run = make_run(episode, cell, controller, guarded=guarded, others=others, guarding=guarding or Guarding())
    if isinstance(run, Outcome):
        return run
    return finish(run, guarded=guarded)


def make_run(
    episode: Episode,
    cell: Cell,
    controller: Controller,
    *,
    guarded: bool,
    others: Sequence[DomainProfile],
    guarding: Guarding,
) -> Run | Outcome:
    """Sets up one arm; arguments as of `run_episode`. Returns an outcome where that already fails."""
    steer = _guarded if guarded else _unguarded
    try:
        return Run(
            cell,
            episode,
            lambda optimizer, model, feed: steer(optimizer, model, feed, cell, episode, controller, others, guarding),
            survives=guarded,
        )
    except Exception as error:
        return Outcome(metric=None, finite=True, error=f"at the start: {_said(error)}")


def finish(run: Run, *, guarded: bool, lost_by_restart: int = 0) -> Outcome:
    """Trains a run to its end, and says what became of it.

    Args:
      run: to be trained.
      guarded: which arm it is.
      lost_by_restart: steps that were lost when it was resumed.
    """
    error = None
    try:
        run.train()
        metric = run.test()
    except Exception as raised:
        metric, error = None, _said(raised)
    records = run.scheduler.rollbacks
    interval = run.cell.budget.interval
    intervals = 1 if run.episode.every_interval or not guarded else MOST_INTERVALS
    return Outcome(
        metric=metric,
        finite=all(bool(torch.isfinite(p).all()) for p in run.model.parameters()),
        error=error,
        rollbacks=len(records),
        fallen_back=any(record.fallback for record in records),
        most_lost=max([lost_by_restart, *(record.step - record.to_step for record in records)]),
        allowed_loss=intervals * interval + 1,  # without a report an interval is judged one step later
    )


class Run:
    """One training run under incidents.

    Args:
      cell: where.
      episode: what befalls it; its seed is the run's.
      steer: makes what steers the run, of optimizer, model and feed.
      survives: whether the loop catches errors for want of memory.
    """

    def __init__(
        self,
        cell: Cell,
        episode: Episode,
        steer: Callable[[torch.optim.Optimizer, torch.nn.Module, Feed], MetaScheduler | Unguarded],
        *,
        survives: bool,
    ) -> None:
        torch.manual_seed(episode.seed)
        self.cell, self.episode = cell, episode
        self.model = RECOMMENDERS[cell.family].for_domain(
            cell.domain, dim=cell.budget.dim, generator=torch.Generator().manual_seed(episode.seed)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameter_groups())
        self.feed = Feed(cell, self.model, episode.seed, episode.find("drift"))
        self.scheduler = steer(self.optimizer, self.model, self.feed)
        self.faults = Faults(episode, self.feed, cell.budget.steps)
        self.optimizer.register_step_pre_hook(lambda *_: self.faults.allocate("step"))
        self._survives = survives
        self.on_interval: Callable[[], None] = lambda: None
        """called at the end of each interval, when it has been decided"""
        self.on_step: Callable[[], None] = lambda: None
        """called after each step"""

    def train(self) -> None:
        """Trains to the end.

        Raises:
          RuntimeError: there is none, because the run goes back again and again.
        """
        steps = self.cell.budget.steps
        while self.scheduler.steps < steps:
            if self.faults.tries >= MOST_TRIES * steps:
                raise RuntimeError(f"no end after {self.faults.tries} tries of {steps} steps")
            scheduler = self.scheduler
            surviving = (
                scheduler.survive_out_of_memory()
                if self._survives and isinstance(scheduler, MetaScheduler)
                else nullcontext()
            )
            with surviving:
                self._step()
            if scheduler.rolled_back:
                continue
            self.on_step()
            if scheduler.should_validate:
                self._report()
                self.on_interval()

    def test(self) -> float:
        """Returns test NDCG@10."""
        with self.scheduler.averaged_parameters():
            return self.cell.evaluators["test"](self.model).mean_ndcg

    def _step(self) -> None:
        faults = self.faults
        faults.before_batch()
        batch = self.feed.next()
        faults.allocate("forward")
        loss = faults.loss(self.model(*batch))
        loss.backward()
        faults.gradients(list(self.model.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step(loss)

    def _report(self) -> None:
        with self.scheduler.averaged_parameters():
            value = self.cell.evaluators["validation"](self.model).mean_ndcg
        told = self.faults.metric(value)
        if told is None:
            return
        try:
            self.scheduler.report(told)
        except InvalidArgumentError:
            return  # refused by name: a loop goes on without this metric


def _guarded(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    feed: Feed,
    cell: Cell,
    episode: Episode,
    controller: Controller,
    others: Sequence[DomainProfile],
    guarding: Guarding,
) -> MetaScheduler:
    least = LEAST_THROUGHPUT * cell.budget.batch_size if episode.constrained else None
    rollback = RollbackConfig(
        every=1 if episode.every_interval else None,
        place="auto" if guarding.folder is None else "disk",
        folder=guarding.folder,
    )
    return _scheduler(
        optimizer,
        model,
        cell,
        hostile_controller(controller, episode),
        profile=wrong_profile(cell.domain.profile, others, episode),
        rollback=rollback,
        drift=DriftConfig(),
        tracked=(feed,) if episode.rewinds else (),
        constraints=Constraints(min_samples_per_second=least),
        guard=guarding.guard,
        **_advised(cell, episode),
    )


def _unguarded(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    feed: Feed,
    cell: Cell,
    episode: Episode,
    controller: Controller,
    others: Sequence[DomainProfile],
    guarding: Guarding,
) -> MetaScheduler | Unguarded:
    """Steers without rollback; where the incident is what is proposed, without the guard as well."""
    profile = wrong_profile(cell.domain.profile, others, episode)
    scheduler = _scheduler(optimizer, model, cell, controller, profile=profile)
    if not any(incident.name in (*HOSTILE, "learning_rate_proposal") for incident in episode.incidents):
        return scheduler
    start = scheduler.decision
    scheduler.detach()
    return Unguarded(optimizer, model, cell=cell, start=start, controller=controller, episode=episode)


def _advised(cell: Cell, episode: Episode) -> dict[str, Any]:
    proposal = episode.find("learning_rate_proposal")
    return {} if proposal is None else {"steering": "advise", "advisor": RecklessAdvisor(proposal, cell.budget.steps)}


def _scheduler(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    cell: Cell,
    controller: Controller,
    *,
    profile: DomainProfile | None = None,
    **options: Any,
) -> MetaScheduler:
    return MetaScheduler(
        optimizer,
        model=model,
        domain=profile or cell.domain.profile,
        family=controller.config.known_family(cell.family),
        horizon=cell.horizon,
        batch_size=cell.budget.batch_size,
        interval=cell.budget.interval,
        controller=controller,
        **options,
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
