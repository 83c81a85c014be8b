"""Every method's outcome on every task, and what the controller is compared with there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from envs.benchmark.outcomes import (
    FLOORS,
    Missing,
    Outcome,
    Records,
    Run,
    TaskName,
    by_replicate,
    recorded_search,
    repeated,
)
from envs.benchmark.replays import Pool, pools_of, portfolio, random_search, successive_halving
from envs.benchmark.statistics import BEYOND_NOISE, PRECISION, relative_noise, standard_error

RANDOM_BUDGETS = (1, 4, 16, 64)
SEARCH_BUDGETS = {"tpe": (16, 64), "pbt": (16,)}
PORTFOLIO_SIZES = (1, 4, 16)
FIXED_SCHEDULES = ("best_fixed_schedule", "base", "base_decaying", "default")
"""The strongest of these over a family's tasks is that family's fixed schedule."""
OWN_BASE = {
    "controller": "base",
    "controller_decaying": "base_decaying",
    "controller_half": "base_decaying",
    "controller_double": "base_decaying",
    "controller_unfamiliar": "base_unfamiliar",
    "controller_long": "base_long",
}
"""Each controller, and what its untrained policy runs in the same place."""
COMPARED = (
    *(name for name in OWN_BASE if name not in ("controller", "controller_long")),
    "base",
    "base_decaying",
    "base_unfamiliar",
    "default",
    "best_fixed_configuration",
    "best_fixed_schedule",
    "schedule_free",
    "schedule_free_1",
    "prodigy",
    *(f"portfolio_{size}" for size in PORTFOLIO_SIZES),
    *(f"best_of_{budget}" for budget in RANDOM_BUDGETS),
    "halving_16",
    *(f"{name}_{budget}" for name, budgets in SEARCH_BUDGETS.items() for budget in budgets),
)
"""What the controller is compared with, apart from floors."""
LONG = ("controller_long", "base_long")
"""Methods of tasks with ten times the steps."""

Samples = Mapping[str, np.ndarray | Missing]
"""What one method is compared by on one task; see `compare`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What is known about one task.

    Args:
      task: the task.
      outcomes: by method; searches by method and budget, as "tpe_16" and "best_of_64".
      fixed: which method is the fixed schedule here; None if there is none.
      reference: budget of the random search that stands for "best of 64"; None if nothing was drawn.
      noise: pooled relative standard deviation over seeds; NaN if no method was repeated.
      num_trials: recorded on the task.
    """

    task: TaskName
    outcomes: Mapping[str, Outcome | Missing]
    fixed: str | None
    reference: int | None
    noise: float
    num_trials: int

    def outcome(self, method: str) -> Outcome | Missing:
        """Returns a method's outcome; "fixed_schedule" is the fixed schedule's."""
        if method == "fixed_schedule":
            return Missing("no fixed schedule is recorded") if self.fixed is None else self.outcomes[self.fixed]
        return self.outcomes.get(method, Missing("nothing is recorded for it"))

    @property
    def best(self) -> Outcome | Missing:
        """Outcome of the reference search."""
        return Missing("no draws are recorded") if self.reference is None else self.outcome(f"best_of_{self.reference}")


def gather(records: Records, notes: Mapping[tuple[TaskName, str], str]) -> tuple[list[Evidence], list[Evidence]]:
    """Returns the evidence about each task, and about each task with ten times the steps.

    Floors are shared by all tasks of a domain. What is chosen for a family as a whole, its fixed schedule and its
    reference budget, is chosen over the tasks of one family and budget.

    Args:
      records: as `collect` returns them.
      notes: why something was left out, as `skipped` returns it.
    """
    pools = pools_of(records)
    floors = _floors(records, notes)
    ordinary = {
        task: _outcomes(task, methods, pools, floors.get(task.domain, {}))
        for task, methods in sorted(records.items())
        if set(methods) - {*FLOORS, *LONG}
    }
    evidence = []
    for task, outcomes in ordinary.items():
        group = [other for peer, other in ordinary.items() if peer[1:] == task[1:]]
        ranking = rank_fixed_schedules(group)
        fixed = next((name for name in ranking if isinstance(outcomes.get(name), Outcome)), None)
        evidence.append(_evidence(task, records, outcomes, fixed, reference_budget(group)))
    long = [
        _evidence(task, records, found, "base_long" if "base_long" in found else None, None)
        for task, methods in sorted(records.items())
        if (found := _outcomes(task, {name: methods[name] for name in LONG if name in methods}, {}, {}))
        and set(LONG) & set(methods)
    ]
    return evidence, long


def rank_fixed_schedules(group: Sequence[Mapping[str, Outcome | Missing]]) -> list[str]:
    """Orders the fixed schedules of a family by the geometric mean of their test scores, the strongest first.

    This looks at the test scores that it is compared on: hindsight, to the controller's disadvantage. It is over the
    tasks where all that are recorded anywhere are; where there are none, the one recorded on most tasks is first.

    Args:
      group: outcomes on each of the family's tasks.
    """
    means = {
        name: {
            row: float(np.log(max(outcome.test.mean(), PRECISION)))
            for row, outcomes in enumerate(group)
            if isinstance(outcome := outcomes.get(name), Outcome)
        }
        for name in FIXED_SCHEDULES
    }
    means = {name: found for name, found in means.items() if found}
    if not means:
        return []
    shared = set.intersection(*(set(found) for found in means.values()))
    if shared:
        return sorted(means, key=lambda name: -sum(means[name][row] for row in shared))
    return sorted(means, key=lambda name: (-len(means[name]), -sum(means[name].values())))


def reference_budget(group: Sequence[Mapping[str, Outcome | Missing]]) -> int | None:
    """Returns the largest budget of random search that at least half of a family's tasks with draws have."""
    counts = {
        budget: sum(isinstance(outcomes.get(f"best_of_{budget}"), Outcome) for outcomes in group)
        for budget in RANDOM_BUDGETS
    }
    return max((budget for budget, count in counts.items() if 2 * count >= max(counts[1], 1)), default=None)


