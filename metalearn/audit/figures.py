"""Line charts as inline SVG: text stays text, colours come from the page's style sheet, each mark says what it is.

A chart is drawn in user units, `WIDTH` by `HEIGHT`, and scales with the page. Series are told apart by colour and dash,
marks by shape; `STYLE` holds the colours (Okabe and Ito, "Color Universal Design", 2008, darkened where a thin line on
white needs it), one set for light and one for dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 34
ABSURD = 1e100
ROW = 15
"""Height of a row of letters that name the events."""
NUM_SERIES = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2")

STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--page:#fff;--card:#f6f8fa;--line:#d0d7de;--alert:#a40e26;--good:#116329;
--c0:#0072b2;--c1:#c24e00;--c2:#00795a;--c3:#a8457f;--c4:#7a5d00;--c5:#4b4f56}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b3;--page:#0d1117;--card:#161b22;--line:#3d444d;
--alert:#ff8182;--good:#56d364;--c0:#56b4e9;--c1:#e69f00;--c2:#2bc49a;--c3:#e08fc0;--c4:#f0e442;--c5:#b8c0ca}}
.chart{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
.chart text{fill:var(--soft)}.chart .axis{stroke:var(--line);fill:none}
.chart .series{fill:none;stroke-width:1.8}.chart .faint{opacity:.45;stroke-width:1.2}
.chart .mark{stroke-width:1.6;fill:var(--page)}.chart .solid{fill:currentColor}.chart .mark,.series{stroke:currentColor}
.chart .event line{stroke:var(--ink);stroke-width:1}.chart .event text{fill:var(--ink);font-weight:700}
.chart .rollback line{stroke:var(--alert)}.chart .rollback text{fill:var(--alert)}
.chart .drift line{stroke-dasharray:5 3}.chart .override line{stroke-dasharray:1.5 3}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
@media (max-width:34rem){.chart{font-size:15px}}
"""

SHAPES = {
    "dot": "M-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0z",
    "ring": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.6-3.6H3.6V3.6H-3.6z",
    "triangle": "M0-5L4.6 3.6H-4.6z",
    "left": "M-5 0L3.6-4.6V4.6z",
    "cross": "M-4-4L4 4M-4 4L4-4",
    "diamond": "M0-5.4L5.4 0L0 5.4L-5.4 0z",
}
"""Outlines around the origin."""
FILLED = frozenset({"dot", "diamond", "left"})


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points, in the colour of its series; `faint` for what was gone back from."""

    points: Sequence[tuple[float, float]]
    series: int = 0
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A shape of `SHAPES` at a point, in the colour of its series, that says what it is when pointed at.

    Args:
      x, y: the point.
      shape: of `SHAPES`.
      title: what it is, in words.
      series: whose colour it has.
      faint: what was gone back from.
      low, high: ends of a bar through it; NaN for none.
    """

    x: float
    y: float
    shape: str
    title: str
    series: int = 0
    faint: bool = False
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Event:
    """A vertical line at a step, under a letter.

    Args:
      x: the step.
      kind: class of its style, the first letter of which is its letter.
      title: what it is, in words.
    """

    x: float
    kind: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is on a chart.

    Args:
      key: its id on the page.
      title: what it shows.
      description: the same for who cannot see it: what the lines do.
      end: the last step, at which the horizontal axis ends; above 0.
      lines, marks, events: see there.
      log: whether the vertical axis is logarithmic; then only values above 0 are drawn.
      zero: whether the vertical axis includes 0, with a line at it.
      rows: names of rows 0, 1, ... that stand in for the vertical axis.
    """

    key: str
    title: str
    description: str
    end: int
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    events: Sequence[Event] = ()
    log: bool = False
    zero: bool = False
    rows: Sequence[str] = ()


def draw_chart(chart: Chart) -> str:
    """Draws a chart.

    Args:
      chart: what is on it; every text in it is escaped here.

    Returns:
      An `svg` element, with a title and a description.

    Example:
      >>> line = Line(points=[(0, 0.1), (10, 0.4)])
      >>> svg = draw_chart(Chart(key="ndcg", title="NDCG@10", description="rises", end=10, lines=[line]))
      >>> svg.startswith('<svg class="chart" role="img"')
      True
    """
    kinds = list(dict.fromkeys(event.kind for event in chart.events))
    top = TOP + ROW * len(kinds)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(step / chart.end, 1.0)

    lines = [line for line in chart.lines if len(line.points) > 0]
    values = [
        *(y for line in lines for _, y in line.points),
        *(value for mark in chart.marks for value in (mark.y, mark.low, mark.high)),
    ]
    bounds = [value for value in values if _drawable(value, chart)]
    y, ticks = _vertical(chart, bounds, top)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{chart.key}-t {chart.key}-d">',
        f'<title id="{chart.key}-t">{readable(chart.title)}</title>',
        f'<desc id="{chart.key}-d">{readable(chart.description)}</desc>',
        *_axes(chart, x, y, ticks, top),
        *_events(chart.events, kinds, x),
        *(_line(line, chart, x, y) for line in lines),
        *(_mark(mark, x, y) for mark in chart.marks if _drawable(mark.y, chart)),
        "</svg>",
    ]
    return "".join(parts)


def readable(text: object) -> str:
    """Returns a text for a page: markup in it is escaped, what cannot be printed or turns the line round is replaced.

    >>> readable("<b>rate & decay</b>\\x00")
    '&lt;b&gt;rate &amp; decay&lt;/b&gt;\ufffd'
    """
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text)))


def tick_values(low: float, high: float, *, log: bool = False) -> list[float]:
    """Returns round values within bounds: 2 to 8 of them, evenly spaced unless `log` spans enough decades.

    >>> tick_values(0.0, 10.0)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> tick_values(0.001, 0.2, log=True)
    [0.001, 0.01, 0.1]
    """
    from matplotlib.ticker import MaxNLocator

    if log and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 8)]
    inside = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    margin = (high - low) * 1e-9
    return [float(value) for value in inside if low - margin <= value <= high + margin]


def swatch(series: int, shape: str | None = None) -> str:
    """Draws a key for a legend: a piece of a series' line, or a mark."""
    if shape is None:
        inside = f'<path class="series" d="M0 6H26"{_dash(series)}/>'
    else:
        inside = f'<path class="mark{_solid(shape)}" transform="translate(13 6)" d="{SHAPES[shape]}"/>'
    return f'<svg class="chart key c{series % NUM_SERIES}" viewBox="0 0 26 12" aria-hidden="true">{inside}</svg>'


