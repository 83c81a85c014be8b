"""Keeps one run to its constraints: what the guard is told, and which batch size is set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metalearn.errors import InvalidArgumentError
from metalearn.safety.constraints import (
    STEP,
    Breach,
    Constraints,
    Relief,
    ReliefState,
    Usage,
    breaches,
    relieve,
    worsening,
)
from metalearn.torch.handles import Handle


class Constraining:
    """Judges intervals by a run's constraints.

    Args:
      constraints: None watches nothing.
      handles: of the run; the batch size's is what it can act with.
      batch_size: samples per step that the run was said to take; None if nobody said.

    Raises:
      InvalidArgumentError: the constraints are something else, or nobody can tell samples per second.
    """

    def __init__(self, constraints: Constraints | None, handles: Sequence[Handle], *, batch_size: int | None) -> None:
        if constraints is not None and not isinstance(constraints, Constraints):
            raise InvalidArgumentError(
                f"`constraints` must be Constraints or None, got {type(constraints).__name__}; pass "
                "Constraints(min_samples_per_second=...)"
            )
        self._constraints = constraints or Constraints()
        self._batch_size = next((handle for handle in handles if handle.hyperparameter.name == "batch_size"), None)
        if self._constraints.min_samples_per_second is not None and self._batch_size is None and batch_size is None:
            raise InvalidArgumentError(
                "`batch_size` is None, so that `min_samples_per_second` cannot be judged; pass the samples of a step"
            )
        self._state = ReliefState()
        self._found: tuple[Breach, ...] = ()
        self.usage = Usage()
        """Of the last interval."""
        self.relief = Relief(None, False, ())
        """What is to be done after it."""

    def judge(self, usage: Usage, *, acts: bool) -> None:
        """Takes in what an interval took.

        Args:
          usage: of the interval, of all processes.
          acts: whether the batch size may be set.
        """
        self.usage = usage
        self._found = breaches(self._constraints, usage)
        if not self._found:
            self.relief, self._state = Relief(None, False, ()), self._state._replace(tried=None)
            return
        size = int(self._batch_size.read()) if acts and self._batch_size is not None else None
        self.relief, state = relieve(self._constraints, self._found, usage, self._state, size)
        wanted = self.relief.batch_size
        known = None if self._batch_size is None else self._batch_size.hyperparameter
        if wanted is None or known is None or known.low <= wanted <= known.high:
            self._state = state
            return
        told = f"a batch size of {wanted} lies outside [{known.low:g}, {known.high:g}]"
        self.relief = Relief(None, True, (*(breach.sentence for breach in self._found), told))

    def ran_out_of_memory(self) -> None:
        """Takes note that a step did: no batch as large as the one in force is tried again."""
        if self._batch_size is not None:
            smaller = max(int(self._batch_size.read()) // STEP, 1)
            self._state = self._state._replace(ceiling=min(smaller, self._state.ceiling or smaller), tried=None)

    @property
    def too_large(self) -> int | None:
        """Size to be set in place of one that is too large, as a snapshot may hold it; None leaves it."""
        handle, most = self._batch_size, self._state.ceiling
        if handle is None or most is None or not self._constraints.any or most < handle.hyperparameter.low:
            return None
        return most if handle.read() > most else None

    @property
    def unkept(self) -> tuple[str, ...]:
        """Sentences on what is violated, if nothing is left to be done about it."""
        return self.relief.sentences if self.relief.exhausted else ()

    @property
    def barred(self) -> Mapping[str, int]:
        """Hyperparameter to the direction in which the controller must not move it, see `worsening`."""
        return worsening(self._found)

    @property
    def report(self) -> tuple[str, ...]:
        """Sentences for the decision: what is violated, and what is done about it."""
        return tuple(f"constraint: {sentence}" for sentence in self.relief.sentences)

    def measured(self) -> dict[str, float]:
        """Returns what a decision is logged with."""
        return {name: value for name, value in self.usage._asdict().items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Returns what is known of batch sizes, as plain values."""
        state = self._state._asdict()
        return {**state, "tried": None if self._state.tried is None else list(self._state.tried)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverts `state_dict`; what was found of the interval before is dropped."""
        tried = state["tried"]
        self._state = ReliefState(**{**state, "tried": None if tried is None else (int(tried[0]), float(tried[1]))})
        self._found, self.relief = (), Relief(None, False, ())
