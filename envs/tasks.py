"""Pools of tasks for meta-training: simulated domains and slices of real ones, padded to one size bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from envs.domains import Domain, make_domain
from envs.events import EventConfig, EventfulEnvironment
from envs.learners import TrainingData
from envs.public import crop, draw_slice
from envs.simulated import SimulatedPrior, simulate_domain
from envs.vectorized import Bucket, Task, VectorizedEnvironment, make_task, stack_tasks
from metalearn.controller.observation import PROFILE_DESCRIPTORS, profile_descriptors
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions
from metalearn.meta_training.environment import Environment

EVENTS = EventConfig(
    missing_validation=0.1, missing_gradients=0.1, delayed_validation=0.1, missing_losses=0.3, drift=0.15
)
"""What befalls episodes that are learnt from; those that validate see none."""
NO_EVENTS = EventConfig()
_SIZES = ("users", "items", "interactions", "evaluated", "targets", "history", "content", "exposures")
"""Of a bucket, what the arrays of its tasks depend on."""
_ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskPool:
    """Tasks of one bucket, stacked.

    Args:
      bucket: their padded sizes.
      tasks: leaves have a leading axis of tasks.
      profiles: float32 [tasks, profile descriptors], raw, NaN where undefined.
      names: the domain each task comes from; simulated ones start with "simulated".
      events: what may befall their episodes.
    """

    bucket: Bucket
    tasks: Task
    profiles: np.ndarray
    names: tuple[str, ...]
    events: EventConfig = NO_EVENTS

    def __len__(self) -> int:
        return len(self.names)

    def trained_by(self, bucket: Bucket) -> TaskPool:
        """Returns the same tasks for another learner, optimizer, dimension or batch.

        Raises:
          InvalidArgumentError: the bucket pads to other sizes; the message names them.
        """
        differ = [name for name in _SIZES if getattr(bucket, name) != getattr(self.bucket, name)]
        if differ:
            raise InvalidArgumentError(
                f"`bucket` must have the {differ} of these tasks, got {bucket}; build a pool of its own"
            )
        return replace(self, bucket=bucket)

    @property
    def label(self) -> str:
        """Family and size, for logs."""
        return f"{self.bucket.learner}/{self.bucket.users}"

    @property
    def environment(self) -> Environment:
        """The environment that trains these tasks."""
        environment = VectorizedEnvironment(self.bucket)
        return environment if self.events == NO_EVENTS else EventfulEnvironment(environment, self.events)


def simulated_domain(bucket: Bucket, rng: np.random.Generator) -> Domain:
    """Draws a simulated domain that fits a bucket, its size log-uniform up to the bucket's."""
    low_users, low_items = max(bucket.users // 6, 100), max(bucket.items // 6, 80)
    prior = SimulatedPrior(users=(low_users, bucket.users), items=(low_items, bucket.items))
    return _first_that_splits(lambda split: simulate_domain(prior, seed=rng, split=split), "simulated", "auto")


FULL_SIZE = 4_096
"""Buckets of at least so many users hold whole domains, cropped only where they must be: the best configuration of a
slice, with many epochs over few interactions, is not that of the whole."""


def real_domain(name: str, interactions: Interactions, bucket: Bucket, rng: np.random.Generator) -> Domain:
    """Draws a slice (or a crop, see `FULL_SIZE`) of a real domain; half of those with times are split by time."""
    timed = interactions.timestamp is not None and rng.random() < 0.5
    minima = (max(bucket.users // 4, 64), max(min(bucket.items // 6, interactions.num_items // 2), 32))

    def draw() -> Interactions:
        """Crops a whole domain, or draws a slice of one, at random."""
        if bucket.users >= FULL_SIZE:
            share = rng.uniform(0.5, 1.0)
            return crop(interactions, max_users=round(share * bucket.users), max_items=bucket.items, key=rng)
        return draw_slice(
            interactions,
            max_users=bucket.users,
            max_items=bucket.items,
            key=rng,
            min_users=min(minima[0], interactions.num_users // 2),
            min_items=minima[1],
        )

    return _first_that_splits(
        lambda split: make_domain(draw(), name=name, split=split), name, "time" if timed else "leave-last-out"
    )


def _first_that_splits(draw: Callable[[Any], Domain], name: str, split: str) -> Domain:
    """Draws until a domain can be split; the later attempts leave the last ones out, which asks for less."""
    failure: InvalidArgumentError | None = None
    for attempt in range(_ATTEMPTS):
        try:
            return draw(split if attempt < _ATTEMPTS // 2 else "leave-last-out")
        except InvalidArgumentError as error:
            failure = error
    raise InvalidArgumentError(f"no usable slice of {name} in {_ATTEMPTS} draws; the last: {failure}") from failure


def build_pool(
    sources: Mapping[str, Interactions],
    bucket: Bucket,
    *,
    slices_per_domain: int,
    num_simulated: int,
    seed: int,
    events: EventConfig = NO_EVENTS,
    cache: Path | None = None,
) -> TaskPool:
    """Builds the tasks of one bucket, or reads them from the cache.

    Args:
      sources: positives of real domains by name; those too small for a slice are left out.
      bucket: padded sizes.
      slices_per_domain: slices drawn of each real domain.
      num_simulated: simulated domains beside them.
      seed: of every draw.
      events: what may befall the pool's episodes.
      cache: folder for the pool; the key covers sources, bucket, counts, prior and seed.

    Raises:
      InvalidArgumentError: no task could be made at all.
    """
    described = [(name, len(rows), rows.num_users, rows.num_items) for name, rows in sorted(sources.items())]
    prior = SimulatedPrior() if num_simulated else None
    key = repr((described, bucket, slices_per_domain, num_simulated, prior, seed, PROFILE_DESCRIPTORS))
    path = cache / f"tasks-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz" if cache else None
    if path and path.exists():
        with np.load(path) as stored:
            names = [name for name in Task._fields if name != "data"]
            data = TrainingData(*(stored[f"data.{name}"] for name in TrainingData._fields))
            tasks = Task(data, **{name: stored[name] for name in names})
            return TaskPool(
                bucket=bucket,
                tasks=tasks,
                profiles=stored["profiles"],
                names=tuple(stored["names"].tolist()),
                events=events,
            )
    domains = list(_domains(sources, bucket, slices_per_domain, num_simulated, seed))
    if not domains:
        raise InvalidArgumentError("no task: pass `sources` with real domains or `num_simulated` above 0")
    pool = TaskPool(
        bucket=bucket,
        tasks=stack_tasks([make_task(domain, bucket, seed=index) for index, domain in enumerate(domains)]),
        profiles=np.stack([profile_descriptors(domain.profile) for domain in domains]).astype(np.float32),
        names=tuple(domain.name for domain in domains),
        events=events,
    )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = pool.tasks._asdict()
        data = arrays.pop("data")._asdict()
        np.savez_compressed(
            path,
            profiles=pool.profiles,
            names=np.array(pool.names),
            **arrays,
            **{f"data.{name}": value for name, value in data.items()},
        )
    return pool


def _domains(
    sources: Mapping[str, Interactions], bucket: Bucket, slices_per_domain: int, num_simulated: int, seed: int
) -> Iterator[Domain]:
    for order, name in enumerate(sorted(sources)):
        for index in range(slices_per_domain):
            try:
                yield real_domain(name, sources[name], bucket, np.random.default_rng([seed, 0, order, index]))
            except InvalidArgumentError:
                break
    for index in range(num_simulated):
        yield simulated_domain(bucket, np.random.default_rng([seed, 1, index]))
