"""Generate a simulated domain: who takes what when, how it is rated, what was shown, and the truth behind it.

Shape legend: U users, I items, D latent dimensions, Q courses of popularity, B users of a chunk, N interactions.

A user u in stage p of the lifetime takes n[u, p] items without replacement from the exposed ones that are born, with
chances proportional to exp(taste_strength · <x[u, p], y[i]> + popularity[i, p]), by the Gumbel-top-k trick (Kool, van
Hoof and Welling, "Stochastic beams and where to find them", 2019); a share of the interactions is uniform noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from envs.domains import Domain, make_domain
from envs.simulated.activity import Activity, draw_activity
from envs.simulated.calendar import repeat_rows, schedule, to_seconds
from envs.simulated.feedback import draw_flips, draw_ratings, draw_shown
from envs.simulated.popularity import Popularity, draw_popularity, visibility
from envs.simulated.prior import Feedback, SimulatedParams, SimulatedPrior, draw_params
from envs.simulated.taste import Tastes, draw_content, draw_tastes
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

_CHUNK_ENTRIES = 1 << 20
"""Preferences held at once: larger chunks fall out of cache."""
_USER_CORE = 3
"""Most that pruning asks of users: one interaction each to train on, to validate and to test."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """A simulated domain and the truth behind it.

    Args:
        interactions: what was taken, in order of time; rated where feedback is explicit, with repeats only where there
            is repeat consumption, with timestamps unless the domain is untimed.
        exposures: pairs that were shown and not taken, where feedback is clicks, in the codes of `interactions`; None
            elsewhere. Items that nobody took are left out.
        item_content: float32 [I, C] by item code, or None.
        params: what the domain was generated from; `users` and `items` count those that did nothing as well.
        drift_time: seconds since the epoch at which drift is abrupt, NaN where it is not; also where timestamps are
            withheld.
        feedback: "implicit", "explicit" or "click".
    """

    interactions: Interactions
    exposures: Interactions | None
    item_content: np.ndarray | None
    params: SimulatedParams
    drift_time: float
    feedback: Feedback


def simulate(prior: SimulatedPrior | None = None, *, seed: int | np.random.Generator) -> Interactions:
    """Draw a domain from the prior and its positives from the domain.

    Args:
        prior: ranges to draw from; `SimulatedPrior()` by default.
        seed: integer, or a generator to go on with.

    Returns:
        Interactions in order of time, those of `Simulation`; the same for the same seed and prior.

    Example:
        >>> domain = simulate(SimulatedPrior(users=(200, 200), items=(100, 100), repeating=0.0), seed=0)
        >>> domain.num_users <= 200, len(domain) == len(domain.deduplicate())
        (True, True)
    """
    rng = np.random.default_rng(seed)
    return generate(draw_params(prior or SimulatedPrior(), rng), rng=rng).interactions.positives()


def simulate_domain(
    prior: SimulatedPrior | None = None,
    *,
    seed: int | np.random.Generator,
    split: Literal["auto", "time", "leave-last-out"] = "auto",
) -> Domain:
    """Draw a domain from the prior and split it; exposures and item content come along.

    Args:
        prior: ranges to draw from; `SimulatedPrior()` by default.
        seed: integer, or a generator to go on with.
        split: as in `make_domain`, but "auto" is "leave-last-out" also where a split by time leaves too few users.

    Raises:
        InvalidArgumentError: if the split leaves too few users to evaluate.

    Example:
        >>> domain = simulate_domain(SimulatedPrior(users=(200, 200), items=(100, 100), described=1.0), seed=0)
        >>> domain.item_content.shape[0] == domain.num_items
        True
    """
    rng = np.random.default_rng(seed)
    simulation = generate(draw_params(prior or SimulatedPrior(), rng), rng=rng)

    def split_by(how: Literal["auto", "time", "leave-last-out"]) -> Domain:
        return make_domain(
            simulation.interactions.positives(),
            name="simulated",
            split=how,
            item_content=simulation.item_content,
            exposures=simulation.exposures,
        )

    try:
        return split_by(split)
    except InvalidArgumentError:
        if split != "auto":
            raise
        return split_by("leave-last-out")


class _Log(NamedTuple):
    """Columns of interactions that are taken, or of pairs that are shown and not taken."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    """Share of the time span."""
    taste: np.ndarray
    """Taste part of the log-preference, in standard deviations over all pairs."""


def generate(params: SimulatedParams, *, rng: np.random.Generator) -> Simulation:
    """Generate a domain with given properties.

    Args:
        params: the properties.
        rng: generator.
    """
    tastes = draw_tastes(params, rng)
    popularity = draw_popularity(tastes.item_cluster, params, rng)
    content = draw_content(tastes.item, params, rng)
    drift_time = float(rng.uniform(0.3, 0.8)) if params.shift > 0.0 else np.nan
    activity = draw_activity(params, drift_time, rng)
    visible = visibility(popularity, params)

    taken: list[_Log] = []
    shown: list[_Log] = []
    # Chunks of users of like activity: the largest history of a chunk sets the cost of all.
    order = np.argsort(activity.counts, kind="stable")
    size = max(_CHUNK_ENTRIES // params.items, 1)
    for low in range(0, params.users, size):
        chunk = order[low : low + size]
        for part, rest in _live(chunk, tastes, popularity, activity, visible, drift_time, params, rng):
            taken.append(part)
            shown.append(rest)
    interactions, exposures, items = _to_tables(_join(taken), _join(shown), params, rng)
    return Simulation(
        interactions=interactions,
        exposures=exposures,
        item_content=None if content is None else content[items],
        params=params,
        drift_time=float(to_seconds(drift_time, params)),
        feedback=params.feedback,
    )


def _live(
    chunk: np.ndarray,
    tastes: Tastes,
    popularity: Popularity,
    activity: Activity,
    visible: np.ndarray,
    drift_time: float,
    params: SimulatedParams,
    rng: np.random.Generator,
) -> Iterator[tuple[_Log, _Log]]:
    """Yield what the users of a chunk take, and are shown beside it, in each stage of their lives."""
    edges = activity.edges[chunk]
    exposed = rng.random((len(chunk), params.items), dtype=np.float32) < visible
    lengths = np.diff(edges, axis=1)
    quota = rng.multinomial(activity.counts[chunk], lengths / lengths.sum(axis=1, keepdims=True))
    stages = lengths.shape[1]
    for stage in range(stages):
        opening = edges[:, stage]
        after = opening >= drift_time
        factor = tastes.at(chunk, params.drift * stage / max(stages - 1, 1) + params.shift * after)
        # One product for taste and every course of popularity.
        left = np.concatenate([params.taste_strength * factor, popularity.courses(opening, after, params)], axis=1)
        logits = left.astype(np.float32) @ np.concatenate([tastes.item.T, popularity.loadings])
        popularity.limit(logits, opening, params)
        row, item = _take(logits, exposed, quota[:, stage], rng)
        row, item = _add_noise(row, item, opening, popularity, params, rng)
        exposed[row, item] = False
        time = schedule(row, tastes.item_cluster[item], opening[row], edges[row, stage + 1], params, rng)
        taste = np.einsum("nd,nd->n", factor[row], tastes.item[item])
        part = _Log(chunk[row], item, time, taste)
        rest = _select(part, np.arange(0))
        if params.feedback == "click":
            part, rest = _click(part, row, exposed, popularity.birth, params, rng)
        rows, time = repeat_rows(
            np.arange(len(part.user)), activity.edges[part.user, stage + 1], part.time, params, rng
        )
        yield _select(part, rows)._replace(time=time), rest


def _click(
    part: _Log,
    row: np.ndarray,
    exposed: np.ndarray,
    birth: np.ndarray,
    params: SimulatedParams,
    rng: np.random.Generator,
) -> tuple[_Log, _Log]:
    """Record clicks: what was shown beside them, and a share of them as not taken."""
    position, other = draw_shown(row, part.item, exposed, params, rng)
    born = birth[other] <= part.time[position]
    position, other = position[born], other[born]
    missed = draw_flips(len(part.item), params, rng)
    shown = _Log(part.user[position], other, part.time[position], np.zeros(len(other)))
    return _select(part, ~missed), _join([shown, _select(part, missed)])


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
    row: np.ndarray,
    item: np.ndarray,
    opening: np.ndarray,
    popularity: Popularity,
    params: SimulatedParams,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace a share of the items by uniformly random ones that are born; what then occurs twice counts once."""
    other = rng.integers(0, params.items, len(item))
    noisy = (rng.random(len(item)) < params.noise) & (popularity.birth[other] <= opening[row])
    key = np.unique(row * params.items + np.where(noisy, other, item))
    return key // params.items, key % params.items


