"""Processes of a run: started once, given one job after another, each job with a process group of its own."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = timedelta(seconds=60)


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
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self._processes = [
            context.Process(target=_work, args=(rank, size, there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        self._pipes = [here for here, _ in pipes]
        for process in self._processes:
            process.start()

    def run(self, job: Callable[..., Any], *arguments: Any, group: bool = True) -> list[Any]:
        """Run a job in every rank; what a rank raises is a RankError in its place.

        Args:
          job: a function of a module.
          arguments: of it.
          group: whether torch.distributed is initialised.
        """
        self._jobs += 1
        where = f"file://{self._folder}/group-{self._jobs}" if group else None
        for pipe in self._pipes:
            pipe.send((where, job, arguments))
        results = []
        for pipe in self._pipes:
            assert pipe.poll(2 * TIMEOUT.total_seconds()), "a rank hangs"
            results.append(pipe.recv())
        return results

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
            pipe.send(job(*arguments))
        except Exception:
            pipe.send(RankError(traceback.format_exc()))
        if where is not None:
            distributed.destroy_process_group()
            gc.collect()  # a group's connections last as long as a model that uses it: others would wait for this rank
