"""The click model: loss and scores by hand, where its negatives are from, and what PyTorch makes of it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from envs.learners.click_model import Batch, ClickModel, Params
from envs.learners.learner import Shape
from envs.recommenders import click_model as torch_click_model
from envs.recommenders.click_model import ClickModel as TorchClickModel
from envs.recommenders.click_model import LabelledSampler
from envs.vectorized import make_task
from tests.envs.twins import BATCH, DIM, copy_weights, draw, exact_bucket, make_twins, parameters, small_domain

# D = 1. The hidden units are z and -z with z = 1 p + 2 q + 3 p q + 1; the output silu(z) - silu(-z) = z.
PARAMS = Params(
    user=jnp.array([[1.0], [-1.0]]),
    item=jnp.array([[0.5], [-1.0]]),
    bias=jnp.array([0.25, -0.5]),
    hidden_weight=jnp.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]),
    hidden_bias=jnp.array([1.0, -1.0]),
    output_weight=jnp.array([[1.0, -1.0]]),
    output_bias=jnp.array([-0.75]),
)
LOGITS = [[4.0, -4.25], [-1.0, -0.25]]
"""z is 1 + 1 + 1.5 + 1 = 4.5 and 1 - 2 - 3 + 1 = -3 for user 0, -1 + 1 - 1.5 + 1 = -0.5 and -1 - 2 + 3 + 1 = 1 for user
1; then - 0.75 and the item's bias."""


@pytest.fixture(scope="module")
def domain():
    return small_domain()


@pytest.fixture(scope="module")
def shown(domain):
    """The domain with three recorded exposures."""
    pairs = np.array([[0, 3], [5, 1], [7, 2]])
    exposures = dataclasses.replace(
        domain.train, user=pairs[:, 0].astype(np.int32), item=pairs[:, 1].astype(np.int32), timestamp=None, rating=None
    )
    return dataclasses.replace(domain, exposures=exposures)


def _hand_worked() -> tuple[ClickModel, TorchClickModel]:
    model = TorchClickModel(2, 2, 1)
    copy_weights(PARAMS, model)
    return ClickModel(shape=Shape(2, 2, 0, 0), dim=1, batch=1), model


def test_loss_by_hand():
    # Pair (0, 0) taken: ln(1 + e^-4) = 0.0181499; pair (1, 0) not taken: ln(1 + e^-1) = 0.3132617. The mean: 0.1657058.
    learner, model = _hand_worked()
    user, item, label = [0, 1], [0, 0], [1.0, 0.0]
    batch = Batch(jnp.array(user), jnp.array(item), jnp.array(label), jnp.ones((2, 2)))
    assert float(learner.loss(PARAMS, None, batch)) == pytest.approx(0.1657058, abs=1e-6)  # type: ignore[arg-type]
    theirs = model(torch.tensor(user), torch.tensor(item), torch.tensor(label))
    assert theirs.item() == pytest.approx(0.1657058, abs=1e-6)


def test_scores_by_hand():
    learner, model = _hand_worked()
    scores = learner.scores(PARAMS, None, jnp.arange(2))  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, LOGITS, atol=1e-6)
    np.testing.assert_allclose(model.score(torch.arange(2)), LOGITS, atol=1e-6)


@pytest.mark.parametrize("entries", [1, 3_000, 1 << 22])
def test_scores_are_the_logits_of_every_pair(domain, monkeypatch, entries):
    monkeypatch.setattr(torch_click_model, "_CHUNK_ENTRIES", entries)
    model = TorchClickModel.for_domain(domain, dim=DIM, generator=_generator())
    nn.init.normal_(model.bias.weight)
    users, items = torch.arange(0, domain.num_users, 5), torch.arange(domain.num_items)
    with torch.no_grad():
        pairs = model.logits(users.repeat_interleave(len(items)), items.repeat(len(users)))
    np.testing.assert_allclose(model.score(users), pairs.view(len(users), len(items)), atol=1e-6)


