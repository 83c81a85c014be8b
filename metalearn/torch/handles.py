"""Hyperparameters that a loop has beyond its optimizer's: one small object each, which reads and writes the value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from metalearn.errors import InvalidArgumentError
from metalearn.spaces import CANONICAL_SPACE, Hyperparameter
from metalearn.torch.batching import ResizableBatchSampler


class Handle(ABC):
    """Reads and writes one hyperparameter of a loop; a list of them is `bindings` of a `MetaScheduler`.

    `hyperparameter` says name, bounds and scope. Values that reach `write` have been checked. Of scope `group`, values
    are lists with one for each parameter group.
    """

    hyperparameter: Hyperparameter
    acts_on_gradients: ClassVar[bool] = False
    """Whether `before_step` is to be called."""

    @abstractmethod
    def read(self) -> Any:
        """Returns the value, the one from the next step on if it waits for that."""

    @abstractmethod
    def write(self, value: Any) -> None:
        """Sets the value; between two steps."""

    def masks(self) -> Mapping[str, str]:
        """Returns what cannot be set, and why: the name for all of it, "name=value" for one choice."""
        return {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 (optional)
        """Gets to know the optimizer; called once, when the MetaScheduler is made."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 (optional)
        """Acts on the gradients of a step that is about to be taken."""

    def release(self) -> None:  # noqa: B027 (optional)
        """Puts back what it has changed beside the value; called by `detach`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what is to be kept beside the value; plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (optional)
        """Inverts `state_dict`; the value has been written by then."""


class Custom(Handle):
    """Any hyperparameter of a loop, by two functions: the number of negatives, a margin, a temperature.

    Args:
      hyperparameter: a `Hyperparameter` of one's own, of scope `global`, or one of the canonical space by its name. If
        the getter returns an int, values are whole numbers.
      getter: returns the value.
      setter: takes a value within the bounds; what it raises leaves the value as it was.

    Raises:
      InvalidArgumentError: there is no such canonical hyperparameter, it is not global, or it is fixed once training
        begins.

    Example:
      >>> loop = {"num_negatives": 4}
      >>> negatives = Custom("num_negatives", lambda: loop["num_negatives"], lambda n: loop.update(num_negatives=n))
      >>> negatives.write(16)
      >>> loop["num_negatives"], negatives.hyperparameter.high
      (16, 1024)
    """

    def __init__(
        self, hyperparameter: Hyperparameter | str, getter: Callable[[], Any], setter: Callable[[Any], object]
    ) -> None:
        known = CANONICAL_SPACE[hyperparameter] if isinstance(hyperparameter, str) else hyperparameter
        for field, needed, remedy in (
            ("scope", "global", "values of a parameter group are the optimizer's"),
            ("when", "run", "it is fixed once training begins"),
        ):
            if getattr(known, field) != needed:
                raise InvalidArgumentError(
                    f"`{field}` of {known.name} must be {needed!r}, got {getattr(known, field)!r}; {remedy}"
                )
        self.hyperparameter = known
        self._getter, self._setter = getter, setter

    def read(self) -> Any:
        """Returns what the getter does."""
        return self._getter()

    def write(self, value: Any) -> None:
        """Calls the setter."""
        self._setter(value)


class BatchSize(Handle):
    """Samples per batch of this process, by a sampler whose size may change.

    The position in the data is not part of it: put the sampler among `tracked` for rollbacks, and save it with the
    checkpoint.

    Args:
      sampler: that the loader draws from.
    """

    hyperparameter = CANONICAL_SPACE["batch_size"]

    def __init__(self, sampler: ResizableBatchSampler) -> None:
        self._sampler = sampler

    def read(self) -> int:
        """Returns the size of the next batch that is drawn."""
        return self._sampler.batch_size

    def write(self, value: int) -> None:
        """Sets it."""
        self._sampler.batch_size = value


def checked(hyperparameter: Hyperparameter, value: Any, *, whole: bool = False, label: str | None = None) -> Any:
    """Returns a value as a plain Python one.

    Args:
      hyperparameter: whose bounds or choices it must keep to.
      value: of a user.
      whole: whether it must be a whole number.
      label: what the message calls it; by default its name.

    Raises:
      InvalidArgumentError: it is of another type, not finite, or out of bounds.

    >>> checked(CANONICAL_SPACE["batch_size"], np.int64(512), whole=True)
    512
    """
    label = label or hyperparameter.name
    value = value.item() if isinstance(value, np.generic) else value
    if hyperparameter.scale == "choice":
        for choice in hyperparameter.choices:
            if type(choice) is type(value) and choice == value:
                return choice
        raise InvalidArgumentError(f"`{label}` must be one of {hyperparameter.choices}, got {value!r}")
    low, high = hyperparameter.low, hyperparameter.high
    of_kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not of_kind or not low <= value <= high:  # which NaN is not
        named = "a whole number" if whole else "a number"
        raise InvalidArgumentError(f"`{label}` must be {named} in [{low:g}, {high:g}], got {value!r}")
    return int(value) if whole else float(value)
