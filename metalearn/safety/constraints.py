"""What a training run must keep to, and what is done so that it does: pure rules over one interval's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from metalearn.errors import InvalidArgumentError

MARGIN = 0.05
"""Share of a limit within which a run counts as close to it: then nothing may move that would bring it closer."""
GAIN = 0.05
"""Share by which a larger batch must raise the throughput to be kept."""
STEP = 2
"""Factor between batch sizes that are tried."""

ConstraintName = Literal["min_samples_per_second", "max_memory_bytes"]

WORSENED_BY: Mapping[ConstraintName, Mapping[str, int]] = {
    "min_samples_per_second": {"dropout": 1, "batch_size": -1},
    "max_memory_bytes": {"dropout": 1, "batch_size": 1},
}
"""Hyperparameter to the direction in which it takes throughput, or memory: a dropout mask is drawn and kept."""


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a training run must keep to; None is not watched.

    Args:
      min_samples_per_second: training throughput over an interval, validation left out; needs `batch_size`.
      max_memory_bytes: on CUDA what the allocator has reserved, else the resident memory of the process.

    Raises:
      InvalidArgumentError: a limit is not positive.
    """

    min_samples_per_second: float | None = None
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"`{name}` must be positive or None, got {value!r}")

    @property
    def any(self) -> bool:
        """Whether anything is watched."""
        return self.min_samples_per_second is not None or self.max_memory_bytes is not None


class Usage(NamedTuple):
    """What an interval took; NaN is "not measured"."""

    samples_per_second: float = math.nan
    """of training"""
    memory_bytes: float = math.nan
    utilisation: float = math.nan
    """of the device, 0 to 1; on a CPU of the cores that the process may use"""


class Breach(NamedTuple):
    """A constraint that is violated, or close to it."""

    constraint: ConstraintName
    violated: bool
    sentence: str


def breaches(constraints: Constraints, usage: Usage) -> tuple[Breach, ...]:
    """Returns which constraints an interval violated, or came close to.

    >>> limits = Constraints(min_samples_per_second=1000)
    >>> breaches(limits, Usage(samples_per_second=900))[0].sentence
    '900 samples per second are fewer than the 1000 required'
    >>> [breach.violated for rate in (1040, 1060) for breach in breaches(limits, Usage(samples_per_second=rate))]
    [False]
    """
    found = []
    least, most = constraints.min_samples_per_second, constraints.max_memory_bytes
    rate, memory = usage.samples_per_second, usage.memory_bytes
    if least is not None and rate < least * (1.0 + MARGIN):
        how = "fewer than" if rate < least else "hardly more than"
        sentence = f"{rate:.4g} samples per second are {how} the {least:.4g} required"
        found.append(Breach("min_samples_per_second", rate < least, sentence))
    if most is not None and memory > most * (1.0 - MARGIN):
        how = "more than" if memory > most else "hardly less than"
        sentence = f"{memory:.4g} bytes of memory are {how} the {most:.4g} allowed"
        found.append(Breach("max_memory_bytes", memory > most, sentence))
    return tuple(found)


def worsening(found: Sequence[Breach]) -> dict[str, int]:
    """Returns hyperparameter to the direction in which it must not move: 1 up, -1 down, 0 neither."""
    barred: dict[str, int] = {}
    for breach in found:
        for name, direction in WORSENED_BY[breach.constraint].items():
            barred[name] = direction if barred.get(name, direction) == direction else 0
    return barred


class ReliefState(NamedTuple):
    """What is known of batch sizes that were tried; plain values."""

    ceiling: int | None = None
    """largest size worth trying: above it memory was exceeded, or nothing gained"""
    floor: int | None = None
    """smallest size worth trying: below it throughput was too low"""
    tried: tuple[int, float] | None = None
    """before the last step up: size and throughput"""


class Relief(NamedTuple):
    """What is to be done about breaches."""

    batch_size: int | None
    """to be set; None leaves it"""
    exhausted: bool
    """whether a constraint is violated and nothing is left to be done by the guard"""
    sentences: tuple[str, ...]


def relieve(
    constraints: Constraints, found: Sequence[Breach], usage: Usage, state: ReliefState, batch_size: int | None
) -> tuple[Relief, ReliefState]:
    """Chooses the next batch size: down a step if memory is exceeded, up one if throughput is too low.

    Up only as far as memory allows it even if all of it grew with the batch, and only as long as it helps: a step up
    that gains less than `GAIN` is taken back. No size is tried again that was seen to violate a constraint.

    Args:
      constraints: of the run.
      found: from `breaches`.
      usage: of the interval.
      state: of the intervals before.
      batch_size: in force; None if it cannot be set.

    Returns:
      What is to be done, and the state.

    >>> limits = Constraints(max_memory_bytes=1000)
    >>> usage = Usage(memory_bytes=1500)
    >>> relieve(limits, breaches(limits, usage), usage, ReliefState(), 512)[0].batch_size
    256
    """
    sentences = tuple(breach.sentence for breach in found)
    violated = {breach.constraint for breach in found if breach.violated}
    if not violated:
        return Relief(None, False, sentences), state._replace(tried=None)
    if batch_size is None:
        return Relief(None, True, (*sentences, "nothing that the guard may set can help; bind the batch size")), state
    if "max_memory_bytes" in violated:
        wanted = batch_size // STEP
        state = state._replace(ceiling=min(wanted, state.ceiling or wanted), tried=None)
        if wanted < max(1, state.floor or 1):
            return Relief(None, True, (*sentences, _no_size(state))), state
        return Relief(wanted, False, (*sentences, f"batch size down from {batch_size} to {wanted}")), state
    if state.tried is not None and usage.samples_per_second < (1.0 + GAIN) * state.tried[1]:
        before = state.tried[0]
        told = f"batch size back from {batch_size} to {before}: it gained too little"
        return Relief(before, False, (*sentences, told)), state._replace(ceiling=before, tried=None)
    wanted = batch_size * STEP
    fits = constraints.max_memory_bytes is None or STEP * usage.memory_bytes <= constraints.max_memory_bytes
    state = state._replace(floor=max(wanted, state.floor or wanted)) if fits else state
    if not fits or (state.ceiling is not None and wanted > state.ceiling):
        return Relief(None, True, (*sentences, _no_size(state))), state._replace(tried=None)
    told = f"batch size up from {batch_size} to {wanted}"
    return Relief(wanted, False, (*sentences, told)), state._replace(tried=(batch_size, usage.samples_per_second))


def _no_size(state: ReliefState) -> str:
    limits = (
        None if state.floor is None else f"below {state.floor} it is too slow",
        None if state.ceiling is None else f"above {state.ceiling} it takes too much or gains nothing",
    )
    known = "; ".join(limit for limit in limits if limit is not None)
    return "no batch size that may be tried is left" + (f": {known}" if known else "")
