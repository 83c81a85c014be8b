"""Measures what the controller costs a training run: the same training with and without it, turn by turn.

    python scripts/bench_overhead.py           # about 3 minutes on 2 cores
    python scripts/bench_overhead.py --quick   # under a minute

The quickstart's model on the bundled domain, AdamW over two groups. Two runs from one seed take turns every ten
steps, the order alternating; so whatever else the machine does slows both alike. Many pairs of runs are made, since
where memory lies matters too. The one without the controller is given the hyperparameters that the other has in force:
what is compared is the cost of the controller, not of its choices (dropout and denormal moments cost time too).
Decisions and probes are included, validation is not.

Every step is timed. On a busy machine some are interrupted, so sums would compare interruptions: of ordinary steps the
interquartile mean of the ratios of neighbouring turns counts, of an interval's last two, which hold the probe and the
decision, the median.

The last line is JSON. Target: less than 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metalearn
import metalearn.torch.monitor
from envs.domains import Domain
from envs.public import load_bundled
from envs.recommenders import MatrixFactorization, TripleSampler
from envs.recommenders.training import TrainingSettings
from metalearn.errors import MetalearnError
from metalearn.torch import MetaScheduler
from provenance import provenance

TURN = 10
"""Steps that a run takes before it is the other's turn."""
METRIC = 0.1
"""What is reported in place of a validation, which costs the same on both sides."""


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


