"""Both estimators behind one interface: the same start, the same figures, and a run that belongs to its estimator."""

from __future__ import annotations

from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from metalearn.controller import CONTROLLED, ControllerConfig
from metalearn.meta_training import ppo
from metalearn.meta_training.config import MetaTrainConfig
from metalearn.meta_training.es import ESConfig, EvolutionStrategies
from metalearn.meta_training.estimator import make_estimator
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, Chunk, RolloutRunner, concatenate, make_chunk
from tests.meta_training.toy import ToyPool

SETTINGS = ppo.PPOConfig(num_epochs=1, num_minibatches=2)
CONFIG = MetaTrainConfig(
    groups_per_pool=(2,), steps_range=((2, 5),), search_tasks=(2,), search_configurations=(8,), ppo=SETTINGS
)


def chunks() -> list[Chunk]:
    return [
        make_chunk(0, 4, task=group, initialization=group, exploration=np.arange(CHUNK), num_start=len(CONTROLLED))
        for group in range(2)
    ]


def test_settings_choose_the_estimator(config: ControllerConfig):
    evolution = replace(CONFIG, es=ESConfig())
    assert isinstance(make_estimator(config, CONFIG.estimator), ppo.PPO)
    assert isinstance(make_estimator(config, evolution.estimator), EvolutionStrategies)


def test_a_run_belongs_to_its_estimator():
    assert CONFIG.identity()["ppo"] == asdict(SETTINGS)
    assert "es" not in CONFIG.identity()
    evolution = replace(CONFIG, es=ESConfig())
    assert "ppo" not in evolution.identity()
    assert evolution.identity() == replace(evolution, ppo=ppo.PPOConfig(clip=0.1)).identity()
    assert evolution.identity() != replace(evolution, es=ESConfig(sigma=0.2)).identity()
    assert CONFIG.identity() == replace(CONFIG, num_iterations=7, patience=1).identity()


def test_evolution_knows_no_minibatches():
    assert replace(CONFIG, groups_per_pool=(3,), es=ESConfig()).groups_per_pool == (3,)


@pytest.mark.usefixtures("standard_promotion")
def test_both_estimators_start_alike_and_log_alike(config: ControllerConfig, prior: Prior):
    runner = RolloutRunner([ToyPool()], config, devices=jax.local_devices()[:1])
    estimators = [make_estimator(config, settings) for settings in (SETTINGS, ESConfig(window=4))]
    params = [estimator.init(key=jax.random.key(3)) for estimator in estimators]
    for one, other in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_array_equal(one, other)
    logged = []
    for estimator in estimators:
        state = estimator.start(runner, params[0], prior, chunks())
        changed, _, metrics, _ = estimator.step(runner, params[0], state, prior, chunks(), key=jax.random.key(0))
        assert not np.array_equal(changed.network["modifier"]["bias"], params[0].network["modifier"]["bias"])
        logged.append(metrics)
    shared = {"return", "score", "inner_steps", "rollout_seconds", "update_seconds", "return/real/toy"}
    assert shared <= set(logged[0]) & set(logged[1])
    # With windows as long as episodes nobody waits: both take the same steps.
    assert logged[0]["inner_steps"] == logged[1]["inner_steps"] == 2 * CHUNK * 4 * config.num_decisions


@pytest.mark.usefixtures("standard_promotion")
def test_a_step_of_ppo_is_a_batch_of_rollouts_and_an_update(
    config: ControllerConfig, acting: PolicyParams, prior: Prior
):
    runner = RolloutRunner([ToyPool()], config, devices=jax.local_devices()[:1])
    estimator, key = make_estimator(config, SETTINGS), jax.random.key(4)
    state = estimator.start(runner, acting, prior, chunks())
    stepped = estimator.step(runner, acting, state, prior, chunks(), key=key)
    episodes = concatenate(runner.run(chunks(), acting, prior, explore=1.0))
    wanted = ppo.make_update(config, SETTINGS)(acting, ppo.optimizer(SETTINGS).init(acting), prior, episodes, key)
    for one, other in zip(jax.tree.leaves(stepped[:2]), jax.tree.leaves(wanted[:2]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert stepped[2]["kl"] == float(wanted[2]["kl"])
    assert stepped[2]["return"] == ppo.summarize(episodes)["return"]
