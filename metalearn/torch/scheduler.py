"""MetaScheduler: a pretrained controller in a PyTorch training loop, stepped like a learning-rate scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Literal

import torch

from metalearn import __version__ as version
from metalearn.audit import AuditLog
from metalearn.controller.controller import Controller, load_controller
from metalearn.controller.decision import Decision, Mode
from metalearn.controller.modes import Advisor
from metalearn.errors import SessionError
from metalearn.profiles import DomainProfile
from metalearn.safety.constraints import Constraints, Usage
from metalearn.safety.drift import DriftConfig, DriftReport
from metalearn.safety.drift.attribution import same_values
from metalearn.safety.guard import GuardConfig
from metalearn.safety.rollback import Rollback, RollbackConfig
from metalearn.signals import IntervalStatistics
from metalearn.torch.arguments import check_model, check_optimizer, check_profile
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import Bindings, infer_roles
from metalearn.torch.budget import Budget
from metalearn.torch.calls import MAX_IDLE_CALLS, CallOrder, IdleCalls, out_of_memory
from metalearn.torch.constraining import Constraining
from metalearn.torch.distributed import Standing, join, own_part
from metalearn.torch.drift_watch import DriftWatch, no_way_back
from metalearn.torch.handles import Handle
from metalearn.torch.metric import Metric
from metalearn.torch.monitor import Measured, Monitor
from metalearn.torch.overrides import Overrides
from metalearn.torch.recovery import Condition, Recovery
from metalearn.torch.run_log import RunLog, measured
from metalearn.torch.schedule_table import ScheduleTable
from metalearn.torch.sharding import reshard
from metalearn.torch.usage import UsageMeter

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
      interval: optimizer steps between decisions. By default a twentieth of the horizon, or half an epoch; longer if
        that would exceed the budget, see `overhead_budget`.
      overhead_budget: share of the training time that the controller may take, as measured in the first two intervals;
        after them the interval is settled for good. It warns if steps are too short for any interval to keep to it.
        None: 1 %, without a warning, and only where all decisions would take more than a second together.
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
      constraints: on throughput and memory. While one is violated, or nearly, what would worsen it is held; with the
        batch size among `bindings`, and in mode `control`, that is halved if memory is exceeded, and doubled if it is
        too slow, as long as that helps. Where nothing is left to be done the decision says so, and the run goes back
        to its last good snapshot if it has one. These decisions depend on the machine: a resumed run may take others.
      process_group: of the processes that train the model together, by DDP or FSDP2. None: all of torch.distributed,
        if it has been initialised. Each makes its MetaScheduler with the same arguments, `batch_size` being its own
        share, and calls all methods alike; `report` as it says there. Decided and logged is in the first process.
      bindings: other hyperparameters of the loop, one `Handle` each: `BatchSize`, `Accumulation`, `GradientClip`,
        `Trainable`, `Precision`, `Custom`. `override` sets them, and they are kept through resume and rollback. The
        policy does not act on them in this generation of controllers.

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
        overhead_budget: float | None = None,
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
        constraints: Constraints | None = None,
        process_group: Any = None,
        bindings: Sequence[Handle] = (),
    ) -> None:
        check_optimizer(optimizer)
        check_model(model)
        check_profile("domain", domain)
        self._metric = Metric(metric, mode)
        self.optimizer = optimizer
        self._bindings = Bindings(optimizer, model)
        roles = infer_roles(optimizer, model)
        loaded = controller if isinstance(controller, Controller) else load_controller(controller)
        self._model, self._ranks = model, join(process_group, optimizer, model)
        if self._ranks is not None:
            alike = {
                "controller": loaded.fingerprint,
                "domain": domain.fingerprint,
                "family": family,
                "horizon": horizon,
                "interval": interval,
                "overhead_budget": overhead_budget,
                "metric": (metric, mode),
                "rollback": rollback,
                "drift": drift,
                "steering": steering,
                "constraints": constraints,
                "guard": None if guard is None else guard.as_dict(),
                "what can be controlled": self._bindings.masked,
            }
            batch_size = self._ranks.agree(alike, batch_size=batch_size)
            rollback = self._ranks.own_rollback(rollback)
            decision_log = decision_log if self._ranks.leads else None
        self._session = loaded.start(
            domain,
            self._bindings.space,
            roles=roles,
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
        self._overrides = Overrides(bindings, self._bindings, roles=roles, optimizer=optimizer)
        self._constraining = Constraining(constraints, bindings, batch_size=batch_size)
        if self._ranks is not None:
            self._ranks.begin(self._session)
        self._interval = self._session.interval
        self._budget = Budget(overhead_budget, interval=self._interval, horizon=horizon, given=interval is not None)
        self._monitor = Monitor(optimizer, self._interval, rank=0 if self._ranks is None else self._ranks.rank)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._usage = UsageMeter(params[0].device)
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
        self._idle_calls, self._call_order = IdleCalls(optimizer), CallOrder(optimizer)
        self._host_seconds = 0.0
        self._validation = math.nan
        self._reported = False
        """Whether `report` was called since the interval ended."""
        self._table = ScheduleTable(self._session.multipliers)
        self.should_validate = False
        """Whether an interval has just ended: evaluate and `report` now, or it decides at the next step without one."""
        self.rolled_back = False
        """Whether the last call brought the last good snapshot back: the loop goes on from there."""
        self.decisions: list[Decision] = []
        """All that were ever in force, in this order; of rolled-back intervals too."""
        self._accept(self._session.ask())
        self._overrides.attach(optimizer)
        self._bindings.attach(self._before_steps, None if self._average is None else self._update_average, self._probe)
        optimizer._metalearn_attached = True  # type: ignore[attr-defined]

    @property
    def interval(self) -> int:
        """Optimizer steps between decisions."""
        return self._interval

    @property
    def interval_reason(self) -> str | None:
        """Why the interval was lengthened; None if it was not."""
        return self._budget.reason

    @property
    def overhead(self) -> float:
        """Share of the training time that `host_seconds` are, measured in this process; NaN in the first interval."""
        return self._budget.overhead(self.host_seconds)

    @property
    def confidence(self) -> float:
        """Share of its reach that the controller uses on this domain, 0 to 1."""
        return self._session.confidence

    @property
    def decision(self) -> Decision:
        """The decision in force, with what is overridden in it."""
        return self._overrides.in_force(self._session.ask())

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
        """Hyperparameters, or values of them, that cannot be changed on this optimizer, model or device, and why."""
        return dict(self._overrides.masked)

    @property
    def overrides(self) -> Mapping[str, Any]:
        """What is overridden: values by name, or "name[group]" where there are several parameter groups."""
        return self._overrides.values

    @property
    def host_seconds(self) -> float:
        """Wall-clock seconds that decisions, probes and hooks have taken; of the hooks a sample is timed."""
        return self._host_seconds + self._budget.probe_seconds + self._bindings.seconds

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
          SessionError: it is called before the optimizer steps, or again and again without.
        """
        monitor, steps = self._monitor, self._bindings.steps
        self.rolled_back = False
        if steps == self._recorded_steps:
            self._call_order.call(loss)
            self._idle_calls.count(steps)
            return
        if self.should_validate:
            self._decide(reports=False)
            if self.rolled_back:
                return
        monitor.record(loss)
        self._recorded_steps = steps
        self.should_validate = monitor.steps >= self._interval
        if self.should_validate:
            self._budget.end_interval()
            self._usage.end_interval()
            if self._ranks is not None:
                self._ranks.await_report()
        if self._recovery is not None:
            if self._told is not None:
                self._save(**self._told)
            if self.should_validate:
                self._recovery.end_interval()

    def report(self, metrics: float | Mapping[str, float] | None) -> Decision:
        """Takes in validation metrics; at the end of an interval, decides.

        In a run of several processes all call it at the end of an interval, and wait there for one another. Those
        without a metric pass None; of several metrics it is the mean. Between the ends of intervals nobody waits.

        Args:
          metrics: the metric, or a mapping that holds it.

        Returns:
          The decision now in force. Inside `averaged_parameters` that is the one before: it decides when the weights
          are back.

        Raises:
          InvalidArgumentError: the mapping is empty, or it is unclear which entry is the metric.
          SessionError: another process trains on, or is at another point of the run.
        """
        if metrics is not None or self._ranks is None:
            self._validation = self._metric.read(metrics)  # type: ignore[arg-type]
        self.rolled_back, self._reported = False, self.should_validate
        if self.should_validate and not self._in_average:
            self._decide(reports=True)
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
        began, drift = perf_counter(), self._drift

        def observe() -> None:
            response = drift.observe_profile(window, window if domain is None else domain, step=self._bindings.steps)
            if response is not None:
                self._accept(response)

        self._led(observe)
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
        reshard(self._model)
        try:
            with self._average.swapped():
                self._in_average = True
                yield
        finally:
            self._in_average = False
            reshard(self._model)
        waits = self._reported if self._ranks is not None else not math.isnan(self._validation)
        if self.should_validate and waits:
            self.report(self._metric.told(self._validation))

    @contextmanager
    def survive_out_of_memory(self) -> Iterator[None]:
        """Goes back to the last good snapshot when a training step inside the block runs out of memory.

        Then `rolled_back` is true, the memory is free again, and the step is to be repeated. After twice as many
        rollbacks in succession as `RollbackConfig.max_rollbacks` says, nothing is left that the controller could take
        back: then the error is raised. So it is in a run of several processes, as a SessionError: the others wait for
        this one's gradients, and all must be started again.

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
        if self._ranks is not None:
            with self._ranks.no_survivor():
                yield
            return
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
        self._led(lambda: self._accept(self._session.switch(steering, advisor=advisor, initial=initial)))
        if steering == "shadow" and "dropout" not in self.decision.run:
            self._bindings.release_dropout()
        return self.decision

    def override(self, values: Mapping[str, Any], reason: str = "", *, author: str = "person") -> Decision:
        """Sets hyperparameters, those that the controller acts on and those of `bindings`, from the next step on.

        A value stays until it is overridden anew or given back by `release_override`, in every mode of `steering`. The
        controller goes on deciding, and what it would have is `proposed` of the decision. As in a decision, a learning
        rate is the peak of the schedule. Bounds are those of the hyperparameter, not of the guard. A rollback brings
        back what was overridden at the snapshot, and logs that.

        If the samples per optimizer step change, the controller's learning rates follow by `rate_factor`; an overridden
        one does not. With several ranks call it on all of them alike.

        Args:
          values: by name, as in `{"batch_size": 512, "learning_rate": 0.003}`; "learning_rate[0]" is of one group.
          reason: for the decision log.
          author: who sets it: a person, a script, a constraint; for the decision log.

        Returns:
          The decision now in force.

        Raises:
          InvalidArgumentError: a name is unknown or masked, or a value is not allowed; then nothing has changed.
        """
        change = self._overrides.impose(values)
        self._put_in_force(self.decision)
        self._log.override(change, step=self.steps, author=author, reason=reason)
        return self.decision

    def release_override(self, *names: str, reason: str = "", author: str = "person") -> Decision:
        """Gives hyperparameters back to the controller; those that it does not act on get the value that they had.

        Args:
          names: as in `override`; none stand for all that are overridden.
          reason, author: for the decision log.

        Returns:
          The decision now in force.

        Raises:
          InvalidArgumentError: of a name nothing is overridden.
        """
        change = self._overrides.release(names)
        self._put_in_force(self.decision)
        if "dropout" in change.after and "dropout" not in self.decision.run:
            self._bindings.release_dropout()
        self._log.override(change, step=self.steps, author=author, reason=reason)
        return self.decision

    def detach(self) -> None:
        """Lets go of the optimizer and the model: groups hold their own values, as all along, dropout layers again.

        What was overridden of `bindings` gets the value that it had.
        """
        if self._bindings.release():
            self._call_order.release()
            self._overrides.detach()
            self.optimizer._metalearn_attached = False  # type: ignore[attr-defined]
            if self._ranks is not None:
                self._ranks.release()

    def state_dict(self, *, of_all_ranks: bool = False) -> dict[str, Any]:
        """Returns everything that later decisions depend on; tensors, numbers, strings, lists and dicts only.

        Args:
          of_all_ranks: in a run of several processes, whether one state is to hold what each has measured. All must
            call it then, and all may load it. Otherwise it is of this process, and another one that loads it makes the
            same decisions only if it was saved at the end of an interval.
        """
        ranks, position = self._ranks, self._position(self._session.state_dict())
        averages = self._average is not None
        return {
            **position,
            "ranks": ranks and ranks.part_of_state(position["monitor"], of_all=of_all_ranks, averages=averages),
            "recovery": None if self._recovery is None else self._recovery.state_dict(),
            "constraints": self._constraining.state_dict(),
            "drift": None if self._drift is None else self._drift.state_dict(),
            "decisions": [decision.as_dict() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; nothing of it is kept by reference.

        Raises:
          SessionError: the state is of a run with other groups, horizon or interval.
        """
        self._go_to(own_part(state, self._ranks))
        self.decisions = [Decision.from_dict(decision) for decision in state["decisions"]]
        if self._recovery is not None and state["recovery"] is not None:
            self._recovery.load_state_dict(state["recovery"])
        if "constraints" in state:  # states of before the guard kept any lack it
            self._constraining.load_state_dict(state["constraints"])
        self._usage.start_interval()
        if self._drift is not None and state.get("drift") is not None:
            self._drift.load_state_dict(state["drift"])
        self._log.first = self.decisions[0] if self._bindings.steps == 0 else None

    def resume_from_disk(self) -> bool:
        """Goes on from the last good snapshot that a killed process has left in the folder of `RollbackConfig`.

        Call it before the first step, where the run is set up as it was. Weights, optimizer, random generators, what is
        `tracked` and what later decisions depend on are then as in the snapshot, and `steps` says where that is; what
        was done since is lost, an interval at most with `RollbackConfig(every=1)`. Of `decisions` those from here on
        are kept; the decision log has them all. To lose nothing, save `state_dict` instead.

        Returns:
          Whether there was a snapshot; without one the run begins anew.

        Raises:
          SessionError: snapshots are not kept on disk, steps were made already, the snapshot is of another run or
            cannot be read, or several processes train the model.

        Example:
          >>> import tempfile
          >>> import metalearn
          >>> from metalearn.torch import RollbackConfig
          >>> rows = metalearn.Interactions.from_arrays([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 0])
          >>> def life(folder, steps):
          ...     table = torch.nn.Embedding(3, 4)
          ...     optimizer = torch.optim.AdamW(table.parameters())
          ...     on_disk = RollbackConfig(every=1, place="disk", folder=folder)
          ...     profile = metalearn.profile_domain(rows)
          ...     scheduler = MetaScheduler(optimizer, domain=profile, horizon=20, interval=2, rollback=on_disk)
          ...     found = scheduler.resume_from_disk(), scheduler.steps
          ...     for _ in range(steps):
          ...         loss = table.weight.square().mean()
          ...         loss.backward()
          ...         optimizer.step()
          ...         optimizer.zero_grad()
          ...         scheduler.step(loss)
          ...     return found
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     life(folder, 8), life(folder, 8)
          ((False, 0), (True, 7))
        """
        recovery, done = self._recovery, self._bindings.steps
        if recovery is None or done or self._ranks is not None:
            off = "rollback is off" if recovery is None else "several processes train the model"
            why = f"{done} steps were made already" if done else off
            raise SessionError(
                f"this MetaScheduler cannot resume from a snapshot on disk: {why}; call it before the first step, with "
                "rollback=RollbackConfig(place='disk', folder=...); several processes resume from state_dict"
            )
        saved = recovery.left_behind()
        if saved is None:
            return False
        self._go_to(saved)
        recovery.resume()
        self._usage.start_interval()
        self.decisions.clear()
        self._log.first = None  # the process before has logged it
        self._log.rollback(Rollback(step=self.steps, to_step=self.steps, reason="resumed from disk", fallback=False))
        self.decisions.append(self.decision)
        if saved["statistics"] is not None:
            self._accept(self._session.tell(IntervalStatistics(*saved["statistics"])))
        return True

    def _position(self, session: Mapping[str, Any]) -> dict[str, Any]:
        """Returns where the run is, with a given state of the session."""
        return {
            "session": session,
            "bindings": self._bindings.state_dict(),
            "overrides": self._overrides.state_dict(),
            "monitor": self._monitor.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "recorded_steps": self._recorded_steps,
            "budget": self._budget.state_dict(),
            "validation": self._validation,
            "curves": None if self._drift is None else self._drift.curves(),
        }

    def _go_to(self, position: Mapping[str, Any]) -> None:
        """Inverts `_position`."""
        self._session.load_state_dict(position["session"])
        self._bindings.load_state_dict(position["bindings"])
        if "overrides" in position:  # states of before there were any lack it
            self._overrides.load_state_dict(position["overrides"])
        if "budget" in position:  # states of before intervals were measured lack it
            self._budget.load_state_dict(position["budget"])
            self._set_interval(self._budget.interval)
        self._monitor.load_state_dict(position["monitor"])
        if self._average is not None:
            self._average.load_state_dict(position["average"])
        self._recorded_steps = int(position["recorded_steps"])
        self.should_validate = self._monitor.steps >= self._interval
        self._validation = float(position["validation"])
        if self._drift is not None and position.get("curves") is not None:
            self._drift.rewind(position["curves"])
        self._told = None
        self._put_in_force(self.decision)

    def _save(self, session: Mapping[str, Any], statistics: Sequence[Any] | None) -> None:
        """Takes a snapshot.

        Args:
          session: its state before the last decision, which a rollback is to make anew.
          statistics: that it was made from; None if the snapshot does not follow one.
        """
        recovery, self._told = self._recovery, None
        assert recovery is not None
        reshard(self._model)
        recovery.save(self._bindings.steps, {**self._position(session), "statistics": statistics})
        recovery.start_interval()

    def _roll_back(self, reason: str) -> None:
        recovery = self._recovery
        assert recovery is not None
        step, saved, overridden = self._bindings.steps, recovery.saved(), self._overrides.values
        reshard(self._model)
        self._go_to(saved)  # before the optimizer: this puts back what a step that raised has left in its groups
        record = recovery.restore(step, reason)
        self.rolled_back = True
        self._log.rollback(record)
        if (undone := self._overrides.undone_since(overridden)) is not None:
            self._log.override(undone, step=self.steps, author="rollback", reason=reason)
        if record.fallback:
            self._session.fall_back(reason)
        else:
            self._session.bar(reason)
        before = self._session.ask()
        self._accept(before)
        if saved["statistics"] is not None:
            self._accept(self._session.tell(IntervalStatistics(*saved["statistics"])))
        recovery.retries(held=same_values(before, self._session.ask()))
        recovery.start_interval()
        self._usage.start_interval()

    def _before_steps(self) -> list[float]:
        """Returns the schedule's factors from the coming step up to the next one that is to be probed."""
        self._call_order.first_step()
        self._log.begin()
        if self._recovery is not None and self._recovery.needs_first and self._session.mode != "shadow":
            self._save(self._session.state_dict(), None)
        return self._table.from_step(self._bindings.steps, max(self._remaining() - 2, 1))

    def _probe(self) -> None:
        """Probes the step that `_before_steps` was called for, if that is to be probed.

        A fused optimizer under a GradScaler gets its gradients scaled, by a factor that only the device knows, and
        unscales them itself: such steps are not measured.
        """
        remaining = self._remaining()
        if remaining <= 2 and getattr(self.optimizer, "grad_scale", None) is None:
            # An interval that awaits its report ends at this step at the latest; this step then opens the next one.
            began, worked = perf_counter(), thread_time()
            self._monitor.before_step(remaining if remaining > 0 else self._interval)
            self._budget.probed(perf_counter() - began, thread_time() - worked)

    def _remaining(self) -> int:
        """Returns how many steps the interval has left, the coming one included."""
        return self._interval - self._monitor.steps - self._bindings.steps + self._recorded_steps

    def _update_average(self) -> None:
        if self._average is not None and self._bindings.steps % AVERAGE_EVERY == 0:
            began = perf_counter()  # it never falls into a step of which the hooks are timed
            self._average.update()
            self._host_seconds += perf_counter() - began

    def _decide(self, *, reports: bool) -> None:
        """Ends an interval.

        Args:
          reports: whether `report` was called for it.
        """
        began, worked = perf_counter(), thread_time()
        recovery, condition = self._recovery, Condition(True, self._usage.seconds, math.nan, ready=False)
        if recovery is not None and recovery.ready and self._session.mode != "shadow":
            condition = recovery.condition()
        condition = condition._replace(memory_bytes=self._usage.memory_bytes())

        def meet(mine: Measured) -> Measured:
            nonlocal condition
            assert self._ranks is not None
            standing = Standing(self.decision, reports)
            measured, all_have = self._ranks.meet(mine, condition, standing, interval=self._interval)
            if recovery is not None and condition.ready and not all_have.ready:
                recovery.turn_off()  # another process has no room for snapshots
            condition = all_have
            return measured

        statistics = self._monitor.statistics(
            validation=self._validation,
            batch_size=self._overrides.samples_per_step(self._session.batch_size),
            merge=None if self._ranks is None else meet,
        )
        self._validation, self._reported = math.nan, False
        self.should_validate = False

        rate = float(statistics.samples) / max(condition.seconds, 1e-9)
        usage = Usage(rate, condition.memory_bytes, self._usage.utilisation)
        self._constraining.judge(usage, acts=self._session.mode == "control")

        def conclude() -> None:
            self._conclude(statistics, condition)
            self._end_decision(perf_counter() - began, thread_time() - worked)

        self._led(conclude)
        self._usage.start_interval()
        if not self.rolled_back and (relief := self._constraining.relief).batch_size is not None:
            self.override({"batch_size": relief.batch_size}, "; ".join(relief.sentences), author="constraint")
            self._usage.forget_larger_batches()

    def _conclude(self, statistics: IntervalStatistics, condition: Condition) -> None:
        """Judges an interval, goes back if it went wrong, and decides.

        Args:
          statistics: of the interval.
          condition: of the run at its end.
        """
        recovery, constraining = self._recovery if condition.ready else None, self._constraining
        found = () if recovery is None else recovery.judge(statistics, condition, constraining.unkept)
        if found:
            self._roll_back("; ".join(found))
        elif not self._goes_back(statistics):
            if recovery is not None:
                recovery.start_interval()
                if recovery.due and not (self._drift is not None and self._drift.outlying):
                    with recovery.timed():
                        self._told = {"session": self._session.state_dict(), "statistics": list(statistics)}
            notes = (*constraining.report, *(() if recovery is None else recovery.excuses))
            decision = self._session.tell(statistics, worsening=constraining.barred, notes=notes)
            self._accept(decision, **{**measured(statistics), **constraining.measured(), "interval": self._interval})

    def _led(self, act: Callable[[], None]) -> None:
        """Acts; in a run of several processes the first does, and the others take over what came of it."""
        if self._ranks is None:
            act()
            return
        decisions, rollbacks = len(self.decisions), len(self.rollbacks)

        def outcome() -> dict[str, Any]:
            return {
                "session": self._session.state_dict(),
                "drift": None if self._drift is None else self._drift.state_dict(),
                "recovery": None if self._recovery is None else self._recovery.state_dict(),
                "budget": self._budget.state_dict(),
                "decisions": [decision.as_dict() for decision in self.decisions[decisions:]],
                "restores": len(self.rollbacks) > rollbacks,
                "told": self._told,
            }

        self._ranks.led(act, outcome, self._adopt)

    def _adopt(self, outcome: Mapping[str, Any]) -> None:
        """Takes over what another process has decided for all."""
        recovery = self._recovery
        if recovery is not None:
            if outcome["restores"]:
                reshard(self._model)
                self._go_to(recovery.saved())
                self.rolled_back = True
            recovery.follow(outcome["recovery"], restore=outcome["restores"])
            recovery.start_interval()
        if self._drift is not None:
            self._drift.load_state_dict(outcome["drift"])
        self._session.load_state_dict(outcome["session"])
        self._budget.load_state_dict(outcome["budget"])
        self._set_interval(self._budget.interval)
        for decision in outcome["decisions"]:
            self._accept(Decision.from_dict(decision))
        self._told = outcome["told"]

    def _end_decision(self, seconds: float, processor_seconds: float) -> None:
        """Counts what a decision took, and lengthens intervals if the budget is to be kept so."""
        self._host_seconds += seconds
        if self._budget.decided(seconds, processor_seconds, self._bindings.seconds):
            self._set_interval(self._budget.interval)

    def _set_interval(self, interval: int) -> None:
        self._interval = interval
        self._monitor.resize(interval)

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
        decision = self._overrides.in_force(decision)
        self.decisions.append(decision)
        self._put_in_force(decision)
        self._log.decision(decision, context, first=len(self.decisions) == 1)

    def _put_in_force(self, decision: Decision) -> None:
        self._bindings.take(self._overrides.scaled(decision.groups))
        if "dropout" in decision.run:
            self._bindings.set_dropout(decision.run["dropout"])