@dataclass(kw_only=True, eq=False)
class Run:
    """One of the two runs; `scheduler` is None in the one without the controller."""

    model: MatrixFactorization
    optimizer: torch.optim.Optimizer
    sampler: TripleSampler
    scheduler: MetaScheduler | None
    random_state: torch.Tensor = field(default_factory=torch.get_rng_state)

    def train(self, steps: int) -> np.ndarray:
        """Takes some steps; returns the wall-clock seconds of each."""
        model, optimizer, sampler, scheduler = self.model, self.optimizer, self.sampler, self.scheduler
        torch.set_rng_state(self.random_state)
        times = [time.perf_counter()]
        for _ in range(steps):
            loss = model(*sampler.next())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step(loss)
                if scheduler.should_validate:
                    scheduler.report(METRIC)
            times.append(time.perf_counter())
        self.random_state = torch.get_rng_state()
        return np.diff(times)

    def follow(self, scheduler: MetaScheduler, index: int) -> None:
        """Takes over the hyperparameters that a scheduler has in force in one of its intervals."""
        decision = scheduler.decisions[index]
        multiplier = scheduler.multiplier(decision.step + scheduler.interval // 2)
        for group, values in zip(self.optimizer.param_groups, decision.groups, strict=True):
            group["lr"] = values["learning_rate"] * multiplier
            group["weight_decay"] = values["weight_decay"]
            group["betas"] = (values["beta1"], group["betas"][1])
        self.model.dropout.p = decision.run["dropout"]


def start(
    domain: Domain,
    settings: TrainingSettings,
    controller: metalearn.Controller | None,
    *,
    seed: int,
    interval: int | None = None,
) -> Run:
    """Starts a run, with or without a controller."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = MatrixFactorization(domain.num_users, domain.num_items, settings.dim, generator=generator)
    optimizer = torch.optim.AdamW(model.parameter_groups())
    scheduler = None
    if controller is not None:
        scheduler = MetaScheduler(
            optimizer,
            model=model,
            domain=domain.profile,
            horizon=settings.steps,
            batch_size=settings.batch_size,
            interval=interval,
            controller=controller,
        )
    sampler = TripleSampler(domain.train, settings.batch_size, seed=seed)
    return Run(model=model, optimizer=optimizer, sampler=sampler, scheduler=scheduler)


def turns(interval: int) -> list[np.ndarray]:
    """Splits the steps of an interval into turns."""
    return np.array_split(np.arange(interval), max(1, interval // TURN))


def take_turns(
    domain: Domain, settings: TrainingSettings, controller: metalearn.Controller, *, seed: int, intervals: int
) -> tuple[np.ndarray, float]:
    """Trains both runs for some intervals.

    Returns:
      Seconds, [interval, without or with, step], and those that the scheduler itself says it took.
    """
    if seed % 2:  # where a run's memory lies can slow it by a percent, so neither is always the first to be made
        steered, plain = (start(domain, settings, which, seed=seed) for which in (controller, None))
    else:
        plain, steered = (start(domain, settings, which, seed=seed) for which in (None, controller))
    assert steered.scheduler is not None
    interval = steered.scheduler.interval
    seconds = np.zeros((intervals, 2, interval))
    for index in range(len(seconds)):
        plain.follow(steered.scheduler, index)
        for turn, steps in enumerate(turns(interval)):
            for which in (0, 1) if (index + turn) % 2 else (1, 0):
                seconds[index, which, steps] = (plain, steered)[which].train(len(steps))
    return seconds, steered.scheduler.host_seconds


def count_host_reads(domain: Domain, settings: TrainingSettings, controller: metalearn.Controller) -> float:
    """Returns how many more tensors a step reads back with the controller than without, decisions left out.

    The monitor is made to treat tensors as if they lay on an accelerator: of a CPU's it reads the loss, since there is
    nothing to wait for.
    """
    counts = []
    with mock.patch.object(metalearn.torch.monitor, "HOST_DEVICES", ()):
        for which in (None, controller):
            run = start(domain, settings, which, seed=0, interval=50)
            with HostReads() as reads:
                run.train(49)  # the interval's probe included, its decision not
            counts.append(reads.count)
    return (counts[1] - counts[0]) / 49


def time_decisions(
    domain: Domain, settings: TrainingSettings, controller: metalearn.Controller, count: int
) -> np.ndarray:
    """Returns the seconds of `count` decisions: statistics read back, features, policy, guard, reasons."""
    run = start(domain, settings, controller, seed=0, interval=2)
    scheduler = run.scheduler
    assert scheduler is not None
    seconds = np.zeros(count)
    for index in range(count):
        for _ in range(2):
            loss = run.model(*run.sampler.next())
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            scheduler.step(loss)
        began = time.perf_counter()
        scheduler.report(METRIC)
        seconds[index] = time.perf_counter() - began
    return seconds


def middle(values: np.ndarray) -> np.ndarray:
    """Returns interquartile means over the last axis."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1)


def overhead(seconds: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Returns the overhead in percent, and the bounds of its 95 % bootstrap interval over intervals.

    Args:
      seconds: [interval, without or with, step].
    """
    interval = seconds.shape[-1]
    ordinary = np.stack([middle(seconds[..., steps[steps < interval - 2]]) for steps in turns(interval)])
    extra = (ordinary[..., 1] / ordinary[..., 0] - 1.0).T
    last = (seconds[:, 1, interval - 2 :] / ordinary[-1, :, :1] - 1.0).T

    def percent(chosen: np.ndarray) -> np.ndarray:
        usual = middle(extra[chosen].reshape(*chosen.shape[:-1], -1))
        return 100.0 * ((interval - 2) * usual + np.median(last[:, chosen], axis=-1).sum(0)) / interval

    resampled = percent(rng.integers(0, len(seconds), (2000, len(seconds))))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(percent(np.arange(len(seconds)))), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--controller", type=Path, help="a checkpoint instead of the one that ships")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    controller = metalearn.load_controller(arguments.controller)
    domain, settings = load_bundled(), TrainingSettings()
    interval = settings.steps // controller.config.num_decisions
    start(domain, settings, None, seed=0).train(interval)  # warms up the processor and PyTorch's allocator
    seeds = range(20 if arguments.quick else 100)
    runs = [take_turns(domain, settings, controller, seed=seed, intervals=3) for seed in seeds]
    seconds = np.concatenate([blocks for blocks, _ in runs])
    rng = np.random.default_rng(0)
    percent, low, high = overhead(seconds, rng)
    decisions = 1e6 * time_decisions(domain, settings, controller, 200 if arguments.quick else 1000)
    step = np.median(seconds, axis=(0, 2))
    record = {
        "overhead_percent": percent,
        "overhead_low": low,
        "overhead_high": high,
        "host_seconds_percent": 100.0 * sum(own for _, own in runs) / float(seconds[:, 1].sum()),
        "host_syncs_per_step": count_host_reads(domain, settings, controller),
        "decision_p50_us": float(np.median(decisions)),
        "decision_p99_us": float(np.quantile(decisions, 0.99)),
        "steps_per_second_without": 1.0 / float(step[0]),
        "steps_per_second_with": 1.0 / float(step[1]),
        "interval": interval,
        "intervals": len(seconds),
    }
    print(
        f"overhead {percent:.2f} % [{low:.2f}, {high:.2f}] of wall-clock time: {len(seconds)} intervals of {interval} "
        f"steps at {record['steps_per_second_without']:.0f} steps/s"
    )
    print(
        f"a decision every {interval} steps takes {record['decision_p50_us']:.0f} us (p99 "
        f"{record['decision_p99_us']:.0f}); {record['host_syncs_per_step']:g} host syncs a step between decisions"
    )
    figures = {name: round(value, 4) for name, value in record.items()}
    if arguments.output is not None:
        about = provenance(seeds=[seeds[0], seeds[-1]], threads=arguments.threads)
        arguments.output.write_text(json.dumps({**figures, "provenance": about}, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
