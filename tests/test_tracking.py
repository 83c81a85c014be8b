"""Weights & Biases: offline by default, in the folder given, and what is logged of a run."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from metalearn.controller import Decision
from metalearn.tracking import Tracker


class FakeRun:
    """Records what is logged."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.logged, self.artifacts, self.finished = arguments, [], [], 0

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        self.logged.append((values, step))

    def log_artifact(self, artifact: FakeArtifact) -> None:
        self.artifacts.append(artifact)

    def finish(self) -> None:
        self.finished += 1


class FakeArtifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.files = name, type, []

    def add_file(self, path: str) -> None:
        self.files.append(path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Stand in for `wandb`, and list the runs that were started."""
    started: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        started.append(FakeRun(arguments))
        return started[-1]

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings, fake.Artifact = init, dict, FakeArtifact  # type: ignore[attr-defined]
    fake.Histogram = lambda np_histogram: ("histogram", *np_histogram)  # type: ignore[attr-defined]
    fake.Table = lambda columns, data: ("table", columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return started


def make_decision(index: int) -> Decision:
    return Decision(
        index=index,
        step=50 * index,
        status="applied",
        groups=({"learning_rate": 0.02}, {"learning_rate": 0.01}),
        run={"dropout": 0.1},
        schedule=1.0 - 0.1 * index,
        confidence=1.0,
        reasons_fn=lambda: ("no change", "validation: best so far"),
    )


@pytest.mark.parametrize(("variable", "mode"), [(None, "offline"), ("online", "online"), ("disabled", "disabled")])
def test_nothing_leaves_the_machine_unless_it_is_asked_for(
    runs: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, mode: str
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    Tracker("project", config={"steps": 3}, directory=tmp_path / "new" / "folder", name="run")
    (run,) = runs
    assert run.arguments["mode"] == mode
    assert (run.arguments["project"], run.arguments["name"], run.arguments["config"]) == (
        "project",
        "run",
        {"steps": 3},
    )
    assert run.arguments["dir"] == str(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()


def test_neither_console_nor_code_is_captured(runs: list[FakeRun], tmp_path: Path):
    Tracker("project", config={}, directory=tmp_path)
    settings = runs[0].arguments["settings"]
    assert settings["console"] == "off"
    assert settings["save_code"] is False
    assert settings["disable_git"] is True


def test_a_block_ends_the_run_even_if_it_fails(runs: list[FakeRun], tmp_path: Path):
    with pytest.raises(RuntimeError, match="diverged"), Tracker("project", config={}, directory=tmp_path):
        raise RuntimeError("diverged")
    assert runs[0].finished == 1


def test_decisions_are_logged_one_a_step_with_a_table_of_reasons(runs: list[FakeRun], tmp_path: Path):
    with Tracker("project", config={}, directory=tmp_path) as tracker:
        tracker.log({"loss": 0.5}, step=7)
        tracker.decisions((make_decision(index) for index in range(2)), prefix="controller/0")
    first, *decisions, (table, _) = runs[0].logged
    assert first == ({"loss": 0.5}, 7)
    assert decisions == [
        (
            {
                "controller/0/group_0/learning_rate": 0.02,
                "controller/0/group_1/learning_rate": 0.01,
                "controller/0/dropout": 0.1,
                "controller/0/optimizer_step": 50 * index,
                "controller/0/schedule": 1.0 - 0.1 * index,
            },
            None,
        )
        for index in range(2)
    ]
    kind, columns, rows = table["controller/0/reasons"]
    assert (kind, columns) == ("table", ["index", "step", "status", "reasons"])
    assert rows == [[i, 50 * i, "applied", "no change; validation: best so far"] for i in range(2)]


def test_artifacts_hold_the_file(runs: list[FakeRun], tmp_path: Path):
    path = tmp_path / "controller.safetensors"
    path.touch()
    Tracker("project", config={}, directory=tmp_path).artifact(path, "controller")
    (artifact,) = runs[0].artifacts
    assert (artifact.name, artifact.type, artifact.files) == ("controller", "controller", [str(path)])


def test_a_real_offline_run_lies_in_the_folder_given(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "controller.safetensors"
    path.write_bytes(b"weights")
    environment = dict(os.environ)
    with Tracker("project", config={"steps": 3}, directory=tmp_path / "run") as tracker:
        tracker.log({"loss": 0.5})
        tracker.decisions([make_decision(0)], prefix="controller/0")
        tracker.artifact(path, "controller")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    content, deadline = record.read_bytes(), time.monotonic() + 60
    while b"optimizer_step" not in content and time.monotonic() < deadline:
        time.sleep(0.2)  # its service may write what it was handed a little later
        content = record.read_bytes()
    for text in (b"controller/0/group_0/learning_rate", b"controller/0/reasons", b"optimizer_step"):
        assert text in content
    assert capfd.readouterr() == ("", "")
    assert {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} == {
        k: v for k, v in environment.items() if not k.startswith("WANDB")
    }


def test_histograms_are_of_equal_bins(runs: list[FakeRun], tmp_path: Path):
    with Tracker("project", config={}, directory=tmp_path) as tracker:
        tracker.histograms({"steps": [1, 0, 2, 3]}, low=-1.0, high=1.0)
    kind, counts, edges = runs[0].logged[0][0]["steps"]
    assert (kind, counts.tolist(), edges.tolist()) == ("histogram", [1, 0, 2, 3], [-1.0, -0.5, 0.0, 0.5, 1.0])
