"""Cohorts are counted on training, and are what their shares say."""

from __future__ import annotations

from envs.cohorts import cohorts
from tests.envs.logs import hand_made


def test_cohorts_by_hand() -> None:
    # Item 0 has 3 of 8 interactions: more than the first third, so it is the head alone; item 1 (2) starts at 3/8.
    # Items 2, 3, 4 (1 each) start at 5/8, 6/8 and 7/8: mid ends at 2/3.
    train = [(0, 0, 1), (1, 0, 1), (2, 0, 1), (0, 1, 1), (1, 1, 1), (0, 2, 1), (3, 3, 1), (0, 4, 1)]
    groups = cohorts(hand_made(train, [(1, 2, 5)]))
    assert groups.item.tolist() == [0, 1, 1, 2, 2]
    # Activity 4, 2, 1, 1 with terciles 1 and 2.
    assert groups.user.tolist() == [2, 1, 0, 0]
