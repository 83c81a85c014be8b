"""Whose doing a collapse is: a fall that comes again with the same values is the data's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalearn import load_controller
from metalearn.controller.decision import Decision
from metalearn.safety import rollback as rules
from metalearn.safety.drift.attribution import at_new_level, collapsed_alone, same_values
from metalearn.safety.rollback import Health, RollbackConfig, RollbackState
from tests.recorded_run import load_recorded_run

CONFIG = RollbackConfig()
GOOD = Health(50, 0.6, 0, True, 0.1)
LEVEL = (0.1, 0.102, 0.099, 0.101, 0.1, 0.098)
FALLEN = GOOD._replace(validation=0.03)


def watched(health: Health = GOOD) -> RollbackState:
    state = rules.init()
    for validation in LEVEL:
        state, reasons = rules.update(CONFIG, state, health._replace(validation=validation))
        assert reasons == ()
    return state


@pytest.mark.parametrize(
    ("health", "alone"),
    [
        (FALLEN, True),
        (GOOD, False),
        (FALLEN._replace(state_finite=False), False),
        (FALLEN._replace(nonfinite_steps=3.0), False),
        (FALLEN._replace(loss=50.0), False),
        (FALLEN._replace(unkept=("too slow",)), False),
        (GOOD._replace(validation=math.nan), False),
    ],
)
def test_only_a_fall_of_validation_and_nothing_else_is_a_collapse_alone(health: Health, alone: bool):
    assert collapsed_alone(CONFIG, watched(), health) is alone


def test_the_new_level_is_the_fallen_one_and_its_noise_is_that_of_before():
    state = watched()
    then = at_new_level(CONFIG, state, FALLEN)
    assert np.median(then.validations[-rules.LEVEL_OF :]) == pytest.approx(FALLEN.validation)
    assert rules.validation_noise(then.validations) == pytest.approx(rules.validation_noise(state.validations))
    assert rules.update(CONFIG, then, FALLEN)[1] == ()
    assert rules.update(CONFIG, then, FALLEN._replace(validation=-0.05))[1] != ()
    assert then.rollbacks == state.rollbacks and not then.fallen_back


@given(st.floats(-1.0, 0.05))
def test_from_the_new_level_on_the_same_validation_is_good(validation: float):
    fallen = GOOD._replace(validation=validation)
    assert not collapsed_alone(CONFIG, at_new_level(CONFIG, watched(), fallen), fallen)


@pytest.fixture(scope="module")
def decision() -> Decision:
    return load_controller().start(load_recorded_run().profile, roles=("embedding", "dense"), horizon=200).ask()


def test_values_are_the_same_within_a_tenth(decision: Decision):
    def with_rate(factor: float) -> Decision:
        first, *others = decision.groups
        return replace(decision, groups=({**first, "learning_rate": factor * first["learning_rate"]}, *others))

    assert same_values(decision, decision)
    assert same_values(decision, with_rate(1.05))
    assert not same_values(decision, with_rate(1.25)) and not same_values(decision, with_rate(0.8))
    assert not same_values(decision, replace(decision, run={**decision.run, "dropout": 0.9}))
    assert not same_values(decision, replace(decision, run={}))
