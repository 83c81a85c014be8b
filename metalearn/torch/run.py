"""A run under way: what measures it, decides and takes back, and in which order the end of an interval needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import Any

import torch

from metalearn.controller.decision import Decision
from metalearn.profiles import DomainProfile
from metalearn.safety.constraints import Usage
from metalearn.safety.drift.attribution import same_values
from metalearn.safety.rollback import Rollback
from metalearn.session import Session
from metalearn.signals import IntervalStatistics
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import Bindings
from metalearn.torch.budget import Budget
from metalearn.torch.calls import CallOrder, IdleCalls
from metalearn.torch.constraining import Constraining
from metalearn.torch.distributed import Ranks, Standing, own_part
from metalearn.torch.drift_watch import DriftWatch, no_way_back
from metalearn.torch.metric import Losses
from metalearn.torch.monitor import Measured, Monitor
from metalearn.torch.overrides import Change, Overrides
from metalearn.torch.recovery import Condition, Recovery
from metalearn.torch.run_log import RunLog, measured
from metalearn.torch.schedule_table import ScheduleTable
from metalearn.torch.sharding import reshard
from metalearn.torch.usage import UsageMeter


@dataclass(kw_only=True, eq=False)
class Run:
    """Counts steps, decides at the ends of intervals, and goes back where one went wrong.

    Args:
      optimizer, model: of the run.
      session: decides.
      ranks: processes that train together; None if this one trains alone.
      bindings: sets what is decided while the optimizer steps.
      overrides: what is set by others.
      constraining: keeps throughput and memory.
      budget: of the controller's own time.
      monitor: measures an interval.
      usage: measures time and memory.
      average: of the weights, where the loop evaluates that.
      log: of the decisions.
      drift: watches for it, if that is wanted.
      recovery: takes snapshots and goes back to them, if that is wanted.
    """

    optimizer: torch.optim.Optimizer
    model: torch.nn.Module | None
    session: Session
    ranks: Ranks | None
    bindings: Bindings
    overrides: Overrides
    constraining: Constraining
    budget: Budget
    monitor: Monitor
    usage: UsageMeter
    average: WeightAverage | None
    log: RunLog
    drift: DriftWatch | None
    recovery: Recovery | None
    interval: int = field(init=False)
    """optimizer steps between decisions"""
    should_validate: bool = field(default=False, init=False)
    """whether an interval has just ended"""
    rolled_back: bool = field(default=False, init=False)
    """whether the last call brought the last good snapshot back"""
    decisions: list[Decision] = field(default_factory=list, init=False)
    """all that were ever in force, in this order"""
    validation: float = field(default=math.nan, init=False)
    """reported of this interval; higher is better, NaN if nothing was"""
    losses: Losses = field(default_factory=Losses, init=False)
    """reported beside it"""
    reported: bool = field(default=False, init=False)
    """whether something was since the interval ended"""
    told: dict[str, Any] | None = field(default=None, init=False)
    """of the decision just made, what it was made from: session and statistics go into the snapshot to be taken"""
    host_seconds: float = field(default=0.0, init=False)
    """that decisions and averages have taken"""

    def __post_init__(self) -> None:
        self.interval = self.session.interval
        self._recorded_steps = 0
        self._table = ScheduleTable(self.session.multipliers)
        self._idle_calls, self._call_order = IdleCalls(self.optimizer), CallOrder(self.optimizer)

    def begin(self) -> None:
        """Puts the start configuration in force, and hooks into the optimizer."""
        self.accept(self.session.ask())
        self.overrides.attach(self.optimizer)
        self.bindings.attach(self._before_steps, None if self.average is None else self._update_average, self._probe)
        self.optimizer._metalearn_attached = True  # type: ignore[attr-defined]

    def end(self) -> None:
        """Lets go of optimizer and model."""
        if self.bindings.release():
            self._call_order.release()
            self.overrides.detach()
            self.optimizer._metalearn_attached = False  # type: ignore[attr-defined]
            if self.ranks is not None:
                self.ranks.release()
            self.log.end()

    @property
    def decision(self) -> Decision:
        """The decision in force, with what is overridden in it."""
        return self.overrides.in_force(self.session.ask())

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """What was rolled back so far."""
        return () if self.recovery is None else tuple(self.recovery.records)

    def advance(self, loss: torch.Tensor | float) -> None:
        """Counts one training step; see `MetaScheduler.step`."""
        monitor, steps = self.monitor, self.bindings.steps
        self.rolled_back = False
        if steps == self._recorded_steps:
            self._call_order.call(loss)
            self._idle_calls.count(steps)
            return
        if self.should_validate:
            self.decide(reports=False)
            if self.rolled_back:
                return
        monitor.record(loss)
        self._recorded_steps = steps
        self.should_validate = monitor.steps >= self.interval
        if self.should_validate:
            self.budget.end_interval()
            self.usage.end_interval()
            if self.ranks is not None:
                self.ranks.await_report()
        if self.recovery is not None:
            self.save_told()
            if self.should_validate:
                self.recovery.end_interval()

    def observe_profile(self, window: DomainProfile, domain: DomainProfile) -> None:
        """Takes in the profile of a window of incoming interactions, where drift is watched for."""
        began, drift = perf_counter(), self.drift
        assert drift is not None

        def observe() -> None:
            response = drift.observe_profile(window, domain, step=self.bindings.steps)
            if response is not None:
                self.accept(response)

        self.led(observe)
        self.host_seconds += perf_counter() - began

    def apply_change(self, change: Change, *, author: str, reason: str) -> None:
        """Has what was overridden, or given back, take effect, and logs it."""
        self.put_in_force(self.decision)
        if "dropout" in change.after and "dropout" not in self.decision.run:
            self.bindings.release_dropout()
        self.log.override(change, step=self.bindings.steps, author=author, reason=reason)

    def state_dict(self, *, of_all_ranks: bool) -> dict[str, Any]:
        """Returns everything that later decisions depend on; see `MetaScheduler.state_dict`."""
        ranks, position = self.ranks, self._position(self.session.state_dict())
        averages = self.average is not None
        return {
            **position,
            "ranks": ranks and ranks.part_of_state(position["monitor"], of_all=of_all_ranks, averages=averages),
            "recovery": None if self.recovery is None else self.recovery.state_dict(),
            "constraints": self.constraining.state_dict(),
            "drift": None if self.drift is None else self.drift.state_dict(),
            "decisions": [decision.as_dict() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; see `MetaScheduler.load_state_dict`."""
        self._go_to(own_part(state, self.ranks))
        self.decisions = [Decision.from_dict(decision) for decision in state["decisions"]]
        if self.recovery is not None and state["recovery"] is not None:
            self.recovery.load_state_dict(state["recovery"])
        if "constraints" in state:  # states of before the guard kept any lack it
            self.constraining.load_state_dict(state["constraints"])
        self.usage.start_interval()
        if self.drift is not None and state.get("drift") is not None:
            self.drift.load_state_dict(state["drift"])
        self.log.first = self.decisions[0] if self.bindings.steps == 0 else None

    def resume_from_disk(self, recovery: Recovery) -> bool:
        """Goes on from the snapshot that an earlier process has left; returns whether there was one."""
        saved = recovery.left_behind()
        if saved is None:
            return False
        self._go_to(saved)
        recovery.resume()
        self.usage.start_interval()
        self.decisions.clear()
        self.log.first = None  # the process before has logged it
        steps = self.bindings.steps
        self.log.rollback(Rollback(step=steps, to_step=steps, reason="resumed from disk", fallback=False))
        self.decisions.append(self.decision)
        if saved["statistics"] is not None:
            self.accept(self.session.tell(IntervalStatistics(*saved["statistics"])))
        return True

    def _position(self, session: Mapping[str, Any]) -> dict[str, Any]:
        """Returns where the run is, with a given state of the session."""
        return {
            "session": session,
            "bindings": self.bindings.state_dict(),
            "overrides": self.overrides.state_dict(),
            "monitor": self.monitor.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "recorded_steps": self._recorded_steps,
            "budget": self.budget.state_dict(),
            "validation": self.validation,
            "losses": list(self.losses),
            "curves": None if self.drift is None else self.drift.curves(),
        }

    def _go_to(self, position: Mapping[str, Any]) -> None:
        """Inverts `_position`."""
        self.session.load_state_dict(position["session"])
        self.bindings.load_state_dict(position["bindings"])
        if "overrides" in position:  # states of before there were any lack it
            self.overrides.load_state_dict(position["overrides"])
        if "budget" in position:  # states of before intervals were measured lack it
            self.budget.load_state_dict(position["budget"])
            self._set_interval(self.budget.interval)
        self.monitor.load_state_dict(position["monitor"])
        if self.average is not None:
            self.average.load_state_dict(position["average"])
        self._recorded_steps = int(position["recorded_steps"])
        self.should_validate = self.monitor.steps >= self.interval
        self.validation = float(position["validation"])
        self.losses = Losses(*position.get("losses", ()))  # states of before they were reported lack them
        if self.drift is not None and position.get("curves") is not None:
            self.drift.rewind(position["curves"])
        self.told = None
        self.put_in_force(self.decision)

    def save_told(self) -> None:
        """Takes the snapshot that the decision just made calls for, if it does."""
        if self.told is not None:
            self._save(**self.told)

    def _save(self, session: Mapping[str, Any], statistics: Sequence[Any] | None) -> None:
        """Takes a snapshot.

        Args:
          session: its state before the last decision, which a rollback is to make anew.
          statistics: that it was made from; None if the snapshot does not follow one.
        """
        recovery, self.told = self.recovery, None
        assert recovery is not None
        reshard(self.model)
        recovery.save(self.bindings.steps, {**self._position(session), "statistics": statistics})
        recovery.drifting = self.drift is not None and self.drift.outlying
        recovery.start_interval()

    def can_roll_back(self) -> bool:
        """Says whether there is a snapshot to go back to, and not too many in succession were gone back to."""
        recovery = self.recovery
        return recovery is not None and recovery.ready and not recovery.exhausted

    def roll_back(self, reason: str, *, starved: bool = False) -> None:
        """Goes back to the last good snapshot, for want of memory or another reason, and decides anew from there."""
        recovery = self.recovery
        assert recovery is not None
        step, saved, overridden = self.bindings.steps, recovery.saved(), self.overrides.values
        reshard(self.model)
        self._go_to(saved)  # before the optimizer: this puts back what a step that raised has left in its groups
        record = recovery.restore(step, reason, starved=starved)
        self.rolled_back = True
        self.log.rollback(record)
        if (undone := self.overrides.undone_since(overridden)) is not None:
            self.log.override(undone, step=self.bindings.steps, author="rollback", reason=reason)
        if record.fallback:
            self.session.fall_back(reason)
        else:
            self.session.bar(reason)
        before = self.session.ask()
        self.accept(before)
        if saved["statistics"] is not None:
            self.accept(self.session.tell(IntervalStatistics(*saved["statistics"])))
        recovery.retries(held=same_values(before, self.session.ask()))
        recovery.start_interval()
        self.usage.start_interval()

    def survive_out_of_memory(self, reason: str) -> None:
        """Goes back from a step that ran out of memory, and with constraints never to as large a batch."""
        self.constraining.ran_out_of_memory()
        self.roll_back(reason, starved=True)
        if (size := self.constraining.too_large) is not None and self.session.mode == "control":
            self.apply_change(self.overrides.impose({"batch_size": size}), author="constraint", reason=reason)

    def _before_steps(self) -> list[float]:
        """Returns the schedule's factors from the coming step up to the next one that is to be probed."""
        self._call_order.first_step()
        self.log.begin()
        if self.recovery is not None and self.recovery.needs_first and self.session.mode != "shadow":
            self._save(self.session.state_dict(), None)
        return self._table.from_step(self.bindings.steps, max(self._remaining() - 2, 1))

    def _probe(self) -> None:
        """Probes the step that `_before_steps` was called for, if that is to be probed.

        A fused optimizer under a GradScaler gets its gradients scaled, by a factor that only the device knows, and
        unscales them itself: such steps are not measured.
        """
        remaining = self._remaining()
        if remaining <= 2 and getattr(self.optimizer, "grad_scale", None) is None:
            # An interval that awaits its report ends at this step at the latest; this step then opens the next one.
            began, worked = perf_counter(), thread_time()
            self.monitor.before_step(remaining if remaining > 0 else self.interval)
            self.budget.probed(perf_counter() - began, thread_time() - worked)

    def _remaining(self) -> int:
        """Returns how many steps the interval has left, the coming one included."""
        return self.interval - self.monitor.steps - self.bindings.steps + self._recorded_steps

    def _update_average(self) -> None:
        if self.average is not None and self.bindings.steps % AVERAGE_EVERY == 0:
            began = perf_counter()  # it never falls into a step of which the hooks are timed
            self.average.update()
            self.host_seconds += perf_counter() - began

    def decide(self, *, reports: bool) -> None:
        """Ends an interval.

        Args:
          reports: whether `report` was called for it.
        """
        began, worked = perf_counter(), thread_time()
        statistics, condition = self._measure(reports=reports)
        self.validation, self.losses, self.reported = math.nan, Losses(), False
        self.should_validate = False

        rate = float(statistics.samples) / max(condition.seconds, 1e-9)
        usage = Usage(rate, condition.memory_bytes, self.usage.utilisation)
        self.constraining.judge(usage, acts=self.session.mode == "control")

        def conclude() -> None:
            self._conclude(statistics, condition)
            self._end_decision(perf_counter() - began, thread_time() - worked)

        self.led(conclude)
        self.usage.start_interval()
        if not self.rolled_back and (relief := self.constraining.relief).batch_size is not None:
            change = self.overrides.impose({"batch_size": relief.batch_size})
            self.apply_change(change, author="constraint", reason="; ".join(relief.sentences))
            self.usage.forget_larger_batches()

    def _measure(self, *, reports: bool) -> tuple[IntervalStatistics, Condition]:
        """Returns what all processes have measured in the interval, and how they are at its end."""
        recovery, condition = self.recovery, Condition(True, self.usage.seconds, math.nan, ready=False)
        if recovery is not None and recovery.ready and self.session.mode != "shadow":
            # Of several processes the first alone knows when a snapshot is due.
            condition = recovery.condition(surely=self.ranks is not None)
        condition = condition._replace(memory_bytes=self.usage.memory_bytes())

        def meet(mine: Measured) -> Measured:
            nonlocal condition
            assert self.ranks is not None
            standing = Standing(self.decision, reports)
            everybodys, all_have = self.ranks.meet(mine, condition, standing, interval=self.interval)
            if recovery is not None and condition.ready and not all_have.ready:
                recovery.turn_off()  # another process has no room for snapshots
            condition = all_have
            return everybodys

        statistics = self.monitor.statistics(
            validation=self.validation,
            losses=self.losses,
            batch_size=self.overrides.samples_per_step(self.session.batch_size),
            merge=None if self.ranks is None else meet,
        )
        return statistics, condition

    def _conclude(self, statistics: IntervalStatistics, condition: Condition) -> None:
        """Judges an interval, goes back if it went wrong, and decides.

        Args:
          statistics: of the interval.
          condition: of the run at its end.
        """
        recovery, constraining = self.recovery if condition.ready else None, self.constraining
        found = () if recovery is None else recovery.judge(statistics, condition, constraining.unkept)
        if found:
            self.roll_back("; ".join(found))
        elif not self._goes_back(statistics):
            if recovery is not None:
                recovery.start_interval()
                if recovery.due:
                    with recovery.timed():
                        self.told = {"session": self.session.state_dict(), "statistics": list(statistics)}
            notes = (*constraining.report, *(() if recovery is None else recovery.excuses))
            decision = self.session.tell(statistics, worsening=constraining.barred, notes=notes)
            self.accept(decision, **{**measured(statistics), **constraining.measured(), "interval": self.interval})

    def _goes_back(self, statistics: IntervalStatistics) -> bool:
        """Responds to drift, if there is any; returns whether that was a rollback."""
        if self.drift is None:
            return False
        barrier = no_way_back(self.recovery, self.session)
        response = self.drift.end_interval(statistics, step=self.bindings.steps, no_way_back=barrier)
        if response is None:
            return False
        self.accept(response)
        if response.response == "roll_back":
            self.roll_back(response.reasons[0])
        return self.rolled_back

    def _end_decision(self, seconds: float, processor_seconds: float) -> None:
        """Counts what a decision took, and lengthens intervals if the budget is to be kept so."""
        self.host_seconds += seconds
        if self.budget.decided(seconds, processor_seconds, self.bindings.seconds):
            self._set_interval(self.budget.interval)

    def _set_interval(self, interval: int) -> None:
        self.interval = interval
        self.monitor.resize(interval)

    def led(self, act: Callable[[], None]) -> None:
        """Acts; in a run of several processes the first does, and the others take over what came of it."""
        if self.ranks is None:
            act()
            return
        decisions, rollbacks = len(self.decisions), len(self.rollbacks)

        def outcome() -> dict[str, Any]:
            """Returns what the first process has come to, for all."""
            return {
                "session": self.session.state_dict(),
                "drift": None if self.drift is None else self.drift.state_dict(),
                "recovery": None if self.recovery is None else self.recovery.state_dict(),
                "budget": self.budget.state_dict(),
                "decisions": [decision.as_dict() for decision in self.decisions[decisions:]],
                "restores": len(self.rollbacks) > rollbacks,
                "told": self.told,
            }

        self.ranks.led(act, outcome, self._adopt)

    def _adopt(self, outcome: Mapping[str, Any]) -> None:
        """Takes over what another process has decided for all."""
        recovery = self.recovery
        if recovery is not None:
            if outcome["restores"]:
                reshard(self.model)
                self._go_to(recovery.saved())
                self.rolled_back = True
            recovery.follow(outcome["recovery"], restore=outcome["restores"])
            recovery.start_interval()
        if self.drift is not None:
            self.drift.load_state_dict(outcome["drift"])
        self.session.load_state_dict(outcome["session"])
        self.budget.load_state_dict(outcome["budget"])
        self._set_interval(self.budget.interval)
        for decision in outcome["decisions"]:
            self.accept(Decision.from_dict(decision))
        self.told = outcome["told"]

    def accept(self, decision: Decision, **context: Any) -> None:
        """Takes a decision, puts it in force and logs it, with what was measured before it."""
        decision = self.overrides.in_force(decision)
        self.decisions.append(decision)
        self.put_in_force(decision)
        self.log.decision(decision, context, first=len(self.decisions) == 1)

    def put_in_force(self, decision: Decision) -> None:
        """Has the steps to come take a decision's values."""
        self.bindings.take(self.overrides.scaled(decision.groups))
        if "dropout" in decision.run:
            self.bindings.set_dropout(decision.run["dropout"])
