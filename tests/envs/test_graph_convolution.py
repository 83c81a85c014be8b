"""Graph convolution propagates as by hand, over the training rows and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from envs.domains import make_domain
from envs.learners import Shape, TrainingData
from envs.learners import graph_convolution as learners
from envs.recommenders import GraphConvolution
from envs.recommenders.graph_convolution import _NeighbourSum
from envs.simulated import SimulatedPrior, simulate
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn.controller.actions import Values
from metalearn.interactions import Interactions
from metalearn.meta_training.environment import Plan
from metalearn.torch.bindings import dropout_modules

USERS, ITEMS, DIM = 7, 5, 3

propagate = jax.jit(learners.propagate)


def _data(user, item, users: int, items: int, first: int = 0, rows: int | None = None) -> TrainingData:
    return TrainingData(
        user=jnp.asarray(user, jnp.int32),
        item=jnp.asarray(item, jnp.int32),
        first_row=jnp.float32(first),
        num_rows=jnp.float32(len(user) if rows is None else rows),
        num_users=jnp.int32(users),
        num_items=jnp.int32(items),
        history=jnp.zeros((users, 0), jnp.int32),
        content=jnp.zeros((items, 0)),
        exposed_user=jnp.zeros(1, jnp.int32),
        exposed_item=jnp.zeros(1, jnp.int32),
        num_exposures=jnp.float32(0),
    )


def _edges(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs without duplicates; the last user and the last item have none."""
    pairs = np.random.default_rng(seed).permutation((USERS - 1) * (ITEMS - 1))[:11]
    return (pairs // (ITEMS - 1)).astype(np.int32), (pairs % (ITEMS - 1)).astype(np.int32)


def _params(seed: int) -> learners.Params:
    rng = np.random.default_rng(seed)
    return learners.Params(*(jnp.asarray(rng.normal(size=(n, DIM)), jnp.float32) for n in (USERS, ITEMS)))


def _model(user, item, params: learners.Params) -> GraphConvolution:
    users, items = len(params.user), len(params.item)
    interactions = Interactions(user=user, item=item, num_users=users, num_items=items)
    model = GraphConvolution(interactions, params.user.shape[1])
    with torch.no_grad():
        model.user.weight.copy_(torch.from_numpy(np.array(params.user)))
        model.item.weight.copy_(torch.from_numpy(np.array(params.item)))
    return model


def _by_dense_matrix(user, item, params: learners.Params) -> tuple[np.ndarray, np.ndarray]:
    """(E + A E + A² E) / 3 with A normalised on both sides, over users and items together."""
    matrix = np.zeros((USERS + ITEMS, USERS + ITEMS))
    matrix[user, USERS + item] = matrix[USERS + item, user] = 1
    root = np.sqrt(np.maximum(matrix.sum(1), 1))
    matrix = matrix / root[:, None] / root
    table = np.concatenate(params)
    table = (table + matrix @ table + matrix @ (matrix @ table)) / 3
    return table[:USERS], table[USERS:]


def test_propagation_by_hand():
    """Edges (0, 0), (0, 1), (1, 0): d_u = (2, 1), d_i = (2, 1); their weights are 1/2, 1/√2, 1/√2."""
    user, item = np.array([0, 0, 1], np.int32), np.array([0, 1, 0], np.int32)
    params = learners.Params(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [5.0]]))
    # layer 1: p_0 = 3/2 + 5/√2 = 5.03553, p_1 = 3/√2 = 2.12132; q_0 = 1/2 + 2/√2 = 1.91421, q_1 = 1/√2 = 0.70711
    # layer 2: p_0 = 1.91421/2 + 0.70711/√2 = 1.45711, p_1 = 1.91421/√2 = 1.35355
    #          q_0 = 5.03553/2 + 2.12132/√2 = 4.01777, q_1 = 5.03553/√2 = 3.56066
    # means:   p_0 = (1 + 5.03553 + 1.45711) / 3, p_1 = (2 + 2.12132 + 1.35355) / 3
    #          q_0 = (3 + 1.91421 + 4.01777) / 3, q_1 = (5 + 0.70711 + 3.56066) / 3
    users, items = [[2.49755], [1.82496]], [[2.97733], [3.08926]]
    mine = propagate(params, _data(user, item, 2, 2))
    np.testing.assert_allclose(mine.user, users, atol=1e-5)
    np.testing.assert_allclose(mine.item, items, atol=1e-5)
    theirs = _model(user, item, params).propagate()
    np.testing.assert_allclose(theirs[0].detach(), users, atol=1e-5)
    np.testing.assert_allclose(theirs[1].detach(), items, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_a_dense_matrix(seed):
    (user, item), params = _edges(seed), _params(seed)
    users, items = _by_dense_matrix(user, item, params)
    everyone = np.arange(-1, USERS)  # -1 is padding: finite, and masked later
    learner = learners.GraphConvolution(shape=Shape(USERS, ITEMS, 0, 0), dim=DIM, batch=2)
    mine = learner.scores(params, _data(user, item, USERS, ITEMS), jnp.asarray(everyone))
    np.testing.assert_allclose(mine[1:], users @ items.T, atol=1e-5)
    assert np.isfinite(mine[0]).all()
    theirs = _model(user, item, params).score(torch.from_numpy(everyone))
    np.testing.assert_allclose(theirs[1:], users @ items.T, atol=1e-5)
    assert torch.isfinite(theirs).all()


def test_who_has_no_rows_keeps_a_third():
    (user, item), params = _edges(0), _params(0)
    mine = propagate(params, _data(user, item, USERS, ITEMS))
    np.testing.assert_allclose(mine.user[-1], params.user[-1] / 3, rtol=1e-6)
    np.testing.assert_allclose(mine.item[-1], params.item[-1] / 3, rtol=1e-6)


def test_the_graph_is_the_window():
    (user, item), params = _edges(1), _params(1)
    inside = propagate(params, _data(user[3:9], item[3:9], USERS, ITEMS))
    windowed = propagate(params, _data(user, item, USERS, ITEMS, first=3, rows=6))
    padded = propagate(params, _data(np.pad(user[3:9], (0, 5)), np.pad(item[3:9], (0, 5)), USERS, ITEMS, 0, 6))
    for other in (windowed, padded):
        np.testing.assert_array_equal(inside.user, other.user)
        np.testing.assert_array_equal(inside.item, other.item)
    whole = propagate(params, _data(user, item, USERS, ITEMS))
    assert np.abs(np.asarray(whole.user - windowed.user)).max() > 0.1


def test_the_product_is_its_own_gradient():
    model = _model(*_edges(2), _params(2)).double()
    table = torch.randn(USERS + ITEMS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = model.neighbour, model.offset, model.weight
    assert torch.autograd.gradcheck(lambda x: _NeighbourSum.apply(x, *graph), table.requires_grad_())


def test_the_module_is_one_that_practitioners_expect():
    user, item = _edges(0)
    interactions = Interactions(user=user, item=item, num_users=USERS, num_items=ITEMS)
    model = GraphConvolution(interactions, DIM, dropout=0.5)
    assert len(dropout_modules(model)) == 1 and all(isinstance(m, nn.Dropout) for m in dropout_modules(model))
    assert set(model.state_dict()) == {"user.weight", "item.weight"}
    twice = [
        GraphConvolution(interactions, DIM, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (0, 0, 1)
    ]
    for name in twice[0]:
        assert torch.equal(twice[0][name], twice[1][name]) and not torch.equal(twice[0][name], twice[2][name])


@pytest.mark.slow
def test_it_learns_a_simulated_domain():
    prior = SimulatedPrior(users=(300, 300), items=(200, 200), history=(25.0, 25.0))
    domain = make_domain(simulate(prior, seed=2), name="simulated", split="leave-last-out")
    bucket = Bucket(
        users=320, items=208, interactions=8192, dim=8, batch=64, evaluated=256, learner="graph_convolution"
    )
    task = jax.tree.map(jnp.asarray, make_task(domain, bucket))
    environment = VectorizedEnvironment(bucket)
    values = Values(jnp.full(2, 0.01), jnp.full(2, 0.1), jnp.full(2, 0.9), jnp.float32(0.1))
    plan = Plan(jnp.int32(400), jnp.int32(0), jnp.float32(400), jnp.bool_(False))
    state = environment.reset(task, key=jax.random.key(0))
    _, statistics = jax.jit(environment.step)(task, state, values, plan, key=jax.random.key(1))
    assert float(statistics.validation) > 4 * 4.54 / domain.num_items  # chance: Σ 1 / log2(rank + 1) = 4.54 over items
