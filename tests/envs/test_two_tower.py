"""Two towers: the loss by hand, its correction for popularity, hits left out, content, and what PyTorch makes of it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from envs.learners import TrainingData
from envs.learners.learner import Shape
from envs.learners.two_tower import Batch, Params, Tower, TwoTower, log_shares
from envs.recommenders.two_tower import PositiveSampler
from envs.recommenders.two_tower import TwoTower as TorchTwoTower
from tests.envs.twins import BATCH, DIM, copy_weights, draw, make_twins, parameters, small_domain

# silu(x) - silu(-x) = x: a tower that changes nothing.
IDENTITY = Tower(
    jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]),
    jnp.zeros(4),
    jnp.array([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]),
    jnp.zeros(2),
)
PARAMS = Params(
    user=jnp.array([[3.0, 4.0], [2.0, 0.0]]),  # vectors (0.6, 0.8) and (1, 0)
    item=jnp.array([[0.0, 2.0], [0.0, 0.0]]),  # vectors (0, 1) and, from content, (1, 0)
    projection=jnp.array([[0.5], [0.0]]),
    user_tower=IDENTITY,
    item_tower=IDENTITY,
)
CONTENT = np.array([[0.0], [4.0]], np.float32)
SCORES = [[4.0, 3.0], [0.0, 5.0]]
"""Cosines ((0.8, 0.6), (0, 1)) over the temperature, 0.2."""
LOG_SHARES = np.log([0.75, 0.25])
ROWS = [[0, 0, 1, 1], [0, 0, 0, 1]]
"""Users and items of the training part: item 0 has 3 of 4 rows."""


@pytest.fixture(scope="module")
def domain():
    return small_domain()


def _data(user=ROWS[0], item=ROWS[1], *, first=0, count=None, content=CONTENT) -> TrainingData:
    return TrainingData(
        user=jnp.array(user, jnp.int32),
        item=jnp.array(item, jnp.int32),
        first_row=jnp.float32(first),
        num_rows=jnp.float32(len(user) if count is None else count),
        num_users=jnp.int32(2),
        num_items=jnp.int32(2),
        history=jnp.zeros((2, 0), jnp.int32),
        content=jnp.asarray(content),
        exposed_user=jnp.zeros(1, jnp.int32),
        exposed_item=jnp.zeros(1, jnp.int32),
        num_exposures=jnp.float32(0),
    )


def _losses(user: list[int], item: list[int]) -> tuple[float, float]:
    """Returns the loss of a batch in JAX and in PyTorch."""
    learner = TwoTower(shape=Shape(2, 2, 0, 1), dim=2, batch=len(user))
    share = jnp.asarray(LOG_SHARES[item], jnp.float32)
    batch = Batch(jnp.array(user), jnp.array(item), share, jnp.ones((2, len(user), 4)))
    model = TorchTwoTower(2, 2, 2, content=torch.from_numpy(CONTENT))
    copy_weights(PARAMS, model)
    theirs = model(torch.tensor(user), torch.tensor(item), torch.tensor(np.asarray(share)))
    return float(learner.loss(PARAMS, _data(), batch)), theirs.item()


def test_loss_by_hand_with_the_correction_for_popularity():
    # Row (0, 0): 4 - ln 0.75 against 3 - ln 0.25, so ln(1 + e^-1 · 0.75 / 0.25) = ln 2.10364 = 0.74367.
    # Row (1, 1): 5 - ln 0.25 against 0 - ln 0.75, so ln(1 + e^-5 · 0.25 / 0.75) = ln 1.0022460 = 0.0022435.
    # Without the correction the first would be ln(1 + e^-1) = 0.31326.
    expected = (0.74367 + 0.0022435) / 2
    assert _losses([0, 1], [0, 1]) == pytest.approx((expected, expected), abs=1e-5)


def test_another_row_of_the_same_item_is_no_negative():
    # Rows (0, 0), (1, 1) and (1, 0): the first and last have one negative each, not two.
    # (1, 1) has two copies of item 0 against it: ln(1 + 2 · e^-5 / 3) = 0.0044819.
    # (1, 0): 0 - ln 0.75 against 5 - ln 0.25, so ln(1 + 3 e^5) = ln 446.239 = 6.10085.
    expected = (0.74367 + 0.0044819 + 6.10085) / 3
    assert _losses([0, 1, 1], [0, 1, 0]) == pytest.approx((expected, expected), abs=1e-4)
    assert _losses([0, 1], [0, 0]) == (0.0, 0.0)  # no negative at all


def test_scores_are_what_the_loss_compares():
    learner = TwoTower(shape=Shape(2, 2, 0, 1), dim=2)
    np.testing.assert_allclose(learner.scores(PARAMS, _data(), jnp.arange(2)), SCORES, atol=1e-5)
    model = TorchTwoTower(2, 2, 2, content=torch.from_numpy(CONTENT))
    copy_weights(PARAMS, model)
    np.testing.assert_allclose(model.score(torch.arange(2)), SCORES, atol=1e-5)


def test_shares_are_of_the_window_alone():
    shares = log_shares(_data(), 3)
    np.testing.assert_allclose(shares, np.log([0.75, 0.25, 0.25]), rtol=1e-6)  # item 2 has none: as if it had one
    # Rows 1 to 2 of a padded table: items 1 and 0, whatever stands before and behind.
    window = _data([0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], first=1, count=2)
    np.testing.assert_allclose(log_shares(window, 2), np.log([0.5, 0.5]), rtol=1e-6)


def test_both_samplers_give_the_shares_of_the_training_rows(domain):
    learner, data, _, _ = make_twins("two_tower", domain)
    expected = np.log(np.bincount(domain.train.item) / len(domain.train))
    batch, _ = draw(learner, data, jax.random.key(0))
    np.testing.assert_allclose(batch.log_share, expected[np.asarray(batch.item)], rtol=1e-5)
    user, item, log_share = PositiveSampler(domain.train, 64, seed=0).next()
    np.testing.assert_allclose(log_share, expected[item], rtol=1e-5)
    pairs = set(zip(domain.train.user.tolist(), domain.train.item.tolist(), strict=True))
    for users, items in ((user, item), (batch.user, batch.item)):
        assert set(zip(users.tolist(), items.tolist(), strict=True)) <= pairs


class _Mask(nn.Module):
    """Stands in for dropout: multiplies by a given mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.mask


