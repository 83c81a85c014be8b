"""Measures inner training steps per second of the JAX environment against the PyTorch loop, family by family.

    python scripts/bench_throughput.py           # about 10 minutes on 2 cores
    python scripts/bench_throughput.py --quick   # under a minute: small tasks only

The same work on both sides: the same domain, sizes, batch, dropout and AdamW; on the JAX side an interval with its
probe and one validation of 64 users is included, on the PyTorch side there is none. The two take turns of a fraction of
a second, and the ratio of neighbouring turns is what counts: interquartile mean and a bootstrap interval over turns.

On one core both have one thread. On two, the JAX side trains one task on each of two (forced host) devices, the PyTorch
side runs two processes. On an accelerator the JAX side trains a batch of tasks side by side. `limit` is the share of
this machine's measured memory bandwidth or matrix-product rate, whichever is nearer, that the JAX side reaches by XLA's
own count of a step's operations and bytes; above 1 means that caches serve most of it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch

from envs.domains import Domain, make_domain
from envs.learners import LEARNERS
from envs.recommenders import RECOMMENDERS
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn.controller.actions import Values
from metalearn.errors import MetalearnError
from metalearn.interactions import Interactions
from metalearn.meta_training.environment import Plan
from provenance import provenance

SIZES = {
    "small": {"users": 256, "items": 192, "interactions": 6_144, "dim": 8, "batch": 64},
    "middle": {"users": 512, "items": 384, "interactions": 16_384, "dim": 16, "batch": 128},
    "large": {"users": 4_000, "items": 16_000, "interactions": 262_144, "dim": 32, "batch": 512},
}
TARGETS = {"small": 20.0, "middle": 8.0, "large": 2.0}
HISTORY, CONTENT, DROPOUT = 20, 16, 0.1


def make_bucket(learner: str, size: str) -> Bucket:
    """Returns the bucket of a family and a size."""
    return Bucket(**SIZES[size], evaluated=64, learner=learner, history=HISTORY, content=CONTENT)


def draw_domain(size: str, seed: int = 0) -> Domain:
    """Draws a domain of about a size, popularity by a power law: what a step costs does not depend on more."""
    rng = np.random.default_rng(seed)
    users, items, rows = (SIZES[size][name] for name in ("users", "items", "interactions"))
    user = np.concatenate([np.repeat(np.arange(users), 4), rng.integers(0, users, rows - 4 * users)])
    item = np.minimum((items * rng.random(rows) ** 1.5).astype(int), items - 1)
    content = rng.normal(size=(items, CONTENT)).astype(np.float32)
    table = Interactions(user=user, item=item, num_users=users, num_items=items)
    return make_domain(table, name=size, split="leave-last-out", item_content=content)


@dataclass
class JaxSide:
    """One environment in training on one device or more."""

    bucket: Bucket
    domain: Domain
    num_tasks: int = 1
    devices: int = 1

    def __post_init__(self) -> None:
        environment = VectorizedEnvironment(self.bucket)
        tasks = jax.tree.map(
            lambda leaf: np.broadcast_to(leaf, (self.num_tasks, *leaf.shape)),
            jax.tree.map(np.asarray, make_task(self.domain, self.bucket)),
        )
        groups = environment.num_groups
        values = Values(*(jnp.full(groups, value) for value in (0.01, 0.1, 0.9)), jnp.float32(DROPOUT))
        side_by_side = jax.default_backend() != "cpu"

        def interval(tasks: Any, states: Any, num_steps: Any, seed: Any) -> Any:
            plan = Plan(num_steps, jnp.int32(0), jnp.float32(1e6), jnp.bool_(False))

            def one(pair: Any) -> Any:
                return environment.step(pair[0], pair[1], values, plan, key=jax.random.key(seed))[0]

            batch = self.num_tasks if side_by_side else None
            return jax.lax.map(one, (tasks, states), batch_size=batch)

        self._interval = jax.jit(interval)
        reset = jax.jit(jax.vmap(lambda task: environment.reset(task, key=jax.random.key(0))))
        places = jax.local_devices()[: self.devices]
        self._tasks = [jax.device_put(tasks, place) for place in places]
        self._states = [reset(task) for task in self._tasks]
        self._threads = ThreadPoolExecutor(self.devices)
        self.train(4)

    def train(self, steps: int) -> float:
        """Trains every task for some steps; returns inner steps per second, all tasks and devices together."""
        began = time.perf_counter()

        def one(index: int) -> None:
            state = self._interval(self._tasks[index], self._states[index], np.int32(steps), np.uint32(1))
            self._states[index] = jax.block_until_ready(state)

        for future in [self._threads.submit(one, index) for index in range(len(self._tasks))]:
            future.result()
        return steps * self.num_tasks * len(self._tasks) / (time.perf_counter() - began)

    def work(self) -> tuple[float, float]:
        """Returns floating-point operations and bytes of one step, as XLA counts them."""
        environment = VectorizedEnvironment(self.bucket)
        task = jax.tree.map(jnp.asarray, make_task(self.domain, self.bucket))
        state = environment.reset(task, key=jax.random.key(0))
        groups = environment.num_groups
        values = Values(*(jnp.full(groups, value) for value in (0.01, 0.1, 0.9)), jnp.float32(DROPOUT))
        plan = Plan(jnp.int32(1), jnp.int32(0), jnp.float32(1e6), jnp.bool_(False))

        def one(params: Any, optimizer: Any) -> Any:
            learner = self.bucket.make_learner()
            take = environment._stepper(learner, task, values, plan, jax.random.key(0))
            return take(jnp.int32(0), (params, optimizer))[0]

        cost: Any = jax.jit(one).lower(state.params, state.optimizer).compile().cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        return float(cost.get("flops", np.nan)), float(cost.get("bytes accessed", np.nan))


class TorchSide:
    """The loop that a practitioner writes, on the same domain."""

    def __init__(self, bucket: Bucket, domain: Domain, device: str = "cpu") -> None:
        self._model = RECOMMENDERS[bucket.learner].for_domain(domain, dim=bucket.dim, dropout=DROPOUT).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameter_groups(), lr=0.01, weight_decay=0.1)
        self._sampler = self._model.sampler(domain, bucket.batch, seed=0, device=device)
        self._device = device
        self.train(4)

    def train(self, steps: int) -> float:
        """Trains for some steps; returns steps per second."""
        began = time.perf_counter()
        for _ in range(steps):
            loss = self._model(*self._sampler.next())
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        if self._device != "cpu":
            torch.cuda.synchronize()
        return steps / (time.perf_counter() - began)


def middle(values: np.ndarray) -> np.ndarray:
    """Returns the interquartile mean over the last axis."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1)


