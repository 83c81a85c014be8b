"""The base that a controller is released on."""

from __future__ import annotations

import numpy as np
import pytest

from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.meta_training.release import (
    DECAY_FACTORS,
    RATE_FACTORS,
    BaseChoice,
    choose_release_base,
    neighbours,
    released_prior,
)
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import RolloutRunner


def test_neighbours_surround_the_base(config: ControllerConfig, prior: Prior):
    base = np.asarray(prior.base)[1]
    candidates = neighbours(base, config)
    assert candidates.shape == (len(RATE_FACTORS) * len(DECAY_FACTORS), len(CONTROLLED))
    np.testing.assert_allclose(candidates[len(candidates) // 2], base, atol=1e-6)
    rates = [config.space["learning_rate"].decode(float(row[0])) for row in candidates]
    assert max(rates) / min(rates) == pytest.approx(9.0, rel=1e-3)  # a third and three times
    assert (candidates >= 0).all() and (candidates <= 1).all()
    corner = neighbours(np.ones(len(CONTROLLED), np.float32), config)  # kept within the space
    assert (corner <= 1).all()


def test_every_candidate_is_run_with_and_without_the_policy(runner: RolloutRunner, acting: PolicyParams, prior: Prior):
    choice = choose_release_base(runner, acting, prior, horizon_told=True, num_steps=6, tasks=[0, 1, 2], seed=0)
    assert choice.fixed.shape == choice.controlled.shape == (len(choice.candidates), 3)
    assert not np.allclose(choice.fixed, choice.controlled)  # this policy acts
    record = choice.record(runner.config, "known")
    assert record["known/controlled"] == pytest.approx(choice.controlled[choice.chosen].mean())


def test_an_untrained_policy_is_its_base(runner: RolloutRunner, untrained: PolicyParams, prior: Prior):
    choice = choose_release_base(runner, untrained, prior, horizon_told=False, num_steps=6, tasks=[1], seed=0)
    np.testing.assert_allclose(choice.fixed, choice.controlled, atol=1e-6)


def test_both_bases_are_chosen_and_logged(runner: RolloutRunner, untrained: PolicyParams, prior: Prior):
    log: list[dict] = []
    chosen, records = released_prior(runner, untrained, prior, num_steps=6, seed=0, log=log.append)
    assert chosen.base.shape == np.shape(prior.base)
    assert [record["phase"] for record in log] == ["release base"] * 2
    assert {name.split("/")[0] for name in records} == {"known", "unknown"}
    again, _ = released_prior(runner, untrained, prior, num_steps=6, seed=0, log=log.append)
    np.testing.assert_array_equal(chosen.base, again.base)


def test_the_base_stays_unless_it_is_beaten_beyond_noise():
    noise = np.random.default_rng(0).normal(0.0, 0.1, (9, 8))
    candidates = np.zeros((9, len(CONTROLLED)), np.float32)
    assert BaseChoice(candidates, noise, noise).chosen == 4
    assert BaseChoice(candidates, noise[:, :1], noise[:, :1]).chosen == 4  # one task says nothing
    better = noise.copy()
    better[7] = noise[4] + 0.1 + 0.1 * noise[7]  # on every task
    assert BaseChoice(candidates, noise, better).chosen == 7


def test_the_best_fixed_one_has_good_neighbours():
    fixed = np.zeros((9, 2))
    fixed[0] = 1.0  # alone in its corner
    fixed[[4, 5, 7, 8]] = 0.8
    candidates = np.zeros((9, len(CONTROLLED)), np.float32)
    assert BaseChoice(candidates, fixed, fixed).best_fixed == 8
