"""Splits respect time, nothing leaks, and what comes with a domain follows its codes."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from envs.domains import check_leakage, make_domain
from metalearn.errors import InvalidArgumentError, LeakageError
from metalearn.interactions import Interactions
from tests.envs.logs import hand_made, random_log


def pairs(part: Interactions) -> set[tuple[int, int]]:
    return set(zip(part.user.tolist(), part.item.tolist(), strict=True))


def test_time_split_is_global_and_close_to_the_shares_wanted() -> None:
    log = random_log()
    domain = make_domain(log, name="log")
    assert domain.split == "time"
    assert domain.train.timestamp.max() < domain.validation.timestamp.min()
    assert domain.validation.timestamp.max() < domain.test.timestamp.min()
    assert np.mean(log.timestamp <= domain.train.timestamp.max()) == pytest.approx(0.8, abs=0.01)
    assert np.mean(log.timestamp >= domain.test.timestamp.min()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("split", "timed"), [("time", True), ("leave-last-out", True), ("leave-last-out", False)])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_warm_and_without_repeats(split: str, timed: bool, seed: int) -> None:
    domain = make_domain(random_log(seed=seed, timed=timed), name="log", split=split)
    parts = [domain.train, domain.validation, domain.test]
    sets = [pairs(part) for part in parts]
    assert [len(part) for part in parts] == [len(entry) for entry in sets]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert set(domain.train.user.tolist()) == set(range(domain.num_users))
    assert set(domain.train.item.tolist()) == set(range(domain.num_items))
    assert all((part.num_users, part.num_items) == (domain.num_users, domain.num_items) for part in parts)


@given(seed=st.integers(0, 10_000), distinct_times=st.integers(3, 60))
@settings(max_examples=30)
def test_rows_of_one_time_stay_together(seed: int, distinct_times: int) -> None:
    log = random_log(seed=seed, users=60, rows=3000, distinct_times=distinct_times)
    try:
        domain = make_domain(log, name="coarse", split="time")
    except InvalidArgumentError as error:
        assert "leave-last-out" in str(error)
        return
    check_leakage(domain)
    assert domain.train.timestamp.max() < domain.validation.timestamp.min()
    assert domain.validation.timestamp.max() < domain.test.timestamp.min()


def test_one_dominant_time_leaves_every_part_some_rows() -> None:
    log = random_log(items=100, rows=3000)
    time = np.where(np.arange(3000) < 2700, 5.0, 6.0 + np.arange(3000) % 2)
    domain = make_domain(dataclasses.replace(log, timestamp=time), name="dominant")
    assert [set(part.timestamp) for part in (domain.train, domain.validation, domain.test)] == [{5.0}, {6.0}, {7.0}]


def test_first_occurrence_of_a_repeat_counts() -> None:
    # User 0 takes item 0 in training (time 1) and again in the test period: not a target, since it was seen.
    rows = [(0, 0, 1), *((u, i, 2 + i) for u in range(30) for i in range(5) if (u, i) != (0, 0))]
    later = [(u, 5 + (u + t) % 3, 10 + t) for u in range(30) for t in range(2)]
    everyone = [(u, 5 + i, 3) for u in range(30, 40) for i in range(3)] + [(0, 0, 11)]
    user, item, time = np.array(rows + later + everyone, dtype=float).T
    log = Interactions.from_arrays(user.astype(int), item.astype(int), timestamp=time)
    domain = make_domain(log, name="repeats", validation_fraction=0.13, test_fraction=0.13)
    assert (0, 0) in pairs(domain.train)
    assert (0, 0) not in pairs(domain.test)
    assert domain.train.timestamp[(domain.train.user == 0) & (domain.train.item == 0)] == [1.0]


def test_leave_last_out_by_hand() -> None:
    # User 0 in order of time: 3, 0, 1, 2 -> test 2, validation 1. User 1 has two distinct items: all training.
    # User 2: 0, 1, 2 -> test 2, validation 1, training 0; item 3 of user 0 and item 2 stay known through user 3.
    user = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    item = [2, 3, 1, 0, 0, 1, 0, 0, 1, 2, 2, 3, 1, 4, 0]
    time = [9, 1, 8, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5]
    log = Interactions.from_arrays(user, item, timestamp=time)
    domain = make_domain(log, name="hand", split="leave-last-out", min_user_interactions=1)
    # Item 4 is user 3's validation item and in nobody's training, so it is dropped and the codes end at 3.
    assert domain.num_items == 4
    assert pairs(domain.train) == {(0, 3), (0, 0), (1, 0), (1, 1), (2, 0), (3, 2), (3, 3), (3, 1)}
    assert pairs(domain.validation) == {(0, 1), (2, 1)}
    assert pairs(domain.test) == {(0, 2), (2, 2), (3, 0)}


def test_row_order_decides_where_there_are_no_times() -> None:
    log = Interactions.from_arrays([0, 0, 0, 1, 1, 1, 2, 2, 2], [2, 0, 1, 1, 2, 0, 0, 1, 2])
    domain = make_domain(log, name="rows", min_user_interactions=1)
    assert domain.split == "leave-last-out"
    assert pairs(domain.test) == {(0, 1), (1, 0), (2, 2)}


def test_rows_sorted_by_item_are_shuffled_before_the_last_is_left_out() -> None:
    dense = np.ones((200, 12), dtype=bool)
    user, item = np.nonzero(dense)
    log = Interactions(user=user.astype(np.int32), item=item.astype(np.int32), num_users=200, num_items=12)
    first, again, other = (make_domain(log, name="sorted", seed=seed) for seed in (0, 0, 1))
    assert len(set(first.test.item.tolist())) == 12  # not item 11 for everyone
    np.testing.assert_array_equal(first.test.item, again.test.item)
    assert pairs(first.test) != pairs(other.test)


def test_minima_are_counted_on_what_the_cutoff_knows() -> None:
    log = random_log(rows=1200)
    domain = make_domain(log, name="core", min_user_interactions=8, min_item_interactions=5)
    assert np.bincount(domain.train.user).min() >= 8
    assert np.bincount(domain.train.item).min() >= 5


def test_raw_ids_and_titles_follow_the_codes() -> None:
    log = random_log()
    raw = Interactions.from_arrays(
        [f"u{u}" for u in log.user], [f"i{i:03d}" for i in log.item], timestamp=log.timestamp
    )
    titles = np.array([f"title of {name}" for name in raw.item_ids(np.arange(raw.num_items))], dtype=object)
    domain = make_domain(raw, name="titled", item_titles=titles, min_item_interactions=3)
    names = domain.train.item_ids(np.arange(domain.num_items))
    assert domain.item_titles.tolist() == [f"title of {name}" for name in names]
    known = set(zip(raw.user_ids(raw.user), raw.item_ids(raw.item), raw.timestamp, strict=True))
    for part in (domain.train, domain.validation, domain.test):
        rows = zip(part.user_ids(part.user), part.item_ids(part.item), part.timestamp, strict=True)
        assert set(rows) <= known


def test_too_few_evaluable_users_is_an_error_with_counts_and_advice() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"\d+ evaluable users in validation and \d+ in test.*leave-last-out"
    ):
        make_domain(random_log(users=15, rows=400), name="small")
    with pytest.raises(InvalidArgumentError, match="no user of domain 'tiny' can be evaluated"):
        make_domain(Interactions.from_arrays([0, 0, 1, 1], [0, 1, 0, 1]), name="tiny")
    with pytest.raises(InvalidArgumentError, match="no training interactions left"):
        make_domain(random_log(timed=False), name="pruned", min_user_interactions=10_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "random"}, "`split`"),
        ({"validation_fraction": 0.0}, "`validation_fraction`"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "below 1"),
        ({"item_titles": np.array(["one"], dtype=object)}, "`item_titles`"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_domain(random_log(), name="bad", **arguments)


def test_a_time_split_needs_times() -> None:
    with pytest.raises(InvalidArgumentError, match="needs timestamps"):
        make_domain(random_log(timed=False), name="untimed", split="time")
    with pytest.raises(InvalidArgumentError, match="3 distinct timestamps, got 2"):
        make_domain(random_log(distinct_times=2), name="two", split="time")


def test_a_future_timestamp_in_training_is_named() -> None:
    good = hand_made([(0, 0, 1), (1, 1, 2)], [(0, 1, 5)], [(1, 0, 9)])
    check_leakage(good)
    leaky = hand_made([(0, 0, 1), (1, 1, 2), (3, 2, 7)], [(0, 1, 5)], [(1, 0, 9)])
    with pytest.raises(
        LeakageError, match=r"`train` lie in the future of `validation`: user code 3 .* time 7, .* is 5"
    ):
        check_leakage(leaky)
    with pytest.raises(LeakageError, match=r"1 interactions in `train`.*user code 1 has one at time 5"):
        check_leakage(hand_made([(0, 0, 1), (1, 1, 5)], [(0, 1, 5)]))  # the cutoff itself is too late
    with pytest.raises(LeakageError, match="`validation` lie in the future of `test`: user code 0"):
        check_leakage(hand_made([(0, 0, 1)], [(0, 1, 9)], [(1, 0, 9)]))


def test_under_leave_last_out_each_user_has_a_cutoff() -> None:
    per_user = {"split": "leave-last-out"}
    check_leakage(hand_made([(0, 0, 1), (1, 1, 50)], [(0, 1, 5), (1, 2, 60)], **per_user))
    with pytest.raises(LeakageError, match="user code 1 has one at time 50, and the cutoff is 40"):
        check_leakage(hand_made([(0, 0, 1), (1, 1, 50)], [(0, 1, 5), (1, 2, 40)], **per_user))


def test_an_evaluated_pair_in_training_is_named() -> None:
    with pytest.raises(
        LeakageError, match="1 of 2 `test` pairs are in `train` as well, first user code 1 with item code 1"
    ):
        check_leakage(hand_made([(0, 0, 1), (1, 1, 2)], [(0, 1, 5)], [(1, 0, 9), (1, 1, 9)]))
    with pytest.raises(LeakageError, match="`test` pairs are in `validation`"):
        check_leakage(hand_made([(0, 0, 1)], [(0, 1, 5)], [(0, 1, 9)]))


def test_parts_must_share_a_code_space() -> None:
    good = hand_made([(0, 0, 1)], [(0, 1, 5)])
    with pytest.raises(InvalidArgumentError, match=r"`test` must share the code space of `train` \(4 users, 5 items\)"):
        dataclasses.replace(good, test=dataclasses.replace(good.test, num_items=6))
    with pytest.raises(InvalidArgumentError, match="`split`"):
        dataclasses.replace(good, split="auto")


def test_the_profile_is_of_training_only() -> None:
    from metalearn.profiles import profile_domain

    domain = make_domain(random_log(), name="log")
    assert domain.profile is domain.profile
    assert domain.profile.num_interactions == len(domain.train)
    np.testing.assert_array_equal(domain.profile.values, profile_domain(domain.train).values)


def content_log() -> tuple[Interactions, np.ndarray]:
    """A log with raw ids, and a row of content for each item code that says which item it is."""
    log = random_log()
    raw = Interactions.from_arrays(
        [f"u{u:02d}" for u in log.user], [f"i{i:03d}" for i in log.item], timestamp=log.timestamp
    )
    number = np.array([int(str(name)[1:]) for name in raw.item_ids(np.arange(raw.num_items))])
    return raw, np.stack([number, -number], axis=1)


@pytest.mark.parametrize("split", ["time", "leave-last-out"])
def test_content_follows_the_codes_of_training(split: str) -> None:
    raw, content = content_log()
    domain = make_domain(raw, name="described", split=split, min_item_interactions=20, item_content=content)
    assert domain.num_items < raw.num_items  # rows were dropped, so codes moved
    assert domain.item_content.shape == (domain.num_items, 2) and domain.item_content.dtype == np.float32
    names = domain.train.item_ids(np.arange(domain.num_items))
    expected = np.array([int(str(name)[1:]) for name in names])
    np.testing.assert_array_equal(domain.item_content, np.stack([expected, -expected], axis=1))


def test_content_and_exposures_must_fit() -> None:
    raw, content = content_log()
    with pytest.raises(InvalidArgumentError, match=r"`item_content` must have a row per item code \(40\), got 39"):
        make_domain(raw, name="short", item_content=content[:-1])
    with pytest.raises(InvalidArgumentError, match="`exposures` must share the code space of `interactions`"):
        make_domain(raw, name="foreign", exposures=random_log(items=90))
    domain = make_domain(raw, name="log")
    with pytest.raises(InvalidArgumentError, match=r"`item_content` must have a row per item \(\d+\), got 3"):
        dataclasses.replace(domain, item_content=content[:3])
    foreign = dataclasses.replace(domain.train, num_items=domain.num_items + 1, item_labels=None)
    with pytest.raises(InvalidArgumentError, match="`exposures` must share the code space of `train`"):
        dataclasses.replace(domain, exposures=foreign)


def test_exposures_are_cut_to_what_training_could_know() -> None:
    # 30 users take items 0-4 at times 1-5, 5 at 6 (validation) and 6 at 7 (test); three more take items 5-8 at times
    # 1-4, so that these are known. User 33 takes item 9 at time 6 and nothing before: neither is known.
    rows = [(u, i, 1 + i) for u in range(30) for i in range(5)]
    rows += [(u, 5, 6) for u in range(30)] + [(u, 6, 7) for u in range(30)]
    rows += [(u, i, i - 4) for u in range(30, 33) for i in range(5, 9)] + [(33, 9, 6)]
    user, item, time = np.array(rows).T
    log = Interactions.from_arrays(user, item, timestamp=time)
    shown = [
        (0, 7, 2),  # kept
        (30, 0, 5),  # kept: the last time of training
        (0, 8, 6),  # validation has begun
        (1, 8, 7),  # test
        (2, 3, 1),  # taken in training
        (2, 5, 3),  # taken in validation
        (3, 6, 4),  # taken in test
        (33, 0, 1),  # the user is unknown
        (4, 9, 1),  # the item is unknown
        (0, 7, 3),  # kept: shown twice
    ]
    user, item, time = np.array(shown, dtype=np.int32).T
    exposures = dataclasses.replace(log, user=user, item=item, timestamp=time)
    domain = make_domain(log, name="shown", validation_fraction=0.13, test_fraction=0.13, exposures=exposures)
    kept = domain.exposures
    assert (kept.num_users, kept.num_items) == (33, 9) and kept.rating is None
    found = zip(kept.user_ids(kept.user), kept.item_ids(kept.item), kept.timestamp, strict=True)
    assert [tuple(map(int, row)) for row in found] == [(0, 7, 2), (30, 0, 5), (0, 7, 3)]


@given(seed=st.integers(0, 10_000), split=st.sampled_from(["time", "leave-last-out"]))
@settings(max_examples=20)
def test_no_exposure_is_a_pair_of_any_part(seed: int, split: str) -> None:
    log = random_log(seed=seed)
    rng = np.random.default_rng(seed)
    exposures = dataclasses.replace(
        log,
        user=rng.integers(0, 80, 500).astype(np.int32),
        item=rng.integers(0, 40, 500).astype(np.int32),
        timestamp=rng.integers(0, 10_000, 500).astype(np.float64),
    )
    domain = make_domain(log, name="random", split=split, min_item_interactions=5, exposures=exposures)
    taken = pairs(domain.train) | pairs(domain.validation) | pairs(domain.test)
    assert not pairs(domain.exposures) & taken
    first = np.full(domain.num_users, domain.validation.timestamp.min())
    if split == "leave-last-out":
        first[:] = np.inf
        for part in (domain.validation, domain.test):
            np.minimum.at(first, part.user, part.timestamp)
    assert len(domain.exposures) > 20
    assert (domain.exposures.timestamp < first[domain.exposures.user]).all()
