"""MetaScheduler: a pretrained controller in a PyTorch training loop, stepped like a learning-rate scheduler."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from metalearn import __version__ as version
from metalearn.audit import AuditLog
from metalearn.controller.controller import Controller, load_controller
from metalearn.controller.decision import Decision, Mode
from metalearn.controller.modes import Advisor
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.profiles import DomainProfile
from metalearn.safety.guard import GuardConfig
from metalearn.safety.rollback import Rollback, RollbackConfig
from metalearn.signals import IntervalStatistics
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import Bindings, infer_roles
from metalearn.torch.monitor import Monitor
from metalearn.torch.recovery import Recovery

MAX_IDLE_CALLS = 1000
"""Calls without an optimizer step that are put down to gradient accumulation or a GradScaler finding its scale."""
TABLE_STEPS = 256
"""Steps whose schedule factors are computed at once."""
_PREFERRED_METRICS = ("ndcg@10", "ndcg", "recall@10", "hit@10", "mrr", "auc")


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
        tracked: Sequence[Any] = (),
        steering: Mode = "control",
        advisor: Advisor | None = None,
        guard: GuardConfig | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidArgumentError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}")
        if not isinstance(domain, DomainProfile):
            raise InvalidArgumentError(
                f"`domain` must be a DomainProfile, got {type(domain).__name__}; "
                "pass metalearn.profile_domain(interactions)"
            )
        if mode not in ("max", "min"):
            raise InvalidArgumentError(f"`mode` must be 'max' or 'min', got {mode!r}")
        if getattr(optimizer, "_metalearn_attached", False):
            raise InvalidArgumentError("`optimizer` already has a MetaScheduler; call its detach() first")
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
        self._metric, self._sign = metric, 1.0 if mode == "max" else -1.0
        self._monitor = Monitor(optimizer, self._interval)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._average = WeightAverage(params) if horizon is None and steering != "shadow" else None
        self._log = AuditLog(decision_log, name=name) if isinstance(decision_log, str | Path) else decision_log
        self._recovery = (
            None if rollback is None else Recovery(rollback, model=model, optimizer=optimizer, tracked=tracked)
        )
        self._told: dict[str, Any] | None = None
        """of the decision just made, what it was made from: session and statistics go into the snapshot to be taken"""
        self._in_average = False
        self._unlogged: Decision | None = None
        self._described = {
            "controller_fingerprint": loaded.fingerprint,
            "controller_version": version,
            "family": family,
            "horizon": horizon,
            "interval": self._interval,
            "metric": metric,
        }
        self._domain = domain
        self._recorded_steps = 0
        self._idle_calls, self._idle_since = 0, -1
        self._host_seconds = 0.0
        self._validation = math.nan
        self._table: list[float] = []
        self._table_start = -1
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
            self._count_idle_call(steps)
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
        self._validation = self._sign * self._pick(metrics)
        self.rolled_back = False
        if self.should_validate and not self._in_average:
            self._decide()
            if self._told is not None:
                self._save(**self._told)
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
            self.report(self._sign * self._validation)

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
        try:
            yield
        except torch.OutOfMemoryError as error:
            recovery = self._recovery
            if recovery is None or recovery.fallen_back or not recovery.ready:
                raise
            reason = f"out of memory: {error}"
            traceback.clear_frames(error.__traceback__)  # they hold the batch's activations
        else:
            return
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._roll_back(reason)

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
        self._unlogged = self.decisions[0] if self._bindings.steps == 0 else None

    def _position(self, session: Mapping[str, Any]) -> dict[str, Any]:
        """Returns where the run is, with a given state of the session."""
        return {
            "session": session,
            "bindings": self._bindings.state_dict(),
            "monitor": self._monitor.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "recorded_steps": self._recorded_steps,
            "validation": self._validation,
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
        if self._log is not None:
            self._log.append("rollback", asdict(record))
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
        if self._unlogged is not None and self._log is not None:
            self._log.record_profile(self._domain)
            self._log.record_decision(self._unlogged, **self._described)
            self._unlogged = None
        if self._recovery is not None and self._recovery.needs_first and self._session.mode != "shadow":
            self._save(self._session.state_dict(), None)
        step = self._bindings.steps
        remaining = self._interval - self._monitor.steps - step + self._recorded_steps
        if remaining <= 2:
            # An interval that awaits its report ends at this step at the latest; this step then opens the next one.
            self._monitor.before_step(remaining if remaining > 0 else self._interval)
        row = step % TABLE_STEPS  # the same tables whenever a run was resumed: NumPy may round by place in the array
        if self._table_start != step - row:
            self._table_start = step - row
            self._table = self._session.multipliers(self._table_start, TABLE_STEPS)
        return self._table[row : row + max(remaining - 2, 1)]

    def _update_average(self) -> None:
        if self._average is not None and self._bindings.steps % AVERAGE_EVERY == 0:
            self._average.update()

    def _count_idle_call(self, steps: int) -> None:
        self._idle_calls = self._idle_calls + 1 if self._idle_since == steps else 1
        self._idle_since = steps
        if self._idle_calls >= MAX_IDLE_CALLS:
            raise SessionError(
                f"scheduler.step() was called {MAX_IDLE_CALLS} times without an optimizer.step() in between; call it "
                "once after each step of the optimizer that this MetaScheduler was made for"
            )

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
        else:
            if recovery is not None:
                recovery.start_interval()
                if recovery.due:
                    with recovery.timed():
                        self._told = {"session": self._session.state_dict(), "statistics": list(statistics)}
            self._accept(self._session.tell(statistics), **_measured(statistics))
        self._host_seconds += perf_counter() - began

    def _accept(self, decision: Decision, **context: Any) -> None:
        self.decisions.append(decision)
        self._bindings.take(decision.groups)
        self._set_dropout(decision)
        if self._log is None:
            return
        if len(self.decisions) == 1:
            self._unlogged = decision  # until the first step: a state may yet be loaded, of a run that has logged it
        else:
            self._log.record_decision(decision, **context)

    def _set_dropout(self, decision: Decision) -> None:
        if "dropout" in decision.run:
            self._bindings.set_dropout(decision.run["dropout"])

    def _pick(self, metrics: float | Mapping[str, float]) -> float:
        if not isinstance(metrics, Mapping):
            return float(metrics)
        names: Sequence[str] = (
            [self._metric] if self._metric else [n for n in _PREFERRED_METRICS if n in metrics] or list(metrics)
        )
        if not metrics:
            raise InvalidArgumentError("`metrics` is empty; report at least one number")
        if names[0] not in metrics or (len(names) > 1 and names[0] not in _PREFERRED_METRICS):
            raise InvalidArgumentError(
                f"cannot tell which of {list(metrics)} to follow; pass `metric` to MetaScheduler, one of these names"
            )
        return float(metrics[names[0]])


def _measured(statistics: IntervalStatistics) -> dict[str, float]:
    """Returns what of an interval a decision is logged with."""
    steps, seconds = float(statistics.steps), float(statistics.seconds)
    return {
        "validation": float(statistics.validation),
        "loss": float(statistics.loss_sum) / steps,
        "seconds": seconds,
        "samples_per_second": float(statistics.samples) / seconds if seconds > 0 else math.nan,
    }
