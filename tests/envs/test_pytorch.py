"""The PyTorch environment: the same protocol and the same measurements as the JAX one."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from envs.domains import make_domain
from envs.pytorch import PyTorchEnvironment
from envs.recommenders import RECOMMENDERS, Evaluator, MatrixFactorization, TripleSampler
from envs.simulated import SimulatedPrior, simulate
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn import load_controller
from metalearn.controller.actions import Values
from metalearn.controller.config import GROUP_CONTROLLED
from metalearn.meta_training.environment import Environment, Plan
from metalearn.signals import GROUP_STATISTICS
from metalearn.torch import MetaScheduler
from tests.controllers import acting_controller

BUCKET = Bucket(users=256, items=128, interactions=8192, dim=8, batch=64, evaluated=128)
STEPS = 40


@pytest.fixture(scope="module")
def domain():
    prior = SimulatedPrior(users=(200, 200), items=(120, 120), history=(20.0, 20.0))
    return make_domain(simulate(prior, seed=3), name="simulated", split="leave-last-out")


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    return load_controller(acting_controller(tmp_path_factory.mktemp("acting") / "controller.safetensors"))


def _jax_statistics(domain, values, horizon, intervals):
    environment = VectorizedEnvironment(BUCKET)
    task = jax.tree.map(jnp.asarray, make_task(domain, BUCKET))
    state = environment.reset(task, key=jax.random.key(0))
    traced = Values(*(jnp.asarray(value, jnp.float32) for value in values))
    step = jax.jit(environment.step)
    rows = []
    for index in range(intervals):
        plan = Plan(jnp.int32(STEPS), jnp.int32(index * STEPS), jnp.float32(horizon), jnp.bool_(False))
        state, statistics = step(task, state, traced, plan, key=jax.random.key(index + 1))
        rows.append(jax.tree.map(np.asarray, statistics))
    return rows, float(environment.score(task, state))


def _torch_statistics(domain, values, horizon, intervals, single_group=False):
    environment = PyTorchEnvironment(dim=BUCKET.dim, batch_size=BUCKET.batch, max_users=BUCKET.evaluated)
    state = environment.reset(domain, key=0)
    rows = []
    for index in range(intervals):
        plan = Plan(STEPS, index * STEPS, horizon, single_group)
        state, statistics = environment.step(domain, state, values, plan, key=index)
        rows.append(statistics)
    return rows, environment.score(domain, state)


def test_both_environments_fulfil_the_protocol():
    assert isinstance(PyTorchEnvironment(), Environment)
    assert isinstance(VectorizedEnvironment(BUCKET), Environment)


@pytest.mark.parametrize("family", sorted(RECOMMENDERS))
def test_both_environments_have_the_same_families(family):
    assert PyTorchEnvironment(family).family == family
    assert VectorizedEnvironment(replace(BUCKET, learner=family, history=10, content=6, exposures=64)).family == family


@pytest.mark.parametrize("horizon", [8 * STEPS, math.nan])
def test_measurements_agree_with_the_jax_environment(domain, horizon):
    values = Values(np.array([0.02, 0.02]), np.array([0.2, 0.2]), np.array([0.9, 0.9]), 0.1)
    ours, our_score = _torch_statistics(domain, values, horizon, 8)
    theirs, their_score = _jax_statistics(domain, values, horizon, 8)
    # Different draws of batches, initial weights and dropout: interval averages agree, single steps do not.
    for name, tolerance in (
        ("gradient_norm", 0.25),
        ("update_ratio", 0.25),
        ("weight_norm", 0.15),
        ("displacement", 0.25),
        ("touched", 0.1),
    ):
        mine = np.nanmean([getattr(row, name) for row in ours], axis=0)
        other = np.nanmean([getattr(row, name) for row in theirs], axis=0)
        np.testing.assert_allclose(mine, other, rtol=tolerance, err_msg=name)
    cosines = [np.mean([row.gradient_cosine for row in rows], axis=0) for rows in (ours, theirs)]
    np.testing.assert_allclose(*cosines, atol=0.1)
    losses = [np.mean([row.loss_sum / row.steps for row in rows]) for rows in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert abs(our_score - their_score) < 0.08
    assert ours[-1].validation == pytest.approx(float(theirs[-1].validation), abs=0.06)


def test_one_group_is_measured_as_one(domain):
    values = Values(np.array([0.02, 0.02]), np.array([0.2, 0.2]), np.array([0.9, 0.9]), 0.0)
    rows, _ = _torch_statistics(domain, values, 2.0 * STEPS, 2, single_group=True)
    assert np.isfinite(rows[-1].gradient_norm[0]) and np.isnan(rows[-1].gradient_norm[1])


def test_a_diverged_run_scores_no_better_than_chance(domain):
    torch.manual_seed(0)
    values = Values(np.array([1e37, 1e37]), np.array([0.0, 0.0]), np.array([0.9, 0.9]), 0.0)
    rows, score = _torch_statistics(domain, values, 4.0 * STEPS, 4)
    assert rows[-1].nonfinite > 0
    assert rows[-1].validation == 0.0
    assert score < 0.2


def _controlled(decision, groups=2):
    """What a decision says, in the protocol's terms."""
    rows = (decision.groups * groups)[:groups]
    columns = (np.array([row[name] for row in rows]) for name in GROUP_CONTROLLED)
    return Values(*columns, decision.run["dropout"])


