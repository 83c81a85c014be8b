"""What is settled before the policy learns: the base configuration, the normaliser, and a supervised start.

One grid of configurations, run with the base schedule over many tasks, serves all three.
Shape legend: M trial, K term of the response surface, S start value, D descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn.controller import network
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import Normalizer
from metalearn.meta_training.rollout import Episode, PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, Chunk, RolloutRunner, concatenate, make_chunk, relative_scores
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, fit_knots, percentile_scale

SEARCH_BOX = {
    "learning_rate": (0.002, 0.25),
    "weight_decay": (0.01, 4.0),
    "beta1": (0.6, 0.97),
    "dropout": (0.0, 0.5),
}
"""Where configurations are drawn: around the best known, wide enough to hold every domain's optimum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """Trials of the base schedule; row m is one configuration on one task.

    Args:
      task: [M] identity of the (pool, task, budget); trials of one row share initialisation.
      pool: [M] index of the pool.
      family: [M] row of the model family in the base.
      told: [M] bool, whether the horizon was known.
      start: [M, S] configuration in unit ranges.
      score: [M] log-ratio to popularity on the test split.
      descriptors: [M, D] raw.
    """

    task: np.ndarray
    pool: np.ndarray
    family: np.ndarray
    told: np.ndarray
    start: np.ndarray
    score: np.ndarray
    descriptors: np.ndarray


Keep = Callable[[str, Callable[[], Mapping[str, np.ndarray]]], Mapping[str, np.ndarray]]
"""Returns what a function computes, or what a file of that name has kept of it."""


def search_box(config: ControllerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the search box's corners in unit ranges, each [S]."""
    corners = zip(*(SEARCH_BOX[name] for name in CONTROLLED), strict=True)
    low, high = (
        np.array([config.space[name].encode(value) for name, value in zip(CONTROLLED, corner, strict=True)])
        for corner in corners
    )
    return low, high


def draw_configurations(count: int, config: ControllerConfig, rng: np.random.Generator) -> np.ndarray:
    """Draws configurations by Latin hypercube inside `SEARCH_BOX`, [count, S] in unit ranges."""
    low, high = search_box(config)
    strata = np.stack([rng.permutation(count) for _ in CONTROLLED], axis=1)
    return low + (high - low) * (strata + rng.random((count, len(CONTROLLED)))) / count


