"""Evolution strategies: the estimate on toys whose gradient is known, fitness, bookkeeping of windows, resumption."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from metalearn.controller import CONTROLLED, ControllerConfig
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.config import MetaTrainConfig
from metalearn.meta_training.environment import Status
from metalearn.meta_training.es import ESConfig, ESState, EvolutionStrategies, accumulate, estimate, shaped
from metalearn.meta_training.loop import meta_train
from metalearn.meta_training.rollout import Episode, PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, Chunk, RolloutRunner, Window, make_chunk
from tests.meta_training.toy import ToyEnvironment, ToyPool

SETTINGS = ESConfig(learning_rate=0.02, sigma=0.1, window=2)


# The estimate, on toys


def perturbed(theta: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return θ + ε and θ - ε side by side, [C, 2 J, P]."""
    return np.stack([theta + noise, theta - noise], axis=2).reshape(len(noise), -1, len(theta))


def quadratic(seed: int = 0, size: int = 12) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return a function of [..., P], a point, and the gradient there."""
    rng = np.random.default_rng(seed)
    factor, optimum, theta = rng.normal(size=(size, size)), rng.normal(size=size), rng.normal(size=size)
    curvature = factor @ factor.T / size

    def value(x: np.ndarray) -> np.ndarray:
        return -0.5 * np.einsum("...i,ij,...j", x - optimum, curvature, x - optimum)

    return value, theta, -curvature @ (theta - optimum)


def draws(repetitions: int, num_pairs: int, sigma: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return antithetic and plain estimates on the quadratic, from as many evaluations each, and its gradient."""
    value, theta, gradient = quadratic()
    rng = np.random.default_rng(1)
    antithetic, plain = [], []
    for _ in range(repetitions):
        noise = sigma * rng.normal(size=(1, num_pairs, len(theta)))
        antithetic.append(np.asarray(estimate(noise, value(perturbed(theta, noise)), sigma, num_pairs)))
        noise = sigma * rng.normal(size=(2 * num_pairs, len(theta)))
        plain.append((noise * value(theta + noise)[:, None]).mean(0) / sigma**2)
    return np.array(antithetic), np.array(plain), gradient


def test_the_estimate_is_aligned_with_the_gradient():
    antithetic, _, gradient = draws(1, 2000)
    assert antithetic[0] @ gradient / np.linalg.norm(antithetic[0]) / np.linalg.norm(gradient) > 0.97


def test_the_estimate_is_unbiased_and_varies_less_than_the_plain_one():
    antithetic, plain, gradient = draws(400, 8)
    error = antithetic.std(0) / np.sqrt(len(antithetic))
    assert (np.abs(antithetic.mean(0) - gradient) < 4.0 * error).all()
    assert antithetic.var(0).sum() < 0.5 * plain.var(0).sum()


LENGTHS = (2, 3, 5)
"""Windows of the episodes of three groups."""


def delayed(theta: Any, state: Any, optimum: float, xp: Any) -> tuple[Any, Any]:
    """Return the next state [..., P] and the reward: what a window does costs now, and pays in the windows after it."""
    reward = 2.0 * state.sum(-1) - 0.3 * xp.square(state - optimum).sum(-1) - theta.sum(-1) - 0.5 * theta[..., 0] ** 2
    return 0.8 * state + theta, reward


def true_gradient(theta: np.ndarray, length: int, optimum: float) -> np.ndarray:
    """Differentiate the return of a whole episode."""

    def total(theta: Any) -> Any:
        state, total = jnp.zeros(len(theta)), 0.0
        for _ in range(length):
            state, reward = delayed(theta, state, optimum, jnp)
            total += reward
        return total

    return np.asarray(jax.grad(total)(jnp.asarray(theta, jnp.float32)))


