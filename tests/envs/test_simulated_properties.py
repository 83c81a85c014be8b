"""Simulated domains: each property leaves the trace that it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from envs.simulated import Simulation, generate
from envs.simulated.calendar import START, draw_times, repeat_rows
from envs.simulated.feedback import draw_ratings
from envs.simulated.taste import draw_content, draw_tastes
from metalearn import profile_domain
from metalearn.interactions import Interactions
from tests.envs.test_simulated import PLAIN


def simulation(seed: int = 0, **changes) -> Simulation:
    return generate(dataclasses.replace(PLAIN, **changes), rng=np.random.default_rng(seed))


def feature(name: str, **changes) -> float:
    """Returns a meta-feature of a simulation."""
    value = profile_domain(simulation(**changes).interactions)[name]
    assert value is not None
    return value


def timestamps(log: Interactions) -> np.ndarray:
    assert log.timestamp is not None
    return log.timestamp


def share_of_span(log: Interactions) -> np.ndarray:
    return (timestamps(log) - START) / (86_400.0 * PLAIN.span_days)


def test_clicks_come_with_what_was_shown_and_not_taken() -> None:
    drawn = simulation(feedback="click", shown_per_click=3.0, exposure=0.5)
    log, shown = drawn.interactions, drawn.exposures
    assert shown is not None and (shown.num_users, shown.num_items) == (log.num_users, log.num_items)
    taken = set(zip(log.user.tolist(), log.item.tolist(), strict=True))
    pairs = list(zip(shown.user.tolist(), shown.item.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and not taken & set(pairs)
    # Three a click, less the repeated ones.
    assert 1.5 < len(shown) / len(log) <= 3.2
    assert (np.diff(timestamps(shown)) >= 0).all()
    assert simulation().exposures is None


def test_what_is_shown_follows_popularity_as_far_as_exposure_is_biased() -> None:
    correlation = []
    for bias in (0.0, 1.0):
        drawn = simulation(
            feedback="click", exposure=0.3, exposure_bias=bias, popularity_std=1.0, taste_strength=1.0, users=800
        )
        assert drawn.exposures is not None
        counts = [np.bincount(table.item, minlength=table.num_items) for table in (drawn.interactions, drawn.exposures)]
        correlation.append(np.corrcoef(np.log1p(counts))[0, 1])
    assert correlation[1] > correlation[0] + 0.3


def test_flipped_clicks_become_exposures() -> None:
    clean, flipped = (simulation(feedback="click", flips=flips).interactions for flips in (0.0, 0.4))
    assert len(flipped) / len(clean) == pytest.approx(0.6, abs=0.03)
    assert len(simulation(feedback="implicit", flips=0.4).interactions) == len(simulation().interactions)


def test_ratings_are_what_the_formula_says() -> None:
    # No spread, no flips: 1 + 4 * 0.6 = 3.4 rounds to 3 for everyone; flipped it is 6 - 3 = 3, with position 1 it is 1.
    rows = np.arange(100) % 50
    flat = dataclasses.replace(PLAIN, rating_spread=0.0)
    rng = np.random.default_rng(0)
    assert set(draw_ratings(rows, rows, rng.random(100), flat, rng).tolist()) == {3.0}
    upside_down = dataclasses.replace(flat, rating_position=1.0, flips=1.0)
    assert set(draw_ratings(rows, rows, rng.random(100), upside_down, rng).tolist()) == {1.0}
    drawn = simulation(feedback="explicit", unrated=0.3).interactions.rating
    assert drawn is not None and np.isnan(drawn).mean() == pytest.approx(0.3, abs=0.03)
    assert set(drawn[np.isfinite(drawn)].tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_ratings_follow_taste_unless_they_are_noise() -> None:
    rng = np.random.default_rng(0)
    rows, taste = rng.integers(0, 200, 5000), rng.standard_normal(5000)
    only = dataclasses.replace(PLAIN, rating_user_share=0.0, rating_item_share=0.0)
    loyal, random = (
        np.corrcoef(taste, draw_ratings(rows, rows, taste, dataclasses.replace(only, rating_noise=noise), rng))[0, 1]
        for noise in (0.0, 1.0)
    )
    assert loyal > 0.9 and abs(random) < 0.1


def test_repeats_make_up_their_share() -> None:
    shares = [feature("repeat_share", repeats=repeats, history=40.0) for repeats in (0.0, 0.3, 0.7)]
    assert shares == pytest.approx([0.0, 0.3, 0.7], abs=0.05)
    often = dataclasses.replace(PLAIN, repeats=0.9)
    rows, times = repeat_rows(np.arange(3), np.full(3, 0.5), np.full(3, 0.2), often, np.random.default_rng(1))
    assert rows[:3].tolist() == [0, 1, 2] and len(rows) > 3
    assert (times[:3] == 0.2).all() and ((times >= 0.2) & (times <= 0.5)).all()


def test_an_abrupt_drift_changes_tastes_and_popularity_at_its_time() -> None:
    excess = []
    for shift in (0.0, np.pi / 2):
        drawn = simulation(shift=shift, popularity_std=1.5, taste_strength=1.0, users=800)
        log = drawn.interactions
        if shift == 0.0:
            assert np.isnan(drawn.drift_time)
            when = np.median(timestamps(log))
        else:
            when = drawn.drift_time
            assert 0.3 <= (when - START) / (86_400.0 * 100.0) <= 0.8
        early = timestamps(log) < when
        counts = [np.bincount(log.item[rows], minlength=log.num_items) for rows in (early, ~early)]
        excess.append(np.corrcoef(np.log1p(counts))[0, 1])
    assert excess[0] > 0.8 and excess[1] < 0.3


def test_births_decay_and_cold_items() -> None:
    assert feature("late_item_share", born=0.6, lifetime=0.05) > 0.05
    assert feature("late_item_share", born=0.0, lifetime=0.05) < 0.01
    steady, fading = (feature("item_age", born=0.6, decay=decay, lifetime=0.05) for decay in (0.0, 6.0))
    assert fading < 0.7 * steady
    # An item that needs time to rise is taken later after its birth.
    slow, quick = (feature("item_age", born=0.9, rise=rise, lifetime=0.05) for rise in (6.0, 0.0))
    assert slow > quick
    cold = simulation(cold_items=0.3, lifetime=0.02).interactions
    first = np.full(cold.num_items, np.inf)
    np.minimum.at(first, cold.item, share_of_span(cold))
    assert np.mean(first >= 0.9) == pytest.approx(0.3, abs=0.1)


def test_cold_users_come_last_with_little() -> None:
    log = simulation(cold_users=0.4).interactions
    first = np.full(log.num_users, np.inf)
    np.minimum.at(first, log.user, share_of_span(log))
    cold = first >= 0.9
    assert cold.mean() == pytest.approx(0.4, abs=0.1)
    counts = np.bincount(log.user)
    assert counts[cold].max() <= 3 < np.median(counts[~cold])


def test_lifetimes_and_growth() -> None:
    short, long = (feature("short_lifetime_share", lifetime=life) for life in (0.01, 0.5))
    assert short > 0.95 and long < 0.05
    late, early = (feature("activity_trend", lifetime=0.01, growth=growth) for growth in (1.0, -1.0))
    assert late > 0.3 and early < -0.3


def test_sessions_put_interactions_next_to_each_other() -> None:
    gaps = []
    for length in (1.0, 10.0):
        log = simulation(session_length=length, periods=1).interactions
        order = np.lexsort((timestamps(log), log.user))
        step = np.diff(timestamps(log)[order])[np.diff(log.user[order]) == 0]
        gaps.append(np.mean(step < 3600.0))
    assert gaps[0] < 0.1 and gaps[1] > 0.6


def test_seasons_follow_the_day_the_week_and_the_year() -> None:
    params = dataclasses.replace(PLAIN, daily_season=1.0, weekly_season=0.0, span_days=70.0)
    rng = np.random.default_rng(0)
    times = draw_times(np.zeros(20_000), np.ones(20_000), params, rng)
    # The mean vector of a von Mises density of concentration 1 has length I1(1) / I0(1) = 0.5652 / 1.2661 = 0.446.
    assert np.abs(np.exp(2j * np.pi * 70.0 * times).mean()) == pytest.approx(0.446, abs=0.02)
    assert np.abs(np.exp(2j * np.pi * 10.0 * times).mean()) < 0.03
    assert ((times >= 0.0) & (times <= 1.0)).all()
    assert feature("daily_season", daily_season=1.0) > 0.3 and feature("weekly_season", weekly_season=0.6) > 0.15
    # Taste of the season: winter and summer take different clusters; the same half of the year takes alike.
    similarity = []
    for season in (0.0, 3.0):
        log = simulation(season=season, span_days=730.5, lifetime=0.02, users=1200).interactions
        quarter = ((timestamps(log) - START) / (86_400.0 * 365.25) * 4 % 4).astype(int)
        counts = [np.bincount(log.item[quarter == which], minlength=log.num_items) for which in (0, 2)]
        similarity.append(np.corrcoef(np.log1p(counts))[0, 1])
    assert similarity[1] < similarity[0] - 0.3


def test_content_shows_taste_to_the_chosen_degree() -> None:
    rng = np.random.default_rng(0)
    params = dataclasses.replace(PLAIN, items=2000, content_dim=6)
    item = draw_tastes(params, rng).item
    explained = []
    for share in (0.0, 0.5, 1.0):
        content = draw_content(item, dataclasses.replace(params, content_share=share), rng)
        assert content is not None and content.dtype == np.float32 and content.shape == (2000, 6)
        design = np.c_[item, np.ones(2000)]
        residual = content - design @ np.linalg.lstsq(design, content, rcond=None)[0]
        explained.append(1.0 - residual.var() / content.var())
    assert explained == pytest.approx([0.0, 0.5, 1.0], abs=0.05)
    assert draw_content(item, PLAIN, rng) is None
    drawn = simulation(content_dim=6, content_share=1.0)
    assert drawn.item_content is not None and len(drawn.item_content) == drawn.interactions.num_items


def test_tastes_have_unit_variance_and_clusters_have_parents() -> None:
    nearest = []
    for hierarchy in (0.0, 0.95):
        params = dataclasses.replace(
            PLAIN, users=2000, items=2000, latent_dim=16, clusters=49, cluster_share=1.0, hierarchy=hierarchy
        )
        tastes = draw_tastes(params, np.random.default_rng(0))
        if hierarchy == 0.0:
            assert np.std(tastes.user @ tastes.item.T) == pytest.approx(1.0, abs=0.3)
        centres = np.unique(tastes.item, axis=0)
        distance = np.linalg.norm(centres[:, None] - centres, axis=2) + 1e9 * np.eye(len(centres))
        nearest.append(np.median(distance.min(axis=1)) / np.median(distance))
    assert nearest[1] < 0.5 * nearest[0]


def test_pruning_leaves_a_core() -> None:
    log = simulation(core=5, history=6.0).interactions
    assert np.bincount(log.item).min() >= 5 and np.bincount(log.user).min() >= 3
    assert np.bincount(simulation(core=1, history=6.0).interactions.item).min() < 5


def test_sizes_beyond_one_chunk_stay_valid() -> None:
    log = simulation(users=9000, items=300, feedback="click").interactions
    assert log.num_users > 8900 and set(np.unique(log.user)) == set(range(log.num_users))
