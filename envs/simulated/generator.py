"""Generate the interactions of a simulated domain.

Shape legend: U users, I items, D latent dimensions, K clusters, P periods, B users of a chunk.

A user u in period p takes n[u, p] items without replacement from the exposed ones that are born, with chances
proportional to exp(taste_strength * <x[u, p], y[i]> + popularity[i] - decay * age[i, p]), by the Gumbel-top-k trick;
a share of the interactions is uniform noise.
"""

from __future__ import annotations

import numpy as np

from envs.simulated.prior import SimulatedParams, SimulatedPrior, draw_params
from metalearn.interactions import Interactions

_CHUNK_ENTRIES = 1 << 20
"""Preferences held at once: larger chunks fall out of cache."""
_START = 1_500_000_000.0
"""Seconds since the epoch at which every simulated log starts."""


def simulate(prior: SimulatedPrior | None = None, *, seed: int | np.random.Generator) -> Interactions:
    """Draw a domain from the prior and its interactions from the domain.

    Args:
        prior: ranges to draw from; `SimulatedPrior()` by default.
        seed: integer, or a generator to go on with.

    Returns:
        Interactions in order of time, without repeats or ratings; the same for the same seed and prior.

    Example:
        >>> domain = simulate(SimulatedPrior(users=(200, 200), items=(100, 100)), seed=0)
        >>> domain.num_users <= 200, len(domain) == len(domain.deduplicate())
        (True, True)
    """
    rng = np.random.default_rng(seed)
    return generate(draw_params(prior or SimulatedPrior(), rng), rng=rng)


