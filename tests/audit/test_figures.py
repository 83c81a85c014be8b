"""Charts: every point on them, round ticks, colours that can be told from their ground."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metalearn.audit.figures import STYLE, Chart, Event, Line, Mark, draw_chart, tick_values


@given(
    values=st.lists(st.floats(), max_size=6),
    log=st.booleans(),
    zero=st.booleans(),
    end=st.integers(1, 10**9),
)
def test_every_point_lies_on_the_chart(values: list[float], log: bool, zero: bool, end: int):
    points = [(end * index / 7, value) for index, value in enumerate(values)]
    marks = [Mark(x=x, y=y, shape="dot", title="t", low=y, high=y) for x, y in points]
    events = [Event(x=end, kind="rollback", title="<r>"), Event(x=0, kind="drift", title="d")]
    chart = Chart(
        key="k",
        title="<t>",
        description="&",
        end=end,
        lines=[Line(points=points)],
        marks=marks,
        log=log,
        zero=zero and not log,
        events=events,
    )
    root = ElementTree.fromstring(draw_chart(chart))
    assert "nan" not in ElementTree.tostring(root, "unicode") and "inf" not in ElementTree.tostring(root, "unicode")
    spots = [re.findall(r"-?[\d.]+", g.get("transform") or "") for g in root.iter("g") if g.get("transform")]
    places = np.array(spots, float).reshape(-1, 2)
    assert ((places >= 0) & (places <= (480, 250))).all()
    drawn = [value for value in values if abs(value) < 1e100 and (value > 1e-100 or not log)]
    assert len(places) == len(drawn)
    assert (np.diff(places[:, 1])[np.diff(drawn) > 0] <= 0.011).all()  # what is higher is not drawn lower


@given(low=st.floats(1e-8, 1e8), ratio=st.floats(1.001, 1e12), log=st.booleans())
@example(low=2.0, ratio=50_001.0, log=True)  # five decades, of which every second one would leave two
def test_ticks_are_round_and_within_the_axis(low: float, ratio: float, log: bool):
    high = low * ratio
    ticks = tick_values(low, high, log=log)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    slack = 1e-6 * (high - low)
    assert low - slack <= ticks[0] and ticks[-1] <= high + slack


def luminance(color: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    digits = color if len(color) == 6 else "".join(2 * c for c in color)
    parts = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough(scheme: int):
    block = re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)[scheme]
    colors = {name: luminance(value) for name, value in re.findall(r"--(\w+):#([0-9a-f]{3,6})", block)}

    def contrast(one: str, other: str) -> float:
        low, high = sorted((colors[one], colors[other]))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card"):
        assert min(contrast(name, ground) for name in ("ink", "soft", "alert", "c0")) >= 4.5  # text
        assert min(contrast(f"c{series}", ground) for series in range(6)) >= 3.0  # lines
