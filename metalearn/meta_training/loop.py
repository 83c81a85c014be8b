"""The meta-training loop: search for the bases, supervised start, an estimator's iterations, validation.

A killed run resumes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalearn.controller.checkpoint import Checkpoint, save_checkpoint
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.errors import SessionError
from metalearn.meta_training import warm_start
from metalearn.meta_training.config import KNOWN, MetaTrainConfig
from metalearn.meta_training.curriculum import Curriculum, Pick
from metalearn.meta_training.estimator import Estimator, make_estimator
from metalearn.meta_training.outcome import fit_outcome
from metalearn.meta_training.outcome_rows import episode_domains
from metalearn.meta_training.persistence import Persistence
from metalearn.meta_training.release import released, with_bases
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
    curriculum: Curriculum
    validated: int
    """iteration of the last evaluation, -1 before the first"""


def _draw_steps(
    config: MetaTrainConfig, runner: RolloutRunner, pool: int, tasks: Sequence[int], rng: np.random.Generator
) -> int:
    return warm_start.draw_steps(config.epochs_range, config.steps_range[pool], runner, pool, tasks, rng)


def iteration_chunks(
    config: MetaTrainConfig, runner: RolloutRunner, iteration: int, curriculum: Curriculum | None = None
) -> list[Chunk]:
    """Draws the groups of one iteration; a pure function of config, pools, iteration and curriculum.

    Args:
      curriculum: what is known of learning progress; None knows nothing.
    """
    rng, known = np.random.default_rng([config.seed, 1, iteration]), curriculum or Curriculum()
    chunks = []
    for index, pool in enumerate(runner.pools):
        tasks = warm_start.balanced_tasks(pool.names, config.groups_per_pool[index], rng)
        picks = known.picks(index, pool.names, tasks, share=config.progress_share, rng=rng)
        chunks += [_draw_group(config, runner, index, pick) for pick in picks]
    return chunks


def _draw_group(config: MetaTrainConfig, runner: RolloutRunner, pool: int, pick: Pick) -> Chunk:
    """Draws what a group's episodes are told and what befalls them; all of it follows from its seed."""
    rng = np.random.default_rng([config.seed, 5, pick.seed])
    shipped = np.array([hyperparameter.encode(hyperparameter.default) for hyperparameter in runner.config.space])
    steps = _draw_steps(config, runner, pool, [pick.task], rng)
    told, family_told, single_group, wrong = rng.random(4) < (
        config.told_share,
        config.family_told_share,
        config.single_group_share,
        config.wrong_horizon_share,
    )
    factor = 2.0 ** rng.uniform(-1.0, 1.0)
    kept = rng.random(len(CONTROLLED)) < config.kept_share
    kept[CONTROLLED.index("learning_rate")] = False
    return make_chunk(
        pool,
        steps,
        task=pick.task,
        initialization=pick.seed,
        exploration=rng.integers(2**31, size=CHUNK),
        horizon_told=told,
        horizon_factor=factor if wrong else 1.0,
        family_told=family_told,
        single_group=single_group,
        kept=np.where(kept, shipped, np.nan),
        num_start=len(CONTROLLED),
    )


