"""Worker processes of scripts that run many trials: one thread each, and none outlives the script that was killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, which take it over: set before any of them loads torch


def make_pool(count: int, initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Returns a pool of processes that start afresh, without what this one has loaded.

    Args:
      count: of processes.
      initializer: called once in each of them, with the arguments.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(initializer, arguments))


def _begin(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("envs.public").setLevel(logging.ERROR)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
