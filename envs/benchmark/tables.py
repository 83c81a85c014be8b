"""The benchmark's summary as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEADLINE = {
    "ratio_to_fixed_schedule": "ratio to the fixed schedule",
    "ratio_to_best_of_64": "ratio to best of 64",
    "ratio_to_own_base": "ratio to its base, untrained",
    "ratio_to_default": "ratio to AdamW's default",
    "iqm_normalised": "normalised score (0 default, 1 best of 64), interquartile mean",
    "prob_improvement_over_fixed_schedule": "probability of improvement over the fixed schedule",
    "share_won": "share of tasks won against it beyond noise",
    "share_lost": "share of tasks lost to it beyond noise",
    "worst_relative_loss": "worst relative loss to it",
    "time_to_target": "share of steps until it validates as well as that at best (1 if never)",
    "reached_target": "share of runs that get there",
}
GROUPED = (
    "ratio_to_fixed_schedule",
    "ratio_to_best_of_64",
    "ratio_to_own_base",
    "ratio_to_default",
    "iqm_normalised",
    "share_lost",
    "worst_relative_loss",
)


def markdown(summary: Mapping[str, Any]) -> str:
    """Returns the tables of a summary as `envs.benchmark.report.write_report` makes it."""
    overall = [[HEADLINE[name], interval(found), str(found["tasks"])] for name, found in summary["overall"].items()]
    parts = [
        "# Benchmark",
        "Test NDCG@10; ratios are geometric means over tasks of the ratio of means over seeds. Brackets are 95 % "
        "bootstrap intervals: tasks are drawn within their family, seeds within their task.",
        _lines(f"{name}: {value}" for name, value in summary.get("provenance", {}).items()),
        "## The controller, overall",
        table(["", "value", "tasks"], overall),
        _remarks((HEADLINE[name], found) for name, found in summary["overall"].items()),
        _best_of(summary),
    ]
    for title, key in (
        ("By families", "families"),
        ("By families, the controller not told which it is", "families_not_told"),
        ("By domains", "domains"),
        ("Variants of the controller", "variants"),
    ):
        parts += [f"## {title}", _groups(summary[key])]
    parts += ["## Methods and what they cost", _methods(summary), "## Tasks", _task_table(summary["tasks"])]
    if summary["long_tasks"]:
        parts += ["## Ten times the steps, against the base alone", _task_table(summary["long_tasks"])]
    parts += [_chosen(summary["tasks"])]
    parts += ["## Floors above the controller", _floors(summary["tasks"]), "## Not recorded", _missing(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [header, *rows]
    cells = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([cells[0], "|" + "---|" * len(header), *cells[1:]])


def interval(estimate: Mapping[str, Any]) -> str:
    """Formats an estimate.

    >>> interval({"value": 1.0312, "low": 1.0, "high": 1.05}), interval({"value": None, "low": None, "high": None})
    ('1.031 [1.000, 1.050]', '–')
    """
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:z.3f}" if low is None else f"{value:z.3f} [{low:z.3f}, {high:z.3f}]"


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> str:
    if not groups:
        return "Nothing is recorded."
    rows = [
        [name, str(max(found[m]["tasks"] for m in GROUPED)), *(interval(found[m]) for m in GROUPED)]
        for name, found in groups.items()
    ]
    remarks = _remarks((name, found[m]) for m in GROUPED for name, found in groups.items())
    return table(["", "tasks", *(HEADLINE[m] for m in GROUPED)], rows) + "\n\n" + remarks


def _methods(summary: Mapping[str, Any]) -> str:
    def cost(found: Mapping[str, Any]) -> list[str]:
        if not found["tasks"]:
            return ["–"] * 3
        return [f"{found['runs']:g}", f"{found['seconds']:.1f}", f"{found['total_seconds']:.0f}"]

    rows = [["controller", "1", str(summary["controller"]["tasks"]), *cost(summary["controller"])]]
    for name, found in summary["methods"].items():
        ratio = found["ratio_to_controller"]
        rows.append([name, interval(ratio), str(ratio["tasks"]), *cost(found)])
    header = ["method", "ratio to the controller", "tasks", "runs a task", "seconds a task", "seconds in all"]
    return table(header, rows)


def _task_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Nothing is recorded."
    body = []
    for row in rows:
        fixed, reference, measures = row["fixed_schedule"], row["best_of"], row["measures"]
        own = "controller_long" if "controller_long" in row["test"] else "controller"
        body.append(
            [
                row["task"],
                _score(row, own),
                f"{_score(row, fixed)} ({fixed})" if fixed else "–",
                interval(measures["ratio_to_fixed_schedule"]),
                f"{_score(row, f'best_of_{reference}')} (of {reference})" if reference else "–",
                interval(measures["ratio_to_best_of_64"]),
                interval(measures["iqm_normalised"]),
                {None: "–", 0.0: "", 1.0: "**lost**"}[measures["share_lost"]["value"]],
                ", ".join(f"{name} {row['test'][name]:.4f}" for name in row["floors_above"]),
                "–" if row["noise"] is None else f"{100 * row['noise']:.1f} %",
                f"{row['seeds'].get(own, 0)} / {row['trials']}",
            ]
        )
    header = [
        "task",
        "controller",
        "fixed schedule",
        "ratio",
        "best of 64",
        "ratio",
        "normalised",
        "lost beyond noise",
        "floors above it",
        "noise over seeds",
        "seeds / trials",
    ]
    return table(header, body)


def _chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which draws were chosen on other domains, as replicate:index."""
    chosen: dict[str, list[str]] = {}
    for row in rows:
        for name, found in row["chosen"].items():
            label = f"{name} is {found['replicate']}:{found['index']}, with {row['seeds'][name]} seeds, on"
            chosen.setdefault(label, []).append(row["task"])
    return _lines(f"{label} {', '.join(tasks)}" for label, tasks in chosen.items())


