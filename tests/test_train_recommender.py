"""scripts/train_recommender.py on a file of somebody's own: a small one is trained on too, and all is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metalearn.audit import read_decisions, verify


def write_interactions(path: Path, rows: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 30, rows), (12 * rng.beta(1, 2, rows)).astype(int)
    lines = [f"u{u},i{i},{1_700_000_000 + 60 * t}" for t, (u, i) in enumerate(zip(user, item, strict=True))]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")


def test_a_small_file_is_trained_on_three_ways_with_batches_of_an_eighth_of_it(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data, output = tmp_path / "shop.csv", tmp_path / "runs"
    write_interactions(data, 400)
    arguments = ["--data", data, "--split", "leave-last-out", "--steps", "40", "--seeds", "2", "--output", output]
    monkeypatch.setattr(sys, "argv", ["train_recommender.py", *map(str, arguments)])
    scripts("train_recommender").main()
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    record = json.loads((output / "results.json").read_text())
    size = record["settings"]["batch_size"]
    assert 10 < size < 50 and f"40 steps of {size} " in printed
    assert len(record["trials"]) == 6 and all(trial["status"] == "complete" for trial in record["trials"])
    means = {arm: np.mean(found["test_ndcg@10"]) for arm, found in record["arms"].items()}
    assert figures["test_ndcg@10"] == pytest.approx(means) and set(means) == {"controller", "fixed", "default"}
    assert all(value > 0.0 for value in means.values())
    assert verify(output / "decisions.jsonl").records > 20
    assert {row["name"] for row in read_decisions(output / "decisions.jsonl")} == {"controller-0", "controller-1"}
    assert (output / "trajectories.png").stat().st_size > 1000
