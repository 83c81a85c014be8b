"""What one user can change of the statistics, before noise: never more than is stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metalearn import Interactions
from metalearn.privacy.statistics import (
    ACTIVITY_BINS,
    ACTIVITY_SENSITIVITY,
    POPULARITY_THRESHOLDS,
    activity_histogram,
    bounded,
    popularity_survival,
)

USERS, ITEMS = 6, 8
tables = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1)), min_size=1, max_size=120)


def table(rows: list[tuple[int, int]]) -> Interactions:
    user, item = np.array(rows).T
    return Interactions(user=user, item=item, num_users=USERS, num_items=ITEMS)


def distance(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first - second).sum())


@given(tables, st.integers(0, USERS - 1), st.integers(1, 40), st.integers(0, 2**32))
def test_a_user_more_or_less_changes_the_statistics_by_no_more_than_is_stated(
    rows: list[tuple[int, int]], user: int, limit: int, seed: int
):
    whole = table(rows)
    others = whole.user != user
    assume(others.any())
    without = whole.select(others)
    priority = np.random.default_rng(seed).random(len(whole))
    kept, kept_without = bounded(whole, limit, priority), bounded(without, limit, priority[others])
    assert distance(activity_histogram(whole), activity_histogram(without)) <= ACTIVITY_SENSITIVITY
    assert distance(popularity_survival(kept), popularity_survival(kept_without)) <= limit


def test_the_stated_sensitivities_are_reached():
    others = [(0, item) for item in range(ITEMS)]
    one_of_each = [(1, item) for item in range(ITEMS)]
    with_user, without = table(others + one_of_each), table(others)
    # The second user lifts all 8 items from 1 to 2, and so over the threshold of 2.
    assert distance(popularity_survival(with_user), popularity_survival(without)) == ITEMS
    assert distance(activity_histogram(with_user), activity_histogram(without)) == ACTIVITY_SENSITIVITY


def test_without_the_bound_the_stated_sensitivity_would_be_exceeded():
    busy = [(1, item) for item in range(ITEMS)]
    whole, without = table([(0, 0), *busy]), table([(0, 0)])
    assert distance(popularity_survival(whole), popularity_survival(without)) > 3
    kept = bounded(whole, 3, np.arange(len(whole)))
    assert distance(popularity_survival(kept), popularity_survival(without)) == 3


@given(tables, st.integers(1, 5))
def test_a_bounded_table_keeps_as_much_of_each_user_as_it_may(rows: list[tuple[int, int]], limit: int):
    whole = table(rows)
    kept = bounded(whole, limit, np.random.default_rng(0).random(len(whole)))
    before, after = (np.bincount(t.user, minlength=USERS) for t in (whole, kept))
    assert after.tolist() == np.minimum(before, limit).tolist()


def test_each_interaction_of_a_user_is_as_likely_to_be_kept():
    whole = table([(0, item) for item in range(ITEMS)])
    rng = np.random.default_rng(0)
    kept = np.zeros(ITEMS)
    for _ in range(2000):
        kept += np.bincount(bounded(whole, 2, rng.random(ITEMS)).item, minlength=ITEMS)
    # 2000 draws of 2 from 8: 500 each, with a standard deviation of √(2000 · ¼ · ¾) = 19.
    assert np.abs(kept - 500).max() < 5 * 19


@given(st.lists(st.integers(1, 300), min_size=1, max_size=ITEMS))
def test_statistics_are_what_they_say(counts: list[int]):
    rows = [(index % USERS, item) for item, count in enumerate(counts) for index in range(count)]
    survival = popularity_survival(table(rows))
    assert survival.tolist() == [sum(c >= t for c in counts) for t in POPULARITY_THRESHOLDS.tolist()]
    histogram = activity_histogram(table(rows))
    activity = [sum(user == u for u, _ in rows) for user in range(USERS)]
    for low, high, number in zip(ACTIVITY_BINS, [*ACTIVITY_BINS[1:], 10**9], histogram, strict=True):
        assert number == sum(low <= a < high for a in activity)


@pytest.mark.parametrize("edges", [ACTIVITY_BINS, POPULARITY_THRESHOLDS])
def test_edges_start_at_one_and_ascend_by_a_half_at_most_beyond_eight(edges: np.ndarray):
    assert edges[:8].tolist() == list(range(1, 9))
    ratios = edges[8:] / edges[7:-1]
    assert (ratios > 1.3).all() and (ratios < 1.5).all()
