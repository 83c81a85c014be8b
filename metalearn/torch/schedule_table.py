"""The base schedule's factors, computed many steps at once."""

from __future__ import annotations

from collections.abc import Callable

TABLE_STEPS = 256
"""Steps whose factors are computed at once."""


class ScheduleTable:
    """Looks up factors on the learning rate.

    Args:
      multipliers: returns those of a number of steps from a first one on.
    """

    def __init__(self, multipliers: Callable[[int, int], list[float]]) -> None:
        self._multipliers = multipliers
        self._table: list[float] = []
        self._first = -1

    def from_step(self, step: int, count: int) -> list[float]:
        """Returns the factors of a step and of up to `count` - 1 after it."""
        row = step % TABLE_STEPS  # the same tables whenever a run was resumed: NumPy may round by place in the array
        if self._first != step - row:
            self._first = step - row
            self._table = self._multipliers(self._first, TABLE_STEPS)
        return self._table[row : row + count]