def _drawable(value: float, chart: Chart) -> bool:
    """Whether a value has a place on the vertical axis; absurd ones would leave no room for the others."""
    return abs(value) < ABSURD and (value > 1 / ABSURD or not chart.log)


def _vertical(
    chart: Chart, bounds: Sequence[float], top: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Returns the vertical scale, and its ticks with their labels."""
    bottom = HEIGHT - BOTTOM
    if chart.rows:
        height = (bottom - top) / len(chart.rows)
        return lambda row: top + (row + 0.65) * height, []
    bounds = [*bounds, 0.0] if chart.zero or not bounds else bounds
    low, high = min(bounds), max(bounds)
    if chart.log and bounds and low > 0:
        pad = max((high / low) ** 0.06, 1.05)
        low, high = low / pad, high * pad
        span = math.log(high / low)

        def y(value: float) -> float:
            return bottom - (bottom - top) * math.log(value / low) / span

    else:
        pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        low, high = low - pad, high + pad

        def y(value: float) -> float:
            return bottom - (bottom - top) * (value - low) / (high - low)

    return y, [(y(value), f"{value:.6g}") for value in tick_values(low, high, log=chart.log and low > 0)]


def _axes(
    chart: Chart,
    x: Callable[[float], float],
    y: Callable[[float], float],
    ticks: Sequence[tuple[float, str]],
    top: float,
) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {_f(at)}H{right}"/>' for at, _ in ticks]
    parts += [f'<text x="{LEFT - 6}" y="{_f(at + 4)}" text-anchor="end">{label}</text>' for at, label in ticks]
    for row, name in enumerate(chart.rows):
        parts.append(f'<path class="axis" d="M{LEFT} {_f(y(row))}H{right}"/>')
        parts.append(f'<text x="{LEFT}" y="{_f(y(row) - 10)}">{readable(name)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {_f(top)}V{bottom}H{right}"/>')
    if chart.zero:
        parts.append(f'<path class="axis" style="stroke:var(--soft)" d="M{LEFT} {_f(y(0.0))}H{right}"/>')
    for step in tick_values(0, chart.end):
        if step == int(step):
            anchor = "end" if x(step) > right - 20 else "middle"
            parts.append(f'<text x="{_f(x(step))}" y="{bottom + 15}" text-anchor="{anchor}">{int(step)}</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">optimizer step</text>')
    return parts


def _events(events: Sequence[Event], kinds: Sequence[str], x: Callable[[float], float]) -> list[str]:
    parts = []
    for event in events:
        at, row = _f(x(event.x)), TOP + ROW * kinds.index(event.kind)
        parts.append(
            f'<g class="event {readable(event.kind)}"><title>{readable(event.title)}</title>'
            f'<text x="{at}" y="{row + 4}" text-anchor="middle">{readable(event.kind[:1].upper())}</text>'
            f'<line x1="{at}" x2="{at}" y1="{row + 6}" y2="{HEIGHT - BOTTOM}"/></g>'
        )
    return parts


def _line(line: Line, chart: Chart, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    points = [(step, value) for step, value in line.points if _drawable(value, chart)]
    path = "L".join(f"{_f(x(step))} {_f(y(value))}" for step, value in points)
    faint = " faint" if line.faint else ""
    return f'<path class="series{faint} c{line.series % NUM_SERIES}" d="M{path}"{_dash(line.series)}/>' if path else ""


def _mark(mark: Mark, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    bar, at = "", x(mark.x)
    if math.isfinite(mark.low) and math.isfinite(mark.high):
        low, high = _f(y(mark.low) - y(mark.y)), _f(y(mark.high) - y(mark.y))
        bar = f'<path class="series" d="M0 {low}V{high}M-3 {low}H3M-3 {high}H3"/>'
    faint = ' style="opacity:.5"' if mark.faint else ""
    return (
        f'<g class="c{mark.series % NUM_SERIES}" transform="translate({_f(at)} {_f(y(mark.y))})"{faint}>'
        f"<title>{readable(mark.title)}</title>{bar}"
        f'<path class="mark{_solid(mark.shape)}" d="{SHAPES[mark.shape]}"/></g>'
    )


def _solid(shape: str) -> str:
    return " solid" if shape in FILLED else ""


def _dash(series: int) -> str:
    dash = DASHES[series % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _f(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
