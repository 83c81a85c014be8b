"""A steered run with snapshots on disk, as a program: `python -m tests.torch.killed_run FOLDER KILL_AT STEPS`.

At the step KILL_AT it kills itself with SIGKILL, in the middle of the interval; 0 is never. It writes what it has come
to, weights and decisions, to FOLDER/end.pt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from envs.domains import make_domain
from envs.simulated import SimulatedPrior, simulate
from metalearn import load_controller
from metalearn.safety.rollback import RollbackConfig
from tests.torch.runs import start

INTERVAL, HORIZON = 5, 60


def main(folder: Path, kill_at: int, steps: int) -> None:
    torch.set_num_threads(1)
    rows = simulate(SimulatedPrior(users=(60, 60), items=(40, 40)), seed=1)
    domain = make_domain(rows, name="simulated", split="leave-last-out")
    samplers: list = []

    class Position:
        """The sampler's, which is made after the scheduler."""

        def state_dict(self) -> dict:
            return samplers[0].state_dict()

        def load_state_dict(self, state: dict) -> None:
            samplers[0].load_state_dict(state)

    run = start(
        domain,
        controller=load_controller(),
        horizon=HORIZON,
        interval=INTERVAL,
        rollback=RollbackConfig(every=1, place="disk", folder=folder / "snapshots"),
        tracked=[Position()],
        decision_log=folder / "run.log",
        name="run",
    )
    samplers.append(run.sampler)
    scheduler = run.scheduler
    assert scheduler is not None
    resumed = scheduler.resume_from_disk()
    first = scheduler.steps
    while scheduler.steps < steps:
        run.step()
        if scheduler.steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        run.report()
    torch.save(
        {
            "resumed": resumed,
            "first": first,
            "weights": [p.detach() for p in run.model.parameters()],
            "decision": scheduler.decision.as_dict(),
            "rates": scheduler.get_last_lr(),
            "random": torch.get_rng_state(),
        },
        folder / "end.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
