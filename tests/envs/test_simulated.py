"""Simulated domains: repeatable, valid, and as wide as the prior says."""

from __future__ import annotations

import dataclasses
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from envs.domains import make_domain
from envs.evaluation_sets import evaluation_set
from envs.metrics import popularity_baseline, ranking_metrics, top_k
from envs.simulated import (
    SimulatedParams,
    SimulatedPrior,
    Simulation,
    draw_params,
    generate,
    simulate,
    simulate_domain,
)
from envs.simulated.calendar import schedule
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions

SMALL = SimulatedPrior(users=(150, 300), items=(100, 250))


PLAIN = SimulatedParams(
    users=400,
    items=200,
    history=15.0,
    latent_dim=4,
    clusters=6,
    cluster_share=0.8,
    hierarchy=0.0,
    taste_strength=3.0,
    popularity_std=0.5,
    zipf_share=0.5,
    born=0.0,
    cold_items=0.0,
    rise=0.0,
    decay=0.0,
    season=0.0,
    activity_std=0.6,
    min_history=0,
    lifetime=1.0,
    lifetime_std=0.0,
    growth=0.0,
    cold_users=0.0,
    exposure=1.0,
    exposure_bias=0.5,
    shown_per_click=3.0,
    session_length=1.0,
    pause_seconds=60.0,
    coherence=0.0,
    repeats=0.0,
    noise=0.0,
    core=1,
    flips=0.0,
    periods=2,
    drift=0.0,
    shift=0.0,
    span_days=100.0,
    daily_season=0.0,
    weekly_season=0.0,
    rating_position=0.6,
    rating_spread=1.0,
    rating_user_share=0.2,
    rating_item_share=0.2,
    rating_noise=0.3,
    unrated=0.0,
    content_dim=0,
    content_share=0.0,
    has_timestamps=True,
    feedback="implicit",
)


def simulation(seed: int = 0, **changes) -> Simulation:
    return generate(dataclasses.replace(PLAIN, **changes), rng=np.random.default_rng(seed))


def generated(seed: int = 0, **changes) -> Interactions:
    return simulation(seed, **changes).interactions


def timestamps(log: Interactions) -> np.ndarray:
    assert log.timestamp is not None
    return log.timestamp


def item_similarity_ndcg(log: Interactions) -> tuple[float, float]:
    """NDCG@10 of a ridge regression of each item on the others, and of popularity, on the test split."""
    domain = make_domain(log, name="simulated", split="leave-last-out")
    taken = np.zeros((domain.num_users, domain.num_items))
    taken[domain.train.user, domain.train.item] = 1.0
    precision = np.linalg.inv(taken.T @ taken + 30.0 * np.eye(domain.num_items))
    weights = precision / -np.diag(precision)
    np.fill_diagonal(weights, 0.0)
    case = evaluation_set(domain, "test")
    lists = top_k(lambda users: taken[users] @ weights, case, domain.num_items)
    return ranking_metrics(lists, case.targets).mean_ndcg, popularity_baseline(domain).mean_ndcg


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=25)
def test_every_draw_is_valid(seed: int) -> None:
    log = simulate(SMALL, seed=seed)
    assert log.num_users <= 300 and log.num_items <= 250
    assert set(log.user.tolist()) == set(range(log.num_users)) and set(log.item.tolist()) == set(range(log.num_items))
    if log.timestamp is not None:
        assert (np.diff(log.timestamp) >= 0).all()


