"""What is settled before the policy learns: the base configuration, the normaliser, and a supervised start.

One grid of configurations, run with the base schedule over many tasks, serves all three.
Shape legend: M trial, S start value, D descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn.controller import network
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import Normalizer
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.response_surface import Points, fit_surfaces, predict, predict_all
from metalearn.meta_training.rollout import Episode, PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, Chunk, RolloutRunner, concatenate, make_chunk, relative_scores
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES, fit_knots, percentile_scale

NUM_CANDIDATES = 4096
"""Configurations of which the bases are chosen."""
SEARCH_BOX = {
    "learning_rate": (0.002, 0.25),
    "weight_decay": (0.01, 4.0),
    "beta1": (0.6, 0.97),
    "dropout": (0.0, 0.5),
}
"""Where configurations are drawn: around the best known, wide enough to hold every domain's optimum."""
FAMILY_RATES = {"two_tower": (0.0003, 0.1)}
"""Learning rates of the box of families whose optimum lies elsewhere: a softmax over the batch wants smaller ones."""


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


def family_box(family: str | None) -> dict[str, tuple[float, float]]:
    """Returns where configurations of a model family are drawn, the lowest and the highest value by hyperparameter."""
    return {**SEARCH_BOX, "learning_rate": FAMILY_RATES.get(family or "", SEARCH_BOX["learning_rate"])}


