"""The session: ask and tell. One stateful shell over features, policy and guard; all the maths is elsewhere.

Shape legend: G parameter group, A controlled group hyperparameter, B controlled global one, V every value.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalearn.controller.actions import (
    Position,
    Values,
    confidence,
    move,
    relative_residual,
    schedule_multiplier,
    values,
)
from metalearn.controller.arguments import check_arguments, check_mode, checked_statistics, decision_interval
from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED, ROLES
from metalearn.controller.decision import Advice, Configuration, Decision, DecisionStatus, Mode
from metalearn.controller.explanation import Explanation, explain_event, explain_start, explain_step
from metalearn.controller.forecast import Improvement, forecast_improvement, forecast_risk
from metalearn.controller.modes import Advisor, encode_answer, shadowed, told
from metalearn.controller.reasons import changes, influences, situation
from metalearn.controller.setting import Moment, Past, base_position, chosen, flat_values, make_setting, starts
from metalearn.errors import SessionError
from metalearn.safety.frame import guard_frame, within_limits
from metalearn.safety.guard import OVERRIDE_RULES, GuardConfig, GuardState, after_decision, after_rollback, judge
from metalearn.safety.proposal import Proposal, Verdict
from metalearn.signals import (
    Controls,
    IntervalStatistics,
    SignalHistory,
    featurize,
    initial_history,
    out_of_range,
    percentile_scale,
)
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
    trust: float


class _Taken(NamedTuple):
    """A decision and where it puts the run."""

    decision: Decision
    position: Position
    values: Values


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
        self.family, self.horizon, self.batch_size = family, horizon, batch_size
        config = self._config = controller.config
        epoch = profile.num_interactions / batch_size if batch_size else None
        self.interval = interval or decision_interval(config.num_decisions, horizon, epoch)
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
        in_group, in_run = self._setting.bound
        self._num_groups = len(roles)
        self._ours = tuple(np.where(bound, 1.0, math.nan) for bound in (in_group, in_run))
        self._names = [chosen(GROUP_CONTROLLED, row) for row in in_group], chosen(GLOBAL_CONTROLLED, in_run)
        self._mode: Mode = mode
        self._advisor = advisor
        self._guard_config, self._rules, self._guard = guard, guard.rules, GuardState()
        self._at_rest = family in config.at_rest
        self._trust = 0.0 if self._at_rest else float(confidence(out_of_range(self._setting.descriptors, np), np))
        self._history = initial_history(len(roles), np, np.float64)
        self._hidden = np.zeros((len(roles), controller.network.hidden_size))
        self._steps = 0
        self._past: deque[Past] = deque(maxlen=REMEMBERED)
        self._left: _Left | None = None
        self._place(initial)
        self._decision = self._first_decision(initial is not None)

    @property
    def num_groups(self) -> int:
        """Parameter groups that it decides for."""
        return self._num_groups

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
        """Returns the base schedule's factor on the learning rate at a step; past the horizon that of its last step."""
        if self.horizon is None:
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * min(max(step, 0), self.horizon - 1) / self.horizon))

    def multipliers(self, first: int, count: int) -> list[float]:
        """Returns `multiplier` of `count` steps from `first` on."""
        if self.horizon is None:
            return [1.0] * count
        steps = np.minimum(np.arange(first, first + count, dtype=np.float64), self.horizon - 1)
        return schedule_multiplier(steps / self.horizon, np).tolist()

    def tell(self, statistics: IntervalStatistics) -> Decision:
        """Takes in one interval's statistics and decides anew.

        Args:
          statistics: with [G] values for this session's groups; NaN where not measured.

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
            group_action, run_action, hidden = self._setting.network.act(
                self._hidden, group, run, self._setting.code, self._setting.roles
            )
            group_action = _sound(group_action, self._setting.bound[0].shape)
            run_action = _sound(run_action, self._setting.bound[1].shape)
            moment = Moment(self._hidden, group, run, features, group_action, run_action, self._trust)
            proposal = self._propose(moment, float(statistics.nonfinite))
        verdict = judge(proposal, self._rules)
        candidate = self._candidate(steps, moment, proposal, verdict, int(history.since_best))
        decision, position, decoded = self._put_in_force(candidate, proposal, verdict)
        # Nothing above has changed the session: an advisor that raises leaves it as it was.
        moved = flat_values(position) - proposal.current
        self._past.append(Past(decision.index, steps, group, run, moved, moment.validation_change))
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

    def bar(self, reason: str) -> Decision:
        """Bars, after a rollback, what led to it; call it when this session's earlier state has been loaded.

        What the values had moved since that state may not be done again for some decisions (`GuardConfig.cool_down`),
        and the largest step is halved; it recovers by a tenth a decision. What was barred or halved before still is,
        and the mode stays, although the state that was loaded knows nothing of it.

        Args:
          reason: for the rollback, in the decision's reasons.

        Returns:
          The decision in force, of status "rolled back".
        """
        left = self._left or self._leave()
        moved = left.values - flat_values(self._position)
        self._guard = after_rollback(self._guard, moved, self._guard_config, left.guard)
        self._mode, self._left = left.mode, None
        if left.trust == 0.0:  # it had been given up to the base schedule, for good
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
            "base": _listed(self._base),
            "position": _listed(self._position),
            "guard_state": self._guard.as_dict(),
            "history": _listed(self._history),
            "hidden": self._hidden.tolist(),
            "past": [[part.tolist() if isinstance(part, np.ndarray) else part for part in one] for one in self._past],
            "decision": self._decision.as_dict(),
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
        self._steps, self._mode, self._trust = int(state["steps"]), state["mode"], float(state["trust"])
        self._base = Position(**_arrays(state["base"]))
        self._position = Position(**_arrays(state["position"]))
        self._frame = guard_frame(self._setting, self._position, self._base, self._guard_config)
        self._guard = GuardState.from_dict(state["guard_state"])
        self._history = SignalHistory(**_arrays(state["history"]))
        self._values = values(self._position, self._config, np)
        self._hidden = np.array(state["hidden"], np.float64)
        self._past = deque((_past(one) for one in state["past"]), maxlen=REMEMBERED)
        self._decision = decision

    def _surrender(self) -> None:
        self._trust, self._position = 0.0, self._base
        self._frame = guard_frame(self._setting, self._position, self._base, self._guard_config)

    def _leave(self) -> _Left:
        return _Left(flat_values(self._position), self._guard, self._mode, self._trust)

    def _arguments(self) -> dict[str, Any]:
        """Returns what a session must have in common with one whose state it takes over."""
        in_group, in_run = self._setting.bound
        return {
            "version": STATE_VERSION,
            "controller": self._fingerprints["controller"],
            "num_groups": self.num_groups,
            "roles": [ROLES[role] for role in self._setting.roles],
            "family": self.family,
            "horizon": self.horizon,
            "batch_size": self.batch_size,
            "interval": self.interval,
            "hyperparameters": [[*chosen(GROUP_CONTROLLED, row)] for row in in_group]
            + [[*chosen(GLOBAL_CONTROLLED, in_run)]],
            "domain": self._fingerprints["domain"],
            "guard": self._guard_config.as_dict(),
        }

    def _place(self, initial: Sequence[Mapping[str, float]] | None) -> None:
        """Takes the start configuration: the controller's own, or from the values in force."""
        position, base = starts(self._setting, self._trust, initial)
        self._position, self._base = (
            within_limits(self._setting, start, base, self._guard_config) for start in (position, base)
        )
        self._frame = guard_frame(self._setting, self._position, self._base, self._guard_config)
        self._values = values(self._position, self._config, np)

    def _first_decision(self, own_values: bool) -> Decision:
        if own_values:
            reason = "start: the optimizer's own values, since the controller's prior is for AdamW"
        elif self._at_rest:
            reason = f"start: base configuration, which is all that this controller has for {self.family} models"
        elif self._trust == 0.0:
            reason = "start: base configuration, since the domain lies outside the meta-training range"
        else:
            reason = f"start: base configuration shifted for this domain, at confidence {self._trust:.2f}"
        setting, position, trust = self._setting, self._position, self._trust
        base = base_position(setting)

        def foresee() -> Improvement | None:
            return forecast_improvement(setting, position, base, None)

        def explain() -> Explanation:
            return explain_start(
                setting, position=position, base=flat_values(base), trust=trust, expected=decision.improvement
            )

        intended = self._configuration(values(position, self._config, np))
        status = "fallback" if trust == 0.0 else "applied"
        decision = self._decide(0, 0, status, intended, lambda: (reason,), foresee, explain)
        return shadowed(decision) if self._mode == "shadow" else decision

    def _propose(self, moment: Moment, nonfinite_steps: float) -> Proposal:
        """Puts what the policy wants before the guard."""
        setting, position = self._setting, self._position
        free_group, free_run = setting.bound
        wanted = move(
            position, moment.group_action * free_group, moment.run_action * free_run, self._trust, self._config, np
        )
        scale, model = self._guard.step_scale, setting.outcome
        risk: Callable[[np.ndarray, float], float] | None = None
        if self._guard_config.acceptance is not None and model is not None:

            def weigh(where: np.ndarray, tolerance: float) -> float:
                return forecast_risk(setting, model, self._placed(where), position, moment, tolerance)

            risk = weigh

        return replace(
            self._frame,
            current=flat_values(position),
            proposed=flat_values(wanted),
            max_step=self._frame.max_step if scale == 1.0 else self._frame.max_step * scale,
            nonfinite_steps=nonfinite_steps,
            bars=self._guard.bars,
            risk=risk,
        )

    def _candidate(self, steps: int, moment: Moment, proposal: Proposal, verdict: Verdict, since_best: int) -> _Taken:
        """Returns what the controller does if nobody keeps it from it."""
        setting, held, before, past = self._setting, self._position, self._decision, tuple(self._past)
        index, former = before.index + 1, before.intended if before.mode == "shadow" else before.in_force
        current = proposal.current
        asked = verdict.values if verdict.rejected is None else verdict.rejected
        wanted = self._placed(asked)
        position = wanted if verdict.rejected is None else held
        decoded = values(position, self._config, np)
        configuration = self._configuration(decoded)

        def reasons() -> tuple[str, ...]:
            changed = changes(former, configuration)
            return (*verdict.reasons, *changed, *situation(moment.raw.run, since_best), *influences(setting, moment))

        def foresee() -> Improvement | None:
            return forecast_improvement(setting, wanted, held, moment)

        def explain() -> Explanation:
            return explain_step(
                setting,
                moment,
                index=index,
                step=steps,
                move=asked - current,
                position=wanted,
                expected=decision.improvement,
                past=past,
            )

        status = "fallback" if self._trust == 0.0 and verdict.status == "applied" else verdict.status
        decision = self._decide(index, steps, status, configuration, reasons, foresee, explain)
        if verdict.rejected is not None:
            decision = replace(decision, proposed=self._configuration(values(wanted, self._config, np)))
        return _Taken(decision, position, decoded)

    def _put_in_force(self, candidate: _Taken, proposal: Proposal, verdict: Verdict) -> _Taken:
        """Does with a candidate what the mode says."""
        if self._mode == "control":
            return candidate
        if self._mode == "shadow":
            return candidate._replace(decision=shadowed(candidate.decision))
        if self._mode == "frozen":
            return self._kept(candidate.decision, "held", "held: the session is frozen", None)
        if self._advisor is None or np.array_equal(verdict.values, proposal.current):
            return candidate
        answer = self._advisor(candidate.decision)
        if isinstance(answer, (bool, np.bool_)):
            if answer:
                accepted = told(candidate.decision, "accepted by the advisor", advice="accepted")
                return candidate._replace(decision=accepted)
            return self._kept(candidate.decision, "rejected", "rejected by the advisor", "rejected")
        return self._overridden(candidate.decision, answer, proposal)

    def _kept(self, candidate: Decision, status: DecisionStatus, reason: str, advice: Advice | None) -> _Taken:
        """Leaves the values where they are."""
        now = self._decision
        intended = candidate.intended if candidate.intended != now.in_force else None
        decision = told(
            candidate, reason, status=status, advice=advice, groups=now.groups, run=now.run, proposed=intended
        )
        return _Taken(decision, self._position, self._values)

    def _overridden(self, candidate: Decision, answer: Any, proposal: Proposal) -> _Taken:
        """Takes the advisor's values, as far as the guard lets them through."""
        verdict = judge(
            replace(proposal, proposed=encode_answer(self._setting, answer, proposal.current)), OVERRIDE_RULES
        )
        position = self._placed(verdict.values)
        decoded = values(position, self._config, np)
        groups, run = self._configuration(decoded)
        decision = told(
            candidate,
            "; ".join(("overridden by the advisor", *verdict.reasons)),
            status=verdict.status,
            advice="overridden",
            groups=groups,
            run=run,
            proposed=candidate.intended,
        )
        return _Taken(decision, position, decoded)

    def _event(self, status: DecisionStatus, reasons: tuple[str, ...]) -> Decision:
        """Puts the position in force, for a reason that is not the policy's."""
        index, steps = self._decision.index + 1, self._steps
        self._values = values(self._position, self._config, np)
        decision = self._decide(
            index,
            steps,
            status,
            self._configuration(self._values),
            lambda: reasons,
            lambda: None,
            lambda: explain_event(index, steps, reasons),
        )
        self._decision = shadowed(decision) if self._mode == "shadow" else decision
        return self._decision

    def _decide(
        self,
        index: int,
        step: int,
        status: DecisionStatus,
        configuration: Configuration,
        reasons: Callable[[], tuple[str, ...]],
        improvement: Callable[[], Improvement | None],
        explanation: Callable[[], Explanation],
    ) -> Decision:
        return Decision(
            index=index,
            step=step,
            status=status,
            groups=configuration.groups,
            run=configuration.run,
            schedule=self.multiplier(step),
            confidence=self._trust,
            mode=self._mode,
            reasons_fn=reasons,
            improvement_fn=improvement,
            explanation_fn=explanation,
        )

    def _configuration(self, decoded: Values) -> Configuration:
        in_group, in_run = self._names
        return Configuration(
            tuple({name: float(getattr(decoded, name)[g]) for name in names} for g, names in enumerate(in_group)),
            {name: float(getattr(decoded, name)) for name in in_run},
        )

    def _controls(self, steps: int) -> Controls:
        """What was in force during the interval that ended just now; NaN for what is not ours to set."""
        group_residual, run_residual = relative_residual(self._position, self._config, np)
        in_group, in_run = self._ours
        ours = math.nan if self._mode == "shadow" else 1.0
        return Controls(
            learning_rate=self._values.learning_rate * self.multiplier(steps - 1) * in_group[:, 0] * ours,
            weight_decay=self._values.weight_decay * in_group[:, 1] * ours,
            group_residual=group_residual * in_group,
            dropout=np.float64(self._values.dropout) * in_run[0] * ours,
            dropout_residual=run_residual[0] * in_run[0],
            progress=np.float64(math.nan if self.horizon is None else steps / self.horizon),
            epochs=np.float64(steps / self._epoch),
        )

    def _placed(self, where: np.ndarray) -> Position:
        split = self.num_groups * len(GROUP_CONTROLLED)
        group = where[:split].reshape(self.num_groups, -1)
        return self._position._replace(
            group_residual=group - self._position.group_start,
            global_residual=where[split:] - self._position.global_start,
        )


def _sound(action: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an action as it is, or NaN, which the guard holds, if it is not one real number for each value."""
    sound = isinstance(action, np.ndarray) and action.shape == shape and action.dtype.kind in "fiu"
    return action if sound else np.full(shape, math.nan)


def _listed(arrays: Any) -> dict[str, Any]:
    """Returns the arrays of a named tuple as lists."""
    return {name: value.tolist() for name, value in arrays._asdict().items()}


def _arrays(lists: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float64) for name, value in lists.items()}


def _past(content: Sequence[Any]) -> Past:
    index, step, group, run, moved, change = content
    arrays = (np.array(part, np.float64) for part in (group, run, moved))
    return Past(int(index), int(step), *arrays, validation_change=float(change))
