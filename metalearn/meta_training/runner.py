"""Runs batches of rollouts over every local device, one thread a device.

On a CPU a program of small tensors gains nothing from vmap, which only falls out of cache: episodes run one after
another inside `lax.map`, and a second core works as a second (forced) host device. On an accelerator they run side by
side.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from metalearn.controller.config import ControllerConfig
from metalearn.meta_training.environment import Environment
from metalearn.meta_training.rollout import (
    Episode,
    EpisodeSpec,
    PolicyParams,
    Prior,
    RolloutState,
    advance,
    begin,
    finish,
    normalized,
    rollout,
)

CHUNK = 8
"""Episodes of one compiled call; also the size of a group of rollouts that share task and initialisation."""


class TaskPool(Protocol):
    """Stacked tasks of one size, and the environment that trains them."""

    tasks: Any
    profiles: np.ndarray
    names: tuple[str, ...]

    @property
    def environment(self) -> Environment: ...

    @property
    def label(self) -> str:
        """Family and size, for logs."""
        ...

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


class Ended(NamedTuple):
    """A group of episodes that are over."""

    chunk: Chunk
    returns: np.ndarray
    """[CHUNK], undiscounted"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Some consecutive decisions of a chunk's episodes, on mean actions, each episode under a policy of its own.

    Args:
      chunk: the episodes.
      params: policies; leaves have a leading axis of CHUNK.
      state: where the episodes stand, as `WindowResult.state`; None begins them.
      num_decisions: decisions to make, no more than are left.
    """

    chunk: Chunk
    params: PolicyParams
    state: RolloutState | None
    num_decisions: int


class WindowResult(NamedTuple):
    """What became of a window's episodes."""

    state: RolloutState
    """leaves have a leading axis of CHUNK, as below"""
    reward: np.ndarray
    """[CHUNK, num_decisions]"""
    status: np.ndarray
    """`Status` after the window"""
    score: np.ndarray
    """test metric, NaN while the episodes are under way"""


