"""Rollouts: a controller steers an environment through one episode, under jit.

Shape legend: T decision, G parameter group, F feature, D descriptor, A group action, B global action, S start value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.controller import network
from metalearn.controller.actions import (
    Position,
    Values,
    confidence,
    move,
    relative_residual,
    schedule_multiplier,
    start_position,
    values,
)
from metalearn.controller.config import ROLES, ControllerConfig
from metalearn.controller.observation import Normalizer, budget_descriptors
from metalearn.controller.outcome import relative_metric
from metalearn.meta_training.environment import Environment, Plan
from metalearn.signals import (
    Controls,
    IntervalStatistics,
    SignalFeatures,
    SignalHistory,
    featurize,
    initial_history,
    out_of_range,
    percentile_scale,
)

NONFINITE_PENALTY = 0.1


class EpisodeSpec(NamedTuple):
    """What varies between episodes; leaves are stacked along a leading axis."""

    task: Any
    """index into the task batch"""
    initialization: Any
    """seed of the model and its batches; a group of rollouts shares it"""
    exploration: Any
    """seed of the action noise"""
    horizon_told: Any
    """bool: whether the controller knows the horizon"""
    horizon_factor: Any
    """what it is told over the true one; 1 is the truth"""
    family_told: Any
    """bool: whether it knows the model family"""
    single_group: Any
    """bool: whether all parameters are one group"""
    start: Any
    """[S] forced start in unit ranges, or NaN to let the controller choose"""
    kept: Any
    """[S] values in unit ranges of what the loop keeps to itself, NaN for what is the controller's"""


class PolicyParams(NamedTuple):
    """What the estimator trains."""

    network: Any
    critic: Any
    log_std: Any
    """[A + B] of the in-run action, before tanh"""
    start_log_std: Any
    """[S]"""


class Prior(NamedTuple):
    """What a controller holds besides its networks."""

    base: Any
    """[1 + families, 2, S] base configuration in unit ranges; see `Checkpoint`"""
    normalizer: Normalizer


class Episode(NamedTuple):
    """One rollout, as the estimator and the logs need it."""

    descriptors: Any
    """[D] raw"""
    family: Any
    """int, as the controller was told"""
    group: Any
    """[T - 1, G, F] raw features before each in-run action"""
    run: Any
    """[T - 1, F]"""
    role: Any
    """[G]"""
    group_mask: Any
    """[G]"""
    start_action: Any
    """[S] before tanh"""
    group_action: Any
    """[T - 1, G, A] before tanh"""
    run_action: Any
    """[T - 1, B]"""
    reward: Any
    """[T]"""
    score: Any
    """test metric"""
    floor: Any
    """test metric of popularity"""
    validation: Any
    """[T]"""
    values: Values
    """[T, ...] hyperparameters in force; NaN for what the loop keeps to itself"""


def normalized(metric: Any, floor: Any) -> Any:
    """Returns the score that compares across domains, log((metric + c) / (floor + c))."""
    return relative_metric(metric, floor, jnp)


def observe(
    features: SignalFeatures, descriptors: Any, family: Any, prior: Prior, role: Any, group_mask: Any
) -> network.Observation:
    """Scales raw features and descriptors to what the network sees."""
    return network.Observation(
        percentile_scale(features.group, prior.normalizer.group, jnp) * group_mask[:, None],
        percentile_scale(features.run, prior.normalizer.run, jnp),
        percentile_scale(descriptors, prior.normalizer.descriptors, jnp),
        family,
        role,
        group_mask,
    )


class _Run(NamedTuple):
    """What is fixed during one episode."""

    steps: Any
    """float32, optimizer steps of an interval"""
    horizon: Any
    """NaN if it is not told"""
    epochs_per_interval: Any
    descriptors: Any
    """[D] raw"""
    family: Any
    role: Any
    group_mask: Any
    trust: Any


def _describe(
    environment: Environment,
    config: ControllerConfig,
    prior: Prior,
    task: Any,
    profile: Any,
    spec: EpisodeSpec,
    num_steps: Any,
) -> _Run:
    """Collects what the controller is told at the start, as a session does."""
    steps = jnp.asarray(num_steps, jnp.float32)
    epochs_per_interval = steps * environment.samples_per_step / task.num_interactions
    horizon = jnp.where(spec.horizon_told, steps * config.num_decisions * spec.horizon_factor, jnp.nan)
    budget = budget_descriptors(
        epochs_per_interval * horizon / steps,
        environment.samples_per_step,
        task.num_users.astype(jnp.float32),
        task.num_items.astype(jnp.float32),
        jnp,
    )
    descriptors = jnp.concatenate([profile, budget])
    scaled = percentile_scale(descriptors, prior.normalizer.descriptors, jnp)
    family = config.family_index(environment.family if environment.family in config.families else None)
    trust = confidence(out_of_range(scaled, jnp), jnp)
    if environment.family in config.at_rest:
        trust = jnp.where(spec.family_told, 0.0, trust)
    return _Run(
        steps=steps,
        horizon=horizon,
        epochs_per_interval=epochs_per_interval,
        descriptors=descriptors,
        family=jnp.where(spec.family_told, family, 0),
        role=jnp.array([ROLES.index(role) for role in environment.roles], jnp.int32),
        group_mask=jnp.where(spec.single_group, jnp.arange(environment.num_groups) == 0, True).astype(jnp.float32),
        trust=trust,
    )