def _select(log: _Log, rows: np.ndarray) -> _Log:
    return _Log(*(column[rows] for column in log))


def _join(logs: list[_Log]) -> _Log:
    return _Log(*(np.concatenate(columns) for columns in zip(*logs, strict=True)))


def _prune(interactions: Interactions, core: int) -> Interactions:
    """Drop items and users with few interactions until none is left to drop, or nothing if that is more than half."""
    rows, dropped = np.arange(len(interactions)), True
    while core > 1 and dropped:
        user, item = interactions.user[rows], interactions.item[rows]
        keep = (np.bincount(item)[item] >= core) & (np.bincount(user)[user] >= min(core, _USER_CORE))
        rows, dropped = rows[keep], not keep.all()
    return interactions.select(rows) if 2 * len(rows) >= len(interactions) else interactions


def _to_tables(
    taken: _Log, shown: _Log, params: SimulatedParams, rng: np.random.Generator
) -> tuple[Interactions, Interactions | None, np.ndarray]:
    """Sort by time and compact; returns interactions, exposures and the item that each item code stands for."""
    taken = _select(taken, np.argsort(taken.time, kind="stable"))
    rating = draw_ratings(taken.user, taken.item, taken.taste, params, rng) if params.feedback == "explicit" else None
    interactions = Interactions(
        user=taken.user.astype(np.int32),
        item=taken.item.astype(np.int32),
        num_users=params.users,
        num_items=params.items,
        timestamp=to_seconds(taken.time, params) if params.has_timestamps else None,
        rating=rating,
    )
    if params.repeats == 0.0:
        # A pair can come back as noise in a later stage.
        interactions = interactions.deduplicate()
    interactions = _prune(interactions, params.core)
    users, items = (np.unique(column) for column in (interactions.user, interactions.item))
    kept = dataclasses.replace(interactions.compact(), user_labels=None, item_labels=None)
    if params.feedback != "click":
        return kept, None, items
    code_of_user = np.full(params.users, -1, dtype=np.int32)
    code_of_user[users] = np.arange(len(users))
    code_of_item = np.full(params.items, -1, dtype=np.int32)
    code_of_item[items] = np.arange(len(items))
    user, item = code_of_user[shown.user], code_of_item[shown.item]
    pairs = user.astype(np.int64) * len(items) + item
    known = kept.user.astype(np.int64) * len(items) + kept.item
    # Taken in a later stage is taken after all; shown twice counts once.
    keep = (user >= 0) & (item >= 0) & ~np.isin(pairs, known)
    rows = np.flatnonzero(keep)[np.argsort(shown.time[keep], kind="stable")]
    exposures = dataclasses.replace(
        kept,
        user=user[rows],
        item=item[rows],
        timestamp=to_seconds(shown.time[rows], params) if params.has_timestamps else None,
        rating=None,
    )
    return kept, exposures.deduplicate(), items
