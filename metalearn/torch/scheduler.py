"""MetaScheduler: a pretrained controller in a PyTorch training loop, stepped like a learning-rate scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from metalearn.audit import DecisionLog
from metalearn.controller.controller import Controller, load_controller
from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.profiles import DomainProfile
from metalearn.torch.averaging import AVERAGE_EVERY, WeightAverage
from metalearn.torch.bindings import Bindings, infer_roles
from metalearn.torch.monitor import Monitor

MAX_IDLE_CALLS = 1000
"""Calls without an optimizer step that are put down to gradient accumulation or a GradScaler finding its scale."""
TABLE_STEPS = 256
"""Steps whose schedule factors are computed at once."""
_PREFERRED_METRICS = ("ndcg@10", "ndcg", "recall@10", "hit@10", "mrr", "auc")


class MetaScheduler:
    """Steers learning rate, weight decay, beta1 (each parameter group its own) and dropout of a training run.

    Decisions are in force while `optimizer.step` runs and at no other time: `param_groups` keeps the user's and other
    schedulers' values, and what those schedulers make of the learning rate multiplies the controller's.

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
      decision_log: JSON Lines file to append decisions to.
      name: of this run, in the decision log.

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
        decision_log: str | Path | None = None,
        name: str = "",
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
        )
        self._interval = self._session.interval
        self._metric, self._sign = metric, 1.0 if mode == "max" else -1.0
        self._monitor = Monitor(optimizer, self._interval)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._average = WeightAverage(params) if horizon is None else None
        self._log = DecisionLog(decision_log, name=name) if decision_log is not None else None
        self._unlogged: Decision | None = None
        self._recorded_steps = 0
        self._idle_calls, self._idle_since = 0, -1
        self._host_seconds = 0.0
        self._validation = math.nan
        self._table: list[float] = []
        self._table_start = -1
        self.should_validate = False
        """Whether an interval has just ended: evaluate and `report` now, or it decides at the next step without one."""
        self.decisions: list[Decision] = []
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
        if steps == self._recorded_steps:
            self._count_idle_call(steps)
            return
        if self.should_validate:
            self._decide()
        monitor.record(loss)
        self._recorded_steps = steps
        self.should_validate = monitor.steps >= self._interval

    def report(self, metrics: float | Mapping[str, float]) -> Decision:
        """Takes in validation metrics; at the end of an interval, decides.

        Args:
          metrics: the metric, or a mapping that holds it.

        Returns:
          The decision now in force.

        Raises:
          InvalidArgumentError: the mapping is empty, or it is unclear which entry is the metric.
        """
        self._validation = self._sign * self._pick(metrics)
        if self.should_validate:
            self._decide()
        return self.decision

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Puts averaged weights into the model for the time of the block: evaluate and export inside it.

        With a known horizon the rate decays and the weights themselves are the best: then the block changes nothing.
        """
        if self._average is None:
            yield
            return
        with self._average.swapped():
            yield

    def detach(self) -> None:
        """Lets go of the optimizer and the model: groups hold their own values, as all along, dropout layers again."""
        if self._bindings.release():
            self.optimizer._metalearn_attached = False  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later decisions depend on; tensors, numbers, strings, lists and dicts only."""
        return {
            "session": self._session.state_dict(),
            "bindings": self._bindings.state_dict(),
            "monitor": self._monitor.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "recorded_steps": self._recorded_steps,
            "validation": self._validation,
            "decisions": [decision.as_dict() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; nothing of it is kept by reference.

        Raises:
          SessionError: the state is of a run with other groups, horizon or interval.
        """
        self._session.load_state_dict(state["session"])
        self._bindings.load_state_dict(state["bindings"])
        self._monitor.load_state_dict(state["monitor"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._recorded_steps = int(state["recorded_steps"])
        self.should_validate = self._monitor.steps >= self._interval
        self._validation = float(state["validation"])
        self.decisions = [Decision.from_dict(decision) for decision in state["decisions"]]
        self._bindings.take(self.decision.groups)
        self._set_dropout(self.decision)
        self._unlogged = self.decisions[0] if self._bindings.steps == 0 else None

    def _before_steps(self) -> list[float]:
        """Probes if the coming step is to be probed; returns the schedule's factors up to the next step that is."""
        if self._unlogged is not None and self._log is not None:
            self._log.append(self._unlogged)
            self._unlogged = None
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
        self._accept(
            self._session.tell(statistics), validation=float(statistics.validation), seconds=statistics.seconds
        )
        self.should_validate = False
        self._host_seconds += perf_counter() - began

    def _accept(self, decision: Decision, **context: Any) -> None:
        self.decisions.append(decision)
        self._bindings.take(decision.groups)
        self._set_dropout(decision)
        if self._log is None:
            return
        if decision.index == 0:
            self._unlogged = decision  # until the first step: a state may yet be loaded, of a run that has logged it
        else:
            self._log.append(decision, **context)

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
