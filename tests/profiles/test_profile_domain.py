"""profile_domain as a whole: independence of row order, masks, sampling, seeds, scans, speed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metalearn.errors import InteractionsError, InvalidArgumentError
from metalearn.interactions import Interactions
from metalearn.profiles import META_FEATURE_NAMES, profile_domain
from metalearn.profiles.canonical import canonical_table, fingerprint
from metalearn.profiles.meta_features import ratings, temporal


def make_interactions(num_interactions: int, num_users: int = 300, num_items: int = 400) -> Interactions:
    """Users of four tastes who mostly choose popular items of their taste, with times and ratings."""
    rng = np.random.default_rng(0)
    user = (num_users * rng.random(num_interactions) ** 2).astype(int)
    taste = user % 4
    item = 4 * (num_items // 4 * rng.random(num_interactions) ** 3).astype(int) + taste
    moment = rng.integers(10**9, 11 * 10**8, num_interactions)
    return Interactions.from_arrays(user, item, timestamp=moment, rating=rng.integers(1, 6, num_interactions))


rows = st.tuples(
    st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), st.sampled_from([np.nan, 0.0, -0.0, 1.0, 5.0])
)


@given(st.lists(rows, min_size=2, max_size=80), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_row_order_has_no_effect_and_values_are_finite(table, with_times, with_ratings, random):
    def profile_of(some_rows):
        user, item, moment, rating = (np.array(column) for column in zip(*some_rows, strict=True))
        return profile_domain(
            Interactions.from_arrays(
                user, item, timestamp=moment if with_times else None, rating=rating if with_ratings else None
            )
        )

    assume(len({row[0] for row in table}) > 1 and len({row[1] for row in table}) > 1)
    profile = profile_of(table)
    shuffled = list(table)
    random.shuffle(shuffled)
    again = profile_of(shuffled)
    assert again.fingerprint == profile.fingerprint
    np.testing.assert_array_equal(again.values, profile.values)
    np.testing.assert_array_equal(again.mask, profile.mask)
    assert np.isfinite(profile.values).all()
    assert (profile.values[~profile.mask] == 0).all()
    assert with_times or not any(profile[name] is not None for name in temporal.NAMES)
    assert with_ratings or not any(profile[name] is not None for name in ratings.NAMES)


def test_everything_is_defined_on_a_full_domain():
    profile = profile_domain(make_interactions(5000))
    assert profile.mask.all()
    assert profile.names == META_FEATURE_NAMES
    assert profile["landmark_log_gain"] > 0.3  # tastes are there to be found


def test_smallest_domain_has_sizes_and_no_structure():
    profile = profile_domain(Interactions.from_arrays([1, 2], [1, 2]))
    assert profile["log_num_users"] == pytest.approx(np.log(2))
    # 2 interactions in a table of 2 x 2: density 1/2.
    assert profile["log_density"] == pytest.approx(np.log(0.5))
    for name in ("spectral_gap", "landmark_log_gain", "item_tail_index", "user_log_count_skewness"):
        assert profile[name] is None


class TestFingerprint:
    table = make_interactions(500)

    def test_is_a_sha256(self):
        assert len(bytes.fromhex(profile_domain(self.table).fingerprint)) == 32

    def test_changes_with_every_column(self):
        arrays = {name: getattr(self.table, name) for name in ("user", "item", "timestamp", "rating")}
        base = profile_domain(Interactions.from_arrays(**arrays)).fingerprint
        for name, values in arrays.items():
            changed = values.copy()
            changed[3] = values[values != values[3]][0]
            assert profile_domain(Interactions.from_arrays(**arrays | {name: changed})).fingerprint != base
        for name in ("timestamp", "rating"):
            assert profile_domain(Interactions.from_arrays(**arrays | {name: None})).fingerprint != base

    def test_does_not_depend_on_unused_codes(self):
        part = self.table.select(self.table.user > 5)
        assert profile_domain(part).fingerprint == profile_domain(part.compact()).fingerprint
        np.testing.assert_array_equal(profile_domain(part).values, profile_domain(part.compact()).values)

    def test_is_pinned(self):
        # The bytes are a contract: a stored fingerprint has to find its domain again.
        table = canonical_table(Interactions.from_arrays([1, 1, 2], [5, 6, 6], timestamp=[1, 2, 3], rating=[1, 0, 1]))
        assert fingerprint(table) == PINNED_FINGERPRINT


PINNED_FINGERPRINT = "7f0939200c3e53929c1762bff313c88cf1c1c2a596af680f158513d559657e19"


class TestSampling:
    table = make_interactions(20_000)

    def test_large_tables_are_sampled_by_whole_users(self):
        full, sampled = profile_domain(self.table), profile_domain(self.table, max_interactions=5000)
        assert full.sampled_fraction == 1
        assert 0.1 < sampled.sampled_fraction <= 0.25
        assert sampled.num_interactions == full.num_interactions == 20_000
        assert sampled.num_users == pytest.approx(full.num_users, rel=0.35)
        assert sampled["log_interactions_per_user"] == pytest.approx(full["log_interactions_per_user"], abs=0.35)
        assert sampled["item_gini"] == pytest.approx(full["item_gini"], abs=0.1)

    def test_seed_decides_the_sample(self):
        first, again, other = (profile_domain(self.table, max_interactions=5000, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first.values, again.values)
        assert first.fingerprint == again.fingerprint != other.fingerprint

    def test_too_small(self):
        with pytest.raises(InvalidArgumentError, match="`max_interactions`=2 is too small to hold 2 whole users"):
            profile_domain(self.table, max_interactions=2)
        for wrong in (1, 2.5, True):
            with pytest.raises(InvalidArgumentError, match="`max_interactions` must be an int of at least 2"):
                profile_domain(self.table, max_interactions=wrong)


class TestScan:
    def test_gives_the_profile_of_the_table(self, tmp_path: Path):
        table, path = make_interactions(3000), tmp_path / "table.parquet"
        columns = {"user_id": table.user, "item_id": table.item, "timestamp": table.timestamp, "rating": table.rating}
        pl.DataFrame(columns).write_parquet(path)
        scanned, direct = profile_domain(Interactions.scan(path)), profile_domain(table)
        assert scanned.fingerprint == direct.fingerprint
        np.testing.assert_array_equal(scanned.values, direct.values)
        sampled = profile_domain(Interactions.scan(path), max_interactions=1000)
        assert 0.1 < sampled.sampled_fraction <= 1 / 3
        assert sampled.num_interactions == 3000

    def test_empty(self, tmp_path: Path):
        path = tmp_path / "table.csv"
        path.write_text("user_id,item_id\n")
        with pytest.raises(InteractionsError, match="empty"):
            profile_domain(Interactions.scan(path))


def test_wrong_arguments():
    with pytest.raises(InvalidArgumentError, match="must be Interactions or an InteractionsScan, got list"):
        profile_domain([1, 2])
    table = make_interactions(10)
    with pytest.raises(InteractionsError, match="no interactions"):
        profile_domain(table.select([]))


def test_speed_of_small_domains():
    # About 30 ms on one core; the bound leaves room for a busy machine.
    table = make_interactions(20_000, 1000, 1600)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        profile_domain(table)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2
