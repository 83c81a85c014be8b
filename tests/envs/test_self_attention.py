"""Self-attention reads the past only, is blind to padding, and learns an order that matrix factorisation cannot see."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from envs.domains import make_domain
from envs.learners import Shape, TrainingData
from envs.learners import self_attention as learners
from envs.recommenders import Evaluator, SelfAttention, SequenceSampler
from envs.vectorized import Bucket, VectorizedEnvironment, make_task
from metalearn.controller.actions import Values
from metalearn.errors import InvalidArgumentError
from metalearn.interactions import Interactions
from metalearn.meta_training.environment import Plan
from metalearn.torch.bindings import dropout_modules
from tests.envs.twins import copy_weights

ITEMS, LENGTH, DIM = 9, 6, 4
USER = np.array([0, 1, 0, 0, 2, 1, 0, 0, 0, 0], np.int32)
ITEM = np.array([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], np.int32)
HISTORY = np.array(
    [
        [3, 4, 7, 8, 1, 2],  # the first item fell out
        [-1, -1, -1, -1, 2, 6],
        [-1, -1, -1, -1, -1, 5],
        [-1, -1, -1, -1, -1, -1],  # a user without training items
    ],
    np.int32,
)

encode = jax.jit(learners.encode)


def _interactions() -> Interactions:
    return Interactions(user=USER, item=ITEM, num_users=4, num_items=ITEMS)


@pytest.fixture(scope="module")
def learner():
    return learners.SelfAttention(shape=Shape(4, ITEMS, LENGTH, 0), dim=DIM, batch=3)


@pytest.fixture(scope="module")
def data():
    return TrainingData(
        user=jnp.asarray(USER),
        item=jnp.asarray(ITEM),
        first_row=jnp.float32(0),
        num_rows=jnp.float32(len(USER)),
        num_users=jnp.int32(4),
        num_items=jnp.int32(ITEMS),
        history=jnp.asarray(HISTORY),
        content=jnp.zeros((ITEMS, 0)),
        exposed_user=jnp.zeros(1, jnp.int32),
        exposed_item=jnp.zeros(1, jnp.int32),
        num_exposures=jnp.float32(0),
    )


@pytest.fixture(scope="module")
def params(learner, data):
    """Every leaf drawn at random: zeros and ones would hide what is left out."""
    leaves, structure = jax.tree.flatten(jax.jit(learner.init)(data, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(leaf + rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


@pytest.fixture
def model(params):
    model = SelfAttention(_interactions(), DIM, history=LENGTH)
    copy_weights(params, model)
    return model.eval()


def _by_hand(params, items: list[int]) -> np.ndarray:
    """The state after the last of some items: loops over positions, and no padding anywhere."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    position = params.position[len(params.position) - len(items) :]

    def norm(which, vector):
        centred = vector - vector.mean()
        return centred / np.sqrt((centred**2).mean() + 1e-5) * which.scale + which.shift

    x = [math.sqrt(DIM) * params.item[item] + position[t] for t, item in enumerate(items)]
    for block in params.blocks:
        parts = [block.project @ norm(block.attention_norm, vector) for vector in x]
        attended = []
        for t, part in enumerate(parts):
            weights = [math.exp(part[:DIM] @ parts[s][DIM : 2 * DIM] / math.sqrt(DIM)) for s in range(t + 1)]
            values = [weight * parts[s][2 * DIM :] for s, weight in enumerate(weights)]
            attended.append(block.out @ (np.sum(values, axis=0) / sum(weights)))
        x = [vector + other for vector, other in zip(x, attended, strict=True)]
        for t, vector in enumerate(x):
            hidden = block.inner @ norm(block.feedforward_norm, vector) + block.inner_shift
            activated = np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in hidden])
            x[t] = vector + block.outer @ activated + block.outer_shift
    return norm(params.norm, x[-1])


def test_scores_are_those_of_loops_without_padding(learner, data, params, model):
    expected = np.stack([_by_hand(params, items) @ np.asarray(params.item).T for items in ([4, 7, 8, 1, 2], [2, 6])])
    users = np.array([0, 1])
    np.testing.assert_allclose(learner.scores(params, data, jnp.asarray(users)), expected, atol=1e-5)
    np.testing.assert_allclose(model.score(torch.from_numpy(users)), expected, atol=1e-5)


