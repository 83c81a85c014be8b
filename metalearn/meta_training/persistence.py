"""Keeps a meta-training run on disk, so that it resumes exactly where it was killed (Orbax)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orbax.checkpoint as ocp

from metalearn.errors import SessionError
from metalearn.meta_training.curriculum import Curriculum

if TYPE_CHECKING:
    from metalearn.meta_training.loop import MetaTrainState

_ARRAYS = ("params", "optimizer_state", "prior", "best")
_SCALARS = ("iteration", "best_iteration", "best_validation", "best_log", "stale", "validated")


class Persistence:
    """Saves and restores a `MetaTrainState` in a folder that belongs to one run.

    Args:
      directory: the run's folder; made if missing.
      fingerprint: of config, architecture and tasks; a folder of another one is refused.

    Raises:
      SessionError: the folder holds another run.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._directory = Path(directory).resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        marker = self._directory / "config.json"
        if marker.exists() and marker.read_text() != fingerprint:
            raise SessionError(
                f"{self._directory} holds a meta-training run with another config or other tasks; "
                "pass another --output, or remove the folder"
            )
        marker.write_text(fingerprint)
        self._manager = ocp.CheckpointManager(
            self._directory / "orbax",
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def __enter__(self) -> Persistence:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: MetaTrainState) -> None:
        """Writes the state of an iteration, which is to be written again once it has been evaluated."""
        arrays = {name: getattr(state, name) for name in _ARRAYS}
        scalars = {name: getattr(state, name) for name in _SCALARS}
        scalars["curriculum"] = state.curriculum.as_dict()
        if scalars["best_validation"] == float("-inf"):
            scalars["best_validation"] = None
        self._manager.save(
            2 * state.iteration + (state.validated == state.iteration),
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), scalars=ocp.args.JsonSave(scalars)),
        )
        self._manager.wait_until_finished()

    def restore(self, template: Callable[[], MetaTrainState]) -> MetaTrainState | None:
        """Reads the newest state, or returns None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        state = template()
        arrays = {name: getattr(state, name) for name in _ARRAYS}
        restored = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(arrays), scalars=ocp.args.JsonRestore())
        )
        for name, value in {**restored["arrays"], **restored["scalars"]}.items():
            setattr(state, name, value)
        state.curriculum = Curriculum.from_dict(restored["scalars"]["curriculum"])
        if state.best_validation is None:
            state.best_validation = float("-inf")
        return state

    def cached_arrays(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Returns the arrays in the file `name` of the run, made on first use."""
        path = self._directory / name
        if not path.exists():
            temporary = path.with_name(f"tmp-{name}")
            arrays: dict[str, Any] = {**make()}
            np.savez_compressed(temporary, **arrays)
            os.replace(temporary, path)
        with np.load(path) as stored:
            return dict(stored)

    def cached(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the JSON file `name` of the run, made on first use."""
        path = self._directory / name
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(make()))
            os.replace(temporary, path)
        return json.loads(path.read_text())
