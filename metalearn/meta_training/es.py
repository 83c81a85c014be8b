"""Antithetic evolution strategies with persistent truncation (PES; Vicol et al., 2021).

An episode is cut into windows of K decisions, and the policy is updated after each. In window w episodes 2j and 2j + 1
of a group run the mean policies of θ + ε and θ - ε, with ε ~ N(0, σ² I) drawn anew for every pair and window. The two
share task, initialisation, batches and events, and each keeps its model, signals and recurrent state from one window to
the next. With ξ the sum of a pair's ε since its episode began, the estimate of the gradient is

    g = mean over pairs of ξ (f⁺ - f⁻) / (2 σ²),

unbiased over whole episodes where θ is at rest; with ε in place of ξ it would miss what a window does to later ones.

The fitness f of a window is the change it made in the episode's rank, within its group, by the return so far: the
changes of an episode add up to its final rank, as PES asks of losses, and no score is compared across tasks. Episodes
that have diverged or are not finite come last.

Groups have windows of their own: each starts a new episode when its last one ends, at phases that are spread over the
windows, whatever the number of optimizer steps in its decisions. An iteration is as many windows as an episode has, in
which every group starts one. In the first iteration groups wait for their phase.

Source: Vicol, Metz, Sohl-Dickstein (2021), Unbiased gradient estimation in unrolled computation graphs with persistent
evolution strategies, ICML.

Shape legend: C group of episodes, N = CHUNK episode of a group, J = N / 2 antithetic pair, P parameter of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from time import monotonic
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metalearn.controller.config import ControllerConfig
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training import ppo
from metalearn.meta_training.environment import Status
from metalearn.meta_training.rollout import EpisodeSpec, PolicyParams, Prior, RolloutState
from metalearn.meta_training.runner import (
    CHUNK,
    Chunk,
    Ended,
    RolloutRunner,
    Window,
    WindowResult,
    returns_by_pool,
)


@dataclass(frozen=True, kw_only=True)
class ESConfig:
    """Settings of evolution strategies.

    Args:
      learning_rate: of Adam on the network's parameters.
      sigma: standard deviation of the perturbations, in units of the parameters.
      window: K, decisions between updates; all decisions of an episode make it plain evolution strategies.
      fitness: "ranks" within a group, or "signs", the better of each pair.

    Raises:
      InvalidArgumentError: a value out of range.
    """

    learning_rate: float = 5e-3
    sigma: float = 0.1
    window: int = 5
    fitness: str = "ranks"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "sigma"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InvalidArgumentError(f"`{name}` must be a positive number, got {getattr(self, name)}")
        if self.window < 1:
            raise InvalidArgumentError(f"`window` must be a positive int, got {self.window}")
        if self.fitness not in FITNESS:
            raise InvalidArgumentError(f"`fitness` must be one of {sorted(FITNESS)}, got {self.fitness!r}")


class ESState(NamedTuple):
    """Optimizer, and the episodes that are under way."""

    optimizer: Any
    episodes: tuple[RolloutState, ...]
    """of every group; leaves have a leading axis of N"""
    spec: EpisodeSpec
    """[C, N, ...]"""
    num_steps: Any
    """int32 [C]"""
    decision: Any
    """int32 [C], decisions made; below 0 the group waits for its phase"""
    perturbation: Any
    """float32 [C, J, P], ξ"""
    returns: Any
    """float32 [C, N], so far"""
    fitness: Any
    """float32 [C, N], by the returns so far"""


def ranks(returns: np.ndarray) -> np.ndarray:
    """Returns ranks among the last axis, from -1/2 for the worst to 1/2; ties share their mean.

    >>> ranks(np.array([3.0, -np.inf, 9.0, 3.0]))
    array([ 0. , -0.5,  0.5,  0. ])
    """
    one, other = returns[..., :, None], returns[..., None, :]
    wins = (one > other).sum(-1) - (one < other).sum(-1)
    return wins / (2.0 * (returns.shape[-1] - 1))


def signs(returns: np.ndarray) -> np.ndarray:
    """Returns 1/2 for the better of each pair of neighbours, -1/2 for the worse, 0 for both if they are equal.

    >>> signs(np.array([3.0, -np.inf, 9.0, 9.5]))
    array([ 0.5, -0.5, -0.5,  0.5])
    """
    one, other = returns[..., 0::2], returns[..., 1::2]
    better = 0.5 * ((one > other).astype(float) - (one < other))
    return np.stack([better, -better], axis=-1).reshape(returns.shape)


FITNESS = {"ranks": ranks, "signs": signs}


def shaped(returns: np.ndarray, status: np.ndarray, fitness: str) -> np.ndarray:
    """Returns the fitness of episodes within their group; those that are lost are worst, and alike.

    Args:
      returns: [..., N] so far.
      status: [..., N] `Status`.
      fitness: name in `FITNESS`.
    """
    sound = np.isfinite(returns) & (status == Status.RUNNING)
    return FITNESS[fitness](np.where(sound, returns, -np.inf)).astype(np.float32)


def accumulate(perturbation: Any, noise: Any, begins: Any) -> Any:
    """Returns ξ [C, J, P]: the noise of this window added to that of the episode's windows before it, if any.

    Args:
      begins: bool [C], whether the window is the first of its episode.
    """
    return jnp.where(begins[:, None, None], 0.0, perturbation) + noise


def estimate(perturbation: Any, gain: Any, sigma: float, num_pairs: Any) -> Any:
    """Returns the estimate of the gradient [P]: the sum of ξ (f⁺ - f⁻) / (2 σ²) over pairs, divided by their number.

    Args:
      perturbation: [C, J, P] ξ.
      gain: [C, 2 J] fitness that the window added, pairs side by side; 0 for groups that do not count.
      num_pairs: that count.
    """
    difference = gain[:, 0::2] - gain[:, 1::2]
    return jnp.einsum("cjp,cj->p", perturbation, difference) / (2.0 * sigma**2 * num_pairs)


@dataclass
class _Tally:
    """What the windows of one iteration add up to, for the log."""

    inner_steps: int = 0
    rollout_seconds: float = 0.0
    ended: list[Ended] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    """[N] of the groups that ended"""
    spread: list[np.ndarray] = field(default_factory=list)
    """[J] distance of a pair's returns so far"""
    lost: list[np.ndarray] = field(default_factory=list)
    """[N] bool"""
    norm: list[float] = field(default_factory=list)
    """of the estimates"""

    def metrics(self, runner: RolloutRunner) -> dict[str, float]:
        """Returns what is logged of one iteration."""
        return {
            "inner_steps": float(self.inner_steps),
            "return": float(np.mean([group.returns for group in self.ended])),
            "score": float(np.mean(self.scores)),
            "pair_spread": float(np.mean(self.spread)),
            "lost": float(np.mean(self.lost)),
            "gradient_norm": float(np.mean(self.norm)),
            **returns_by_pool(runner, self.ended),
        }


