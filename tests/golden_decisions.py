"""What a controller of an old checkpoint format decided when that was the current one: data/golden_format_*.json.

`python -m tests.golden_decisions 1`, run where format 1 is the current one, records it anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from metalearn import Controller, load_controller
from tests.intervals import random_intervals
from tests.recorded_run import BATCH_SIZE, NUM_DECISIONS, STEPS, load_recorded_run

NUM_INTERVALS = 6
ROOT = Path(__file__).parents[1]


def golden_checkpoint(version: int) -> Path:
    """Return the checkpoint file of a format."""
    return ROOT / "checkpoints" / "golden" / f"format-{version}" / "controller.safetensors"


def recorded_decisions(version: int) -> dict[str, list[dict[str, Any]]]:
    """Read what was recorded."""
    return json.loads(_data(version).read_text())


def decide(controller: Controller) -> dict[str, list[dict[str, Any]]]:
    """Steer the first intervals of a recorded run with a known horizon, and of a made-up one on its domain without."""
    run = load_recorded_run()
    sessions = {
        "known horizon": (
            controller.start(
                run.profile,
                roles=("embedding", "embedding"),
                horizon=NUM_DECISIONS * STEPS,
                batch_size=BATCH_SIZE,
            ),
            run.intervals,
        ),
        "unknown horizon": (
            controller.start(run.profile, roles=("dense", "head"), batch_size=BATCH_SIZE),
            random_intervals(0),
        ),
    }
    return {
        name: [
            {
                "groups": [dict(group) for group in decision.groups],
                "run": dict(decision.run),
                "status": decision.status,
                "schedule": decision.schedule,
                "confidence": decision.confidence,
            }
            for decision in (session.ask(), *(session.tell(statistics) for statistics in intervals[:NUM_INTERVALS]))
        ]
        for name, (session, intervals) in sessions.items()
    }


def _data(version: int) -> Path:
    return Path(__file__).with_name("data") / f"golden_format_{version}.json"


if __name__ == "__main__":
    number = int(sys.argv[1])
    _data(number).write_text(json.dumps(decide(load_controller(golden_checkpoint(number))), indent=1) + "\n")
