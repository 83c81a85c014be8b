"""The charts of a run's report: which lines and marks a history gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from metalearn.audit.figures import NUM_SERIES, Chart, Event, Line, Mark
from metalearn.audit.history import History, Taken, Trigger
from metalearn.audit.record import RecordKind
from metalearn.controller.config import CONTROLLED
from metalearn.controller.decision import Configuration, Decision
from metalearn.spaces import CANONICAL_SPACE

STATUS_SHAPES = {
    "applied": "dot",
    "limited": "triangle",
    "held": "square",
    "rejected": "cross",
    "rolled back": "left",
    "fallback": "diamond",
}
PROPOSED = "only proposed"
"""What the modes `shadow` and `frozen` would have done."""
PROPOSED_SHAPE = "ring"
DEGREE_SHAPES = {"watch": "ring", "drift": "triangle", "severe": "diamond"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with the labels of its series, in order; no labels if there is one series that the title names."""

    chart: Chart
    labels: Sequence[str] = ()
    caption: str = ""


class Point(NamedTuple):
    """A measurement at a step; `gone` if the run went back to before it."""

    step: int
    value: float
    gone: bool


def curve_figures(history: History) -> list[Figure]:
    """Draws validation and loss, as far as the log has them, with what was triggered."""
    events = _events(history)
    named = {"validation": "Validation metric, higher is better", "loss": "Training loss, mean of the interval"}
    figures = []
    for name, title in named.items():
        points = _measured(history, name)
        if points:
            figures.append(_curve_figure(f"curve-{name}", title, points, history, events))
    return figures


def trajectory_figures(history: History) -> list[Figure]:
    """Draws each hyperparameter, a line for each parameter group, and the base schedule."""
    decisions = [one.decision for one in history.decisions]
    groups = max(len(decision.intended.groups) for decision in decisions)
    figures: list[Figure] = []
    names = list(dict.fromkeys(name for d in decisions for row in d.intended.groups for name in row))
    for name in sorted(names, key=_rank):
        for first in range(0, groups, NUM_SERIES):
            shown = range(first, min(first + NUM_SERIES, groups))
            figures.append(_trajectory(history, name, shown, len(figures)))
    for name in sorted(dict.fromkeys(name for d in decisions for name in d.intended.run), key=_rank):
        figures.append(_trajectory(history, name, (None,), len(figures)))
    taken = [one for one in history.decisions if math.isfinite(one.decision.schedule)]
    schedule = [Point(one.step, one.decision.schedule, one.superseded) for one in taken]
    if any(point.value != 1.0 for point in schedule):
        title = "Base schedule: its factor on the learning rate"
        figures.append(_curve_figure("trajectory-schedule", title, schedule, history, (), marked=False, zero=True))
    return figures


def improvement_figure(history: History) -> Figure | None:
    """Draws what the outcome model expected of each decision; None if there is no outcome model."""
    marks = []
    for one in history.decisions:
        expected = one.decision.improvement
        if expected is None or not math.isfinite(expected.expected):
            continue
        percent = [100 * value for value in (expected.expected, expected.low, expected.high)]
        marks.append(
            Mark(
                x=one.step,
                y=percent[0],
                low=percent[1],
                high=percent[2],
                shape=shape_of(one.decision)[1],
                title=f"{_when(one)}: {percent[0]:+.2f} % ({percent[1]:+.2f} to {percent[2]:+.2f} %)",
                faint=one.superseded,
            )
        )
    if not marks:
        return None
    chart = Chart(
        key="improvement",
        title="Expected improvement in %",
        description=f"Expected improvement of {len(marks)} decisions with 90 % intervals; the table has the numbers.",
        end=history.end,
        marks=marks,
        zero=True,
    )
    caption = (
        "Relative change of the final metric against not taking the decision, as the outcome model saw it beforehand; "
        "bars are central 90 % intervals."
    )
    return Figure(chart=chart, caption=caption)