def make_chunk(
    pool: int,
    num_steps: int,
    *,
    task: Any,
    initialization: Any,
    exploration: Any = 0,
    horizon_told: Any = True,
    horizon_factor: Any = 1.0,
    family_told: Any = True,
    single_group: Any = False,
    start: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    num_start: int,
) -> Chunk:
    """Builds a chunk.

    Every value is a scalar or has CHUNK entries; `start` and `kept` are [num_start] or [CHUNK, num_start].
    """

    def column(value: Any, dtype: Any) -> np.ndarray:
        return np.array(np.broadcast_to(np.asarray(value, dtype), (CHUNK,)))

    def row(values: np.ndarray | None) -> np.ndarray:
        wanted = np.full(num_start, np.nan) if values is None else values
        return np.array(np.broadcast_to(np.asarray(wanted, np.float32), (CHUNK, num_start)))

    return Chunk(
        pool=pool,
        num_steps=num_steps,
        spec=EpisodeSpec(
            column(task, np.int32),
            column(initialization, np.uint32),
            column(exploration, np.uint32),
            column(horizon_told, bool),
            column(horizon_factor, np.float32),
            column(family_told, bool),
            column(single_group, bool),
            row(start),
            row(kept),
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
        self._pace = [1.0] * len(self.pools)
        """seconds per optimizer step of each pool, as last measured"""
        platform = self.devices[0].platform
        self._functions = [_compiled_rollouts(pool.environment, config, platform) for pool in self.pools]
        self._windows = [_compiled_windows(pool.environment, config, platform) for pool in self.pools]

    def steps_per_epoch(self, pool: int, tasks: Sequence[int]) -> float:
        """Returns the optimizer steps of an epoch, the geometric mean over some of a pool's tasks."""
        rows = np.asarray(self.pools[pool].tasks.num_interactions, np.float64)[list(tasks)]
        return float(np.exp(np.log(rows).mean())) / self.pools[pool].environment.samples_per_step

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

        def on(device: Any) -> Callable[[int], Episode]:
            """Returns what runs a piece on a device, with what all pieces share already there."""
            local = jax.device_put((params, prior, np.float32(explore), np.bool_(act)), device)

            def run_chunk(index: int) -> Episode:
                chunk = chunks[index]
                inputs = (*_gather(self.pools[chunk.pool], chunk.spec), np.int32(chunk.num_steps))
                episode = self._functions[chunk.pool](*local, *jax.device_put(inputs, device))
                return jax.tree.map(np.asarray, episode)

            return run_chunk

        return self._distribute(chunks, [1.0] * len(chunks), on, label)

    def advance(self, windows: Sequence[Window], prior: Prior, *, label: str | None = None) -> list[WindowResult]:
        """Runs windows of episodes, the longest first, and returns what became of them in the order given.

        Windows that follow one another under the same policy are the whole episode of `run`, to the bit.

        Args:
          windows: of different chunks.
          prior: base configuration and normaliser.
          label: of a progress bar, as in `run`.
        """
        prior = jax.tree.map(np.asarray, prior)
        horizon = self.config.num_decisions

        def on(device: Any) -> Callable[[int], WindowResult]:
            """Returns what runs a piece on a device, with what all pieces share already there."""
            local = jax.device_put(prior, device)

            def run_window(index: int) -> WindowResult:
                """Runs one window."""
                window = windows[index]
                compiled = self._windows[window.chunk.pool]
                tasks, profiles, spec, num_steps, params, state = jax.device_put(
                    (
                        *_gather(self.pools[window.chunk.pool], window.chunk.spec),
                        np.int32(window.chunk.num_steps),
                        window.params,
                        window.state,
                    ),
                    device,
                )
                if state is None:
                    state = compiled.begin(params, local, tasks, profiles, spec, num_steps)
                    # As a state that comes back: weakly typed leaves would compile another program.
                    state = jax.device_put(jax.tree.map(np.asarray, state), device)
                state, reward, status = compiled.advance(
                    params, local, tasks, spec, num_steps, state, window.num_decisions
                )
                reward = np.array(reward)
                score = np.full(CHUNK, np.nan, np.float32)
                if int(state.decision[0]) == horizon:
                    score, final = compiled.finish(tasks, state)
                    reward[:, -1] += np.asarray(final)
                return WindowResult(jax.tree.map(np.asarray, state), reward, np.asarray(status), np.asarray(score))

            return run_window

        shares = [window.num_decisions / horizon for window in windows]
        return self._distribute([window.chunk for window in windows], shares, on, label)

    def blank_state(self, chunk: Chunk, params: PolicyParams, prior: Prior) -> RolloutState:
        """Returns a state of a chunk's episodes with the shapes and types of a real one, all zero.

        Args:
          chunk: any one of the pool.
          params: one policy, without the axis of CHUNK.
        """
        inputs = (*_gather(self.pools[chunk.pool], chunk.spec), np.int32(chunk.num_steps))
        stacked = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (CHUNK, *np.shape(leaf))), params)
        shapes = jax.eval_shape(self._windows[chunk.pool].begin, stacked, prior, *inputs)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def _distribute(
        self,
        chunks: Sequence[Chunk],
        shares: Sequence[float],
        on: Callable[[Any], Callable[[int], Any]],
        label: str | None,
    ) -> list[Any]:
        """Lets every device take the longest piece of work that is left, until none is.

        Args:
          chunks: what the pieces are of.
          shares: of the chunk's episodes that a piece runs.
          on: device -> function that does the piece of an index there.
        """
        lengths = [chunk.num_steps * share for chunk, share in zip(chunks, shares, strict=True)]
        cost = [length * self._pace[chunk.pool] for length, chunk in zip(lengths, chunks, strict=True)]
        work: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in sorted(range(len(chunks)), key=lambda i: -cost[i]):
            work.put(index)
        results: list[Any] = [None] * len(chunks)

        def serve(device: Any) -> None:
            """Runs pieces on a device until none is left."""
            run_piece = on(device)
            while True:
                try:
                    index = work.get_nowait()
                except queue.Empty:
                    return
                began = perf_counter()
                results[index] = run_piece(index)
                self._pace[chunks[index].pool] = (perf_counter() - began) / lengths[index]
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


