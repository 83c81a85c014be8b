"""The session: ask and tell. One stateful shell over features, policy and guard; all the maths is elsewhere.

Shape legend: G parameter group, A controlled group hyperparameter, B controlled global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from metalearn.controller.actions import (
    Position,
    confidence,
    move,
    relative_residual,
    schedule_multiplier,
    start_position,
    trust_region,
    values,
)
from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED, ROLES
from metalearn.controller.decision import Decision, Improvement
from metalearn.controller.observation import budget_descriptors, profile_descriptors
from metalearn.controller.outcome import Situation, outcome_inputs
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.safety import Proposal, judge
from metalearn.signals import (
    GLOBAL_FEATURES,
    GROUP_FEATURES,
    GROUP_STATISTICS,
    Controls,
    IntervalStatistics,
    SignalFeatures,
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

STATE_VERSION = 3
DEFAULT_INTERVAL = 100
"""Steps between decisions when neither the horizon nor the length of an epoch is known."""
MIN_INTERVAL = 2
"""A probe takes two successive steps."""


def decision_interval(num_decisions: int, horizon: int | None, steps_per_epoch: float | None) -> int:
    """Returns the default number of optimizer steps between decisions.

    The horizon over the number of decisions; without a horizon half an epoch, within 10 to 1000 steps.

    >>> decision_interval(20, 10_000, None), decision_interval(20, None, 300.0), decision_interval(20, None, None)
    (500, 150, 100)
    """
    if horizon is not None:
        return max(MIN_INTERVAL, math.ceil(horizon / num_decisions))
    if steps_per_epoch is None:
        return DEFAULT_INTERVAL
    return round(min(max(steps_per_epoch / 2, 10), 1000))


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
    ) -> None:
        _check(roles, horizon, batch_size, interval, initial, withheld)
        # NumPy's integers are welcome, but a state_dict holds plain ones.
        horizon, batch_size, interval = (None if n is None else int(n) for n in (horizon, batch_size, interval))
        self._controller, self._config = controller, controller.config
        self._roles = np.array([ROLES.index(role) for role in roles])
        self._fingerprint = profile.fingerprint
        self.family, self._family = family, controller.config.family_index(family)
        self.horizon, self.batch_size = horizon, batch_size
        epoch = profile.num_interactions / batch_size if batch_size else None
        self.interval = interval or decision_interval(self._config.num_decisions, horizon, epoch)
        self._epoch = math.nan if epoch is None else epoch
        kept = withheld if withheld is not None else [()] * len(roles)
        self._bound = (
            np.array([[name in space and name not in names for name in GROUP_CONTROLLED] for names in kept]),
            np.array([name in space for name in GLOBAL_CONTROLLED]),
        )
        """[G, A] and [B]: what may be changed"""

        normalizer = controller.checkpoint.normalizer
        budget = budget_descriptors(
            np.float64(math.nan if horizon is None else horizon / self._epoch),
            np.float64(math.nan if batch_size is None else batch_size),
            np.float64(profile.num_users),
            np.float64(profile.num_items),
            np,
        )
        raw = np.concatenate([profile_descriptors(profile), budget])
        self._descriptors = percentile_scale(raw, normalizer.descriptors.astype(np.float64), np)
        self._code = controller.network.code(self._descriptors, self._family)
        self._base = controller.checkpoint.base[self._family, int(horizon is not None)].astype(np.float64)
        self._knots = normalizer.group.astype(np.float64), normalizer.run.astype(np.float64)
        self._trust = float(confidence(out_of_range(self._descriptors, np), np))
        self._history = initial_history(len(roles), np, np.float64)
        self._hidden = np.zeros((len(roles), controller.network.hidden_size))
        self._steps = 0
        self._position = self._start(initial)
        self._frame = self._guard_frame()
        self._decision = self._first_decision(initial)

    @property
    def num_groups(self) -> int:
        """Parameter groups that it decides for."""
        return len(self._roles)

    @property
    def confidence(self) -> float:
        """Share of its reach that the controller uses on this domain: 1 in the meta-training range, 0 far outside."""
        return self._trust

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
          InvalidArgumentError: the statistics are for another number of groups, or of no step.
        """
        statistics = IntervalStatistics(*(np.asarray(value, np.float64) for value in statistics))
        for name, value in zip(statistics._fields, statistics, strict=True):
            shape = (self.num_groups,) if name in GROUP_STATISTICS else ()
            if value.shape != shape:
                what = "one value for each group" if shape else "a number"
                raise InvalidArgumentError(f"`statistics.{name}` must have shape {shape}, {what}, got {value.shape}")
        if not 0 < statistics.steps < math.inf:
            raise InvalidArgumentError(
                f"`statistics.steps` must be positive, got {statistics.steps}; tell after training"
            )
        self._steps += int(statistics.steps)
        # Arithmetic on NaN ("not measured") and on a diverged run's infinities is meant; the scaling drops the results.
        with np.errstate(all="ignore"):
            features, self._history = featurize(statistics, self._controls(), self._history, np)
            group = percentile_scale(features.group, self._knots[0], np)
            run = percentile_scale(features.run, self._knots[1], np)
        policy_hidden = self._hidden
        group_action, run_action, self._hidden = self._controller.network.act(
            policy_hidden, group, run, self._code, self._roles
        )
        wanted = move(
            self._position,
            group_action * self._bound[0],
            run_action * self._bound[1],
            self._trust,
            self._config,
            np,
        )
        verdict = judge(self._proposal(wanted, float(statistics.nonfinite)))
        before, since_best = self._decision, int(self._history.since_best)
        held, self._position = self._position, self._placed(verdict.values)
        foresee = self._forecast(self._position, held, (group, run))

        def explain() -> tuple[str, ...]:
            changes = _changes(before, decision)
            influences = self._influences(policy_hidden, group, run, group_action)
            return (*verdict.reasons, *changes, *_situation(features, since_best), *influences)

        status = "fallback" if self._trust == 0.0 and verdict.status == "applied" else verdict.status
        self._decision = decision = self._decide(before.index + 1, status, explain, foresee)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that later decisions depend on, as plain numbers, strings, lists and dicts."""
        return {
            **self._arguments(),
            "steps": self._steps,
            "position": {name: value.tolist() for name, value in self._position._asdict().items()},
            "history": {name: value.tolist() for name, value in self._history._asdict().items()},
            "hidden": self._hidden.tolist(),
            "decision": self._decision.as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; this session must have been started with the same arguments.

        Raises:
          SessionError: the state is of another version, or of a session with other arguments; the message names which.
        """
        for name, mine in self._arguments().items():
            if state.get(name) != mine:
                raise SessionError(
                    f"state_dict has {name}={state.get(name)!r}, this session {mine!r}; "
                    "start it with the arguments of the saved run"
                )
        self._steps = int(state["steps"])
        self._position = Position(**{k: np.array(v, np.float64) for k, v in state["position"].items()})
        self._frame = self._guard_frame()
        self._history = SignalHistory(**{k: np.array(v, np.float64) for k, v in state["history"].items()})
        self._values = values(self._position, self._config, np)
        self._hidden = np.array(state["hidden"], np.float64)
        self._decision = Decision.from_dict(state["decision"])

    def _arguments(self) -> dict[str, Any]:
        """Returns what a session must have in common with one whose state it takes over."""
        return {
            "version": STATE_VERSION,
            "controller": self._controller.fingerprint,
            "num_groups": self.num_groups,
            "roles": [ROLES[role] for role in self._roles],
            "family": self.family,
            "horizon": self.horizon,
            "batch_size": self.batch_size,
            "interval": self.interval,
            "hyperparameters": [[*_chosen(GROUP_CONTROLLED, row)] for row in self._bound[0]]
            + [[*_chosen(GLOBAL_CONTROLLED, self._bound[1])]],
            "domain": self._fingerprint,
        }

    def _start(self, initial: Sequence[Mapping[str, float]] | None) -> Position:
        gate, modifier = self._controller.network.start(self._code)
        position = start_position(self._base, gate, np.tanh(modifier), self._trust, self._config, self.num_groups, np)
        if initial is None:
            return position
        start = np.array(position.group_start)
        for index, given in enumerate(initial):
            for column, name in enumerate(GROUP_CONTROLLED):
                if name in given:
                    start[index, column] = self._config.space[name].encode(given[name])
        return position._replace(group_start=start)

    def _first_decision(self, initial: Sequence[Mapping[str, float]] | None) -> Decision:
        if initial is not None:
            reason = "start: the optimizer's own values, since the controller's prior is for AdamW"
        elif self._trust == 0.0:
            reason = "start: base configuration, since the domain lies outside the meta-training range"
        else:
            reason = f"start: base configuration shifted for this domain, at confidence {self._trust:.2f}"
        status = "fallback" if self._trust == 0.0 else "applied"
        split = len(GROUP_CONTROLLED)
        at_base = self._position._replace(
            group_start=np.tile(self._base[:split], (self.num_groups, 1)), global_start=self._base[split:]
        )
        return self._decide(0, status, lambda: (reason,), self._forecast(self._position, at_base, None))

    def _forecast(
        self, chosen: Position, otherwise: Position, signals: tuple[np.ndarray, np.ndarray] | None
    ) -> Callable[[], Improvement | None]:
        """Returns what works out the expected improvement of one position over another, when somebody asks."""
        model = self._controller.outcome
        if model is None:
            return lambda: None
        in_group, in_run = (np.where(bound, 1.0, math.nan) for bound in self._bound)

        def inputs(position: Position) -> np.ndarray:
            group, run = signals or (np.zeros((self.num_groups, len(GROUP_FEATURES))), np.zeros(len(GLOBAL_FEATURES)))
            situation = Situation(
                descriptors=self._descriptors,
                family=self._family,
                horizon_known=self.horizon is not None,
                base=self._base,
                position=Position(
                    position.group_start * in_group,
                    position.global_start * in_run,
                    position.group_residual * in_group,
                    position.global_residual * in_run,
                ),
                group_mask=np.ones(self.num_groups),
                curve_known=signals is not None,
                group=group,
                run=run,
                validation=math.nan,
            )
            return outcome_inputs(situation, self._config, np)

        def foresee() -> Improvement:
            change = model.improvement(inputs(chosen), inputs(otherwise))
            expected, low, high = (math.expm1(float(value)) for value in (change.mean, *change.interval(0.9)))
            return Improvement(expected, low, high, float(change.probability_above(0.0)))

        return foresee

    def _decide(
        self,
        index: int,
        status: str,
        explain: Callable[[], tuple[str, ...]],
        foresee: Callable[[], Improvement | None],
    ) -> Decision:
        self._values = decoded = values(self._position, self._config, np)
        return Decision(
            index=index,
            step=self._steps,
            status=status,  # type: ignore[arg-type]
            groups=tuple(
                {name: float(getattr(decoded, name)[g]) for name in _chosen(GROUP_CONTROLLED, self._bound[0][g])}
                for g in range(self.num_groups)
            ),
            run={name: float(getattr(decoded, name)) for name in _chosen(GLOBAL_CONTROLLED, self._bound[1])},
            schedule=self.multiplier(self._steps),
            confidence=self._trust,
            explain=explain,
            foresee=foresee,
        )

    def _controls(self) -> Controls:
        """What was in force during the interval that ended just now; NaN for what is not ours to set."""
        group_residual, run_residual = relative_residual(self._position, self._config, np)
        in_group, in_run = (np.where(bound, 1.0, math.nan) for bound in self._bound)
        return Controls(
            learning_rate=self._values.learning_rate * self.multiplier(self._steps - 1) * in_group[:, 0],
            weight_decay=self._values.weight_decay * in_group[:, 1],
            group_residual=group_residual * in_group,
            dropout=np.float64(self._values.dropout) * in_run[0],
            dropout_residual=run_residual[0] * in_run[0],
            progress=np.float64(math.nan if self.horizon is None else self._steps / self.horizon),
            epochs=np.float64(self._steps / self._epoch),
        )

    def _proposal(self, wanted: Position, nonfinite_steps: float) -> Proposal:
        position = self._position
        return replace(
            self._frame,
            current=_flat(
                position.group_start + position.group_residual, position.global_start + position.global_residual
            ),
            proposed=_flat(wanted.group_start + wanted.group_residual, wanted.global_start + wanted.global_residual),
            nonfinite_steps=nonfinite_steps,
        )

    def _guard_frame(self) -> Proposal:
        """What of a proposal never changes in a run."""
        split = len(GROUP_CONTROLLED)

        def spread(values: np.ndarray) -> np.ndarray:
            return _flat(np.tile(values[:split], (self.num_groups, 1)), values[split:])

        low, high = trust_region(self._config, np, np.float64)
        start = _flat(self._position.group_start, self._position.global_start)
        return Proposal(
            labels=tuple(f"{n}[{g}]" for g in range(self.num_groups) for n in GROUP_CONTROLLED) + GLOBAL_CONTROLLED,
            current=start,
            proposed=start,
            start=start,
            low=spread(low),
            high=spread(high),
            max_step=spread(np.array([h.max_step for h in self._config.space])),
            nonfinite_steps=0.0,
        )

    def _placed(self, flat: np.ndarray) -> Position:
        split = self.num_groups * len(GROUP_CONTROLLED)
        group = flat[:split].reshape(self.num_groups, -1)
        return self._position._replace(
            group_residual=group - self._position.group_start,
            global_residual=flat[split:] - self._position.global_start,
        )

    def _influences(
        self, hidden: np.ndarray, group: np.ndarray, run: np.ndarray, action: np.ndarray, count: int = 2
    ) -> tuple[str, ...]:
        """Names the features that moved the learning rate most, each set to its median in turn (occlusion)."""
        if self._trust == 0.0 or not self._bound[0][:, 0].any():
            return ()
        columns, run_columns = np.flatnonzero(group.any(0)), np.flatnonzero(run)
        split, count_all = len(columns), len(columns) + len(run_columns)
        groups, runs = np.repeat(group[None], count_all, 0), np.repeat(run[None], count_all, 0)
        groups[np.arange(split), :, columns] = 0.0
        runs[np.arange(split, count_all), run_columns] = 0.0
        occluded, _, _ = self._controller.network.act(hidden, groups, runs, self._code, self._roles)
        moved = (np.tanh(action[:, 0]) - np.tanh(occluded[..., 0])).mean(1).tolist()
        names = [GROUP_FEATURES[i] for i in columns] + [GLOBAL_FEATURES[i] for i in run_columns]
        effect = dict(zip(names, moved, strict=True))
        top = [
            name for name in sorted(effect, key=lambda name: -abs(effect[name]))[:count] if abs(effect[name]) >= 0.005
        ]
        return tuple(f"{name} moved the learning rate's step by {effect[name]:+.2f} of the largest" for name in top)


