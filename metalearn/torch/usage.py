"""What a run's training takes of its machine, interval by interval: time, memory, utilisation."""

from __future__ import annotations

import math
import os
import warnings
from time import perf_counter, process_time

import torch


class UsageMeter:
    """Times the training of an interval, validation left out.

    Args:
      device: that the model is trained on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.start_interval()

    def start_interval(self) -> None:
        """Starts the clocks."""
        self.seconds = math.nan
        """Of training, of the interval that has ended."""
        self._busy = math.nan
        self._began = perf_counter(), process_time()

    def end_interval(self) -> None:
        """Stops them: what follows is validation."""
        now = perf_counter(), process_time()
        self.seconds, self._busy = (end - begin for begin, end in zip(self._began, now, strict=True))

    def memory_bytes(self) -> float:
        """Returns what a GPU's allocator has reserved, else the resident memory of the process; NaN if unknown."""
        if self._device.type == "cuda":
            return float(torch.cuda.memory_reserved(self._device))
        try:
            with open("/proc/self/statm", "rb", buffering=0) as file:  # a third of the time of `Path.read_text`
                return float(int(file.read(256).split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        except OSError:
            return math.nan

    def forget_larger_batches(self) -> None:
        """Gives back what a GPU's allocator still holds for them."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def utilisation(self) -> float:
        """Of the device, 0 to 1: a GPU's by its driver, at this moment, of a CPU's cores those kept busy; or NaN."""
        if self._device.type == "cuda":
            return gpu_utilisation(self._device)
        return min(1.0, self._busy / (max(self.seconds, 1e-9) * self._cores))


def gpu_utilisation(device: torch.device) -> float:
    """Returns what the driver says, 0 to 1; NaN without the package `nvidia-ml-py`, which torch asks it with."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.cuda.utilization(device) / 100.0
    except (ImportError, RuntimeError):
        return math.nan
