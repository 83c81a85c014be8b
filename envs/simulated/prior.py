"""What simulated domains can be like: ranges, and one draw from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from metalearn.errors import InvalidArgumentError

Range = tuple[float, float]

_LOG_UNIFORM = frozenset(
    {"users", "items", "history", "latent_dim", "clusters", "taste_strength", "exposure", "span_days"}
)
_WHOLE = frozenset({"users", "items", "clusters", "latent_dim", "periods"})


@dataclass(frozen=True, kw_only=True)
class SimulatedPrior:
    """Ranges (low, high) that the properties of a simulated domain are drawn from, each on its own.

    Users, items, history, latent dimensions, clusters, taste strength, exposure and span are log-uniform, the others
    uniform.

    Args:
        users: number of users.
        items: number of items.
        history: mean number of interactions of a user; capped at a quarter of the items a user gets to see.
        latent_dim: dimensions of taste.
        clusters: number of taste clusters, for users and items alike.
        cluster_share: share of the variance of a factor that its cluster explains, in [0, 1].
        taste_strength: standard deviation of the taste part of a user's log-preferences; far below `popularity_std`
            popularity is close to optimal, far above it is much beaten.
        popularity_std: standard deviation of the popularity part of the log-preferences.
        zipf_share: 0 is a log-normal popularity law, 1 a power law, between is a blend.
        activity_std: standard deviation of the log-number of interactions of a user.
        exposure: share of the catalogue that a user ever gets to see.
        exposure_bias: exponent of popularity in the chance to be seen; 0 is none.
        noise: share of interactions with uniformly random items, in [0, 1].
        periods: stages of a user's lifetime at which taste and catalogue change.
        drift: angle in radians by which taste turns over a user's lifetime.
        born: share of items that appear only after the start, at uniform times.
        decay: by how much the log-preference of an item falls over the time span, from its birth.
        coherence: how strongly items of one cluster follow each other within a stage, in [0, 1].
        lifetime: share of the time span in which a user is active, in (0, 1].
        span_days: length of the log in days.
        untimed: share of domains without timestamps, a plain number in [0, 1].

    Raises:
        InvalidArgumentError: if a range is reversed or lies outside what its property allows.

    Example:
        >>> SimulatedPrior(users=(200, 400)).users
        (200, 400)
    """

    users: Range = (150, 3000)
    items: Range = (100, 3000)
    history: Range = (4.0, 80.0)
    latent_dim: Range = (2, 24)
    clusters: Range = (3, 60)
    cluster_share: Range = (0.1, 0.98)
    taste_strength: Range = (1.0, 12.0)
    popularity_std: Range = (0.1, 1.3)
    zipf_share: Range = (0.0, 1.0)
    activity_std: Range = (0.2, 1.2)
    exposure: Range = (0.25, 1.0)
    exposure_bias: Range = (0.0, 1.0)
    noise: Range = (0.0, 0.35)
    periods: Range = (1, 4)
    drift: Range = (0.0, 0.8)
    born: Range = (0.0, 0.25)
    decay: Range = (0.0, 1.0)
    coherence: Range = (0.0, 0.9)
    lifetime: Range = (0.4, 1.0)
    span_days: Range = (7.0, 3000.0)
    untimed: float = 0.3

    def __post_init__(self) -> None:
        least = {"users": 32, "items": 32, "history": 2, "latent_dim": 1, "clusters": 1, "periods": 1}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low, high = (value, value) if field.name == "untimed" else value
            floor = least.get(field.name, 1e-6 if field.name in _LOG_UNIFORM or field.name == "lifetime" else 0.0)
            ceiling = 1.0 if field.name in _SHARES else np.inf
            if not floor <= low <= high <= ceiling:
                raise InvalidArgumentError(
                    f"`{field.name}` must be a range (low, high) with {floor} <= low <= high <= {ceiling}, got {value}"
                )


_SHARES = frozenset({"cluster_share", "zipf_share", "exposure", "noise", "born", "coherence", "lifetime", "untimed"})


@dataclass(frozen=True, kw_only=True)
class SimulatedParams:
    """Properties of one simulated domain: a point in a `SimulatedPrior`, which describes each of them."""

    users: int
    items: int
    history: float
    latent_dim: int
    clusters: int
    cluster_share: float
    taste_strength: float
    popularity_std: float
    zipf_share: float
    activity_std: float
    exposure: float
    exposure_bias: float
    noise: float
    periods: int
    drift: float
    born: float
    decay: float
    coherence: float
    lifetime: float
    span_days: float
    has_timestamps: bool


def draw_params(prior: SimulatedPrior, rng: np.random.Generator) -> SimulatedParams:
    """Draw the properties of one domain from the prior.

    Args:
        prior: the ranges.
        rng: generator.
    """
    values: dict[str, float | int] = {}
    for field in dataclasses.fields(prior):
        if field.name == "untimed":
            continue
        low, high = getattr(prior, field.name)
        if field.name in _LOG_UNIFORM:
            value = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        elif field.name in _WHOLE:
            value = float(rng.integers(int(low), int(high), endpoint=True))
        else:
            value = float(rng.uniform(low, high))
        values[field.name] = round(value) if field.name in _WHOLE else value
    return SimulatedParams(**values, has_timestamps=bool(rng.random() >= prior.untimed))  # type: ignore[arg-type]
