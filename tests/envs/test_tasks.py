"""Pools of tasks: named by family and size, and shared by learners of one size."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from envs.events import EventConfig, EventfulEnvironment
from envs.tasks import TaskPool, build_pool
from envs.vectorized import Bucket, VectorizedEnvironment
from metalearn.errors import InvalidArgumentError

BUCKET = Bucket(users=128, items=96, interactions=4096, dim=4, batch=32, evaluated=32, history=10)


@pytest.fixture(scope="module")
def pool() -> TaskPool:
    return build_pool({}, BUCKET, slices_per_domain=0, num_simulated=2, seed=0)


def test_another_learner_trains_the_same_tasks(pool: TaskPool):
    towers = replace(BUCKET, learner="two_tower", dim=8, batch=64)
    other = pool.trained_by(towers)
    assert isinstance(other.environment, VectorizedEnvironment)
    assert (other.environment.bucket, other.environment.family) == (towers, "two_tower")
    assert (pool.environment.family, pool.bucket) == ("matrix_factorization", BUCKET)
    assert other.tasks is pool.tasks
    assert other.profiles is pool.profiles
    assert other.names == pool.names


def test_built_for_the_other_learner_they_are_the_same_tasks(pool: TaskPool):
    built = build_pool({}, replace(BUCKET, learner="two_tower"), slices_per_domain=0, num_simulated=2, seed=0)
    for mine, other in zip(*(jax.tree.leaves(each.tasks) for each in (pool, built)), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    "name", ["users", "items", "interactions", "evaluated", "targets", "history", "content", "exposures"]
)
def test_another_size_is_refused_by_name(pool: TaskPool, name: str):
    with pytest.raises(InvalidArgumentError, match=rf"`bucket` must have the \['{name}'\] of these tasks, got Bucket"):
        pool.trained_by(replace(BUCKET, **{name: getattr(BUCKET, name) + 8}))


def test_labels_tell_families_and_sizes_apart(pool: TaskPool):
    assert pool.label == "matrix_factorization/128"
    assert pool.trained_by(replace(BUCKET, learner="self_attention")).label == "self_attention/128"


def test_events_leave_the_family_as_it_is(pool: TaskPool):
    eventful = replace(pool, events=EventConfig(missing_gradients=0.5)).trained_by(
        replace(BUCKET, learner="click_model")
    )
    assert isinstance(eventful.environment, EventfulEnvironment)
    assert eventful.environment.family == "click_model"
