"""Response surfaces: what they predict, what they leave out, and whose trials count."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.meta_training.response_surface import (
    WORST,
    Points,
    Surfaces,
    centred_scores,
    covariance,
    fit_surfaces,
    predict,
    predict_all,
)
from metalearn.meta_training.warm_start import SearchResult

TASKS, PER_TASK, S, D = 8, 12, 2, 3
pytestmark = pytest.mark.usefixtures("standard_promotion")


def searched(*, family: int = 1, told: bool = True, seed: int = 0, optimum: float = 0.5) -> SearchResult:
    """Return trials of two hyperparameters; tasks with a positive first descriptor want more of the first one."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(TASKS), PER_TASK)
    side = np.where(np.arange(TASKS) % 2 == 0, -1.0, 1.0)[task]
    start = rng.random((TASKS * PER_TASK, S))
    wanted = np.stack([optimum + 0.3 * side, np.full(len(task), optimum)], axis=1)
    return SearchResult(
        task=task,
        pool=np.zeros_like(task),
        family=np.full(len(task), family),
        told=np.full(len(task), told),
        start=start.astype(np.float32),
        score=rng.normal(0.0, 3.0, TASKS)[task] - np.square(start - wanted).sum(1) + rng.normal(0.0, 0.02, len(task)),
        descriptors=np.stack([side, 0 * side, 0 * side], axis=1).astype(np.float32),
    )


def joined(one: SearchResult, other: SearchResult) -> SearchResult:
    other = dataclasses.replace(other, task=other.task + TASKS)
    return SearchResult(**{name: np.concatenate([value, vars(other)[name]]) for name, value in vars(one).items()})


def fitted(result: SearchResult, num_families: int = 1) -> Surfaces:
    return fit_surfaces(result, result.start, result.descriptors, num_families=num_families, seed=0)


def points(result: SearchResult, rows: Any = slice(None)) -> Points:
    return Points(*(jnp.asarray(value[rows]) for value in (result.start, result.descriptors, result.told)))


def grid(side: float) -> Points:
    position = np.stack(np.meshgrid(np.linspace(0, 1, 11), np.linspace(0, 1, 11), indexing="ij"), -1).reshape(-1, 2)
    described = np.tile(np.float32([side, 0, 0]), (len(position), 1))
    return Points(jnp.asarray(position, jnp.float32), jnp.asarray(described), jnp.ones(len(position), bool))


def test_scores_are_centred_within_tasks_and_bounded_below():
    score = np.array([0.0, 1.0, -50.0, 7.0, 7.5, 8.0])
    centred = centred_scores(score, np.array([0, 0, 0, 1, 1, 1]))
    low = 0.0 + WORST  # the median of the first task is 0
    np.testing.assert_allclose(centred[:3], np.array([0.0, 1.0, low]) - (1.0 + low) / 3)
    np.testing.assert_allclose(centred[3:], [-0.5, 0.0, 0.5])


def test_each_kind_of_task_gets_its_own_optimum():
    surfaces = fitted(searched())
    for side in (-1.0, 1.0):
        where = grid(side)
        best = np.asarray(where.position)[int(predict(surfaces, where, 1).argmax())]
        np.testing.assert_allclose(best, [0.5 + 0.3 * side, 0.5], atol=0.15)


def test_a_task_left_out_is_as_if_it_had_never_been_run():
    """Block inversion against solving again without the rows, under the same kernel."""
    result = searched()
    surfaces = fitted(result)
    kernel = jax.tree.map(lambda leaf: leaf[0], surfaces.kernel)
    target = centred_scores(result.score, result.task)
    asked = grid(1.0)
    for task in (0, 5):
        rows = np.flatnonzero(result.task != task)
        known = points(result, rows)
        matrix = np.asarray(covariance(kernel, known, known), np.float64) + float(kernel.noise) ** 2 * np.eye(len(rows))
        expected = np.asarray(covariance(kernel, asked, known), np.float64) @ np.linalg.solve(matrix, target[rows])
        np.testing.assert_allclose(predict(surfaces, asked, 1, task), expected, atol=2e-3)
        assert np.abs(np.asarray(predict(surfaces, asked, 1)) - expected).max() > 1e-3


def test_covariance_is_symmetric_positive_and_largest_with_itself():
    result = joined(searched(), searched(told=False, seed=1))
    kernel = jax.tree.map(lambda leaf: leaf[0], fitted(result).kernel)
    matrix = np.asarray(covariance(kernel, points(result), points(result)), np.float64)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert (matrix <= matrix.diagonal().max() + 1e-6).all()
    assert np.linalg.eigvalsh(matrix).min() > -1e-4
    np.testing.assert_allclose(matrix.diagonal(), kernel.additive**2 + kernel.joint**2, rtol=1e-3)


def test_families_are_apart_and_any_other_model_gets_their_mean():
    result = joined(searched(family=1), searched(family=3, seed=1, optimum=0.2))
    surfaces = fitted(result, num_families=3)
    first, second, third, other = (np.asarray(predict(surfaces, grid(1.0), family)) for family in (1, 2, 3, 0))
    np.testing.assert_allclose(other, (first + third) / 2, atol=1e-5)
    np.testing.assert_array_equal(second, other)  # nothing was run for it
    np.testing.assert_allclose(first, predict(fitted(searched(family=1)), grid(1.0), 1), atol=2e-3)
    # A task of another family is nothing to leave out.
    np.testing.assert_array_equal(predict(surfaces, grid(1.0), 1, TASKS + 2), first)


def test_a_fit_is_the_same_whenever_it_is_made():
    one, other = (fitted(searched()) for _ in range(2))
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_all_at_once_is_as_one_by_one():
    result = joined(searched(family=1), searched(family=3, told=False, seed=1))
    surfaces = fitted(result, num_families=3)
    descriptors = jnp.asarray([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0]])
    position = grid(1.0).position
    everything = np.asarray(predict_all(surfaces, position, descriptors))
    assert everything.shape == (4, 2, 2, len(position))
    for family, told, task in np.ndindex(4, 2, 2):
        everywhere = jnp.broadcast_to(descriptors[task], (len(position), D))
        one = predict(surfaces, Points(position, everywhere, jnp.full(len(position), bool(told))), family)
        np.testing.assert_allclose(everything[family, told, task], one, atol=1e-4)
