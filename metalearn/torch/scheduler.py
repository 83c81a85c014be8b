"""MetaScheduler: a pretrained controller in a PyTorch training loop, stepped like a learning-rate scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from metalearn import __version__ as version
from metalearn.audit import AuditLog
from metalearn.controller.controller import Controller, load_controller
from metalearn.controller.decision import Decision, Mode
from metalearn.controller.modes import Advisor
from metalearn.errors import SessionError
from metalearn.profiles import DomainProfile
from metalearn.safety.drift import DriftConfig, DriftReport
from metalearn.safety.guard import GuardConfig
from metalearn.safety.rollback import Rollback, RollbackConfig
from metalearn.signals import IntervalStatistics
from metalearn.torch.arguments import check_optimizer, check_profile
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import Bindings, infer_roles
from metalearn.torch.calls import MAX_IDLE_CALLS, IdleCalls, out_of_memory
from metalearn.torch.drift_watch import DriftWatch, no_way_back
from metalearn.torch.metric import Metric
from metalearn.torch.monitor import Monitor
from metalearn.torch.recovery import Recovery
from metalearn.torch.run_log import RunLog, measured
from metalearn.torch.schedule_table import ScheduleTable

__all__ = ["MAX_IDLE_CALLS", "MetaScheduler"]


class MetaScheduler:
    """Steers learning rate, weight decay, beta1 (each parameter group its own) and dropout of a training run.

    Decisions are in force while `optimizer.step` runs and at no other time: `param_groups` keeps the user's and other
    schedulers' values, and what those schedulers make of the learning rate multiplies the controller's.

    With `rollback`, an interval that goes wrong (what that is, `RollbackConfig` says) is taken back: weights,
    optimizer, random generators and what is `tracked` are again as in the last snapshot, `steps` counts from there,
    and what was decided since is barred for a while. A loop that is to take all steps of its horizon goes on
    `while scheduler.steps < horizon`; one over a fixed number of steps ends that much earlier on its schedule.

    Args:
      optimizer: AdamW for the whole effect. Of others what can be controlled is (`masked` says what is not, and why),
        from the optimizer's own values on.
      model: bound for its dropout layers, and for inferring the groups' roles.
      domain: profile of the training interactions, from `metalearn.profile_domain`.
      family: of the model, if the controller was meta-trained on it: one of `load_controller().config.families`. Any
        other model is fine without.
      horizon: optimizer steps of the whole run. Unknown is fine: then the rate does not decay, and models are to be
        evaluated and exported inside `averaged_parameters`.
      batch_size: training samples per step; gives the controller epochs to count in.
      interval: optimizer steps between decisions.
      controller: a `Controller`, a checkpoint's path, or None for the one that ships with metalearn.
      metric: key of the metric in what `report` gets; needed only if there are several and none is a ranking metric.
      mode: "max" if a higher metric is better, "min" if lower.
      decision_log: audit log to append decisions to, or the path of one.
      name: of this run, in the decision log.
      rollback: when a run goes back to its last good snapshot, and what that may cost; None never does, and takes no
        memory for snapshots: two hold twice what model and optimizer do.
      drift: watches the validation metric, the training loss and the profiles given to `observe_profile`, and responds
        by degree: asks for a profile, loosens the policy, proposes the start anew, rolls back. None does not.
      tracked: what else goes back: other schedulers (step them before this one), GradScaler, sampler or loader,
        random generators; all with `state_dict` and `load_state_dict`. The data goes on where it is if its position is
        not tracked. The first snapshot is taken at the first optimizer step.
      steering: `control` decides; `shadow` decides and logs, and changes nothing; `advise` asks `advisor` before each
        change; `frozen` leaves the values where they are. See `switch`.
      advisor: for `advise`: called with a `Decision`, returns True, False, or an object with `groups` and `run`.
      guard: tightens what the controller may do.

    Raises:
      InvalidArgumentError: an argument is out of range; the message names it.
      CheckpointError: the controller cannot be loaded.

    Example:
      >>> import metalearn
      >>> from metalearn.torch import MetaScheduler
      >>> rows = metalearn.Interactions.from_arrays([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 0])
      >>> table = torch.nn.Embedding(3, 4)
      >>> optimizer = torch.optim.AdamW(table.parameters())
      >>> scheduler = MetaScheduler(optimizer, domain=metalearn.profile_domain(rows), horizon=10)
      >>> for _ in range(10):
      ...     loss = table.weight.square().mean()
      ...     loss.backward()
      ...     optimizer.step()
      ...     optimizer.zero_grad()
      ...     scheduler.step(loss)
      ...     if scheduler.should_validate:
      ...         decision = scheduler.report(-loss.item())
      >>> decision.index
      5
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        domain: DomainProfile,
        family: str | None = None,
        horizon: int | None = None,
        batch_size: int | None = None,
        interval: int | None = None,
        controller: Controller | str | Path | None = None,
        metric: str | None = None,
        mode: Literal["max", "min"] = "max",
        decision_log: AuditLog | str | Path | None = None,
        name: str = "",
        rollback: RollbackConfig | None = None,
        drift: DriftConfig | None = None,
        tracked: Sequence[Any] = (),
        steering: Mode = "control",
        advisor: Advisor | None = None,
        guard: GuardConfig | None = None,
    ) -> None:
        check_optimizer(optimizer)
        check_profile("domain", domain)
        self._metric = Metric(metric, mode)
        self.optimizer = optimizer
        self._bindings = Bindings(optimizer, model)
        loaded = controller if isinstance(controller, Controller) else load_controller(controller)
        self._session = loaded.start(
            domain,
            self._bindings.space,
            roles=infer_roles(optimizer, model),
            family=family,
            horizon=horizon,
            batch_size=batch_size,
            interval=interval,
            initial=None if self._bindings.uses_prior else self._bindings.initial(),
            withheld=self._bindings.withheld,
            mode=steering,
            advisor=advisor,
            guard=guard,
        )
        self._interval = self._session.interval
        self._monitor = Monitor(optimizer, self._interval)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._average = WeightAverage(params) if horizon is None and steering != "shadow" else None
        self._log = RunLog(
            AuditLog(decision_log, name=name) if isinstance(decision_log, str | Path) else decision_log,
            domain,
            {
                "controller_fingerprint": loaded.fingerprint,
                "controller_version": version,
                "family": family,
                "horizon": horizon,
                "interval": self._interval,
                "metric": metric,
            },
        )
        self._drift = None if drift is None else DriftWatch(drift, self._session, self._log)
        self._recovery = (
            None if rollback is None else Recovery(rollback, model=model, optimizer=optimizer, tracked=tracked)
        )
        self._told: dict[str, Any] | None = None
        """of the decision just made, what it was made from: session and statistics go into the snapshot to be taken"""
        self._in_average = False
        self._recorded_steps = 0
        self._idle_calls = IdleCalls()
        self._host_seconds = 0.0
        self._validation = math.nan
        self._table = ScheduleTable(self._session.multipliers)
        self.should_validate = False
        """Whether an interval has just ended: evaluate and `report` now, or it decides at the next step without one."""
        self.rolled_back = False
        """Whether the last call brought the last good snapshot back: the loop goes on from there."""
        self.decisions: list[Decision] = []
        """All that were ever in force, in this order; of rolled-back intervals too."""
        self._accept(self._session.ask())
        self._bindings.attach(self._before_steps, None if self._average is None else self._update_average)
        optimizer._metalearn_attached = True  # type: ignore[attr-defined]

    @property
    def interval(self) -> int:
        """Optimizer steps between decisions."""
        return self._interval

    @property
    def confidence(self) -> float:
        """Share of its reach that the controller uses on this domain, 0 to 1."""
        return self._session.confidence

    @property
    def decision(self) -> Decision:
        """The decision in force."""
        return self._session.ask()

    @property
    def steps(self) -> int:
        """Optimizer steps done; those that were rolled back do not count."""
        return self._bindings.steps

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """What was rolled back so far, and why."""
        return () if self._recovery is None else tuple(self._recovery.records)

    @property
    def drift(self) -> DriftReport | None:
        """The last change that was noticed, a report of degree "none" before the first; None if nothing is watched."""
        return None if self._drift is None else self._drift.last

    @property
    def awaits_profile(self) -> bool:
        """Whether a response to drift waits for `observe_profile`."""
        return self._drift is not None and self._drift.awaiting is not None

    @property
    def masked(self) -> Mapping[str, str]:
        """Controlled hyperparameters that cannot be changed on this optimizer or model, and why."""
        return dict(self._bindings.masked)

    @property
    def host_seconds(self) -> float:
        """Wall-clock seconds that decisions, probes and hooks have taken; of the hooks a sample is timed."""
        return self._host_seconds + self._bindings.seconds

    def multiplier(self, step: int) -> float:
        """Returns the base schedule's factor on the learning rates at an optimizer step."""
        return self._session.multiplier(step)

    def get_last_lr(self) -> list[float]:
        """Returns the learning rates of the last optimizer step, as torch schedulers do; before it the groups' own."""
        return self._bindings.last_rates()

    def step(self, loss: torch.Tensor | float) -> None:
        """Counts one training step; call it after `optimizer.step()`.

        A call without an optimizer step since the last one (GradScaler skipped it, gradients accumulate) is not one.

        Args:
          loss: of the batch, a scalar; it stays on its device.

        Raises:
          InvalidArgumentError: the loss is not a scalar.
          SessionError: it is called again and again without the optimizer stepping.
        """
        monitor, steps = self._monitor, self._bindings.steps
        self.rolled_back = False
        if steps == self._recorded_steps:
            self._idle_calls.count(steps)
            return
        if self.should_validate:
            self._decide()
            if self.rolled_back:
                return
        monitor.record(loss)
        self._recorded_steps = steps
        self.should_validate = monitor.steps >= self._interval
        if self._recovery is not None:
            if self._told is not None:
                self._save(**self._told)
            if self.should_validate:
                self._recovery.end_interval()

    def report(self, metrics: float | Mapping[str, float]) -> Decision:
        """Takes in validation metrics; at the end of an interval, decides.

        Args:
          metrics: the metric, or a mapping that holds it.

        Returns:
          The decision now in force. Inside `averaged_parameters` that is the one before: it decides when the weights
          are back.

        Raises:
          InvalidArgumentError: the mapping is empty, or it is unclear which entry is the metric.
        """
        self._validation = self._metric.read(metrics)
        self.rolled_back = False
        if self.should_validate and not self._in_average:
            self._decide()
            if self._told is not None:
                self._save(**self._told)
        return self.decision

    def observe_profile(self, window: DomainProfile, *, domain: DomainProfile | None = None) -> Decision:
        """Takes in the profile of the next window of incoming interactions: whether the data drifts, it shows.

        Windows are compared with those before them, and some twenty are needed for that: cut them alike, a day each for
        instance. A response that waits for a profile (`awaits_profile`) is made now.

        Args:
          window: from `metalearn.profile_domain`.
          domain: profile of all that the run trains on from now on, as the argument `domain` of the class was; by
            default that is the window.

        Returns:
          The decision now in force.

        Raises:
          SessionError: this MetaScheduler does not watch for drift.
          InvalidArgumentError: what is given is no profile.
        """
        if self._drift is None:
            raise SessionError("this MetaScheduler does not watch for drift; make it with drift=DriftConfig()")
        began = perf_counter()
        response = self._drift.observe_profile(window, window if domain is None else domain, step=self._bindings.steps)
        if response is not None:
            self._accept(response)
        self._host_seconds += perf_counter() - began
        return self.decision

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Puts averaged weights into the model for the time of the block: evaluate and export inside it.

        With a known horizon the rate decays and the weights themselves are the best: then the block changes nothing.
        """
        if self._average is None:
            yield
            return
        try:
            with self._average.swapped():
                self._in_average = True
                yield
        finally:
            self._in_average = False
        if self.should_validate and not math.isnan(self._validation):
            self.report(self._metric.told(self._validation))

    @contextmanager
    def survive_out_of_memory(self) -> Iterator[None]:
        """Goes back to the last good snapshot when a training step inside the block runs out of memory.

        Then `rolled_back` is true, the memory is free again, and the step is to be repeated. After repeated rollbacks
        nothing is left that the controller could take back: then the error is raised.

        Example:
          >>> def train(loader, scheduler, train_step):
          ...     for batch in loader:
          ...         with scheduler.survive_out_of_memory():
          ...             scheduler.step(train_step(batch))
          ...         if scheduler.rolled_back:
          ...             continue
          ...         if scheduler.should_validate:
          ...             scheduler.report(validate())
        """
        self.rolled_back = False
        with out_of_memory(self.optimizer, can_roll_back=self._can_roll_back, roll_back=self._roll_back):
            yield

    def _can_roll_back(self) -> bool:
        recovery = self._recovery
        return recovery is not None and recovery.ready and not recovery.exhausted

    def switch(self, steering: Mode, *, advisor: Advisor | None = None) -> Decision:
        """Changes what becomes of decisions; see `steering` of the class.

        A run that leaves `shadow` goes on from the optimizer's own values, one that enters it gets them back.

        Args:
          steering: from now on.
          advisor: for `advise`; None keeps the one there is.

        Returns:
          The decision now in force.

        Raises:
          InvalidArgumentError: there is no such mode, or no advisor.
        """
        leaves = self._session.mode == "shadow" and steering != "shadow"
        initial = self._bindings.initial() if leaves else None
        self._accept(self._session.switch(steering, advisor=advisor, initial=initial))
        if steering == "shadow":
            self._bindings.release_dropout()
        return self.decision

    def detach(self) -> None:
        """Lets go of the optimizer and the model: groups hold their own values, as all along, dropout layers again."""
        if self._bindings.release():
            self.optimizer._metalearn_attached = False  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later decisions depend on; tensors, numbers, strings, lists and dicts only."""
        return {
            **self._position(self._session.state_dict()),
            "recovery": None if self._recovery is None else self._recovery.state_dict(),
            "drift": None if self._drift is None else self._drift.state_dict(),
            "decisions": [decision.as_dict() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; nothing of it is kept by reference.

        Raises:
          SessionError: the state is of a run with other groups, horizon or interval.
        """
        self._go_to(state)
        self.decisions = [Decision.from_dict(decision) for decision in state["decisions"]]
        if self._recovery is not None and state["recovery"] is not None:
            self._recovery.load_state_dict(state["recovery"])
        if self._drift is not None and state.get("drift") is not None:
            self._drift.load_state_dict(state["drift"])
        self._log.first = self.decisions[0] if self._bindings.steps == 0 else None

    def _position(self, session: Mapping[str, Any]) -> dict[str, Any]:
        """Returns where the run is, with a given state of the session."""
        return {
            "session": session,
            "bindings": self._bindings.state_dict(),
            "monitor": self._monitor.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "recorded_steps": self._recorded_steps,
            "validation": self._validation,
            "curves": None if self._drift is None else self._drift.curves(),
        }

    def _go_to(self, position: Mapping[str, Any]) -> None:
        """Inverts `_position`."""
        self._session.load_state_dict(position["session"])
        self._bindings.load_state_dict(position["bindings"])
        self._monitor.load_state_dict(position["monitor"])
        if self._average is not None:
            self._average.load_state_dict(position["average"])
        self._recorded_steps = int(position["recorded_steps"])
        self.should_validate = self._monitor.steps >= self._interval
        self._validation = float(position["validation"])
        if self._drift is not None and position.get("curves") is not None:
            self._drift.rewind(position["curves"])
        self._told = None
        self._bindings.take(self.decision.groups)
        self._set_dropout(self.decision)

    def _save(self, session: Mapping[str, Any], statistics: Sequence[Any] | None) -> None:
        """Takes a snapshot.

        Args:
          session: its state before the last decision, which a rollback is to make anew.
          statistics: that it was made from; None if the snapshot does not follow one.
        """
        recovery, self._told = self._recovery, None
        assert recovery is not None
        recovery.save(self._bindings.steps, {**self._position(session), "statistics": statistics})
        recovery.start_interval()

    def _roll_back(self, reason: str) -> None:
        recovery = self._recovery
        assert recovery is not None
        step, saved = self._bindings.steps, recovery.saved()
        self._go_to(saved)  # before the optimizer: this puts back what a step that raised has left in its groups
        record = recovery.restore(step, reason)
        self.rolled_back = True
        self._log.rollback(record)
        if record.fallback:
            self._session.fall_back(reason)
        else:
            self._session.bar(reason)
        self._accept(self._session.ask())
        if saved["statistics"] is not None:
            self._accept(self._session.tell(IntervalStatistics(*saved["statistics"])))
        recovery.start_interval()

    def _before_steps(self) -> list[float]:
        """Probes if the coming step is to be probed; returns the schedule's factors up to the next step that is."""
        self._log.begin()
        if self._recovery is not None and self._recovery.needs_first and self._session.mode != "shadow":
            self._save(self._session.state_dict(), None)
        step = self._bindings.steps
        remaining = self._interval - self._monitor.steps - step + self._recorded_steps
        if remaining <= 2:
            # An interval that awaits its report ends at this step at the latest; this step then opens the next one.
            self._monitor.before_step(remaining if remaining > 0 else self._interval)
        return self._table.from_step(step, max(remaining - 2, 1))

    def _update_average(self) -> None:
        if self._average is not None and self._bindings.steps % AVERAGE_EVERY == 0:
            self._average.update()

    def _decide(self) -> None:
        began = perf_counter()
        statistics = self._monitor.statistics(validation=self._validation, batch_size=self._session.batch_size)
        self._validation = math.nan
        self.should_validate = False
        recovery = self._recovery
        if recovery is None or not recovery.ready or self._session.mode == "shadow":
            recovery = None
        found = () if recovery is None else recovery.judge(statistics)
        if found:
            self._roll_back("; ".join(found))
        elif not self._goes_back(statistics):
            if recovery is not None:
                recovery.start_interval()
                if recovery.due and not (self._drift is not None and self._drift.outlying):
                    with recovery.timed():
                        self._told = {"session": self._session.state_dict(), "statistics": list(statistics)}
            self._accept(self._session.tell(statistics), **measured(statistics))
        self._host_seconds += perf_counter() - began

    def _goes_back(self, statistics: IntervalStatistics) -> bool:
        """Responds to drift, if there is any; returns whether that was a rollback."""
        if self._drift is None:
            return False
        barrier = no_way_back(self._recovery, self._session)
        response = self._drift.end_interval(statistics, step=self._bindings.steps, no_way_back=barrier)
        if response is None:
            return False
        self._accept(response)
        if response.response == "roll_back":
            self._roll_back(response.reasons[0])
        return self.rolled_back

    def _accept(self, decision: Decision, **context: Any) -> None:
        self.decisions.append(decision)
        self._bindings.take(decision.groups)
        self._set_dropout(decision)
        self._log.decision(decision, context, first=len(self.decisions) == 1)

    def _set_dropout(self, decision: Decision) -> None:
        if "dropout" in decision.run:
            self._bindings.set_dropout(decision.run["dropout"])