class _Windows(NamedTuple):
    """Compiled parts of an episode, each over the CHUNK episodes of a window."""

    begin: Any
    """(params, prior, tasks, profiles, spec, num_steps) -> state"""
    advance: Any
    """(params, prior, tasks, spec, num_steps, state, num_decisions) -> (state, reward, status)"""
    finish: Any
    """(tasks, state) -> (score, last reward)"""


@cache
def _compiled_windows(environment: Environment, config: ControllerConfig, platform: str) -> _Windows:
    def mapped(function, *stacked):
        def one(parts):
            return function(*parts)

        return jax.lax.map(one, stacked) if platform == "cpu" else jax.lax.map(one, stacked, batch_size=CHUNK)

    quiet = {"explore": np.float32(0.0)}

    def begin_all(params, prior, tasks, profiles, spec, num_steps):
        def one(params, task, profile, spec):
            return begin(environment, config, params, prior, task, profile, spec, num_steps, **quiet)

        return mapped(one, params, tasks, profiles, spec)

    def advance_all(params, prior, tasks, spec, num_steps, state, num_decisions):
        def one(params, task, spec, state):
            state, steps = advance(
                environment, config, params, prior, task, spec, num_steps, state, num_decisions, act=True, **quiet
            )
            return state, steps.reward, environment.status(state.environment)

        return mapped(one, params, tasks, spec, state)

    def finish_all(tasks, state):
        return mapped(lambda task, state: finish(environment, task, state), tasks, state)

    return _Windows(jax.jit(begin_all), jax.jit(advance_all, static_argnums=6), jax.jit(finish_all))


def concatenate(episodes: Sequence[Episode]) -> Episode:
    """Joins the episodes of several chunks along the leading axis; fewer groups than the most are padded, mask 0."""
    most = max(episode.role.shape[1] for episode in episodes)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *(_padded(episode, most) for episode in episodes))


def _padded(episode: Episode, num_groups: int) -> Episode:
    """Pads the group axis of one chunk's episodes with zeros."""

    def pad(leaf: np.ndarray, axis: int) -> np.ndarray:
        widths = [(0, num_groups - leaf.shape[axis] if index == axis else 0) for index in range(leaf.ndim)]
        return np.pad(leaf, widths)

    values = {name: pad(value, 2) for name, value in episode.values._asdict().items() if value.ndim == 3}
    return episode._replace(
        group=pad(episode.group, 2),
        role=pad(episode.role, 1),
        group_mask=pad(episode.group_mask, 1),
        group_action=pad(episode.group_action, 2),
        values=episode.values._replace(**values),
    )


def relative_scores(episodes: Episode) -> np.ndarray:
    """Returns log((score + c) / (floor + c)) of each episode, not finite scores as 0."""
    score = np.where(np.isfinite(episodes.score), episodes.score, 0.0)
    return np.asarray(normalized(jnp.asarray(score), jnp.asarray(episodes.floor)))


def returns_by_pool(runner: RolloutRunner, groups: Sequence[Ended]) -> dict[str, float]:
    """Returns the mean return by pool and by real or simulated, for the log."""
    kinds: dict[str, list[float]] = {}
    for chunk, returns in groups:
        pool = runner.pools[chunk.pool]
        kind = "simulated" if pool.names[int(chunk.spec.task[0])] == "simulated" else "real"
        kinds.setdefault(f"return/{kind}/{pool.label}", []).append(float(returns.mean()))
    return {name: float(np.mean(values)) for name, values in sorted(kinds.items())}