def run_search(
    runner: RolloutRunner,
    params: PolicyParams,
    prior: Prior,
    *,
    tasks_per_pool: Sequence[int],
    configurations: Sequence[int],
    steps_range: Sequence[tuple[int, int]],
    told_share: float,
    seed: int,
    keep: Keep = lambda _, compute: compute(),
) -> SearchResult:
    """Runs configurations over tasks of every pool with the base schedule.

    Args:
      tasks_per_pool: tasks drawn of each pool; domains take turns, so that none rules.
      configurations: configurations of each task, a multiple of CHUNK.
      steps_range: of each pool, the log-uniform range of steps per interval.
      told_share: share of tasks whose horizon is known.
      seed: of every draw.
      keep: called with a file name and what computes one pool's trials; `Persistence.cached_arrays` keeps them.
    """
    parts: list[SearchResult] = []
    num_tasks = 0
    for index in range(len(runner.pools)):

        def search(index: int = index) -> Mapping[str, np.ndarray]:
            chunks, task = _search_chunks(
                runner.pools[index].names,
                index,
                tasks_per_pool[index],
                configurations[index],
                steps_range[index],
                told_share,
                runner.config,
                np.random.default_rng([seed, 11, index]),
            )
            joined = concatenate(runner.run(chunks, params, prior, act=False, label=f"search {index}"))
            result = SearchResult(
                task=task,
                pool=np.full(len(task), index),
                family=joined.family,
                told=np.concatenate([chunk.spec.horizon_told for chunk in chunks]),
                start=np.concatenate([chunk.spec.start for chunk in chunks]),
                score=relative_scores(joined),
                descriptors=joined.descriptors,
            )
            return vars(result)

        part = SearchResult(**keep(f"search-{index}.npz", search))
        parts.append(replace(part, task=part.task + num_tasks))
        num_tasks += tasks_per_pool[index]
    return SearchResult(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _search_chunks(
    names: Sequence[str],
    pool: int,
    num_tasks: int,
    configurations: int,
    steps_range: tuple[int, int],
    told_share: float,
    config: ControllerConfig,
    rng: np.random.Generator,
) -> tuple[list[Chunk], np.ndarray]:
    """Draws one pool's trials; returns their chunks, and which of the chosen tasks each trial is of."""
    chunks = []
    for task in balanced_tasks(names, num_tasks, rng):
        steps = draw_steps(steps_range, rng)
        starts = draw_configurations(configurations, config, rng)
        initialization, told = int(rng.integers(2**31)), bool(rng.random() < told_share)
        chunks.extend(
            make_chunk(
                pool,
                steps,
                task=task,
                initialization=initialization,
                horizon_told=told,
                start=starts[first : first + CHUNK],
                num_start=len(CONTROLLED),
            )
            for first in range(0, configurations, CHUNK)
        )
    return chunks, np.repeat(np.arange(num_tasks), configurations)


def balanced_tasks(names: Sequence[str], count: int, rng: np.random.Generator) -> list[int]:
    """Picks tasks so that domains take turns.

    A domain's tasks come in random order; simulated ones count as one in four.
    """
    by_domain: dict[str, list[int]] = {}
    for index in map(int, rng.permutation(len(names))):
        by_domain.setdefault(names[index], []).append(index)
    simulated = by_domain.pop("simulated", [])
    real = sorted(by_domain)
    rng.shuffle(real)
    picked: list[int] = []
    num_simulated = 0
    while len(picked) < count:
        if simulated and (len(picked) % 4 == 3 or not real):
            picked.append(simulated[num_simulated % len(simulated)])
            num_simulated += 1
        else:
            turn = len(picked) - num_simulated
            domain = by_domain[real[turn % len(real)]]
            picked.append(domain[(turn // len(real)) % len(domain)])
    return picked


def draw_steps(bounds: tuple[int, int], rng: np.random.Generator) -> int:
    """Draws steps per interval, log-uniform."""
    return round(float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1])))))


BANDWIDTH = 0.2
"""Of the kernel over configurations in `surrogate_value`, as a share of the search box."""
BASE_BANDWIDTH = 0.35
"""Of the kernel under which `choose_base` fits."""
WORST = -0.6
"""Scores count as so far below their task's median at most: how badly a configuration fails is no matter."""
_RIDGE = 1e-3


def choose_base(result: SearchResult, config: ControllerConfig, *, seed: int) -> tuple[np.ndarray, float]:
    """Chooses the configuration that does best on average over tasks.

    Scores are centred within each task, pools weigh alike, and a quadratic without mixed terms is fitted around every
    candidate under a Gaussian kernel. With one trial a point the best single trial would be mostly luck; one response
    surface for the whole box was found to run into its corners; and a kernel average is biased towards its edges, where
    the kernel is cut off.

    Returns:
      [S] in unit ranges, and its fitted score above the mean configuration.
    """
    low, high = search_box(config)
    target = result.score.copy()
    for task in np.unique(result.task):
        rows = result.task == task
        bounded = np.maximum(target[rows], np.median(target[rows]) + WORST)
        target[rows] = bounded - bounded.mean()
    weight = np.zeros(len(target))
    for pool in np.unique(result.pool):
        weight[result.pool == pool] = 1.0 / (result.pool == pool).sum()
    trials = (result.start - low) / (high - low)
    candidates = draw_configurations(4096, config, np.random.default_rng([seed, 12]))
    fitted = np.concatenate(
        [_local_fit(part, trials, target, weight) for part in np.array_split((candidates - low) / (high - low), 32)]
    )
    best = int(np.argmax(fitted))
    return candidates[best].astype(np.float32), float(fitted[best])