def _score(row: Mapping[str, Any], method: str) -> str:
    return f"{row['test'][method]:.4f}" if method in row["test"] else "–"


def _best_of(summary: Mapping[str, Any]) -> str:
    smaller = {name: n for name, n in summary["best_of"].items() if n not in (None, 64)}
    return _lines(f"{name}: best of {n} stands for best of 64, which is not recorded" for name, n in smaller.items())


def _floors(rows: Sequence[Mapping[str, Any]]) -> str:
    above = [f"{row['task']}: {', '.join(row['floors_above'])}" for row in rows if row["floors_above"]]
    judged = [
        row for row in rows if "controller" in row["test"] and {"popularity", "item_knn", "ease"} & set(row["test"])
    ]
    return _lines(above) or f"None, on {len(judged)} tasks where both are recorded."


def _missing(summary: Mapping[str, Any]) -> str:
    """Reasons, each once, with the methods and the number of tasks."""
    counts: dict[tuple[str, str], int] = {}
    for row in summary["tasks"]:
        for method, reason in row["missing"].items():
            counts[reason, method] = counts.get((reason, method), 0) + 1
    methods: dict[tuple[str, int], list[str]] = {}
    for (reason, method), count in counts.items():
        methods.setdefault((reason, count), []).append(method)
    total = len(summary["tasks"])
    return _lines(f"{', '.join(names)}: {reason}, {n} of {total} tasks" for (reason, n), names in methods.items())


def _remarks(estimates: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Reasons and notes, each once, with the names of what they are about."""
    by_remark: dict[str, dict[str, None]] = {}
    for name, found in estimates:
        for remark in (found.get("reason"), found.get("note")):
            if remark:
                by_remark.setdefault(remark, {})[name] = None
    return _lines(f"{'; '.join(names)}: {remark}" for remark, names in by_remark.items())


def _lines(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
