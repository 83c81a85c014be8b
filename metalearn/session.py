"""The session: ask and tell. One stateful shell over features, policy and guard; all the maths is elsewhere.

Shape legend: G parameter group, A controlled group hyperparameter, B controlled global one, V every value.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalearn.controller.actions import Position, move, schedule_multiplier, values
from metalearn.controller.arguments import check_arguments, check_mode, checked_statistics, decision_interval
from metalearn.controller.config import ROLES
from metalearn.controller.deciding import Course, Stamp, event_decision, start_decision, step_decision
from metalearn.controller.decision import Decision, DecisionStatus, Mode
from metalearn.controller.forecast import forecast_risk
from metalearn.controller.modes import Advisor, Taken, consents, settle, shadowed, told
from metalearn.controller.placing import (
    arrays,
    controls,
    listed,
    listed_past,
    past_of,
    placed,
    sound,
)
from metalearn.controller.setting import (
    Moment,
    Past,
    describe,
    flat,
    flat_values,
    make_setting,
    starts,
    widened,
)
from metalearn.errors import SessionError
from metalearn.safety.adaptation import Bearings, Renewal, caught_up, decisions_left, propose_anew, respond, travelled
from metalearn.safety.drift.report import DriftReport
from metalearn.safety.drift.response import Loosening, choose_response
from metalearn.safety.frame import as_it_stands, guard_frame, within_limits
from metalearn.safety.guard import GuardConfig, GuardState, after_decision, after_rollback, judge
from metalearn.safety.proposal import Proposal
from metalearn.signals import Controls, IntervalStatistics, featurize, initial_history, percentile_scale
from metalearn.spaces import HyperparameterSpace

if TYPE_CHECKING:
    from metalearn.controller.controller import Controller
    from metalearn.profiles import DomainProfile

STATE_VERSION = 4
REMEMBERED = 32
"""Earlier decisions that a new one is compared with when it is explained."""


class _Left(NamedTuple):
    """What a session had come to when it was taken back to an earlier state."""

    values: np.ndarray
    guard: GuardState
    mode: Mode
    given_up: bool
    renewal: Renewal | None


class Session:
    """Steers one training run; made by `Controller.start`, whose arguments it takes.

    Call `ask` for the decision in force, `tell` after every interval for the next one. A session restored from its
    `state_dict` makes the same decisions to the bit.
    """

    def __init__(
        self,
        controller: Controller,
        profile: DomainProfile,
        space: HyperparameterSpace,
        *,
        roles: Sequence[str],
        family: str | None,
        horizon: int | None,
        decays: bool,
        batch_size: int | None,
        interval: int | None,
        initial: Sequence[Mapping[str, float]] | None,
        withheld: Sequence[Collection[str]] | None,
        mode: Mode,
        advisor: Advisor | None,
        guard: GuardConfig,
    ) -> None:
        check_arguments(roles, horizon, batch_size, interval, initial, withheld)
        check_mode(mode, advisor)
        # NumPy's integers are welcome, but a state_dict holds plain ones.
        horizon, batch_size, interval = (None if n is None else int(n) for n in (horizon, batch_size, interval))
        self._fingerprints = {"controller": controller.fingerprint, "domain": profile.fingerprint}
        config = self._config = controller.config
        epoch = profile.num_interactions / batch_size if batch_size else None
        self.interval = interval or decision_interval(config.num_decisions, horizon, epoch)
        horizon = horizon if decays else None
        self.family, self.horizon, self.batch_size = family, horizon, batch_size
        self._epoch = math.nan if epoch is None else epoch
        self._setting = make_setting(
            controller,
            profile,
            space,
            roles=roles,
            withheld=withheld,
            family=family,
            horizon=horizon,
            batch_size=batch_size,
        )
        self._describe = partial(describe, controller.checkpoint.normalizer, horizon=horizon, batch_size=batch_size)
        self._began = self._setting
        """of the profile that it was started with"""
        self._num_groups = len(roles)
        self._mode: Mode = mode
        self._advisor = advisor
        self._guard_config, self._rules, self._guard = guard, guard.rules, GuardState()
        self._trust, self._given_up = self._setting.confidence, False
        self._renewal: Renewal | None = None
        self._history = initial_history(len(roles), np, np.float64)
        self._hidden = np.zeros((len(roles), controller.network.hidden_size))
        self._steps = 0
        self._past: deque[Past] = deque(maxlen=REMEMBERED)
        self._left: _Left | None = None
        self._place(initial)
        first = start_decision(self._stamp(0, 0), self._setting, self._position, own_values=initial is not None)
        self._decision = shadowed(first) if mode == "shadow" else first

    @property
    def num_groups(self) -> int:
        """Parameter groups that it decides for."""
        return self._num_groups

    @property
    def reads_losses(self) -> bool:
        """Whether the losses in `IntervalStatistics` can change what is decided for this model."""
        return not self._setting.at_rest and self._setting.network.reads("generalization_gap")

    @property
    def confidence(self) -> float:
        """Share of its reach that the controller uses on this domain: 1 in the meta-training range, 0 far outside.

        0 also for a family of which it has the base only.
        """
        return self._trust

    @property
    def mode(self) -> Mode:
        """What becomes of its decisions: see `switch`."""
        return self._mode

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return self._guard.rollbacks

    def ask(self) -> Decision:
        """Returns the decision in force: at first the start configuration."""
        return self._decision

    def multiplier(self, step: int) -> float:
        """Returns the base schedule's factor on the learning rate at a step; see `schedule_multiplier`."""
        return self.multipliers(step, 1)[0]

    def multipliers(self, first: int, count: int) -> list[float]:
        """Returns `multiplier` of `count` steps from `first` on."""
        if self.horizon is None:
            return [1.0] * count
        steps = np.arange(first, first + count, dtype=np.float64)
        return schedule_multiplier(steps / self.horizon, np, self._config.decay_to).tolist()

    def tell(
        self,
        statistics: IntervalStatistics,
        *,
        worsening: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> Decision:
        """Takes in one interval's statistics and decides anew.

        Args:
          statistics: with [G] values for this session's groups; NaN where not measured.
          worsening: hyperparameter to the direction in which the guard holds it, since it would worsen a constraint.
          notes: sentences that come first among the decision's reasons.

        Raises:
          InvalidArgumentError: the statistics are for another number of groups, or of no step; or the advisor's answer
            is none.
        """
        statistics = checked_statistics(statistics, self._num_groups)
        steps = self._steps + int(statistics.steps)
        # Arithmetic on NaN ("not measured") and on a diverged run's infinities is meant; the scaling drops the results.
        with np.errstate(all="ignore"):
            features, history = featurize(statistics, self._controls(steps), self._history, np)
            group = percentile_scale(features.group, self._setting.knots[0], np)
            run = percentile_scale(features.run, self._setting.knots[1], np)
            act, context = self._setting.network.act, self._setting.context
            group_action, run_action, hidden = act(self._hidden, group, run, context)
            group_action = sound(group_action, self._setting.bound[0].shape)
            run_action = sound(run_action, self._setting.bound[1].shape)
            trust = self._trust * self._guard.lead
            moment = Moment(self._hidden, group, run, features, group_action, run_action, trust)
            frame = as_it_stands(self._frame, self._guard)
            if worsening:
                directions = [worsening.get(name, 0) for name in self._setting.hyperparameters]
                frame = replace(frame, worsening=np.array(directions))
            course = Course(self._position, self._position) if statistics.nonfinite > 0 else self._course(frame)
            proposal = self._propose(moment, course.around, frame, float(statistics.nonfinite))
        verdict = judge(proposal, self._rules)
        candidate = step_decision(
            self._stamp(self._decision.index + 1, steps),
            self._setting,
            moment,
            course,
            proposal,
            verdict,
            before=self._decision,
            past=tuple(self._past),
            since_best=int(history.since_best),
        )
        decision, position, decoded = settle(
            candidate,
            Taken(self._decision, self._position, self._values),
            verdict.values,
            proposal,
            mode=self._mode,
            advisor=self._advisor,
            setting=self._setting,
            around=course.around,
        )
        if notes:
            decision = told(decision, "; ".join(notes))
        # Nothing above has changed the session: an advisor that raises leaves it as it was.
        moved = flat_values(position) - proposal.current
        self._past.append(Past(decision.index, steps, group, run, moved, moment.validation_change))
        if position.group_start is not self._position.group_start:
            self._frame = replace(self._frame, start=proposal.start)
        self._steps, self._history, self._position, self._values = steps, history, position, decoded
        if np.shape(hidden) == self._hidden.shape and np.isfinite(hidden).all():
            self._hidden = hidden
        self._guard = after_decision(self._guard, proposal, verdict, self._guard_config)
        self._decision = decision
        return decision

    def dry_run(self, statistics: IntervalStatistics) -> Decision:
        """Prints what `tell` would do, without doing it and without asking the advisor.

        Args:
          statistics: as for `tell`.

        Returns:
          The decision that it would take.
        """
        twin = copy.copy(self)  # every part of a session's state is replaced, not changed, save for the memory
        twin._past = self._past.copy()
        if twin._mode == "advise":
            twin._mode = "control"
        decision = twin.tell(statistics)
        print(decision)
        return decision

    def switch(
        self,
        mode: Mode,
        *,
        advisor: Advisor | None = None,
        initial: Sequence[Mapping[str, float]] | None = None,
    ) -> Decision:
        """Changes the mode.

        `control` decides. `shadow` decides and changes nothing: the loop keeps its own values. `advise` asks before
        each change, the start configuration excepted. `frozen` leaves the values where they are.

        Args:
          mode: from now on.
          advisor: for `advise`; None keeps the one that the session has.
          initial: per group, the values in force, which a session that leaves `shadow` does not know: it goes on from
            them. The learning rate is that of the schedule's peak, see `multiplier`.

        Returns:
          The decision now in force, a new one.

        Raises:
          InvalidArgumentError: the mode is none, or there is no advisor.
          SessionError: the session leaves shadow mode and is not told the values in force.
        """
        advisor = advisor or self._advisor
        check_mode(mode, advisor)
        before = self._mode
        if before == "shadow" and mode != "shadow":
            if initial is None or len(initial) != self.num_groups:
                raise SessionError(
                    f"in shadow mode the session does not know what is in force; pass `initial`, the values of each of "
                    f"{self.num_groups} groups"
                )
            self._place(initial)
        self._mode, self._advisor = mode, advisor
        status = "fallback" if self._trust == 0.0 else "applied"
        return self._event(status, (f"mode: {mode}, after {before}",))

    def adapt(
        self,
        report: DriftReport,
        profile: DomainProfile | None = None,
        *,
        loosening: Loosening | None = None,
        no_way_back: str | None = "rollback is off",
        step: int | None = None,
    ) -> Decision:
        """Responds to drift, by its degree (`DriftReport.response`); where that cannot be done, by the next milder.

        No value moves at once: what a response allows or aims at comes with the next decisions, under the guard.

        - `re_profile`: asks for a profile; with one, policy and confidence go by it. Out of range, the run then
          returns to its base.
        - `loosen`: largest step and trust region are wider for some decisions.
        - `re_propose`: the start is proposed anew from the profile, and the run travels there, see
          `metalearn.safety.adaptation`. Without a profile it asks for one, and loosens.
        - `roll_back`: is left to the caller, who calls `bar` afterwards.

        Args:
          report: of a monitor. Of a change that is no harm nothing comes.
          profile: of the data as it is now, such as the session was started with of the data as it was.
          loosening: how far and how long; by default as far and as long as `Loosening()`.
          no_way_back: why the caller cannot roll back; None if it can.
          step: optimizer steps done; by default those at the last decision.

        Returns:
          The decision in force; its `response` is what is done. Of status "held" in mode `frozen`, and "rejected" where
          the advisor, who is asked before anything changes, says False.
        """
        choice = choose_response(report, has_profile=profile is not None, no_way_back=no_way_back)
        if choice.response == "none":
            return self._decision
        told = (f"drift: {report.sentence}", *choice.reasons)
        if self._mode == "frozen":
            return self._event("held", (*told, "held: the session is frozen"), step=step)
        now = self._bearings()
        renewal = None if profile is None else self._renewal_by(profile, anew=choice.response == "re_propose")
        answer = respond(
            now,
            choice,
            renewal,
            loosening=loosening or Loosening(),
            frame=self._frame,
            given_up=self._given_up,
        )
        told, status = (*told, answer.sentence), "fallback" if answer.bearings.trust == 0.0 else "applied"
        if self._mode == "advise" and (answer.bearings is not now or answer.response == "roll_back"):
            candidate = self._made(status, told, step=step, response=answer.response)
            if not consents(self._advisor, candidate, self._setting, flat_values(self._position)):
                return self._event("rejected", (*told, "rejected by the advisor"), step=step, advice="rejected")
            told = (*told, "accepted by the advisor")
        self._take(answer.bearings)
        return self._event(status, told, step=step, response=answer.response)

    def bar(self, reason: str) -> Decision:
        """Bars, after a rollback, what led to it; call it when this session's earlier state has been loaded.

        What the values had moved since that state may not be done again for some decisions (`GuardConfig.cool_down`),
        and the largest step is halved; it recovers by a tenth a decision. What was barred, halved or loosened before
        still is, the mode stays, and so does a later profile of the data, although the state that was loaded knows
        nothing of it.

        Args:
          reason: for the rollback, in the decision's reasons.

        Returns:
          The decision in force, of status "rolled back".
        """
        left = self._left or self._leave()
        moved = left.values - flat_values(self._position)
        self._guard = after_rollback(self._guard, moved, self._guard_config, left.guard)
        self._mode, self._left = left.mode, None
        self._take(caught_up(self._bearings(), left.renewal))
        if left.given_up:
            self._surrender()
        labels = self._frame.labels
        barred = ", ".join(f"{labels[bar.value]} {'up' if bar.direction > 0 else 'down'}" for bar in self._guard.bars)
        return self._event(
            "rolled back",
            (
                f"rolled back: {reason}",
                f"barred for up to {self._guard_config.cool_down} decisions: {barred}" if barred else "no move to bar",
                f"largest step: {self._guard.step_scale:.3g} of the usual one",
            ),
        )

    def fall_back(self, reason: str) -> Decision:
        """Gives the run up to the base schedule, for good: no shift, no residual, no trust.

        Args:
          reason: in the decision's reasons.

        Returns:
          The decision in force, of status "fallback".
        """
        if self._left is not None:
            self._guard = replace(self._guard, rollbacks=max(self._guard.rollbacks, self._left.guard.rollbacks))
            self._mode, self._left = self._left.mode, None
        self._surrender()
        return self._event("fallback", (f"base schedule from here on: {reason}",))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later decisions depend on, as plain numbers, strings, lists and dicts."""
        return {
            **self._arguments(),
            "steps": self._steps,
            "mode": self._mode,
            "trust": self._trust,
            "base": listed(self._base),
            "position": listed(self._position),
            "guard_state": self._guard.as_dict(),
            "history": listed(self._history),
            "hidden": self._hidden.tolist(),
            "past": [listed_past(one) for one in self._past],
            "decision": self._decision.as_dict(),
            "initial": copy.deepcopy(self._initial),
            "given_up": self._given_up,
            "renewal": None if self._renewal is None else self._renewal.as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; this session must have been started with the same arguments.

        Raises:
          SessionError: the state is of another version, of a session with other arguments, or in mode `advise` while
            this one has no advisor; the message names which.
        """
        for name, mine in self._arguments().items():
            if state.get(name) != mine:
                raise SessionError(
                    f"state_dict has {name}={state.get(name)!r}, this session {mine!r}; "
                    "start it with the arguments of the saved run"
                )
        if state["mode"] == "advise" and self._advisor is None:
            raise SessionError("state_dict has mode='advise', this session no advisor; start it with `advisor`")
        decision = Decision.from_dict(state["decision"])
        erased = self._decision.index > decision.index
        self._left = self._leave() if erased else None
        self._steps, self._mode, trust = int(state["steps"]), state["mode"], float(state["trust"])
        # States of before drift was responded to lack the last three.
        renewal = None if state.get("renewal") is None else Renewal.from_dict(state["renewal"])
        setting = self._began if renewal is None else self._began.described_by(renewal.descriptors)
        self._initial = copy.deepcopy(state.get("initial", self._initial))
        self._given_up = bool(state.get("given_up", trust == 0.0))
        self._base = Position(**arrays(state["base"]))
        position, guard = Position(**arrays(state["position"])), GuardState.from_dict(state["guard_state"])
        self._take(Bearings(setting, trust, position, guard, renewal))
        self._history = initial_history(len(setting.roles), np, np.float64)._replace(**arrays(state["history"]))
        self._values = values(self._position, self._config, np)
        self._hidden = np.array(state["hidden"], np.float64)
        self._past = deque(map(past_of, state["past"]), maxlen=REMEMBERED)
        self._decision = decision

    def _bearings(self) -> Bearings:
        return Bearings(self._setting, self._trust, self._position, self._guard, self._renewal)

    def _take(self, bearings: Bearings) -> None:
        self._setting, self._trust, self._position, self._guard, self._renewal = bearings
        self._frame = guard_frame(self._setting, self._position, self._base, self._guard_config)

    def _surrender(self) -> None:
        self._given_up = True
        self._take(Bearings(self._setting, 0.0, self._base, self._guard, self._standing()))

    def _standing(self) -> Renewal | None:
        """Returns what a later profile has made of the run, less the way to a start that it proposed."""
        return None if self._renewal is None else self._renewal._replace(target=None)

    def _leave(self) -> _Left:
        return _Left(flat_values(self._position), self._guard, self._mode, self._given_up, self._renewal)

    def _renewal_by(self, profile: DomainProfile, *, anew: bool) -> Renewal:
        descriptors, standing = self._describe(profile), self._renewal
        setting = self._began.described_by(descriptors)
        if anew or setting.confidence == 0.0:
            target = propose_anew(setting, self._initial, self._guard_config, flat_values(self._position))
        else:
            target = None if standing is None else standing.target
        return Renewal(profile.fingerprint, descriptors, target)

    def _course(self, frame: Proposal) -> Course:
        """Returns where the next decision goes from: with a start that was proposed anew, from one nearer to it."""
        position, target = self._position, None if self._renewal is None else self._renewal.target
        if target is None or np.array_equal(flat(position.group_start, position.global_start), target):
            return Course(position, position)
        around = travelled(position, target, frame)
        return Course(position, around, decisions_left(around, target, frame.max_step))

    def _arguments(self) -> dict[str, Any]:
        """Returns what a session must have in common with one whose state it takes over."""
        in_group, in_run = self._setting.names
        return {
            "version": STATE_VERSION,
            "controller": self._fingerprints["controller"],
            "num_groups": self.num_groups,
            "roles": [ROLES[role] for role in self._setting.roles],
            "family": self.family,
            "horizon": self.horizon,
            "batch_size": self.batch_size,
            "interval": self.interval,
            "hyperparameters": [*map(list, in_group), list(in_run)],
            "domain": self._fingerprints["domain"],
            "guard": self._guard_config.as_dict(),
        }

    def _place(self, initial: Sequence[Mapping[str, float]] | None) -> None:
        """Takes the start configuration: the controller's own, or from the values in force."""
        self._initial = None if initial is None else [{k: float(v) for k, v in row.items()} for row in initial]
        position, base = starts(self._setting, self._trust, initial)
        position, self._base = (
            within_limits(self._setting, start, base, self._guard_config) for start in (position, base)
        )
        self._take(Bearings(self._setting, self._trust, position, self._guard, self._standing()))
        self._values = values(self._position, self._config, np)

    def _propose(self, moment: Moment, around: Position, frame: Proposal, nonfinite_steps: float) -> Proposal:
        """Puts what the policy wants before the guard."""
        setting, position, model = self._setting, self._position, self._setting.outcome
        free_group, free_run = setting.bound
        wanted = move(
            around,
            moment.group_action * free_group,
            moment.run_action * free_run,
            moment.trust,
            widened(setting.config, self._guard.lead),
            np,
        )
        risk: Callable[[np.ndarray, float], float] | None = None
        if self._guard_config.acceptance is not None and model is not None:

            def weigh(where: np.ndarray, tolerance: float) -> float:
                return forecast_risk(setting, model, placed(around, where), position, moment, tolerance)

            risk = weigh

        return replace(
            frame,
            current=flat_values(position),
            proposed=flat_values(wanted),
            start=frame.start if around is position else flat(around.group_start, around.global_start),
            nonfinite_steps=nonfinite_steps,
            risk=risk,
        )

    def _event(self, status: DecisionStatus, reasons: tuple[str, ...], **about: Any) -> Decision:
        """Puts the position in force, for a reason that is not the policy's."""
        self._values = values(self._position, self._config, np)
        decision = self._made(status, reasons, **about)
        self._decision = shadowed(decision) if self._mode == "shadow" else decision
        return self._decision

    def _made(
        self, status: DecisionStatus, reasons: tuple[str, ...], *, step: int | None = None, **about: Any
    ) -> Decision:
        stamp = self._stamp(self._decision.index + 1, self._steps if step is None else step)
        decision = event_decision(stamp, self._setting, self._values, status, reasons)
        return replace(decision, **about) if about else decision

    def _stamp(self, index: int, step: int) -> Stamp:
        return Stamp(index, step, self.multiplier(step), self._trust, self._mode)

    def _controls(self, steps: int) -> Controls:
        return controls(
            self._setting,
            self._position,
            self._values,
            schedule=self.multiplier(steps - 1),
            shadow=self._mode == "shadow",
            progress=math.nan if self.horizon is None else steps / self.horizon,
            epochs=steps / self._epoch,
        )
