"""The decision log: one JSON line a decision, flushed as it is made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from metalearn.controller.decision import Decision
from metalearn.errors import InvalidArgumentError

LOG_VERSION = 1


def _plain(value: Any) -> Any:
    """Makes a value strict JSON: not-finite floats become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class DecisionLog:
    """Appends decisions to a JSON Lines file; opened anew for each line, so that nothing is lost if the run is killed.

    Args:
      path: the file; its folder is made. An existing file is continued.
      name: of the training run, in each line.
    """

    def __init__(self, path: str | Path, *, name: str = "") -> None:
        self.path = Path(path)
        self._name = name
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, decision: Decision, **context: Any) -> None:
        """Writes one decision with its reasons, and whatever else gives it context."""
        record = {"version": LOG_VERSION, "name": self._name, **decision.as_dict(), **context}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), allow_nan=False) + "\n")


def read_decisions(path: str | Path) -> list[dict[str, Any]]:
    """Reads a decision log.

    Raises:
      InvalidArgumentError: a line is not a decision; the message gives its number.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            version = record["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"{path}:{number} is not a decision: {error}") from error
        if version != LOG_VERSION:
            raise InvalidArgumentError(f"{path}:{number} has log version {version}, this metalearn reads {LOG_VERSION}")
        records.append(record)
    return records