def take_turns(sides: list[Callable[[int], float]], turns: int, seconds: float) -> np.ndarray:
    """Lets the sides train in turn, each for about some seconds; returns steps per second, [side, turn]."""
    steps = [max(8, round(seconds * side(16))) for side in sides]
    return np.array([[side(count) for side, count in zip(sides, steps, strict=True)] for _ in range(turns)]).T


def summarise(speeds: np.ndarray) -> dict[str, float]:
    """Returns both speeds, their ratio and its bootstrap interval, from [2, turns]."""
    ratios = speeds[0] / speeds[1]
    resampled = middle(ratios[np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))])
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {
        "jax": float(middle(speeds[0])),
        "torch": float(middle(speeds[1])),
        "ratio": float(middle(ratios)),
        "low": float(low),
        "high": float(high),
    }


def machine_limits() -> tuple[float, float]:
    """Measures one core's floating-point operations per second (matrix product) and bytes per second (copy)."""
    matrix, block = torch.randn(1024, 1024), torch.randn(32 * 2**20)
    copy = torch.empty_like(block)
    products, copies = [], []
    for _ in range(5):
        began = time.perf_counter()
        matrix @ matrix
        products.append(2 * 1024**3 / (time.perf_counter() - began))
        began = time.perf_counter()
        copy.copy_(block)
        copies.append(2 * 4 * block.numel() / (time.perf_counter() - began))
    return max(products), max(copies)


