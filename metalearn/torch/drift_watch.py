"""The drift side of a MetaScheduler: what is watched, which reports are acted on, and what waits for a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError
from metalearn.profiles import DomainProfile
from metalearn.safety.drift import RESPONSES, DriftConfig, DriftMonitor, DriftReport, choose_response
from metalearn.safety.drift.baseline import Harmful
from metalearn.safety.drift.report import worst
from metalearn.session import Session
from metalearn.signals import IntervalStatistics
from metalearn.torch.arguments import check_profile
from metalearn.torch.recovery import Recovery
from metalearn.torch.run_log import RunLog

STREAMS: Mapping[str, Harmful] = {"validation": "down", "loss": "up"}
INTERACTIONS = "interactions"
"""Name of the stream of profiles."""


class DriftWatch:
    """Watches one run, and lets its session respond, once to each change.

    An alarm is responded to when it is raised; that its kind is known better later is only logged. `watch` is responded
    to when it begins. Seasons and changes for the better are logged, and nothing is done about them.

    Args:
      config: of the monitor.
      session: of the run.
      log: of the run.

    Raises:
      InvalidArgumentError: the config is something else.
    """

    def __init__(self, config: DriftConfig, session: Session, log: RunLog) -> None:
        if not isinstance(config, DriftConfig):
            raise InvalidArgumentError(
                f"`drift` must be a DriftConfig or None, got {type(config).__name__}; pass DriftConfig()"
            )
        self._session, self._log = session, log
        self._monitor = DriftMonitor(streams=STREAMS, profiles=(INTERACTIONS,), config=config)
        self._watched: frozenset[str] = frozenset()
        """streams that were at `watch` when last seen"""
        self.last = DriftReport()
        """of a change"""
        self.awaiting: DriftReport | None = None
        """whose response needs a profile of the data as it is now"""

    @property
    def outlying(self) -> bool:
        """Whether the last interval lay so far to the worse that drift is not gone back to its end from."""
        return bool(self._monitor.outlying)

    def end_interval(self, statistics: IntervalStatistics, *, step: int, no_way_back: str | None) -> Decision | None:
        """Takes in an interval.

        Args:
          statistics: of the interval.
          step: optimizer steps done.
          no_way_back: why the run cannot be rolled back; None if it can.

        Returns:
          The decision now in force if there is a response; one to roll back is left to the caller.
        """
        values = {
            "validation": float(statistics.validation),
            "loss": float(statistics.loss_sum) / float(statistics.steps),
        }
        news = []
        for name, value in values.items():
            report = self._monitor.observe({name: value})
            lasts = report.degree == "watch" and report.kind is None
            if report.degree != "none" and not (lasts and name in self._watched):
                news.append(report)
            self._watched = self._watched | {name} if lasts else self._watched - {name}
        return self._respond(news, None, step=step, no_way_back=no_way_back)

    def observe_profile(self, window: DomainProfile, domain: DomainProfile, *, step: int) -> Decision | None:
        """Takes in the next window's profile, and that of the data to train on, for which a response may wait."""
        check_profile("window", window)
        check_profile("domain", domain)
        report = self._monitor.observe_profile(INTERACTIONS, window)
        news = [] if report.degree == "none" else [report]
        return self._respond(news, domain, step=step, no_way_back="it fell some time ago")

    def _respond(
        self, news: Sequence[DriftReport], domain: DomainProfile | None, *, step: int, no_way_back: str | None
    ) -> Decision | None:
        self.last = worst([*news]) if news else self.last
        calls = [report for report in news if report.harmful and (report.new or report.degree == "watch")]
        if self.awaiting is not None and domain is not None:
            calls.append(self.awaiting)
        elif self.awaiting is not None:
            calls = [report for report in calls if report.response != "re_profile"]  # which was asked for already
        chosen = max(calls, key=lambda report: RESPONSES.index(report.response), default=None)
        for report in news:
            if report is not chosen:
                self._log.drift(report, step, "none", report.sentence)
        if chosen is None:
            return None
        decision = self._session.adapt(
            chosen, domain, loosening=self._monitor.config.loosening, no_way_back=no_way_back, step=step
        )
        self._log.drift(chosen, step, decision.response or "none", "; ".join(decision.reasons))
        if decision.status == "held":  # a frozen session does nothing yet
            return decision
        if domain is not None:
            self.awaiting = None
            if decision.response in ("re_profile", "re_propose"):
                self._log.profile(domain)
        elif decision.response is not None:
            waits = choose_response(chosen, has_profile=False, no_way_back=no_way_back).awaits_profile
            self.awaiting = chosen if waits else self.awaiting
        return decision

    def curves(self) -> dict[str, Any]:
        """Returns what goes back when the run does: what is known of its curves."""
        return {"streams": self._monitor.state_dict()["streams"], "watched": sorted(self._watched)}

    def rewind(self, curves: Mapping[str, Any]) -> None:
        """Goes back to earlier `curves`. What is known of the data, and what was asked for, stays."""
        self._monitor.load_state_dict({**self._monitor.state_dict(), "streams": curves["streams"]})
        self._watched = frozenset(curves["watched"])

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later responses depend on, as plain values."""
        return {
            "monitor": self._monitor.state_dict(),
            "watched": sorted(self._watched),
            "last": asdict(self.last),
            "awaiting": None if self.awaiting is None else asdict(self.awaiting),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
          SessionError: the state is of a monitor with another configuration.
        """
        self._monitor.load_state_dict(state["monitor"])
        self._watched = frozenset(state["watched"])
        self.last = DriftReport(**state["last"])
        self.awaiting = None if state["awaiting"] is None else DriftReport(**state["awaiting"])


def no_way_back(recovery: Recovery | None, session: Session) -> str | None:
    """Returns why a run cannot go back to its last good snapshot because of drift, None if it can.

    Once only to each snapshot: if it comes to the same again, it was not the run. Snapshots do not wait for an alarm,
    or more than their distance of work would be lost; so the last one may be of after the change.
    """
    if recovery is None:
        return "rollback is off"
    if session.mode == "shadow":
        return "a shadow takes nothing back"
    if recovery.fallen_back:
        return "the run has fallen back to the base schedule"
    if not recovery.ready:
        return "there is no snapshot"
    if recovery.drifting:
        return "the last snapshot is of after the change"
    if recovery.gone_back:
        return "going back to the last snapshot has not helped"
    return None
