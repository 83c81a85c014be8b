"""The rollback side of a MetaScheduler: judges intervals, saves good ones, and brings the last good one back."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from metalearn.errors import InvalidArgumentError
from metalearn.safety import rollback as rules
from metalearn.safety.rollback import Health, Rollback, RollbackConfig, RollbackState
from metalearn.signals import IntervalStatistics
from metalearn.torch.snapshots import Snapshots

MOST_INTERVALS = 10
"""Intervals between snapshots at the most, whatever they cost, where the config does not say."""


class Recovery:
    """Snapshots of one run, the state of the rules that watch it, and what was rolled back.

    Args:
      config: thresholds, cost and place.
      model: None leaves buffers out.
      optimizer: of the run.
      tracked: as in `Snapshots`.
    """

    def __init__(
        self,
        config: RollbackConfig,
        *,
        model: torch.nn.Module | None,
        optimizer: torch.optim.Optimizer,
        tracked: Sequence[Any],
    ) -> None:
        self._config = config
        self._snapshots = Snapshots(
            modules=() if model is None else (model,),
            optimizers=(optimizer,),
            tracked=tracked,
            place=config.place,
            limit_bytes=config.limit_bytes,
            folder=config.folder,
        )
        self._device = next((p.device for group in optimizer.param_groups for p in group["params"]), None)
        self._state = rules.init()
        self.records: list[Rollback] = []
        self.needs_first = True
        """Whether the run has no snapshot yet, or none since a state was loaded."""
        self.off = False
        """Whether there is no room for snapshots."""
        self._began, self._seconds = perf_counter(), 0.0
        self._intervals, self._trained = 0, 0.0
        """intervals since the last snapshot, and their seconds"""
        self._spent = 0.0
        self._cost: float | None = None
        """seconds that a snapshot takes, once its memory is there"""

    @property
    def fallen_back(self) -> bool:
        """Whether repeated rollbacks have ended the controller's part in the run."""
        return self._state.fallen_back

    @property
    def gone_back(self) -> bool:
        """Whether the last snapshot has been gone back to before."""
        return self._state.rollbacks > 0

    @property
    def exhausted(self) -> bool:
        """Whether as many rollbacks as may be have followed one another, without a new snapshot."""
        return self._state.rollbacks >= self._config.max_rollbacks

    @property
    def ready(self) -> bool:
        """Whether there is a snapshot to go back to."""
        return not self.off and not self.needs_first

    def start_interval(self) -> None:
        """Starts the clock of an interval's training."""
        self._began = perf_counter()

    def end_interval(self) -> None:
        """Stops it: what follows is validation."""
        self._seconds = perf_counter() - self._began

    def judge(self, statistics: IntervalStatistics) -> tuple[str, ...]:
        """Returns what was wrong with the interval that has ended, nothing if it was good."""
        steps = float(statistics.steps)
        health = Health(
            steps=steps,
            loss=float(statistics.loss_sum) / steps,
            nonfinite_steps=float(statistics.nonfinite),
            state_finite=self._snapshots.all_finite(),
            validation=float(statistics.validation),
            samples_per_second=float(statistics.samples) / max(self._seconds, 1e-9),
            memory_bytes=math.nan if self._config.constraints.max_memory_bytes is None else self._memory_bytes(),
        )
        self._state, reasons = rules.update(self._config, self._state, health)
        self._intervals += 1
        self._trained += self._seconds
        return reasons

    @property
    def due(self) -> bool:
        """Whether a good interval is to be saved."""
        if self.off:
            return False
        if self._config.every is not None or self._cost is None:
            return self._intervals >= (self._config.every or 1)
        return self._cost <= self._config.max_cost * self._trained or self._intervals >= MOST_INTERVALS

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the time of the block as a part of the next snapshot's."""
        began = perf_counter()
        yield
        self._spent += perf_counter() - began

    def save(self, step: int, own: Mapping[str, Any]) -> None:
        """Takes a snapshot; without room for it warns, and leaves the run without rollbacks from here on.

        Args:
          step: optimizer steps done.
          own: the scheduler's state.
        """
        state = self._state._replace(rollbacks=0)
        try:
            with self.timed():
                self._snapshots.save(step, {"step": step, "own": dict(own), "rules": _plain(state)})
        except InvalidArgumentError as error:
            self._snapshots.drop()
            self.off, self.needs_first = True, False
            warnings.warn(f"this run cannot be rolled back: {error}", RuntimeWarning, stacklevel=2)
            return
        self._state, self.needs_first = state, False
        if not self._snapshots.grew:
            self._cost = self._spent
        self._intervals, self._trained, self._spent = 0, 0.0, 0.0

    def saved(self) -> Mapping[str, Any]:
        """Returns a copy of the scheduler's state in the last good snapshot."""
        return self._snapshots.extra()["own"]

    def restore(self, step: int, reason: str) -> Rollback:
        """Brings the last good snapshot back.

        Args:
          step: optimizer steps done.
          reason: why it is needed.
        """
        extra = self._snapshots.extra()
        self._state = rules.rolled_back(self._config, _state(extra["rules"]), self._state)
        self._snapshots.restore(rewind=not self._state.fallen_back)
        self._intervals, self._trained = 0, 0.0
        self.records.append(Rollback(step=step, to_step=extra["step"], reason=reason, fallback=self._state.fallen_back))
        return self.records[-1]

    def state_dict(self) -> dict[str, Any]:
        """Returns what the rules know and what was rolled back, as plain values; no snapshot."""
        return {"rules": _plain(self._state), "records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; the next optimizer step begins with a snapshot."""
        self._state = _state(state["rules"])
        self.records = [Rollback(**record) for record in state["records"]]
        self.needs_first = True

    def _memory_bytes(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            return float(torch.cuda.memory_reserved(self._device))
        try:
            return float(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        except OSError:
            return math.nan


def _plain(state: RollbackState) -> dict[str, Any]:
    return {**state._asdict(), "validations": list(state.validations)}


def _state(plain: Mapping[str, Any]) -> RollbackState:
    return RollbackState(**{**plain, "validations": tuple(plain["validations"])})
