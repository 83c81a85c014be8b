"""A recorded run: the signals of a small real training run, kept in data/recorded_run.npz.

`python -m tests.recorded_run` records it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metalearn.profiles import DomainProfile
from metalearn.signals import IntervalStatistics

PATH = Path(__file__).with_name("data") / "recorded_run.npz"
NUM_DECISIONS, STEPS, BATCH_SIZE = 20, 24, 64


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A domain's profile and one run's intervals; two parameter groups, horizon `NUM_DECISIONS * STEPS`."""

    profile: DomainProfile
    intervals: tuple[IntervalStatistics, ...]


def load_recorded_run() -> RecordedRun:
    """Read the recorded run."""
    with np.load(PATH) as stored:
        names = [name for name in IntervalStatistics._fields if name in stored]  # no losses beside the metric
        columns = [stored[name].astype(np.float64) for name in names]
        profile = DomainProfile.from_json(str(stored["profile"]))
    return RecordedRun(
        profile=profile,
        intervals=tuple(IntervalStatistics(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)),
    )


def record_run() -> None:
    """Train BPR matrix factorisation on a simulated domain under the base schedule, and write what was measured."""
    import jax
    import jax.numpy as jnp

    from envs.tasks import simulated_domain
    from envs.vectorized import Bucket, VectorizedEnvironment, make_task
    from metalearn.controller.actions import Values
    from metalearn.meta_training.environment import Plan

    bucket = Bucket(users=256, items=128, interactions=8192, dim=8, batch=BATCH_SIZE, evaluated=64)
    domain = simulated_domain(bucket, np.random.default_rng(3))
    task = jax.tree.map(jnp.asarray, make_task(domain, bucket))
    environment = VectorizedEnvironment(bucket)
    state = environment.reset(task, key=jax.random.key(0))
    step = jax.jit(environment.step)
    values = Values(*(jnp.full(2, value, jnp.float32) for value in (0.03, 0.34, 0.9)), jnp.float32(0.1))
    rows = []
    for index in range(NUM_DECISIONS):
        horizon = jnp.float32(NUM_DECISIONS * STEPS)
        plan = Plan(jnp.int32(STEPS), jnp.int32(index * STEPS), horizon, jnp.bool_(False))
        state, statistics = step(task, state, values, plan, key=jax.random.key(1 + index))
        rows.append(jax.tree.map(np.asarray, statistics))
    columns = {
        name: np.stack(column) for name, column in zip(IntervalStatistics._fields, zip(*rows, strict=True), strict=True)
    }
    np.savez_compressed(PATH, profile=np.array(domain.profile.to_json()), **columns)


if __name__ == "__main__":
    record_run()
