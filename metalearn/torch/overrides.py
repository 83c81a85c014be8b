"""Values that somebody set instead of the controller, and those that no controller sets: checked, kept, given back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metalearn.controller.config import CONTROLLED
from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.spaces import CANONICAL_SPACE, Hyperparameter
from metalearn.torch.bindings import Bindings
from metalearn.torch.closures import on_gradients
from metalearn.torch.effective_batch import RateRule, rate_factor, rate_rule
from metalearn.torch.handles import Handle, checked

_RATE = CANONICAL_SPACE["learning_rate"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an override changed, by label: a name, or "name[group]" where there are several parameter groups.

    Args:
      before, after: values; None stands for the controller's own.
      rate_factors: per parameter group, what the controller's learning rates are now multiplied by for the batch.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    rate_factors: tuple[float, ...]

    def __str__(self) -> str:
        parts = [f"{label}: {_shown(self.before[label])} to {_shown(value)}" for label, value in self.after.items()]
        if any(factor != 1.0 for factor in self.rate_factors):
            factors = ", ".join(f"{factor:.3g}" for factor in self.rate_factors)
            parts.append(f"for the batch the controller's learning rates are taken times {factors}")
        return "; ".join(parts)


class Overrides:
    """Keeps what was overridden of a run's hyperparameters.

    Args:
      handles: of hyperparameters beyond the optimizer's.
      bindings: of those that the controller acts on.
      roles: of the parameter groups.
      optimizer: of the run.

    Raises:
      InvalidArgumentError: a handle is none, or two have one name, or that of a controlled hyperparameter.
    """

    def __init__(
        self, handles: Sequence[Handle], bindings: Bindings, *, roles: Sequence[str], optimizer: torch.optim.Optimizer
    ) -> None:
        self._handles = _by_name(handles)
        self._roles = tuple(roles)
        self._rule: RateRule = rate_rule(optimizer)
        for handle in self._handles.values():
            handle.attach(optimizer)
        self.masked: dict[str, str] = dict(bindings.masked)
        """what cannot be changed, by label or "name=value", and why"""
        for handle in self._handles.values():
            self.masked |= handle.masks()
        self._targets: dict[str, tuple[Hyperparameter, int]] = {}
        """what may be overridden, by label, and of which parameter group it is"""
        for known in (*bindings.space, *(handle.hyperparameter for handle in self._handles.values())):
            for group in range(len(self._roles) if known.scope == "group" else 1):
                if known.scope == "global" or known.name not in bindings.withheld[group]:
                    self._targets[self._label(known, group)] = known, group
        self._found: dict[str, Any] = {}
        """of what is overridden, by label, the value before; None for the controller's own"""
        self._pinned: dict[str, Any] = {}
        """of that, values of what the controller acts on"""
        self._batch_at_start = self._batch() if "batch_size" in self._handles else None
        # A frozen group's gradients have to be gone before the norm of the others is taken.
        acting = [handle for handle in self._handles.values() if handle.acts_on_gradients]
        self._acting = sorted(acting, key=lambda handle: handle.hyperparameter.scope != "group")
        self._before_compiled_step: Any = torch.compiler.disable(self._before_step)
        self._hook: Any = None

    @property
    def values(self) -> dict[str, Any]:
        """What is overridden, by label."""
        return {label: self._current(label) for label in self._found}

    @property
    def growth(self) -> float:
        """Samples of this process for an optimizer step, relative to when the run began; 1 if no handle tells them."""
        start = self._batch_at_start
        return 1.0 if start is None else self._batch() / start

    @property
    def rate_factors(self) -> tuple[float, ...]:
        """Per parameter group, what the controller's learning rates are multiplied by: see `rate_factor`."""
        return tuple(rate_factor(self.growth, role=role, rule=self._rule) for role in self._roles)

    def samples_per_step(self, told: int | None) -> int | None:
        """Returns the samples of an optimizer step.

        Args:
          told: what the run was said to take at its beginning; None if nothing, and then those of this process count.
        """
        if self._batch_at_start is None:
            return told
        return self._batch() if told is None else round(told * self.growth)

    def impose(self, values: Mapping[str, Any]) -> Change:
        """Sets values, all of them or none.

        Args:
          values: by name, which sets every parameter group's, or by "name[group]".

        Raises:
          InvalidArgumentError: a name is unknown or masked, or a value not allowed.
        """
        if not isinstance(values, Mapping) or not values:
            raise InvalidArgumentError(f"`values` must be a mapping with at least one name, got {values!r}")
        wanted: dict[str, Any] = {}
        for key, value in values.items():
            for label in self._labels(key):
                known, _ = self._targets[label]
                whole = label not in self._pinnable and type(self._current(label)) is int
                plain = checked(known, value, whole=whole, label=key)
                if (reason := self.masked.get(f"{known.name}={plain}")) is not None:
                    raise InvalidArgumentError(f"`{key}` cannot be {plain!r}: {reason}")
                wanted[label] = plain
        before = self._apply(wanted)
        self._found = {**before, **self._found}
        return Change(before=before, after=wanted, rate_factors=self.rate_factors)

    def release(self, names: Iterable[str]) -> Change:
        """Gives hyperparameters back: to the controller, or the value that they had before.

        Args:
          names: as in `impose`; none stand for all that are overridden.

        Raises:
          InvalidArgumentError: of a name nothing is overridden.
        """
        wanted: dict[str, Any] = {}
        for name in list(names) or list(self._found):
            found = {label: self._found[label] for label in self._labels(name) if label in self._found}
            if not found:
                raise InvalidArgumentError(f"`{name}` is not overridden; overridden are {sorted(self._found)}")
            wanted |= found
        before = self._apply(wanted)
        self._found = {label: value for label, value in self._found.items() if label not in wanted}
        return Change(before=before, after=wanted, rate_factors=self.rate_factors)

    def undone_since(self, values: Mapping[str, Any]) -> Change | None:
        """Returns how what is overridden differs from what was; None if it does not."""
        now = self.values
        labels = [label for label in {**values, **now} if values.get(label) != now.get(label)]
        before, after = ({label: part.get(label) for label in labels} for part in (values, now))
        return Change(before=before, after=after, rate_factors=self.rate_factors) if labels else None

    def in_force(self, decision: Decision) -> Decision:
        """Returns a decision with what is overridden in it; what the controller would have is then `proposed`."""
        if not self._pinned:
            return decision
        groups, run = [dict(row) for row in decision.groups], dict(decision.run)
        for label, value in self._pinned.items():
            known, group = self._targets[label]
            (run if known.scope == "global" else groups[group])[known.name] = value
        if decision.proposed is not None and groups == list(map(dict, decision.groups)) and run == dict(decision.run):
            return decision  # of another rank, or another call
        told = "overridden: " + ", ".join(f"{label} = {value:.4g}" for label, value in self._pinned.items())
        return replace(
            decision,
            groups=tuple(groups),
            run=run,
            proposed=decision.intended,
            reasons_fn=lambda: (told, *decision.reasons),
            improvement_fn=lambda: decision.improvement,
            explanation_fn=decision.explain,
        )

    def scaled(self, groups: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Returns a decision's groups with the controller's learning rates, not those overridden, times their factor.

        Args:
          groups: of `in_force`.
        """
        scaled = [dict(row) for row in groups]
        for group, (row, factor) in enumerate(zip(scaled, self.rate_factors, strict=True)):
            if factor != 1.0 and _RATE.name in row and self._label(_RATE, group) not in self._pinned:
                row[_RATE.name] = min(max(row[_RATE.name] * factor, _RATE.low), _RATE.high)
        return scaled

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Has handles act on gradients from now on; before the controller's signals are taken of them."""
        if self._acting:
            self._hook = optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Gives everything back, and lets go of the optimizer."""
        self._apply(self._found)
        self._found = {}
        for handle in self._handles.values():
            handle.release()
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Returns what is overridden, and every handle's value and state."""
        return {
            "found": dict(self._found),
            "pinned": dict(self._pinned),
            "batch_at_start": self._batch_at_start,
            "handles": {
                name: {"value": handle.read(), "state": handle.state_dict()} for name, handle in self._handles.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverts `state_dict`; a handle that the state knows nothing of stays as it is.

        Raises:
          SessionError: the state holds a hyperparameter that `bindings` does not.
        """
        missing = {*state["handles"]} - {*self._handles} | {*state["pinned"]} - {*self._targets}
        if missing:
            raise SessionError(
                f"state_dict holds values of {sorted(missing)}, which this run does not bind; make the MetaScheduler "
                "with the `bindings` of the saved run"
            )
        self._found, self._pinned = dict(state["found"]), dict(state["pinned"])
        self._batch_at_start = state["batch_at_start"]
        for name, held in state["handles"].items():
            self._handles[name].write(held["value"])
            self._handles[name].load_state_dict(held["state"])

    @property
    def _pinnable(self) -> set[str]:
        return {label for label, (known, _) in self._targets.items() if known.name not in self._handles}

    def _batch(self) -> int:
        names = [name for name in ("batch_size", "accumulation") if name in self._handles]
        return math.prod(int(self._handles[name].read()) for name in names)

    def _label(self, known: Hyperparameter, group: int) -> str:
        return f"{known.name}[{group}]" if known.scope == "group" and len(self._roles) > 1 else known.name

    def _labels(self, key: str) -> list[str]:
        """Returns the labels that a user's key stands for.

        Raises:
          InvalidArgumentError: there are none; the message says why.
        """
        if key in self._targets:
            return [key]
        alone = "[0]" if len(self._roles) == 1 else None
        labels = [label for label, (known, _) in self._targets.items() if key in (known.name, f"{known.name}{alone}")]
        if labels:
            return labels
        name = str(key).split("[")[0]
        reason = self.masked.get(key, self.masked.get(name))
        if reason is not None:
            raise InvalidArgumentError(f"`{key}` cannot be changed: {reason}")
        if name in CANONICAL_SPACE and not any(known.name == name for known, _ in self._targets.values()):
            remedy = "it is fixed once training begins" if CANONICAL_SPACE[name].when == "start" else "pass its handle"
            raise InvalidArgumentError(f"`{key}` is not bound to this run; {remedy} in `bindings` of the MetaScheduler")
        raise InvalidArgumentError(f"`{key}` is unknown; what can be overridden is {list(self._targets)}")

    def _current(self, label: str) -> Any:
        """Returns the value that is overridden, or of a handle; None where the controller's own is in force."""
        known, group = self._targets[label]
        if known.name not in self._handles:
            return self._pinned.get(label)
        value = self._handles[known.name].read()
        return value[group] if known.scope == "group" else value

    def _apply(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Puts values in place, all or none; returns those before."""
        before = {label: self._current(label) for label in wanted}
        writes: dict[str, Any] = {}
        for label, value in wanted.items():
            known, group = self._targets[label]
            if known.name not in self._handles:
                continue
            if known.scope == "group":
                writes.setdefault(known.name, list(self._handles[known.name].read()))[group] = value
            else:
                writes[known.name] = value
        held = {name: self._handles[name].read() for name in writes}
        written: list[str] = []
        try:
            for name, value in writes.items():
                written.append(name)
                self._handles[name].write(value)
        except Exception:
            for name in reversed(written):
                self._handles[name].write(held[name])
            raise
        pins = {label: wanted[label] for label in wanted if label in self._pinnable}
        self._pinned = {label: value for label, value in {**self._pinned, **pins}.items() if value is not None}
        return before

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> Any:
        """Is a step pre-hook: has the handles act on the gradients."""
        if torch.compiler.is_compiling():  # by its full name: functions that do not name torch are not compiled
            return self._before_compiled_step(optimizer, arguments, keywords)

        def act() -> None:
            for handle in self._acting:
                handle.before_step(optimizer)

        return on_gradients(act, arguments, keywords, every=True)


def _by_name(handles: Sequence[Handle]) -> dict[str, Handle]:
    named: dict[str, Handle] = {}
    for index, handle in enumerate(handles):
        if not isinstance(handle, Handle):
            raise InvalidArgumentError(
                f"`bindings[{index}]` must be a Handle, got {type(handle).__name__}; wrap a getter and a setter in "
                "metalearn.torch.Custom"
            )
        name = handle.hyperparameter.name
        if name in named or name in CONTROLLED:
            owner = "the optimizer's and the model's already" if name in CONTROLLED else "there twice"
            raise InvalidArgumentError(f"`bindings[{index}]` is of {name}, which is {owner}; leave it out")
        named[name] = handle
    return named


def _shown(value: Any) -> str:
    if value is None:
        return "the controller's own"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