def test_the_same_seed_gives_the_same_domain() -> None:
    first, again, other = (simulate(SMALL, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.user, again.user)
    np.testing.assert_array_equal(first.item, again.item)
    assert len(first) != len(other) or (first.item != other.item).any()


def test_most_draws_of_the_default_prior_can_be_split() -> None:
    prior = dataclasses.replace(SimulatedPrior(), users=(150, 600), items=(100, 600))
    kinds = [simulate_domain(prior, seed=seed).split for seed in range(20)]
    assert set(kinds) == {"time", "leave-last-out"}


def test_popularity_is_near_optimal_in_some_domains_and_much_beaten_in_others() -> None:
    weak, popular = item_similarity_ndcg(generated(taste_strength=0.3, popularity_std=1.5))
    assert weak < 1.1 * popular
    strong, popular = item_similarity_ndcg(generated(taste_strength=6.0, popularity_std=0.2))
    assert strong > 2.0 * popular


def test_histories_and_popularity_follow_their_laws() -> None:
    calm, skewed = generated(activity_std=0.2), generated(activity_std=1.2)
    assert len(calm) / calm.num_users == pytest.approx(15.0, rel=0.1)
    spread = [np.std(np.log(np.bincount(log.user))) for log in (calm, skewed)]
    assert spread[0] == pytest.approx(0.2, abs=0.05) and spread[1] > 0.7
    top = [
        np.sort(np.bincount(generated(popularity_std=std, taste_strength=1.0).item))[-20:].sum() for std in (0.1, 1.5)
    ]
    assert top[1] > 2 * top[0]


def test_noise_and_exposure_change_what_is_taken() -> None:
    clean, noisy = (item_similarity_ndcg(generated(noise=noise))[0] for noise in (0.0, 0.6))
    assert clean > 1.3 * noisy
    # Weak popularity, so every item has the same chance to be seen: a user cannot take much more than was exposed.
    narrow = generated(exposure=0.3, exposure_bias=0.0, history=1000.0)
    assert np.bincount(narrow.user).max() <= 0.8 * 0.3 * 200


def test_items_are_taken_after_their_birth_only() -> None:
    log = generated(born=0.9, periods=1, lifetime=0.4, noise=0.3)
    first = np.full(log.num_items, np.inf)
    np.minimum.at(first, log.item, timestamps(log))
    share = (first - timestamps(log).min()) / np.ptp(timestamps(log))
    assert np.mean(share > 0.3) > 0.25  # births are uniform over the span
    assert np.mean(timestamps(generated(born=0.0))[:100]) < np.mean(timestamps(log))


def test_taste_turns_over_a_lifetime() -> None:
    overlap = []
    for drift in (0.0, np.pi / 2):
        log = generated(drift=drift, history=20.0, taste_strength=5.0, clusters=8, cluster_share=0.95, users=300)
        middle = np.median(timestamps(log))
        early, late = (np.zeros((log.num_users, log.num_items)) for _ in range(2))
        for half, rows in ((early, timestamps(log) < middle), (late, timestamps(log) >= middle)):
            half[log.user[rows], log.item[rows]] = 1.0
        similarity = early.T @ early
        overlap.append((early @ similarity * late).sum() / (early @ similarity).sum())
    assert overlap[0] > 1.5 * overlap[1]


def test_coherent_users_take_items_of_a_cluster_together() -> None:
    # One user of 600 takes items of three clusters in turn; in random order two in a row agree in a third.
    agree = []
    cluster = np.arange(600) % 3
    for coherence in (0.0, 1.0):
        chosen = dataclasses.replace(PLAIN, coherence=coherence, clusters=3)
        rng = np.random.default_rng(0)
        times = schedule(np.zeros(600, int), cluster, np.zeros(600), np.ones(600), chosen, rng)
        agree.append(np.mean(np.diff(cluster[np.argsort(times)]) == 0))
    assert agree[0] == pytest.approx(1 / 3, abs=0.07)
    assert agree[1] == pytest.approx(597 / 599)  # 599 steps, two of them to another cluster


def test_untimed_domains_keep_the_order_of_rows() -> None:
    timed, untimed = generated(), generated(has_timestamps=False)
    assert untimed.timestamp is None
    np.testing.assert_array_equal(timed.item, untimed.item)


def test_draws_stay_in_the_prior() -> None:
    prior = SimulatedPrior(untimed=1.0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw_params(prior, rng)
        assert not drawn.has_timestamps
        for field in dataclasses.fields(prior):
            points = getattr(prior, field.name)
            if isinstance(points, tuple):
                value = getattr(drawn, field.name)
                absent = field.name in ("unrated", "repeats", "shift", "content_dim") and value == 0
                assert absent or points[0] - 1e-9 <= value <= points[-1] + 1e-9, field.name


@pytest.mark.parametrize(
    "changes",
    [
        {"users": (500, 100)},
        {"items": (2, 100)},
        {"noise": (0.0, 1.5)},
        {"taste_strength": (0.0, 1.0)},
        {"untimed": 2.0},
        {"decay": (0.0, 9.0, 8.0)},
        {"explicit": 0.7, "click": 0.6},
    ],
)
def test_impossible_ranges_are_named(changes: dict) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{next(iter(changes))}`"):
        SimulatedPrior(**changes)


def test_a_thousand_by_a_thousand_is_fast() -> None:
    prior = SimulatedPrior(users=(1000, 1000), items=(1000, 1000), history=(30.0, 30.0), periods=(2, 2))
    durations = []
    for seed in range(3):
        start = time.perf_counter()
        simulate(prior, seed=seed)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 1.0  # 0.1 s on a free core; the bound only catches another order of cost


def test_a_mode_draws_values_towards_it() -> None:
    rng = np.random.default_rng(0)
    prior = SimulatedPrior(noise=(0.0, 0.0, 0.3), decay=(0.0, 0.3))
    drawn = [draw_params(prior, rng) for _ in range(400)]
    # A triangle that falls from 0 to 0.3 has its mean at a third of it, a uniform density in the middle.
    assert np.mean([each.noise for each in drawn]) == pytest.approx(0.1, abs=0.02)
    assert np.mean([each.decay for each in drawn]) == pytest.approx(0.15, abs=0.02)


def test_the_default_prior_is_split_into_what_meta_training_asks_for() -> None:
    drawn = [simulate_domain(SMALL, seed=seed) for seed in range(24)]
    assert any(domain.exposures is not None for domain in drawn)
    assert any(domain.item_content is not None for domain in drawn)
    assert any(domain.train.rating is not None for domain in drawn)
    again = simulate_domain(SMALL, seed=0)
    np.testing.assert_array_equal(again.train.item, drawn[0].train.item)
    with pytest.raises(InvalidArgumentError, match="timestamps"):
        simulate_domain(dataclasses.replace(SMALL, untimed=1.0), seed=0, split="time")
