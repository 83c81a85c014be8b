"""The picture of a controlled run: hyperparameters under the validation curves they led to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.controller.config import GLOBAL_CONTROLLED, GROUP_CONTROLLED
from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError

Curve = Sequence[tuple[int, float]]
"""(optimizer step, metric) at each validation."""
POINTS = 400
"""Points at which a learning rate, which changes every step, is drawn."""


def draw_trajectories(
    path: str | Path,
    decisions: Sequence[Decision],
    curves: Mapping[str, Sequence[Curve]],
    *,
    multiplier: Callable[[int], float],
    metric: str = "validation metric",
) -> Path:
    """Draws validation curves, and under them each hyperparameter of one controlled run, group by group.

    Args:
      path: a PNG, PDF or SVG file to write.
      decisions: of the controlled run, in order.
      curves: label to the validation curves of its runs; the last label is the controller's.
      multiplier: the base schedule's factor on the learning rate at a step, as `MetaScheduler.multiplier`.
      metric: label of the curves' axis.

    Returns:
      The path.

    Raises:
      InvalidArgumentError: there are no decisions or no curves.
    """
    if not decisions or not curves:
        raise InvalidArgumentError("`decisions` and `curves` must not be empty; draw a run that has been validated")
    from matplotlib.figure import Figure

    first, last = decisions[0], max(step for runs in curves.values() for curve in runs for step, _ in curve)
    names = [n for n in GROUP_CONTROLLED if n in first.groups[0]] + [n for n in GLOBAL_CONTROLLED if n in first.run]
    figure = Figure(figsize=(8, 2.6 + 1.5 * len(names)), layout="constrained")
    axes = figure.subplots(1 + len(names), 1, sharex=True, height_ratios=[2] + [1] * len(names), squeeze=False)[:, 0]
    for index, (label, runs) in enumerate(curves.items()):
        for run, curve in enumerate(runs):
            steps, values = zip(*curve, strict=True)
            axes[0].plot(steps, values, color=f"C{index}", alpha=0.8, label=label if run == 0 else None)
    axes[0].set_ylabel(metric)
    axes[0].legend(frameon=False)
    for axis, name in zip(axes[1:], names, strict=True):
        _draw_hyperparameter(axis, name, decisions, last, multiplier)
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)
    return Path(path)


def _draw_hyperparameter(
    axis: Any, name: str, decisions: Sequence[Decision], last: int, multiplier: Callable[[int], float]
) -> None:
    """Draws one hyperparameter: a line for each group, steps where it holds between decisions."""
    axis.set_ylabel(name, fontsize=9)
    if name in ("learning_rate", "weight_decay"):
        axis.set_yscale("log")
    edges = [decision.step for decision in decisions if decision.step < last] + [last]
    decisions = decisions[: len(edges) - 1]
    if name in decisions[0].run:
        axis.stairs([decision.run[name] for decision in decisions], edges, baseline=None, color="k")
        return
    for group in range(len(decisions[0].groups)):
        style = {"label": f"group {group}", "color": f"C{3 + group}"}
        held = [decision.groups[group][name] for decision in decisions]
        if name != "learning_rate":
            axis.stairs(held, edges, baseline=None, **style)
            continue
        steps = range(0, last, max(1, last // POINTS))
        in_force = [max(i for i, edge in enumerate(edges[:-1]) if edge <= step) for step in steps]
        axis.plot(steps, [held[i] * multiplier(step) for i, step in zip(in_force, steps, strict=True)], **style)
    if len(decisions[0].groups) > 1:
        axis.legend(frameon=False, fontsize=8)