@pytest.mark.parametrize("single_group", [False, True])
@pytest.mark.parametrize("told", [True, False])
def test_a_controller_steers_a_whole_episode(domain, controller, told, single_group):
    environment = PyTorchEnvironment(dim=4, batch_size=32, max_users=50)
    intervals, groups = controller.config.num_decisions, 1 if single_group else 2
    horizon = 10 * intervals if told else None
    session = controller.start(
        domain.profile, roles=("embedding",) * groups, horizon=horizon, batch_size=32, interval=10
    )
    state = environment.reset(domain, key=0)
    random_state = torch.get_rng_state()
    first = environment.score(domain, state)
    for index in range(intervals):
        plan = Plan(10, 10 * index, math.nan if horizon is None else horizon, single_group)
        values = _controlled(session.ask())
        if single_group:  # the first value holds for all
            values = values._replace(learning_rate=np.array([values.learning_rate[0], math.nan]))
        state, statistics = environment.step(domain, state, values, plan, key=index)
        measured = {name: getattr(statistics, name)[:groups] for name in GROUP_STATISTICS}
        session.tell(statistics._replace(**measured))
    assert session.ask().index == intervals
    assert session.ask().groups != controller.start(domain.profile, roles=("embedding",) * groups).ask().groups
    assert first == 0.0 < environment.score(domain, state)
    assert torch.equal(torch.get_rng_state(), random_state)  # seeds are the environment's own affair


def test_it_is_the_run_that_a_meta_scheduler_steers(domain, controller):
    """The same seeds in a practitioner's loop: the same decisions."""
    environment = PyTorchEnvironment(dim=4, batch_size=32, max_users=50)
    session = controller.start(
        domain.profile, roles=("embedding",) * 2, horizon=10 * controller.config.num_decisions, batch_size=32
    )
    state = environment.reset(domain, key=0)
    model = MatrixFactorization(domain.num_users, domain.num_items, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameter_groups())
    scheduler = MetaScheduler(
        optimizer, model=model, domain=domain.profile, horizon=session.horizon, batch_size=32, controller=controller
    )
    sampler, validate = TripleSampler(domain.train, 32, seed=0), Evaluator(domain, "validation", max_users=50)
    for index in range(5):
        assert scheduler.decision.groups == session.ask().groups
        plan = Plan(10, 10 * index, session.horizon, False, controller.config.decay_to)
        state, statistics = environment.step(domain, state, _controlled(session.ask()), plan, key=index)
        session.tell(statistics)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            while not scheduler.should_validate:
                loss = model(*sampler.next())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step(loss)
        scheduler.report(validate(model).mean_ndcg)
    assert torch.equal(model.user.weight, state.model.user.weight)
