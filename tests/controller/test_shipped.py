"""The checkpoint that ships: its policy is the golden one's, its bases are those of the file beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from metalearn.controller import CONTROLLED, load_checkpoint, load_controller
from tests.golden_decisions import ROOT, golden_checkpoint
from tests.intervals import make_interval, make_profile

CONTENT = json.loads((ROOT / "checkpoints" / "default" / "bases.json").read_text())
BASES = CONTENT["bases"]


def test_in_run_policy_is_the_one_that_was_meta_trained():
    shipped, trained = load_controller().checkpoint, load_checkpoint(golden_checkpoint(1))
    for name, tensor in trained.network.items():
        if not name.startswith(("modifier/", "family")):
            np.testing.assert_array_equal(shipped.network[name], tensor, err_msg=name)
    assert not shipped.network["family"].any()


@pytest.mark.parametrize("horizon", ["known", "unknown"])
@pytest.mark.parametrize("family", BASES)
def test_a_run_starts_at_its_familys_base(family: str, horizon: str):
    controller = load_controller()
    session = controller.start(
        make_profile(),
        family=None if family == "other" else family,
        horizon=1000 if horizon == "known" else None,
        batch_size=64,
    )
    decision = session.ask()
    values = {**decision.groups[0], **decision.run}
    assert {name: values[name] for name in CONTROLLED} == pytest.approx(BASES[family][horizon], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", CONTENT["at_rest"])
def test_a_family_at_rest_keeps_to_its_base(family: str):
    session = load_controller().start(make_profile(), family=family, horizon=1000, batch_size=64)
    start = session.ask()
    decisions = [session.tell(make_interval(1)) for _ in range(5)]
    assert {decision.status for decision in (start, *decisions)} == {"fallback"}
    assert all((decision.groups, decision.run) == (start.groups, start.run) for decision in decisions)
    assert family in start.reasons[0]
