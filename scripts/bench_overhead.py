"""Measures what the controller costs a training run: by framework and by model, with and without it in one run.

    python scripts/bench_overhead.py           # half an hour, 4 GB of memory
    python scripts/bench_overhead.py --quick   # under a minute: each model in a plain loop, each framework on one

BPR matrix factorisation (the quickstart's), two towers, self-attention and a DLRM-like model with a table of 20 million
rows, in a plain loop and under each framework that is installed. A run takes turns with itself every ten steps: with
the controller, and without it at the same hyperparameters (`overhead_loops.py`). Decisions and probes are included,
validation is not.

Every step is timed. On a busy machine some are interrupted, so sums would compare interruptions: of ordinary steps the
interquartile mean of the turns' ratios to their neighbours counts, of an interval's first and last two, which hold the
decision and the probe, the median. `cpu_overhead_percent` is the same of the thread's processor time, which other
processes disturb less.

Runs are of 3 000 steps, which decide every 150; `long_overhead_percent` is of the smallest model in a run of 30 000.

Memory is what the scheduler holds: in percent of what model, gradients and optimizer hold, and of the process.

`safety_overhead_percent` is what guard, audit log and snapshots every ten intervals cost together, of each model in a
plain loop: every second end of an interval, where they act, is with them, and so is every second step in between. The
first two snapshots, which get their memory, are left out.

The last line is JSON. Targets: less than 1 %, no host syncs, a policy's p99 under 150 microseconds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from overhead_figures import SNAPSHOTS_EVERY, is_safe, overhead, safety_overhead
from overhead_loops import LOOPS, Step, Turns
from overhead_memory import held_bytes, resident_bytes, trained_bytes
from overhead_workloads import WORKLOADS, Workload
from torch.utils._python_dispatch import TorchDispatchMode

import metalearn
import metalearn.torch.monitor
from envs.domains import Domain
from envs.public import load_bundled
from metalearn.errors import MetalearnError
from metalearn.torch import MetaScheduler, RollbackConfig
from metalearn.torch.run import Run
from provenance import provenance

HORIZON, LONG_HORIZON = 3000, 30_000
"""Optimizer steps of the run that is begun, the quickstart's, and of one that decides a tenth as often."""
FIRST_INTERVAL = 1
"""The one before warms up processor and allocator, and may end in another interval."""
SHORT_INTERVAL = 30
"""Steps, where there is little time; a decision then has a larger share."""
MOST_SECONDS = 20
"""For decisions to be timed one by one, whatever their number."""
FIGURES = (
    "overhead_percent",
    "cpu_overhead_percent",
    "host_syncs_per_step",
    "decision_p99_us",
    "policy_p99_us",
    "memory_percent",
    "process_percent",
)
"""That are told by framework and model."""
OVERALL = ("plain", "bpr_mf")
IMPOSSIBLE = ("transformers", "dlrm")
"""What the figures without a name are of."""


