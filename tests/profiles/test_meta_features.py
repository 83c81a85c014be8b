"""Every meta-feature against a value worked by hand or an independent implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.interactions import Interactions
from metalearn.profiles.canonical import CanonicalTable, canonical_table
from metalearn.profiles.meta_features import co_occurrence, distribution, landmark, ratings, repeats, size, temporal
from metalearn.profiles.totals import DomainTotals, season_histogram, table_totals


def make_table(user, item, **columns) -> CanonicalTable:
    return canonical_table(Interactions.from_arrays(user, item, **columns))


def make_totals(user, item, **columns) -> DomainTotals:
    return table_totals(make_table(user, item, **columns), seed=0)


def temporal_features(user, item, **columns) -> dict[str, float]:
    table = make_table(user, item, **columns)
    return temporal.temporal_features(table_totals(table, seed=0)) | temporal.pace_features(table)


def check(features: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert features[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


counts = hnp.arrays(np.int64, st.integers(2, 40), elements=st.integers(1, 50))


class TestSize:
    def test_by_hand(self):
        # 3 users, 2 items, 4 interactions.
        features = size.size_features(make_totals([1, 1, 2, 3], [1, 2, 1, 1]))
        expected = (3, 2, 4, 4 / 6, 3 / 2, 4 / 3, 4 / 2)
        check(features, dict(zip(size.NAMES, map(math.log, expected), strict=True)))


class TestDistribution:
    def test_by_hand(self):
        # Items a, b, c, d with 1, 1, 2, 4 interactions of users of whom each has one: 8 users.
        features = distribution.distribution_features(make_totals(range(8), list("abccdddd")))
        expected = {
            # Gini: n = 4, sum 8, sum of i x_i = 1 + 2 + 3 * 2 + 4 * 4 = 25; 2 * 25 / (4 * 8) - 5 / 4 = 0.3125.
            "item_gini": 0.3125,
            # Shares 1/8, 1/8, 1/4, 1/2: 3/8 + 3/8 + 2/4 + 1/2 = 1.75 bits of log2(4) = 2.
            "item_entropy": 0.875,
            # The 3 least popular of 4 (80 %, rounded down) hold 1 + 1 + 2 of 8; the top item holds 4.
            "item_tail_share": 0.5,
            "item_head_share_1": 0.5,
            "item_head_share_10": 0.5,
            # Deviations from the mean 2: -1, -1, 0, 2; variance (1 + 1 + 0 + 4) / 4 = 1.5.
            "item_log_variation": math.log1p(math.sqrt(1.5) / 2),
            "item_log_median_to_mean": math.log(1.5 / 2),
            "item_singleton_share": 0.5,
            "item_tail_index": math.nan,
            # Users are all equal.
            "user_gini": 0.0,
            "user_entropy": 1.0,
            # floor(0.8 * 8) = 6 of 8 equal users.
            "user_tail_share": 0.75,
            "user_log_variation": 0.0,
            "user_log_count_skewness": math.nan,
            "user_singleton_share": 1.0,
        }
        check(features, expected)

    def test_hill_by_hand(self):
        # 20 counts: the top tenth is 4 and 8, the next is 2; (log 2 + log 4) / 2 = 1.5 log 2.
        ascending = np.array([1] * 17 + [2, 4, 8])
        assert distribution.hill_tail_index(ascending) == pytest.approx(1.5 * math.log(2))

    def test_hill_finds_the_exponent_of_a_power_law(self):
        # Quantiles of a Pareto law with exponent 2: the index is 1/2.
        ascending = np.sort((1 - (np.arange(20_000) + 0.5) / 20_000) ** -0.5)
        assert distribution.hill_tail_index(ascending) == pytest.approx(0.5, abs=0.01)

    @given(counts)
    def test_gini_agrees_with_mean_difference(self, x):
        expected = np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean())
        assert distribution.gini(np.sort(x)) == pytest.approx(expected, abs=1e-12)

    @given(counts)
    def test_entropy_agrees_with_scipy(self, x):
        expected = scipy.stats.entropy(x) / math.log(len(x))
        assert distribution.normalised_entropy(x) == pytest.approx(expected, abs=1e-12)

    @given(counts)
    def test_skewness_agrees_with_scipy(self, x):
        assume(len(set(x.tolist())) > 1)
        assert distribution.skewness(np.log(x)) == pytest.approx(scipy.stats.skew(np.log(x)), abs=1e-9)


# Users 0 and 1 have items 0 and 1, users 2 and 3 have items 2 and 3.
TWO_WORLDS = np.kron(np.eye(2), np.ones((2, 2)))


def random_block(num_users: int = 60, num_items: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    block = (rng.random((num_users, num_items)) < np.linspace(0.1, 0.6, num_items)).astype(float)
    block[:, 0] = block[:, 1] = 1.0
    return block


class TestCoOccurrence:
    def test_by_hand(self):
        # Every entry is 1 / sqrt(2 * 2), so each world has the singular values 1 and 0. Together: 1, 1, 0, 0.
        # Beyond the first, all energy is in one of 3: effective rank exp(0) / 3. Cosines: 2 of 6 pairs are equal.
        features = co_occurrence.co_occurrence_features(TWO_WORLDS)
        expected = (0.0, 1 / 3, 1.0, 1.0, 1.0, 1 / 3, 1 / 3)
        for name, value in zip(co_occurrence.NAMES, expected, strict=True):
            assert features[name] == pytest.approx(value, abs=1e-7), name

    def test_equal_users_have_nothing_beyond_popularity(self):
        features = co_occurrence.co_occurrence_features(np.ones((5, 6)))
        assert features["spectral_gap"] == pytest.approx(1.0, abs=1e-6)
        assert math.isnan(features["spectral_energy_1"]) and math.isnan(features["spectral_effective_rank"])
        assert features["item_cosine"] == pytest.approx(1.0)

    def test_small_blocks_are_undefined(self):
        assert all(map(math.isnan, co_occurrence.co_occurrence_features(np.ones((3, 9))).values()))

    @pytest.mark.parametrize("block", [random_block(), random_block().T])
    def test_spectrum_agrees_with_singular_values(self, block):
        normalised = block / np.sqrt(np.outer(block.sum(axis=1), block.sum(axis=0)))
        values = np.linalg.svd(normalised, compute_uv=False)
        energies = values[1:] ** 2 / (values[1:] ** 2).sum()
        rank = math.exp(scipy.stats.entropy(energies)) / len(energies)
        expected = (1 - values[1] / values[0], rank, energies[0], energies[:8].sum(), energies[:32].sum())
        assert co_occurrence.spectrum_features(block) == pytest.approx(expected)
        assert values[0] == pytest.approx(1.0)

    def test_mean_cosine_agrees_with_scipy(self):
        block = random_block()
        expected = 1 - scipy.spatial.distance.pdist(block, "cosine").mean()
        assert co_occurrence.mean_cosine(block) == pytest.approx(expected)

    def test_block_holds_popular_items_and_users_with_two_of_them(self):
        # Items by popularity: 20 (3), 10 and 30 (2 each). User 3 has one item, and 20 twice counts once.
        table = make_table([0, 0, 1, 1, 1, 2, 2, 3], [10, 20, 20, 20, 30, 10, 30, 20])
        expected = [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
        assert co_occurrence.dense_block(table, seed=0).tolist() == expected

    def test_block_is_bounded_and_seeded(self):
        rng = np.random.default_rng(0)
        table = make_table(rng.integers(0, 3000, 20_000), rng.integers(0, 500, 20_000))
        blocks = [co_occurrence.dense_block(table, seed=seed) for seed in (0, 0, 1)]
        assert blocks[0].shape == (co_occurrence.BLOCK_USERS, co_occurrence.BLOCK_ITEMS)
        assert (blocks[0] == blocks[1]).all() and not (blocks[0] == blocks[2]).all()
        assert blocks[0].sum(axis=1).min() >= 2


class TestLandmark:
    def test_ndcg_by_hand(self):
        scores = np.array([[9.0, 5.0, 7.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
        seen = np.array([[True, False, False, False], [False, False, False, True]])
        # First user: item 0 is seen, so item 1 has rank 2. Second: three ties share the mean rank 2. 1 / log2(3) each.
        assert landmark.ndcg(scores, np.array([1, 0]), seen) == pytest.approx(1 / math.log2(3))

    def test_ranks_beyond_ten_count_nothing(self):
        scores = np.arange(11.0)[None]
        seen = np.zeros((1, 11), dtype=bool)
        assert landmark.ndcg(scores, np.array([0]), seen) == 0
        assert landmark.ndcg(scores, np.array([1]), seen) == pytest.approx(1 / math.log2(11))

    def test_graph_filter_agrees_with_its_formula(self):
        block = random_block()
        users, items = np.diag(block.sum(axis=1) ** -0.5), block.sum(axis=0)
        normalised = users @ block @ np.diag(items**-0.5)
        expected = block @ np.diag(items**-0.5) @ (normalised.T @ normalised) @ np.diag(items**0.5)
        np.testing.assert_allclose(landmark.graph_filter_scores(block, np.arange(60)), expected)

    def test_by_hand_on_separate_worlds(self):
        # 20 worlds of 10 users with all of 5 items. Hiding one leaves its world's item as the only unseen one with a
        # score: the filter ranks it first, NDCG 1. To popularity it is one of about 96 items: NDCG near 0.
        features = landmark.landmark_features(np.kron(np.eye(20), np.ones((10, 5))), seed=0)
        popular = math.exp(features["landmark_log_popularity"]) - 0.02
        assert 0 <= popular < 0.05
        assert features["landmark_log_gain"] == pytest.approx(math.log(1.02 / (popular + 0.02)))

    def test_few_users_are_undefined(self):
        assert all(map(math.isnan, landmark.landmark_features(np.ones((7, 9)), seed=0).values()))


class TestRepeats:
    def test_by_hand(self):
        # Pairs: (1, a) three times, (1, b) once, (2, a) twice, (2, b) once: 7 rows, 4 pairs, 2 of them repeated.
        features = repeats.repeat_features(make_table([1, 1, 1, 1, 2, 2, 2], list("aaabaab")))
        expected = {
            "repeat_share": 3 / 7,
            "repeated_pair_share": 0.5,
            "log_repeats_per_repeated_pair": math.log(2.5),
        }
        check(features, expected)

    def test_without_repeats(self):
        features = repeats.repeat_features(make_table([1, 2], [1, 2]))
        check(features, dict(zip(repeats.NAMES, (0.0, 0.0, math.nan), strict=True)))


class TestTemporal:
    # One row at each of the times 0, 10, ..., 90.
    arrays = (list("uvuvuvuvuw"), list("ababaabcad"))

    def test_by_hand(self):
        features = temporal_features(*self.arrays, timestamp=np.arange(0, 100, 10))
        expected = {
            # Early half: a 3, b 2, c 0, d 0. Late: a 2, b 1, c 1, d 1. Ranks less 2.5: 1.5, .5, -1, -1 and
            # 1.5, -.5, -.5, -.5. Products 2.25 - .25 + .5 + .5 = 3, squares 4.5 and 3.
            "drift_rank_correlation": 3 / math.sqrt(4.5 * 3),
            # After time 60: c (born there), a, d (born there).
            "late_item_share": 2 / 3,
            # Ages of items when used, in tenths: 0 0 2 2 4 5 5 0 8 0; the median is 2 of 9.
            "item_age": 2 / 9,
            "activity_trend": 0.0,
            # After time 80: d by w, both new.
            "cold_item_rate": 1.0,
            "cold_user_rate": 1.0,
            # All gaps of u and of v are 2 of 9, and so equal; both live longer than 5 %, w has no second row.
            "log_user_gap": math.log(2 / 9 + 1e-6),
            "temporal_burstiness": -1.0,
            "short_lifetime_share": 0.0,
            # The span is 90 seconds.
            "daily_season": math.nan,
            "weekly_season": math.nan,
        }
        check(features, expected)
        p, q = [0.6, 0.4, 0, 0], [0.4, 0.2, 0.2, 0.2]
        assert features["drift_distance"] == pytest.approx(scipy.spatial.distance.jensenshannon(p, q, base=2))

    def test_units_and_origin_have_no_effect(self):
        times = np.arange(0, 100, 10)
        features, expected = (temporal_features(*self.arrays, timestamp=t) for t in (times * 1024 + 4096, times))
        for name in temporal.NAMES:
            assert features[name] == pytest.approx(expected[name], nan_ok=True)

    def test_drift_excess_is_small_by_chance_and_large_after_a_change(self):
        rng = np.random.default_rng(0)
        user, item, moment = rng.integers(0, 50, 4000), rng.integers(0, 100, 4000), np.arange(4000)
        steady = temporal_features(user, item, timestamp=moment)
        changed = temporal_features(user, item + 100 * (moment >= 2000), timestamp=moment)
        assert abs(steady["drift_excess"]) < 0.05
        # Two halves with no item in common have distance 1.
        assert changed["drift_distance"] == pytest.approx(1.0)
        assert changed["drift_excess"] > 0.5

    def test_short_lives_and_bursts(self):
        # u lives 1 % of the span, v all of it. Gaps .01 and 1: mean .505, deviation .495.
        features = temporal_features(list("uuvv"), list("abab"), timestamp=[0, 1, 0, 100])
        expected = {
            "short_lifetime_share": 0.5,
            "temporal_burstiness": (0.495 - 0.505) / (0.495 + 0.505),
            "log_user_gap": math.log(0.505 + 1e-6),
        }
        check(features, expected)

    def test_users_of_one_interaction_have_no_pace(self):
        features = temporal_features([1, 2, 3], [1, 2, 1], timestamp=[1, 2, 3])
        assert math.isnan(features["log_user_gap"]) and math.isnan(features["short_lifetime_share"])

    @pytest.mark.parametrize("moments", [[0, 0, 0, 1], [0, 1, 1, 1]])
    def test_ties_never_leave_a_part_empty(self, moments):
        features = temporal_features([1, 2, 1, 2], [1, 2, 2, 1], timestamp=moments)
        assert np.isfinite([features["drift_distance"], features["cold_item_rate"]]).all()

    def test_undefined_without_times(self):
        assert all(map(math.isnan, temporal_features([1, 2], [1, 2]).values()))

    @given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=30))
    def test_drift_agrees_with_scipy(self, pairs):
        first, second = np.array(pairs).T
        assume(first.std() > 0 and second.std() > 0)
        expected = scipy.stats.spearmanr(first, second).statistic
        assert temporal.rank_correlation(first, second) == pytest.approx(expected, abs=1e-9)
        distance = scipy.spatial.distance.jensenshannon(first, second, base=2)
        assert temporal.jensen_shannon_distance(first, second) == pytest.approx(distance, abs=1e-6)


class TestSeason:
    days = 86_400.0 * np.arange(10)

    def season(self, times, *, bins: int = 24) -> float:
        return temporal.season_strength(season_histogram(np.sort(times), period=86_400.0, bins=bins))

    def test_opposite_hours_cancel(self):
        times = np.concatenate([self.days + 6 * 3600, self.days + 18 * 3600])
        assert self.season(times) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("unit", [1.0, 1e3, 1e6, 1e9])
    def test_a_quarter_day_apart(self, unit):
        # Unit vectors at 0 and 90 degrees: half their sum has length sqrt(1/2). Fine units are recognised.
        times = 1.6e9 // 86_400 * 86_400 + np.concatenate([self.days, self.days + 6 * 3600])
        assert self.season(times * unit) == pytest.approx(math.sqrt(0.5))

    def test_dates_have_no_hours_and_short_spans_no_days(self):
        assert math.isnan(self.season(self.days))
        assert math.isnan(self.season(np.array([0.0, 86_400.0])))


class TestRatings:
    def test_by_hand(self):
        # Ratings 1 and 3 by user u, 5 and 5 by v, one unrated. Mean 3.5, range 4.
        table = make_table(list("uuvvv"), list("abcdd"), rating=[1, 3, 5, 5, np.nan])
        expected = {
            "rated_share": 0.8,
            "rating_position": 2.5 / 4,
            # Squares of -2.5, -.5, 1.5, 1.5: 6.25 + .25 + 2.25 + 2.25 = 11; deviation sqrt(11 / 4).
            "rating_spread": math.sqrt(11 / 4) / 4,
            "rating_share_at_maximum": 0.5,
            # Shares 1/4, 1/4, 1/2: 1.5 bits of log2(3).
            "rating_entropy": 1.5 / math.log2(3),
            # User means 2 and 5: 2 * 1.5 ** 2 + 2 * 1.5 ** 2 = 9 of 11.
            "rating_user_variance": 9 / 11,
            # No item has two ratings.
            "rating_item_variance": math.nan,
        }
        check(ratings.rating_features(table), expected)

    def test_equal_ratings_have_no_range(self):
        features = ratings.rating_features(make_table([1, 2], [1, 2], rating=[4, 4]))
        assert features["rated_share"] == 1
        assert all(math.isnan(features[name]) for name in ratings.NAMES[1:])

    def test_undefined_without_ratings(self):
        assert all(map(math.isnan, ratings.rating_features(make_table([1, 2], [1, 2])).values()))

    def test_variance_share_agrees_with_analysis_of_variance(self):
        rng = np.random.default_rng(0)
        groups = np.repeat(np.arange(5), 8)
        values = rng.normal(size=40) + groups
        # F = (between / 4) / (within / 35), so between / total = 4 F / (4 F + 35).
        ratio = scipy.stats.f_oneway(*values.reshape(5, 8)).statistic
        assert ratings.variance_share(groups, values) == pytest.approx(4 * ratio / (4 * ratio + 35))