def torch_processes(learner: str, size: str, steps: int) -> float:
    """Returns the steps per second of two PyTorch processes together, one core each."""
    command = [sys.executable, __file__, "--torch-worker", learner, size, str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    return sum(float(worker.communicate()[0].splitlines()[-1]) for worker in workers)


def measure(learner: str, size: str, limits: tuple[float, float], *, turns: int, seconds: float) -> dict[str, float]:
    """Measures one family at one size on one core."""
    bucket, domain = make_bucket(learner, size), draw_domain(size)
    ours, theirs = JaxSide(bucket, domain), TorchSide(bucket, domain)
    result = summarise(take_turns([ours.train, theirs.train], turns, seconds))
    flops, moved = ours.work()
    result["limit"] = result["jax"] * max(flops / limits[0], moved / limits[1])
    return result


def report(record: dict[str, float], name: str, result: dict[str, float]) -> None:
    """Prints one row and keeps its figures."""
    print(
        f"{name:38} {result['jax']:9.0f} {result['torch']:9.0f} steps/s  ratio {result['ratio']:6.1f} "
        f"[{result['low']:.1f}, {result['high']:.1f}]",
        flush=True,
    )
    record[f"ratio_{name}"] = result["ratio"]
    record |= {f"{key}_{name}": value for key, value in result.items() if key != "ratio"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tasks only, fewer turns")
    parser.add_argument("--learners", nargs="*", default=list(LEARNERS), choices=list(LEARNERS))
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--torch-worker", nargs=3, metavar=("LEARNER", "SIZE", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.torch_worker:
        learner, size, steps = arguments.torch_worker
        print(TorchSide(make_bucket(learner, size), draw_domain(size)).train(int(steps)))
        return

    turns, seconds = (4, 0.1) if arguments.quick else (15, 0.4)
    limits = machine_limits()
    record: dict[str, float] = {}
    print(f"one core: {limits[0] / 1e9:.0f} GFLOP/s, {limits[1] / 1e9:.1f} GB/s; {'':10} JAX   PyTorch")
    for learner in arguments.learners:
        for size in ("small",) if arguments.quick else SIZES:
            result = measure(learner, size, limits, turns=turns, seconds=seconds)
            report(record, f"{learner}_{size}", result)
    bucket, domain = make_bucket(arguments.learners[0], "small"), draw_domain("small")
    for tasks in (1, 4, 16):
        record[f"tasks_{tasks}"] = JaxSide(bucket, domain, num_tasks=tasks).train(512)
    if jax.default_backend() == "cpu" and not arguments.quick:
        for size in SIZES:
            bucket, domain = make_bucket(arguments.learners[0], size), draw_domain(size)
            ours = JaxSide(bucket, domain, devices=2)
            steps = round(record[f"torch_{arguments.learners[0]}_{size}"] * 3)
            speeds = [(ours.train(4 * steps), torch_processes(arguments.learners[0], size, steps)) for _ in range(4)]
            report(record, f"two_cores_{arguments.learners[0]}_{size}", summarise(np.array(speeds).T))
    elif jax.default_backend() != "cpu":
        for size in SIZES:
            bucket, domain = make_bucket(arguments.learners[0], size), draw_domain(size)
            ours, theirs = JaxSide(bucket, domain, num_tasks=32), TorchSide(bucket, domain, "cuda")
            speeds = take_turns([ours.train, theirs.train], turns, seconds)
            report(record, f"accelerator_{arguments.learners[0]}_{size}", summarise(speeds))
    print("targets on one core: " + ", ".join(f"{size} {ratio:g}" for size, ratio in TARGETS.items()))
    figures = {name: round(value, 4) for name, value in record.items()}
    if arguments.output is not None:
        arguments.output.write_text(
            json.dumps({"figures": figures, "targets": TARGETS, "provenance": provenance(seed=0)}, indent=1) + "\n"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
