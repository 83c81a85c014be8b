"""The meta-training loop: search for the base, supervised start, policy gradients, validation, release.

A killed run resumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalearn.controller.checkpoint import Checkpoint, flatten, save_checkpoint
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.errors import InvalidArgumentError, SessionError
from metalearn.meta_training import ppo, warm_start
from metalearn.meta_training.persistence import Persistence
from metalearn.meta_training.release import released_prior
from metalearn.meta_training.rollout import Episode, PolicyParams, Prior
from metalearn.meta_training.runner import (
    CHUNK,
    Chunk,
    RolloutRunner,
    TaskPool,
    concatenate,
    make_chunk,
    relative_scores,
)

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class MetaTrainConfig:
    """Settings of a meta-training run; written into the checkpoint.

    Args:
      seed: of everything.
      num_iterations: policy updates.
      groups_per_pool: groups of rollouts of each pool in an iteration.
      steps_range: of each pool, the log-uniform range of optimizer steps per interval.
      search_tasks, search_configurations: of each pool, the size of the search for the base.
      told_share: share of episodes whose horizon the controller knows.
      single_group_share: share of episodes with all parameters in one group.
      validate_every: iterations between evaluations on the validation pools.
      validation_episodes: of each validation pool.
      patience: evaluations without improvement before the run stops.
      ppo: of the estimator.
    """

    seed: int = 0
    num_iterations: int = 80
    groups_per_pool: tuple[int, ...] = (4, 5, 3)
    steps_range: tuple[tuple[int, int], ...] = ((16, 96), (16, 96), (24, 128))
    search_tasks: tuple[int, ...] = (32, 32, 36)
    search_configurations: tuple[int, ...] = (48, 48, 32)
    told_share: float = 0.75
    single_group_share: float = 0.3
    validate_every: int = 10
    validation_episodes: int = 24
    patience: int = 8
    ppo: ppo.PPOConfig = field(default_factory=ppo.PPOConfig)

    def __post_init__(self) -> None:
        for name in ("num_iterations", "validate_every", "validation_episodes", "patience"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"`{name}` must be a positive int, got {getattr(self, name)}")
        if sum(self.groups_per_pool) % self.ppo.num_minibatches:
            raise InvalidArgumentError(
                f"`groups_per_pool` must sum to a multiple of {self.ppo.num_minibatches} minibatches, "
                f"got {self.groups_per_pool}"
            )


@dataclass(kw_only=True, eq=False)
class MetaTrainState:
    """What a meta-training run is at an iteration; everything else follows from the config."""

    iteration: int
    params: PolicyParams
    optimizer_state: Any
    prior: Prior
    best: PolicyParams
    best_iteration: int
    best_validation: float
    best_log: dict[str, float]
    stale: int
    validated: int
    """iteration of the last evaluation, -1 before the first"""


def iteration_chunks(config: MetaTrainConfig, runner: RolloutRunner, iteration: int) -> list[Chunk]:
    """Draws the groups of one iteration; a pure function of config, pools and iteration."""
    rng = np.random.default_rng([config.seed, 1, iteration])
    chunks = []
    for index, pool in enumerate(runner.pools):
        for task in warm_start.balanced_tasks(pool.names, config.groups_per_pool[index], rng):
            chunks.append(
                make_chunk(
                    index,
                    warm_start.draw_steps(config.steps_range[index], rng),
                    task=task,
                    initialization=int(rng.integers(2**31)),
                    exploration=rng.integers(2**31, size=CHUNK),
                    horizon_told=bool(rng.random() < config.told_share),
                    single_group=bool(rng.random() < config.single_group_share),
                    num_start=len(CONTROLLED),
                )
            )
    return chunks


def validation_chunks(config: MetaTrainConfig, runner: RolloutRunner, *, horizon_told: bool) -> list[Chunk]:
    """Draws the fixed episodes that every evaluation runs."""
    rng = np.random.default_rng([config.seed, 2])
    chunks = []
    for index, pool in enumerate(runner.pools):
        tasks = [int(task) for task in np.arange(config.validation_episodes) % len(pool)]
        for first in range(0, len(tasks), CHUNK):
            part = (tasks[first : first + CHUNK] * CHUNK)[:CHUNK]
            steps = warm_start.draw_steps(config.steps_range[index], rng)
            seeds = rng.integers(2**31, size=CHUNK)
            chunks.append(
                make_chunk(
                    index, steps, task=part, initialization=seeds, horizon_told=horizon_told, num_start=len(CONTROLLED)
                )
            )
    return chunks


def evaluate(
    config: MetaTrainConfig, runner: RolloutRunner, params: PolicyParams, prior: Prior, *, act: bool, base: bool
) -> dict[bool, tuple[np.ndarray, list[str]]]:
    """Scores the mean policy (or the base) on the validation episodes, by whether the horizon is told.

    Args:
      act: in-run actions on.
      base: force the base start configuration.

    Returns:
      told -> (log-ratio to popularity per episode, name of each episode's domain and pool).
    """
    results = {}
    for told in (True, False):
        chunks = validation_chunks(config, runner, horizon_told=told)
        if base:
            start = np.asarray(prior.base)[int(told)]
            chunks = [
                Chunk(
                    pool=c.pool,
                    num_steps=c.num_steps,
                    spec=c.spec._replace(start=np.tile(start, (CHUNK, 1)).astype(np.float32)),
                )
                for c in chunks
            ]
        episodes = runner.run(chunks, params, prior, act=act)
        names = [f"{runner.pools[c.pool].names[task]}/{c.pool}" for c in chunks for task in c.spec.task]
        results[told] = (relative_scores(concatenate(episodes)), names)
    return results


def prepare(
    config: MetaTrainConfig, controller: ControllerConfig, runner: RolloutRunner, persistence: Persistence, log: Log
) -> MetaTrainState:
    """Settles base, normaliser and supervised start by one search."""
    params = ppo.init(controller, config.ppo, key=jax.random.key(config.seed))
    guess = np.array(
        [controller.space[n].encode(v) for n, v in zip(CONTROLLED, (0.03, 0.34, 0.9, 0.1), strict=True)], np.float32
    )
    prior = Prior(np.stack([guess, guess]), warm_start.identity_normalizer(controller))
    began = time.monotonic()
    result = warm_start.SearchResult(
        **persistence.cached_arrays(
            "search.npz",
            lambda: vars(
                warm_start.run_search(
                    runner,
                    params,
                    prior,
                    tasks_per_pool=config.search_tasks,
                    configurations=config.search_configurations,
                    steps_range=config.steps_range,
                    told_share=config.told_share,
                    seed=config.seed,
                )
            ),
        )
    )
    record: dict[str, Any] = {"phase": "search", "trials": len(result.score), "seconds": time.monotonic() - began}
    bases = []
    for told, label in ((False, "base_unknown"), (True, "base")):
        base, score = warm_start.choose_base(_rows(result, result.told == told), controller, seed=config.seed)
        decoded = zip(CONTROLLED, base.tolist(), strict=True)
        record |= {f"{label}_{name}": controller.space[name].decode(value) for name, value in decoded}
        record[f"{label}_gain"] = score
        bases.append(base)
    prior = prior._replace(base=np.stack(bases))
    log(record)

    exploratory = [
        chunk for iteration in range(2) for chunk in iteration_chunks(config, runner, -1 - iteration + 2**20)
    ]
    episodes = runner.run(exploratory, params, prior, explore=1.5)
    prior = prior._replace(normalizer=warm_start.fit_normalizer(episodes, np.random.default_rng([config.seed, 3])))
    fitted, predicted = warm_start.fit_start(result, controller, params.network, prior, seed=config.seed)
    log({"phase": "supervised start", "predicted_first": float(predicted[0]), "predicted_last": float(predicted[-1])})
    params = params._replace(network=fitted)
    return MetaTrainState(
        iteration=0,
        params=params,
        optimizer_state=ppo.optimizer(config.ppo).init(params),
        prior=prior,
        best=params,
        best_iteration=0,
        best_validation=-np.inf,
        best_log={},
        stale=0,
        validated=-1,
    )


def _rows(result: warm_start.SearchResult, rows: np.ndarray) -> warm_start.SearchResult:
    chosen = rows if rows.any() else np.ones_like(rows)
    return warm_start.SearchResult(**{name: value[chosen] for name, value in vars(result).items()})


def meta_train(
    config: MetaTrainConfig,
    controller: ControllerConfig,
    pools: Sequence[TaskPool],
    validation_pools: Sequence[TaskPool],
    *,
    directory: Path,
    log: Log,
    provenance: dict[str, Any],
) -> Checkpoint:
    """Meta-trains a controller, resuming from `directory` if it holds an unfinished run of the same config.

    Args:
      config: settings.
      controller: architecture.
      pools: tasks to learn from, one pool a size.
      validation_pools: tasks of domains that are only ever evaluated; they choose the iteration that is released, and
        the base that it stands on.
      directory: Orbax checkpoints, the search, the baseline's scores, and the best checkpoint so far.
      log: called with a flat dict at every iteration.
      provenance: kept in the checkpoint.

    Returns:
      The checkpoint of the iteration that validated best.
    """
    runner, validation_runner = RolloutRunner(pools, controller), RolloutRunner(validation_pools, controller)
    pool_names = [pool.names for pool in (*pools, *validation_pools)]
    identity = {"config": asdict(config), "controller": asdict(controller), "pools": pool_names}
    with Persistence(directory, json.dumps(identity, sort_keys=True)) as persistence:
        template = MetaTrainStateTemplate(config, controller)
        state = persistence.restore(template)
        if state is None:
            state = prepare(config, controller, runner, persistence, log)
            persistence.save(state)
        baseline = persistence.cached(
            "baseline.json",
            lambda: {
                str(told): scores.tolist()
                for told, (scores, _) in evaluate(
                    config, validation_runner, state.params, state.prior, act=False, base=True
                ).items()
            },
        )
        update = ppo.make_update(controller, config.ppo)
        while True:
            due = state.iteration % config.validate_every == 0 or state.iteration == config.num_iterations
            if due and state.validated != state.iteration:
                _validate(config, validation_runner, state, baseline, log)
                persistence.save(state)
                if state.best_iteration == state.iteration:
                    save_checkpoint(_released(state, config, controller, provenance), directory / "best.safetensors")
            if state.iteration >= config.num_iterations or state.stale >= config.patience:
                break
            _iterate(config, runner, state, update, log)
    # Slices want another base than whole domains, and the trained policy has its say too: see `release`.
    state.prior, records = released_prior(
        validation_runner,
        state.best,
        state.prior,
        num_steps=max(steps for _, steps in config.steps_range),
        seed=config.seed,
        log=log,
    )
    return _released(state, config, controller, {**provenance, "release_base": records})


def _iterate(config: MetaTrainConfig, runner: RolloutRunner, state: MetaTrainState, update: Any, log: Log) -> None:
    """Rolls out one batch of groups and updates the policy."""
    began = time.monotonic()
    chunks = iteration_chunks(config, runner, state.iteration)
    label = f"iteration {state.iteration}"
    episodes = concatenate(runner.run(chunks, state.params, state.prior, explore=1.0, label=label))
    rolled = time.monotonic()
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.iteration)
    state.params, state.optimizer_state, metrics = update(
        state.params, state.optimizer_state, state.prior, episodes, key
    )
    state.iteration += 1
    log(
        {
            "phase": "train",
            "iteration": state.iteration,
            "episodes": state.iteration * CHUNK * len(chunks),
            "rollout_seconds": rolled - began,
            "update_seconds": time.monotonic() - rolled,
            **ppo.summarize(episodes),
            **{name: float(value) for name, value in metrics.items()},
            "log_std": float(np.mean(state.params.log_std)),
            **_by_family(episodes, runner, chunks),
        }
    )


def _released(
    state: MetaTrainState, config: MetaTrainConfig, controller: ControllerConfig, provenance: dict[str, Any]
) -> Checkpoint:
    """Makes a checkpoint of the iteration that validated best."""
    return Checkpoint(
        config=controller,
        network=flatten(jax.tree.map(np.asarray, state.best.network)),
        base=np.asarray(state.prior.base),
        normalizer=jax.tree.map(np.asarray, state.prior.normalizer),
        provenance={
            **provenance,
            "meta_training": asdict(config),
            "best_iteration": state.best_iteration,
            "episodes": state.best_iteration * CHUNK * sum(config.groups_per_pool),
            "validation": state.best_log,
        },
    )


def _by_family(episodes: Episode, runner: RolloutRunner, chunks: Sequence[Chunk]) -> dict[str, float]:
    """Mean return by size and by real or simulated."""
    total = episodes.reward.sum(1).reshape(-1, CHUNK).mean(1)
    families: dict[str, list[float]] = {}
    for value, chunk in zip(total, chunks, strict=True):
        kind = "simulated" if runner.pools[chunk.pool].names[int(chunk.spec.task[0])] == "simulated" else "real"
        families.setdefault(f"return/{kind}/{chunk.pool}", []).append(float(value))
    return {name: float(np.mean(values)) for name, values in sorted(families.items())}


def _validate(
    config: MetaTrainConfig, runner: RolloutRunner, state: MetaTrainState, baseline: dict[str, Any], log: Log
) -> None:
    """Evaluates against the base schedule on real validation domains; keeps the best parameters."""
    began = time.monotonic()
    record: dict[str, float] = {}
    for told, (scores, names) in evaluate(config, runner, state.params, state.prior, act=True, base=False).items():
        gain = scores - np.array(baseline[str(told)])
        label = "known" if told else "unknown"
        record[f"validation/gain/{label}"] = float(gain.mean())
        record[f"validation/won/{label}"] = float((gain > 0).mean())
        pools = np.array([name.rsplit("/", 1)[1] for name in names])
        for pool in sorted(set(pools)):
            record[f"validation/gain/{label}/{pool}"] = float(gain[pools == pool].mean())
    overall = 0.75 * record["validation/gain/known"] + 0.25 * record["validation/gain/unknown"]
    log(
        {
            "phase": "validate",
            "iteration": state.iteration,
            "seconds": time.monotonic() - began,
            "validation/overall": overall,
            **record,
        }
    )
    if not np.isfinite(overall):
        raise SessionError(
            "validation score is not finite; the meta-training state is unusable, restart from an earlier one"
        )
    state.validated = state.iteration
    if overall > state.best_validation:
        state.best, state.best_iteration, state.best_validation, state.best_log, state.stale = (
            state.params, state.iteration, overall, record, 0,
        )  # fmt: skip
    elif state.iteration > state.best_iteration:
        state.stale += 1


class MetaTrainStateTemplate:
    """Makes a state of the right shapes, which a restored one is read into."""

    def __init__(self, config: MetaTrainConfig, controller: ControllerConfig) -> None:
        self._config, self._controller = config, controller

    def __call__(self) -> MetaTrainState:
        params = ppo.init(self._controller, self._config.ppo, key=jax.random.key(0))
        base = np.zeros((2, len(CONTROLLED)), np.float32)
        return MetaTrainState(
            iteration=0,
            params=params,
            optimizer_state=ppo.optimizer(self._config.ppo).init(params),
            prior=Prior(base, warm_start.identity_normalizer(self._controller)),
            best=params,
            best_iteration=0,
            best_validation=-np.inf,
            best_log={},
            stale=0,
            validated=-1,
        )