def test_loss_by_hand(learner, data):
    """With branches that add nothing the state is the norm of √D · e: (1, -1) for an item at (c, -c)."""
    learner = replace(learner, shape=Shape(1, 3, 3, 0), dim=2, batch=1)
    params = jax.tree.map(jnp.zeros_like, jax.eval_shape(learner.init, data, key=jax.random.key(0)))
    table = jnp.array([[1.0, -1.0], [0.5, -0.25], [0.0, 2.0]])
    params = params._replace(item=table, norm=learners.Norm(jnp.ones(2), jnp.zeros(2)))
    sequence, negative = np.array([[-1, 0, 1]], np.int32), np.array([[1, 2]], np.int32)
    # Only the second position counts. <h, e_1> = 0.5 + 0.25 = 0.75, <h, e_2> = -2:
    # softplus(-0.75) + softplus(-2) = 0.386871 + 0.126928
    batch = learners.Batch(jnp.asarray(sequence), jnp.asarray(negative), jnp.ones((3, 1, 2, 2)))
    assert float(jax.jit(learner.loss)(params, data, batch)) == pytest.approx(0.513799, abs=1e-5)
    model = SelfAttention(Interactions(user=USER[:1], item=ITEM[:1], num_users=2, num_items=3), 2, history=3)
    copy_weights(params, model)
    assert model(torch.from_numpy(sequence), torch.from_numpy(negative)).item() == pytest.approx(0.513799, abs=1e-5)


@pytest.mark.parametrize("changed", range(1, LENGTH - 1))
def test_a_later_item_changes_nothing_before_it(params, model, changed):
    sequence = HISTORY[:1, 1:].copy()
    other = sequence.copy()
    other[0, changed] = 0
    valid = jnp.ones((1, LENGTH - 1), bool)
    for mine, theirs in (
        (encode(params, params.item[s], valid) for s in (sequence, other)),
        (model.encode(torch.from_numpy(s)).detach().numpy() for s in (sequence, other)),
    ):
        difference = np.abs(np.asarray(mine) - np.asarray(theirs))[0].max(-1)
        assert not difference[:changed].any()
        assert (difference[changed:] > 1e-4).all()  # and everything after it


def test_padding_has_no_influence(learner, data, params, model):
    valid = jnp.asarray(HISTORY[1:2, 1:] >= 0)
    vectors = params.item[jnp.maximum(HISTORY[1:2, 1:], 0)]
    other = jnp.where(valid[..., None], vectors, 7.0)
    states = [np.asarray(encode(params, v, valid))[0, -2:] for v in (vectors, other)]
    np.testing.assert_array_equal(states[0], states[1])
    # item 0 stands where there is none: it is in no sequence here, and gets no gradient
    batch = learners.Batch(jnp.asarray(HISTORY[1:]), jnp.full((3, LENGTH - 1), 3), jnp.ones((3, 3, LENGTH - 1, DIM)))
    gradient = jax.jit(jax.grad(learner.loss))(params, data, batch).item
    assert not gradient[0].any() and gradient[2].any() and gradient[6].any() and gradient[3].any()
    model(torch.from_numpy(HISTORY[1:]), torch.full((3, LENGTH - 1), 3)).backward()
    np.testing.assert_allclose(model.item.weight.grad, gradient, atol=1e-6)


def test_users_without_items_are_scored_and_learn_nothing(learner, data, params, model):
    users = np.array([3, -1])
    assert np.isfinite(learner.scores(params, data, jnp.asarray(users))).all()
    assert torch.isfinite(model.score(torch.from_numpy(users))).all()
    sequence, negative = HISTORY[2:], np.zeros((2, LENGTH - 1), np.int32)
    batch = learners.Batch(jnp.asarray(sequence), jnp.asarray(negative), jnp.ones((3, 2, LENGTH - 1, DIM)))
    loss, gradient = jax.jit(learner.loss_and_gradient)(params, data, batch)
    assert float(loss) == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # neither NaN nor anything else
    assert model(torch.from_numpy(sequence), torch.from_numpy(negative)).item() == 0.0


