"""A tiny bucket of simulated tasks, and a policy that acts, shared by the tests of meta-training: compiled once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from envs.tasks import TaskPool, build_pool
from envs.vectorized import Bucket
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, Normalizer
from metalearn.meta_training import ppo
from metalearn.meta_training.rollout import PolicyParams, Prior
from metalearn.meta_training.runner import RolloutRunner
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, fit_knots
from tests.meta_training.toy import ToyPool

BUCKET = Bucket(users=128, items=96, interactions=4096, dim=4, batch=32, evaluated=32)
BASES = (
    ((0.02, 0.25, 0.85, 0.15), (0.03, 0.34, 0.9, 0.1)),
    ((0.01, 0.5, 0.8, 0.05), (0.02, 0.6, 0.75, 0.02)),
    ((0.004, 0.02, 0.9, 0.25), (0.006, 0.03, 0.92, 0.3)),
)
"""Of any other model, of the bucket's family and of two towers: without, and with a known horizon."""


@pytest.fixture
def standard_promotion():
    """Let dtypes promote: optax relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def config() -> ControllerConfig:
    return ControllerConfig(
        descriptors=DESCRIPTORS,
        hidden_size=8,
        code_size=4,
        num_decisions=4,
        families=("matrix_factorization", "two_tower"),
    )


@pytest.fixture(scope="session")
def pool() -> TaskPool:
    return build_pool({}, BUCKET, slices_per_domain=0, num_simulated=3, seed=0)


@pytest.fixture(scope="session")
def runner(pool: TaskPool, config: ControllerConfig) -> RolloutRunner:
    return RolloutRunner([pool], config, devices=jax.local_devices()[:1])


@pytest.fixture(scope="session")
def mixed(config: ControllerConfig) -> RolloutRunner:
    """Toys of two families: one of two groups that the controller does not know, and one of three that it does."""
    pools = [ToyPool(family="gru4rec"), ToyPool(family="two_tower", num_groups=3)]
    return RolloutRunner(pools, config, devices=jax.local_devices()[:1])


@pytest.fixture(scope="session")
def prior(config: ControllerConfig) -> Prior:
    rng = np.random.default_rng(0)
    base = [
        [[config.space[n].encode(v) for n, v in zip(CONTROLLED, base, strict=True)] for base in bases]
        for bases in BASES
    ]
    sizes = (len(DESCRIPTORS), len(GROUP_FEATURES), len(GLOBAL_FEATURES))
    return Prior(
        np.array(base, np.float32),
        Normalizer(*(fit_knots(rng.uniform(-15.0, 15.0, (500, size))) for size in sizes)),
    )


@pytest.fixture(scope="session")
def untrained(config: ControllerConfig) -> PolicyParams:
    return jax.tree.map(np.asarray, ppo.init(config, ppo.PPOConfig(), key=jax.random.key(1)))


@pytest.fixture(scope="session")
def acting(untrained: PolicyParams) -> PolicyParams:
    """A policy whose every parameter is perturbed."""
    rng = np.random.default_rng(1)
    network = jax.tree.map(lambda leaf: leaf + rng.normal(0.0, 0.4, leaf.shape).astype(np.float32), untrained.network)
    return untrained._replace(network=network)
