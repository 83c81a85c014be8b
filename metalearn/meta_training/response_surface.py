"""What a configuration is worth on a described task, predicted from a search's trials by Gaussian processes.

One process a model family (Rasmussen and Williams, 2006, chapter 2). The covariance of two trials is a product of three
parts: how close the configurations are (a mean over hyperparameters, and all of them jointly), whether both or neither
knew the horizon, and how similar the tasks are; each of the last two has a share that trials have in common however
much they differ. Scores are centred within their task, since domains differ by more than configurations do.

Shape legend: M trial, N trial of one family (padded), S start value, D descriptor, F family with trials, T task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import cho_factor, cho_solve

if TYPE_CHECKING:
    from metalearn.meta_training.warm_start import SearchResult

WORST = -0.6
"""Scores count as so far below their task's median at most: how badly a configuration fails is no matter."""
MAX_FITTED = 400
"""Trials, drawn at random, that a family's kernel is fitted to; all of them then make its predictions."""
_FIT_STEPS, _FIT_RATE = 80, 0.08
_MIN_NOISE = 0.02


class Points(NamedTuple):
    """Where a surface is known or asked for."""

    position: Any
    """[N, S] configuration, as a share of the search box"""
    descriptors: Any
    """[N, D] percentile-scaled"""
    told: Any
    """[N] bool, whether the horizon is known"""


class Kernel(NamedTuple):
    """Parameters of the covariance; unconstrained in `_PRIOR`, positive here."""

    length: Any
    """[S] of each hyperparameter, as a share of the search box"""
    additive: Any
    """standard deviation of the mean over hyperparameters"""
    joint: Any
    """standard deviation of what depends on all of them"""
    noise: Any
    """standard deviation of one trial"""
    told: Any
    """share that runs with and without a known horizon have in common, 0 to 1"""
    shared: Any
    """share that all tasks have in common, 0 to 1"""
    reach: Any
    """distance of descriptors over which tasks are alike"""


class _Belief(NamedTuple):
    """Mean and deviation of a normal prior on an unconstrained parameter."""

    mean: float
    deviation: float


_PRIOR = Kernel(
    length=_Belief(np.log(0.7), 0.5),
    additive=_Belief(np.log(0.1), 1.0),
    joint=_Belief(np.log(0.1), 1.0),
    noise=_Belief(np.log(0.2), 1.0),
    told=_Belief(1.0, 1.5),
    shared=_Belief(0.0, 1.5),
    reach=_Belief(np.log(2.0), 0.5),
)


class Surfaces(NamedTuple):
    """One fitted process for each family that has trials; rows are padded with weights of 0."""

    kernel: Kernel
    """leaves have a leading axis of F"""
    trials: Points
    """[F, N, ...]"""
    weights: Any
    """[F, 1 + tasks of a family, N]: of all trials, and without those of each task"""
    left_out: Any
    """int [F, T + 1] row of `weights` without a task; 0 for tasks of other families, and last for none"""
    of_family: Any
    """[1 + families, F] whose mean predicts for a row of the base: its own process, or all of them"""


def covariance(kernel: Kernel, one: Points, other: Points) -> Any:
    """Returns the covariance of the noiseless scores of two sets of points, [N, M]."""
    of_runs = _of_configurations(kernel, one.position, other.position)
    of_runs *= jnp.where(one.told[:, None] == other.told[None], 1.0, kernel.told)
    return of_runs * _of_tasks(kernel, one.descriptors, other.descriptors)


def _of_configurations(kernel: Kernel, one: Any, other: Any) -> Any:
    square = jnp.square((one[:, None] - other[None]) / kernel.length)
    additive = jnp.square(kernel.additive) * jnp.exp(-0.5 * square).mean(-1)
    return additive + jnp.square(kernel.joint) * jnp.exp(-0.5 * square.sum(-1))


def _of_tasks(kernel: Kernel, one: Any, other: Any) -> Any:
    sizes = (jnp.square(descriptors).sum(-1) for descriptors in (one, other))
    distance = jnp.maximum(jnp.add.outer(*sizes) - 2.0 * one @ other.T, 0.0)
    return kernel.shared + (1.0 - kernel.shared) * jnp.exp(-0.5 * distance / jnp.square(kernel.reach))