def drift_figure(history: History) -> Figure | None:
    """Draws alarms by stream over the run, and what was done about each; None if there were none."""
    drifts = history.of_kind(RecordKind.DRIFT)
    rows = list(dict.fromkeys(str(one.facts.get("stream") or "unnamed") for one in drifts))
    if not rows:
        return None
    marks = [
        Mark(
            x=one.step,
            y=rows.index(str(one.facts.get("stream") or "unnamed")),
            shape=DEGREE_SHAPES.get(str(one.facts.get("degree")), "square"),
            title=f"step {one.step}: {one.facts.get('degree', 'drift')}: {one.sentence}{_response(one)}",
        )
        for one in drifts
    ]
    chart = Chart(
        key="drift",
        title="Drift alarms by stream",
        description=f"{len(marks)} alarms on {', '.join(rows)}; the table below lists them.",
        end=history.end,
        marks=marks,
        rows=rows,
    )
    return Figure(chart=chart)


def cohort_figures(history: History) -> list[Figure]:
    """Draws validation by cohort, if it was logged."""
    names = list(dict.fromkeys(name for one in history.decisions for name in one.cohorts))
    figures = []
    for first in range(0, len(names), NUM_SERIES):
        shown = names[first : first + NUM_SERIES]
        lines = []
        for series, name in enumerate(shown):
            found = [one for one in history.decisions if name in one.cohorts]
            lines += _curve([Point(one.step, one.cohorts[name], one.undone) for one in found], series)
        chart = Chart(
            key=f"cohorts-{first}",
            title="Validation by cohort",
            description=f"Lines for {', '.join(shown)}.",
            end=history.end,
            lines=lines,
        )
        figures.append(Figure(chart=chart, labels=shown))
    return figures


def resource_figures(history: History) -> list[Figure]:
    """Draws throughput and memory, if they were logged."""
    samples = _measured(history, "samples_per_second")
    memory = [point._replace(value=point.value / 2**20) for point in _measured(history, "memory_bytes")]
    shown = {
        "Samples per second": samples,
        "Optimizer steps per second": [] if samples else _steps_per_second(history.decisions),
        "Memory in MiB": memory,
    }
    return [
        _curve_figure(f"resource-{index}", title, points, history, (), zero=True)
        for index, (title, points) in enumerate(shown.items())
        if points
    ]


def shape_of(decision: Decision) -> tuple[str, str]:
    """Returns what a decision's mark is called, and its shape."""
    if decision.proposed is not None and decision.mode in ("shadow", "frozen"):
        return PROPOSED, PROPOSED_SHAPE
    return decision.status, STATUS_SHAPES.get(decision.status, "square")


def _rank(name: str) -> tuple[int, str]:
    return (CONTROLLED.index(name) if name in CONTROLLED else len(CONTROLLED), name)


def _when(one: Taken) -> str:
    return f"decision {one.decision.index} at step {one.step}"


def _events(history: History) -> list[Event]:
    told = {RecordKind.ROLLBACK: "rolled back", RecordKind.DRIFT: "drift", RecordKind.OVERRIDE: "overridden"}
    return [
        Event(x=one.step, kind=one.kind.value, title=f"step {one.step}: {told[one.kind]}: {one.sentence}")
        for one in history.triggers
    ]


def _response(drift: Trigger) -> str:
    response = str(drift.facts.get("response", "none"))
    return "" if response == "none" else f"; response: {response.replace('_', ' ')}"


def _measured(history: History, name: str) -> list[Point]:
    found = [one for one in history.decisions if name in one.measured]
    return [Point(one.step, one.measured[name], one.undone) for one in found]


def _steps_per_second(decisions: Sequence[Taken]) -> list[Point]:
    found = []
    for before, one in pairwise(decisions):
        steps, seconds = one.step - before.step, one.measured.get("seconds", 0.0)
        if steps > 0 and seconds > 0:
            found.append(Point(one.step, steps / seconds, one.undone))
    return found


