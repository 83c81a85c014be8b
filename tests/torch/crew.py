"""Processes of a run: started once, given one job after another, each job with a process group of its own."""

from __future__ import annotations

import gc
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = timedelta(seconds=30)
"""Of a collective: one that waits for a rank that has failed may notice only by this."""
PATIENCE = 5
"""Of those, until a rank is said to hang."""


class RankError(Exception):
    """What a rank raised, as text."""


class Crew:
    """Ranks that wait for jobs, over gloo on the host.

    Args:
      size: how many.
      folder: for what they find one another by.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self._folder, self._jobs = size, folder, 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self.size)]
        self._processes = [
            context.Process(target=_work, args=(rank, self.size, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        self._pipes = [here for here, _ in pipes]
        for process, (_, there) in zip(self._processes, pipes, strict=True):
            process.start()
            there.close()

    def run(self, job: Callable[..., Any], *arguments: Any, group: bool = True) -> list[Any]:
        """Run a job in every rank; what a rank raises is a RankError in its place.

        Args:
          job: a function of a module.
          arguments: of it.
          group: whether torch.distributed is initialised.

        Raises:
          ChildProcessError: a rank died, or hangs; the next job gets new ones.
        """
        self._jobs += 1
        where = f"file://{self._folder}/group-{self._jobs}" if group else None
        for pipe in self._pipes:
            pipe.send((where, job, arguments))
        try:
            return [self._result(rank) for rank in range(self.size)]
        except ChildProcessError:
            self.close()
            self._start()
            raise

    def _result(self, rank: int) -> Any:
        if not self._pipes[rank].poll(PATIENCE * TIMEOUT.total_seconds()):
            raise ChildProcessError(f"rank {rank} hangs")
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join()
            raise ChildProcessError(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from None

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.join()


def _work(rank: int, size: int, pipe: Connection) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", CREW_RANK=str(rank))
    torch.set_num_threads(1)
    while True:
        where, job, arguments = pipe.recv()
        try:
            if where is not None:
                distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=TIMEOUT)
            result = job(*arguments)
        except Exception:
            result = RankError(traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))  # as bytes: `send` would share the tensors' memory
        if where is not None:
            distributed.destroy_process_group()
            gc.collect()  # a group's connections last as long as a model that uses it: others would wait for this rank