def validation_chunks(config: MetaTrainConfig, runner: RolloutRunner, *, horizon_told: bool) -> list[Chunk]:
    """Draws the fixed episodes that every evaluation runs."""
    rng = np.random.default_rng([config.seed, 2])
    chunks = []
    for index, pool in enumerate(runner.pools):
        # Evenly over the pool, whose tasks come domain by domain.
        rounds = math.ceil(config.validation_episodes / len(pool))
        spread = np.linspace(0, rounds * len(pool), config.validation_episodes, endpoint=False)
        tasks = [int(place) % len(pool) for place in spread]
        for first in range(0, len(tasks), CHUNK):
            part = (tasks[first : first + CHUNK] * CHUNK)[:CHUNK]
            steps = _draw_steps(config, runner, index, part, rng)
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
      told -> (log-ratio to popularity per episode, label of each episode's pool).
    """
    results = {}
    for told in (True, False):
        chunks = validation_chunks(config, runner, horizon_told=told)
        if base:
            chunks = [_at_base(chunk, runner, prior, told=told) for chunk in chunks]
        episodes = runner.run(chunks, params, prior, act=act)
        names = [runner.pools[chunk.pool].label for chunk in chunks for _ in chunk.spec.task]
        results[told] = (relative_scores(concatenate(episodes)), names)
    return results


def _at_base(chunk: Chunk, runner: RolloutRunner, prior: Prior, *, told: bool) -> Chunk:
    """Returns the chunk with its start forced to the base of its family."""
    family = runner.pools[chunk.pool].environment.family
    row = runner.config.family_index(family if family in runner.config.families else None)
    start = np.asarray(prior.base)[row, int(told)]
    return replace(chunk, spec=chunk.spec._replace(start=np.tile(start, (CHUNK, 1)).astype(np.float32)))


def prepare(
    config: MetaTrainConfig,
    controller: ControllerConfig,
    estimator: Estimator,
    runner: RolloutRunner,
    persistence: Persistence,
    log: Log,
) -> MetaTrainState:
    """Settles bases, normaliser and supervised start by one search."""
    params = estimator.init(key=jax.random.key(config.seed))
    guess = np.array(
        [controller.space[n].encode(v) for n, v in zip(CONTROLLED, (0.03, 0.34, 0.9, 0.1), strict=True)], np.float32
    )
    prior = Prior(_everywhere(guess, controller), warm_start.identity_normalizer(controller))
    began = time.monotonic()
    result = warm_start.run_search(
        runner,
        params,
        prior,
        tasks_per_pool=config.search_tasks,
        configurations=config.search_configurations,
        epochs_range=config.epochs_range,
        steps_range=config.steps_range,
        told_share=config.told_share,
        seed=config.seed,
        keep=persistence.cached_arrays,
    )
    record: dict[str, Any] = {"phase": "search", "trials": len(result.score), "seconds": time.monotonic() - began}
    bases, gains = warm_start.choose_bases(result, controller, seed=config.seed)
    bases = with_bases(bases, controller, config.bases)
    for family, told in np.ndindex(gains.shape):
        label = f"base/{(*controller.families, 'other')[family - 1]}/{'known' if told else 'unknown'}"
        decoded = zip(CONTROLLED, bases[family, told].tolist(), strict=True)
        record |= {f"{label}/{name}": controller.space[name].decode(value) for name, value in decoded}
        record[f"{label}/gain"] = float(gains[family, told])
    prior = prior._replace(base=bases)
    log(record)

    exploratory = [
        chunk for iteration in range(2) for chunk in iteration_chunks(config, runner, -1 - iteration + 2**20)
    ]
    episodes = runner.run(exploratory, params, prior, explore=1.5)
    prior = prior._replace(normalizer=warm_start.fit_normalizer(episodes, np.random.default_rng([config.seed, 3])))
    fitted, predicted = warm_start.fit_start(
        result, controller, params.network, prior, seed=config.seed, family_told_share=config.family_told_share
    )
    log({"phase": "supervised start", "predicted_first": float(predicted[0]), "predicted_last": float(predicted[-1])})
    return _fresh(config, estimator, runner, params._replace(network=fitted), prior)


def _fresh(
    config: MetaTrainConfig, estimator: Estimator, runner: RolloutRunner, params: PolicyParams, prior: Prior
) -> MetaTrainState:
    """Makes the state before the first iteration."""
    return MetaTrainState(
        iteration=0,
        params=params,
        optimizer_state=estimator.start(runner, params, prior, iteration_chunks(config, runner, 0)),
        prior=prior,
        best=params,
        best_iteration=0,
        best_validation=-np.inf,
        best_log={},
        stale=0,
        curriculum=Curriculum(),
        validated=-1,
    )


def _everywhere(base: np.ndarray, controller: ControllerConfig) -> np.ndarray:
    """Spreads one base [S] over families and horizons, [1 + families, 2, S]."""
    return np.broadcast_to(base, (1 + len(controller.families), 2, len(CONTROLLED))).astype(np.float32)


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
    """Meta-trains a controller, resuming from `directory` if it holds a run of the same config, of whatever length.

    Args:
      config: settings.
      controller: architecture.
      pools: tasks to learn from, one pool a size.
      validation_pools: tasks of domains that are only ever evaluated; they choose the iteration that is released.
      directory: Orbax checkpoints, the search, the baseline's scores, and the best checkpoint so far.
      log: called with a flat dict at every iteration.
      provenance: kept in the checkpoint.

    Returns:
      The checkpoint of the iteration that validated best.
    """
    runner, validation_runner = RolloutRunner(pools, controller), RolloutRunner(validation_pools, controller)
    pool_names = [pool.names for pool in (*pools, *validation_pools)]
    identity = {"config": config.identity(), "controller": asdict(controller), "pools": pool_names}
    with Persistence(directory, json.dumps(identity, sort_keys=True)) as persistence:
        estimator = make_estimator(controller, config.estimator)
        state = persistence.restore(lambda: _template(config, controller, estimator, runner))
        if state is None:
            state = prepare(config, controller, estimator, runner, persistence, log)
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
        while True:
            due = state.iteration % config.validate_every == 0 or state.iteration == config.num_iterations
            if due and state.validated != state.iteration:
                _validate(config, validation_runner, state, baseline, log)
                persistence.save(state)
                if state.best_iteration == state.iteration:
                    save_checkpoint(released(state, config, controller, provenance), directory / "best.safetensors")
            if state.iteration >= config.num_iterations or state.stale >= config.patience:
                break
            _iterate(config, estimator, runner, state, log)
            persistence.save(state)
    checkpoint = released(state, config, controller, provenance)
    outcome, record = _fit_outcome(config, (runner, validation_runner), state)
    log({"phase": "outcome model", **record})
    return replace(checkpoint, outcome=outcome, provenance={**checkpoint.provenance, "outcome": record})


def _fit_outcome(
    config: MetaTrainConfig, runners: tuple[RolloutRunner, RolloutRunner], state: MetaTrainState
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Fits the outcome model to runs of the released policy; the validation domains stop and calibrate it.

    In every second group the start configurations are random, so that it learns what they are worth.
    """
    episodes: list[Episode] = []
    domains: list[str] = []
    for part, runner in enumerate(runners):
        chunks = []
        for index in range(config.outcome_rounds):
            rng = np.random.default_rng([config.seed, 4, part, index])
            for position, chunk in enumerate(iteration_chunks(config, runner, 2**21 + index)):
                family = runner.pools[chunk.pool].environment.family
                start = warm_start.draw_configurations(CHUNK, runner.config, family, rng).astype(np.float32)
                spec = chunk.spec._replace(start=start) if position % 2 else chunk.spec
                chunks.append(replace(chunk, spec=spec))
        episodes += runner.run(chunks, state.best, state.prior, explore=1.0, label="outcome model")
        labels = episode_domains(runner, chunks)
        domains += [f"validation/{label}" for label in labels] if part else labels
    return fit_outcome(
        concatenate(episodes),
        domains,
        runners[0].config,
        state.prior,
        settings=config.outcome,
        validation_domains={name for name in domains if name.startswith("validation/")},
        seed=config.seed,
    )


def _iterate(
    config: MetaTrainConfig, estimator: Estimator, runner: RolloutRunner, state: MetaTrainState, log: Log
) -> None:
    """Runs one iteration's groups and updates the policy."""
    chunks = iteration_chunks(config, runner, state.iteration, state.curriculum)
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.iteration)
    label = f"iteration {state.iteration}"
    state.params, state.optimizer_state, metrics, ended = estimator.step(
        runner, state.params, state.optimizer_state, state.prior, chunks, key=key, label=label
    )
    state.curriculum.observe(runner, ended)
    state.iteration += 1
    log(
        {
            "phase": "train",
            "iteration": state.iteration,
            "episodes": state.iteration * CHUNK * len(chunks),
            **_gates(state.params),
            **({"progress": float(np.mean([*progress.values()]))} if (progress := state.curriculum.progress) else {}),
            **metrics,
        }
    )


def _gates(params: PolicyParams) -> dict[str, float]:
    """Returns, per hyperparameter, how much of a domain's modifier transfers, 0 to 1."""
    gate = 1.0 / (1.0 + np.exp(-np.asarray(params.network["gate"], np.float64)))
    return {f"gate/{name}": float(value) for name, value in zip(CONTROLLED, gate, strict=True)}


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
        for pool in sorted(set(names)):
            record[f"validation/gain/{label}/{pool}"] = float(gain[np.array(names) == pool].mean())
    overall = KNOWN * record["validation/gain/known"] + (1 - KNOWN) * record["validation/gain/unknown"]
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


def _template(
    config: MetaTrainConfig, controller: ControllerConfig, estimator: Estimator, runner: RolloutRunner
) -> MetaTrainState:
    """Makes a state of the right shapes, which a restored one is read into."""
    prior = Prior(_everywhere(np.zeros(len(CONTROLLED)), controller), warm_start.identity_normalizer(controller))
    return _fresh(config, estimator, runner, estimator.init(key=jax.random.key(0)), prior)
