"""A script for torchrun: trains with checkpoints, and in its first attempt rank 1 is killed. Arguments: a pickled
`ranked.Job`, a folder, and the optimizer step to be killed after, or -1.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

import torch
from torch import distributed

from tests.torch import ranked


def main(job: ranked.Job, folder: Path, kill_after: int) -> None:
    """Train from the last checkpoint, if there is one, saving every fourth step."""
    distributed.init_process_group("gloo")
    rank, attempt = distributed.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    loop, path = ranked.Loop(job), folder / f"checkpoint-{rank}.pt"
    if path.exists():
        ranked.load(loop, torch.load(path, weights_only=False))
    while loop.scheduler.steps < job.steps:
        loop.step()
        if attempt == 0 and rank == 1 and loop.scheduler.steps == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        loop.report()
        if loop.scheduler.steps % 4 == 0:
            torch.save(ranked.save(loop, of_all_ranks=True), path.with_suffix(".part"))
            distributed.barrier()
            path.with_suffix(".part").replace(path)
            distributed.barrier()  # nobody goes on before all have the same
    outcome = loop.outcome() | {"attempt": attempt}
    (folder / f"outcome-{rank}.pkl").write_bytes(pickle.dumps(outcome))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), int(sys.argv[3]))
