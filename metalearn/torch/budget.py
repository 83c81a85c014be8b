"""How long an interval must be for decisions to cost no more of the training time than the user allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from metalearn.errors import InvalidArgumentError

DEFAULT_SHARE = 0.01
"""Of the training time."""
GRACE_SECONDS = 1.0
"""What all decisions of a run may take together, whatever its length, where the user has named no share: twenty of them
take some 20 ms, and runs that short shall not differ by what else the machine does."""
MEASURED_INTERVALS = 2
"""After so many the interval is settled: the first decision of a process takes several times as long as any other."""
DOUBLINGS, UNKNOWN_DOUBLINGS = 2, 3
"""How often an interval is doubled at most, with a known horizon, so that a quarter of the decisions is left, and
without. Doubled, not fitted: runs shall differ as little as may be by what else the machine does."""
LEAST_LEFT = 0.25
"""Share of the budget that is kept for decisions, although steps are so short that the hooks alone would take it."""


class Budget:
    """Measures what steps and decisions of one run take, and settles its interval by that, once.

    With a decision and its probe taking d seconds, a step s and what is done at each step h, an interval of n steps
    keeps the share b if n ≥ d / (b s - h): the interval is doubled until it does, within bounds. Of decisions and
    probes the processor time counts: what else the machine does, and waiting for a GPU that is busy with training, is
    no cost of theirs.

    Args:
      share: of the training time that may go into the controller, in (0, 1); None is `DEFAULT_SHARE`, beyond
        `GRACE_SECONDS` in all, and without a warning.
      interval: optimizer steps, to begin with.
      horizon: of the run; None if unknown.
      given: whether the user has given the interval, so that it stays.

    Raises:
      InvalidArgumentError: the share is out of range.
    """

    def __init__(self, share: float | None, *, interval: int, horizon: int | None, given: bool) -> None:
        if share is not None and not 0.0 < share < 1.0:
            raise InvalidArgumentError(
                f"`overhead_budget` must be a share of the training time between 0 and 1, or None, got {share!r}"
            )
        self._share, self._strict = share or DEFAULT_SHARE, share is not None
        self._horizon, self._given = horizon, given
        self.interval = interval
        """Optimizer steps between decisions."""
        self.reason: str | None = None
        """Why that was lengthened."""
        self.settled = False
        """Whether the interval will not change any more."""
        self.probe_seconds = 0.0
        """That probes took, in this process."""
        self._intervals = 0
        self._step = self._decision = self._hook = math.inf
        """seconds of a training step, of a decision with its probe, of the hooks of a step: least of any interval"""
        self._run = 0.0
        """seconds of all intervals of this process with their decisions, validation left out"""
        self._hooks = 0.0
        """seconds of the hooks in all intervals before"""
        self._start()

    def _start(self) -> None:
        self._began, self._trained, self._probe = perf_counter(), math.nan, 0.0

    def end_interval(self) -> None:
        """Stops the clock of an interval's training: what follows is validation."""
        self._trained = perf_counter() - self._began

    def probed(self, seconds: float, processor_seconds: float) -> None:
        """Counts what a half of a probe took."""
        self.probe_seconds += seconds
        self._probe += processor_seconds

    def decided(self, seconds: float, processor_seconds: float, hook_seconds: float) -> bool:
        """Takes in what a decision took, and starts the next interval's clock; settles the interval in time.

        Args:
          seconds, processor_seconds: of the decision, the latter of this thread.
          hook_seconds: of the hooks of all steps in this process.

        Returns:
          Whether the interval has changed.
        """
        before = self.interval
        if self._trained > 0.0:  # not of an interval that was resumed, or gone back to
            self._run += self._trained + seconds
            if not self.settled:
                self._measure(processor_seconds + self._probe, (hook_seconds - self._hooks) / self.interval)
        self._hooks = hook_seconds
        self._start()
        return self.interval != before

    def overhead(self, host_seconds: float) -> float:
        """Returns the share of the training time that some seconds are; NaN in the first interval."""
        return host_seconds / self._run if self._run else math.nan

    def _measure(self, decision: float, hook: float) -> None:
        self._intervals += 1
        self._step = min(self._step, self._trained / self.interval)
        self._decision = min(self._decision, decision)
        self._hook = min(self._hook, hook)
        self.settled = self._intervals >= MEASURED_INTERVALS
        if self.settled:
            self._settle()

    def _settle(self) -> None:
        allowed = self._share * self._step
        left = max(allowed - self._hook, LEAST_LEFT * allowed)
        needed = math.ceil(self._decision / left)
        most = 0 if self._given else UNKNOWN_DOUBLINGS if self._horizon is None else DOUBLINGS
        doublings = min(most, max(0, math.ceil(math.log2(needed / self.interval))))
        longest = self.interval * 2**doublings
        if self._strict and self._decision / longest + self._hook > allowed:
            self._warn(longest)
        in_all = math.inf if self._horizon is None else self._decision * self._horizon / self.interval
        if longest == self.interval or (not self._strict and in_all <= GRACE_SECONDS):
            return
        self.reason = (
            f"interval lengthened from {self.interval} to {longest} steps: a decision takes "
            f"{1e3 * self._decision:.3g} ms, a step {1e3 * self._step:.3g} ms, the budget is {self._share:.2%}"
        )
        self.interval = longest

    def _warn(self, interval: int) -> None:
        warnings.warn(
            f"`overhead_budget` of {self._share:.2%} cannot be kept: a training step takes {1e6 * self._step:.0f} us, "
            f"of which the hooks are {1e6 * self._hook:.0f}, and a decision {1e6 * self._decision:.0f} us every "
            f"{interval} steps; take larger batches, or pass a larger `overhead_budget`",
            RuntimeWarning,
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values: a run that is resumed keeps the interval of the saved one."""
        return {
            "interval": self.interval,
            "reason": self.reason,
            "settled": self.settled,
            "intervals": self._intervals,
            "measured": [self._step, self._decision, self._hook],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; what was measured of the interval that runs is dropped."""
        self.interval, self.reason, self.settled = int(state["interval"]), state["reason"], bool(state["settled"])
        self._intervals = int(state["intervals"])
        self._step, self._decision, self._hook = map(float, state["measured"])
        self._start()