def compare(evidence: Evidence, method: str) -> Samples:
    """Returns what a method is compared by on one task, or why something is missing.

    own, fixed, best, base, default: test scores [S] of the method, the fixed schedule, the reference search, its own
        base, AdamW's default.
    error: [1] standard error of own less fixed.
    zero, one: test scores of default and of the reference search, where the latter is better beyond noise.
    time, reached: [S] share of the steps until validation reached the fixed schedule's best, 1 if it never did; and
        whether it did.
    """
    own, fixed = evidence.outcome(method), evidence.outcome("fixed_schedule")
    outcomes = {"own": own, "fixed": fixed, "best": evidence.best, "base": evidence.outcome(OWN_BASE[method])}
    outcomes["default"] = evidence.outcome("default")
    return {
        **{name: outcome if isinstance(outcome, Missing) else outcome.test for name, outcome in outcomes.items()},
        **_against_fixed(own, fixed, evidence),
        **_headroom(evidence.outcome("default"), evidence.best, evidence.noise),
    }


def time_to_target(ours: Sequence[Run], theirs: Sequence[Run], steps: int) -> np.ndarray:
    """Returns the share of steps after which each of our runs first validates as well as theirs do at best.

    Args:
      ours: [S] runs.
      theirs: runs whose best validation scores, averaged, are the target.
      steps: of a full run.

    Returns:
      [S] in (0, 1], inf where it never did.
    """
    peaks = [np.max(run.curve[np.isfinite(run.curve)], initial=0.0) for run in theirs]
    target = float(np.mean(peaks))
    return np.array([np.min(run.steps[run.curve >= target] / steps, initial=np.inf) for run in ours])


