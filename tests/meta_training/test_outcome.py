"""Fitting the outcome model: on episodes whose outcome is known to be linear and Gaussian, domains held out whole."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from metalearn.controller.actions import Values
from metalearn.controller.config import CONTROLLED, GROUP_CONTROLLED, ControllerConfig
from metalearn.controller.observation import DESCRIPTORS, Normalizer
from metalearn.controller.outcome import (
    FLOOR_KNOWN,
    METRIC_OFFSET,
    OutcomeConfig,
    OutcomeDistribution,
    OutcomeModel,
    input_names,
    relative_metric,
)
from metalearn.errors import InvalidArgumentError
from metalearn.meta_training import calibration, outcome_rows, warm_start
from metalearn.meta_training import outcome as fitting
from metalearn.meta_training.outcome import OutcomeFitConfig, fit_outcome
from metalearn.meta_training.rollout import NONFINITE_PENALTY, Episode, PolicyParams, Prior
from metalearn.meta_training.runner import CHUNK, RolloutRunner, make_chunk
from metalearn.signals import GLOBAL_FEATURES, GROUP_FEATURES
from tests.meta_training.toy import ToyPool, ToyTask

CONTROLLER = ControllerConfig(descriptors=DESCRIPTORS, families=("matrix_factorization",), num_decisions=3)
NAMES = input_names(CONTROLLER)
CONFIG = OutcomeConfig(num_members=3, hidden_sizes=(24, 24))
SETTINGS = OutcomeFitConfig(
    blocks=8, steps_per_evaluation=50, max_evaluations=25, patience=4, learning_rate=5e-3, descriptor_noise=0.05
)
DOMAINS = 60
"""Of every fit, so that one program serves them all."""
PRIOR = Prior(
    np.full((2, 2, len(CONTROLLED)), 0.5, np.float32),
    Normalizer(  # the identity on [-1, 1]
        *(
            np.tile(np.linspace(-1.0, 1.0, 17, dtype=np.float32), (size, 1))
            for size in (len(DESCRIPTORS), len(GROUP_FEATURES), len(GLOBAL_FEATURES))
        )
    ),
)
FLOOR = 0.05
LEVEL, NOISE, CURVE_NOISE = 0.2, 0.1, 0.05
"""Standard deviations: of what a task's outcomes share, of a run's own luck, and of what the first validation tells."""


class Made(NamedTuple):
    """Synthetic episodes and what is known of them."""

    episodes: Episode
    domains: list[str]
    expected: np.ndarray
    """[N] mean outcome given descriptors and configuration"""


def make_episodes(num_domains: int, seed: int, *, prefix: str = "domain") -> Made:
    """Draw domains of two tasks of eight episodes each.

    The outcome goes with the first descriptor, the learning rate and the dropout; the rest is luck, of the task and of
    the run. A validation tells most of it to whoever knows the floor.
    """
    rng = np.random.default_rng(seed)
    count, decisions = 2 * CHUNK * num_domains, CONTROLLER.num_decisions
    task = np.repeat(np.arange(2 * num_domains), CHUNK)
    descriptors = rng.uniform(-1.0, 1.0, (2 * num_domains, len(DESCRIPTORS)))[task].astype(np.float32)
    start = rng.uniform(0.2, 0.8, (count, len(CONTROLLED)))
    shift = (start - 0.5) / [reach.start for reach in CONTROLLER.reach]
    expected = 0.4 * descriptors[:, 0] + 0.2 * shift[:, 0] - 0.3 * shift[:, 3]
    shared = rng.normal(0.0, LEVEL, 2 * num_domains)[task]
    outcome = expected + shared + rng.normal(0.0, NOISE, count)

    def metric(relative: np.ndarray) -> np.ndarray:
        return (FLOOR + METRIC_OFFSET) * np.exp(relative) - METRIC_OFFSET

    validation = np.repeat(metric(outcome + rng.normal(0.0, CURVE_NOISE, count))[:, None], decisions, axis=1)
    reward = np.zeros((count, decisions))
    reward[:, 0] = np.log((validation[:, 0] + METRIC_OFFSET) / METRIC_OFFSET)
    reward[:, -1] = outcome - relative_metric(validation[:, 0], FLOOR, np)
    decoded = [CONTROLLER.space[name].decode(start[:, index]) for index, name in enumerate(CONTROLLED)]
    in_force = [np.repeat(value[:, None], decisions, axis=1) for value in decoded]
    episodes = Episode(
        descriptors=descriptors,
        family=np.ones(count, np.int32),
        group=np.zeros((count, decisions - 1, 1, len(GROUP_FEATURES)), np.float32),
        run=np.zeros((count, decisions - 1, len(GLOBAL_FEATURES)), np.float32),
        role=np.zeros((count, 1), np.int32),
        group_mask=np.ones((count, 1), np.float32),
        start_action=np.zeros((count, len(CONTROLLED))),
        group_action=np.zeros((count, decisions - 1, 1, len(GROUP_CONTROLLED))),
        run_action=np.zeros((count, decisions - 1, 1)),
        reward=reward,
        score=metric(outcome),
        floor=np.full(count, FLOOR, np.float32),
        validation=validation,
        values=Values(*(value[..., None] for value in in_force[:3]), in_force[3]),
    )
    return Made(episodes, [f"{prefix} {index // 2}" for index in task], expected)


def fit(made: Made, **arguments: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arguments = {"config": CONFIG, "settings": SETTINGS, "seed": 0} | arguments
    with jax.numpy_dtype_promotion("standard"):
        return fit_outcome(made.episodes, made.domains, CONTROLLER, PRIOR, **arguments)


@pytest.fixture(scope="module")
def first_fit() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return fit(make_episodes(DOMAINS, 0))


@pytest.fixture(scope="module")
def fitted(first_fit: tuple[dict[str, np.ndarray], dict[str, Any]]) -> OutcomeModel:
    return OutcomeModel(first_fit[0])


@pytest.fixture(scope="module")
def unseen() -> Made:
    return make_episodes(100, 1, prefix="unseen")


@pytest.fixture(scope="module")
def rows(unseen: Made) -> outcome_rows.OutcomeRows:
    return outcome_rows.outcome_rows(unseen.episodes, CONTROLLER, PRIOR)


# What is learnt


def test_the_mean_is_recovered_on_unseen_domains(fitted: OutcomeModel, unseen: Made, rows: outcome_rows.OutcomeRows):
    error = fitted.predict(rows.inputs[:, 0]).mean - unseen.expected
    assert np.sqrt(np.mean(error**2)) < 0.4 * unseen.expected.std()


def test_intervals_cover_what_they_say_on_unseen_domains(fitted: OutcomeModel, unseen: Made):
    found = calibration.measure_calibration(fitted, unseen.episodes, CONTROLLER, PRIOR)
    for situation in ("start", "run", "run_without_floor"):
        for level, covered in found[situation]["coverage"].items():
            # 200 tasks, whose runs share most of their luck: two standard errors of a share are 0.07.
            assert covered == pytest.approx(int(level) / 100, abs=0.09), (situation, level)
        assert found[situation]["rmse"] < found[situation]["rmse_of_mean"]
    assert found["start"]["spearman"] > 0.6  # luck is a third of what differs within a task
    assert found["run"]["spearman"] > 0.85
    assert found["run"]["crps"] < 0.7 * found["start"]["crps"]


def test_the_floor_tells_apart_what_the_run_shares(fitted: OutcomeModel, rows: outcome_rows.OutcomeRows):
    start, run = fitted.predict(rows.inputs[:, 0]).std.mean(), fitted.predict(rows.inputs[:, 1]).std.mean()
    blind = fitted.predict(outcome_rows.withhold_floor(rows.inputs[:, 1])).std.mean()
    assert run < 0.75 * start
    assert blind > 0.8 * start  # nothing else in these episodes tells


def test_luck_of_task_and_run_are_told_apart(fitted: OutcomeModel, rows: outcome_rows.OutcomeRows):
    _, own, shared = fitted.members(rows.inputs[:, 0])
    assert own.mean() == pytest.approx(NOISE, rel=0.4)
    assert shared.mean() == pytest.approx(LEVEL, rel=0.4)


def test_an_improvement_is_far_more_certain_than_an_outcome(fitted: OutcomeModel, rows: outcome_rows.OutcomeRows):
    one, other = rows.inputs[::2, 0], rows.inputs[1::2, 0]  # of one task
    predicted = fitted.improvement(one, other)
    assert predicted.std.mean() < 0.75 * fitted.predict(one).std.mean()
    real = rows.outcome[::2] - rows.outcome[1::2]
    low, high = predicted.interval(0.8)
    assert ((low < real) & (real < high)).mean() == pytest.approx(0.8, abs=0.12)
    better = predicted.probability_above(0.0)
    assert (real[better > 0.9] > 0).mean() > 0.85
    assert (real[better < 0.1] < 0).mean() > 0.85


def test_it_knows_less_far_outside(fitted: OutcomeModel, rows: outcome_rows.OutcomeRows):
    inside = rows.inputs[:200, 0]
    outside = inside.copy()
    outside[:, [NAMES.index(f"start_{name}") for name in CONTROLLED]] *= 12.0
    means = [fitted.members(inputs)[0].std(-1).mean() for inputs in (inside, outside)]
    assert means[1] > 3.0 * means[0]
    assert fitted.predict(outside).std.mean() > 1.3 * fitted.predict(inside).std.mean()


# The fit


def test_the_fit_is_a_function_of_the_seed(first_fit: tuple[dict[str, np.ndarray], dict[str, Any]]):
    one, record = first_fit
    (same, again), (other, _) = fit(make_episodes(DOMAINS, 0)), fit(make_episodes(DOMAINS, 0), seed=1)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert record == again
    assert not np.array_equal(one["outcome/head/kernel"], other["outcome/head/kernel"])


def test_parameters_are_those_of_the_architecture(first_fit: tuple[dict[str, np.ndarray], dict[str, Any]]):
    params, record = first_fit
    assert {name: value.shape for name, value in params.items()} == CONFIG.shapes(CONTROLLER)
    assert all(value.dtype == np.float32 for value in params.values())
    assert record["domains"] == {"training": 48, "validation": 12}
    assert record["episodes"] == {"training": 48 * 16, "validation": 12 * 16}
    json.dumps(record, allow_nan=False)


class Split(Exception):
    """Raised where members would be fitted."""


@pytest.mark.parametrize("named", [None, ["domain 4"]])
def test_no_domain_is_on_both_sides(monkeypatch: pytest.MonkeyPatch, named: list[str] | None):
    def stop(rows, outcome, names, held_out, *arguments):
        raise Split(list(zip(names.tolist(), held_out.tolist(), strict=True)))

    monkeypatch.setattr(fitting, "_fit_members", stop)
    with pytest.raises(Split) as caught:
        fit(make_episodes(10, 3), validation_domains=named)
    sides = set(caught.value.args[0])
    assert len(sides) == 10  # each name with one side only
    held_out = [name for name, side in sides if side]
    assert held_out == named if named else len(held_out) == 2


def test_it_stops_where_unseen_domains_gain_no_more():
    made = make_episodes(DOMAINS, 4)
    rng = np.random.default_rng(0)
    nothing = rng.normal(0.0, 0.3, len(made.domains))  # outcomes that go with nothing, to be learnt by heart
    score = (FLOOR + METRIC_OFFSET) * np.exp(nothing) - METRIC_OFFSET
    reward = made.episodes.reward.copy()
    reward[:, -1] = nothing - relative_metric(made.episodes.validation[:, -1], FLOOR, np)
    by_heart = made._replace(episodes=made.episodes._replace(score=score, reward=reward))
    _, record = fit(by_heart)
    assert record["evaluations"] < SETTINGS.max_evaluations
    assert record["evaluations"] == max(record["steps"]) // SETTINGS.steps_per_evaluation + SETTINGS.patience


@pytest.mark.parametrize("held_out", [["elsewhere"], [f"domain {index}" for index in range(4)]])
def test_both_sides_need_a_domain(held_out: list[str]):
    with pytest.raises(InvalidArgumentError, match="`validation_domains`"):
        fit(make_episodes(4, 5), validation_domains=held_out)


def test_too_few_domains_are_refused():
    with pytest.raises(InvalidArgumentError, match="at least 2"):
        fit(make_episodes(2, 5))


def test_every_episode_needs_a_domain():
    made = make_episodes(4, 5)
    with pytest.raises(InvalidArgumentError, match="`domains`"):
        fit(made._replace(domains=made.domains[1:]))


# Likelihood and score


def test_the_likelihood_is_that_of_a_multivariate_normal():
    rng = np.random.default_rng(0)
    mean, outcome = rng.normal(size=(2, 5))
    own, shared = rng.uniform(0.2, 2.0, (2, 5))
    for mask in (np.ones(5), np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.eye(5)[2]):
        there = mask > 0
        covariance = np.diag(own[there] ** 2) + np.outer(shared[there], shared[there])
        expected = -stats.multivariate_normal(mean[there], covariance).logpdf(outcome[there]) / there.sum()
        single = (value.astype(np.float32) for value in (mean, own, shared, outcome, mask))
        assert 0.5 * float(sum(fitting.block_terms(*single))) == pytest.approx(expected, rel=1e-4)


def test_the_score_is_the_integral_of_the_squared_difference_of_distributions():
    predicted = OutcomeDistribution(np.array([0.0, 1.0, -0.5]), np.array([0.3, 0.1, 1.0]))
    for outcome in (-1.0, 0.2, 3.0):
        below, above = (
            integrate.quad(lambda x, past=past: (past - predicted.probability_above(x)) ** 2, *bounds, limit=200)[0]
            for past, bounds in ((1.0, (-10.0, outcome)), (0.0, (outcome, 10.0)))
        )
        assert calibration.crps(predicted, np.array(outcome)) == pytest.approx(below + above, abs=1e-5)


def test_rank_correlations_are_those_of_scipy_where_nothing_ties_throughout():
    rng = np.random.default_rng(0)
    predicted, outcome = rng.normal(size=(9, 2)), rng.normal(size=9).round(1)
    predicted[:4, 1] = outcome[4:8] = 0.0
    tasks = [np.arange(4), np.arange(4, 8), np.array([8])]
    expected = stats.spearmanr(predicted[:4, 0], outcome[:4]).statistic
    assert calibration._spearman(predicted, outcome, tasks) == pytest.approx(expected)
    assert np.isnan(calibration._spearman(predicted, outcome, tasks[1:]))


# Rows


class Pool(ToyPool):
    """Toy tasks whose two floors differ."""

    @property
    def tasks(self) -> ToyTask:
        return super().tasks._replace(validation_floor=np.array([0.03, 0.08], np.float32))


TASK, TOLD = np.arange(CHUNK) % 2, np.arange(CHUNK) % 4 < 2


@pytest.fixture(scope="module")
def rolled(config: ControllerConfig, acting: PolicyParams, prior: Prior) -> tuple[Episode, np.ndarray]:
    """Episodes of an acting policy from forced starts, half of them of an unknown horizon."""
    starts = warm_start.draw_configurations(CHUNK, config, None, np.random.default_rng(0))
    starts[:, -1] = np.maximum(starts[:, -1], 0.3)  # a dropout that no residual takes to 0, where it would be cut off
    chunk = make_chunk(0, 4, task=TASK, initialization=7, horizon_told=TOLD, start=starts, num_start=len(CONTROLLED))
    (episodes,) = RolloutRunner([Pool()], config).run([chunk], acting, prior, explore=1.0)
    return episodes, starts


def test_the_floor_follows_from_the_rewards(rolled: tuple[Episode, np.ndarray]):
    np.testing.assert_allclose(outcome_rows.validation_floor(rolled[0]), np.array([0.03, 0.08])[TASK], rtol=1e-4)


def test_penalties_are_no_part_of_the_floor():
    episodes = make_episodes(1, 6).episodes
    run, reward = episodes.run.copy(), episodes.reward.copy()
    run[0, 1, GLOBAL_FEATURES.index("loss_not_finite")] = 1.0
    reward[0, 1] -= NONFINITE_PENALTY
    found = outcome_rows.validation_floor(episodes._replace(run=run, reward=reward))
    np.testing.assert_allclose(found, FLOOR, rtol=1e-6)


def test_simulated_domains_are_told_apart():
    pools = [
        SimpleNamespace(names=("movies", "simulated", "simulated")),
        SimpleNamespace(names=("simulated", "movies")),
    ]
    chunks = [make_chunk(index, 4, task=TASK, initialization=0, num_start=len(CONTROLLED)) for index in range(2)]
    names = outcome_rows.episode_domains(SimpleNamespace(pools=pools), chunks)  # type: ignore[arg-type]
    assert names == ["movies", "simulated/0/1"] * 4 + ["simulated/1/0", "movies"] * 4


def test_rows_of_rollouts(rolled: tuple[Episode, np.ndarray], config: ControllerConfig, prior: Prior):
    episodes, starts = rolled
    rows = outcome_rows.outcome_rows(episodes, config, prior)
    names = input_names(config)
    assert rows.inputs.shape == (CHUNK, config.num_decisions, len(names))
    assert np.isfinite(rows.inputs).all()

    def column(name: str) -> np.ndarray:
        return rows.inputs[:, :, names.index(name)]

    np.testing.assert_array_equal(column("curve_known"), np.tile(np.arange(config.num_decisions) > 0, (CHUNK, 1)))
    np.testing.assert_array_equal(column("floor_known"), column("curve_known"))
    np.testing.assert_array_equal(column("horizon_known")[:, 0], TOLD)
    for index, name in enumerate(CONTROLLED):
        shift = (starts[:, index] - prior.base[0, TOLD.astype(int), index]) / config.reach[index].start
        np.testing.assert_allclose(column(f"start_{name}"), np.tile(shift[:, None], config.num_decisions), atol=1e-4)
        assert not column(f"residual_{name}")[:, 0].any()
        assert column(f"residual_{name}")[:, 1:].any()
    # What the features say of an interval is what was in force in it: one decision earlier.
    told = episodes.run[:, :, GLOBAL_FEATURES.index("dropout_residual")]
    np.testing.assert_allclose(column("residual_dropout")[:, :-1], told, atol=1e-4)
    best = np.maximum.accumulate(episodes.validation, axis=1)[:, :-1]
    expected = relative_metric(best, np.array([0.03, 0.08])[TASK, None], np)
    np.testing.assert_allclose(column("validation_above_popularity")[:, 1:], expected, atol=1e-4)
    assert len(np.unique(rows.task)) == 4  # two tasks, the horizon known or not


def test_a_run_that_reported_nothing_has_no_validation():
    made = make_episodes(1, 6)
    run = made.episodes.run.copy()
    run[0, 0, GLOBAL_FEATURES.index("validation_missing")] = 1.0
    run[1, :, GLOBAL_FEATURES.index("validation_missing")] = 1.0
    rows = outcome_rows.outcome_rows(made.episodes._replace(run=run), CONTROLLER, PRIOR)
    assert rows.inputs[:3, :, FLOOR_KNOWN].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_a_lost_run_has_the_outcome_of_no_metric_and_no_floor():
    made = make_episodes(1, 6)
    score, reward = made.episodes.score.copy(), made.episodes.reward.copy()
    score[0] = reward[0, -1] = np.nan
    rows = outcome_rows.outcome_rows(made.episodes._replace(score=score, reward=reward), CONTROLLER, PRIOR)
    assert rows.outcome[0] == pytest.approx(np.log(METRIC_OFFSET / (FLOOR + METRIC_OFFSET)))
    assert np.isfinite(rows.inputs).all()
    assert not rows.inputs[0, :, FLOOR_KNOWN].any()
