"""Plots of the benchmark's summary; each takes what `envs.benchmark.report.summary` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROFILED = ("controller", "fixed_schedule", "default", "portfolio_4", "tpe_16", "pbt_16")
SEARCHES = ("halving", "tpe", "pbt", "portfolio")


def draw_budgets(path: Path, summary: Mapping[str, Any]) -> bool:
    """Draws mean test NDCG@10 of searches, over that of the controller, against their budget in runs.

    Args:
      path: a PNG, PDF or SVG file to write.
      summary: as returned.

    Returns:
      Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    curves = {"all tasks": summary["budgets"], **summary["budgets_by_family"]}
    points = {
        name: (found["runs"], found["ratio_to_controller"])
        for name, found in summary["methods"].items()
        if name.startswith(SEARCHES) and found["ratio_to_controller"]["value"] is not None
    }
    if not points and all(found["value"] is None for found in summary["budgets"].values()):
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        known = [(int(n), found) for n, found in curve.items() if found["value"] is not None]
        if known:
            style = {"color": "k", "linewidth": 2.0} if index == 0 else {"color": f"C{index}", "alpha": 0.5}
            label = "random search" if index == 0 else f"random search, {name}"
            runs, estimates = [n for n, _ in known], [found for _, found in known]
            axis.plot(runs, [found["value"] for found in estimates], marker=".", label=label, **style)
            if index == 0:
                low, high = zip(*map(_bounds, estimates), strict=True)
                axis.fill_between(runs, low, high, color="k", alpha=0.12)
    for index, (name, (runs, found)) in enumerate(points.items()):
        low, high = _bounds(found)
        whiskers = [[found["value"] - low], [high - found["value"]]]
        axis.errorbar([runs], [found["value"]], yerr=np.maximum(whiskers, 0.0), fmt="sDv^<>ph"[index % 8], label=name)
    axis.axhline(1.0, color="C3", linestyle="--", label="controller, one run")
    axis.set(xscale="log", xlabel="tuning budget (full training runs)", ylabel="test NDCG@10 over the controller's")
    axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    return True


def draw_tasks(path: Path, summary: Mapping[str, Any]) -> bool:
    """Draws each task's ratio of the controller to the fixed schedule and to best of 64, with intervals over seeds."""
    from matplotlib.figure import Figure

    series = {"ratio_to_fixed_schedule": "fixed schedule", "ratio_to_best_of_64": "best of 64, or what stands for it"}
    rows = [row for row in summary["tasks"] if any(row["measures"][name]["value"] is not None for name in series)]
    if not rows:
        return False
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for index, (name, label) in enumerate(series.items()):
        for place, row in enumerate(rows):
            found = row["measures"][name]
            if found["value"] is not None:
                height = len(rows) - 1 - place + 0.12 - 0.24 * index
                axis.plot(_bounds(found), [height, height], color=f"C{index}")
                axis.plot([found["value"]], [height], "o", markersize=4, color=f"C{index}")
        axis.plot([], [], "o-", color=f"C{index}", label=f"controller over {label}")
    axis.axvline(1.0, color="k", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{row['domain']}, {row['family']}" for row in reversed(rows)], fontsize=8)
    axis.set_xlabel("ratio of mean test NDCG@10")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=120)
    return True


def draw_profile(path: Path, summary: Mapping[str, Any], methods: Sequence[str] = PROFILED) -> bool:
    """Draws performance profiles: the share of tasks on which a method keeps at least a share τ of best of 64."""
    from matplotlib.figure import Figure

    profiles = {name: summary["profile"]["methods"][name] for name in methods if name in summary["profile"]["methods"]}
    if not profiles:
        return False
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    thresholds = summary["profile"]["tau"]
    for index, (name, profile) in enumerate(profiles.items()):
        axis.plot(thresholds, profile["share"], color=f"C{index}", label=f"{name} ({profile['tasks']} tasks)")
        if name == "controller" and None not in profile["low"]:
            axis.fill_between(thresholds, profile["low"], profile["high"], color=f"C{index}", alpha=0.15)
    axis.axvline(1.0, color="k", linewidth=0.8)
    axis.set(xlabel="τ: test NDCG@10 over best of 64", ylabel="share of tasks at τ or better", ylim=(-0.02, 1.02))
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def _bounds(estimate: Mapping[str, Any]) -> tuple[float, float]:
    """Bounds of an estimate; its value where it has none."""
    value = estimate["value"]
    return (value, value) if estimate["low"] is None else (estimate["low"], estimate["high"])