def _against_fixed(own: Outcome | Missing, fixed: Outcome | Missing, evidence: Evidence) -> Samples:
    if isinstance(own, Missing) or isinstance(fixed, Missing):
        return _missing(("error", "time", "reached"), own, fixed)
    error = standard_error(own.test, fixed.test, evidence.noise)
    time = time_to_target(own.trained, fixed.trained, evidence.task.steps)
    return {
        "error": np.array([error]) if np.isfinite(error) else Missing("one seed each, so that noise is unknown"),
        "time": np.minimum(time, 1.0),
        "reached": np.isfinite(time).astype(float),
    }


def _headroom(default: Outcome | Missing, best: Outcome | Missing, noise: float) -> Samples:
    if isinstance(default, Missing) or isinstance(best, Missing):
        return _missing(("zero", "one"), default, best)
    gap = best.test.mean() - default.test.mean()
    if gap > BEYOND_NOISE * standard_error(best.test, default.test, noise):
        return {"zero": default.test, "one": best.test}
    return _missing(("zero", "one"), Missing("random search is not better than default beyond noise"))


def _missing(names: Sequence[str], *outcomes: Outcome | Missing) -> Samples:
    """The first reason among the outcomes, for each name."""
    first = next(outcome for outcome in outcomes if isinstance(outcome, Missing))
    return {name: first for name in names}


def _evidence(
    task: TaskName,
    records: Records,
    outcomes: Mapping[str, Outcome | Missing],
    fixed: str | None,
    reference: int | None,
) -> Evidence:
    repeats = [o.test for o in outcomes.values() if isinstance(o, Outcome) and o.trained and o.chosen is None]
    return Evidence(
        task=task,
        outcomes=outcomes,
        fixed=fixed,
        reference=reference,
        noise=relative_noise(repeats),
        num_trials=sum(map(len, records[task].values())),
    )


def _outcomes(
    task: TaskName,
    methods: Mapping[str, Sequence[Run]],
    pools: Mapping[TaskName, Pool],
    floors: Mapping[str, Outcome | Missing],
) -> dict[str, Outcome | Missing]:
    """Outcomes of what was run on a task, of what is replayed, and of the domain's floors."""
    outcomes: dict[str, Outcome | Missing] = {}
    for name, runs in methods.items():
        if name not in ("sampled", *SEARCH_BUDGETS, *FLOORS):
            outcomes |= _plain(name, runs)
    for name, budgets in SEARCH_BUDGETS.items():
        if name in methods:
            outcomes |= {f"{name}_{budget}": recorded_search(methods[name], budget) for budget in budgets}
    if "sampled" in methods:
        draws = methods["sampled"]
        outcomes |= {f"best_of_{budget}": random_search(draws, budget) for budget in RANDOM_BUDGETS}
        outcomes["halving_16"] = successive_halving(draws)
        outcomes["best_fixed_configuration"] = portfolio(draws, pools, task, schedule="constant")
        outcomes["best_fixed_schedule"] = portfolio(draws, pools, task)
        outcomes |= {f"portfolio_{size}": portfolio(draws, pools, task, size=size) for size in PORTFOLIO_SIZES}
    return outcomes | dict(floors)


def _plain(name: str, runs: Sequence[Run]) -> dict[str, Outcome]:
    """Outcome of each configuration of a method without a search; all but the first have their index in the name."""
    by_index: dict[int, list[Run]] = {}
    for run in runs:
        by_index.setdefault(run.index, []).append(run)
    return {f"{name}_{index}" if index else name: repeated(found) for index, found in by_index.items()}


def _floors(records: Records, notes: Mapping[tuple[TaskName, str], str]) -> dict[str, dict[str, Outcome | Missing]]:
    """Outcome of each floor on each domain, wherever it was recorded: one value, since nothing in it is random."""
    floors: dict[str, dict[str, Outcome | Missing]] = {}
    for (task, name), note in notes.items():
        if name in FLOORS:
            floors.setdefault(task.domain, {})[name] = Missing(note)
    for task, methods in records.items():
        for name in FLOORS:
            if name in methods:
                run = next(iter(by_replicate(methods[name]).values()))[0]
                found = Outcome(test=np.array([run.test]), runs=0.0, seconds=run.seconds)
                floors.setdefault(task.domain, {})[name] = found
    return floors
