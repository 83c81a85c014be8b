"""A MetaScheduler that is made late: a callback is there before the framework has made its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metalearn.errors import SessionError
from metalearn.integrations.options import Found, check_options, complete_options
from metalearn.torch import MetaScheduler


class DeferredScheduler:
    """Makes a MetaScheduler when training starts, and tells it of steps and metrics as a framework reports them.

    Args:
      options: of the callback, as in `SchedulerOptions`.

    Raises:
      InvalidArgumentError: an option is unknown, or the domain is missing.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = check_options(options)
        self._scheduler: MetaScheduler | None = None
        self._resumed: Mapping[str, Any] | None = None
        """a state that came before the optimizer"""
        self._loss: Any = None
        """sum over the micro-batches of the step to come, on its device"""
        self._steps = 0
        """optimizer steps that the scheduler has been told of"""

    @property
    def started(self) -> bool:
        """Whether there is a scheduler."""
        return self._scheduler is not None

    @property
    def resumes(self) -> bool:
        """Whether a state waits for the scheduler."""
        return self._resumed is not None

    @property
    def scheduler(self) -> MetaScheduler:
        """The scheduler of this run, or of the last one.

        Raises:
          SessionError: training has not started.
        """
        if self._scheduler is None:
            raise SessionError("there is no scheduler before training starts; ask for it from then on")
        return self._scheduler

    def start(self, optimizer: Any, *, model: Any, found: Found) -> None:
        """Makes the scheduler, and gives it the state that was loaded before.

        Args:
          optimizer: the torch optimizer itself, not a framework's wrapper.
          model: that it trains.
          found: what the framework knows of the run.
        """
        if self._scheduler is not None:
            self._scheduler.detach()  # of a run before, which may have ended by an exception
        self._scheduler = MetaScheduler(optimizer, model=model, **complete_options(self._options, found))
        if self._resumed is not None:
            self._scheduler.load_state_dict(self._resumed)
        self._resumed, self._loss, self._steps = None, None, self._scheduler.steps

    def record(self, loss: Any) -> None:
        """Adds the loss of a micro-batch, without reading it."""
        loss = loss.detach() if hasattr(loss, "detach") else loss
        self._loss = loss if self._loss is None else self._loss + loss

    def forget_loss(self) -> None:
        """Drops what was recorded since the last step."""
        self._loss = None

    def end_step(self, *, source: str) -> None:
        """Tells the scheduler of an optimizer step; one that a GradScaler skipped is none.

        Args:
          source: where the loss was to come from, for the error.

        Raises:
          SessionError: no loss was recorded.
        """
        scheduler, loss = self.scheduler, self._loss
        self._loss = None
        if scheduler.steps == self._steps:
            return
        if loss is None:
            raise SessionError(f"the optimizer stepped and no loss was seen; {source}")
        scheduler.step(loss)
        self._steps = scheduler.steps  # after a rollback fewer than before

    def state_dict(self, *, of_all_ranks: bool = False) -> dict[str, Any]:
        """Returns the scheduler's state, or the one that still waits for it; empty if there is none.

        Args:
          of_all_ranks: as in `MetaScheduler.state_dict`.
        """
        if self._resumed is not None:
            return dict(self._resumed)
        return {} if self._scheduler is None else self._scheduler.state_dict(of_all_ranks=of_all_ranks)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps a state for the scheduler that the next start makes."""
        self._resumed = state or None

    def end(self) -> None:
        """Lets go of the optimizer and the model; decisions can still be read."""
        if self._scheduler is not None:
            self._scheduler.detach()
