"""The checkpoint that ships: what it was trained on starts by the domain, what it was not keeps to its base."""

from __future__ import annotations

import json

import pytest

from metalearn.controller import CONTROLLED, load_controller
from tests.golden_decisions import ROOT
from tests.intervals import make_interval, make_profile
from tests.recorded_run import load_recorded_run

BASES = json.loads((ROOT / "checkpoints" / "default" / "bases.json").read_text())["bases"]
"""Of families at rest: those that were given to meta-training."""
HORIZONS = {"known": 1000, "unknown": None}


def test_families_at_rest():
    config = load_controller().config
    assert set(config.at_rest) == {*BASES, "two_tower"}  # which validation spoke against
    assert set(config.families) - set(config.at_rest) == {"matrix_factorization"}
    assert config.cued == ("self_attention",)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("family", BASES)
def test_a_family_at_rest_keeps_to_its_base(family: str, horizon: str):
    session = load_controller().start(make_profile(), family=family, horizon=HORIZONS[horizon], batch_size=64)
    start = session.ask()
    values = {**start.groups[0], **start.run}
    assert {name: values[name] for name in CONTROLLED} == pytest.approx(BASES[family][horizon], rel=1e-4, abs=1e-6)
    assert family in start.reasons[0]
    decisions = [session.tell(make_interval(1)) for _ in range(5)]
    cued = family in load_controller().config.cued
    assert {decision.status for decision in (start, *decisions)} == {"applied" if cued else "fallback"}
    assert all((decision.groups, decision.run) == (start.groups, start.run) for decision in decisions)
    risen = [session.tell(make_interval(1, validation=0.1 * 1.5**index)) for index in range(5)]
    assert (risen[-1].groups != start.groups) == cued


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("family", ["matrix_factorization", None])
def test_other_runs_start_by_the_domain(family: str | None, horizon: str):
    controller = load_controller()
    config, told = controller.config, int(horizon == "known")
    session = controller.start(load_recorded_run().profile, family=family, horizon=HORIZONS[horizon], batch_size=64)
    start = session.ask()
    assert start.status == "applied" and start.confidence > 0.2
    base = controller.checkpoint.base[config.family_index(family), told]
    values = {**start.groups[0], **start.run}
    shift = [config.space[name].encode(values[name]) - base[index] for index, name in enumerate(CONTROLLED)]
    assert max(map(abs, shift)) > 0.01