def _curve_figure(
    key: str,
    title: str,
    points: Sequence[Point],
    history: History,
    events: Sequence[Event],
    *,
    marked: bool = True,
    zero: bool = False,
) -> Figure:
    marks = [
        Mark(x=step, y=value, shape="dot", title=f"step {step}: {value:.6g}", faint=gone)
        for step, value, gone in points
    ]
    values = [point.value for point in points]
    counts = Counter(event.kind for event in events)
    chart = Chart(
        key=key,
        title=title,
        description=(
            f"{len(points)} points, from {values[0]:.4g} at step {points[0].step} to {values[-1]:.4g} at step "
            f"{points[-1].step}, between {min(values):.4g} and {max(values):.4g}."
            + "".join(f" {kind.capitalize()}s marked: {count}." for kind, count in counts.items())
        ),
        end=history.end,
        lines=_curve(points, 0),
        marks=marks if marked else (),
        events=events,
        zero=zero,
    )
    letters = ", ".join(f"{kind[0].upper()} {kind}" for kind in counts)
    return Figure(chart=chart, caption=f"{letters}: listed below." if letters else "")


def _curve(points: Sequence[Point], series: int) -> list[Line]:
    """Returns a line through what the run kept, and faint ones through what it went back from."""
    kept = [(point.step, point.value) for point in points if not point.gone]
    pieces: list[list[tuple[float, float]]] = []
    before: Point | None = None
    for point in points:
        here = (float(point.step), point.value)
        forward = before is not None and before.step <= point.step
        if point.gone and forward and before is not None and before.gone:
            pieces[-1].append(here)
        elif point.gone:
            pieces.append([(before.step, before.value), here] if forward and before is not None else [here])
        before = point
    return [Line(points=kept, series=series), *(Line(points=piece, series=series, faint=True) for piece in pieces)]


def _trajectory(history: History, name: str, groups: Sequence[int | None], number: int) -> Figure:
    """Draws one hyperparameter of some parameter groups, or with None of the whole run."""
    lines: list[Line] = []
    marks: list[Mark] = []
    for series, group in enumerate(groups):
        read = _reader(name, group)
        lines += _held(history.decisions, read, series)
        label = name if group is None else f"{name}[{group}]"
        marks += [_decision_mark(one, read, label, series) for one in history.decisions]
    last = history.decisions[-1].decision
    ends = [f"{_reader(name, group)(last.intended):.4g}" for group in groups]
    is_log = name in CANONICAL_SPACE and CANONICAL_SPACE[name].scale == "log"
    chart = Chart(
        key=f"trajectory-{number}",
        title=name.replace("_", " ").capitalize() + (", peak of the schedule" if name == "learning_rate" else ""),
        description=f"{name} over {len(history.decisions)} decisions; at the end {', '.join(ends)}.",
        end=history.end,
        lines=lines,
        marks=marks,
        log=is_log,
    )
    labels = [] if groups[0] is None else [f"group {group}" for group in groups]
    return Figure(chart=chart, labels=labels if len(labels) > 1 else ())


def _reader(name: str, group: int | None) -> Callable[[Configuration], float]:
    """Returns what reads one value; NaN where there is none."""

    def read(configuration: Configuration) -> float:
        if group is None:
            return configuration.run.get(name, math.nan)
        return configuration.groups[group].get(name, math.nan) if group < len(configuration.groups) else math.nan

    return read


def _held(decisions: Sequence[Taken], read: Callable[[Configuration], float], series: int) -> list[Line]:
    """Returns steps of what was in force; faint ones of what was gone back from, or in shadow mode would have been."""
    kept: list[tuple[float, float]] = []
    lost: list[list[tuple[float, float]]] = []
    for one in decisions:
        shadow = one.decision.mode == "shadow"
        value = read(one.decision.intended if shadow else one.decision.in_force)
        piece = [(float(one.step), value), (float(one.until), value)]
        if not (one.superseded or shadow):
            kept += piece
        elif lost and lost[-1][-1][0] == one.step:
            lost[-1] += piece
        else:
            lost.append(piece)
    return [Line(points=kept, series=series), *(Line(points=piece, series=series, faint=True) for piece in lost)]


def _decision_mark(one: Taken, read: Callable[[Configuration], float], label: str, series: int) -> Mark:
    status, shape = shape_of(one.decision)
    value = read(one.decision.intended)
    return Mark(
        x=one.step,
        y=value,
        shape=shape,
        title=f"{_when(one)}, {status}: {label} = {value:.4g}",
        series=series,
        faint=one.superseded,
    )
