"""The rollback side of a MetaScheduler: judges intervals, saves good ones, and brings the last good one back."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any, NamedTuple

import torch

from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.safety import rollback as rules
from metalearn.safety.drift import attribution
from metalearn.safety.rollback import Health, Rollback, RollbackConfig, RollbackState
from metalearn.signals import IntervalStatistics
from metalearn.torch.snapshots import Snapshots

MOST_INTERVALS = 10
"""Intervals between snapshots at the most, whatever they cost, where the config does not say."""
SHORT_LOOK = 0.005
"""Seconds that a look at weights and moments may always take."""
LOOK_SHARE = 0.2
"""Of `max_cost`, for looks between snapshots: the losses of every step are judged in any case."""


class Condition(NamedTuple):
    """What is known of a run at the end of an interval beside its statistics; of several processes what of all."""

    state_finite: bool
    """whether every weight and every moment of the optimizer is"""
    seconds: float
    """of training"""
    memory_bytes: float
    """NaN if nobody asks"""
    ready: bool = True
    """whether there is a snapshot to go back to"""


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
        self._state = rules.init()
        self.records: list[Rollback] = []
        self.needs_first = True
        """Whether the run has no snapshot yet, or none since a state was loaded."""
        self.off = False
        """Whether there is no room for snapshots."""
        self.drifting = False
        """Whether metric or loss lay far to the worse when the last snapshot was taken: no way back from drift."""
        self.excuses: tuple[str, ...] = ()
        """Why the last interval that was judged is not gone back from, though validation collapsed in it."""
        self._collapsed = self._held = False
        """whether a collapse alone was gone back from, and whether what follows keeps to the values of before"""
        self._starved = False
        """whether a want of memory was gone back from since the last snapshot"""
        self._began, self._seconds = perf_counter(), 0.0
        self._intervals, self._trained = 0, 0.0
        """intervals since the last snapshot, and their seconds"""
        self._spent = 0.0
        self._cost: float | None = None
        """seconds that a snapshot takes, once its memory is there"""
        self._looks: deque[float] = deque([0.0, 0.0], maxlen=3)
        """seconds that the last looks at weights and moments took, 0 before there were any; the least counts, for one
        may be interrupted"""
        self._unseen = 0.0
        """seconds trained since the last look"""

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
        """Whether as many rollbacks again have followed the one to the base schedule, without a new snapshot."""
        return self._state.rollbacks >= 2 * self._config.max_rollbacks

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

    def condition(self, *, surely: bool) -> Condition:
        """Looks at weights, moments and clock; memory is left to the caller.

        Tables of millions of rows take as long to look at as some steps. Then weights and moments are looked at where a
        snapshot may be due, which is never to hold what is not finite, and else no more often than `LOOK_SHARE` allows.
        The look before a snapshot copies them, and counts as a part of what that takes.

        Args:
          surely: look, whatever it costs.
        """
        self._unseen += self._seconds
        finite = True
        allowed = min(self._looks) <= max(SHORT_LOOK, LOOK_SHARE * self._config.max_cost * self._unseen)
        if not surely and self._due_after(self._intervals + 1, self._trained + self._seconds):
            with self.timed():
                finite = self._snapshots.all_finite(copying=True)
            self._unseen = 0.0
        elif surely or allowed:
            began = perf_counter()
            finite = self._snapshots.all_finite()
            self._looks.append(perf_counter() - began)
            self._unseen = 0.0
        return Condition(state_finite=finite, seconds=self._seconds, memory_bytes=math.nan)

    def judge(
        self, statistics: IntervalStatistics, condition: Condition, unkept: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """Returns what was wrong with the interval that has ended, nothing if it was good.

        Args:
          statistics, condition: of the interval.
          unkept: sentences on constraints that are violated, with nothing else left to be done.
        """
        steps = float(statistics.steps)
        health = Health(
            steps=steps,
            loss=float(statistics.loss_sum) / steps,
            nonfinite_steps=float(statistics.nonfinite),
            state_finite=condition.state_finite,
            validation=float(statistics.validation),
            unkept=unkept,
        )
        before = self._state
        self._state, reasons = rules.update(self._config, before, health)
        self._intervals += 1
        self._trained += condition.seconds
        collapsed, self.excuses = bool(reasons) and attribution.collapsed_alone(self._config, before, health), ()
        if collapsed and self._held:
            self._state = attribution.at_new_level(self._config, before, health)
            self.excuses = tuple(f"{reason}, with the values of before too: {attribution.EXCUSE}" for reason in reasons)
            self._intervals = max(self._intervals, MOST_INTERVALS)  # what was good for other data is not gone back to
            self._held = False
            return ()
        self._collapsed = collapsed
        return reasons

    def retries(self, *, held: bool) -> None:
        """Takes note of how the interval is trained again after a rollback.

        Args:
          held: whether with the values that were in force before it.
        """
        self._held = held and self._collapsed

    @property
    def due(self) -> bool:
        """Whether a good interval is to be saved."""
        return not self.off and self._due_after(self._intervals, self._trained)

    def _due_after(self, intervals: int, trained: float) -> bool:
        """Says whether so many intervals and seconds after the last snapshot it is time for one."""
        if self._config.every is not None or self._cost is None:
            return intervals >= (self._config.every or 1)
        return self._cost <= self._config.max_cost * trained or intervals >= MOST_INTERVALS

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
                records = [asdict(record) for record in self.records]
                self._snapshots.save(step, {"step": step, "own": dict(own), "rules": _plain(state), "records": records})
        except InvalidArgumentError as error:
            self.turn_off()
            warnings.warn(f"this run cannot be rolled back: {error}", RuntimeWarning, stacklevel=2)
            return
        self._state, self.needs_first, self._held, self._starved = state, False, False, False
        if not self._snapshots.grew:
            self._cost = self._spent
        self._intervals, self._trained, self._spent = 0, 0.0, 0.0

    def turn_off(self) -> None:
        """Leaves the run without rollbacks from here on, and frees the memory."""
        self._snapshots.drop()
        self.off, self.needs_first = True, False

    def follow(self, state: Mapping[str, Any], *, restore: bool) -> None:
        """Takes over what the rules of another process know of the same run.

        Args:
          state: from its `state_dict`.
          restore: whether it has gone back to its last good snapshot, so that this one goes back to its own.
        """
        self._load(state)
        if restore:
            self._snapshots.restore(rewind=not self._state.fallen_back)

    def saved(self) -> Mapping[str, Any]:
        """Returns a copy of the scheduler's state in the last good snapshot."""
        return self._snapshots.extra()["own"]

    def restore(self, step: int, reason: str, *, starved: bool = False) -> Rollback:
        """Brings the last good snapshot back.

        After the fallback what lies in the data is passed by, but for the first want of memory: the batch size may be
        among what is tracked, and is as it was only if that goes back too.

        Args:
          step: optimizer steps done.
          reason: why it is needed.
          starved: whether that is a want of memory.
        """
        extra = self._snapshots.extra()
        self._state = rules.rolled_back(self._config, _state(extra["rules"]), self._state)
        self._snapshots.restore(rewind=not self._state.fallen_back or (starved and not self._starved))
        self._starved = self._starved or starved
        self._intervals, self._trained, self._spent = 0, 0.0, 0.0
        self.records.append(Rollback(step=step, to_step=extra["step"], reason=reason, fallback=self._state.fallen_back))
        return self.records[-1]

    def left_behind(self) -> Mapping[str, Any] | None:
        """Returns the scheduler's state in the snapshot that an earlier process has left on disk; None without one.

        Raises:
          SessionError: snapshots are not kept on disk, or this one cannot be restored into the run.
        """
        if self._config.folder is None:
            raise SessionError("no folder to resume from; pass rollback=RollbackConfig(place='disk', folder=...)")
        if not self._snapshots.exists:
            return None
        self._snapshots.check_fits()
        return self.saved()

    def resume(self) -> None:
        """Restores the snapshot that an earlier process has left on disk, and goes on with it as its own."""
        extra = self._snapshots.extra()
        self._snapshots.restore()
        self._state = _state(extra["rules"])
        self.records = [Rollback(**record) for record in extra["records"]]
        self.needs_first = False
        self.start_interval()

    def state_dict(self) -> dict[str, Any]:
        """Returns what the rules know and what was rolled back, as plain values; no snapshot."""
        return {"rules": _plain(self._state), "records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; the next optimizer step begins with a snapshot."""
        self._load(state)
        self.needs_first = True

    def _load(self, state: Mapping[str, Any]) -> None:
        self._state = _state(state["rules"])
        self.records = [Rollback(**record) for record in state["records"]]


def _plain(state: RollbackState) -> dict[str, Any]:
    return {**state._asdict(), "validations": list(state.validations)}


def _state(plain: Mapping[str, Any]) -> RollbackState:
    return RollbackState(**{**plain, "validations": tuple(plain["validations"])})