def _start(
    config: ControllerConfig, params: PolicyParams, prior: Prior, run: _Run, spec: EpisodeSpec, key: Any, explore: Any
) -> tuple[Position, Any]:
    """Draws the start action; returns the position, the forced one if there is one, and the action before tanh."""
    scaled = percentile_scale(run.descriptors, prior.normalizer.descriptors, jnp)
    proposal = network.start(config, params.network, scaled, run.family)
    noise = jax.random.normal(key, proposal.modifier.shape) * jnp.exp(params.start_log_std)
    action = proposal.modifier + explore * noise
    base = prior.base[run.family, spec.horizon_told.astype(jnp.int32)]
    position = start_position(base, proposal.gate, jnp.tanh(action), run.trust, config, run.role.shape[0], jnp)
    forced = jnp.isfinite(spec.start).all()
    split = position.group_start.shape[1]
    group = jnp.where(forced, spec.start[:split], position.group_start)
    of_run = jnp.where(forced, spec.start[split:], position.global_start)
    position = position._replace(
        group_start=jnp.where(jnp.isfinite(spec.kept[:split]), spec.kept[:split], group),
        global_start=jnp.where(jnp.isfinite(spec.kept[split:]), spec.kept[split:], of_run),
    )
    return position, action


def _signals(
    config: ControllerConfig,
    run: _Run,
    statistics: IntervalStatistics,
    in_force: Values,
    position: Position,
    history: SignalHistory,
    index: Any,
    ours: Any,
) -> tuple[SignalFeatures, SignalHistory]:
    """Makes features of the interval that ended just now, as a session does; `ours` [S] is NaN for what is kept."""
    intervals = index.astype(jnp.float32) + 1.0
    progress = intervals * run.steps / run.horizon
    last = intervals * run.steps - 1.0
    group_residual, run_residual = relative_residual(position, config, jnp)
    controls = Controls(
        learning_rate=in_force.learning_rate * schedule_multiplier(last / run.horizon, jnp, config.decay_to),
        weight_decay=in_force.weight_decay,
        group_residual=group_residual * ours[: group_residual.shape[1]],
        dropout=in_force.dropout,
        dropout_residual=run_residual[0] * ours[-1],
        progress=progress,
        epochs=intervals * run.epochs_per_interval,
    )
    return featurize(statistics, controls, history, jnp)


def _act(
    config: ControllerConfig,
    params: PolicyParams,
    hidden: Any,
    observation: network.Observation,
    single_group: Any,
    key: Any,
    explore: Any,
) -> tuple[Any, Any, Any]:
    """Draws an in-run action before tanh, [G, A] and [B]; with one group it is everybody's."""
    mean, hidden = network.act(config, params.network, hidden, observation)
    num_groups, split = mean.group.shape
    noise = jax.random.normal(key, (num_groups * split + mean.run.shape[0],)) * explore
    group_noise = noise[: num_groups * split].reshape(num_groups, split) * jnp.exp(params.log_std[:split])
    group = mean.group + group_noise
    group = jnp.where(single_group, group[:1], group)
    return group, mean.run + noise[num_groups * split :] * jnp.exp(params.log_std[split:]), hidden


class RolloutState(NamedTuple):
    """Where an episode stands between two decisions: all of it arrays, so that it can wait, move or be saved."""

    run: _Run
    environment: Any
    history: SignalHistory
    hidden: Any
    """[G, H] of the recurrent policy"""
    position: Position
    best: Any
    """validation metric, 0 before the first"""
    decision: Any
    """int32, decisions made"""
    start_action: Any
    """[S] before tanh"""


class Steps(NamedTuple):
    """What some consecutive decisions of one episode recorded; K of them."""

    features: SignalFeatures
    """raw, after each interval"""
    group_action: Any
    """[K, G, A] before tanh"""
    run_action: Any
    """[K, B]"""
    reward: Any
    """[K], without what `finish` adds to the last"""
    validation: Any
    """[K]"""
    values: Values
    """[K, ...] in force during the interval before each; NaN for what the loop keeps to itself"""


