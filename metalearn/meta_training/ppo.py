"""Proximal policy optimisation with grouped rollouts (Schulman et al., 2017; group-centred as in Shao et al., 2024).

Rollouts of one group share task and initialisation: advantages are centred within the group, so that differences
between domains, which exceed those within one, cancel. Returns are undiscounted; generalised advantage estimation has
λ = 0.95.

Shape legend: N episode, T decision, G parameter group, A group action, B global action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from metalearn.controller import network
from metalearn.controller.config import CONTROLLED, GLOBAL_CONTROLLED, GROUP_CONTROLLED, ControllerConfig
from metalearn.meta_training.rollout import Episode, PolicyParams, Prior, observe
from metalearn.meta_training.runner import CHUNK, Chunk, Ended, RolloutRunner, concatenate, returns_by_pool
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, SignalFeatures, percentile_scale


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of the estimator.

    Args:
      learning_rate: of Adam on policy and critic.
      clip: of the probability ratio.
      gae: λ.
      num_epochs, num_minibatches: passes over a batch of rollouts, and parts of each.
      initial_log_std, initial_start_log_std: of the action noise before tanh; in-run and start.
      entropy: weight of the noise's log standard deviation, which keeps exploration from dying.
      start_weight: weight of the start's part of the objective, one decision an episode. 0 leaves the start, and the
        code of a domain that it reads, as they are: few groups tell less about starts than a search's trials did.
      transfer_penalty: weight of ‖gate · tanh(modifier)‖².
    """

    learning_rate: float = 1e-3
    clip: float = 0.3
    gae: float = 0.95
    num_epochs: int = 4
    num_minibatches: int = 4
    initial_log_std: float = -0.7
    initial_start_log_std: float = -1.0
    entropy: float = 1e-3
    start_weight: float = 0.1
    transfer_penalty: float = 0.02


HISTOGRAM_BINS = 20
MAX_LOG_RATIO = 10.0
"""Of the probability ratio: what an action far from the new mean would else make of a float32."""


class Critic(nn.Module):
    """Predicts the rest of an episode's reward from one observation; used in meta-training only."""

    @nn.compact
    def __call__(self, observation: network.Observation) -> Any:
        weights = observation.group_mask[:, None] / observation.group_mask.sum()
        pooled = (weights * observation.group).sum(0)
        x = jnp.concatenate([observation.run, pooled, observation.descriptors])
        x = jnp.tanh(nn.Dense(64)(x))
        x = jnp.tanh(nn.Dense(64)(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[0]


class Targets(NamedTuple):
    """Fixed parts of one batch's objective."""

    log_prob: Any
    """[N, T - 1]"""
    start_log_prob: Any
    """[N]"""
    advantage: Any
    """[N, T - 1]"""
    start_advantage: Any
    """[N]"""
    value: Any
    """[N, T - 1] return to predict"""


def init(config: ControllerConfig, settings: PPOConfig, *, key: jax.Array) -> PolicyParams:
    """Makes policy and critic parameters; the policy's heads are zero."""
    key_network, key_critic = jax.random.split(key)
    observation = network.Observation(
        jnp.zeros((1, len(GROUP_FEATURES))),
        jnp.zeros(len(GLOBAL_FEATURES)),
        jnp.zeros(len(config.descriptors)),
        jnp.zeros((), jnp.int32),
        jnp.zeros(1, jnp.int32),
        jnp.ones(1),
    )
    return PolicyParams(
        network=network.init(config, key=key_network),
        critic=Critic().init(key_critic, observation)["params"],
        log_std=jnp.full(len(CONTROLLED), settings.initial_log_std, jnp.float32),
        start_log_std=jnp.full(len(CONTROLLED), settings.initial_start_log_std, jnp.float32),
    )


def optimizer(settings: PPOConfig) -> optax.GradientTransformation:
    """Returns Adam with clipped gradients."""
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(settings.learning_rate, eps=1e-5))


def _log_normal(action: Any, mean: Any, log_std: Any) -> Any:
    return -0.5 * ((action - mean) / jnp.exp(log_std)) ** 2 - log_std


def _replay(
    config: ControllerConfig, params: PolicyParams, prior: Prior, episode: Episode
) -> tuple[Any, Any, Any, Any]:
    """Recomputes one episode: log-probabilities, values, start log-probability, start shift."""
    num_groups = episode.group.shape[1]
    split = len(GROUP_CONTROLLED)

    def one(hidden, inputs):
        """Recomputes one decision."""
        group, run, group_action, run_action = inputs
        observation = observe(
            SignalFeatures(group, run), episode.descriptors, episode.family, prior, episode.role, episode.group_mask
        )
        mean, hidden = network.act(config, params.network, hidden, observation)
        log_prob = (_log_normal(group_action, mean.group, params.log_std[:split]) * episode.group_mask[:, None]).sum()
        log_prob += _log_normal(run_action, mean.run, params.log_std[split:]).sum()
        value = Critic().apply({"params": params.critic}, observation)
        return hidden, (log_prob, value)

    hidden = jnp.zeros((num_groups, config.hidden_size))
    inputs = (episode.group, episode.run, episode.group_action, episode.run_action)
    _, (log_prob, value) = jax.lax.scan(one, hidden, inputs)
    scaled = percentile_scale(episode.descriptors, prior.normalizer.descriptors, jnp)
    proposal = network.start(config, params.network, scaled, episode.family)
    start_log_prob = _log_normal(episode.start_action, proposal.modifier, params.start_log_std).sum()
    return log_prob, value, start_log_prob, proposal.gate * jnp.tanh(proposal.modifier)


def _replay_all(config: ControllerConfig, params: PolicyParams, prior: Prior, episodes: Episode) -> Any:
    """Recomputes every episode of a batch; see `_replay`."""
    return jax.vmap(lambda episode: _replay(config, params, prior, episode))(episodes)


def _centred(x: Any) -> Any:
    """Takes the mean over its group, episodes of one task from one initialisation, from each episode's value."""
    groups = x.reshape(-1, CHUNK, *x.shape[1:])
    return (groups - groups.mean(1, keepdims=True)).reshape(x.shape)


def _advantages(reward: Any, value: Any, gae: float) -> Any:
    """Returns undiscounted generalised advantages [E, D], of rewards and values of the same shape."""
    next_value = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], axis=1)
    delta = reward + next_value - value

    def backward(carry, column):
        carry = column + gae * carry
        return carry, carry

    _, advantage = jax.lax.scan(backward, jnp.zeros(delta.shape[0]), delta.T, reverse=True)
    return advantage.T


