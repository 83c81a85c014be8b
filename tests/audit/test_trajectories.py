"""The picture of a controlled run."""

from __future__ import annotations

import pytest

from metalearn.audit import draw_trajectories
from metalearn.controller import Decision
from metalearn.errors import InvalidArgumentError


def _decision(index: int, **run: float) -> Decision:
    groups = tuple({"learning_rate": 0.01 * (g + 1), "weight_decay": 0.1} for g in range(2))
    return Decision(
        index=index,
        step=10 * index,
        status="applied",
        groups=groups,
        run=run,
        schedule=1.0,
        confidence=1.0,
        reasons_fn=lambda: (),
    )


@pytest.mark.parametrize("run", [{}, {"dropout": 0.2}])
def test_draws_what_the_run_controlled(tmp_path, run):
    decisions = [_decision(index, **run) for index in range(4)]
    curves = {"default": [[(10, 0.1), (30, 0.2)]], "controller": [[(10, 0.2), (30, 0.3)]]}
    path = draw_trajectories(tmp_path / "run.svg", decisions, curves, multiplier=lambda step: 1 - step / 40)
    text = path.read_text()
    assert "<svg" in text and len(text) > 5_000
    assert not (tmp_path / "run.png").exists()


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(InvalidArgumentError, match="must not be empty"):
        draw_trajectories(tmp_path / "run.png", [], {"a": [[(1, 0.1)]]}, multiplier=lambda step: 1.0)
