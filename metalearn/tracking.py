"""Weights & Biases: one run, quiet, offline unless the user asks otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metalearn.controller.decision import Decision


class Tracker:
    """Logs a run to Weights & Biases.

    Offline by default: nothing leaves the machine unless `WANDB_MODE=online` is set. `wandb sync` uploads an offline
    run later; `WANDB_MODE=disabled` logs nothing.

    Args:
      project: the W&B project.
      config: settings, shown beside the run.
      directory: where the offline run lies, in `directory/wandb`.
      name: of the run.
    """

    def __init__(self, project: str, *, config: Mapping[str, Any], directory: Path, name: str | None = None) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        # Console capture would copy whatever the training job prints, ids included, into the run.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name,
            config=dict(config),
            dir=str(directory),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=settings,
            reinit="finish_previous",
        )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Logs numbers at a step; nested names use slashes."""
        self._run.log(dict(values), step=step)

    def decisions(self, decisions: Iterable[Decision], *, prefix: str) -> None:
        """Logs each decision's hyperparameters, one step a decision, and a table of reasons."""
        rows = []
        for decision in decisions:
            values = {f"{prefix}/group_{g}/{n}": v for g, group in enumerate(decision.groups) for n, v in group.items()}
            values |= {f"{prefix}/{name}": value for name, value in decision.run.items()}
            self.log({**values, f"{prefix}/optimizer_step": decision.step, f"{prefix}/schedule": decision.schedule})
            rows.append([decision.index, decision.step, decision.status, "; ".join(decision.reasons)])
        self.table(f"{prefix}/reasons", ["index", "step", "status", "reasons"], rows)

    def histograms(self, counts: Mapping[str, Sequence[int]], *, low: float, high: float) -> None:
        """Logs histograms by name: counts of equal bins from `low` to `high`."""
        bins = {name: (np.asarray(values), np.linspace(low, high, len(values) + 1)) for name, values in counts.items()}
        self._run.log({name: self._wandb.Histogram(np_histogram=pair) for name, pair in bins.items()}, commit=False)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Logs a table."""
        self._run.log({name: self._wandb.Table(columns=list(columns), data=list(rows))})

    def artifact(self, path: Path, kind: str) -> None:
        """Attaches a file as a versioned artifact."""
        artifact = self._wandb.Artifact(path.stem, type=kind)
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Ends the run and flushes what is pending."""
        self._run.finish()