def _targets(
    config: ControllerConfig, settings: PPOConfig, params: PolicyParams, prior: Prior, episodes: Episode
) -> Targets:
    """Returns what the updates of one batch aim at: advantages centred within groups, of unit variance over all."""
    log_prob, value, start_log_prob, _ = _replay_all(config, params, prior, episodes)
    advantage = _advantages(episodes.reward[:, 1:], value, settings.gae)
    in_run, total = _centred(advantage), _centred(episodes.reward.sum(1))
    return Targets(
        log_prob, start_log_prob, in_run / (in_run.std() + 1e-8), total / (total.std() + 1e-8), advantage + value
    )


def _surrogate(new: Any, old: Any, advantage: Any, clip: float) -> Any:
    """Returns the clipped surrogate loss of log-probabilities."""
    ratio = jnp.exp(jnp.clip(new - old, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage).mean()


def _loss(
    params: PolicyParams,
    config: ControllerConfig,
    settings: PPOConfig,
    prior: Prior,
    episodes: Episode,
    target: Targets,
) -> tuple[Any, dict[str, Any]]:
    """Returns the loss of policy, start, critic, transfer and entropy together, and its parts by name."""
    log_prob, value, start_log_prob, shift = _replay_all(config, params, prior, episodes)
    policy = _surrogate(log_prob, target.log_prob, target.advantage, settings.clip)
    start = _surrogate(start_log_prob, target.start_log_prob, target.start_advantage, settings.clip)
    critic = optax.huber_loss(value, target.value).mean()
    penalty = settings.transfer_penalty * (shift**2).sum(-1).mean()
    entropy = settings.entropy * (params.log_std.sum() + params.start_log_std.sum())
    metrics = {
        "policy_loss": policy,
        "start_loss": start,
        "critic_loss": critic,
        "kl": (target.log_prob - log_prob).mean(),
        "shift": jnp.abs(shift).mean(),
    }
    return policy + settings.start_weight * start + critic + penalty - entropy, metrics


@cache
def make_update(config: ControllerConfig, settings: PPOConfig) -> Any:
    """Compiles `update(params, optimizer_state, prior, episodes, key) -> (params, optimizer_state, metrics)`."""
    transform, minibatches = optimizer(settings), settings.num_minibatches
    differentiate = jax.value_and_grad(_loss, has_aux=True)

    @jax.jit
    def update(params, state, prior, episodes, key):
        """Passes over one batch of episodes, towards targets of the policy that gathered them."""
        target = _targets(config, settings, params, prior, episodes)
        num_groups = episodes.reward.shape[0] // CHUNK

        def step(carry, rows):
            """Takes one step of Adam on some episodes, whole groups of them."""
            params, state = carry
            part, aim = (jax.tree.map(lambda leaf: leaf[rows], whole) for whole in (episodes, target))
            (_, metrics), gradient = differentiate(params, config, settings, prior, part, aim)
            if settings.start_weight == 0.0:
                gradient = gradient._replace(network=_without_start(gradient.network))
            updates, state = transform.update(gradient, state, params)
            params = cast(PolicyParams, optax.apply_updates(params, updates))
            params = params._replace(
                log_std=jnp.clip(params.log_std, -2.0, 0.0), start_log_std=jnp.clip(params.start_log_std, -2.5, 0.0)
            )
            return (params, state), metrics

        def epoch(carry, key):
            """Passes over all groups once, in random order."""
            order = jax.random.permutation(key, num_groups)
            size = num_groups // minibatches
            groups = order[: size * minibatches].reshape(minibatches, size)
            rows = (groups[:, :, None] * CHUNK + jnp.arange(CHUNK)).reshape(minibatches, size * CHUNK)
            return jax.lax.scan(step, carry, rows)

        (params, state), metrics = jax.lax.scan(epoch, (params, state), jax.random.split(key, settings.num_epochs))
        return params, state, jax.tree.map(jnp.mean, metrics)

    return update


def _without_start(gradient: dict[str, Any]) -> dict[str, Any]:
    """Returns a gradient of the networks that leaves the start as it is."""
    return {
        name: jax.tree.map(jnp.zeros_like, part) if name in network.START_PARTS else part
        for name, part in gradient.items()
    }


class PPO:
    """Fulfils `metalearn.meta_training.estimator.Estimator`; an iteration is one batch of rollouts.

    Args:
      config: of the controller.
      settings: of the estimator.
    """

    def __init__(self, config: ControllerConfig, settings: PPOConfig) -> None:
        self._config, self._settings = config, settings

    def init(self, *, key: jax.Array) -> PolicyParams:
        """Makes policy and critic parameters."""
        return init(self._config, self._settings, key=key)

    def start(self, runner: RolloutRunner, params: PolicyParams, prior: Prior, chunks: Sequence[Chunk]) -> Any:
        """Makes the state of Adam, which is all there is."""
        return optimizer(self._settings).init(params)

    def step(
        self,
        runner: RolloutRunner,
        params: PolicyParams,
        state: Any,
        prior: Prior,
        chunks: Sequence[Chunk],
        *,
        key: jax.Array,
        label: str | None = None,
    ) -> tuple[PolicyParams, Any, dict[str, Any], list[Ended]]:
        """Rolls out every group with action noise, and updates policy and critic."""
        began = monotonic()
        episodes = concatenate(runner.run(chunks, params, prior, explore=1.0, label=label))
        rolled = monotonic()
        update = make_update(self._config, self._settings)
        params, state, metrics = update(params, state, prior, episodes, key)
        ended = list(map(Ended, chunks, episodes.reward.sum(1).reshape(-1, CHUNK)))
        record = {
            "rollout_seconds": rolled - began,
            "update_seconds": monotonic() - rolled,
            "inner_steps": float(sum(CHUNK * self._config.num_decisions * chunk.num_steps for chunk in chunks)),
            **summarize(episodes),
            **{name: float(value) for name, value in metrics.items()},
            "log_std": float(np.mean(params.log_std)),
            **action_histograms(episodes),
            **returns_by_pool(runner, ended),
        }
        return params, state, record, ended


def action_histograms(episodes: Episode) -> dict[str, list[int]]:
    """Returns counts of tanh(action) in `HISTOGRAM_BINS` equal bins from -1 to 1, of the start and of in-run steps.

    Keys are "histogram/{start,step}/<hyperparameter>"; padded groups do not count.
    """
    there = np.broadcast_to(episodes.group_mask[:, None, :] > 0, episodes.group_action.shape[:-1])
    actions = {f"start/{name}": episodes.start_action[:, index] for index, name in enumerate(CONTROLLED)}
    actions |= {f"step/{name}": episodes.group_action[..., index][there] for index, name in enumerate(GROUP_CONTROLLED)}
    actions |= {f"step/{name}": episodes.run_action[..., index] for index, name in enumerate(GLOBAL_CONTROLLED)}
    return {
        f"histogram/{name}": np.histogram(np.tanh(values), HISTOGRAM_BINS, (-1.0, 1.0))[0].tolist()
        for name, values in actions.items()
    }


def summarize(episodes: Episode) -> dict[str, float]:
    """Returns means over a batch, for the log."""
    return {
        "return": float(np.mean(episodes.reward.sum(1))),
        "score": float(np.mean(episodes.score)),
        "start_action_abs": float(np.mean(np.abs(episodes.start_action))),
    }