def unrolled_estimates(*, persistent: bool, num_pairs: int = 3000, episodes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return estimates [C, episodes, P] summed over the windows of episodes of three lengths, and the true gradients.

    The groups are at different phases: each begins anew when its episode is over, while the others are under way.
    """
    rng, sigma, theta = np.random.default_rng(2), 0.2, np.array([0.1, -0.3, 0.2])
    state = np.zeros((len(LENGTHS), 2 * num_pairs, len(theta)))
    window, total = np.zeros(len(LENGTHS), int), np.zeros((len(LENGTHS), len(theta)))
    xi = np.zeros((len(LENGTHS), num_pairs, len(theta)), np.float32)
    sums: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    while min(len(one) for one in sums) < episodes:
        noise = (sigma * rng.normal(size=xi.shape)).astype(np.float32)
        begins = window == 0
        xi = np.asarray(accumulate(xi, noise, begins if persistent else np.ones_like(begins)))
        state, total = (np.where(begins.reshape(-1, *(1,) * (x.ndim - 1)), 0.0, x) for x in (state, total))
        for group, length in enumerate(LENGTHS):
            policies = perturbed(theta, noise[group : group + 1])[0]
            state[group], reward = delayed(policies, state[group], float(group), np)
            total[group] += estimate(xi[group : group + 1], reward[None].astype(np.float32), sigma, num_pairs)
            window[group] = (window[group] + 1) % length
            if window[group] == 0:
                sums[group].append(total[group].copy())
    truth = np.stack([true_gradient(theta, length, float(group)) for group, length in enumerate(LENGTHS)])
    return np.stack([one[:episodes] for one in sums]), truth


def test_persistent_estimates_are_unbiased_where_truncated_ones_are_not():
    estimates, truth = unrolled_estimates(persistent=True)
    error = estimates.std(1, ddof=1) / np.sqrt(estimates.shape[1])
    assert (np.abs(estimates.mean(1) - truth) < 5.0 * error).all()
    assert (error < 0.2 * np.abs(truth).max(1, keepdims=True)).all()
    truncated, _ = unrolled_estimates(persistent=False)
    assert (truth[1:] > 1.0).all()
    assert (truncated.mean(1)[1:] < 0.0).all()  # it sees only the cost


# Fitness


@given(st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(float("-inf"))), min_size=CHUNK, max_size=CHUNK))
def test_ranks_are_those_of_scipy(returns: list[float]):
    running = np.full(CHUNK, Status.RUNNING)
    wanted = (rankdata(returns) - 1.0) / (CHUNK - 1) - 0.5
    np.testing.assert_allclose(shaped(np.array(returns), running, "ranks"), wanted, atol=1e-6)


def test_signs_compare_the_two_of_a_pair():
    fitness = shaped(np.array([1.0, 2.0, 9.0, 8.0, 5.0, 5.0]), np.zeros(6), "signs")
    np.testing.assert_array_equal(fitness, [-0.5, 0.5, 0.5, -0.5, 0.0, 0.0])


@pytest.mark.parametrize("fitness", ["ranks", "signs"])
def test_lost_episodes_are_worst_and_alike(fitness: str):
    returns = np.array([np.nan, -7.0, np.inf, 0.0, 100.0, 1.0, 100.0, -np.inf])
    status = np.array([0, 0, 0, 0, Status.DIVERGED, 0, Status.NONFINITE, 0])
    got = shaped(returns, status, fitness)
    assert np.isfinite(got).all()
    lost = np.array([True, False, True, False, True, False, True, True])
    if fitness == "ranks":
        assert got[lost].max() < got[~lost].min()
        assert len(set(got[lost])) == 1
    else:
        np.testing.assert_array_equal(got, [-0.5, 0.5, -0.5, 0.5, -0.5, 0.5, 0.0, 0.0])


def test_fitness_knows_nothing_of_a_task_s_scale():
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(5, CHUNK))
    scaled = returns * np.array([[1e-6], [1.0], [30.0], [1e4], [0.1]]) + np.arange(5)[:, None]
    np.testing.assert_array_equal(shaped(returns, 0 * returns, "ranks"), shaped(scaled, 0 * returns, "ranks"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "`sigma` must be a positive number, got 0.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a positive number, got nan"),
        ({"window": 0}, "`window` must be a positive int, got 0"),
        ({"fitness": "raw"}, r"`fitness` must be one of \['ranks', 'signs'\], got 'raw'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        ESConfig(**changes)


# Windows of real rollouts


def chunk(pool: int = 0, *, num_steps: int = 5, task: Any = 0, seed: int = 0, **changes: Any) -> Chunk:
    return make_chunk(pool, num_steps, task=task, initialization=seed, num_start=len(CONTROLLED), **changes)


def stacked(params: PolicyParams) -> PolicyParams:
    """Return one policy as that of every episode of a chunk."""
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (CHUNK, *np.shape(leaf))), params)


def assert_windows_are_the_rollout(
    runner: RolloutRunner, params: PolicyParams, prior: Prior, episodes: Chunk, lengths: tuple[int, ...]
) -> Episode:
    (whole,) = runner.run([episodes], params, prior)
    rewards, state = [], None
    for length in lengths:
        window = Window(chunk=episodes, params=stacked(params), state=state, num_decisions=length)
        (result,) = runner.advance([window], prior)
        state = result.state
        rewards.append(result.reward)
        assert np.isnan(result.score).all() or length == lengths[-1]
    np.testing.assert_array_equal(np.concatenate(rewards, axis=1), whole.reward)
    np.testing.assert_array_equal(result.score, whole.score)
    np.testing.assert_array_equal(result.state.run.descriptors, whole.descriptors)
    return whole


@pytest.mark.slow
def test_windows_are_the_whole_rollout_to_the_bit(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    rows = np.arange(CHUNK)
    episodes = chunk(task=rows % 3, seed=3, num_steps=6, horizon_told=rows % 2 == 0, single_group=rows % 4 == 0)
    whole = assert_windows_are_the_rollout(runner, acting, prior, episodes, (2, 2))
    assert np.ptp(whole.values.learning_rate, axis=1).min() > 0


@pytest.fixture(scope="module")
def toy(config: ControllerConfig) -> RolloutRunner:
    return RolloutRunner([ToyPool()], config, devices=jax.local_devices()[:1])


@pytest.mark.parametrize("lengths", [(2, 2), pytest.param((1, 3), marks=pytest.mark.slow)])
def test_windows_of_any_length_are_the_rollout(
    toy: RolloutRunner, acting: PolicyParams, prior: Prior, lengths: tuple[int, ...]
):
    assert_windows_are_the_rollout(toy, acting, prior, chunk(task=np.arange(CHUNK) % 2), lengths)


# Bookkeeping of a step


def groups(iteration: int) -> list[Chunk]:
    """Return three groups whose intervals have different numbers of steps."""
    return [chunk(num_steps=4 + 3 * group, task=(group + iteration) % 2, seed=iteration) for group in range(3)]


def begun(config: ControllerConfig, settings: ESConfig, toy: RolloutRunner, params: PolicyParams, prior: Prior):
    estimator = EvolutionStrategies(config, settings)
    return estimator, estimator.start(toy, params, prior, groups(0))


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def noise_of(key: jax.Array, window: int, state: ESState) -> np.ndarray:
    return SETTINGS.sigma * np.asarray(jax.random.normal(jax.random.fold_in(key, window), state.perturbation.shape))


@pytest.mark.usefixtures("standard_promotion")
def test_a_step_is_a_function_of_its_key(
    config: ControllerConfig, toy: RolloutRunner, untrained: PolicyParams, prior: Prior
):
    estimator, state = begun(config, SETTINGS, toy, untrained, prior)
    one, again, other = (
        estimator.step(toy, untrained, state, prior, groups(0), key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert same(one[:2], again[:2])
    assert not same(one[0], other[0])
    for name in ("critic", "log_std", "start_log_std"):
        assert same(getattr(one[0], name), getattr(untrained, name))
    assert not same(one[0].network["group_head"], untrained.network["group_head"])
    assert jax.tree.map(np.shape, one[1]) == jax.tree.map(np.shape, state)
    assert jax.tree.map(lambda x: np.asarray(x).dtype, one[1]) == jax.tree.map(lambda x: np.asarray(x).dtype, state)


@pytest.mark.usefixtures("standard_promotion")
def test_every_group_has_windows_of_its_own(
    config: ControllerConfig, toy: RolloutRunner, untrained: PolicyParams, prior: Prior
):
    estimator, state = begun(config, SETTINGS, toy, untrained, prior)  # two windows an episode
    np.testing.assert_array_equal(state.decision, [0, -2, 0])
    keys = [jax.random.key(seed) for seed in (5, 6)]
    params, first, metrics, _ = estimator.step(toy, untrained, state, prior, groups(0), key=keys[0])
    np.testing.assert_array_equal(first.decision, [0, 2, 0])
    noise = [noise_of(key, window, state) for key in keys for window in range(2)]
    np.testing.assert_allclose(first.perturbation[0], noise[0][0] + noise[1][0], atol=1e-6)
    np.testing.assert_allclose(first.perturbation[1], noise[1][1], atol=1e-6)
    # Two groups made four decisions, the one that waited made two.
    assert metrics["inner_steps"] == CHUNK * (4 * 4 + 2 * 7 + 4 * 10)
    _, second, metrics, _ = estimator.step(toy, params, first, prior, groups(1), key=keys[1])
    np.testing.assert_allclose(second.perturbation[0], noise[2][0] + noise[3][0], atol=1e-6)
    np.testing.assert_allclose(second.perturbation[1], noise[3][1], atol=1e-6)
    np.testing.assert_array_equal(second.spec.initialization[:, 0], [1, 1, 1])
    assert metrics["inner_steps"] == CHUNK * 4 * (4 + 7 + 10)


@pytest.mark.usefixtures("standard_promotion")
def test_the_changes_of_an_episode_add_up_to_its_final_rank(
    config: ControllerConfig, toy: RolloutRunner, acting: PolicyParams, prior: Prior, monkeypatch: pytest.MonkeyPatch
):
    estimator, state = begun(config, SETTINGS, toy, acting, prior)
    gains = []
    update = estimator._update

    def spied(network: Any, state: Any, perturbation: Any, gain: Any, num_pairs: Any) -> Any:
        gains.append(np.array(gain))
        return update(network, state, perturbation, gain, num_pairs)

    monkeypatch.setattr(estimator, "_update", spied)
    _, after, _, _ = estimator.step(toy, acting, state, prior, groups(0), key=jax.random.key(0))
    assert not gains[0][1].any()  # it waited
    np.testing.assert_allclose((gains[0] + gains[1])[[0, 2]], after.fitness[[0, 2]], atol=1e-6)
    running = np.zeros_like(after.returns)
    np.testing.assert_allclose(after.fitness, shaped(after.returns, running, "ranks"), atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_it_learns_what_the_domains_reward(
    config: ControllerConfig, toy: RolloutRunner, untrained: PolicyParams, prior: Prior
):
    estimator, state = begun(config, SETTINGS, toy, untrained, prior)
    both = chunk(task=np.arange(CHUNK) % 2)
    params = untrained
    for iteration in range(60):
        params, state, _, _ = estimator.step(
            toy, params, state, prior, groups(iteration), key=jax.random.key(iteration)
        )
    (before,), (after,) = (toy.run([both], policy, prior) for policy in (untrained, params))
    low, high = after.values.dropout[:2, -1]
    assert low < before.values.dropout[0, -1] < high
    assert (after.score[:2] > before.score[:2]).all()


@dataclass(frozen=True)
class LostEnvironment(ToyEnvironment):
    """Loses every run whose dropout is above that of the base."""

    def step(self, task: Any, state: Any, values: Any, plan: Any, *, key: Any) -> Any:
        state, statistics = super().step(task, state, values, plan, key=key)
        return jnp.where(values.dropout > 0.1, jnp.nan, state), statistics

    def status(self, state: Any) -> Any:
        return jnp.where(jnp.isfinite(state), Status.RUNNING, Status.NONFINITE).astype(jnp.int32)


@dataclass(frozen=True)
class LostPool(ToyPool):
    @property
    def environment(self) -> LostEnvironment:
        return LostEnvironment()


@pytest.mark.usefixtures("standard_promotion")
def test_lost_episodes_do_no_harm(config: ControllerConfig, untrained: PolicyParams, prior: Prior):
    runner = RolloutRunner([LostPool()], config, devices=jax.local_devices()[:1])
    estimator, state = begun(config, SETTINGS, runner, untrained, prior)
    params, lost = untrained, []
    for iteration in range(2):
        params, state, metrics, _ = estimator.step(
            runner, params, state, prior, groups(iteration), key=jax.random.key(iteration)
        )
        lost.append(metrics["lost"])
    assert 0.0 < max(lost) < 1.0
    assert runner._windows[0].advance._cache_size() == 1  # first windows and later ones are one program
    assert np.isfinite(metrics["gradient_norm"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state.optimizer, state.fitness)))


# The loop


class Finished(Exception):
    """All that is looked at has been logged."""


CONFIG = MetaTrainConfig(
    num_iterations=4,
    groups_per_pool=(3,),
    steps_range=((2, 5),),
    search_tasks=(3,),
    search_configurations=(8,),
    validate_every=2,
    validation_episodes=6,
    es=SETTINGS,
)


def logged(controller: ControllerConfig, directory: Path, kill: Path | None = None) -> list[dict[str, Any]]:
    """Meta-train to the last evaluation; return all records without what was timed.

    `kill` becomes what a run leaves behind that is killed after the third iteration.
    """
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        records.append({name: value for name, value in record.items() if "seconds" not in name})
        if kill is not None and (record["phase"], record.get("iteration")) == ("train", 3):
            shutil.copytree(directory, kill)
        if (record["phase"], record.get("iteration")) == ("validate", 4):
            raise Finished

    pools = [ToyPool()]
    with pytest.raises(Finished):
        meta_train(CONFIG, controller, pools, pools, directory=directory, log=log, provenance={})
    return records


@pytest.mark.usefixtures("standard_promotion")
def test_an_interrupted_run_resumes_to_the_bit(config: ControllerConfig, tmp_path: Path):
    whole = logged(config, tmp_path / "whole", kill=tmp_path / "cut")
    resumed = logged(config, tmp_path / "cut")
    # It went on from the second iteration, with a group in the middle of its episode, and figures are the same floats.
    assert [record["phase"] for record in resumed] == ["train", "train", "validate"]
    assert resumed == whole[-3:]
    assert len({record["gradient_norm"] for record in whole if record["phase"] == "train"}) == 4