def begin(
    environment: Environment,
    config: ControllerConfig,
    params: PolicyParams,
    prior: Prior,
    task: Any,
    profile: Any,
    spec: EpisodeSpec,
    num_steps: Any,
    *,
    explore: Any,
) -> RolloutState:
    """Initialises a model and places the run; the arguments are those of `rollout`, of one task."""
    key_start, _ = jax.random.split(jax.random.key(spec.exploration))
    run = _describe(environment, config, prior, task, profile, spec, num_steps)
    position, start_action = _start(config, params, prior, run, spec, key_start, explore)
    return RolloutState(
        run=run,
        environment=environment.reset(task, key=jax.random.fold_in(jax.random.key(spec.initialization), 0)),
        history=initial_history(environment.num_groups, jnp, jnp.float32),
        hidden=jnp.zeros((environment.num_groups, config.hidden_size)),
        position=position,
        best=jnp.zeros(()),
        decision=jnp.int32(0),
        start_action=start_action,
    )


def advance(
    environment: Environment,
    config: ControllerConfig,
    params: PolicyParams,
    prior: Prior,
    task: Any,
    spec: EpisodeSpec,
    num_steps: Any,
    state: RolloutState,
    num_decisions: int,
    *,
    explore: Any,
    act: Any,
) -> tuple[RolloutState, Steps]:
    """Runs the next `num_decisions` intervals; the other arguments are those of `rollout`, of one task."""
    key_model = jax.random.key(spec.initialization)
    _, key_actions = jax.random.split(jax.random.key(spec.exploration))
    run = state.run
    ours = jnp.where(jnp.isfinite(spec.kept), jnp.nan, 1.0)
    moved = jnp.where(jnp.isfinite(spec.kept), 0.0, 1.0)

    def interval(carry: Any, index: Any) -> Any:
        """Runs one interval and takes the decision after it."""
        state, history, hidden, position, best = carry
        in_force = values(position, config, jnp)
        plan = Plan(num_steps, index * num_steps, run.horizon, spec.single_group, config.decay_to)
        state, statistics = environment.step(task, state, in_force, plan, key=jax.random.fold_in(key_model, index + 1))
        known = Values(*(value * ours[column] for column, value in enumerate(in_force)))
        features, history = _signals(config, run, statistics, known, position, history, index, ours)
        validation = jnp.where(jnp.isfinite(statistics.validation), statistics.validation, 0.0)
        new_best = jnp.maximum(best, validation)
        reward = normalized(new_best, task.validation_floor) - normalized(best, task.validation_floor)
        reward = reward - jnp.where(statistics.nonfinite > 0, NONFINITE_PENALTY, 0.0)
        observation = observe(features, run.descriptors, run.family, prior, run.role, run.group_mask)
        key = jax.random.fold_in(key_actions, index)
        group, of_run, hidden = _act(config, params, hidden, observation, spec.single_group, key, explore)
        split = group.shape[1]
        trust = jnp.where(act, run.trust, 0.0)
        position = move(position, group * moved[:split], of_run * moved[split:], trust, config, jnp)
        return (state, history, hidden, position, new_best), Steps(features, group, of_run, reward, validation, known)

    carry = (state.environment, state.history, state.hidden, state.position, state.best)
    carry, steps = jax.lax.scan(interval, carry, state.decision + jnp.arange(num_decisions))
    environment_state, history, hidden, position, best = carry
    state = state._replace(
        environment=environment_state,
        history=history,
        hidden=hidden,
        position=position,
        best=best,
        decision=state.decision + num_decisions,
    )
    return state, steps


def finish(environment: Environment, task: Any, state: RolloutState) -> tuple[Any, Any]:
    """Returns the test metric of a finished episode, and what it adds to the last reward."""
    score = environment.score(task, state.environment)
    return score, normalized(score, task.test_floor) - normalized(state.best, task.validation_floor)


def rollout(
    environment: Environment,
    config: ControllerConfig,
    params: PolicyParams,
    prior: Prior,
    tasks: Any,
    profiles: Any,
    spec: EpisodeSpec,
    num_steps: Any,
    *,
    explore: Any,
    act: Any,
) -> Episode:
    """Runs one episode of `config.num_decisions` intervals of `num_steps` steps.

    Args:
      environment: whose `reset`, `step` and `score` are pure.
      tasks: stacked tasks; `spec.task` picks one.
      profiles: [tasks, profile descriptors] raw.
      explore: scale of the action noise, 0 for the mean action.
      act: False runs the base schedule from the start configuration.
    """
    task = jax.tree.map(lambda leaf: leaf[spec.task], tasks)
    state = begin(environment, config, params, prior, task, profiles[spec.task], spec, num_steps, explore=explore)
    state, steps = advance(
        environment, config, params, prior, task, spec, num_steps, state, config.num_decisions, explore=explore, act=act
    )
    score, final = finish(environment, task, state)
    return Episode(
        descriptors=state.run.descriptors,
        family=state.run.family,
        group=steps.features.group[:-1],
        run=steps.features.run[:-1],
        role=state.run.role,
        group_mask=state.run.group_mask,
        start_action=state.start_action,
        group_action=steps.group_action[:-1],
        run_action=steps.run_action[:-1],
        reward=steps.reward.at[-1].add(final),
        score=score,
        floor=task.test_floor,
        validation=steps.validation,
        values=steps.values,
    )
