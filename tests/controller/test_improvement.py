"""What a decision is expected to bring: the outcome model in a checkpoint, asked by a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metalearn import Controller, load_controller
from metalearn.controller.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from metalearn.controller.decision import Decision
from metalearn.controller.outcome import PREFIX, OutcomeConfig
from metalearn.errors import CheckpointError
from tests.controllers import acting_controller
from tests.intervals import make_profile, random_intervals

ARCHITECTURE = OutcomeConfig(num_members=3, hidden_sizes=(8, 6))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = acting_controller(tmp_path_factory.mktemp("outcome") / "controller.safetensors")
    plain, rng = load_checkpoint(path), np.random.default_rng(0)
    shapes = ARCHITECTURE.shapes(plain.config)
    outcome = {name: rng.normal(0.0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    outcome |= {f"{PREFIX}target": np.float32([0.3, 0.2]), f"{PREFIX}temperature": np.float32([1.0, 1.0])}
    return replace(plain, outcome=outcome)


def test_a_checkpoint_brings_its_outcome_model(checkpoint: Checkpoint, tmp_path: Path):
    loaded = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "controller.safetensors"))
    assert loaded.outcome.keys() == checkpoint.outcome.keys()
    for name, value in checkpoint.outcome.items():
        np.testing.assert_array_equal(loaded.outcome[name], value)


def test_an_outcome_model_that_lacks_a_tensor_is_refused(checkpoint: Checkpoint, tmp_path: Path):
    lacking = {name: value for name, value in checkpoint.outcome.items() if name != f"{PREFIX}head/bias"}
    path = save_checkpoint(replace(checkpoint, outcome=lacking), tmp_path / "controller.safetensors")
    with pytest.raises(CheckpointError, match="outcome/head/bias"):
        load_checkpoint(path)


@pytest.mark.parametrize("horizon", [None, 1000])
def test_every_decision_has_an_expected_improvement(checkpoint: Checkpoint, horizon: int | None):
    session = Controller(checkpoint).start(make_profile(), roles=("embedding", "dense"), horizon=horizon, batch_size=64)
    decisions = [session.ask(), *(session.tell(statistics) for statistics in random_intervals(4))]
    for decision in decisions:
        improvement = decision.improvement
        assert improvement is not None
        assert improvement.low < improvement.expected < improvement.high
        assert improvement.low > -1.0
        assert 0.0 < improvement.probability < 1.0
        assert Decision.from_dict(decision.as_dict()).improvement == improvement
    assert len({decision.improvement for decision in decisions}) == len(decisions)


def test_what_changes_nothing_is_expected_to_bring_nothing(checkpoint: Checkpoint):
    network = {
        name: np.zeros_like(value) if name.split("/")[0] in ("modifier", "group_head", "run_head") else value
        for name, value in checkpoint.network.items()
    }
    session = Controller(replace(checkpoint, network=network)).start(make_profile(), horizon=1000, batch_size=64)
    for decision in (session.ask(), *(session.tell(statistics) for statistics in random_intervals(2, num_groups=1))):
        assert decision.improvement is not None
        assert decision.improvement.expected == pytest.approx(0.0, abs=1e-12)
        assert decision.improvement.probability == pytest.approx(0.5, abs=1e-9)


def test_a_controller_without_outcome_model_expects_nothing(tmp_path: Path):
    controller = load_controller(acting_controller(tmp_path / "controller.safetensors"))
    decision = controller.start(make_profile(), horizon=1000).ask()
    assert decision.improvement is None
    assert decision.as_dict()["improvement"] is None
