"""Runs batches of rollouts over every local device, one thread a device.

On a CPU a program of small tensors gains nothing from vmap, which only falls out of cache: episodes run one after
another inside `lax.map`, and a second core works as a second (forced) host device. On an accelerator they run side by
side.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from metalearn.controller.config import ControllerConfig
from metalearn.meta_training.environment import Environment
from metalearn.meta_training.rollout import Episode, EpisodeSpec, PolicyParams, Prior, normalized, rollout

CHUNK = 8
"""Episodes of one compiled call; also the size of a group of rollouts that share task and initialisation."""


class TaskPool(Protocol):
    """Stacked tasks of one size, and the environment that trains them."""

    tasks: Any
    profiles: np.ndarray
    names: tuple[str, ...]

    @property
    def environment(self) -> Environment: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Episodes that run in one call.

    Args:
      pool: index of the pool.
      spec: leaves have a leading axis of CHUNK.
      num_steps: optimizer steps of an interval, the same for all.
    """

    pool: int
    spec: EpisodeSpec
    num_steps: int


def make_chunk(
    pool: int,
    num_steps: int,
    *,
    task: Any,
    initialization: Any,
    exploration: Any = 0,
    horizon_told: Any = True,
    single_group: Any = False,
    start: np.ndarray | None = None,
    num_start: int,
) -> Chunk:
    """Builds a chunk; every value is a scalar or has CHUNK entries, `start` is [num_start] or [CHUNK, num_start]."""

    def column(value: Any, dtype: Any) -> np.ndarray:
        return np.array(np.broadcast_to(np.asarray(value, dtype), (CHUNK,)))

    forced = np.full(num_start, np.nan) if start is None else start
    return Chunk(
        pool=pool,
        num_steps=num_steps,
        spec=EpisodeSpec(
            column(task, np.int32),
            column(initialization, np.uint32),
            column(exploration, np.uint32),
            column(horizon_told, bool),
            column(single_group, bool),
            np.array(np.broadcast_to(np.asarray(forced, np.float32), (CHUNK, num_start))),
        ),
    )


class RolloutRunner:
    """Holds the pools on every device and runs chunks on whichever is free.

    Args:
      pools: task pools.
      config: of the controller.
      devices: all local ones by default.
    """

    def __init__(
        self, pools: Sequence[TaskPool], config: ControllerConfig, devices: Sequence[Any] | None = None
    ) -> None:
        self.pools = tuple(pools)
        self.config = config
        self.devices = tuple(devices or jax.local_devices())
        self._functions = [
            _compiled_rollouts(pool.environment, config, self.devices[0].platform) for pool in self.pools
        ]

    def run(
        self,
        chunks: Sequence[Chunk],
        params: PolicyParams,
        prior: Prior,
        *,
        explore: float = 0.0,
        act: bool = True,
        label: str | None = None,
    ) -> list[Episode]:
        """Runs chunks, the longest first, and returns their episodes in the order given, as NumPy arrays.

        Args:
          params: policy parameters.
          prior: base configuration and normaliser.
          explore: scale of the action noise.
          act: False runs the base schedule from the start configuration.
          label: of a progress bar; None shows none, and neither does anything but a terminal.
        """
        params, prior = jax.tree.map(np.asarray, (params, prior))
        sizes = [jax.tree.leaves(pool.tasks)[0][0].size for pool in self.pools]
        cost = [chunk.num_steps * sizes[chunk.pool] for chunk in chunks]
        work: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in sorted(range(len(chunks)), key=lambda i: -cost[i]):
            work.put(index)
        results: list[Any] = [None] * len(chunks)

        def serve(device: Any) -> None:
            local = jax.device_put((params, prior, np.float32(explore), np.bool_(act)), device)
            while True:
                try:
                    index = work.get_nowait()
                except queue.Empty:
                    return
                chunk = chunks[index]
                inputs = (*_gather(self.pools[chunk.pool], chunk.spec), np.int32(chunk.num_steps))
                episode = self._functions[chunk.pool](*local, *jax.device_put(inputs, device))
                results[index] = jax.tree.map(np.asarray, episode)
                bar.update()

        quiet = True if label is None else None
        with (
            tqdm(total=len(chunks), desc=label, unit="chunk", leave=False, disable=quiet) as bar,
            ThreadPoolExecutor(len(self.devices)) as threads,
        ):
            for future in [threads.submit(serve, device) for device in self.devices]:
                future.result()
        return results


def _gather(pool: TaskPool, spec: EpisodeSpec) -> tuple[Any, np.ndarray, EpisodeSpec]:
    """Takes a chunk's tasks out of their pool, one an episode, so that every pool of a size shares one program."""
    tasks = jax.tree.map(lambda leaf: leaf[spec.task], pool.tasks)
    return tasks, pool.profiles[spec.task], spec._replace(task=np.arange(CHUNK, dtype=np.int32))


@cache
def _compiled_rollouts(environment: Environment, config: ControllerConfig, platform: str) -> Any:
    def run(params, prior, explore, act, tasks, profiles, spec, num_steps):
        def one(spec):
            return rollout(
                environment, config, params, prior, tasks, profiles, spec, num_steps, explore=explore, act=act
            )

        return jax.lax.map(one, spec) if platform == "cpu" else jax.lax.map(one, spec, batch_size=CHUNK)

    return jax.jit(run)


def concatenate(episodes: Sequence[Episode]) -> Episode:
    """Joins the episodes of several chunks along the leading axis."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *episodes)


def relative_scores(episodes: Episode) -> np.ndarray:
    """Returns log((score + c) / (floor + c)) of each episode, not finite scores as 0."""
    score = np.where(np.isfinite(episodes.score), episodes.score, 0.0)
    return np.asarray(normalized(jnp.asarray(score), jnp.asarray(episodes.floor)))
