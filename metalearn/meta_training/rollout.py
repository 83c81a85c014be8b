"""Rollouts: a controller steers an environment through one episode, under jit.

Shape legend: T decision, G parameter group, F feature, D descriptor, A group action, B global action, S start value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.controller import network
from metalearn.controller.actions import (
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
from metalearn.meta_training.environment import Environment, Plan
from metalearn.signals import Controls, SignalFeatures, featurize, initial_history, out_of_range, percentile_scale

REWARD_OFFSET = 0.02
"""c of the reward log((NDCG + c) / (popularity + c)): keeps domains of low NDCG from ruling."""
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
    single_group: Any
    """bool: whether all parameters are one group"""
    start: Any
    """[S] forced start in unit ranges, or NaN to let the controller choose"""


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
    """[2, S] base configuration in unit ranges: without, and with a known horizon"""
    normalizer: Normalizer


class Episode(NamedTuple):
    """One rollout, as the estimator and the logs need it."""

    descriptors: Any
    """[D] raw"""
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
    action: Any
    """[T - 1, G A + B] before tanh"""
    reward: Any
    """[T]"""
    score: Any
    """test metric"""
    floor: Any
    """test metric of popularity"""
    validation: Any
    """[T]"""
    values: Values
    """[T, ...] hyperparameters in force"""


def normalized(metric: Any, floor: Any) -> Any:
    """Returns log((metric + c) / (floor + c)), the score that compares across domains."""
    return jnp.log((metric + REWARD_OFFSET) / (floor + REWARD_OFFSET))


def observe(episode_features: SignalFeatures, descriptors: Any, prior: Prior, role: Any, group_mask: Any):
    """Scales raw features and descriptors to what the network sees, and the trust they deserve."""
    scaled_descriptors = percentile_scale(descriptors, prior.normalizer.descriptors, jnp)
    observation = network.Observation(
        percentile_scale(episode_features.group, prior.normalizer.group, jnp) * group_mask[:, None],
        percentile_scale(episode_features.run, prior.normalizer.run, jnp),
        scaled_descriptors,
        role,
        group_mask,
    )
    return observation, confidence(out_of_range(scaled_descriptors, jnp), jnp)


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
    key_model = jax.random.key(spec.initialization)
    key_noise = jax.random.key(spec.exploration)
    key_start, key_actions = jax.random.split(key_noise)
    num_groups = environment.num_groups
    steps = jnp.asarray(num_steps, jnp.float32)
    horizon = jnp.where(spec.horizon_told, steps * config.num_decisions, jnp.nan)
    samples_per_step = environment.samples_per_step
    epochs_per_interval = steps * samples_per_step / task.num_interactions
    budget = budget_descriptors(
        jnp.where(spec.horizon_told, epochs_per_interval * config.num_decisions, jnp.nan),
        samples_per_step,
        task.num_users.astype(jnp.float32),
        task.num_items.astype(jnp.float32),
        jnp,
    )
    descriptors = jnp.concatenate([profiles[spec.task], budget])
    role = jnp.array([ROLES.index(role) for role in environment.roles], jnp.int32)
    group_mask = jnp.where(spec.single_group, jnp.arange(num_groups) == 0, True).astype(jnp.float32)
    scaled = percentile_scale(descriptors, prior.normalizer.descriptors, jnp)
    trust = confidence(out_of_range(scaled, jnp), jnp)

    proposal = network.start(config, params.network, scaled)
    noise = jax.random.normal(key_start, proposal.modifier.shape) * jnp.exp(params.start_log_std)
    start_action = proposal.modifier + explore * noise
    base = prior.base[spec.horizon_told.astype(jnp.int32)]
    position = start_position(base, proposal.gate, jnp.tanh(start_action), trust, config, num_groups, jnp)
    forced = jnp.isfinite(spec.start).all()
    split = position.group_start.shape[1]
    position = position._replace(
        group_start=jnp.where(forced, spec.start[:split], position.group_start),
        global_start=jnp.where(forced, spec.start[split:], position.global_start),
    )
    state = environment.reset(task, key=jax.random.fold_in(key_model, 0))
    history = initial_history(num_groups, jnp, jnp.float32)
    hidden = jnp.zeros((num_groups, config.hidden_size))

    def interval(carry, index):
        state, history, hidden, position, best = carry
        in_force = values(position, config, jnp)
        plan = Plan(num_steps, index * num_steps, horizon, spec.single_group)
        state, statistics = environment.step(task, state, in_force, plan, key=jax.random.fold_in(key_model, index + 1))
        intervals = index.astype(jnp.float32) + 1.0
        done = intervals * steps
        progress = done / horizon
        group_residual, run_residual = relative_residual(position, config, jnp)
        controls = Controls(
            learning_rate=in_force.learning_rate * schedule_multiplier(progress - 1.0 / horizon, jnp),
            weight_decay=in_force.weight_decay,
            group_residual=group_residual,
            dropout=in_force.dropout,
            dropout_residual=run_residual[0],
            progress=progress,
            epochs=intervals * epochs_per_interval,
        )
        features, history = featurize(statistics, controls, history, jnp)
        validation = jnp.where(jnp.isfinite(statistics.validation), statistics.validation, 0.0)
        new_best = jnp.maximum(best, validation)
        reward = normalized(new_best, task.validation_floor) - normalized(best, task.validation_floor)
        reward = reward - jnp.where(statistics.nonfinite > 0, NONFINITE_PENALTY, 0.0)
        observation, _ = observe(features, descriptors, prior, role, group_mask)
        mean, hidden = network.act(config, params.network, hidden, observation)
        noise = (
            jax.random.normal(jax.random.fold_in(key_actions, index), (num_groups * split + mean.run.shape[0],))
            * explore
        )
        group_std = jnp.exp(params.log_std[:split])
        group = mean.group + noise[: num_groups * split].reshape(num_groups, split) * group_std
        group = jnp.where(spec.single_group, group[:1], group)
        run = mean.run + noise[num_groups * split :] * jnp.exp(params.log_std[split:])
        action = jnp.concatenate([group.reshape(-1), run])
        position = move(position, group, run, jnp.where(act, trust, 0.0), config, jnp)
        return (state, history, hidden, position, new_best), (features, action, reward, validation, in_force)

    carry = (state, history, hidden, position, jnp.zeros(()))
    carry, (features, action, reward, validation, in_force) = jax.lax.scan(
        interval, carry, jnp.arange(config.num_decisions)
    )
    score = environment.score(task, carry[0])
    final = normalized(score, task.test_floor) - normalized(carry[-1], task.validation_floor)
    return Episode(
        descriptors=descriptors,
        group=features.group[:-1],
        run=features.run[:-1],
        role=role,
        group_mask=group_mask,
        start_action=start_action,
        action=action[:-1],
        reward=reward.at[-1].add(final),
        score=score,
        floor=task.test_floor,
        validation=validation,
        values=in_force,
    )