def search_box(config: ControllerConfig, family: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of a family's box in unit ranges, each [S]."""
    box = family_box(family)
    low, high = zip(*([config.space[name].encode(corner) for corner in box[name]] for name in CONTROLLED), strict=True)
    return np.array(low), np.array(high)


def draw_configurations(
    count: int, config: ControllerConfig, family: str | None, rng: np.random.Generator
) -> np.ndarray:
    """Draws configurations by Latin hypercube inside a family's box, [count, S] in unit ranges."""
    return _hypercube(count, *search_box(config, family), rng)


def _hypercube(count: int, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    strata = np.stack([rng.permutation(count) for _ in CONTROLLED], axis=1)
    return low + (high - low) * (strata + rng.random((count, len(CONTROLLED)))) / count


def _outer_box(config: ControllerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of what holds the boxes of all families, and of others."""
    lows, highs = zip(*(search_box(config, family) for family in (None, *config.families)), strict=True)
    return np.min(lows, axis=0), np.max(highs, axis=0)


def run_search(
    runner: RolloutRunner,
    params: PolicyParams,
    prior: Prior,
    *,
    tasks_per_pool: Sequence[int],
    configurations: Sequence[int],
    epochs_range: tuple[float, float],
    steps_range: Sequence[tuple[int, int]],
    told_share: float,
    seed: int,
    keep: Keep = lambda _, compute: compute(),
) -> SearchResult:
    """Runs configurations over tasks of every pool with the base schedule.

    Args:
      tasks_per_pool: tasks drawn of each pool; domains take turns, so that none rules.
      configurations: configurations of each task, a multiple of CHUNK.
      epochs_range: log-uniform, of a task's length.
      steps_range: of each pool, the fewest and the most steps per interval, whatever the epochs.
      told_share: share of tasks whose horizon is known.
      seed: of every draw.
      keep: called with a file name and what computes one pool's trials; `Persistence.cached_arrays` keeps them.
    """
    parts: list[SearchResult] = []
    for index in range(len(runner.pools)):

        def search(index: int = index) -> Mapping[str, np.ndarray]:
            """Runs the search of one pool."""
            chunks, task = _search_chunks(
                runner,
                index,
                tasks_per_pool[index],
                configurations[index],
                lambda tasks, rng: draw_steps(epochs_range, steps_range[index], runner, index, tasks, rng),
                told_share,
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

        parts.append(SearchResult(**keep(f"search-{index}.npz", search)))
    return join_searches(parts)


def join_searches(parts: Sequence[SearchResult]) -> SearchResult:
    """Joins the trials of several pools, each of which counts its tasks from 0."""
    first = np.cumsum([0, *(part.task.max() + 1 for part in parts[:-1])])
    parts = [replace(part, task=part.task + offset) for part, offset in zip(parts, first, strict=True)]
    return SearchResult(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _search_chunks(
    runner: RolloutRunner,
    pool: int,
    num_tasks: int,
    configurations: int,
    steps_of: Callable[[list[int], np.random.Generator], int],
    told_share: float,
    rng: np.random.Generator,
) -> tuple[list[Chunk], np.ndarray]:
    """Draws one pool's trials; returns their chunks, and which of the chosen tasks each trial is of."""
    chunks = []
    for task in balanced_tasks(runner.pools[pool].names, num_tasks, rng):
        steps = steps_of([task], rng)
        starts = draw_configurations(configurations, runner.config, runner.pools[pool].environment.family, rng)
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


def draw_steps(
    epochs: tuple[float, float],
    limits: tuple[int, int],
    runner: RolloutRunner,
    pool: int,
    tasks: Sequence[int],
    rng: np.random.Generator,
) -> int:
    """Draws the steps per interval of a run, so that its epochs are log-uniform where the limits allow.

    Steps alone would train a slice for a hundred epochs and a whole domain for five, and what is best depends on the
    epochs more than on anything else.

    Args:
      epochs: lowest and highest of a run.
      limits: fewest and most steps per interval.
      runner: of the pool.
      pool: its index.
      tasks: which of its tasks run for so long; of several, the geometric mean of their sizes counts.
      rng: of the draw.
    """
    drawn = np.exp(rng.uniform(*np.log(epochs)))
    steps = drawn * runner.steps_per_epoch(pool, tasks) / runner.config.num_decisions
    return round(float(np.clip(steps, *limits)))


def choose_bases(result: SearchResult, config: ControllerConfig, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the base of every family, and one for all other models, each without and with a known horizon.

    The configuration whose predicted score is best on average over the tasks that were searched. With one trial a point
    the best single trial would be mostly luck. Only the largest pool of a family counts: slices, with many epochs over
    few interactions, want a weight decay far too strong for whole domains. (Counting slices in cost a third of the NDCG
    on a full-size validation domain.)

    Returns:
      [1 + families, 2, S] in unit ranges, and the predicted scores [1 + families, 2] above the mean configuration. A
      family without trials gets the base for all other models.
    """
    candidates, value, family_of = _predict_candidates(result, config, seed)
    shape = 1 + len(config.families), 2
    bases, gains = np.empty((*shape, len(CONTROLLED)), np.float32), np.empty(shape)
    for family, told in np.ndindex(shape):
        of_family = family_of == family if (family_of == family).any() else np.ones_like(family_of, bool)
        mean = np.where(_in_box(candidates, config, family), value[family, told, of_family].mean(0), -np.inf)
        bases[family, told], gains[family, told] = candidates[mean.argmax()], mean.max()
    return bases, gains


def candidate_bases(
    result: SearchResult, config: ControllerConfig, family: str, *, count: int, seed: int
) -> np.ndarray:
    """Returns what would be a family's base, with a known horizon, had other tasks been drawn: [count, S].

    The first is that of `choose_bases`; the others are of bootstrap samples of its tasks, and all differ.

    Raises:
      InvalidArgumentError: the search has no trials of the family, or not so many candidates.
    """
    candidates, value, family_of = _predict_candidates(result, config, seed)
    index = config.family_index(family)
    inside = _in_box(candidates, config, index)
    candidates, of_family = candidates[inside], value[index, 1, family_of == index][:, inside]
    if not len(of_family):
        raise InvalidArgumentError(f"the search has no trials of {family!r}; meta-train with a preset that has it")
    rng = np.random.default_rng([seed, 14])
    chosen = [int(of_family.mean(0).argmax())]
    for _ in range(200):
        best = int(rng.choice(of_family, len(of_family)).mean(0).argmax())
        if len(chosen) < count and best not in chosen:
            chosen.append(best)
    if len(chosen) < count:
        raise InvalidArgumentError(f"`count` must be at most {len(chosen)} for this search of {family!r}, got {count}")
    return candidates[chosen]


def _predict_candidates(
    result: SearchResult, config: ControllerConfig, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns candidates [C, S], their predicted scores [1 + families, 2, T, C], and each task's family [T].

    Only tasks of the largest pool of a family are trained on and asked for.
    """
    largest = np.isin(result.pool, [result.pool[result.family == family].max() for family in np.unique(result.family)])
    result = SearchResult(**{name: value[largest] for name, value in vars(result).items()})
    low, high = _outer_box(config)
    _, first = np.unique(result.task, return_index=True)
    knots = fit_knots(result.descriptors[first])
    scaled = percentile_scale(result.descriptors, knots, np)
    surfaces = fit_surfaces(
        result, (result.start - low) / (high - low), scaled, num_families=len(config.families), seed=seed
    )
    candidates = _hypercube(NUM_CANDIDATES, low, high, np.random.default_rng([seed, 12]))
    position = jnp.asarray((candidates - low) / (high - low), jnp.float32)
    value = predict_all(surfaces, position, jnp.asarray(scaled[first], jnp.float32))
    return candidates, np.asarray(value), result.family[first]


def _in_box(candidates: np.ndarray, config: ControllerConfig, family: int) -> np.ndarray:
    """Returns which candidates [C, S] lie in the box of the family of a row; row 0 is for any other."""
    low, high = search_box(config, (None, *config.families)[family])
    return np.all((candidates >= low) & (candidates <= high), axis=1)


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


def fit_start(
    result: SearchResult,
    config: ControllerConfig,
    params: Any,
    prior: Prior,
    *,
    seed: int,
    num_steps: int = 400,
    batch: int = 96,
    noise: float = 0.25,
    penalty: float = 0.02,
    rate: float = 3e-3,
    family_told_share: float = 0.85,
) -> tuple[Any, np.ndarray]:
    """Fits gate and modifier so that the start has the best value that the search's trials predict.

    Maximises the mean of `response_surface.predict` at start(descriptors), over the search's tasks with noise on their
    descriptors, each task's own trials left out; less penalty · ‖gate · tanh(modifier)‖², the transfer penalty.

    Returns:
      The network parameters, and the predicted value at each step.
    """
    low, high = (jnp.asarray(corner, jnp.float32) for corner in _outer_box(config))
    _, first = np.unique(result.task, return_index=True)
    scaled = percentile_scale(result.descriptors, np.asarray(prior.normalizer.descriptors), np)
    surfaces = fit_surfaces(
        result,
        np.asarray((result.start - low) / (high - low)),
        scaled,
        num_families=len(config.families),
        seed=seed,
    )
    described = jnp.asarray(scaled[first], jnp.float32)
    family_of, told_of = jnp.asarray(result.family[first]), jnp.asarray(result.told[first])
    reach = jnp.asarray([reach.start for reach in config.reach], jnp.float32)
    base = jnp.asarray(prior.base, jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))

    def value_of(params: Any, descriptors: Any, family: Any, told: Any, task: Any) -> tuple[Any, Any]:
        proposal = network.start(config, params, descriptors, family)
        shift = proposal.gate * jnp.tanh(proposal.modifier)
        position = (base[family, told.astype(jnp.int32)] + shift * reach - low) / (high - low)
        point = Points(position[None], descriptors[None], told[None])
        return predict(surfaces, point, family, task)[0], jnp.square(shift).sum()

    def loss_fn(params: Any, descriptors: Any, family: Any, told: Any, task: Any) -> tuple[Any, Any]:
        value, size = jax.vmap(value_of, in_axes=(None, 0, 0, 0, 0))(params, descriptors, family, told, task)
        return -value.mean() + penalty * size.mean(), value.mean()

    @jax.jit
    def update(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        """Takes one optimizer step on a random batch of tasks."""
        params, state = carry
        key_task, key_noise, key_family = jax.random.split(key, 3)
        task = jax.random.randint(key_task, (batch,), 0, len(first))
        clean = described[task]
        # Zero is the median, and what an unknown descriptor becomes: it stays exactly zero.
        noisy = jnp.where(clean == 0.0, 0.0, clean + noise * jax.random.normal(key_noise, clean.shape))
        family = jnp.where(jax.random.bernoulli(key_family, family_told_share, (batch,)), family_of[task], 0)
        (_, value), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, noisy, family, told_of[task], task)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(seed), num_steps)
    (params, _), values = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    return params, np.asarray(values)