def centred_scores(score: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Returns scores [M] less their task's mean, after bounding them from below by `WORST`."""
    target = np.array(score, np.float64)
    for index in np.unique(task):
        rows = task == index
        bounded = np.maximum(target[rows], np.median(target[rows]) + WORST)
        target[rows] = bounded - bounded.mean()
    return target


def fit_surfaces(
    result: SearchResult, position: np.ndarray, descriptors: np.ndarray, *, num_families: int, seed: int
) -> Surfaces:
    """Fits a process to the trials of every family.

    Args:
      result: trials; its `task`, `family`, `told` and `score` are read.
      position: [M, S] configurations, as shares of the search box.
      descriptors: [M, D] percentile-scaled.
      num_families: rows of the base, less the one for all other models.
      seed: of the trials that the kernels are fitted to.
    """
    target = centred_scores(result.score, result.task)
    tasks, task = np.unique(result.task, return_inverse=True)
    families = np.unique(result.family)
    most = int(np.unique(result.family, return_counts=True)[1].max())
    per_family = [len(np.unique(task[result.family == family])) for family in families]
    weights = np.zeros((len(families), 1 + max(per_family), most))
    left_out = np.zeros((len(families), len(tasks) + 1), np.int32)
    kernels, trials = [], []
    for index, family in enumerate(families):
        rows = np.flatnonzero(result.family == family)
        points = Points(
            jnp.asarray(position[rows], jnp.float32),
            jnp.asarray(descriptors[rows], jnp.float32),
            jnp.asarray(result.told[rows], bool),
        )
        fitted = np.random.default_rng([seed, 13, index]).permutation(len(rows))[:MAX_FITTED]
        kernel = _fit_kernel(
            jax.tree.map(lambda leaf, fitted=fitted: leaf[fitted], points),
            jnp.asarray(target[rows[fitted]], jnp.float32),
        )
        of_family, local = np.unique(task[rows], return_inverse=True)
        left_out[index, of_family] = 1 + np.arange(len(of_family))
        weights[index, : 1 + len(of_family), : len(rows)] = _weights(kernel, points, target[rows], local)
        padding = most - len(rows)
        trials.append(jax.tree.map(lambda leaf: np.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1)), points))  # noqa: B023
        kernels.append(kernel)
    of_family = np.full((1 + num_families, len(families)), 1.0 / len(families))
    for index, family in enumerate(families):
        if family:
            of_family[family] = np.arange(len(families)) == index
    return Surfaces(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trials),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(left_out),
        jnp.asarray(of_family, jnp.float32),
    )


def predict(surfaces: Surfaces, points: Points, family: Any, left_out: Any = -1) -> Any:
    """Predicts the centred scores of points [N], without the trials of one task.

    Args:
      points: where.
      family: row of the base.
      left_out: index of a task among the distinct ones of the search, -1 for none.
    """

    def of_one(kernel: Kernel, trials: Points, weights: Any, rows: Any) -> Any:
        return covariance(kernel, points, trials) @ weights[rows[left_out]]

    values = jax.vmap(of_one)(surfaces.kernel, surfaces.trials, surfaces.weights, surfaces.left_out)
    return surfaces.of_family[family] @ values


@jax.jit
def predict_all(surfaces: Surfaces, position: Any, descriptors: Any) -> Any:
    """Predicts every configuration on every task, by every row of the base, without and with a known horizon.

    Args:
      position: [C, S] as shares of the search box.
      descriptors: [T, D] percentile-scaled.

    Returns:
      [1 + families, 2, T, C].
    """

    def of_one(kernel: Kernel, trials: Points, weights: Any) -> Any:
        of_runs = _of_configurations(kernel, position, trials.position)
        of_tasks = _of_tasks(kernel, descriptors, trials.descriptors) * weights[0]
        told = jnp.arange(2)[:, None] == trials.told[None]
        shares = jnp.where(told, 1.0, kernel.told)
        return jnp.einsum("tn,hn,cn->htc", of_tasks, shares, of_runs)

    values = jax.vmap(of_one)(surfaces.kernel, surfaces.trials, surfaces.weights)
    return jnp.tensordot(surfaces.of_family, values, 1)


def _positive(free: Kernel) -> Kernel:
    """Maps unconstrained parameters to those of the kernel."""
    return Kernel(
        length=jnp.exp(free.length),
        additive=jnp.exp(free.additive),
        joint=jnp.exp(free.joint),
        noise=_MIN_NOISE + jnp.exp(free.noise),
        told=jax.nn.sigmoid(free.told),
        shared=jax.nn.sigmoid(free.shared),
        reach=jnp.exp(free.reach),
    )


@jax.jit
def _fit_kernel(points: Points, target: Any) -> Kernel:
    """Maximises the marginal likelihood times `_PRIOR`."""

    def loss_fn(free: Kernel) -> Any:
        """Returns the negative log posterior of a kernel, without constants."""
        kernel = _positive(free)
        matrix = covariance(kernel, points, points) + jnp.square(kernel.noise) * jnp.eye(len(target))
        lower = jnp.linalg.cholesky(matrix)
        whitened = jax.scipy.linalg.solve_triangular(lower, target, lower=True)
        surprise = [
            jnp.square((value - belief.mean) / belief.deviation).sum()
            for value, belief in zip(free, _PRIOR, strict=True)
        ]
        return 0.5 * jnp.square(whitened).sum() + jnp.log(jnp.diagonal(lower)).sum() + 0.5 * sum(surprise)

    start = Kernel(*(jnp.asarray(belief.mean, jnp.float32) for belief in _PRIOR))
    start = start._replace(length=jnp.full(points.position.shape[-1], start.length))
    optimizer = optax.adam(_FIT_RATE)

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        free, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(free), state)
        return (optax.apply_updates(free, updates), state), None

    (free, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=_FIT_STEPS)
    return _positive(free)


def _weights(kernel: Kernel, points: Points, target: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Returns K⁻¹ y of all trials, and of all but each task's, [1 + T, N].

    Without the rows t it is α - K⁻¹[:, t] (K⁻¹[t, t])⁻¹ α[t], by block inversion.
    """
    matrix = np.asarray(covariance(kernel, points, points), np.float64)
    matrix += float(kernel.noise) ** 2 * np.eye(len(target))
    inverse = cho_solve(cho_factor(matrix), np.eye(len(target)))
    weights = [inverse @ target]
    for index in range(task.max() + 1):
        rows = np.flatnonzero(task == index)
        correction = inverse[:, rows] @ np.linalg.solve(inverse[np.ix_(rows, rows)], weights[0][rows])
        weights.append(np.where(task == index, 0.0, weights[0] - correction))
    return np.stack(weights)
