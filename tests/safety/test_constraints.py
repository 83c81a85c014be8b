"""Constraints: what counts as violated, what is held, and a search for a batch size that always ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalearn.errors import InvalidArgumentError
from metalearn.safety.constraints import (
    Constraints,
    ReliefState,
    Usage,
    breaches,
    relieve,
    worsening,
)
from metalearn.safety.guard import RULES, judge
from metalearn.safety.proposal import Proposal

BOTH = Constraints(min_samples_per_second=1000, max_memory_bytes=2000)


def test_what_is_violated_and_what_is_close():
    assert breaches(BOTH, Usage()) == ()  # nothing measured
    assert breaches(BOTH, Usage(1050.0, 1900.0)) == ()
    assert [(b.constraint, b.violated) for b in breaches(BOTH, Usage(1049.0, 1901.0))] == [
        ("min_samples_per_second", False),
        ("max_memory_bytes", False),
    ]
    assert [b.sentence for b in breaches(BOTH, Usage(999.0, 2001.0))] == [
        "999 samples per second are fewer than the 1000 required",
        "2001 bytes of memory are more than the 2000 allowed",
    ]
    assert breaches(Constraints(), Usage(1e-9, 1e18)) == ()


def test_what_would_worsen_them_is_barred():
    slow, large = breaches(BOTH, Usage(999.0, 2001.0))
    assert worsening(()) == {}
    assert worsening([slow]) == {"dropout": 1, "batch_size": -1}
    assert worsening([large]) == {"dropout": 1, "batch_size": 1}
    assert worsening([slow, large]) == {"dropout": 1, "batch_size": 0}


def test_the_guard_holds_what_is_barred_and_only_in_that_direction():
    current = np.array([0.5, 0.5])
    frame = {
        "labels": ("learning_rate[0]", "dropout"),
        "current": current,
        "start": current,
        "low": -np.ones(2),
        "high": np.ones(2),
        "max_step": np.ones(2),
        "nonfinite_steps": 0.0,
        "worsening": np.array([0, 1]),
    }
    up = judge(Proposal(**frame, proposed=np.array([0.6, 0.6])), RULES)
    assert up.values.tolist() == [0.6, 0.5]
    assert (up.status, up.reasons) == ("limited", ("held dropout: it would worsen a constraint",))
    down = judge(Proposal(**frame, proposed=np.array([0.4, 0.4])), RULES)
    assert (down.values.tolist(), down.status) == ([0.4, 0.4], "applied")


class Machine:
    """Memory and throughput by batch size: a fixed part, and one that grows with it."""

    def __init__(self, *, seconds: float, per_sample: float, fixed: float, bytes_per_sample: float) -> None:
        self.seconds, self.per_sample = seconds, per_sample
        self.fixed, self.bytes_per_sample = fixed, bytes_per_sample

    def usage(self, size: int) -> Usage:
        return Usage(size / (self.seconds + self.per_sample * size), self.fixed + self.bytes_per_sample * size)


def settle(constraints: Constraints, machine: Machine, size: int, intervals: int = 40) -> tuple[list[int], bool]:
    """Return the sizes of all intervals, and whether the last was given up."""
    state, sizes, exhausted = ReliefState(), [size], False
    for _ in range(intervals):
        usage = machine.usage(size)
        relief, state = relieve(constraints, breaches(constraints, usage), usage, state, size)
        size, exhausted = relief.batch_size or size, relief.exhausted
        sizes.append(size)
    return sizes, exhausted


def test_memory_goes_down_by_halves():
    machine = Machine(seconds=1.0, per_sample=0.0, fixed=100.0, bytes_per_sample=10.0)
    sizes, exhausted = settle(Constraints(max_memory_bytes=500), machine, 128)  # 1380, 740, 420
    assert sizes[:4] == [128, 64, 32, 32] and not exhausted


def test_throughput_goes_up_as_long_as_it_helps():
    steady = Machine(seconds=1.0, per_sample=0.0, fixed=0.0, bytes_per_sample=1.0)
    sizes, exhausted = settle(Constraints(min_samples_per_second=500), steady, 100)
    assert sizes[:5] == [100, 200, 400, 800, 800] and not exhausted
    # 100, 133, 160, 178, 188, 194 samples per second: the last step gains 3 %, so it is taken back
    saturated = Machine(seconds=0.5, per_sample=0.005, fixed=0.0, bytes_per_sample=1.0)
    sizes, exhausted = settle(Constraints(min_samples_per_second=300), saturated, 100)
    assert sizes[:7] == [100, 200, 400, 800, 1600, 3200, 1600] and set(sizes[6:]) == {1600} and exhausted


def test_throughput_goes_up_as_far_as_memory_allows():
    machine = Machine(seconds=1.0, per_sample=0.0, fixed=0.0, bytes_per_sample=1.0)
    limits = Constraints(min_samples_per_second=1000, max_memory_bytes=500)
    assert settle(limits, machine, 100) == ([100, 200, *[400] * 39], True)


def test_nothing_can_be_done_without_a_batch_size():
    usage = Usage(999.0, 100.0)
    relief, state = relieve(BOTH, breaches(BOTH, usage), usage, ReliefState(), None)
    assert relief.exhausted and relief.batch_size is None and state == ReliefState()
    assert relief.sentences == (
        "999 samples per second are fewer than the 1000 required",
        "nothing that the guard may set can help; bind the batch size",
    )
    close = Usage(1001.0, 100.0)
    assert not relieve(BOTH, breaches(BOTH, close), close, ReliefState(), None)[0].exhausted


@given(
    st.floats(0.01, 2.0),
    st.floats(0.0, 0.01),
    st.floats(0.0, 3000.0),
    st.floats(0.0, 20.0),
    st.integers(1, 4096),
)
def test_it_always_comes_to_rest(seconds: float, per_sample: float, fixed: float, by_sample: float, size: int):
    machine = Machine(seconds=seconds, per_sample=per_sample, fixed=fixed, bytes_per_sample=by_sample)
    sizes, exhausted = settle(BOTH, machine, size)
    assert len(set(sizes[-10:])) == 1 and sizes[-1] >= 1
    violated = any(breach.violated for breach in breaches(BOTH, machine.usage(sizes[-1])))
    assert violated == exhausted  # it rests where all is kept, or says that it cannot be


@pytest.mark.parametrize("value", [-1, 0, math.nan])
def test_limits_that_are_none_are_refused_by_name(value: float):
    with pytest.raises(InvalidArgumentError, match="`min_samples_per_second` must be positive or None"):
        Constraints(min_samples_per_second=value)
