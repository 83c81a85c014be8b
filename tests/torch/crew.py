"""Processes of a run: started once, given one job after another, each job with a process group of its own."""

from __future__ import annotations

import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = timedelta(seconds=30)
"""Of a collective: one that waits for a rank that has failed may notice only by this."""
PATIENCE = 5
"""Of those, until a rank is said to hang."""
ATTEMPTS = 3
"""To bring a process group up: gloo's connections are now and then closed while they are made, on a busy machine."""


class RankError(Exception):
    """What a rank raised, as text."""


class NoGroupError(RankError):
    """The process group did not come up in a rank; the job has not begun there."""


class Crew:
    """Ranks that wait for jobs, over gloo on the host; if their group does not come up, they are started anew.

    Args:
      size: how many.
      folder: for what they find one another by.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self.jobs = size, folder, 0
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
          NoGroupError: the process group did not come up, in all attempts.
        """
        for left in reversed(range(ATTEMPTS)):
            try:
                return self._attempt(job, arguments, group=group)
            except ChildProcessError:
                self._replace()
                raise
            except NoGroupError:
                self._replace()
                if not left:
                    raise
        raise AssertionError

    def _replace(self) -> None:
        self.close()
        self._start()

    def _attempt(self, job: Callable[..., Any], arguments: tuple[Any, ...], *, group: bool) -> list[Any]:
        self.jobs += 1
        where = f"file://{self.folder}/group-{self.jobs}" if group else None
        for pipe in self._pipes:
            pipe.send((where, job, arguments))
        results: dict[int, Any] = {}
        until = time.monotonic() + PATIENCE * TIMEOUT.total_seconds()
        while len(results) < self.size:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in results}
            ready = wait(list(waiting), timeout=max(until - time.monotonic(), 0.0))
            if not ready:
                raise ChildProcessError(f"rank {min(waiting.values())} hangs; the others: {results}")
            for pipe in ready:
                results[waiting[pipe]] = self._result(waiting[pipe])
        return [results[rank] for rank in range(self.size)]

    def _result(self, rank: int) -> Any:
        try:
            result = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join()
            raise ChildProcessError(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from None
        if isinstance(result, NoGroupError):
            raise result
        return result

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
                _join(where, rank, size)
            result = job(*arguments)
        except NoGroupError as error:
            result = error
        except Exception:
            result = RankError(traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))  # as bytes: `send` would share the tensors' memory
        if distributed.is_initialized():
            distributed.destroy_process_group()
            gc.collect()  # a group's connections last as long as a model that uses it: others would wait for this rank


def _join(where: str, rank: int, size: int) -> None:
    try:
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=TIMEOUT)
    except Exception:
        raise NoGroupError(traceback.format_exc()) from None