def generate(params: SimulatedParams, *, rng: np.random.Generator) -> Interactions:
    """Generate the interactions of a domain with given properties, in order of time.

    Args:
        params: the properties.
        rng: generator.
    """
    user_factor, item_factor, item_cluster = _factors(params, rng)
    turned, _, _ = _factors(params, rng)
    popularity = _popularity(params, rng)
    counts = _activity(params, rng)
    start = rng.uniform(0.0, 1.0 - params.lifetime, params.users)
    birth = np.where(rng.random(params.items) < params.born, rng.random(params.items), 0.0).astype(np.float32)
    visible = _visibility(params, popularity)

    users: list[np.ndarray] = []
    items: list[np.ndarray] = []
    times: list[np.ndarray] = []
    # Chunks of users of like activity: the largest history of a chunk sets the cost of all.
    order = np.argsort(counts, kind="stable")
    size = max(_CHUNK_ENTRIES // params.items, 1)
    for low in range(0, params.users, size):
        chunk = order[low : low + size]
        exposed = rng.random((len(chunk), params.items), dtype=np.float32) < visible
        quota = rng.multinomial(counts[chunk], np.full(params.periods, 1.0 / params.periods))
        for period in range(params.periods):
            angle = params.drift * period / max(params.periods - 1, 1)
            factor = np.cos(angle) * user_factor[chunk] + np.sin(angle) * turned[chunk]
            opening = start[chunk] + params.lifetime * period / params.periods
            logits = params.taste_strength * (factor @ item_factor.T)
            age = opening[:, None].astype(np.float32) - birth
            logits += popularity
            logits -= np.float32(params.decay) * age
            row, item = _take(logits, exposed & (age >= 0.0), quota[:, period], rng)
            row, item = _add_noise(row, item, age, params, rng)
            exposed[row, item] = False
            users.append(chunk[row])
            items.append(item)
            within = _within_period(chunk[row], item_cluster[item], params, rng)
            times.append(opening[row] + params.lifetime / params.periods * within)
    return _to_interactions(users, items, times, params)


def _factors(params: SimulatedParams, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors [U, D] and [I, D] from mixtures with shared centres, scaled to inner products of unit variance."""
    centres = rng.standard_normal((params.clusters, params.latent_dim), dtype=np.float32)
    weights = rng.dirichlet(np.full(params.clusters, 2.0))
    inner, outer = np.sqrt(1.0 - params.cluster_share), np.sqrt(params.cluster_share)
    factors, clusters = [], []
    for count in (params.users, params.items):
        cluster = rng.choice(params.clusters, size=count, p=weights)
        factor = outer * centres[cluster] + inner * rng.standard_normal((count, params.latent_dim), dtype=np.float32)
        factors.append((factor / params.latent_dim**0.25).astype(np.float32))
        clusters.append(cluster)
    return factors[0], factors[1], clusters[1]


def _popularity(params: SimulatedParams, rng: np.random.Generator) -> np.ndarray:
    """Popularity part of the log-preferences, float32 [I]: a blend of log-normal and power law, by rank."""
    normal = np.sort(rng.standard_normal(params.items))[::-1]
    power = -np.log(np.arange(1, params.items + 1))
    power = (power - power.mean()) / power.std()
    blend = (1.0 - params.zipf_share) * normal + params.zipf_share * power
    return rng.permutation(params.popularity_std * (blend - blend.mean()) / blend.std()).astype(np.float32)


def _activity(params: SimulatedParams, rng: np.random.Generator) -> np.ndarray:
    """Interactions of each user, int64 [U]: log-normal, at least 2, at most 40 % of the items that a user sees."""
    seen = params.exposure * params.items
    mean = min(params.history, seen / 4)
    draw = np.exp(rng.normal(-0.5 * params.activity_std**2, params.activity_std, params.users))
    return np.clip(np.round(mean * draw), 2, max(0.4 * seen, 2)).astype(np.int64)


def _visibility(params: SimulatedParams, popularity: np.ndarray) -> np.ndarray:
    """Chance of each item to be seen by a user, float32 [I], `exposure` on average before clipping."""
    weight = np.exp(params.exposure_bias * popularity)
    return np.clip(params.exposure * weight / weight.mean(), 0.02, 1.0).astype(np.float32)


def _take(
    logits: np.ndarray, available: np.ndarray, quota: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Take up to quota[b] of the available items of each row without replacement, with chances exp(logits)."""
    most = int(quota.max(initial=0))
    if most == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    # -log of an exponential variable is a Gumbel variable.
    logits -= np.log(rng.standard_exponential(logits.shape, dtype=np.float32) + np.float32(1e-30))
    logits[~available] = -np.inf
    if most < logits.shape[1]:
        top = np.argpartition(logits, logits.shape[1] - most, axis=1)[:, -most:]
    else:
        top = np.broadcast_to(np.arange(logits.shape[1]), logits.shape)
    score = np.take_along_axis(logits, top, axis=1)
    rank = np.argsort(np.argsort(-score, axis=1), axis=1)
    row, position = np.nonzero((rank < quota[:, None]) & np.isfinite(score))
    return row, top[row, position]


def _add_noise(
    row: np.ndarray, item: np.ndarray, age: np.ndarray, params: SimulatedParams, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replace a share of the items by uniformly random ones that are born; what then occurs twice counts once."""
    other = rng.integers(0, params.items, len(item))
    noisy = (rng.random(len(item)) < params.noise) & (age[row, other] >= 0.0)
    item = np.where(noisy, other, item)
    key = np.sort(row * params.items + item)
    key = key[np.diff(key, prepend=-1) != 0]
    return key // params.items, key % params.items


def _within_period(
    user: np.ndarray, cluster: np.ndarray, params: SimulatedParams, rng: np.random.Generator
) -> np.ndarray:
    """Position in [0, 1) within the period; coherent users take the items of one cluster together."""
    together = rng.random((params.users, params.clusters), dtype=np.float32)[user, cluster]
    return (1.0 - params.coherence) * rng.random(len(user)) + params.coherence * together


def _to_interactions(
    users: list[np.ndarray], items: list[np.ndarray], times: list[np.ndarray], params: SimulatedParams
) -> Interactions:
    user, item, time = np.concatenate(users), np.concatenate(items), np.concatenate(times)
    order = np.argsort(time, kind="stable")
    seconds = np.round(_START + 86_400.0 * params.span_days * time[order])
    interactions = Interactions(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        num_users=params.users,
        num_items=params.items,
        timestamp=seconds if params.has_timestamps else None,
    )
    return interactions.deduplicate().compact()
