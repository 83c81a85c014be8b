"""What simulated domains can be like: ranges, and one draw from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metalearn.errors import InvalidArgumentError

Range = tuple[float, float] | tuple[float, float, float]
Feedback = Literal["implicit", "explicit", "click"]

_LOG_UNIFORM = frozenset(
    {"users", "items", "history", "latent_dim", "clusters", "taste_strength", "lifetime", "exposure"}
    | {"shown_per_click", "session_length", "pause_seconds", "span_days", "content_dim"}
)
_WHOLE = frozenset({"users", "items", "clusters", "latent_dim", "min_history", "core", "periods", "content_dim"})
_SHARES = frozenset(
    {"cluster_share", "hierarchy", "zipf_share", "born", "cold_items", "cold_users", "lifetime", "exposure", "repeats"}
    | {
        "coherence",
        "noise",
        "flips",
        "rating_position",
        "rating_user_share",
        "rating_item_share",
        "rating_noise",
        "unrated",
    }
    | {"content_share"}
)
_CHANCES = frozenset({"untimed", "explicit", "click", "skipping", "repeating", "shifting", "described"})
_LEAST = {"users": 32, "items": 32, "history": 2, "latent_dim": 1, "clusters": 1, "periods": 1, "content_dim": 1}
_LEAST |= {"core": 1, "session_length": 1, "growth": -10.0}
_MOST = dict.fromkeys(_SHARES | _CHANCES, 1.0) | {"repeats": 0.95}


@dataclass(frozen=True, kw_only=True)
class SimulatedPrior:
    """Ranges that the properties of a simulated domain are drawn from, each on its own.

    A range (low, high) is drawn from uniformly, (low, mode, high) with a triangular density that peaks at the mode;
    sizes, history, lifetime, taste strength and durations on the logarithm. The last seven arguments are plain numbers
    in [0, 1]: shares of domains that have a property at all.

    The ranges were set so that simulated meta-features surround those of crops and slices of 25 public domains with
    the role "meta-training" (`scripts/simulator_coverage.py`): of wide ranges, those of the simulated domains nearest
    to a real view were kept, and the modes moved to where two samples could be told apart least.

    =============================================  ==================================================================
    range                                          calibrated against
    =============================================  ==================================================================
    history, min_history, activity_std             log_density, log_interactions_per_user and _item, user_gini,
                                                   user_log_variation, user_log_median_to_mean, user_log_count_skewness
    popularity_std, zipf_share, exposure_bias,     item_gini, item_entropy, item_tail_index, item_log_count_skewness,
    core                                           item_singleton_share, landmark_log_popularity
    taste_strength, clusters, cluster_share,       landmark_log_gain, spectral_gap, spectral_effective_rank,
    latent_dim, noise                              spectral_energy_8 and _32, item_cosine, user_cosine
    born, cold_items, rise, decay, drift, shift    drift_distance, drift_excess, drift_rank_correlation,
                                                   late_item_share, item_age, cold_item_rate
    lifetime, lifetime_std, growth, cold_users     cold_user_rate, short_lifetime_share, activity_trend
    session_length, pause_seconds, span_days       log_user_gap, temporal_burstiness
    daily_season, weekly_season                    daily_season, weekly_season
    repeats                                        repeat_share, repeated_pair_share, log_repeats_per_repeated_pair
    rating_*, unrated                              rating_position, _spread, _entropy, _share_at_maximum,
                                                   _user_variance and _item_variance, rated_share
    =============================================  ==================================================================

    No meta-feature sees hierarchy, season, coherence, exposure, shown_per_click, flips, periods and content: their
    ranges are wide guesses. Six of the 25 domains have real times and eight have ratings: those ranges rest on little.

    Args:
        users: number of users.
        items: number of items.
        history: mean number of interactions of a user; capped at 40 % of the items a user gets to see.
        latent_dim: dimensions of taste.
        clusters: number of taste clusters, for users and items alike.
        cluster_share: share of the variance of a factor that its cluster explains, in [0, 1].
        hierarchy: share of the variance of a cluster's centre that its parent explains, in [0, 1]; clusters hang under
            about the square root of their number of parents.
        taste_strength: standard deviation of the taste part of a user's log-preferences; far below `popularity_std`
            popularity is close to optimal, far above it is much beaten.
        popularity_std: standard deviation of the popularity part of the log-preferences.
        zipf_share: 0 is a log-normal popularity law, 1 a power law, between is a blend.
        born: share of items that appear only after the start, at uniform times.
        cold_items: share of items that appear in the last tenth of the span.
        rise: by how much the log-preference of an item lies lower at its birth; made up within a tenth of the span.
        decay: by how much the log-preference of an item falls over the time span, from its birth.
        season: amplitude of a yearly wave in log-preferences, with a phase of its own for each cluster of items.
        activity_std: standard deviation of the log-number of interactions of a user, beyond `min_history`.
        min_history: number of interactions that every user has at least.
        lifetime: median share of the time span in which a user is active, in (0, 1].
        lifetime_std: standard deviation of the log-lifetime.
        growth: users arrive at start ~ uniform^exp(-growth); 0 is evenly, above is late, below is early.
        cold_users: share of users who arrive in the last tenth of the span, with the least history.
        exposure: share of the catalogue that a user ever gets to see.
        exposure_bias: exponent of popularity in the chance to be seen; 0 is none.
        shown_per_click: items shown and not taken for each one taken, where feedback is clicks.
        session_length: mean number of interactions of a session.
        pause_seconds: mean time between interactions of a session.
        coherence: how strongly items of one cluster follow each other within a stage, in [0, 1].
        repeats: share of interactions that repeat an earlier pair, where there is repeat consumption.
        noise: share of interactions with uniformly random items, in [0, 1].
        core: number of interactions that items need, and users need 3 of, to stay in the log, as in data that is
            published; not applied where it would take more than half of the log.
        flips: share of labels recorded wrongly: clicks that count as not taken, ratings r recorded as 6 - r.
        periods: stages of a user's lifetime at which taste and catalogue change.
        drift: angle in radians by which taste turns over a user's lifetime.
        shift: angle by which taste and popularity turn at once, at one time for all, where drift is abrupt.
        span_days: length of the log in days.
        daily_season: concentration of activity around one time of day, 0 is none (von Mises).
        weekly_season: concentration of activity around one time of the week.
        rating_position: mean rating as a share of the scale.
        rating_spread: standard deviation of ratings before they are rounded and clipped, in stars.
        rating_user_share: share of the variance of ratings that is the user's generosity.
        rating_item_share: share of the variance of ratings that is the item's quality.
        rating_noise: share of the rest that is noise; what is left is taste.
        unrated: share of interactions without a rating, where some lack one.
        content_dim: length of an item's content vector.
        content_share: share of the variance of content that taste explains; 0 is unrelated, 1 a linear image.
        untimed: share of domains without timestamps.
        explicit: share of domains with ratings.
        click: share of domains that record what was shown and not taken.
        skipping: share of rated domains where some interactions lack a rating.
        repeating: share of domains with repeat consumption.
        shifting: share of domains with an abrupt drift.
        described: share of domains with item content.

    Raises:
        InvalidArgumentError: if a range is reversed or lies outside what its property allows.

    Example:
        >>> SimulatedPrior(users=(200, 400)).users
        (200, 400)
    """

    users: Range = (150, 3000)
    items: Range = (100, 3000)
    history: Range = (3.0, 5.0, 200.0)
    latent_dim: Range = (2, 24)
    clusters: Range = (3, 80)
    cluster_share: Range = (0.1, 0.98)
    hierarchy: Range = (0.0, 0.9)
    taste_strength: Range = (0.5, 8.0, 40.0)
    popularity_std: Range = (0.05, 0.3, 1.8)
    zipf_share: Range = (0.0, 1.0)
    born: Range = (0.0, 0.3, 0.9)
    cold_items: Range = (0.0, 0.15)
    rise: Range = (0.0, 4.0)
    decay: Range = (0.0, 1.0, 8.0)
    season: Range = (0.0, 1.5)
    activity_std: Range = (0.2, 1.0, 2.2)
    min_history: Range = (0, 6)
    lifetime: Range = (0.001, 0.4, 1.0)
    lifetime_std: Range = (0.0, 1.5, 3.0)
    growth: Range = (-2.0, 0.0, 1.0)
    cold_users: Range = (0.0, 0.15)
    exposure: Range = (0.25, 1.0)
    exposure_bias: Range = (0.0, 1.0)
    shown_per_click: Range = (1.0, 8.0)
    session_length: Range = (1.0, 20.0)
    pause_seconds: Range = (0.1, 600.0)
    coherence: Range = (0.0, 0.9)
    repeats: Range = (0.02, 0.9)
    noise: Range = (0.0, 0.05, 0.35)
    core: Range = (1, 5)
    flips: Range = (0.0, 0.1)
    periods: Range = (1, 4)
    drift: Range = (0.0, 0.8)
    shift: Range = (0.4, 1.57)
    span_days: Range = (7.0, 6000.0)
    daily_season: Range = (0.0, 0.7, 1.3)
    weekly_season: Range = (0.0, 0.5)
    rating_position: Range = (0.0, 0.7, 1.0)
    rating_spread: Range = (0.5, 1.6)
    rating_user_share: Range = (0.05, 0.4)
    rating_item_share: Range = (0.05, 0.35)
    rating_noise: Range = (0.1, 0.4, 0.9)
    unrated: Range = (0.01, 0.8)
    content_dim: Range = (8, 64)
    content_share: Range = (0.0, 1.0)
    untimed: float = 0.5
    explicit: float = 0.3
    click: float = 0.2
    skipping: float = 0.2
    repeating: float = 0.2
    shifting: float = 0.2
    described: float = 0.5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            points = [value] if field.name in _CHANCES else list(value)
            floor = _LEAST.get(field.name, 1e-6 if field.name in _LOG_UNIFORM else 0.0)
            ceiling = _MOST.get(field.name, np.inf)
            if not (floor <= points[0] and points == sorted(points) and points[-1] <= ceiling and len(points) <= 3):
                allowed = "a number" if field.name in _CHANCES else "a range (low, high) or (low, mode, high)"
                raise InvalidArgumentError(
                    f"`{field.name}` must be {allowed} within [{floor}, {ceiling}], in ascending order, got {value}"
                )
        if self.explicit + self.click > 1.0:
            raise InvalidArgumentError(
                f"`explicit` + `click` must be at most 1, the rest is implicit, got {self.explicit + self.click}"
            )


@dataclass(frozen=True, kw_only=True)
class SimulatedParams:
    """Properties of one simulated domain: a point in a `SimulatedPrior`, which describes each of them.

    `unrated`, `repeats`, `shift` and `content_dim` are 0 in a domain that lacks what they measure.
    """

    users: int
    items: int
    history: float
    latent_dim: int
    clusters: int
    cluster_share: float
    hierarchy: float
    taste_strength: float
    popularity_std: float
    zipf_share: float
    born: float
    cold_items: float
    rise: float
    decay: float
    season: float
    activity_std: float
    min_history: int
    lifetime: float
    lifetime_std: float
    growth: float
    cold_users: float
    exposure: float
    exposure_bias: float
    shown_per_click: float
    session_length: float
    pause_seconds: float
    coherence: float
    repeats: float
    noise: float
    core: int
    flips: float
    periods: int
    drift: float
    shift: float
    span_days: float
    daily_season: float
    weekly_season: float
    rating_position: float
    rating_spread: float
    rating_user_share: float
    rating_item_share: float
    rating_noise: float
    unrated: float
    content_dim: int
    content_share: float
    has_timestamps: bool
    feedback: Feedback


def draw_params(prior: SimulatedPrior, rng: np.random.Generator) -> SimulatedParams:
    """Draw the properties of one domain from the prior.

    Args:
        prior: the ranges.
        rng: generator.
    """
    values: dict[str, float | int] = {}
    for field in dataclasses.fields(prior):
        if field.name in _CHANCES:
            continue
        points = getattr(prior, field.name)
        if field.name in _LOG_UNIFORM:
            value = float(np.exp(_draw(np.log(points), rng)))
        elif field.name in _WHOLE and len(points) == 2:
            value = float(rng.integers(int(points[0]), int(points[1]), endpoint=True))
        else:
            value = _draw(points, rng)
        values[field.name] = round(value) if field.name in _WHOLE else value
    for name, chance in (
        ("unrated", prior.skipping),
        ("repeats", prior.repeating),
        ("shift", prior.shifting),
        ("content_dim", prior.described),
    ):
        if rng.random() >= chance:
            values[name] = 0
    kind = rng.random()
    feedback = "explicit" if kind < prior.explicit else "click" if kind < prior.explicit + prior.click else "implicit"
    timed = bool(rng.random() >= prior.untimed)
    return SimulatedParams(**values, has_timestamps=timed, feedback=feedback)  # type: ignore[arg-type]


def _draw(points: Range | np.ndarray, rng: np.random.Generator) -> float:
    """Draw from (low, high) uniformly, from (low, mode, high) with a triangular density."""
    low, high = float(points[0]), float(points[-1])
    if len(points) == 2 or low == high:
        return float(rng.uniform(low, high))
    return float(rng.triangular(low, float(points[1]), high))
