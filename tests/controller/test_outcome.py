"""The outcome model in use: one function with the Flax ensemble, honest mixtures, and what it does without inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from metalearn.controller.actions import Position
from metalearn.controller.checkpoint import unflatten
from metalearn.controller.config import CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS
from metalearn.controller.outcome import (
    CURVE_KNOWN,
    FIRST_DESCRIPTOR,
    FLOOR_KNOWN,
    HORIZON_KNOWN,
    PREFIX,
    VALIDATION,
    OutcomeConfig,
    OutcomeDistribution,
    OutcomeModel,
    Situation,
    input_names,
    outcome_inputs,
)
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training.outcome import apply_member
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES

CONTROLLER = ControllerConfig(descriptors=DESCRIPTORS, families=("matrix_factorization", "sequences"))
CONFIG = OutcomeConfig(num_members=4, hidden_sizes=(16, 12, 8))
NAMES = input_names(CONTROLLER)


def make_params(seed: int = 0, config: OutcomeConfig = CONFIG) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in config.shapes(CONTROLLER).items()}
    return params | {
        f"{PREFIX}target": np.array([0.3, 0.5], np.float32),
        f"{PREFIX}temperature": np.array([1.0, 1.0], np.float32),
    }


def make_situation(num_groups: int = 2, seed: int = 0, dtype: type = np.float64) -> Situation:
    rng = np.random.default_rng(seed)

    def uniform(*shape: int, low: float = -1.6, high: float = 1.6) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(dtype)

    return Situation(
        descriptors=uniform(len(DESCRIPTORS)),
        family=np.array(1),
        horizon_known=np.array(True),
        base=uniform(len(CONTROLLED), low=0.4, high=0.6),
        position=Position(
            uniform(num_groups, 3, low=0.3, high=0.7),
            uniform(1, low=0.3, high=0.7),
            uniform(num_groups, 3, low=-0.1, high=0.1),
            uniform(1, low=-0.1, high=0.1),
        ),
        group_mask=np.ones(num_groups, dtype),
        curve_known=np.array(True),
        group=uniform(num_groups, len(GROUP_FEATURES)),
        run=uniform(len(GLOBAL_FEATURES)),
        validation=np.asarray(0.7, dtype),
    )


def named(situation: Situation) -> dict[str, float]:
    return dict(zip(NAMES, outcome_inputs(situation, CONTROLLER, np).tolist(), strict=True))


# Inputs


def test_numpy_and_jax_lay_out_the_same_inputs():
    situation = make_situation(dtype=np.float32)
    ours = outcome_inputs(situation, CONTROLLER, np)
    theirs = jax.jit(lambda s: outcome_inputs(s, CONTROLLER, jnp))(jax.tree.map(jnp.asarray, situation))
    assert ours.shape == theirs.shape == (len(NAMES),)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_columns_are_where_they_are_said_to_be():
    assert len(set(NAMES)) == len(NAMES)
    assert NAMES[FIRST_DESCRIPTOR : FIRST_DESCRIPTOR + len(DESCRIPTORS)] == DESCRIPTORS
    inputs, situation = named(make_situation()), make_situation()
    assert (NAMES[CURVE_KNOWN], NAMES[FLOOR_KNOWN], NAMES[HORIZON_KNOWN]) == (
        "curve_known", "floor_known", "horizon_known",
    )  # fmt: skip
    assert NAMES[VALIDATION] == "validation_above_popularity"
    assert inputs["validation_above_popularity"] == 0.7
    assert [inputs[name] for name in DESCRIPTORS] == situation.descriptors.tolist()
    assert [inputs[f"family_{name}"] for name in ("other", "matrix_factorization", "sequences")] == [0, 1, 0]
    assert [inputs[f"run_{name}"] for name in GLOBAL_FEATURES] == situation.run.tolist()
    assert [inputs[f"group_{name}"] for name in GROUP_FEATURES] == pytest.approx(situation.group.mean(0))


def test_starts_count_in_reaches_and_residuals_in_shares_of_the_trust_region():
    reach = CONTROLLER.reach[0]
    base = np.full(len(CONTROLLED), 0.5)
    start = np.tile(base[:3], (2, 1))
    start[:, 0] += [reach.start, 0.0]  # on average half a reach
    residual = np.zeros((2, 3))
    residual[:, 0] = [reach.low, reach.high / 2]  # shares -1 and 0.5
    position = Position(start, base[3:] - 0.2, residual, np.array([0.1]))
    inputs = named(make_situation()._replace(base=base, position=position))
    assert inputs["start_learning_rate"] == pytest.approx(0.5)
    assert inputs["residual_learning_rate"] == pytest.approx(-0.25)
    assert inputs["start_dropout"] == pytest.approx(-0.5)  # its reach is 0.4
    assert inputs["residual_dropout"] == pytest.approx(0.25)  # and so is its trust region
    assert inputs["start_weight_decay"] == inputs["residual_beta1"] == 0.0


def test_before_the_first_signal_the_curve_is_not_read():
    nothing = make_situation()._replace(
        curve_known=np.array(False),
        group=np.full((2, len(GROUP_FEATURES)), np.nan),
        run=np.full(len(GLOBAL_FEATURES), np.nan),
    )
    inputs, with_curve = named(nothing), named(make_situation())
    curve = {*(f"run_{name}" for name in GLOBAL_FEATURES), *(f"group_{name}" for name in GROUP_FEATURES)}
    absent = curve | {"curve_known", "floor_known", "validation_above_popularity"}
    assert all(inputs[name] == 0.0 for name in absent)
    assert all(inputs[name] == with_curve[name] for name in set(NAMES) - absent)


def test_an_unknown_floor_is_masked():
    inputs = named(make_situation()._replace(validation=np.array(np.nan)))
    known = named(make_situation())
    assert inputs["floor_known"] == inputs["validation_above_popularity"] == 0.0
    assert {name for name in NAMES if inputs[name] != known[name]} == {"floor_known", "validation_above_popularity"}


def test_values_that_are_not_ours_to_set_count_as_the_base():
    situation = make_situation()
    position = situation.position
    start, residual = position.group_start.copy(), position.group_residual.copy()
    start[0, 1] = residual[0, 1] = np.nan  # the decay of one group
    start[:, 2] = residual[:, 2] = np.nan  # beta1 of all
    inputs = named(situation._replace(position=position._replace(group_start=start, group_residual=residual)))
    others = (start[1, 1] - situation.base[1]) / CONTROLLER.reach[1].start
    assert inputs["start_weight_decay"] == pytest.approx(others)
    assert inputs["start_beta1"] == inputs["residual_beta1"] == 0.0
    assert np.isfinite(list(inputs.values())).all()


def test_padding_groups_change_nothing():
    alone = make_situation(num_groups=1)
    rubbish = make_situation(num_groups=2, seed=1)

    def pad(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.concatenate([one, other[1:]])

    padded = alone._replace(
        group_mask=np.array([1.0, 0.0]),
        group=pad(alone.group, rubbish.group),
        position=alone.position._replace(
            group_start=pad(alone.position.group_start, rubbish.position.group_start),
            group_residual=pad(alone.position.group_residual, rubbish.position.group_residual),
        ),
    )
    assert named(padded) == pytest.approx(named(alone), abs=1e-12)


def test_candidates_in_a_leading_axis_are_single_situations():
    situation = make_situation()
    starts = situation.position.global_start + np.array([[-0.1], [0.0], [0.2]])
    position = situation.position
    together = outcome_inputs(situation._replace(position=position._replace(global_start=starts)), CONTROLLER, np)
    assert together.shape == (3, len(NAMES))
    for row, start in zip(together, starts, strict=True):
        alone = situation._replace(position=position._replace(global_start=start))
        np.testing.assert_array_equal(row, outcome_inputs(alone, CONTROLLER, np))


# Model


@pytest.mark.parametrize("config", [CONFIG, OutcomeConfig()])
def test_numpy_and_flax_agree(config: OutcomeConfig):
    params = make_params(1, config)
    inputs = np.random.default_rng(2).uniform(-1.6, 1.6, (50, len(NAMES)))
    networks = {name: leaf for name, leaf in unflatten(params)["outcome"].items() if isinstance(leaf, dict)}
    single = jnp.asarray(inputs, jnp.float32)
    mean, own, shared = jax.vmap(lambda member: apply_member(config, member, single))(networks)  # [K, N], standardised
    theirs = 0.3 + 0.5 * mean, 0.5 * own, 0.5 * shared
    for ours, flax in zip(OutcomeModel(params).members(inputs), theirs, strict=True):
        np.testing.assert_allclose(ours, np.asarray(flax).T, rtol=0, atol=1e-5)
    assert np.ptp(mean, axis=0).min() > 0.01  # members differ


def test_leading_axes_are_single_predictions():
    model = OutcomeModel(make_params())
    inputs = np.random.default_rng(3).uniform(-1.6, 1.6, (3, 2, len(NAMES)))
    together = model.predict(inputs)
    assert together.mean.shape == (3, 2)
    for index in np.ndindex(3, 2):
        alone = model.predict(inputs[index])
        assert alone.mean == pytest.approx(together.mean[index], abs=1e-12)
        assert alone.std == pytest.approx(together.std[index], abs=1e-12)
        assert alone.quantile(0.2) == pytest.approx(together.quantile(0.2)[index], abs=1e-9)


def test_parameters_of_other_parts_are_left_alone():
    inputs = outcome_inputs(make_situation(), CONTROLLER, np)
    alone = OutcomeModel(make_params()).predict(inputs)
    among = OutcomeModel(make_params() | {"network/gate": np.ones(3), "prior/base": np.ones(2)}).predict(inputs)
    assert alone.mean == among.mean


@pytest.mark.parametrize("name", ["target", "temperature", "head/kernel", "hidden_1/bias"])
def test_missing_parameters_are_named(name: str):
    params = make_params()
    del params[PREFIX + name]
    with pytest.raises(InvalidArgumentError, match=f"{PREFIX}{name}"):
        OutcomeModel(params)


def test_members_deviations_and_disagreement_add_up():
    inputs = outcome_inputs(make_situation(), CONTROLLER, np)
    model = OutcomeModel(make_params())
    mean, own, shared = model.members(inputs)
    predicted = model.predict(inputs)
    draws = np.random.default_rng(0).normal(mean, np.sqrt(own**2 + shared**2), (400_000, len(mean)))
    assert predicted.mean == pytest.approx(draws.mean(), abs=5e-3)
    assert predicted.std == pytest.approx(draws.std(), rel=1e-2)


def test_the_temperature_widens_about_the_mean():
    situation = make_situation()
    params = make_params() | {f"{PREFIX}temperature": np.array([3.0, 2.0], np.float32)}
    plain, warm = OutcomeModel(make_params()), OutcomeModel(params)
    for known, factor in ((False, 3.0), (True, 2.0)):
        inputs = outcome_inputs(situation._replace(curve_known=np.array(known)), CONTROLLER, np)
        assert warm.predict(inputs).mean == pytest.approx(plain.predict(inputs).mean, abs=1e-12)
        assert warm.predict(inputs).std == pytest.approx(factor * plain.predict(inputs).std)
        for p in (0.05, 0.5, 0.9):
            apart, wide = (m.predict(inputs).quantile(p) - m.predict(inputs).mean for m in (plain, warm))
            assert wide == pytest.approx(factor * apart, abs=1e-9)


def test_what_a_task_shares_cancels_in_an_improvement():
    inputs = outcome_inputs(make_situation(), CONTROLLER, np)
    model = OutcomeModel(make_params())
    _, own, _ = model.members(inputs)
    with_itself = model.improvement(inputs, inputs)
    assert with_itself.mean == 0.0
    assert with_itself.std == pytest.approx(np.sqrt(2.0 * np.square(own).mean()))
    other = outcome_inputs(make_situation(seed=1), CONTROLLER, np)
    there, back = model.improvement(inputs, other), model.improvement(other, inputs)
    assert there.mean == pytest.approx(model.predict(inputs).mean - model.predict(other).mean)
    assert there.mean == pytest.approx(-back.mean)
    assert there.probability_above(0.0) == pytest.approx(1.0 - back.probability_above(0.0))


# Distribution


@st.composite
def mixtures(draw: st.DrawFn) -> OutcomeDistribution:
    size = draw(st.integers(1, 6))
    means = draw(st.lists(st.floats(-3.0, 3.0), min_size=size, max_size=size))
    stds = draw(st.lists(st.floats(0.01, 2.0), min_size=size, max_size=size))
    return OutcomeDistribution(np.array(means), np.array(stds))


@given(mixtures(), st.floats(0.005, 0.995))
def test_quantiles_are_those_of_scipy(mixture: OutcomeDistribution, p: float):
    def cdf(x: float) -> float:
        return stats.norm.cdf(x, mixture.component_mean, mixture.component_std).mean()

    expected = optimize.brentq(lambda x: cdf(x) - p, -15.0, 15.0, xtol=1e-12)
    found = float(mixture.quantile(p))
    assert cdf(found) == pytest.approx(p, abs=1e-7)
    slope = stats.norm.pdf(expected, mixture.component_mean, mixture.component_std).mean()
    assert found == pytest.approx(expected, abs=1e-7 + 1e-9 / (slope + 1e-12))  # where the CDF is flat, any will do


@given(mixtures(), st.floats(-5.0, 5.0), st.floats(0.0, 3.0))
def test_the_probability_above_falls(mixture: OutcomeDistribution, x: float, step: float):
    above, further = mixture.probability_above(x), mixture.probability_above(x + step)
    assert 0.0 <= further <= above + 1e-15 <= 1.0 + 1e-12
    assert above == pytest.approx(stats.norm.sf(x, mixture.component_mean, mixture.component_std).mean(), abs=1e-12)


def test_one_component_is_a_normal_distribution():
    normal = OutcomeDistribution(np.array([[1.0], [-2.0]]), np.array([[0.5], [2.0]]))
    for p in (0.01, 0.3, 0.975):
        np.testing.assert_allclose(normal.quantile(p), stats.norm.ppf(p, [1.0, -2.0], [0.5, 2.0]), rtol=1e-12)
    np.testing.assert_allclose(normal.interval(0.9), stats.norm.interval(0.9, [1.0, -2.0], [0.5, 2.0]), rtol=1e-12)
    np.testing.assert_array_equal(normal.mean, [1.0, -2.0])
    np.testing.assert_array_equal(normal.std, [0.5, 2.0])


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, float("nan")])
def test_probabilities_and_levels_lie_between_0_and_1(p: float):
    outcome = OutcomeDistribution(np.zeros(2), np.ones(2))
    with pytest.raises(InvalidArgumentError, match="`p`"):
        outcome.quantile(p)
    with pytest.raises(InvalidArgumentError, match="`level`"):
        outcome.interval(p)


@pytest.mark.parametrize("arguments", [{"num_members": 0}, {"hidden_sizes": ()}, {"hidden_sizes": (8, 0)}])
def test_an_architecture_needs_members_and_units(arguments: dict):
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        OutcomeConfig(**arguments)