def test_batches_are_the_sequences_of_rows(learner, data):
    uniforms = jnp.linspace(0.0, 0.999, learner.num_uniforms)
    batch = learner.draw(data, uniforms, jnp.ones(learner.num_keep))
    rows = (np.asarray(uniforms[:3]) * len(USER)).astype(int)
    np.testing.assert_array_equal(batch.sequence, HISTORY[USER[rows]])
    assert batch.negative.shape == (3, LENGTH - 1) and 0 <= batch.negative.min() <= batch.negative.max() < ITEMS


def test_the_sampler_takes_every_rows_user_once_an_epoch_and_resumes(model):
    interactions = _interactions()
    sampler = SequenceSampler(interactions, model.history, 5, seed=0)
    drawn = torch.cat([sampler.next()[0] for _ in range(2)]).numpy()
    expected = HISTORY[USER]
    np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
    state = sampler.state_dict()
    wanted = sampler.next()
    other = SequenceSampler(interactions, model.history, 5, seed=1)
    other.load_state_dict(state)
    for mine, theirs in zip(other.next(), wanted, strict=True):
        assert torch.equal(mine, theirs)
    negatives = torch.cat([sampler.next()[1].flatten() for _ in range(200)])
    counts = torch.bincount(negatives, minlength=ITEMS)
    assert len(counts) == ITEMS  # 5000 / 9 = 556 each, standard deviation 22
    assert (counts - 556).abs().max() < 110


def test_the_module_is_one_that_practitioners_expect(model):
    assert len(dropout_modules(model)) == 2 and all(isinstance(m, nn.Dropout) for m in dropout_modules(model))
    assert not {"history", "causal", "diagonal"} & set(model.state_dict())
    grouped = {id(p) for group in model.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters()}
    twice = [
        SelfAttention(_interactions(), DIM, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(twice[0][name], twice[1][name]) for name in twice[0])
    for name in ("item.weight", "position.weight", "blocks.0.project.weight", "blocks.0.outer.weight"):
        assert not torch.equal(twice[0][name], twice[2][name])


@pytest.mark.parametrize("history", [0, 1])
def test_histories_too_short_are_refused(history):
    with pytest.raises(InvalidArgumentError, match="`history` must be"):
        learners.SelfAttention(shape=Shape(4, ITEMS, history, 0))
    with pytest.raises(InvalidArgumentError, match=f"`history` must be at least 2, got {history}"):
        SelfAttention(_interactions(), DIM, history=history)


@pytest.fixture(scope="module")
def ring():
    """Every user walks along a ring of 30 items, from anywhere: all items are equally popular, and order is all.

    By chance NDCG@10 is about 0.19: 4.54 / 24 items that are not seen.
    """
    user, step = np.repeat(np.arange(150), 8), np.tile(np.arange(8), 150)
    item = (np.random.default_rng(0).integers(30, size=150)[user] + step) % 30
    walks = Interactions.from_arrays(user, item, timestamp=step.astype(float))
    return make_domain(walks, name="ring", split="leave-last-out")


def test_it_learns_which_item_follows_which(ring):
    torch.manual_seed(0)
    model = SelfAttention(ring.train, 8, history=6, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=0.01)
    sampler = model.sampler(ring, 32, seed=0)
    for _ in range(400):
        loss = model(*sampler.next())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert Evaluator(ring, "validation")(model).mean_ndcg > 0.9


@pytest.mark.slow
def test_it_learns_which_item_follows_which_in_jax(ring):
    bucket = Bucket(
        users=160, items=32, interactions=1024, dim=8, batch=32, evaluated=150, learner="self_attention", history=6
    )
    task = jax.tree.map(jnp.asarray, make_task(ring, bucket))
    environment = VectorizedEnvironment(bucket)
    values = Values(jnp.full(2, 0.01), jnp.full(2, 0.01), jnp.full(2, 0.9), jnp.float32(0.1))
    plan = Plan(jnp.int32(400), jnp.int32(0), jnp.float32(400), jnp.bool_(False))
    state = environment.reset(task, key=jax.random.key(0))
    _, statistics = jax.jit(environment.step)(task, state, values, plan, key=jax.random.key(1))
    assert float(statistics.validation) > 0.9