def optimizer(settings: ESConfig) -> optax.GradientTransformation:
    """Returns Adam."""
    return optax.adam(settings.learning_rate)


@cache
def make_update(settings: ESConfig) -> Any:
    """Compiles `update(network, optimizer_state, perturbation, gain, num_pairs) -> (network, optimizer_state, norm)`.

    One step of Adam up the estimate, whose norm it returns too; arguments as in `estimate`.
    """
    transform = optimizer(settings)

    @jax.jit
    def update(network: Any, state: Any, perturbation: Any, gain: Any, num_pairs: Any) -> tuple[Any, Any, Any]:
        _, unravel = ravel_pytree(network)
        gradient = estimate(perturbation, gain, settings.sigma, num_pairs)
        updates, state = transform.update(unravel(-gradient), state, network)
        return optax.apply_updates(network, updates), state, jnp.linalg.norm(gradient)

    return update


class EvolutionStrategies:
    """Fulfils `metalearn.meta_training.estimator.Estimator`; critic and action noise are not trained.

    Args:
      config: of the controller.
      settings: of the estimator.
    """

    def __init__(self, config: ControllerConfig, settings: ESConfig) -> None:
        self._config, self._settings = config, settings
        self._update = make_update(settings)
        self._num_windows = -(-config.num_decisions // settings.window)

    def init(self, *, key: jax.Array) -> PolicyParams:
        """Makes the parameters that PPO starts from."""
        return ppo.init(self._config, ppo.PPOConfig(), key=key)

    def start(self, runner: RolloutRunner, params: PolicyParams, prior: Prior, chunks: Sequence[Chunk]) -> ESState:
        """Makes the state before the first iteration: nothing is under way."""
        phase = np.arange(len(chunks), dtype=np.int32) % self._num_windows
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(params.network))
        return ESState(
            optimizer=optimizer(self._settings).init(params.network),
            episodes=tuple(runner.blank_state(chunk, _policy(params), prior) for chunk in chunks),
            spec=jax.tree.map(lambda *leaves: np.zeros_like(np.stack(leaves)), *(chunk.spec for chunk in chunks)),
            num_steps=np.zeros(len(chunks), np.int32),
            decision=-phase * np.int32(self._settings.window),
            perturbation=np.zeros((len(chunks), CHUNK // 2, size), np.float32),
            returns=np.zeros((len(chunks), CHUNK), np.float32),
            fitness=np.zeros((len(chunks), CHUNK), np.float32),
        )

    def step(
        self,
        runner: RolloutRunner,
        params: PolicyParams,
        state: ESState,
        prior: Prior,
        chunks: Sequence[Chunk],
        *,
        key: jax.Array,
        label: str | None = None,
    ) -> tuple[PolicyParams, ESState, dict[str, float], list[Ended]]:
        """Runs as many windows as an episode has, and updates the policy after each; every group starts one episode."""
        began, tally = monotonic(), _Tally()
        for index in range(self._num_windows):
            noise = jax.random.normal(jax.random.fold_in(key, index), state.perturbation.shape) * self._settings.sigma
            state = _begin(state, noise, chunks)
            windows = self._windows(params, state, noise, chunks)
            launched = monotonic()
            results = runner.advance(list(windows.values()), prior, label=label and f"{label}, window {index}")
            tally.rollout_seconds += monotonic() - launched
            before = state.fitness
            state = self._collect(state, windows, results, tally)
            network, adam, norm = self._update(
                params.network,
                state.optimizer,
                state.perturbation,
                state.fitness - before,
                np.float32(len(windows) * CHUNK // 2),
            )
            params, state = params._replace(network=network), state._replace(optimizer=adam)
            tally.norm.append(float(norm))
        seconds = {
            "rollout_seconds": tally.rollout_seconds,
            "update_seconds": monotonic() - began - tally.rollout_seconds,
        }
        return params, state, {**seconds, **tally.metrics(runner)}, tally.ended

    def _windows(self, params: PolicyParams, state: ESState, noise: Any, chunks: Sequence[Chunk]) -> dict[int, Window]:
        """Makes the next window of every group that does not wait."""
        networks = jax.tree.map(np.asarray, _perturbed(params.network, noise))
        rest = jax.tree.map(
            lambda leaf: np.broadcast_to(leaf, (CHUNK, *np.shape(leaf))), _policy(params)._replace(network=None)
        )
        windows = {}
        for group in np.flatnonzero(np.asarray(state.decision) >= 0).tolist():
            decision = int(state.decision[group])
            spec, network = _row((state.spec, networks), group)
            windows[group] = Window(
                chunk=Chunk(pool=chunks[group].pool, spec=spec, num_steps=int(state.num_steps[group])),
                params=rest._replace(network=network),
                state=state.episodes[group] if decision else None,
                num_decisions=min(self._settings.window, self._config.num_decisions - decision),
            )
        return windows

    def _collect(
        self, state: ESState, windows: dict[int, Window], results: Sequence[WindowResult], tally: _Tally
    ) -> ESState:
        """Moves the groups on by a window; those whose episodes are over will begin anew."""
        episodes, returns, fitness = list(state.episodes), np.array(state.returns), np.array(state.fitness)
        decision = np.asarray(state.decision) + np.int32(self._settings.window)
        for (group, window), result in zip(windows.items(), results, strict=True):
            episodes[group] = result.state
            returns[group] += result.reward.sum(1)
            fitness[group] = shaped(returns[group], result.status, self._settings.fitness)
            if decision[group] >= self._config.num_decisions:
                decision[group] = 0
                tally.ended.append(Ended(window.chunk, returns[group]))
                tally.scores.append(result.score)
            tally.inner_steps += CHUNK * window.num_decisions * window.chunk.num_steps
            tally.spread.append(np.abs(returns[group, 0::2] - returns[group, 1::2]))
            tally.lost.append(result.status != Status.RUNNING)
        return state._replace(episodes=tuple(episodes), decision=decision, returns=returns, fitness=fitness)


def _policy(params: PolicyParams) -> PolicyParams:
    """Leaves out what does not act."""
    return params._replace(critic=None)


def _row(tree: Any, index: int) -> Any:
    """Takes one row of every leaf."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), tree)


@jax.jit
def _perturbed(network: Any, noise: Any) -> Any:
    """Returns θ + ε and θ - ε side by side, leaves [C, N, ...]; noise is [C, J, P]."""
    flat, unravel = ravel_pytree(network)
    both = jnp.stack([flat + noise, flat - noise], axis=2)
    return jax.vmap(jax.vmap(unravel))(both.reshape(len(noise), CHUNK, -1))


def _begin(state: ESState, noise: Any, chunks: Sequence[Chunk]) -> ESState:
    """Gives a new chunk to the groups that begin an episode, and adds this window's noise to ξ."""
    begins = np.asarray(state.decision) == 0

    def renew(old: Any, new: Any) -> np.ndarray:
        return np.where(begins.reshape(-1, *(1,) * (np.ndim(old) - 1)), new, old)

    return state._replace(
        spec=jax.tree.map(lambda old, *new: renew(old, np.stack(new)), state.spec, *(chunk.spec for chunk in chunks)),
        num_steps=renew(state.num_steps, np.array([chunk.num_steps for chunk in chunks], np.int32)),
        perturbation=np.asarray(accumulate(state.perturbation, noise, begins)),
        returns=renew(state.returns, np.float32(0.0)),
        fitness=renew(state.fitness, np.float32(0.0)),
    )