def test_dropout_acts_at_the_same_place(domain):
    learner, data, params, model = make_twins("two_tower", domain)
    batch, tensors = draw(learner, data, jax.random.key(0))
    keep = np.where(np.random.default_rng(0).random(batch.keep.shape) < 0.6, 1 / 0.6, 0.0).astype(np.float32)
    for tower, mask in ((model.user_tower, keep[0]), (model.item_tower, keep[1])):
        assert isinstance(tower, nn.Sequential) and isinstance(tower[2], nn.Dropout)
        tower.register_module("2", _Mask(torch.from_numpy(mask)))
    loss = learner.loss(params, data, batch._replace(keep=jnp.asarray(keep)))
    assert float(loss) == pytest.approx(model(*tensors).item(), abs=1e-5)
    assert float(loss) != pytest.approx(float(learner.loss(params, data, batch)), abs=1e-3)


@pytest.mark.parametrize("width", [None, 0])
def test_without_content_there_is_no_projection(width):
    plain = small_domain(content=0)
    if width is None:
        plain = dataclasses.replace(plain, item_content=None)
    learner, data, params, model = make_twins("two_tower", plain)
    assert params.projection is None and model.projection is None and model.content is None
    assert len(jax.tree.leaves(params)) == len(parameters(model)) == 2 + 8
    batch, tensors = draw(learner, data, jax.random.key(0))
    loss, gradient = learner.loss_and_gradient(params, data, batch)
    assert float(loss) == pytest.approx(model(*tensors).item(), abs=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(params) == jax.tree.structure(learner.groups(params))


def test_content_is_a_buffer(domain):
    model = TorchTwoTower.for_domain(domain, dim=DIM, generator=torch.Generator().manual_seed(0))
    assert model.content is not None and torch.equal(model.content, torch.from_numpy(domain.item_content))
    assert "content" in dict(model.named_buffers()) and "content" not in dict(model.named_parameters())
    again = TorchTwoTower.for_domain(domain, dim=DIM, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), parameters(again), strict=True))


def test_first_weights_have_xaviers_spread():
    learner = TwoTower(shape=Shape(400, 300, 0, 50), dim=64)
    data = _data(content=np.zeros((300, 50), np.float32))
    data = data._replace(num_users=jnp.int32(350), num_items=jnp.int32(300))
    params = learner.init(data, key=jax.random.key(0))
    model = TorchTwoTower(350, 300, 64, content=torch.zeros(300, 50))
    assert not np.any(params.user[350:])
    for mine, theirs in zip(jax.tree.leaves(params._replace(user=params.user[:350])), parameters(model), strict=True):
        assert mine.shape == theirs.shape
        expected = math.sqrt(2 / sum(mine.shape)) if mine.ndim > 1 else 0.0
        assert float(mine.std()) == pytest.approx(expected, rel=0.05)
        assert theirs.std().item() == pytest.approx(expected, rel=0.05)


def test_sparse_tables_have_the_same_gradients(domain):
    kinds = []
    for sparse in (False, True):
        model = TorchTwoTower(domain.num_users, domain.num_items, DIM, sparse=sparse, generator=_generator())
        model(*model.sampler(domain, BATCH, seed=0).next()).backward()
        kinds.append([model.user.weight.grad, model.item.weight.grad])
    for dense, sparse in zip(*kinds, strict=True):
        assert sparse.is_sparse
        torch.testing.assert_close(sparse.to_dense(), dense)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
