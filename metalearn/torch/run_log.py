"""The audit side of a MetaScheduler: what is logged of its run, and with what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from metalearn.audit import AuditLog, RecordKind
from metalearn.controller.decision import Decision
from metalearn.profiles import DomainProfile
from metalearn.safety.drift.report import DriftReport
from metalearn.safety.rollback import Rollback
from metalearn.signals import IntervalStatistics
from metalearn.torch.metric import Losses
from metalearn.torch.overrides import Change


class RunLog:
    """Logs one run.

    Profile and start configuration wait for the first step: until then a state may be loaded, of a run that has logged
    them.

    Args:
      log: to append to; None logs nothing.
      domain: profile of the training interactions.
      about: what is logged with the start configuration, of the run as a whole.
    """

    def __init__(self, log: AuditLog | None, domain: DomainProfile, about: Mapping[str, Any]) -> None:
        self._log, self._domain, self._about = log, domain, dict(about)
        self.first: Decision | None = None
        """the start configuration, while it waits"""

    def begin(self) -> None:
        """Logs what waits for the first step."""
        if self.first is None or self._log is None:
            return
        self._log.record_profile(self._domain)
        self._log.record_decision(self.first, **self._about)
        self.first = None

    def decision(self, decision: Decision, context: Mapping[str, Any], *, first: bool) -> None:
        """Logs a decision, with what was measured in the interval before it; the first waits.

        Training goes on while the disk takes the record: to wait for it would add a third to what a decision costs.
        """
        if first:
            self.first = decision
        elif self._log is not None:
            self._log.record_decision(decision, wait=False, **context)

    def end(self) -> None:
        """Waits until the disk has all that was logged."""
        if self._log is not None:
            self._log.flush()

    def rollback(self, record: Rollback) -> None:
        """Logs a return to the last good snapshot."""
        if self._log is not None:
            self._log.append(RecordKind.ROLLBACK, asdict(record))

    def override(self, change: Change, *, step: int, author: str, reason: str) -> None:
        """Logs what somebody set, or gave back, and why."""
        if self._log is not None:
            self.begin()
            sentence = f"{author}: {change}" + (f"; {reason}" if reason else "")
            told = {"step": step, "author": author, "reason": reason, "sentence": sentence}
            self._log.append(RecordKind.OVERRIDE, {**asdict(change), **told})

    def profile(self, profile: DomainProfile) -> None:
        """Logs a later profile that the run goes by."""
        if self._log is not None:
            self.begin()
            self._log.record_profile(profile)

    def drift(self, report: DriftReport, step: int, response: str, sentence: str) -> None:
        """Logs what a monitor said, and what came of it."""
        if self._log is not None:
            self.begin()
            told = {"step": step, "response": response, "sentence": sentence}
            self._log.append(RecordKind.DRIFT, {**asdict(report), **told})


def measured(statistics: IntervalStatistics) -> dict[str, float]:
    """Returns what of an interval a decision is logged with."""
    steps, seconds = float(statistics.steps), float(statistics.seconds)
    reported = {name: float(getattr(statistics, name)) for name in Losses._fields}
    return {
        "validation": float(statistics.validation),
        **{name: value for name, value in reported.items() if math.isfinite(value)},
        "loss": float(statistics.loss_sum) / steps,
        "seconds": seconds,
        "samples_per_second": float(statistics.samples) / seconds if seconds > 0 else math.nan,
    }