def _chosen(names: Sequence[str], mask: np.ndarray) -> list[str]:
    """Returns the names that a mask lets through."""
    return [name for name, on in zip(names, mask.tolist(), strict=True) if on]


def _flat(group: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Joins [G, A] and [B] values to [V]."""
    return np.concatenate([group.ravel(), run])


def _situation(features: SignalFeatures, since_best: int) -> tuple[str, ...]:
    """States what validation did."""
    run = dict(zip(GLOBAL_FEATURES, features.run.tolist(), strict=True))
    if run["validation_missing"] > 0:
        return ("validation: not reported for this interval",)
    if since_best == 0:
        return ("validation: best so far",)
    below, plural = -100 * run["validation_below_best"], "s" * (since_best > 1)
    return (f"validation: {below:.1f} % below the best, of {since_best} decision{plural} ago",)


def _changes(before: Decision, after: Decision) -> tuple[str, ...]:
    """Says what changed, in words."""
    sentences = []
    rows = [(f" of group {g}", old, new) for g, (old, new) in enumerate(zip(before.groups, after.groups, strict=True))]
    for suffix, old, new in (*rows, ("", before.run, after.run)):
        for name, value in new.items():
            if abs(value - old[name]) > 1e-3 * max(abs(old[name]), 1e-3):
                sentences.append(f"{name}{suffix}: {old[name]:.4g} -> {value:.4g}")
    return tuple(sentences) or ("no change",)


def _check(
    roles: Sequence[str],
    horizon: int | None,
    batch_size: int | None,
    interval: int | None,
    initial: Sequence[Mapping[str, float]] | None,
    withheld: Sequence[Collection[str]] | None,
) -> None:
    """Refuses bad arguments by name."""
    if not roles:
        raise InvalidArgumentError("`roles` is empty; name the role of each parameter group")
    for role in roles:
        if role not in ROLES:
            raise InvalidArgumentError(f"`roles` must be among {ROLES}, got {role!r}")
    for name, rows in (("initial", initial), ("withheld", withheld)):
        if rows is not None and len(rows) != len(roles):
            raise InvalidArgumentError(f"`{name}` must have one entry for each of {len(roles)} groups, got {len(rows)}")
    for name, value, least, what in (
        ("horizon", horizon, MIN_INTERVAL, "the optimizer steps of the whole run, or None if unknown"),
        ("batch_size", batch_size, 1, "the training samples of one step, or None if unknown"),
        ("interval", interval, MIN_INTERVAL, "the optimizer steps between decisions, or None for the default"),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise InvalidArgumentError(f"`{name}` must be an int of at least {least}, got {value!r}; pass {what}")