class HostReads(TorchDispatchMode):
    """Counts tensors read back to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves_device = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        copied = [a for a in args if isinstance(a, torch.Tensor) and a.device.type != "cpu"]
        self.count += func is torch.ops.aten._local_scalar_dense.default or (leaves_device and bool(copied))
        return result


def clocks() -> tuple[float, float]:
    """Returns wall-clock seconds and processor seconds of this thread."""
    return time.perf_counter(), time.thread_time()


def count_host_reads(start: Callable[[Turns], None], make: Callable[..., Turns]) -> float:
    """Returns how many more tensors a step reads back with the controller than without, decisions left out.

    The monitor is made to treat tensors as if they lay on an accelerator: of a CPU's it reads the loss, since there is
    nothing to wait for.
    """
    with mock.patch.object(metalearn.torch.monitor, "HOST_DEVICES", ()), HostReads() as reads:
        turns = make(lambda: (reads.count,), intervals=2)
        start(turns)
    means = [
        np.mean([step.figures[0] for step in turns.steps if step.turn % 2 == side and not decides(step)])
        for side in (0, 1)
    ]
    return float(means[1] - means[0])


def decides(step: Step) -> bool:
    """Says whether a decision may fall into a step."""
    return step.position in (0, step.length - 1)


def time_decisions(start: Callable[[Turns], None], make: Callable[..., Turns], count: int) -> tuple[np.ndarray, ...]:
    """Returns seconds of decisions, made in training: whole ones (statistics read back, features, policy, guard), and
    those of the policy in them.
    """
    seconds: dict[str, list[float]] = {"decision": [], "policy": []}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[name].append(time.perf_counter() - began)
            return result

        return call

    decide, act = Run.decide, metalearn.controller.runtime.NumpyNetwork.act
    with (
        mock.patch.object(Run, "decide", timed(decide, "decision")),
        mock.patch.object(metalearn.controller.runtime.NumpyNetwork, "act", timed(act, "policy")),
    ):
        start(make(clocks, intervals=count, seconds=MOST_SECONDS, switches=False))
    return tuple(np.array(row) for row in seconds.values())


def settled(turns: Turns) -> list[Step]:
    """Returns the steps of intervals of the length that was settled on, less the first."""
    interval = turns.scheduler.interval
    return [step for step in turns.steps if step.interval >= FIRST_INTERVAL and step.length == interval]


class Bench:
    """Measures one framework on one model after the other.

    Args:
      domain: of the models that learn from interactions.
      controller: that steers.
      quick: whether to take fewer steps.
    """

    def __init__(self, domain: Domain, controller: metalearn.Controller, *, quick: bool) -> None:
        self._domain, self._controller, self._quick = domain, controller, quick
        self._rng = np.random.default_rng(0)

    def measure(self, framework: str, model: str) -> dict[str, float]:
        """Returns the figures of a framework on a model."""
        torch.manual_seed(0)
        workload = WORKLOADS[model](self._domain)
        before = resident_bytes()

        def make(read: Callable[[], tuple[float, ...]], **options: Any) -> Turns:
            return Turns(workload, read, **options)

        def start(turns: Turns, **options: Any) -> None:
            LOOPS[framework](turns, **self._known(workload), horizon=HORIZON, **options)

        overall, quick = (framework, model) == OVERALL, self._quick
        turns = make(
            clocks,
            intervals=(20 if quick else 150) if overall else 25,
            seconds=(5 if overall else 1) if quick else (120 if overall else 15),
        )
        start(turns, interval=SHORT_INTERVAL if quick and not overall else None)
        scheduler = turns.scheduler
        steps = settled(turns)
        percent, low, high = overhead(steps, 0, self._rng)
        held, trained = held_bytes(scheduler, workload), trained_bytes(workload)
        process = resident_bytes()
        syncs = count_host_reads(lambda turns: start(turns, interval=20), make)
        count = (300 if quick else 1000) if overall else (20 if quick else 100)
        whole, policy = time_decisions(lambda turns: start(turns, interval=2), make, count)
        typical = [np.median([step.figures[0] for step in steps if step.turn % 2 == side]) for side in (0, 1)]
        with_it = sum(step.figures[0] for step in turns.steps if step.turn % 2)
        return {
            "overhead_percent": percent,
            "overhead_low": low,
            "overhead_high": high,
            "cpu_overhead_percent": overhead(steps, 1, self._rng)[0],
            "host_seconds_percent": 100.0 * scheduler.host_seconds / with_it,
            "host_syncs_per_step": syncs,
            "decision_p50_us": 1e6 * float(np.median(whole)),
            "decision_p99_us": 1e6 * float(np.quantile(whole, 0.99)),
            "policy_p50_us": 1e6 * float(np.median(policy)),
            "policy_p99_us": 1e6 * float(np.quantile(policy, 0.99)),
            "steps_per_second_without": 1.0 / float(typical[0]),
            "steps_per_second_with": 1.0 / float(typical[1]),
            "interval": scheduler.interval,
            "intervals": steps[-1].interval - steps[0].interval + 1,
            "scheduler_bytes": held,
            "memory_percent": 100.0 * held / trained,
            "process_percent": 100.0 * held / process,
            "resident_bytes_before": before,
        }

    def _known(self, workload: Workload) -> dict[str, Any]:
        return {"domain": self._domain.profile, "batch_size": workload.batch_size, "controller": self._controller}

    def in_a_long_run(self) -> dict[str, float]:
        """Returns the overhead on the smallest model in a plain loop, where decisions are far apart."""
        torch.manual_seed(0)
        framework, model = OVERALL
        workload = WORKLOADS[model](self._domain)
        turns = Turns(workload, clocks, intervals=10**6, seconds=5 if self._quick else 150)
        LOOPS[framework](turns, **self._known(workload), horizon=3 * HORIZON if self._quick else LONG_HORIZON)
        percent, low, high = overhead(settled(turns), 0, self._rng)
        return {"long_overhead_percent": percent, "long_overhead_low": low, "long_overhead_high": high}

    def safety(self, model: str) -> dict[str, float]:
        """Returns what guard, audit log and snapshots cost a model in a plain loop."""
        torch.manual_seed(0)
        workload = WORKLOADS[model](self._domain)
        small = model == OVERALL[1]
        seconds = (5 if small else 2) if self._quick else 120 if small else 300
        with tempfile.TemporaryDirectory() as folder:
            turns = Turns(workload, clocks, intervals=26 if self._quick else 200, seconds=seconds, switches=False)
            saved: list[int] = []
            run_with_and_without_safety(
                turns,
                saved,
                **self._known(workload),
                horizon=HORIZON,
                interval=SHORT_INTERVAL if self._quick else None,
                decision_log=Path(folder) / "log.jsonl",
                rollback=RollbackConfig(every=SNAPSHOTS_EVERY),
            )
        percent, low, high = safety_overhead(turns.steps, frozenset(saved), self._rng)
        return {
            "safety_overhead_percent": percent,
            "safety_overhead_low": low,
            "safety_overhead_high": high,
            "snapshots": len(saved),
        }


def run_with_and_without_safety(turns: Turns, saved: list[int], **options: Any) -> None:
    """Trains, with guard, audit log and snapshots where `is_safe` says so.

    Notes at which steps a snapshot was taken, but for the first ones, which get their memory: once in a run.
    """
    model, optimizer = turns.workload.model, turns.workload.optimizer
    scheduler = MetaScheduler(optimizer, model=model, **options)
    run = scheduler._run
    session, log, recovery = run.session, run.log, run.recovery
    assert recovery is not None
    parts, save = (session._rules, log._log, recovery), recovery.save

    def noted(*arguments: Any) -> None:
        save(*arguments)
        if not recovery._snapshots.grew:
            saved.append(len(turns.steps))

    recovery.save = noted  # type: ignore[method-assign]
    turns.find = lambda: scheduler
    for batch in turns:
        safe = is_safe(scheduler.decision.index, run.monitor.steps % scheduler.interval, scheduler.interval)
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session._rules, log._log, run.recovery = parts if safe else ((), None, None)
        scheduler.step(loss)
        if scheduler.should_validate:
            scheduler.report(0.1)
    scheduler.detach()


def chosen_cells(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns what is to be measured, and says what is left out."""
    cells = [(framework, model) for framework in arguments.frameworks for model in arguments.models]
    if IMPOSSIBLE in cells:
        print(f"{' '.join(IMPOSSIBLE)} is left out: its Trainer takes norms, which sparse gradients do not have")
        cells.remove(IMPOSSIBLE)
    if arguments.quick:
        cells = [cell for cell in cells if cell[0] == "plain" or cell[1] == OVERALL[1]]
    missing = {name for name, _ in cells if name != "plain" and importlib.util.find_spec(name) is None}
    for name in sorted(missing):
        print(f"{name} is not installed: left out")
    return [cell for cell in cells if cell[0] not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--frameworks", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--controller", type=Path, help="a checkpoint instead of the one that ships")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default, but without a warning
    bench = Bench(load_bundled(), metalearn.load_controller(arguments.controller), quick=arguments.quick)
    by_cell: dict[str, dict[str, float]] = {}
    for framework, model in chosen_cells(arguments):
        row = by_cell[f"{framework}/{model}"] = bench.measure(framework, model)
        gc.collect()
        print(
            f"{framework + ' ' + model:23}{row['overhead_percent']:5.2f} % [{row['overhead_low']:.2f}, "
            f"{row['overhead_high']:.2f}] of {row['steps_per_second_without']:.0f} steps/s, "
            f"{row['cpu_overhead_percent']:.2f} % of processor time; a decision every {row['interval']} steps, p99 "
            f"{row['decision_p99_us']:.0f} us, of the policy {row['policy_p99_us']:.0f}; "
            f"{row['host_syncs_per_step']:g} host syncs a step; {row['scheduler_bytes'] / 1e6:.2f} MB",
            flush=True,
        )
    record: dict[str, Any] = dict(by_cell.get("/".join(OVERALL), {}))
    if record:
        record |= (long := bench.in_a_long_run())
        low, high = long["long_overhead_low"], long["long_overhead_high"]
        print(
            f"in a run of {LONG_HORIZON} steps: {long['long_overhead_percent']:.2f} % [{low:.2f}, {high:.2f}]",
            flush=True,
        )
    for model in arguments.models if OVERALL[0] in arguments.frameworks else ():
        cost = bench.safety(model)
        gc.collect()
        record |= cost if model == OVERALL[1] else {}
        record |= {f"{figure}_{model}": value for figure, value in cost.items()}
        low, high = cost["safety_overhead_low"], cost["safety_overhead_high"]
        print(
            f"guard, audit log and {cost['snapshots']} snapshots, {model}: {cost['safety_overhead_percent']:.2f} % "
            f"[{low:.2f}, {high:.2f}]",
            flush=True,
        )
    for figure in FIGURES:
        record |= {f"{figure}_{name.replace('/', '_')}": row[figure] for name, row in by_cell.items()}
    record = {name: round(float(value), 4) for name, value in record.items()}
    if arguments.output is not None:
        about = provenance(threads=arguments.threads, frameworks=versions(arguments.frameworks))
        arguments.output.write_text(json.dumps({**record, "cells": by_cell, "provenance": about}, indent=1) + "\n")
    print(json.dumps(record))


def versions(frameworks: Sequence[str]) -> dict[str, str]:
    """Returns the versions of the frameworks that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in frameworks:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
