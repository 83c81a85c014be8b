"""Families learn taste: on a simulated domain that taste explains they rank far better than popularity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from envs.simulated import SimulatedPrior, simulate_domain
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn.controller.actions import Values
from metalearn.meta_training.environment import Plan

STEPS = 500


@pytest.fixture(scope="module")
def domain():
    """Two dimensions of taste that never change, hardly any popularity, content that follows taste."""
    prior = SimulatedPrior(
        users=(300, 300),
        items=(200, 200),
        history=(20.0, 20.0),
        activity_std=(0.2, 0.2),
        latent_dim=(2, 2),
        taste_strength=(12.0, 12.0),
        popularity_std=(0.1, 0.1),
        exposure=(1.0, 1.0),
        periods=(1, 1),
        content_dim=(8, 8),
        content_share=(0.8, 0.8),
        described=1.0,
        explicit=0.0,
        click=0.0,
        repeating=0.0,
        shifting=0.0,
        noise=(0.0, 0.0),
        drift=(0.0, 0.0),
        born=(0.0, 0.0),
        cold_items=(0.0, 0.0),
        rise=(0.0, 0.0),
        decay=(0.0, 0.0),
        season=(0.0, 0.0),
    )
    return simulate_domain(prior, seed=1, split="leave-last-out")


@pytest.mark.parametrize("name", ["two_tower", "click_model"])
def test_beats_popularity_in_500_steps(domain, name):
    bucket = Bucket(users=300, items=200, interactions=8192, dim=8, batch=128, evaluated=256, learner=name, content=8)
    environment = VectorizedEnvironment(bucket)
    task = jax.tree.map(jnp.asarray, make_task(domain, bucket))
    groups = jnp.ones(environment.num_groups)
    values = Values(0.01 * groups, 0.1 * groups, 0.9 * groups, jnp.float32(0.1))
    plan = Plan(jnp.int32(STEPS), jnp.int32(0), jnp.float32(STEPS), jnp.bool_(False))
    state = environment.reset(task, key=jax.random.key(0))
    state, _ = jax.jit(environment.step)(task, state, values, plan, key=jax.random.key(1))
    assert float(environment.score(task, state)) > 2.0 * float(task.test_floor)
