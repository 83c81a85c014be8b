"""The benchmark's evidence, from recorded trials: a summary in JSON, a table in Markdown, and plots.

Ratios are of mean test NDCG@10. Every interval is a 95 % bootstrap that draws tasks within a family and seeds within a
task; which method is the fixed schedule, and which tasks have room between default and best of 64, is held as found.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.benchmark import plots, tables
from envs.benchmark.comparisons import COMPARED, OWN_BASE, RANDOM_BUDGETS, Evidence, Samples, compare, gather
from envs.benchmark.outcomes import FLOORS, Missing, Outcome, collect, skipped
from envs.benchmark.statistics import (
    Estimate,
    bootstrap,
    geometric_mean,
    interquartile_mean,
    lost,
    mean_ratio,
    normalised,
    pad,
    performance_profile,
    probability_of_improvement,
    seed_means,
    worst_loss,
)
from envs.benchmark.store import rounded
from metalearn.trials import Trial

FEW_TASKS = 10
"""Below so many tasks a bootstrap over tasks is known to be too narrow."""
VARIANTS = {name.removeprefix("controller_"): name for name in OWN_BASE if name != "controller"}
THRESHOLDS = np.round(np.linspace(0.5, 1.25, 76), 2)
"""Of the performance profile."""


SAMPLES = {
    "own": "the controller",
    "fixed": "the fixed schedule",
    "best": "the reference search",
    "base": "its base",
    "default": "default",
    "zero": "default",
    "one": "the reference search",
}
"""What the samples of `compare` are of, where they have noise."""


class Measure(NamedTuple):
    """A statistic and the samples of `compare` that it is of; tasks that lack one do not count."""

    needs: tuple[str, ...]
    statistic: Callable[..., np.ndarray]


def _mean(values: np.ndarray) -> np.ndarray:
    return seed_means(values).mean(axis=-1)


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return geometric_mean(mean_ratio(ours, theirs))


def _iqm(own: np.ndarray, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    scores = normalised(own, zero, one)
    return interquartile_mean(scores.reshape(*scores.shape[:-2], -1))


MEASURES = {
    "ratio_to_fixed_schedule": Measure(("own", "fixed"), _ratio),
    "ratio_to_best_of_64": Measure(("own", "best"), _ratio),
    "ratio_to_own_base": Measure(("own", "base"), _ratio),
    "ratio_to_default": Measure(("own", "default"), _ratio),
    "iqm_normalised": Measure(("own", "zero", "one"), _iqm),
    "prob_improvement_over_fixed_schedule": Measure(
        ("own", "fixed"), lambda own, fixed: probability_of_improvement(own, fixed).mean(axis=-1)
    ),
    "share_lost": Measure(("own", "fixed", "error"), lambda *samples: lost(*samples).mean(axis=-1)),
    "share_won": Measure(("own", "fixed", "error"), lambda own, fixed, error: lost(fixed, own, error).mean(axis=-1)),
    "worst_relative_loss": Measure(("own", "fixed"), lambda own, fixed: worst_loss(mean_ratio(own, fixed))),
    "time_to_target": Measure(("time",), _mean),
    "reached_target": Measure(("reached",), _mean),
}
"""What is estimated of the controller, overall and in each group of tasks."""


def summary(trials: Iterable[Trial]) -> dict[str, Any]:
    """Compares the controller with everything that is recorded.

    What is missing gives null and a reason, so that a store may be read while it is filled.

    Args:
      trials: of the benchmark, in any order.

    Returns:
      Strict JSON values. An estimate is {"value", "low", "high", "tasks"}, with a "reason" where it is null and a
      "note" where it needs one.

      overall, families, domains, variants: estimates of `MEASURES`, by name; families_not_told: those of the controller
        that is not told the family.
      budgets: by n, mean of best of n over mean of the controller, its geometric mean over tasks; budgets_by_family.
      methods: by name, "ratio_to_controller" (as above), and what one value on one task costs: "runs" and "seconds"
        (means over tasks), "total_seconds" over tasks.
      profile: "tau", and by method the share of tasks whose ratio to best of 64 is at least that, with bounds.
      fixed_schedule: by task, which method it is; best_of: by family and budget, the n that stands for 64.
      tasks, long_tasks: a row for each task; see `_row`.

    Raises:
      InvalidArgumentError: a trial is not of a benchmark.
    """
    trials = list(trials)
    evidence, long = gather(collect(trials), skipped(trials))
    others = sorted({name for each in evidence for name in each.outcomes} - {"controller", *COMPARED, *FLOORS})
    methods = {name: _method(evidence, name) for name in ("fixed_schedule", *COMPARED, *others, *FLOORS)}
    result = {
        "overall": measure(evidence, "controller"),
        "families": {
            family: measure([e for e in evidence if e.task.family == family], "controller")
            for family in sorted({e.task.family for e in evidence})
        },
        "families_not_told": {
            family: measure([e for e in evidence if e.task.family == family], "controller_unfamiliar")
            for family in sorted({e.task.family for e in evidence})
        },
        "domains": {
            domain: measure([e for e in evidence if e.task.domain == domain], "controller")
            for domain in sorted({e.task.domain for e in evidence})
        },
        "variants": {
            variant: measure(long if variant == "long" else evidence, method) for variant, method in VARIANTS.items()
        },
        "budgets": _budgets(evidence),
        "budgets_by_family": {
            family: _budgets([e for e in evidence if e.task.family == family])
            for family in sorted({e.task.family for e in evidence})
        },
        "controller": _compute(evidence, "controller"),
        "methods": methods,
        "profile": {"tau": THRESHOLDS.tolist(), "methods": _profiles(evidence, ("controller", *methods))},
        "fixed_schedule": {each.task.name: each.fixed for each in evidence},
        "best_of": {f"{e.task.family}/{e.task.budget}": e.reference for e in evidence},
        "tasks": [_row(each, "controller") for each in evidence],
        "long_tasks": [_row(each, "controller_long") for each in long],
    }
    return _rounded(result)


def write_report(trials: Iterable[Trial], folder: str | Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Writes summary.json, table.md, budgets.png, tasks.png and profile.png; a plot without data is left out.

    Args:
      trials: as `summary`.
      folder: made if it is not there.
      provenance: JSON-ready; written into the summary and above the table.

    Returns:
      The summary, with "provenance".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"provenance": dict(provenance), **summary(trials)}
    (folder / "summary.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf8")
    (folder / "table.md").write_text(tables.markdown(result), encoding="utf8")
    plots.draw_budgets(folder / "budgets.png", result)
    plots.draw_tasks(folder / "tasks.png", result)
    plots.draw_profile(folder / "profile.png", result)
    return result


def measure(evidence: Sequence[Evidence], method: str) -> dict[str, Any]:
    """Returns the estimates of `MEASURES` of one controller over some tasks, by name."""
    compared = [(each, compare(each, method)) for each in evidence]
    return {name: _estimate(compared, *of) for name, of in MEASURES.items()}


def _estimate(
    compared: Sequence[tuple[Evidence, Samples]], needs: Sequence[str], statistic: Callable[..., np.ndarray]
) -> dict[str, Any]:
    usable, missing = _usable(compared, needs)
    if not usable:
        reasons = Counter(missing).most_common(1)
        reason = reasons[0][0] if reasons else "no task is recorded"
        return {"value": None, "low": None, "high": None, "tasks": 0, "reason": reason}
    estimate = _bootstrap(usable, needs, statistic)
    return {**_bounds(estimate), "tasks": len(usable), **_note(usable, needs)}


def _usable(
    compared: Sequence[tuple[Evidence, Samples]], needs: Sequence[str]
) -> tuple[list[tuple[Evidence, Samples]], list[str]]:
    """Tasks that have all samples, and why the others do not."""
    usable, reasons = [], []
    for each, samples in compared:
        reason = next((found.reason for name in needs if isinstance(found := samples[name], Missing)), None)
        if reason is None:
            usable.append((each, samples))
        else:
            reasons.append(reason)
    return usable, reasons


def _bootstrap(
    usable: Sequence[tuple[Evidence, Samples]], needs: Sequence[str], statistic: Callable[..., np.ndarray]
) -> Estimate:
    stacked = [pad([np.asarray(samples[name]) for _, samples in usable]) for name in needs]
    return bootstrap(statistic, stacked, [each.task.family for each, _ in usable])


def _bounds(estimate: Estimate) -> dict[str, float | None]:
    return {name: float(bound) if np.isfinite(bound) else None for name, bound in estimate._asdict().items()}


def _note(usable: Sequence[tuple[Evidence, Samples]], needs: Sequence[str]) -> dict[str, str]:
    """What a reader of the interval must know."""
    notes = []
    if max(Counter(each.task.family for each, _ in usable).values()) == 1:
        notes.append("one task a family: the interval is over seeds alone")
    elif len(usable) < FEW_TASKS:
        notes.append("few tasks: the interval is likely too narrow")
    for name in needs:
        single = sum(len(np.asarray(samples[name])) == 1 for _, samples in usable)
        if single and name in SAMPLES:
            notes.append(f"the interval lacks the noise of {SAMPLES[name]}, which has one value on {single} tasks")
    if {"best", "one"} & set(needs):
        smaller = sorted({(e.task.family, e.reference) for e, _ in usable if e.reference != RANDOM_BUDGETS[-1]})
        notes += [f"best of {budget} stands for best of {RANDOM_BUDGETS[-1]} in {family}" for family, budget in smaller]
    return {"note": "; ".join(notes)} if notes else {}


def _against(evidence: Sequence[Evidence], method: str) -> list[tuple[Evidence, Samples]]:
    """The controller, another method and the reference search, task by task."""
    return [
        (
            each,
            {
                name: outcome if isinstance(outcome, Missing) else outcome.test
                for name, outcome in (
                    ("theirs", each.outcome(method)),
                    ("controller", each.outcome("controller")),
                    ("reference", each.best),
                )
            },
        )
        for each in evidence
    ]


def _method(evidence: Sequence[Evidence], method: str) -> dict[str, Any]:
    ratio = _estimate(_against(evidence, method), ("theirs", "controller"), _ratio)
    return {"ratio_to_controller": ratio, **_compute(evidence, method)}


def _compute(evidence: Sequence[Evidence], method: str) -> dict[str, Any]:
    found = [outcome for each in evidence if isinstance(outcome := each.outcome(method), Outcome)]
    if not found:
        return {"tasks": 0, "runs": None, "seconds": None, "total_seconds": None}
    seconds = [outcome.seconds for outcome in found]
    return {
        "tasks": len(found),
        "runs": float(np.mean([outcome.runs for outcome in found])),
        "seconds": float(np.mean(seconds)),
        "total_seconds": float(np.sum(seconds)),
    }


def _budgets(evidence: Sequence[Evidence]) -> dict[str, Any]:
    return {
        str(budget): _estimate(_against(evidence, f"best_of_{budget}"), ("theirs", "controller"), _ratio)
        for budget in RANDOM_BUDGETS
    }


def _profiles(evidence: Sequence[Evidence], methods: Iterable[str]) -> dict[str, Any]:
    profiles = {}
    for method in methods:
        usable, _ = _usable(_against(evidence, method), ("theirs", "reference"))
        if usable:
            share, low, high = _bootstrap(
                usable, ("theirs", "reference"), lambda a, b: performance_profile(mean_ratio(a, b), THRESHOLDS)
            )
            profiles[method] = {
                "tasks": len(usable),
                "share": share.tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
            }
    return profiles


def _row(evidence: Evidence, method: str) -> dict[str, Any]:
    """What is said of one task.

    task, domain, family, budget: which it is.
    trials: recorded on it; noise: relative standard deviation over seeds.
    fixed_schedule: which method that is; best_of: the budget that stands for 64.
    test, seeds: mean and number of values by method.
    chosen: the configuration that best_fixed_schedule and best_fixed_configuration are on this task.
    floors_above: floors that are better than the controller.
    missing: reasons by method.
    measures: as overall, of this task alone.
    """
    found = {name: outcome for name, outcome in evidence.outcomes.items() if isinstance(outcome, Outcome)}
    own = found.get(method)
    return {
        "task": evidence.task.name,
        **evidence.task._asdict(),
        "trials": evidence.num_trials,
        "noise": evidence.noise,
        "fixed_schedule": evidence.fixed,
        "best_of": evidence.reference,
        "test": {name: float(outcome.test.mean()) for name, outcome in found.items()},
        "seeds": {name: len(outcome.test) for name, outcome in found.items()},
        "chosen": {
            name: dict(outcome.chosen)
            for name, outcome in found.items()
            if outcome.chosen is not None and name.startswith("best_fixed")
        },
        "floors_above": [
            name for name in FLOORS if own and name in found and found[name].test.mean() > own.test.mean()
        ],
        "missing": {
            name: outcome.reason
            for name in (method, *COMPARED, *FLOORS)
            if isinstance(outcome := evidence.outcome(name), Missing)
        },
        "measures": measure([evidence], method),
    }


def _rounded(value: Any) -> Any:
    """JSON values, floats rounded; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return rounded(value) if math.isfinite(value) else None
    return value
