"""The small meta-training whose arms other scripts compare: one pool of matrix factorisation at the smallest size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from envs.public import load_folder
from envs.tasks import TaskPool, build_pool
from envs.vectorized import SMALL, Bucket
from metalearn.meta_training.config import MetaTrainConfig
from metalearn.meta_training.ppo import PPOConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Args:
      bucket: of every task.
      simulated: domains to learn from.
      held_out: simulated domains to measure on, where no real ones are given.
      slices: of each real domain.
      seeds: runs of each arm.
      settings: of every run.
    """

    bucket: Bucket
    simulated: int
    held_out: int
    slices: int
    seeds: int
    settings: MetaTrainConfig


FULL = Size(
    bucket=SMALL,
    simulated=40,
    held_out=24,
    slices=4,
    seeds=3,
    settings=MetaTrainConfig(
        num_iterations=60,
        groups_per_pool=(8,),
        steps_range=((16, 96),),
        search_tasks=(24,),
        search_configurations=(32,),
        validate_every=10,
        validation_episodes=48,
    ),
)
QUICK = Size(
    bucket=Bucket(users=128, items=96, interactions=4_096, dim=4, batch=32, evaluated=32),
    simulated=6,
    held_out=4,
    slices=1,
    seeds=2,
    settings=MetaTrainConfig(
        num_iterations=2,
        groups_per_pool=(4,),
        steps_range=((4, 8),),
        search_tasks=(4,),
        search_configurations=(8,),
        validate_every=1,
        validation_episodes=8,
        ppo=PPOConfig(num_epochs=1),
    ),
)


def build_pools(size: Size, data: Path | None) -> tuple[TaskPool, TaskPool]:
    """Builds the tasks to learn from, and those held out."""
    pools = []
    for seed, (role, count) in enumerate((("meta-training", size.simulated), ("validation", size.held_out))):
        sources = load_folder(data, role=role) if data else {}
        real = {name: source.interactions() for name, source in sources.items()}
        simulated = 0 if real and role == "validation" else count
        pools.append(build_pool(real, size.bucket, slices_per_domain=size.slices, num_simulated=simulated, seed=seed))
        print(f"{role}: {len(pools[-1])} tasks, {len(real)} real domains", flush=True)
    return pools[0], pools[1]
