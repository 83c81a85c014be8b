"""Recorded trials on disk: one JSON line each, appended by any number of processes, none lost to a killed one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from metalearn.errors import InvalidArgumentError
from metalearn.trials import Measurement, Trial

_TAIL = 1 << 20
"""Bytes searched for the end of the last whole line; a trial takes a few thousand."""


class Identity(NamedTuple):
    """What tells the benchmark's trials apart.

    Args:
      task: name of the task.
      method: what was run.
      replicate: of a search, the seed of its draws.
      index: place in the search, or number of the configuration.
      seed: of initial weights and batches.
    """

    task: str
    method: str
    replicate: int
    index: int
    seed: int


def identity(trial: Trial) -> Identity:
    """Returns a trial's identity.

    Raises:
      InvalidArgumentError: its configuration lacks a part of it.
    """
    try:
        method, replicate, index = (trial.configuration[name] for name in ("method", "replicate", "index"))
    except KeyError as error:
        raise InvalidArgumentError(
            f"`trial` on {trial.task} must have method, replicate and index in its configuration, got "
            f"{dict(trial.configuration)}"
        ) from error
    return Identity(trial.task, str(method), int(replicate), int(index), trial.seed)


def rounded(value: float) -> float:
    """Rounds to 6 significant digits, as everything recorded is.

    >>> rounded(0.123456789), rounded(1234567.0)
    (0.123457, 1234570.0)
    """
    return float(f"{value:.6g}")


def round_trial(trial: Trial) -> Trial:
    """Returns the trial as it is when read back: measurements and cost rounded."""
    measurements = tuple(Measurement(m.step, m.metric, rounded(m.value)) for m in trial.measurements)
    return replace(trial, measurements=measurements, cost=rounded(trial.cost))


class TrialStore:
    """Trials in a JSON Lines file.

    Writers lock the file, so a line without an end is what a killed writer left: readers pass over it, and the next
    writer cuts it off.

    Args:
      path: the file; it and its folder are made when the first trial is appended.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> dict[Identity, Trial]:
        """Returns the trials in order of record; of an identity that was recorded again the last counts.

        Raises:
          InvalidArgumentError: a whole line is not a trial; the message gives its number.
        """
        if not self.path.exists():
            return {}
        *lines, _ = self.path.read_bytes().split(b"\n")
        trials: dict[Identity, Trial] = {}
        for number, line in enumerate(lines, 1):
            try:
                trial = Trial.from_json(line.decode())
                trials.pop(identity(trial), None)
                trials[identity(trial)] = trial
            except ValueError as error:
                raise InvalidArgumentError(
                    f"{self.path}, line {number} is not a trial of the benchmark ({error}); remove that line"
                ) from error
        return trials

    def append(self, trials: Iterable[Trial]) -> None:
        """Appends trials, rounded, in one write."""
        lines = "".join(f"{round_trial(trial).to_json()}\n" for trial in trials).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            tail = file.read()
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
            file.write(lines)
