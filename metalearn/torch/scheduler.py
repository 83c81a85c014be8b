"""MetaScheduler: a pretrained controller in a PyTorch training loop, stepped like a learning-rate scheduler."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from metalearn import __version__ as version
from metalearn.audit import AuditLog
from metalearn.controller.controller import Controller, load_controller
from metalearn.controller.decision import Decision, Mode
from metalearn.controller.modes import Advisor
from metalearn.errors import SessionError
from metalearn.profiles import DomainProfile
from metalearn.safety.constraints import Constraints
from metalearn.safety.drift import DriftConfig, DriftReport
from metalearn.safety.guard import GuardConfig
from metalearn.safety.rollback import Rollback, RollbackConfig
from metalearn.torch.arguments import check_averaging, check_model, check_optimizer, check_profile
from metalearn.torch.averaging import WeightAverage
from metalearn.torch.bindings import Bindings, infer_roles
from metalearn.torch.budget import Budget
from metalearn.torch.calls import MAX_IDLE_CALLS, out_of_memory
from metalearn.torch.constraining import Constraining
from metalearn.torch.distributed import join
from metalearn.torch.drift_watch import DriftWatch
from metalearn.torch.handles import Handle
from metalearn.torch.metric import Metric
from metalearn.torch.monitor import Monitor
from metalearn.torch.overrides import Overrides
from metalearn.torch.recovery import Recovery
from metalearn.torch.run import Run
from metalearn.torch.run_log import RunLog
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
      horizon: optimizer steps of the whole run; None if nobody knows.
      averaging: whether models are evaluated and exported inside `averaged_parameters`. The rate is then held, whatever
        the horizon: over domains that does better than its decay (docs/evidence.md), and no horizon can be wrong. If
        not, the rate decays over the horizon. By default only where the horizon is unknown.
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
        by degree: asks for a profile, loosens the policy, proposes the start anew, rolls back (if the last snapshot is
        of before the change: it takes some intervals to notice one). None does not.
      tracked: what else goes back: other schedulers (step them before this one), GradScaler, sampler or loader,
        random generators; all with `state_dict` and `load_state_dict`. The data goes on where it is if its position is
        not tracked. The first snapshot is taken at the first optimizer step.
      steering: `control` decides; `shadow` decides and logs, and changes nothing; `advise` asks `advisor` before each
        change; `frozen` leaves the values where they are. See `switch`.
      advisor: for `advise`: called with a `Decision`, returns True, False, or an object with `groups` and `run`.
      guard: tightens what the controller may do.
      constraints: on throughput and memory. While one is violated, or nearly, what would worsen it is held; with the
        batch size among `bindings`, and in mode `control`, that is halved if memory is exceeded, and doubled if it is
        too slow, as long as that helps; one that ran out of memory is not tried again. Where nothing is left to be done
        the decision says so, and the run goes back to its last good snapshot if it has one. These decisions depend on
        the machine: a resumed run may take others.
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
        averaging: bool | None = None,
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
        bound = Bindings(optimizer, model)
        roles = infer_roles(optimizer, model)
        loaded = controller if isinstance(controller, Controller) else load_controller(controller)
        averaging = check_averaging(averaging, horizon)
        ranks = join(process_group, optimizer, model)
        if ranks is not None:
            alike = {
                "controller": loaded.fingerprint,
                "domain": domain.fingerprint,
                "family": family,
                "horizon": horizon,
                "averaging": averaging,
                "interval": interval,
                "overhead_budget": overhead_budget,
                "metric": (metric, mode),
                "rollback": rollback,
                "drift": drift,
                "steering": steering,
                "constraints": constraints,
                "guard": None if guard is None else guard.as_dict(),
                "what can be controlled": bound.masked,
            }
            batch_size = ranks.agree(alike, batch_size=batch_size)
            rollback = ranks.own_rollback(rollback)
            decision_log = decision_log if ranks.leads else None
        session = loaded.start(
            domain,
            bound.space,
            roles=roles,
            family=family,
            horizon=horizon,
            decays=not averaging,
            batch_size=batch_size,
            interval=interval,
            initial=None if bound.uses_prior else bound.initial(),
            withheld=bound.withheld,
            mode=steering,
            advisor=advisor,
            guard=guard,
        )
        about = {
            "controller_fingerprint": loaded.fingerprint,
            "controller_version": version,
            "family": family,
            "horizon": horizon,
            "averaging": averaging,
            "interval": session.interval,
            "metric": metric,
        }
        audit = AuditLog(decision_log, name=name) if isinstance(decision_log, str | Path) else decision_log
        log = RunLog(audit, domain, about)
        overrides = Overrides(bindings, bound, roles=roles, optimizer=optimizer)
        if ranks is not None:
            ranks.begin(session)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._run = Run(
            optimizer=optimizer,
            model=model,
            session=session,
            ranks=ranks,
            bindings=bound,
            overrides=overrides,
            constraining=Constraining(constraints, bindings, batch_size=batch_size),
            budget=Budget(overhead_budget, interval=session.interval, horizon=horizon, given=interval is not None),
            monitor=Monitor(optimizer, session.interval, rank=0 if ranks is None else ranks.rank),
            usage=UsageMeter(params[0].device),
            average=WeightAverage(params) if averaging and steering != "shadow" else None,
            log=log,
            drift=None if drift is None else DriftWatch(drift, session, log),
            recovery=rollback and Recovery(rollback, model=model, optimizer=optimizer, tracked=tracked),
        )
        self._in_average = False
        self._expects_average = self._run.average is not None
        """whether the loop is to evaluate averages, and has not been seen to do otherwise"""
        self._saw_average = False
        """whether they were in the model since the last report, or are"""
        self._run.begin()

    @property
    def should_validate(self) -> bool:
        """Whether an interval has just ended: evaluate and `report` now, or it decides at the next step without one."""
        return self._run.should_validate

    @property
    def rolled_back(self) -> bool:
        """Whether the last call brought the last good snapshot back: the loop goes on from there."""
        return self._run.rolled_back

    @property
    def decisions(self) -> Sequence[Decision]:
        """All that were ever in force, in this order; of rolled-back intervals too."""
        return self._run.decisions

    @property
    def interval(self) -> int:
        """Optimizer steps between decisions."""
        return self._run.interval

    @property
    def interval_reason(self) -> str | None:
        """Why the interval was lengthened; None if it was not."""
        return self._run.budget.reason

    @property
    def overhead(self) -> float:
        """Share of the training time that `host_seconds` are, measured in this process; NaN in the first interval."""
        return self._run.budget.overhead(self.host_seconds)

    @property
    def reads_losses(self) -> bool:
        """Whether `validation_loss` and `training_sample_loss` (see `report`) can change what it decides here.

        If not, a loop may save itself computing them.
        """
        return self._run.session.reads_losses

    @property
    def confidence(self) -> float:
        """Share of its reach that the controller uses on this domain, 0 to 1."""
        return self._run.session.confidence

    @property
    def decision(self) -> Decision:
        """The decision in force, with what is overridden in it."""
        return self._run.decision

    @property
    def steps(self) -> int:
        """Optimizer steps done; those that were rolled back do not count."""
        return self._run.bindings.steps

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """What was rolled back so far, and why."""
        return self._run.rollbacks

    @property
    def drift(self) -> DriftReport | None:
        """The last change that was noticed, a report of degree "none" before the first; None if nothing is watched."""
        return None if self._run.drift is None else self._run.drift.last

    @property
    def awaits_profile(self) -> bool:
        """Whether a response to drift waits for `observe_profile`."""
        return self._run.drift is not None and self._run.drift.awaiting is not None

    @property
    def masked(self) -> Mapping[str, str]:
        """Hyperparameters, or values of them, that cannot be changed on this optimizer, model or device, and why."""
        return dict(self._run.overrides.masked)

    @property
    def overrides(self) -> Mapping[str, Any]:
        """What is overridden: values by name, or "name[group]" where there are several parameter groups."""
        return self._run.overrides.values

    @property
    def host_seconds(self) -> float:
        """Wall-clock seconds that decisions, probes and hooks have taken; of the hooks a sample is timed."""
        run = self._run
        return run.host_seconds + run.budget.probe_seconds + run.bindings.seconds

    def multiplier(self, step: int) -> float:
        """Returns the base schedule's factor on the learning rates at an optimizer step."""
        return self._run.session.multiplier(step)

    def get_last_lr(self) -> list[float]:
        """Returns the learning rates of the last optimizer step, as torch schedulers do; before it the groups' own."""
        return self._run.bindings.last_rates()

    def step(self, loss: torch.Tensor | float) -> None:
        """Counts one training step; call it after `optimizer.step()`.

        A call without an optimizer step since the last one (GradScaler skipped it, gradients accumulate) is not one.

        Args:
          loss: of the batch, a scalar; it stays on its device.

        Raises:
          InvalidArgumentError: the loss is not a scalar.
          SessionError: it is called before the optimizer steps, or again and again without.
        """
        self._run.advance(loss)

    def report(self, metrics: float | Mapping[str, float] | None) -> Decision:
        """Takes in validation metrics; at the end of an interval, decides.

        In a run of several processes all call it at the end of an interval, and wait there for one another. Those
        without a metric pass None; of several metrics it is the mean. Between the ends of intervals nobody waits.

        With `validation_loss` and `training_sample_loss` in the mapping, mean losses of validation data and of a sample
        of the training data, both of the weights that are validated and without dropout, the controller knows how much
        of what is learnt is memorised. It moves the weight decay by that, of models that it has a cue for
        (`reads_losses`).

        Args:
          metrics: the metric, or a mapping that holds it.

        Returns:
          The decision now in force. Inside `averaged_parameters` that is the one before: it decides when the weights
          are back.

        Raises:
          InvalidArgumentError: the mapping is empty, or it is unclear which entry is the metric.
          SessionError: another process trains on, or is at another point of the run.
        """
        run = self._run
        if metrics is not None or run.ranks is None:
            run.validation = self._metric.read(metrics)  # type: ignore[arg-type]
            run.losses = self._metric.read_losses(metrics)  # type: ignore[arg-type]
            self._warn_of_raw_weights()
        self._conclude()
        return run.decision

    def _conclude(self) -> None:
        """Decides if an interval has ended, and the weights are not the averaged ones."""
        run = self._run
        run.rolled_back, run.reported = False, run.should_validate
        if run.should_validate and not self._in_average:
            run.decide(reports=True)
            run.save_told()

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
        if self._run.drift is None:
            raise SessionError("this MetaScheduler does not watch for drift; make it with drift=DriftConfig()")
        self._run.observe_profile(window, window if domain is None else domain)
        return self._run.decision

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Puts averaged weights into the model for the time of the block: evaluate and export inside it.

        Where the rate decays (see `averaging`) the weights themselves are the best: then the block changes nothing.
        """
        run = self._run
        if run.average is None:
            yield
            return
        reshard(run.model)
        try:
            with run.average.swapped():
                self._in_average = self._saw_average = True
                yield
        finally:
            self._in_average = False
            reshard(run.model)
        waits = run.reported if run.ranks is not None else not math.isnan(run.validation)
        if run.should_validate and waits:
            self._conclude()

    def _warn_of_raw_weights(self) -> None:
        """Warns once if a metric is reported of the weights as they are, and averages are there to be evaluated."""
        if self._expects_average and not self._saw_average:
            self._expects_average = False
            warnings.warn(
                "a metric was reported of the weights as they are, while the rate is held (`averaging` is True or the "
                "horizon unknown), so that they are worse than their average; evaluate and export inside "
                "`averaged_parameters`, or pass a `horizon` without `averaging`",
                RuntimeWarning,
                stacklevel=3,
            )
        self._saw_average = self._in_average

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
        run = self._run
        run.rolled_back = False
        if run.ranks is not None:
            with run.ranks.no_survivor():
                yield
            return
        with out_of_memory(self.optimizer, can_roll_back=run.can_roll_back, roll_back=run.survive_out_of_memory):
            yield

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
        run = self._run
        leaves = run.session.mode == "shadow" and steering != "shadow"
        initial = run.bindings.initial() if leaves else None
        run.led(lambda: run.accept(run.session.switch(steering, advisor=advisor, initial=initial)))
        if steering == "shadow" and "dropout" not in run.decision.run:
            run.bindings.release_dropout()
        return run.decision

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
        self._run.apply_change(self._run.overrides.impose(values), author=author, reason=reason)
        return self._run.decision

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
        self._run.apply_change(self._run.overrides.release(names), author=author, reason=reason)
        return self._run.decision

    def detach(self) -> None:
        """Lets go of the optimizer and the model: groups hold their own values, as all along, dropout layers again.

        What was overridden of `bindings` gets the value that it had.
        """
        self._run.end()

    def state_dict(self, *, of_all_ranks: bool = False) -> dict[str, Any]:
        """Returns everything that later decisions depend on; tensors, numbers, strings, lists and dicts only.

        Args:
          of_all_ranks: in a run of several processes, whether one state is to hold what each has measured. All must
            call it then, and all may load it. Otherwise it is of this process, and another one that loads it makes the
            same decisions only if it was saved at the end of an interval.
        """
        return self._run.state_dict(of_all_ranks=of_all_ranks)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; nothing of it is kept by reference.

        Raises:
          SessionError: the state is of a run with other groups, horizon or interval.
        """
        self._run.load_state_dict(state)

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
        recovery, done, ranks = self._run.recovery, self.steps, self._run.ranks
        if recovery is None or done or ranks is not None:
            off = "rollback is off" if recovery is None else "several processes train the model"
            why = f"{done} steps were made already" if done else off
            raise SessionError(
                f"this MetaScheduler cannot resume from a snapshot on disk: {why}; call it before the first step, with "
                "rollback=RollbackConfig(place='disk', folder=...); several processes resume from state_dict"
            )
        return self._run.resume_from_disk(recovery)
