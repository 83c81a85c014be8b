"""From network outputs to hyperparameters: the base schedule, confidence, and the bounds of every step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metalearn.controller.actions import (
    FALLBACK_CONFIDENCE,
    Position,
    confidence,
    move,
    relative_residual,
    schedule_multiplier,
    start_position,
    trust_region,
    values,
)
from metalearn.controller.config import CONTROLLED, GLOBAL_CONTROLLED, GROUP_CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS

CONFIG = ControllerConfig(descriptors=DESCRIPTORS)
A, B, S = len(GROUP_CONTROLLED), len(GLOBAL_CONTROLLED), len(CONTROLLED)
BASE = np.array([CONFIG.space[n].encode(v) for n, v in zip(CONTROLLED, (0.03, 0.34, 0.9, 0.1), strict=True)])
ANY = st.floats(-1e6, 1e6)


def start(modifier: np.ndarray | float = 0.0, trust: float = 1.0, num_groups: int = 2) -> Position:
    return start_position(BASE, np.full(S, 0.5), np.broadcast_to(modifier, S), trust, CONFIG, num_groups, np)


def test_base_schedule_is_a_cosine_that_keeps_a_share():
    progress = np.array([-1.0, 0.0, 1 / 3, 0.5, 1.0, 1.5])
    cosine = np.array([1.0, 1.0, 0.75, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(schedule_multiplier(progress, np, 0.3), 0.3 + 0.7 * cosine, atol=1e-15)
    np.testing.assert_allclose(schedule_multiplier(progress, np), [*cosine[:4], 0.1, 0.1], atol=1e-15)
    assert schedule_multiplier(np.array(np.nan), np) == 1.0


def test_confidence_falls_and_then_gives_up():
    distance = np.linspace(0.0, 1.0, 101)
    trust = confidence(distance, np)
    assert trust[0] == 1.0
    assert confidence(np.float64(0.1), np) == pytest.approx(math.exp(-0.8))
    assert (np.diff(trust) <= 0).all()
    # exp(-8 d) is 0.2 at d = ln 5 / 8 = 0.2012.
    assert (trust[distance < 0.2012] >= FALLBACK_CONFIDENCE).all()
    assert (trust[distance > 0.2012] == 0).all()


@given(hnp.arrays(np.float64, S, elements=st.floats(-1, 1)), st.floats(0, 1))
def test_start_stays_within_reach_of_the_base(modifier: np.ndarray, trust: float):
    position = start(modifier, trust)
    shift = np.abs(np.concatenate([position.group_start[0], position.global_start]) - BASE)
    assert (shift <= 0.5 * trust * np.array([reach.start for reach in CONFIG.reach]) + 1e-12).all()
    for part in position:
        assert ((part >= 0) & (part <= 1)).all()
    np.testing.assert_array_equal(position.group_start[0], position.group_start[1])
    assert not position.group_residual.any()
    assert not position.global_residual.any()


def test_start_without_modifier_or_without_trust_is_exactly_the_base():
    for position in (start(0.0), start(1.0, trust=0.0)):
        np.testing.assert_array_equal(position.group_start, np.tile(BASE[:A], (2, 1)))
        np.testing.assert_array_equal(position.global_start, BASE[A:])


def test_no_action_and_no_trust_move_nothing():
    position = start()
    for actions, trust in (((0.0, 0.0), 1.0), ((5.0, -5.0), 0.0)):
        moved = move(position, np.full((2, A), actions[0]), np.full(B, actions[1]), trust, CONFIG, np)
        assert not moved.group_residual.any()
        assert not moved.global_residual.any()


@given(
    st.lists(
        st.tuples(hnp.arrays(np.float64, (2, A), elements=ANY), hnp.arrays(np.float64, B, elements=ANY)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1),
)
def test_steps_and_residuals_are_bounded(actions: list[tuple[np.ndarray, np.ndarray]], trust: float):
    position = start(0.3)
    low, high = trust_region(CONFIG, np, np.float64)
    steps = np.array([h.max_step for h in CONFIG.space])
    for group_action, global_action in actions:
        moved = move(position, group_action, global_action, trust, CONFIG, np)
        assert (np.abs(moved.group_residual - position.group_residual) <= trust * steps[:A] + 1e-12).all()
        assert (np.abs(moved.global_residual - position.global_residual) <= trust * steps[A:] + 1e-12).all()
        position = moved
    assert ((position.group_residual >= low[:A]) & (position.group_residual <= high[:A])).all()
    assert ((position.global_residual >= low[A:]) & (position.global_residual <= high[A:])).all()
    for share in relative_residual(position, CONFIG, np):
        assert (np.abs(share) <= 1 + 1e-12).all()
    for name, value in values(position, CONFIG, np)._asdict().items():
        hyperparameter = CONFIG.space[name]
        assert np.all((value >= hyperparameter.low) & (value <= hyperparameter.high))


def test_trust_region_is_what_its_comment_says():
    low, high = trust_region(CONFIG, np, np.float64)
    position = start()
    lowest = values(position._replace(group_residual=np.tile(low[:A], (2, 1))), CONFIG, np)
    highest = values(position._replace(group_residual=np.tile(high[:A], (2, 1))), CONFIG, np)
    np.testing.assert_allclose(lowest.learning_rate, 0.03 / 5)
    np.testing.assert_allclose(highest.learning_rate, 0.03 * 3)
    np.testing.assert_allclose(lowest.weight_decay, 0.34 / 4)
    np.testing.assert_allclose(highest.weight_decay, 0.34 * 4)


def test_relative_residual_reaches_one_on_either_side():
    low, high = trust_region(CONFIG, np, np.float64)
    position = Position(np.tile(BASE[:A], (2, 1)), BASE[A:], np.stack([low[:A], high[:A]]), low[A:])
    group, run = relative_residual(position, CONFIG, np)
    np.testing.assert_allclose(group, [[-1.0] * A, [1.0] * A])
    np.testing.assert_allclose(run, [-1.0] * B)


def test_numpy_and_jax_agree():
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    gate, modifier = rng.random(S), rng.uniform(-1, 1, S)
    actions = rng.normal(size=(10, 2 * A + B))
    results = []
    for xp, dtype in ((np, np.float64), (jnp, jnp.float32)):
        arrays = (xp.asarray(x, dtype) for x in (BASE, gate, modifier, 0.8))
        position = start_position(*arrays, CONFIG, 2, xp)
        for action in xp.asarray(actions, dtype):
            trust = xp.asarray(0.8, dtype)
            position = move(position, action[: 2 * A].reshape(2, A), action[2 * A :], trust, CONFIG, xp)
        results.append((*position, *relative_residual(position, CONFIG, xp), *values(position, CONFIG, xp)))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
