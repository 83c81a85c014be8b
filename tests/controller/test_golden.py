"""Checkpoints of old formats: they load, with the same base, and decide what they decided then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from metalearn import load_controller
from metalearn.controller import CONTROLLED, load_checkpoint, save_checkpoint
from metalearn.controller.checkpoint import FORMAT_VERSION
from metalearn.controller.outcome import input_names
from metalearn.errors import CheckpointError, InvalidArgumentError
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES
from tests.golden_decisions import NUM_INTERVALS, decide, golden_checkpoint, recorded_decisions
from tests.intervals import make_profile

FORMAT_1 = golden_checkpoint(1)


def raw(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file without the loader."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + length])["__metadata__"]


def test_format_1_has_one_base_for_every_model():
    tensors, header = raw(FORMAT_1)
    checkpoint = load_checkpoint(FORMAT_1)
    assert header["format_version"] == "1"
    assert "families" not in json.loads(header["config"])
    assert checkpoint.config.families == ()
    assert checkpoint.base.shape == (1, 2, len(CONTROLLED))
    np.testing.assert_array_equal(checkpoint.base[0], tensors["prior/base"])
    # As its model card said: unknown horizon, known horizon.
    for row, card in zip(
        checkpoint.base[0].tolist(), [(0.00213, 0.1786, 0.6154, 0.000142), (0.01, 0.3, 0.8, 0.01)], strict=True
    ):
        values = [checkpoint.config.space[name].decode(unit) for name, unit in zip(CONTROLLED, row, strict=True)]
        assert values == pytest.approx(card, rel=1e-3)
    assert not checkpoint.network["family"].any()
    for name, tensor in tensors.items():
        if name.startswith("network/") and name != "network/mix/kernel":
            np.testing.assert_array_equal(checkpoint.network[name.removeprefix("network/")], tensor)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_what_formats_before_5_did_not_know_has_no_weight(version: int):
    tensors, header = raw(golden_checkpoint(version))
    checkpoint = load_checkpoint(golden_checkpoint(version))
    known = json.loads(header["feature_schema"])
    added = [name for name in GLOBAL_FEATURES if name not in known["run"]]
    assert added == ["generalization_gap"]
    row = len(GROUP_FEATURES) + GLOBAL_FEATURES.index(added[0])
    mix = checkpoint.network["mix/kernel"]
    assert not mix[row].any()
    np.testing.assert_array_equal(np.delete(mix, row, 0), tensors["network/mix/kernel"])
    np.testing.assert_array_equal(checkpoint.normalizer.run[:-1], tensors["normalizer/run"])
    if "outcome/hidden_0/kernel" not in tensors:
        return
    names = input_names(checkpoint.config)
    column, hidden = names.index(f"run_{added[0]}"), tensors["outcome/head/kernel"].shape[1] - len(names) + 1
    for name, place in (("hidden_0", column), ("head", hidden + column)):
        kernel = checkpoint.outcome[f"outcome/{name}/kernel"]
        assert not kernel[:, place].any()
        np.testing.assert_array_equal(np.delete(kernel, place, 1), tensors[f"outcome/{name}/kernel"])


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_it_decides_what_it_decided(version: int):
    decided, recorded = decide(load_controller(golden_checkpoint(version))), recorded_decisions(version)
    assert decided.keys() == recorded.keys()
    for name, decisions in recorded.items():
        assert len(decided[name]) == len(decisions) == 1 + NUM_INTERVALS
        assert decisions[0]["groups"] != decisions[-1]["groups"]
        for mine, theirs in zip(decided[name], decisions, strict=True):
            assert mine["status"] == theirs["status"]
            for value, wanted in zip([*mine["groups"], mine["run"]], [*theirs["groups"], theirs["run"]], strict=True):
                assert value == pytest.approx(wanted, rel=1e-9)
            for key in ("schedule", "confidence"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-9)


def test_format_1_knows_no_family():
    controller = load_controller(FORMAT_1)
    with pytest.raises(InvalidArgumentError, match=r"`family` must be one of \[\], .* or None for any other"):
        controller.start(make_profile(), family="matrix_factorization")


def test_the_rate_of_formats_1_and_2_decays_to_nothing():
    for version in (1, 2):
        controller = load_controller(golden_checkpoint(version))
        session = controller.start(make_profile(), horizon=1000)
        assert [session.multiplier(step) for step in (0, 500, 999, 1000)] == pytest.approx([1, 0.5, 0, 0.1], abs=1e-5)
    assert controller.config.decay_to == 0.0


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_old_format_written_again_is_the_current_one(tmp_path: Path, version: int):
    checkpoint = load_checkpoint(golden_checkpoint(version))
    again = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "controller.safetensors"))
    assert raw(tmp_path / "controller.safetensors")[1]["format_version"] == FORMAT_VERSION
    assert again.config == checkpoint.config
    assert dict(again.provenance) == dict(checkpoint.provenance)
    np.testing.assert_array_equal(again.base, checkpoint.base)
    assert again.network.keys() == checkpoint.network.keys()
    assert all(np.array_equal(again.network[name], value) for name, value in checkpoint.network.items())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_format_1_is_checked_as_a_whole_before_it_is_migrated(tmp_path: Path, share: float):
    content = bytearray(FORMAT_1.read_bytes())
    content[round(share * len(content))] ^= 1
    path = tmp_path / "controller.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