def _local_fit(points: np.ndarray, trials: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fits target [M] at points [P, S] by least squares on 1, d and d², d the offset of trials [M, S] from a point."""
    offset = trials[None] - points[:, None]
    kernel = np.exp(-0.5 * np.square(offset).sum(-1) / BASE_BANDWIDTH**2) * weight
    terms = np.concatenate([np.ones_like(offset[..., :1]), offset, np.square(offset)], axis=-1)
    weighted = terms * kernel[..., None]
    ridge = _RIDGE * kernel.sum(1)[:, None, None] * np.diag([0.0, *[1.0] * (terms.shape[-1] - 1)])
    moments = np.swapaxes(weighted, 1, 2) @ np.concatenate(
        [terms, np.broadcast_to(target[:, None], (*kernel.shape, 1))], -1
    )
    return np.linalg.solve(moments[..., :-1] + ridge, moments[..., -1:])[:, 0, 0]


def choose_bases(result: SearchResult, config: ControllerConfig, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the base of every family, and one for all other models, each without and with a known horizon.

    Only the largest pool of a family counts: slices, with many epochs over few interactions, want a weight decay far
    too strong for whole domains. (Counting slices in cost a third of the NDCG on a full-size validation domain.)

    Returns:
      [1 + families, 2, S] in unit ranges, and the smoothed scores [1 + families, 2] above the mean configuration. A
      family without trials gets the base for all other models.
    """
    largest = np.isin(result.pool, [result.pool[result.family == family].max() for family in np.unique(result.family)])
    shape = 1 + len(config.families), 2
    bases, scores = np.empty((*shape, len(CONTROLLED)), np.float32), np.empty(shape)
    for family in range(shape[0]):
        of_family = result.family == family if family and (result.family == family).any() else np.ones_like(largest)
        for told in range(2):
            rows = largest & of_family & (result.told == bool(told))
            rows = rows if rows.any() else largest & of_family
            part = SearchResult(**{name: value[rows] for name, value in vars(result).items()})
            bases[family, told], scores[family, told] = choose_base(part, config, seed=seed)
    return bases, scores


def fit_normalizer(episodes: Sequence[Episode], rng: np.random.Generator, limit: int = 60_000) -> Normalizer:
    """Fits the percentile knots of descriptors and signals on exploratory episodes."""
    joined = concatenate(episodes)

    def knots(values: np.ndarray) -> np.ndarray:
        rows = values.reshape(-1, values.shape[-1])
        return fit_knots(rows[rng.permutation(len(rows))[:limit]])

    group = np.where(joined.group_mask[:, None, :, None] > 0, joined.group, np.nan)
    return Normalizer(knots(joined.descriptors), knots(group), knots(joined.run))


def identity_normalizer(config: ControllerConfig) -> Normalizer:
    """Returns knots so wide that everything is in range, for use before any are fitted."""

    def knots(count: int) -> np.ndarray:
        return np.tile(np.linspace(-50.0, 50.0, 17, dtype=np.float32), (count, 1))

    return Normalizer(knots(len(config.descriptors)), knots(len(GROUP_FEATURES)), knots(len(GLOBAL_FEATURES)))


NEIGHBOURHOOD = 2.0
"""Of the kernel that weighs tasks by the distance of their percentile-scaled descriptors. It and the bandwidth were
chosen by leaving domains out: the best configuration under such weights gained 2 to 3 % over the best on average. The
network that is fitted to it keeps a part of that."""
SIMILARITY_FLOOR = 0.02
"""Weight of the least similar task: far from everything, the average over all tasks decides."""


class Trials(NamedTuple):
    """A search's trials, laid out for the surrogate; rows as in `SearchResult`."""

    position: Any
    """[M, S] configuration, as a share of the search box"""
    value: Any
    """[M] score centred within its task"""
    weight: Any
    """[M] one over the task's number of trials"""
    task: Any
    """[M] index of the task"""
    descriptors: Any
    """[tasks, D] percentile-scaled"""
    family: Any
    """[tasks] row in the base"""
    told: Any
    """[tasks] bool"""


def lay_out(result: SearchResult, config: ControllerConfig, prior: Prior) -> Trials:
    """Lays a search's trials out for `surrogate_value`."""
    low, high = search_box(config)
    _, first, task, count = np.unique(result.task, return_index=True, return_inverse=True, return_counts=True)
    mean = np.bincount(task, result.score) / count
    scaled = percentile_scale(result.descriptors[first], np.asarray(prior.normalizer.descriptors), np)
    return Trials(
        jnp.asarray((result.start - low) / (high - low), jnp.float32),
        jnp.asarray(result.score - mean[task], jnp.float32),
        jnp.asarray(1.0 / count[task], jnp.float32),
        jnp.asarray(task),
        jnp.asarray(scaled, jnp.float32),
        jnp.asarray(result.family[first]),
        jnp.asarray(result.told[first]),
    )


def surrogate_value(trials: Trials, position: Any, descriptors: Any, family: Any, told: Any, left_out: Any) -> Any:
    """Predicts the centred score of a configuration on a described task: a kernel average over both.

    Args:
      position: [S] as a share of the search box.
      descriptors: [D] percentile-scaled.
      family: only its tasks count, or all if it is 0.
      told: whether the horizon is known; only such tasks count.
      left_out: index of a task whose trials do not count, for honest targets.
    """
    distance = jnp.square(trials.descriptors - descriptors).sum(-1)
    similarity = jnp.exp(-0.5 * distance / NEIGHBOURHOOD**2) + SIMILARITY_FLOOR
    of_family = (family == 0) | (trials.family == family)
    counts = (trials.told == told) & of_family & (jnp.arange(len(trials.told)) != left_out)
    similarity = jnp.where(counts, similarity, 0.0)
    kernel = jnp.exp(-0.5 * jnp.square(trials.position - position).sum(-1) / BANDWIDTH**2)
    weight = kernel * trials.weight * similarity[trials.task]
    return (weight * trials.value).sum() / (weight.sum() + 1e-9)


def fit_start(
    result: SearchResult,
    config: ControllerConfig,
    params: Any,
    prior: Prior,
    *,
    seed: int,
    num_steps: int = 400,
    batch: int = 192,
    noise: float = 0.25,
    penalty: float = 0.02,
    rate: float = 3e-3,
    family_told_share: float = 0.85,
) -> tuple[Any, np.ndarray]:
    """Fits gate and modifier so that the start has the best value that the search's trials predict.

    Maximises the mean of `surrogate_value` at start(descriptors), over the search's tasks with noise on their
    descriptors, each task's own trials left out; less penalty · ‖gate · tanh(modifier)‖², the transfer penalty.

    Returns:
      The network parameters, and the predicted value at each step.
    """
    trials = lay_out(result, config, prior)
    low, high = (jnp.asarray(corner, jnp.float32) for corner in search_box(config))
    reach = jnp.asarray([reach.start for reach in config.reach], jnp.float32)
    base = jnp.asarray(prior.base, jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))

    def value_of(params: Any, descriptors: Any, family: Any, told: Any, task: Any) -> tuple[Any, Any]:
        proposal = network.start(config, params, descriptors, family)
        shift = proposal.gate * jnp.tanh(proposal.modifier)
        position = (base[family, told.astype(jnp.int32)] + shift * reach - low) / (high - low)
        return surrogate_value(trials, position, descriptors, family, told, task), jnp.square(shift).sum()

    def loss_fn(params: Any, descriptors: Any, family: Any, told: Any, task: Any) -> tuple[Any, Any]:
        value, size = jax.vmap(value_of, in_axes=(None, 0, 0, 0, 0))(params, descriptors, family, told, task)
        return -value.mean() + penalty * size.mean(), value.mean()

    @jax.jit
    def update(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        key_task, key_noise, key_family = jax.random.split(key, 3)
        task = jax.random.randint(key_task, (batch,), 0, len(trials.told))
        clean = trials.descriptors[task]
        # Zero is the median, and what an unknown descriptor becomes: it stays exactly zero.
        noisy = jnp.where(clean == 0.0, 0.0, clean + noise * jax.random.normal(key_noise, clean.shape))
        family = jnp.where(jax.random.bernoulli(key_family, family_told_share, (batch,)), trials.family[task], 0)
        (_, value), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, noisy, family, trials.told[task], task)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(seed), num_steps)
    (params, _), values = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    return params, np.asarray(values)