def test_negatives_are_any_items_of_the_same_users(domain):
    learner, data, _, model = make_twins("click_model", domain)
    batches = [draw(learner, data, jax.random.key(seed))[1] for seed in range(60)]
    sampler = model.sampler(domain, BATCH, seed=0)
    for drawn in (batches, [sampler.next() for _ in range(60)]):
        user, item, label = (torch.stack(fields) for fields in zip(*drawn, strict=True))
        assert label.dtype == torch.float32
        assert torch.equal(label, torch.tensor([1.0] * BATCH + [0.0] * BATCH).expand(60, -1))
        assert torch.equal(user[:, :BATCH], user[:, BATCH:])
        counts = torch.bincount(item[:, BATCH:].flatten(), minlength=domain.num_items).double()
        expected = 60 * BATCH / domain.num_items
        assert len(counts) == domain.num_items
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_every_row_is_a_positive_once_an_epoch(domain):
    rows = len(domain.train)
    user, item, _ = LabelledSampler(domain.train, rows, seed=0).next()
    expected = domain.train.user.astype(np.int64) * domain.num_items + domain.train.item
    np.testing.assert_array_equal(np.sort((user * domain.num_items + item)[:rows]), np.sort(expected))


def test_negatives_are_recorded_exposures_where_there_are_any(shown):
    expected = {(0, 3), (5, 1), (7, 2)}
    bucket = exact_bucket("click_model", shown, exposures=8)  # five of them padding
    learner = bucket.make_learner()
    data = jax.tree.map(jnp.asarray, make_task(shown, bucket).data)
    positives = set(zip(shown.train.user.tolist(), shown.train.item.tolist(), strict=True))
    sampler = TorchClickModel.for_domain(shown, dim=DIM).sampler(shown, BATCH, seed=0)
    for user, item, label in (draw(learner, data, jax.random.key(0))[1], sampler.next()):
        pairs = list(zip(user.tolist(), item.tolist(), strict=True))
        assert set(pairs[BATCH:]) == expected
        assert set(pairs[:BATCH]) <= positives
        assert label.tolist() == [1.0] * BATCH + [0.0] * BATCH


def test_a_table_of_no_exposures_is_none(domain):
    none = domain.train.select(np.arange(0))
    user, _, _ = LabelledSampler(domain.train, BATCH, exposures=none, seed=0).next()
    assert torch.equal(user[:BATCH], user[BATCH:])


def test_a_sampler_resumes(shown):
    model = TorchClickModel.for_domain(shown, dim=DIM)
    sampler = model.sampler(shown, BATCH, seed=0)
    sampler.next()
    state = sampler.state_dict()
    expected = [sampler.next() for _ in range(30)]
    resumed = model.sampler(shown, BATCH, seed=9)
    resumed.load_state_dict(state)
    for batch in expected:
        assert all(torch.equal(mine, other) for mine, other in zip(resumed.next(), batch, strict=True))


def test_dropout_acts_at_the_same_place(domain):
    learner, data, params, model = make_twins("click_model", domain)
    batch, tensors = draw(learner, data, jax.random.key(0))
    keep = np.where(np.random.default_rng(0).random(batch.keep.shape) < 0.6, 1 / 0.6, 0.0).astype(np.float32)

    class Mask(nn.Module):
        def forward(self, values):
            return values * torch.from_numpy(keep)

    model.dropout = Mask()
    loss = learner.loss(params, data, batch._replace(keep=jnp.asarray(keep)))
    assert float(loss) == pytest.approx(model(*tensors).item(), abs=1e-6)
    assert float(loss) != pytest.approx(float(learner.loss(params, data, batch)), abs=1e-5)


def test_first_weights_have_xaviers_spread(domain):
    learner, data, _, _ = make_twins("click_model", domain)
    params = dataclasses.replace(learner, dim=64).init(data, key=jax.random.key(0))
    model = TorchClickModel.for_domain(domain, dim=64, generator=_generator())
    users, items = domain.num_users, domain.num_items
    fans = (users + 64, items + 64, None, 192 + 128, None, 128 + 1, None)  # rows and columns; biases start at zero
    for mine, theirs, fan in zip(params, parameters(model), fans, strict=True):
        expected = math.sqrt(2 / fan) if fan else 0.0
        assert float(mine.std()) == pytest.approx(expected, rel=0.2)
        assert theirs.detach().numpy().std() == pytest.approx(expected, rel=0.2)


def test_sparse_tables_have_the_same_gradients(domain):
    kinds = []
    for sparse in (False, True):
        model = TorchClickModel(domain.num_users, domain.num_items, DIM, sparse=sparse, generator=_generator())
        model(*model.sampler(domain, BATCH, seed=0).next()).backward()
        kinds.append([table.weight.grad for table in (model.user, model.item, model.bias)])
    for dense, sparse in zip(*kinds, strict=True):
        assert sparse.is_sparse
        torch.testing.assert_close(sparse.to_dense(), dense)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
