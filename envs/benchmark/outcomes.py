"""From recorded trials to what a method came to on a task: a vector of test NDCG@10, and what a value of it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from envs.benchmark.store import Identity, identity
from metalearn.errors import InvalidArgumentError
from metalearn.trials import Measurement, Trial, TrialStatus

VALIDATION, SELECTION, TEST = "validation_ndcg@10", "selection_ndcg@10", "test_ndcg@10"
FLOORS = ("popularity", "item_knn", "ease")
"""Methods without training steps; they are the same for all families of a domain."""


class TaskName(NamedTuple):
    """A domain with a model family and a budget."""

    domain: str
    family: str
    budget: str
    """steps and batch size, as in "2000x512\""""

    @classmethod
    def parse(cls, name: str) -> TaskName:
        """Reads a trial's task, "domain/family/budget"; only the domain may have slashes.

        >>> TaskName.parse("movies/two_tower/2000x256").steps
        2000
        """
        parts = name.rsplit("/", 2)
        if len(parts) != 3:
            raise InvalidArgumentError(f"`task` must be like 'movies/two_tower/2000x256', got {name!r}")
        return cls(*parts)

    @property
    def name(self) -> str:
        """As in trials."""
        return "/".join(self)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        steps = self.budget.partition("x")[0]
        if not steps.isdecimal():
            raise InvalidArgumentError(f"`task` must end in steps and batch size, as in '2000x256', got {self.name!r}")
        return int(steps)


class Run(NamedTuple):
    """One ended training run, as far as comparisons need it.

    `selection` is -inf and `test` 0 where a diverged run has none. `curve` is [V] validation scores at `steps`.
    """

    replicate: int
    index: int
    seed: int
    selection: float
    test: float
    seconds: float
    steps: np.ndarray
    curve: np.ndarray
    configuration: Mapping[str, Any]

    @property
    def key(self) -> tuple[int, int]:
        """What tells configurations of a method apart."""
        return self.replicate, self.index


Records = Mapping[TaskName, Mapping[str, Sequence[Run]]]
"""Runs by task and method, ordered by replicate, index and seed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a method came to on one task.

    Args:
      test: [S] test NDCG@10, one value for each seed or replicate.
      runs: full training runs that one value costs; 0 for floors.
      seconds: of training that one value costs, mean over values.
      trained: the runs behind the values, where a value is one run.
      chosen: how the configuration was chosen, JSON-ready; empty if nothing was chosen.
    """

    test: np.ndarray
    runs: float
    seconds: float
    trained: tuple[Run, ...] = ()
    chosen: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Missing:
    """Why there is no outcome."""

    reason: str


def collect(trials: Iterable[Trial]) -> Records:
    """Orders trials by task and method; of an identity that was recorded twice the last trial counts.

    Trials that have not ended, are invalid or were not tested are left out; so are those of any checkpoint but the one
    that was recorded last of their family, or some seeds would be another controller's. A diverged one counts as 0 if
    it has no finite test score.

    Raises:
      InvalidArgumentError: a task's name or a configuration's identity cannot be read.
    """
    trials = list(trials)
    checkpoints = {_steering(trial): trial.configuration.get("checkpoint") for trial in trials}
    latest: dict[str, dict[Identity, Run]] = {}
    for trial in trials:
        if trial.status not in (TrialStatus.COMPLETE, TrialStatus.DIVERGED):
            continue
        if trial.configuration.get("checkpoint") != checkpoints[_steering(trial)]:
            continue
        named = identity(trial)
        run = _run(trial, named)
        if run is not None:
            latest.setdefault(trial.task, {})[named] = run
    records: dict[TaskName, dict[str, list[Run]]] = {}
    for task, runs in latest.items():
        methods = records.setdefault(TaskName.parse(task), {})
        for named in sorted(runs):
            methods.setdefault(named.method, []).append(runs[named])
    return records


def _steering(trial: Trial) -> tuple[str, str]:
    """Returns what steers a trial (the trained controller, its base without it, no checkpoint), and its family."""
    family = TaskName.parse(trial.task).family
    if "checkpoint" not in trial.configuration:
        return "none", family
    return "base" if identity(trial).method.startswith("base") else "controller", family


def skipped(trials: Iterable[Trial]) -> dict[tuple[TaskName, str], str]:
    """Returns what was left out on purpose, by task and method: the notes of invalid trials."""
    return {
        (TaskName.parse(trial.task), identity(trial).method): str(trial.configuration["note"])
        for trial in trials
        if trial.status is TrialStatus.INVALID and "note" in trial.configuration
    }


def originals(runs: Sequence[Run]) -> dict[tuple[int, int], Run]:
    """Returns one run for each (replicate, index): the one whose seed is the replicate, or else the lowest seed."""
    chosen: dict[tuple[int, int], Run] = {}
    for run in sorted(runs, key=lambda run: (run.key, run.seed != run.replicate, run.seed)):
        chosen.setdefault(run.key, run)
    return chosen


def by_replicate(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Returns each replicate's original runs, in order of their index."""
    replicates: dict[int, list[Run]] = {}
    for run in originals(runs).values():
        replicates.setdefault(run.replicate, []).append(run)
    return replicates


def repeated(runs: Sequence[Run], **chosen: Any) -> Outcome:
    """Returns the outcome of runs of one configuration, a value each."""
    return Outcome(
        test=np.array([run.test for run in runs]),
        runs=1.0,
        seconds=float(np.mean([run.seconds for run in runs])),
        trained=tuple(runs),
        chosen=chosen or None,
    )


def best_selected(searches: Sequence[Sequence[Run]], *, cost: float) -> Outcome:
    """Returns the outcome of searches: of each, the test score of the run with the best selection score.

    Args:
      searches: runs of each search; the earliest of equals counts.
      cost: in full training runs.
    """
    winners = [search[int(np.argmax([run.selection for run in search]))] for search in searches]
    return Outcome(
        test=np.array([run.test for run in winners]),
        runs=cost,
        seconds=float(np.mean([sum(run.seconds for run in search) for search in searches])),
    )


def recorded_search(runs: Sequence[Run], budget: int) -> Outcome | Missing:
    """Returns the outcome of a recorded search: the best of the first `budget` trials of each replicate."""
    searches = [
        search[:budget]
        for search in by_replicate(runs).values()
        if [run.index for run in search[:budget]] == list(range(budget))
    ]
    if not searches:
        most = max((len(search) for search in by_replicate(runs).values()), default=0)
        return Missing(f"no replicate has its first {budget} trials; the longest has {most}")
    return best_selected(searches, cost=float(budget))


def _run(trial: Trial, named: Identity) -> Run | None:
    last: dict[str, float] = {m.metric: m.value for m in trial.measurements}
    curve: list[Measurement] = [m for m in trial.measurements if m.metric == VALIDATION]
    if TEST not in last and trial.status is not TrialStatus.DIVERGED:
        return None
    selection, test = last.get(SELECTION, np.nan), last.get(TEST, np.nan)
    return Run(
        replicate=named.replicate,
        index=named.index,
        seed=named.seed,
        selection=selection if np.isfinite(selection) else -np.inf,
        test=test if np.isfinite(test) else 0.0,
        seconds=trial.cost,
        steps=np.array([m.step for m in curve]),
        curve=np.array([m.value for m in curve]),
        configuration=trial.configuration,
    )
